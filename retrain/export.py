"""Export a checkpoint to ONNX, and prove on real images that the graph is the trained network.

The graph comes from space/onnx_graph.py with the trained weights. It is run by ONNX Runtime beside
the MindSpore network on the validation images before it is written; one that differs never is.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
from mindspore import nn
from numpy.typing import NDArray

from retrain.checkpoint import Checkpoint
from retrain.data import DataSet, Split, eval_batches
from retrain.evaluate import evaluation_of, logits_of
from space.errors import ConfigError, MnasError
from space.files import write_atomically
from space.onnx_graph import INPUT_NAME, OPSET, onnx_model
from space.records import record, to_plain

#: Largest difference of a logit between MindSpore and ONNX Runtime.
TOLERANCE = 1e-4


@record
class ExportReport:
    """What was exported, and how it was checked.

    Attributes:
        path: Of the ONNX file.
        size_bytes: Of the ONNX file.
        opset: Version of the operators.
        split: Part of the data set that it was checked on.
        images: How many images.
        max_abs_difference: Largest difference of a logit between the two runtimes.
        mindspore_top1: Accuracy of the MindSpore network, fraction.
        onnx_top1: Accuracy of the exported graph, fraction: the same, but for ties within
            the tolerance.
    """

    path: str
    size_bytes: int
    opset: int
    split: str
    images: int
    max_abs_difference: float
    mindspore_top1: float
    onnx_top1: float


def export_onnx(
    checkpoint: Checkpoint, path: Path, *, network: nn.Cell, data: DataSet, threads: int = 1
) -> ExportReport:
    """Write a checkpoint as an ONNX model, after checking it against the MindSpore network.

    Args:
        checkpoint: The trained network.
        path: Where to write; what is there is replaced.
        network: The MindSpore network with the checkpoint's weights.
        data: The checkpoint's data set, normalised as it was trained.
        threads: Of ONNX Runtime.

    Raises:
        MnasError: The graph's logits differ from the network's; nothing is written.
        ConfigError: The folder of `path` cannot be written to.
    """
    model = onnx_model(
        checkpoint.architecture,
        checkpoint.recipe.style,
        weights=checkpoint.weights,
        metadata=_metadata(checkpoint),
    )
    content: bytes = model.SerializeToString()
    split, batch_size = data.validation, checkpoint.recipe.eval_batch_size
    expected = logits_of(network, data, split, batch_size)
    logits = onnx_logits(content, data, split, batch_size, threads=threads)
    difference = float(np.abs(logits - expected).max())
    # `not <=`, so that a difference that is no number fails, too. Within the tolerance the two can
    # only disagree on an image whose best two logits are as near to each other.
    if not difference <= TOLERANCE:
        raise MnasError(
            f"{path}: the exported graph's logits must be within {TOLERANCE:g} of the MindSpore"
            f" network's, but differ by {difference:.3g} on {len(split)} validation images;"
            " nothing was written."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}.") from None
    return ExportReport(
        path=str(path),
        size_bytes=len(content),
        opset=OPSET,
        split="validation",
        images=len(split),
        max_abs_difference=difference,
        mindspore_top1=evaluation_of(expected, split.labels).top1,
        onnx_top1=evaluation_of(logits, split.labels).top1,
    )


def onnx_logits(
    model: bytes, data: DataSet, split: Split, batch_size: int, *, threads: int = 1
) -> NDArray[np.float32]:
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


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What a user of the graph needs beside it, as text: how to feed it, how to read it."""
    return {
        "classes": json.dumps(checkpoint.classes),
        "normalisation": json.dumps(to_plain(checkpoint.normalisation)),
        "data": checkpoint.recipe.data.name,
        "validation_accuracy": repr(checkpoint.validation_accuracy),
        "epochs": str(checkpoint.epochs),
        "seed": str(checkpoint.seed),
        "versions": json.dumps(checkpoint.versions),
    }
