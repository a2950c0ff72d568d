"""The MindSpore network and the ONNX graph are one network."""

from __future__ import annotations

import subprocess
import sys

import mindspore as ms
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, parse_architecture
from space.errors import ConfigError
from space.mnasnet import adapt, published
from space.network import build_network, network_weights
from space.onnx_graph import OPSET, onnx_model
from space.parameters import initial_parameters, parameter_shapes
from space.search_space import load_space

ms.set_context(mode=ms.GRAPH_MODE)

SYMMETRIC = NetworkStyle("symmetric", 1e-5, 0.9)

#: Together they hold every operation, kernel, skip, squeeze-and-excitation, widths that grow and
#: shrink under pooling, odd sizes, gray images, both stems.
EVERYTHING = (
    "stem8_s11 | r2_k3_s11_e1_i8_o16_se0.25_pool | r2_k5_s22_e1_i16_o12_pool_conv"
    " | r2_k3_s22_e3_i12_o24_se0.25_pool | r1_k5_s22_e6_i24_o16_pool | head32 | r19 | c5 | in1"
)
IDENTITIES = (
    "stem8 | r2_k3_s11_e1_i8_o8_conv | r2_k7_s22_e2_i8_o12_se0.5 | r1_k3_s11_e1_i12_o12_se1_conv"
    " | r2_k5_s11_e4_i12_o12_noskip | head24 | r30 | c7"
)


def random_weights(architecture: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Initial weights, with batch norms as if trained: all statistics differ from 0 and 1."""
    rng = np.random.default_rng(seed)
    weights = dict(initial_parameters(architecture, seed))
    for name, value in weights.items():
        if ".norm." in name or name.endswith("bias"):
            positive = name.endswith(("gamma", "moving_variance"))
            drawn = (
                rng.uniform(0.5, 1.5, value.shape) if positive else rng.normal(0, 0.3, value.shape)
            )
            weights[name] = drawn.astype(np.float32)
    # Logits of the size that a trained network has.
    size = architecture.resolution
    x = rng.normal(size=(4, architecture.input_channels, size, size)).astype(np.float32)
    largest = float(np.abs(onnx_logits(onnx_model(architecture, weights=weights), x)).max())
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = (weights[name] * (5.0 / largest)).astype(np.float32)
    return weights


def mindspore_logits(
    architecture: Architecture, style: NetworkStyle, weights: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    network = build_network(architecture, style, seed=9, depthwise="native")
    for parameter in network.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
    network.set_train(False)
    logits: np.ndarray = network(ms.Tensor(x)).asnumpy()
    return logits


def onnx_logits(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(None, {"input": x})[0]
    return logits


@pytest.mark.parametrize("style", [PAPER_STYLE, SYMMETRIC], ids=["same", "symmetric"])
@pytest.mark.parametrize("text", [EVERYTHING, IDENTITIES], ids=["everything", "identities"])
def test_the_onnx_graph_equals_the_mindspore_network(text: str, style: NetworkStyle) -> None:
    architecture = parse_architecture(text)
    weights = random_weights(architecture, 4)
    size = architecture.resolution
    shape = (3, architecture.input_channels, size, size)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours = mindspore_logits(architecture, style, weights, x)
    theirs = onnx_logits(onnx_model(architecture, style, weights=weights), x)
    assert np.abs(ours).max() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnasnet-a1", "mnasnet-b1", "mnasnet-small"])
def test_the_published_networks_are_the_same_in_both(name: str) -> None:
    architecture = adapt(published(name), resolution=96)
    weights = random_weights(architecture, 1)
    x = np.random.default_rng(0).normal(size=(2, 3, 96, 96)).astype(np.float32)
    ours = mindspore_logits(architecture, PAPER_STYLE, weights, x)
    theirs = onnx_logits(onnx_model(architecture, weights=weights), x)
    assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("space_name", ["small_image", "accel_nasbench"])
def test_random_members_are_the_same_in_both(space_name: str) -> None:
    space = load_space(space_name, resolution=32)
    rng = np.random.default_rng(11)
    for seed in range(5):
        architecture = space.decode(space.sample(rng))
        weights = random_weights(architecture, seed)
        x = rng.normal(size=(2, 3, 32, 32)).astype(np.float32)
        ours = mindspore_logits(architecture, PAPER_STYLE, weights, x)
        theirs = onnx_logits(onnx_model(architecture, weights=weights), x)
        assert np.abs(ours - theirs).max() <= 1e-4, architecture.text


@pytest.mark.parametrize("text", [EVERYTHING, IDENTITIES, published("mnasnet-a1").text])
def test_parameters_are_named_and_shaped_as_documented(text: str) -> None:
    architecture = parse_architecture(text)
    network = build_network(architecture, seed=0, depthwise="native")
    shapes = {p.name: tuple(p.shape) for p in network.get_parameters()}
    assert shapes == parameter_shapes(architecture)
    trainable = {p.name for p in network.trainable_params()}
    assert trainable == {name for name in shapes if ".moving_" not in name}


def test_initial_weights_depend_on_the_seed_alone() -> None:
    architecture = parse_architecture(EVERYTHING)
    first = network_weights(build_network(architecture, seed=3, depthwise="native"))
    again = network_weights(build_network(architecture, SYMMETRIC, seed=3, depthwise="native"))
    drawn = initial_parameters(architecture, 3)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(np.array_equal(first[name], drawn[name]) for name in first)


def test_the_graph_says_what_it_is_and_takes_any_batch() -> None:
    architecture = parse_architecture(EVERYTHING)
    model = onnx_model(architecture, metadata={"classes": "0,1"})
    onnx.checker.check_model(model, full_check=True)
    described = {entry.key: entry.value for entry in model.metadata_props}
    assert described["architecture"] == architecture.text
    assert described["architecture_hash"] == architecture.hash
    assert described["classes"] == "0,1"
    assert model.opset_import[0].version == OPSET
    for batch in (1, 5):
        x = np.zeros((batch, 1, 19, 19), np.float32)
        assert onnx_logits(model, x).shape == (batch, 5)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_weights_that_do_not_fit_are_all_listed() -> None:
    architecture = parse_architecture(EVERYTHING)
    weights = dict(initial_parameters(architecture, 0))
    del weights["classifier.bias"]
    weights["stem.conv.weight"] = np.zeros((1, 2, 3, 3), np.float32)
    weights["extra"] = np.zeros(1, np.float32)
    with pytest.raises(ConfigError) as caught:
        onnx_model(architecture, weights=weights)
    for part in (
        "classifier.bias is missing",
        "extra is unexpected",
        "stem.conv.weight must have",
    ):
        assert part in str(caught.value)


def test_the_graph_is_written_without_a_training_framework() -> None:
    code = (
        "import sys; from space.onnx_graph import onnx_model; from space.mnasnet import published;"
        "onnx_model(published('mnasnet-a1'));"
        "sys.exit(any(name in sys.modules for name in ('mindspore', 'ray', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0


def test_the_random_weights_keep_activations_in_a_normal_range() -> None:
    # Denormals or infinities would distort a timing.
    space = load_space("mnasnet", resolution=64)
    rng = np.random.default_rng(2)
    for seed in range(4):
        architecture = space.decode(space.sample(rng))
        x = rng.normal(size=(1, 3, 64, 64)).astype(np.float32)
        logits = onnx_logits(onnx_model(architecture, seed=seed), x)
        assert np.isfinite(logits).all()
        assert 1e-12 < np.abs(logits).max() < 1e12
