"""Checkpoints: what is written is read back; anything else is refused with a sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retrain.checkpoint import (
    Checkpoint,
    SavedState,
    Training,
    TrainState,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
)
from retrain.config import DataConfig, Recipe
from retrain.data import Normalisation
from space.architecture import NetworkStyle, parse_architecture
from space.errors import ConfigError
from space.files import versions, write_atomically
from space.parameters import initial_parameters

NETWORK = parse_architecture(
    "stem4_s11 | r1_k3_s22_e1_i4_o8_se0.25_noskip | head16 | r8 | c10 | in1"
)


def checkpoint() -> Checkpoint:
    return Checkpoint(
        architecture=NETWORK,
        style=NetworkStyle("symmetric", 1e-5, 0.9),
        normalisation=Normalisation((0.25,), (0.5,)),
        classes=tuple("0123456789"),
        versions=versions(),
        weights=initial_parameters(NETWORK, 1),
        training=Training(Recipe(DataConfig("digits"), 3), 5, 3, 0.875),
    )


def test_a_checkpoint_is_read_back_as_it_was(tmp_path: Path) -> None:
    path, written = tmp_path / "m.safetensors", checkpoint()
    save_checkpoint(path, written)
    read = load_checkpoint(path)
    assert read.weights.keys() == written.weights.keys()
    for name, value in written.weights.items():
        assert np.array_equal(read.weights[name], value)
        assert read.weights[name].dtype == np.float32
    assert dataclasses.replace(read, weights={}) == dataclasses.replace(written, weights={})


def test_a_ckpt_of_mindspore_holds_the_same_as_safetensors(tmp_path: Path) -> None:
    path, written = tmp_path / "m.ckpt", checkpoint()
    save_checkpoint(path, written)
    read = load_checkpoint(path)
    assert dataclasses.replace(read, weights={}) == dataclasses.replace(written, weights={})
    assert read.weights.keys() == written.weights.keys()
    assert all(np.array_equal(read.weights[n], v) for n, v in written.weights.items())


def test_averaged_weights_are_those_that_are_evaluated() -> None:
    weights = initial_parameters(NETWORK, 1)
    averages = {f"ema.{name}": value + 1 for name, value in weights.items()}
    plain = TrainState(0, 0, (), (), 4, 40, {**weights, "loss_scale": np.zeros(2)})
    averaged = TrainState(0, 0, (), (), 4, 40, {**weights, **averages})
    for name, value in weights.items():
        assert np.array_equal(plain.evaluated_weights(NETWORK)[name], value)
        assert np.array_equal(averaged.evaluated_weights(NETWORK)[name], value + 1)


def test_weights_from_elsewhere_say_so_and_need_no_training(tmp_path: Path) -> None:
    written = dataclasses.replace(checkpoint(), training=None, classes=(), source="timm: a.pth")
    save_checkpoint(tmp_path / "m", written)
    read = load_checkpoint(tmp_path / "m")
    assert dataclasses.replace(read, weights={}) == dataclasses.replace(written, weights={})


def test_a_state_is_read_back_as_it_was_with_types_and_shapes(tmp_path: Path) -> None:
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "optimizer.global_step": np.array([7], np.int32),
        "optimizer.learning_rate": np.array(0.5, np.float32),
    }
    recipe = Recipe(DataConfig("digits"), 3)
    state = TrainState(77, 2, (2.0, 1.5), (0.5, 0.75), 4, 140, arrays)
    written = SavedState(NETWORK.text, recipe, 5, "ab12", state)
    save_state(tmp_path / "s", written)
    read = load_state(tmp_path / "s")
    assert dataclasses.replace(read, state=state) == written
    assert dataclasses.replace(read.state, arrays=arrays) == state
    for name, value in arrays.items():
        assert read.state.arrays[name].shape == value.shape
        assert read.state.arrays[name].dtype == value.dtype
        assert np.array_equal(read.state.arrays[name], value)


def test_all_faults_of_weights_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, checkpoint())
    weights = load_file(path)
    del weights["stem.conv.weight"], weights["stem.norm.beta"]
    weights["extra"] = np.zeros(3, np.float32)
    weights["classifier.bias"] = np.zeros(11, np.float32)
    weights["head.norm.gamma"] = np.full(16, np.nan, np.float32)
    weights["head.norm.beta"] = np.zeros(16, np.float64)
    save_file(weights, path, metadata_of(path))
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    for part in (
        "missing: stem.conv.weight, stem.norm.beta",
        "unexpected: extra",
        "misshapen: classifier.bias (must be (10,), but is (11,))",
        "not finite: head.norm.gamma",
        "not float32: head.norm.beta",
    ):
        assert part in str(caught.value)


def metadata_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata())


def test_weights_of_another_network_are_never_written(tmp_path: Path) -> None:
    wrong = dataclasses.replace(checkpoint(), weights={"x": np.zeros(1, np.float32)})
    with pytest.raises(ConfigError, match="unexpected: x"):
        save_checkpoint(tmp_path / "m.safetensors", wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickle" * 50, bytes(1000)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConfigError, match="must be a safetensors file"):
        load_checkpoint(tmp_path / "m")


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        load_checkpoint(path)


def test_a_missing_checkpoint_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="no such checkpoint file"):
            load_checkpoint(path)


def test_a_training_state_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe(DataConfig("digits"), 3)
    state = TrainState(0, 0, (), (), 4, 40, {})
    save_state(tmp_path / "s", SavedState(NETWORK.text, recipe, 5, None, state))
    with pytest.raises(ConfigError, match="must be in the format 'mnas weights 2'"):
        load_checkpoint(tmp_path / "s")


def test_other_tools_weights_without_metadata_are_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "m")
    with pytest.raises(ConfigError, match="but is in 'an unnamed one'"):
        load_checkpoint(tmp_path / "m")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
