"""Weights of other frameworks: names, recognition, faults, files; without the frameworks.

That the converted networks compute the same is proved by test_parity.py.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from campaigns import mnas, mnas_here
from convert_parts import (
    foreign_arrays,
    foreign_file,
    lively_checkpoint,
    same_arrays,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from retrain_parts import TINY, TINY_RECIPE
from safetensors.numpy import load_file, save_file

from retrain.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retrain.commands import validate_command
from retrain.convert import ConvertReport, convert
from retrain.data import Normalisation
from retrain.foreign_weights import Origin, open_checkpoint
from retrain.frameworks import (
    FRAMEWORKS,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    counter_names,
    known_network,
    name_map,
    timm_strings,
)
from space.architecture import Architecture, BlockSpec, NetworkStyle, parse_architecture
from space.errors import ConfigError
from space.mnasnet import adapt, published
from space.network import build_network
from space.parameters import parameter_shapes
from space.search_space import load_space

MODELS = [(framework, model) for framework, made in FRAMEWORKS.items() for model in made.models]

#: B1's form in small: every framework can have it.
SMALL_B1 = parse_architecture(
    "stem8 | r1_k3_s11_e1_i8_o8_noskip | r2_k3_s22_e3_i8_o16 | r1_k5_s11_e6_i16_o16 | head24"
    " | r32 | c5"
)
SMALL_TEXT = SMALL_B1.text
SPACE = load_space("mnasnet")


def checkpoint_file(path: Path, architecture: Architecture, style: NetworkStyle) -> Checkpoint:
    checkpoint = lively_checkpoint(architecture, style)
    save_checkpoint(path, checkpoint)
    return checkpoint


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize(("framework", "model"), MODELS)
def test_every_known_networks_names_are_one_to_one(framework: str, model: str) -> None:
    made = FRAMEWORKS[framework]
    network = known_network(made, model)
    assert made.refusal(network, made.style) is None
    names = name_map(made, network)
    assert list(names) == list(parameter_shapes(network))
    assert len(set(names.values()) | set(counter_names(made, network))) == len(names) + len(
        counter_names(made, network)
    )


@pytest.mark.parametrize(
    ("framework", "model", "count", "some"),
    [
        (
            "timm", "semnasnet_100", 328,
            {
                "conv_stem.weight": (32, 3, 3, 3),
                "bn1.running_var": (32,),
                "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
                "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
                "blocks.2.0.se.conv_reduce.weight": (6, 72, 1, 1),
                "blocks.2.0.se.conv_expand.bias": (72,),
                "blocks.6.0.conv_pwl.weight": (320, 960, 1, 1),
                "blocks.6.0.bn3.num_batches_tracked": (),
                "conv_head.weight": (1280, 320, 1, 1),
                "bn2.bias": (1280,),
                "classifier.weight": (1000, 1280),
            },
        ),
        (
            "torchvision", "mnasnet1_0", 314,
            {
                "layers.0.weight": (32, 3, 3, 3),
                "layers.4.running_mean": (32,),
                "layers.6.weight": (16, 32, 1, 1),
                "layers.8.2.layers.3.weight": (72, 1, 3, 3),
                "layers.13.0.layers.7.bias": (320,),
                "layers.15.num_batches_tracked": (),
                "classifier.1.bias": (1000,),
            },
        ),
        (
            "mindcv", "mnasnet_050", 262,
            {
                "features.0.weight": (16, 3, 3, 3),
                "features.1.gamma": (16,),
                "features.8.layers.0.weight": (24, 8, 1, 1),
                "features.23.layers.7.moving_variance": (160,),
                "features.24.weight": (1280, 160, 1, 1),
                "features.25.beta": (1280,),
                "classifier.weight": (1000, 1280),
            },
        ),
    ],
)  # fmt: skip
def test_the_frameworks_own_names_and_shapes(
    framework: str, model: str, count: int, some: dict[str, tuple[int, ...]]
) -> None:
    arrays = foreign_arrays(framework, known_network(FRAMEWORKS[framework], model))
    assert len(arrays) == count
    assert {name: arrays[name].shape for name in some} == some


blocks = st.builds(
    BlockSpec,
    op=st.sampled_from(["conv", "dconv", "mbconv"]),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    expand_ratio=st.just(1),
    se_ratio=st.sampled_from([0.0, 0.25, 0.3]),
    skip=st.sampled_from(["none", "identity", "pool"]),
    filters=st.integers(1, 5).map(lambda n: 4 * n),
    layers=st.integers(1, 3),
    stride=st.integers(1, 2),
).flatmap(
    lambda block: (
        st.integers(2, 6).map(lambda e: dataclasses.replace(block, op="mbconv", expand_ratio=e))
        if block.op == "mbconv"
        else st.just(block)
    )
)
architectures = st.builds(
    Architecture,
    stem_filters=st.sampled_from([4, 8]),
    blocks=st.lists(blocks, min_size=1, max_size=5).map(tuple),
    head_filters=st.just(8),
    resolution=st.just(64),
    classes=st.just(3),
    stem_stride=st.integers(1, 2),
)


@settings(max_examples=150, deadline=None)
@given(architectures, st.sampled_from(sorted(FRAMEWORKS)))
def test_a_network_is_refused_with_a_reason_or_its_names_are_one_to_one(
    network: Architecture, framework: str
) -> None:
    made = FRAMEWORKS[framework]
    refusal = made.refusal(network, made.style)
    if refusal is None:
        names = name_map(made, network)
        assert names.keys() == parameter_shapes(network).keys()
        assert len(set(names.values())) == len(names)
    else:
        assert len(refusal) > 20


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_timm_has_every_network_of_the_papers_space_without_pooling_or_squeezed_conv(
    seed: int,
) -> None:
    network = SPACE.decode(SPACE.sample(np.random.default_rng(seed)))
    without = [
        dataclasses.replace(
            block,
            skip="none" if block.skip == "pool" else block.skip,
            se_ratio=0.0 if block.op == "conv" else block.se_ratio,
        )
        for block in network.blocks
    ]
    network = dataclasses.replace(network, blocks=tuple(without))
    made = FRAMEWORKS["timm"]
    assert made.refusal(network, made.style) is None
    names = name_map(made, network)
    assert len(set(names.values())) == len(names)


def test_squeezed_widths_that_timm_rounds_otherwise_are_said_layer_by_layer() -> None:
    network = parse_architecture(
        "stem8 | r2_k3_s22_e3_i8_o24_se0.3 | r1_k3_s11_e1_i24_o8_se0.25_noskip | head8 | r32 | c3"
    )
    # int(8 * 0.3) = 2 and int(24 * 0.3) = 7; round() makes 2 and 7 of them as well ...
    assert timm_strings(network)[0] == ["ir_r2_k3_s2_e3_c24_se0.3"]
    odd = parse_architecture("stem8 | r2_k3_s22_e3_i8_o24_se0.2 | head8 | r32 | c3")
    # ... but int(8 * 0.2) = 1 is 2 there.
    assert timm_strings(odd) == [["ir_r1_k3_s2_e3_c24_se0.125", f"ir_r1_k3_s2_e3_c24_se{4 / 24}"]]


@pytest.mark.parametrize(
    ("network", "style", "to", "reason"),
    [
        ("mnasnet-a1", "torchvision", "torchvision", "it has squeeze-and-excitation"),
        ("mnasnet-a1", "mindcv", "mindcv", "it has squeeze-and-excitation"),
        ("mnasnet-small", "mindcv", "mindcv", "without a skip"),
        (SMALL_TEXT.replace("stem8", "stem8_s11"), "mindcv", "mindcv", "its stem has stride 1"),
        (SMALL_TEXT, "paper", "torchvision", "pad as TensorFlow does"),
        (SMALL_TEXT.replace("o16 | head", "o16_noskip | head"), "timm", "torchvision", "block 3"),
        (SMALL_TEXT.replace("e3_i8", "e1_i8"), "timm", "mindcv", "block 2 is no inverted"),
        (SMALL_TEXT.replace("o16 | head", "o16_pool | head"), "timm", "timm", "pooling skip"),
        (SMALL_TEXT.replace("k5_s11_e6_i16_o16", "k5_s11_e1_i16_o16_se0.25_conv"), "timm", "timm",
         "regular convolution with squeeze-and-excitation"),
        (SMALL_TEXT.replace("o16 | r1", "o12 | r1").replace("e6_i16", "e3_i12"), "timm", "timm",
         "36 channels in its middle"),
    ],
)  # fmt: skip
def test_a_network_that_a_framework_cannot_have_is_refused_with_the_reason(
    network: str, style: str, to: str, reason: str, tmp_path: Path
) -> None:
    made = parse_architecture(network) if "|" in network else published(network)
    styles = {name: framework.style for name, framework in FRAMEWORKS.items()}
    checkpoint_file(tmp_path / "m.safetensors", made, styles.get(style, NetworkStyle()))
    with pytest.raises(ConfigError, match=f"--to {to}: .*{reason}"):
        convert(tmp_path / "m.safetensors", tmp_path / "out.safetensors", to=to)
    assert not (tmp_path / "out.safetensors").exists()


# ---------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("framework", "model"), MODELS)
def test_a_known_network_is_recognised_with_its_classes_and_channels(
    framework: str, model: str, tmp_path: Path
) -> None:
    made = FRAMEWORKS[framework]
    network = adapt(known_network(made, model), classes=7, input_channels=1)
    source = foreign_file(tmp_path / "in.safetensors", framework, network)
    origin = Origin(mean=(0.5,), deviation=(0.25,))
    report = convert(source, tmp_path / "m.safetensors", origin=origin)
    assert (report.source_framework, report.recognised) == (framework, True)
    assert report.architecture == network.text
    assert report.architecture_hash == network.hash
    # mnasnet_a1 and mnasnet_b1 are older names of two others.
    assert known_network(made, report.model or "") == known_network(made, model)


@pytest.mark.parametrize(
    ("framework", "file"),
    [
        ("timm", "theirs.safetensors"),
        ("torchvision", "theirs.safetensors"),
        ("mindcv", "theirs.safetensors"),
        ("mindcv", "theirs.ckpt"),
    ],
)
def test_weights_go_there_and_back_bit_by_bit(framework: str, file: str, tmp_path: Path) -> None:
    made = FRAMEWORKS[framework]
    written = checkpoint_file(tmp_path / "m.safetensors", SMALL_B1, made.style)
    theirs = tmp_path / file
    report = convert(tmp_path / "m.safetensors", theirs, to=framework)
    assert report.notes[1:] == ()
    back = convert(theirs, tmp_path / "back.safetensors", origin=Origin(arch=SMALL_TEXT))
    assert (back.notes, back.model) == ((), None)
    read = load_checkpoint(tmp_path / "back.safetensors")
    assert (read.architecture, read.style) == (SMALL_B1, made.style)
    assert (read.normalisation, read.training) == (written.normalisation, None)
    assert same_arrays(tmp_path / "m.safetensors", tmp_path / "back.safetensors")


@settings(max_examples=25, deadline=None)
@given(architectures)
def test_whatever_timm_can_have_goes_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, network: Architecture
) -> None:
    made = FRAMEWORKS["timm"]
    if made.refusal(network, made.style) is not None:
        return
    folder = tmp_path_factory.mktemp("any")
    checkpoint_file(folder / "m.safetensors", network, made.style)
    convert(folder / "m.safetensors", folder / "t.safetensors", to="timm")
    origin = Origin(arch=network.text)
    convert(folder / "t.safetensors", folder / "back.safetensors", origin=origin)
    assert same_arrays(folder / "m.safetensors", folder / "back.safetensors")


def test_safetensors_for_others_remember_what_their_arrays_do_not_say(tmp_path: Path) -> None:
    # Its arrays are those of timm's mnasnet_small, but it is another network.
    network = adapt(published("mnasnet-small"), classes=3, resolution=32)
    network = dataclasses.replace(network, stem_stride=1)
    written = dataclasses.replace(
        lively_checkpoint(network, NetworkStyle("same", 1e-5, 0.9)),
        normalisation=Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        classes=("a", "b", "c"),
    )
    save_checkpoint(tmp_path / "m.safetensors", written)
    convert(tmp_path / "m.safetensors", tmp_path / "t.safetensors", to="timm")
    report = convert(tmp_path / "t.safetensors", tmp_path / "back.safetensors")
    assert "as noted in the file by mnas" in report.notes[0]
    read = load_checkpoint(tmp_path / "back.safetensors")
    for field in ("architecture", "style", "normalisation", "classes"):
        assert getattr(read, field) == getattr(written, field)
    origin = Origin(model="mnasnet_small")
    convert(tmp_path / "t.safetensors", tmp_path / "said.safetensors", origin=origin)
    said = load_checkpoint(tmp_path / "said.safetensors")
    assert (said.architecture.stem_stride, said.style.padding) == (2, "symmetric")


def test_a_converted_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    source = foreign_file(tmp_path / "in.safetensors", "timm", published("mnasnet-small"))
    (tmp_path / "names").write_text("\n".join(f"class {i}" for i in range(1000)) + "\n")
    origin = Origin(classes=str(tmp_path / "names"), resolution=192)
    report = convert(source, tmp_path / "m.safetensors", origin=origin)
    read = load_checkpoint(tmp_path / "m.safetensors")
    assert read.source == f"timm mnasnet_small, in.safetensors, sha256 {report.sha256}"
    assert len(report.sha256) == 64
    assert read.classes[:2] == ("class 0", "class 1")
    assert read.architecture.resolution == 192
    assert (read.normalisation.mean, read.normalisation.deviation) == (
        IMAGENET_MEAN, IMAGENET_DEVIATION,
    )  # fmt: skip
    assert read.style == NetworkStyle("symmetric", 1e-5, 0.9)
    (ignored,) = report.ignored
    assert len(ignored.names) == len(counter_names(FRAMEWORKS["timm"], published("mnasnet-small")))
    assert "counters of training steps" in ignored.reason


def logits(path: Path) -> np.ndarray:
    """Of a checkpoint's network on fixed images."""
    checkpoint = load_checkpoint(path)
    network = build_network(checkpoint.architecture, checkpoint.style, seed=0)
    ms.load_param_into_net(
        network, {n: ms.Parameter(ms.Tensor(v), name=n) for n, v in checkpoint.weights.items()}
    )
    network.set_train(False)
    size, channels = checkpoint.architecture.resolution, checkpoint.architecture.input_channels
    images = np.random.default_rng(0).standard_normal((2, channels, size, size), np.float32)
    return np.asarray(network(ms.Tensor(images)).asnumpy())


def test_another_frameworks_epsilon_changes_scales_and_not_the_outputs(tmp_path: Path) -> None:
    ours, theirs, back = (tmp_path / f"{n}.safetensors" for n in "abc")
    checkpoint_file(ours, SMALL_B1, NetworkStyle("symmetric", 0.1, 0.9))
    report = convert(ours, theirs, to="torchvision")
    assert "epsilon, 1e-05 in place of 0.1; the outputs stay the same" in report.notes[0]
    convert(theirs, back)
    assert load_checkpoint(back).style.batch_norm_epsilon == 1e-5
    assert not same_arrays(ours, back)
    np.testing.assert_allclose(logits(back), logits(ours), atol=1e-5)


def test_converted_weights_can_be_validated_with_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY_RECIPE)
    style = NetworkStyle("same", 1e-5, 0.9)
    checkpoint_file(tmp_path / "m.safetensors", TINY, style)
    report = convert(tmp_path / "m.safetensors", tmp_path / "t.safetensors", to="timm")
    assert 'pad_type="same"' in (report.load or "")
    assert "model.conv_stem.stride = (1, 1)" in (report.load or "")
    assert "mean (0.5,) and deviation (0.25,), not ImageNet's" in report.notes[0]
    origin = Origin(arch=TINY.text, padding="same", mean=(0.5,), deviation=(0.25,))
    convert(tmp_path / "t.safetensors", tmp_path / "back.safetensors", origin=origin)
    reports = [
        validate_command(tmp_path / name, config=str(recipe), threads=1)
        for name in ("m.safetensors", "back.safetensors")
    ]
    assert dataclasses.replace(reports[0], ckpt_path="") == dataclasses.replace(
        reports[1], ckpt_path=""
    )


# ---------------------------------------------------------------------------- what lies in files


def test_half_precision_is_widened_and_it_is_said(tmp_path: Path) -> None:
    arrays = foreign_arrays("timm", SMALL_B1)
    floats = [name for name, value in arrays.items() if value.dtype == np.float32]
    halves = {n: v.astype(np.float16) if n in floats else v for n, v in arrays.items()}
    save_file(halves, tmp_path / "half.safetensors")
    origin = Origin(arch=SMALL_TEXT)
    report = convert(tmp_path / "half.safetensors", tmp_path / "a.safetensors", origin=origin)
    assert report.notes == (f"{len(floats)} arrays were widened from float16 to float32.",)
    stem = load_checkpoint(tmp_path / "a.safetensors").weights["stem.conv.weight"]
    assert np.array_equal(stem, halves["conv_stem.weight"].astype(np.float32))
    # bfloat16 is the upper half of a float32's bits; numpy has no such type.
    header, data = {}, b""
    for name, value in arrays.items():
        is_float = name in floats
        content = (value.view(np.uint32) >> 16).astype(np.uint16) if is_float else value
        header[name] = {
            "dtype": "BF16" if is_float else "I64",
            "shape": value.shape,
            "data_offsets": (len(data), len(data) + content.nbytes),
        }
        data += content.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "brain.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    report = convert(tmp_path / "brain.safetensors", tmp_path / "b.safetensors", origin=origin)
    assert "widened from bfloat16" in report.notes[0]
    read = load_checkpoint(tmp_path / "b.safetensors").weights["stem.conv.weight"]
    stem = arrays["conv_stem.weight"]
    assert np.array_equal(read, (stem.view(np.uint32) >> 16 << 16).view(np.float32))


def test_wrappers_prefixes_are_cut_and_it_is_said(tmp_path: Path) -> None:
    arrays = foreign_arrays("timm", SMALL_B1)
    wrapped = {f"module._orig_mod.{name}": value for name, value in arrays.items()}
    wrapped["n_averaged"] = np.zeros((), np.int64)
    save_file(wrapped, tmp_path / "in.safetensors")
    plain = foreign_file(tmp_path / "plain.safetensors", "timm", SMALL_B1)
    origin = Origin(arch=SMALL_TEXT)
    report = convert(tmp_path / "in.safetensors", tmp_path / "a.safetensors", origin=origin)
    convert(plain, tmp_path / "b.safetensors", origin=origin)
    assert report.notes == (
        "'module.' was cut from the names.",
        "'_orig_mod.' was cut from the names.",
    )
    assert "n_averaged" in report.ignored[0].names
    assert same_arrays(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_checkpoint_of_another_framework_is_opened_as_one_of_ours(tmp_path: Path) -> None:
    network = known_network(FRAMEWORKS["mindcv"], "mnasnet_050")
    arrays = foreign_arrays("mindcv", network)
    source = tmp_path / "mnasnet_050.ckpt"
    ms.save_checkpoint([{"name": n, "data": ms.Tensor(v)} for n, v in arrays.items()], str(source))
    opened = open_checkpoint(source)
    assert (opened.architecture, opened.training) == (network, None)
    assert opened.style == FRAMEWORKS["mindcv"].style
    assert np.array_equal(opened.weights["stem.conv.weight"], arrays["features.0.weight"])
    save_checkpoint(tmp_path / "ours.ckpt", opened)
    again = open_checkpoint(tmp_path / "ours.ckpt")
    assert all(np.array_equal(again.weights[n], v) for n, v in opened.weights.items())
    (tmp_path / "text.ckpt").write_text("no weights")
    with pytest.raises(ConfigError, match=r"something else or damaged|damaged MindSpore file"):
        open_checkpoint(tmp_path / "text.ckpt")
    with pytest.raises(ConfigError, match="no such checkpoint file"):
        open_checkpoint(tmp_path / "none.ckpt")


def test_the_state_of_mindcvs_training_is_left_and_its_averages_are_a_choice(
    tmp_path: Path,
) -> None:
    network, averages = (foreign_arrays("mindcv", SMALL_B1, seed=seed) for seed in (1, 2))
    entries = {
        **network,
        **{f"ema.{name}": value for name, value in averages.items()},
        **{f"moment.{n}": v for n, v in network.items() if "moving" not in n},
        **{f"mean_square.{n}": v for n, v in network.items() if "moving" not in n},
        "global_step": np.array([7], np.int32),
        "learning_rate": np.array(0.1, np.float32),
    }
    source = tmp_path / "best.ckpt"
    listed = [{"name": n, "data": ms.Tensor(v)} for n, v in entries.items()]
    ms.save_checkpoint(listed, str(source))
    with pytest.raises(ConfigError, match="several sets of weights, network, ema; choose"):
        convert(source, tmp_path / "a.safetensors", origin=Origin(arch=SMALL_TEXT))
    for key, expected in (("network", network), ("ema", averages)):
        out = tmp_path / f"{key}.safetensors"
        report = convert(source, out, origin=Origin(arch=SMALL_TEXT, key=key))
        read = load_checkpoint(out)
        assert np.array_equal(read.weights["stem.conv.weight"], expected["features.0.weight"])
        assert read.style == NetworkStyle("symmetric", 1e-3, 0.99)
        assert f"those under {key!r}; beside it lie" in report.notes[0]
    report = convert(source, out, origin=Origin(arch=SMALL_TEXT, key="network"), overwrite=True)
    assert {reason.reason for reason in report.ignored} == {
        "the state of a training, no weights", "the state of an optimizer, no weights",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has no set of weights 'x', but 'network', 'ema'"):
        convert(source, out, origin=Origin(key="x"), overwrite=True)


def spoiled(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays with every kind of fault; 12 of one kind."""
    made = dict(arrays)
    for name in [n for n in made if "blocks.1." in n and "running" in n][:12]:
        del made[name]
    made["extra.weight"] = np.zeros(3, np.float32)
    made["conv_head.weight"] = np.zeros((24, 15, 1, 1), np.float32)
    made["bn1.weight"] = np.zeros(8, np.int32)
    made["bn2.bias"] = np.full(24, np.nan, np.float32)
    return made


def test_all_faults_of_foreign_weights_are_listed_at_once(tmp_path: Path) -> None:
    save_file(spoiled(foreign_arrays("timm", SMALL_B1)), tmp_path / "in.safetensors")
    with pytest.raises(ConfigError) as caught:
        convert(
            tmp_path / "in.safetensors", tmp_path / "m.safetensors", origin=Origin(arch=SMALL_TEXT)
        )
    for part in (
        "missing: blocks.1.0.bn1.running_mean, ",
        " and 2 more; ",
        "unknown: extra.weight",
        "misshapen: conv_head.weight (must be (24, 16, 1, 1), but is (24, 15, 1, 1))",
        "of another type: bn1.weight (int32)",
        "not finite: bn2.bias",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_known_network_with_a_fault_is_named_with_its_faults(tmp_path: Path) -> None:
    arrays = foreign_arrays("timm", published("mnasnet-small"))
    del arrays["blocks.3.0.se.conv_reduce.bias"]
    save_file(arrays, tmp_path / "in.safetensors")
    with pytest.raises(ConfigError, match=r"mnasnet_small; missing: blocks.3.0.se.conv_reduce.bi"):
        convert(tmp_path / "in.safetensors", tmp_path / "m.safetensors")


def test_an_unknown_network_asks_for_its_architecture(tmp_path: Path) -> None:
    source = foreign_file(tmp_path / "in.safetensors", "torchvision", SMALL_B1)
    with pytest.raises(ConfigError, match=r"none of torchvision's known MnasNets.*--arch"):
        convert(source, tmp_path / "m.safetensors")


def test_a_published_network_is_scaled_and_takes_the_arrays_classes(tmp_path: Path) -> None:
    network = adapt(published("mnasnet-a1"), width=0.35, classes=12)
    source = foreign_file(tmp_path / "in.safetensors", "timm", network)
    origin = Origin(arch="mnasnet-a1", width=0.35)
    report = convert(source, tmp_path / "m.safetensors", origin=origin)
    assert (report.architecture, report.model) == (network.text, None)


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
def test_the_files_of_this_project_are_known_by_what_they_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    checkpoint_file(path, SMALL_B1, FRAMEWORKS["timm"].style)
    with pytest.raises(ConfigError, match="is a checkpoint of mnas already; say with --to"):
        convert(path, tmp_path / "o.safetensors")
    with pytest.raises(ConfigError, match="says all about itself, but --arch was given"):
        convert(path, tmp_path / "o.safetensors", to="timm", origin=Origin(arch=SMALL_TEXT))
    assert convert(path, tmp_path / "back.safetensors", to="timm").source_framework == "mnas"
    with pytest.raises(ConfigError, match="`mnas convert` reads weights of other frameworks"):
        load_checkpoint(foreign_file(tmp_path / "t.safetensors", "timm", SMALL_B1))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must be a file of safetensors, PyTorch or MindSpore"),
        (b"hello", "must be a file of safetensors, PyTorch or MindSpore"),
        ((12).to_bytes(8, "little") + b'{"a":"b"}  \n', "is a damaged safetensors file"),
        (b"\n\x03abc" * 9, "is a damaged MindSpore file"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.ckpt"
    source.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        convert(source, tmp_path / "m.safetensors")


def test_a_pytorch_file_without_torch_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "in.pth").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ConfigError, match=r"in.pth: is a PyTorch file.*`pip install torch`"):
        convert(tmp_path / "in.pth", tmp_path / "m.safetensors")
    path = tmp_path / "m.safetensors"
    checkpoint_file(path, SMALL_B1, FRAMEWORKS["timm"].style)
    with pytest.raises(ConfigError, match=r"out.pth: is to be a PyTorch file.*\.safetensors"):
        convert(path, tmp_path / "out.pth", to="timm")


def test_a_safetensors_file_is_converted_without_torch_or_mindspore(tmp_path: Path) -> None:
    source = foreign_file(tmp_path / "in.safetensors", "timm", published("mnasnet-small"))
    code = (
        "import sys; from pathlib import Path; from retrain.convert import convert;"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print(sorted({'torch', 'mindspore', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "m.safetensors")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# ---------------------------------------------------------------------------- command line


def test_the_command_line_converts_there_and_back(tmp_path: Path) -> None:
    source = foreign_file(tmp_path / "in.safetensors", "timm", published("mnasnet-small"))
    done = mnas("convert", str(source), str(tmp_path / "m.safetensors"))
    assert done.returncode == 0, done.stderr
    assert "timm mnasnet_small, recognised from its arrays" in done.stdout
    assert "num_batches_tracked" in done.stdout
    back = tmp_path / "new" / "back.safetensors"
    done = mnas("convert", str(tmp_path / "m.safetensors"), str(back), "--to", "timm", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {f.name for f in dataclasses.fields(ConvertReport)}
    written, original = load_file(back), load_file(source)
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no.safetensors", "m.safetensors"), "no.safetensors: no such weight file"),
        (("in.safetensors", "m.npz"), "must end in .safetensors"),
        (("in.safetensors", "m.pth"), "must end in .safetensors for mnas"),
        (("in.safetensors", "m.ckpt", "--to", "timm"), "for timm, but ends in '.ckpt'"),
        (("in.safetensors", "there.safetensors"), "is there already"),
        (("in.safetensors", "m.safetensors", "--to", "tim"), "did you mean 'timm'?"),
        (("in.safetensors", "m.safetensors", "--from", "keras"), "--from: unknown name 'keras'"),
        (("in.safetensors", "m.safetensors", "--from", "mindcv"), "holds names of timm"),
        (("in.safetensors", "m.safetensors", "--model", "mnasnet_smal"), "'mnasnet_small'?"),
        (("in.safetensors", "m.safetensors", "--model", "mnasnet_100"), "misshapen: "),
        (("in.safetensors", "m.safetensors", "--width", "2"), "--width: is the multiplier"),
        (("in.safetensors", "m.safetensors", "--mean", "a,b", "--std", "1"), "--mean: must be"),
        (("in.safetensors", "m.safetensors", "--mean", "0.5"), "must stand beside --std"),
        (("in.safetensors", "m.safetensors", "--mean", "0.5", "--std", "1"), "must be 3 numbers"),
        (("in.safetensors", "m.safetensors", "--padding", "sane"), "did you mean 'same'?"),
        (("in.safetensors", "m.safetensors", "--batch-norm-epsilon", "0"), "must be in [1e-12"),
        (("in.safetensors", "m.safetensors", "--classes", "names"), "must hold 1000 different"),
        (("other.safetensors", "m.safetensors"), "names of no known framework (x, ...)"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_status_2(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    foreign_file(tmp_path / "in.safetensors", "timm", published("mnasnet-small"))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "names").write_text("a\nb\n")
    done = mnas_here("convert", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("mnas: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    assert not (tmp_path / "m.safetensors").exists()


def test_what_is_there_is_replaced_only_when_asked_and_only_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = foreign_file(tmp_path / "in.safetensors", "timm", published("mnasnet-small"))
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"is there already.*--overwrite"):
        convert(source, out)

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(ConfigError, match="cannot be written"):
            convert(source, out, overwrite=True)
    assert out.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", out.name]
    convert(source, out, overwrite=True)
    assert load_checkpoint(out).architecture == published("mnasnet-small")


def test_the_room_has_the_same_command(tmp_path: Path) -> None:
    source = foreign_file(tmp_path / "in.safetensors", "timm", published("mnasnet-small"))
    done = subprocess.run(
        [sys.executable, "-m", "retrain", "convert", str(source), str(tmp_path / "m.npz")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("retrain: ")
