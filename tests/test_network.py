"""The MindSpore network and the ONNX graph are one network."""

from __future__ import annotations

import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import onnx
import pytest
from networks import EVERYTHING, IDENTITIES, SYMMETRIC
from onnx_parity import mindspore_logits, onnx_logits, random_weights

from space.architecture import PAPER_STYLE, NetworkStyle, parse_architecture
from space.errors import ConfigError
from space.mnasnet import published
from space.network import build_network, network_weights
from space.onnx_graph import OPSET, onnx_model
from space.parameters import initial_parameters, parameter_shapes
from space.search_space import load_space

ms.set_context(mode=ms.GRAPH_MODE)


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


@pytest.mark.parametrize("given", [None, "DEFAULT"])
def test_onednn_keeps_to_avx2_unless_the_environment_says_otherwise(given: str | None) -> None:
    others = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    code = "import os, space.network; print(os.environ['ONEDNN_MAX_CPU_ISA'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**others, "GLOG_v": "3", **({} if given is None else {"ONEDNN_MAX_CPU_ISA": given})},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.strip() == (given or "AVX2")
