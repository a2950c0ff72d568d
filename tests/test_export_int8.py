"""An int8 export keeps the accuracy, says what it cost, and is refused where it costs too much."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from retrain import __main__ as room
from retrain import export
from retrain.checkpoint import load_checkpoint
from retrain.commands import export_command, train_command, validate_command
from retrain.data import DataSet
from retrain.export import ExportReport
from retrain.request import Int8Request, TrainRequest
from retrain.restored import data_of, recipe_of
from search import __main__ as search
from space.architecture import parse_architecture
from space.errors import ConfigError
from space.onnx_graph import OPSET, onnx_model

#: Has enough weights that they are most of the file.
NETWORK = (
    "stem16_s11 | r1_k3_s22_e3_i16_o64_se0.25_noskip | r1_k3_s22_e4_i64_o128_noskip | head256"
    " | r8 | c10 | in1"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "out"
    train_command(TrainRequest("digits", NETWORK, out=folder, threads=1, overrides=("epochs=4",)))
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def data(weights: Path) -> DataSet:
    checkpoint = load_checkpoint(weights)
    return data_of(checkpoint, recipe_of(checkpoint, weights, None, None))


@pytest.fixture(scope="module")
def exported(weights: Path) -> tuple[ExportReport, ExportReport]:
    """The float32 and the int8 file, beside the weights."""
    return (
        export_command(weights, weights.with_name("model.onnx"), threads=1),
        export_command(
            weights, weights.with_name("model_int8.onnx"), threads=1, int8=Int8Request()
        ),
    )


def top1(path: str, data: DataSet) -> float:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"input": data.normalise(data.validation.images)})[0]
    return float(np.mean(logits.argmax(axis=1) == data.validation.labels))


def mnas(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("mnas"), *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "GLOG_v": "3"},
    )  # fmt: skip


def test_the_file_is_quantized_smaller_and_as_accurate_as_it_says(
    exported: tuple[ExportReport, ExportReport], data: DataSet
) -> None:
    float32, int8 = exported
    assert int8.size_bytes == Path(int8.path).stat().st_size < 0.4 * float32.size_bytes
    assert (float32.precision, float32.calibration_images) == ("float32", None)
    assert (int8.precision, int8.calibration_images) == ("int8", 256)
    assert int8.exported_top1 == pytest.approx(top1(int8.path, data), abs=1e-9)
    assert int8.mindspore_top1 == pytest.approx(top1(float32.path, data), abs=1e-9)
    assert int8.mindspore_top1 > 0.8
    assert int8.top1_drop == int8.mindspore_top1 - int8.exported_top1 <= 0.02
    assert int8.max_abs_difference > 100 * float32.max_abs_difference

    model = onnx.load(int8.path)
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == OPSET == int8.opset
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] > 5
    types = {x.name: x.data_type for x in model.graph.initializer}
    assert list(types.values()).count(onnx.TensorProto.INT8) > 5


def test_the_files_metadata_are_the_float32_ones_and_its_precision(
    exported: tuple[ExportReport, ExportReport],
) -> None:
    float32, int8 = (
        {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
        for report in exported
    )
    assert (float32["precision"], int8["precision"]) == ("float32", "int8")
    assert int8["calibration_images"] == "256"
    assert float(int8["int8_validation_accuracy"]) == exported[1].exported_top1
    assert {key: int8[key] for key in float32 if key != "precision"} == {
        key: value for key, value in float32.items() if key != "precision"
    }


def as_set(images: NDArray[np.float32]) -> set[bytes]:
    return {image.tobytes() for image in images}


@pytest.mark.parametrize(("asked", "taken"), [(20, 20), (100_000, None)])
def test_calibration_sees_training_images_as_evaluation_does_and_the_same_ones_again(
    asked: int, taken: int | None, weights: Path, data: DataSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right, seen = export.quantized, []

    def watched(model: bytes, batches: Iterable[NDArray[np.float32]], folder: Path) -> bytes:
        seen.append(np.concatenate(list(batches)))
        return right(model, [seen[-1]], folder)

    monkeypatch.setattr(export, "quantized", watched)
    for name in ("one.onnx", "two.onnx"):
        report = export_command(
            weights, tmp_path / name, threads=1, int8=Int8Request(asked, max_drop=1.0)
        )
        assert report.calibration_images == len(seen[-1]) == (taken or len(data.train))
    assert (seen[0] == seen[1]).all()
    training = as_set(data.normalise(data.train.images))
    assert as_set(seen[0]) <= training
    assert len(as_set(seen[0])) > 0.9 * len(seen[0])


def test_a_file_that_loses_too_much_accuracy_is_never_written(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right, out = export.quantized, tmp_path / "model.onnx"

    def badly(model: bytes, batches: Iterable[NDArray[np.float32]], folder: Path) -> bytes:
        # Ranges of black images, in which nothing else fits.
        return right(model, [np.zeros((1, 1, 8, 8), np.float32)], folder)

    monkeypatch.setattr(export, "quantized", badly)
    out.write_bytes(b"mine")
    arguments = ["export", "--ckpt_path", str(weights), "--out", str(out), "--int8", "--overwrite"]
    rule = r"must be at most 0\.02 below .* is 0\.\d+ beside 0\.\d+ on 141 validation images"
    for program in (room, search):
        monkeypatch.setattr(sys, "argv", ["mnas", *arguments, "--threads", "1"])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert re.search(rule, said.err)
        assert (said.out, said.err.count("\n")) == ("", 1)
    assert out.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    report = export_command(
        weights, out, threads=1, overwrite=True, int8=Int8Request(max_drop=1.0)
    )
    assert report.top1_drop > 0.02


def test_the_command_says_what_int8_costs(
    weights: Path, exported: tuple[ExportReport, ExportReport], tmp_path: Path
) -> None:
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(weights.read_bytes())
    done = mnas("export", "--ckpt_path", str(mine), "--int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/model_int8.onnx ({exported[1].size_bytes:,} bytes" in done.stdout
    assert "256 training images" in done.stdout
    both = f"{exported[1].exported_top1:.4f} in int8, {exported[1].mindspore_top1:.4f} in float32"
    assert both in done.stdout
    assert "points" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model_int8.onnx"}


def test_an_export_can_be_evaluated_in_place_of_the_network(
    weights: Path, exported: tuple[ExportReport, ExportReport]
) -> None:
    for report in exported:
        found = validate_command(weights, onnx=Path(report.path), threads=1)
        assert found.top1 == report.exported_top1
        assert (found.images, found.onnx) == (report.images, report.path)


def test_what_is_no_export_of_the_network_is_not_evaluated(weights: Path, tmp_path: Path) -> None:
    other = load_checkpoint(weights).architecture
    path = tmp_path / "model.onnx"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        validate_command(weights, onnx=path, threads=1)
    path.write_bytes(b"no model")
    with pytest.raises(ConfigError, match="must be an ONNX file, but: "):
        validate_command(weights, onnx=path, threads=1)
    text = other.text.replace("head256", "head64")
    path.write_bytes(onnx_model(parse_architecture(text)).SerializeToString())
    with pytest.raises(ConfigError, match=r"an export of the checkpoint's network, [0-9a-f]+, "):
        validate_command(weights, onnx=path, threads=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--int8", "--format", "mindir"), "--int8: must be with --format onnx, but got mindir"),
        (("--int8", "--format", "python"), "--int8: must be with --format onnx, but got python"),
        (("--int8", "--calibration_images", "0"), "--calibration_images: must be >= 1, but got 0"),
        (("--int8", "--max_drop", "2"), "--max_drop: must be a fraction in [0, 1], but got 2"),
        (("--int8", "--max_drop", "nan"), "--max_drop: must be a fraction in [0, 1], but got nan"),
        (("--max_drop", "0.1"), "--max_drop: goes with --int8 only"),
        (("--calibration_images", "9"), "--calibration_images: goes with --int8 only"),
    ],
)
def test_bad_input_ends_in_a_sentence_and_status_2(
    arguments: tuple[str, ...], sentence: str, weights: Path, tmp_path: Path
) -> None:
    done = mnas("export", "--ckpt_path", str(weights), "--out", "m.onnx", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
