"""Export a checkpoint, and prove on real images that what leaves is the trained network.

Formats: ONNX, from space/onnx_graph.py; MindSpore's MindIR; a Python module that stands alone.
Each is made in a temporary folder and run beside the MindSpore network on the validation images;
only one that gives the same logits is put where it was asked for.
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
from retrain.train import set_weights
from space.errors import ConfigError, MnasError
from space.files import versions, write_atomically
from space.network import build_network
from space.onnx_graph import INPUT_NAME, OPSET, OUTPUT_NAME, onnx_model
from space.records import record, to_plain

#: Largest difference of a logit between the MindSpore network and the export, as a share of the
#: largest logit where that is above 1: float32 knows no better.
TOLERANCE = 1e-4

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
        mindspore_top1: Accuracy of the MindSpore network, fraction.
        exported_top1: Accuracy of the export, fraction: the same, but for ties within the
            tolerance.
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


@record
class Draft:
    """An export that is not accepted yet.

    Attributes:
        content: Of the file.
        logits: (data, split, batch size) -> float32 logits (n, classes) of the split's images.
        opset: Version of ONNX's operators; None for another format.
        beside: Ending -> content of a further file, named as the file with the ending added.
    """

    content: bytes
    logits: Callable[[DataSet, Split, int], Logits]
    opset: int | None = None
    beside: dict[str, bytes] = field(default_factory=dict)


def export_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    format: str = "onnx",
    network: nn.Cell,
    data: DataSet,
    batch_size: int = 256,
    threads: int = 1,
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

    Raises:
        MnasError: The export's logits differ from the network's; nothing is written.
        ConfigError: The folder of `path` cannot be written to.
    """
    split = data.validation
    expected = logits_of(network, data, split, batch_size)
    with tempfile.TemporaryDirectory(prefix="mnas_export_") as folder:
        draft = _WRITERS[format](checkpoint, Path(folder), threads)
        logits = draft.logits(data, split, batch_size)
    difference = float(np.abs(logits - expected).max())
    # `not <=`, so that a difference that is no number fails, too. Within the tolerance the two can
    # only disagree on an image whose best two logits are as near to each other.
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= tolerance:
        raise MnasError(
            f"{path}: the exported network's logits must be within {tolerance:.3g} of MindSpore's,"
            f" but differ by {difference:.3g} on {len(split)} validation images; nothing was"
            " written."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending, content in draft.beside.items():
            write_atomically(path.with_name(path.name + ending), content)
        write_atomically(path, draft.content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}.") from None
    return ExportReport(
        path=str(path),
        format=format,
        size_bytes=len(draft.content),
        opset=draft.opset,
        split="validation",
        images=len(split),
        max_abs_difference=difference,
        mindspore_top1=evaluation_of(expected, split.labels).top1,
        exported_top1=evaluation_of(logits, split.labels).top1,
    )


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return JSON values: what a user of an export needs beside it, to feed it and to read it."""
    network, style = checkpoint.architecture, checkpoint.style
    values: dict[str, Any] = {
        "architecture": network.text,
        "architecture_hash": network.hash,
        "padding": style.padding,
        "batch_norm_epsilon": style.batch_norm_epsilon,
        "classes": checkpoint.classes,
        "normalisation": to_plain(checkpoint.normalisation),
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


def onnx_logits(
    model: bytes, data: DataSet, split: Split, batch_size: int, *, threads: int = 1
) -> Logits:
    """Return float32 logits (n, classes) of an ONNX model on every image of a split, in order."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
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
