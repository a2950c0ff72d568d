"""Export a checkpoint, and prove on real images that what leaves is the trained network.

Formats: ONNX, from space/onnx_graph.py; MindSpore's MindIR; a Python module that stands alone.
Each is made in a temporary folder and run beside the MindSpore network on the validation images;
only one that gives the same logits is put where it was asked for. An ONNX file that has passed may
then be quantized to int8, which changes the logits: it must keep the accuracy.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import Any

import mindspore as ms
import numpy as np
import onnxruntime as ort
from mindspore import nn
from numpy.typing import NDArray

from retrain.checkpoint import Checkpoint, save_checkpoint
from retrain.data import DataSet, Split, eval_batches
from retrain.evaluate import evaluation_of, logits_of
from retrain.python_module import python_module
from retrain.request import Int8Request
from retrain.train import set_weights
from space.errors import ConfigError, MnasError
from space.files import versions, write_atomically
from space.network import build_network
from space.onnx_graph import INPUT_NAME, OPSET, OUTPUT_NAME, onnx_model, with_metadata
from space.quantization import quantized
from space.records import record, to_plain

#: Largest difference of a logit between the MindSpore network and the export, as a share of the
#: largest logit where that is above 1: float32 knows no better.
TOLERANCE = 1e-4

#: Calibration draws its images with this seed, and takes so many of them at a time.
_CALIBRATION_SEED, _CALIBRATION_BATCH = 0, 16

Logits = NDArray[np.float32]


@record
class ExportReport:
    """What was exported, and how it was checked.

    Attributes:
        path: Of the file.
        format: `onnx`, `mindir` or `python`.
        size_bytes: Of the file.
        opset: Version of ONNX's operators; None for another format.
        split: Part of the data set that it was checked on.
        images: How many images.
        max_abs_difference: Largest difference of a logit between the network and the export.
        mindspore_top1: Accuracy of the MindSpore network, float32, fraction.
        exported_top1: Accuracy of the export, fraction: in float32 the same, but for ties within
            the tolerance.
        top1_drop: mindspore_top1 - exported_top1.
        precision: `float32` or `int8`.
        calibration_images: How many training images showed int8's ranges; None in float32.
    """

    path: str
    format: str
    size_bytes: int
    opset: int | None
    split: str
    images: int
    max_abs_difference: float
    mindspore_top1: float
    exported_top1: float
    top1_drop: float
    precision: str
    calibration_images: int | None


@record
class Draft:
    """An export that is not accepted yet.

    Attributes:
        content: Of the file.
        logits: (data, split, batch size) -> float32 logits (n, classes) of the split's images.
        opset: Version of ONNX's operators; None for another format.
        beside: Ending -> content of a further file, named as the file with the ending added.
        calibration_images: See ExportReport.
    """

    content: bytes
    logits: Callable[[DataSet, Split, int], Logits]
    opset: int | None = None
    beside: dict[str, bytes] = field(default_factory=dict)
    calibration_images: int | None = None


def export_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    format: str = "onnx",
    network: nn.Cell,
    data: DataSet,
    batch_size: int = 256,
    threads: int = 1,
    int8: Int8Request | None = None,
) -> ExportReport:
    """Write a checkpoint in another format, after checking that against the MindSpore network.

    Args:
        checkpoint: The trained network.
        path: Where to write; what is there is replaced.
        format: `onnx`, `mindir` or `python`.
        network: The MindSpore network with the checkpoint's weights.
        data: The checkpoint's data set, normalised as the checkpoint says.
        batch_size: Images per step of the check.
        threads: Of ONNX Runtime.
        int8: Quantize the ONNX file; None leaves it float32.

    Raises:
        MnasError: The export's logits differ from the network's, or it cannot be quantized, or
            loses too much accuracy in that; nothing is written.
        ConfigError: The folder of `path` cannot be written to.
    """
    split = data.validation
    expected = logits_of(network, data, split, batch_size)
    with tempfile.TemporaryDirectory(prefix="mnas_export_") as name:
        draft = _WRITERS[format](checkpoint, Path(name), threads)
        logits = draft.logits(data, split, batch_size)
        _check_logits(path, logits, expected)
        if int8 is not None:
            draft = _quantized(draft, data, int8, Path(name), threads)
            logits = draft.logits(data, split, batch_size)
    mindspore_top1, exported_top1 = (
        evaluation_of(found, split.labels).top1 for found in (expected, logits)
    )
    content = draft.content
    if int8 is not None:
        _check_drop(path, mindspore_top1, exported_top1, int8.max_drop, len(split))
        metadata = {
            "precision": "int8",
            "calibration_images": draft.calibration_images,
            "int8_validation_accuracy": exported_top1,
        }
        content = with_metadata(content, _as_text(metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending, text in draft.beside.items():
            write_atomically(path.with_name(path.name + ending), text)
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}.") from None
    return ExportReport(
        path=str(path),
        format=format,
        size_bytes=len(content),
        opset=draft.opset,
        split="validation",
        images=len(split),
        max_abs_difference=float(np.abs(logits - expected).max()),
        mindspore_top1=mindspore_top1,
        exported_top1=exported_top1,
        top1_drop=mindspore_top1 - exported_top1,
        precision="float32" if int8 is None else "int8",
        calibration_images=draft.calibration_images,
    )


def _check_logits(path: Path, logits: Logits, expected: Logits) -> None:
    """Within the tolerance, only an image whose best two logits are as near changes its class."""
    difference = float(np.abs(logits - expected).max())
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    # `not <=`, so that a difference that is no number fails, too.
    if not difference <= tolerance:
        raise MnasError(
            f"{path}: the exported network's logits must be within {tolerance:.3g} of MindSpore's,"
            f" but differ by {difference:.3g} on {len(expected)} validation images; nothing was"
            " written."
        )


def _check_drop(path: Path, float32: float, int8: float, limit: float, images: int) -> None:
    # Accuracies are counts over images: a drop of just the limit may be a rounding error above.
    if float32 - int8 > limit + 1e-9:
        raise MnasError(
            f"{path}: the int8 network's top-1 accuracy must be at most {limit:g} below the"
            f" float32 one's, but is {int8:.4f} beside {float32:.4f} on {images} validation"
            " images; nothing was written: give more --calibration_images or a larger --max_drop."
        )


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return JSON values: what a user of an export needs beside it, to feed it and to read it."""
    network, style = checkpoint.architecture, checkpoint.style
    crop_pct, interpolation = checkpoint.evaluation_crop
    values: dict[str, Any] = {
        "architecture": network.text,
        "architecture_hash": network.hash,
        "padding": style.padding,
        "batch_norm_epsilon": style.batch_norm_epsilon,
        "classes": checkpoint.classes,
        "normalisation": to_plain(checkpoint.normalisation),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "precision": "float32",
        "versions": checkpoint.versions,
        "exported_with": versions(),
    }
    if checkpoint.source is not None:
        values["source"] = checkpoint.source
    training = checkpoint.training
    if training is not None:
        values["data"] = training.recipe.data.name
        values["validation_accuracy"] = training.validation_accuracy
        values["epochs"] = training.epochs
        values["seed"] = training.seed
    return values


def _as_text(values: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
    }


# ---------------------------------------------------------------------------- ONNX


def _onnx(checkpoint: Checkpoint, folder: Path, threads: int) -> Draft:
    model = onnx_model(
        checkpoint.architecture,
        checkpoint.style,
        weights=checkpoint.weights,
        metadata=_as_text(described(checkpoint)),
    )
    content: bytes = model.SerializeToString()

    def logits(data: DataSet, split: Split, batch_size: int) -> Logits:
        return onnx_logits(content, data, split, batch_size, threads=threads)

    return Draft(content, logits, opset=OPSET)


def _quantized(
    draft: Draft, data: DataSet, int8: Int8Request, folder: Path, threads: int
) -> Draft:
    """An ONNX draft in int8, calibrated on training images as evaluation sees them."""
    rng, train = np.random.default_rng(_CALIBRATION_SEED), data.train
    chosen = train.take(np.sort(rng.permutation(len(train))[: int8.calibration_images]))
    batches = (images for images, _ in eval_batches(data, chosen, _CALIBRATION_BATCH))
    content = quantized(draft.content, batches, folder)

    def logits(data: DataSet, split: Split, batch_size: int) -> Logits:
        return onnx_logits(content, data, split, batch_size, threads=threads)

    return Draft(content, logits, opset=draft.opset, calibration_images=len(chosen))


def exported_logits(
    path: Path,
    checkpoint: Checkpoint,
    data: DataSet,
    split: Split,
    batch_size: int,
    *,
    threads: int = 1,
) -> Logits:
    """Return float32 logits (n, classes) of an exported ONNX file on every image of a split.

    Args:
        path: The file, in whichever precision.
        checkpoint: Of the network that was exported.
        data: The checkpoint's data set, normalised as the checkpoint says.
        split: Part of it.
        batch_size: Images per step.
        threads: Of ONNX Runtime.

    Raises:
        ConfigError: The file is not there, is no ONNX file, or is another network's.
    """
    try:
        session = _session(path.read_bytes(), threads)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # ONNX Runtime's errors have no root of their own
        reason = str(error).splitlines()[0][:300]
        raise ConfigError(f"{path}: must be an ONNX file, but: {reason}.") from None
    found = session.get_modelmeta().custom_metadata_map.get("architecture_hash")
    if found != checkpoint.architecture.hash:
        raise ConfigError(
            f"{path}: must be an export of the checkpoint's network,"
            f" {checkpoint.architecture.hash}, but is of {found or 'an unknown one'}."
        )
    return _logits(session, data, split, batch_size)


def onnx_logits(
    model: bytes, data: DataSet, split: Split, batch_size: int, *, threads: int = 1
) -> Logits:
    """Return float32 logits (n, classes) of an ONNX model on every image of a split, in order."""
    return _logits(_session(model, threads), data, split, batch_size)


def _session(model: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _logits(session: ort.InferenceSession, data: DataSet, split: Split, batch_size: int) -> Logits:
    found = [
        session.run(None, {INPUT_NAME: images})[0]
        for images, _ in eval_batches(data, split, batch_size)
    ]
    return np.concatenate(found)


# ---------------------------------------------------------------------------- MindIR


def _mindir(checkpoint: Checkpoint, folder: Path, threads: int) -> Draft:
    """MindSpore's own format: any batch size, its own kernels alone, its description beside it."""
    network = build_network(checkpoint.architecture, checkpoint.style, seed=0, depthwise="native")
    set_weights(network, checkpoint.weights)
    network.set_train(False)
    channels, size = checkpoint.architecture.input_channels, checkpoint.architecture.resolution
    images = ms.Tensor(shape=[None, channels, size, size], dtype=ms.float32)
    file = folder / "model.mindir"
    ms.export(network, images, file_name=str(file), file_format="MINDIR")
    if not file.exists():
        # MindSpore splits what is larger into a graph and files of weights.
        raise MnasError("mindir: the weights must take at most 1 GiB; export as onnx instead.")
    content = file.read_bytes()
    graph = nn.GraphCell(ms.load(str(file)))

    def logits(data: DataSet, split: Split, batch_size: int) -> Logits:
        return logits_of(graph, data, split, batch_size)

    shapes = {
        INPUT_NAME: ["batch", channels, size, size],
        OUTPUT_NAME: ["batch", checkpoint.architecture.classes],
    }
    text = json.dumps({**shapes, **described(checkpoint)}, indent=1, ensure_ascii=False)
    return Draft(content, logits, beside={".json": text.encode()})


# ---------------------------------------------------------------------------- Python


def _python(checkpoint: Checkpoint, folder: Path, threads: int) -> Draft:
    """A module that stands alone; checked with the weights read by its own `load`."""
    content = python_module(checkpoint).encode()
    # A name of its own: MindSpore remembers a module's code by its name.
    file, weights = folder / f"{folder.name}.py", folder / "model.safetensors"
    file.write_bytes(content)
    save_checkpoint(weights, checkpoint)

    def logits(data: DataSet, split: Split, batch_size: int) -> Logits:
        with _imported(file) as module:
            return logits_of(module.load(str(weights)), data, split, batch_size)

    return Draft(content, logits)


@contextmanager
def _imported(file: Path) -> Iterator[ModuleType]:
    """A file's module, known under its name as long as MindSpore needs its source."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None  # the file ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[file.stem]


_WRITERS: dict[str, Callable[[Checkpoint, Path, int], Draft]] = {
    "onnx": _onnx,
    "mindir": _mindir,
    "python": _python,
}
