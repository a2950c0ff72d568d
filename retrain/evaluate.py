"""Evaluate a network on a split: every image exactly once."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn
from numpy.typing import NDArray

from retrain.data import DataSet, Split, eval_batches
from retrain.distributed import Workers
from space.records import record


@record
class Evaluation:
    """How well a network does on a split.

    Attributes:
        top1: Share of images whose class has the highest logit.
        top5: Share of images whose class is among the five highest.
        loss: Mean cross entropy, nats, without label smoothing.
        images: How many were evaluated.
        per_class_top1: One per class, in the order of the labels; 0 where the split has none.
    """

    top1: float
    top5: float
    loss: float
    images: int
    per_class_top1: tuple[float, ...]


def logits_of(
    network: nn.Cell, data: DataSet, split: Split, batch_size: int
) -> NDArray[np.float32]:
    """Return float32 logits (n, classes) of every image of a split, in order.

    The last batch is filled up, so that one compiled graph serves all, and the surplus is cut off.
    """
    network.set_train(False)
    batch_size = min(batch_size, len(split))
    found = []
    for images, labels in eval_batches(data, split, batch_size):
        missing = batch_size - len(labels)
        if missing:
            filling = np.zeros((missing, *images.shape[1:]), np.float32)
            images = np.concatenate([images, filling])
        found.append(network(ms.Tensor(images)).asnumpy()[: len(labels)])
    return np.concatenate(found)


def evaluation_of(logits: NDArray[np.float32], labels: NDArray[np.int32]) -> Evaluation:
    """Return the figures of float32 logits (n, classes) against labels (n,)."""
    n, classes = logits.shape
    own = logits[np.arange(n), labels]
    # A tie with another class counts as wrong for the later one, as argmax has it.
    correct = logits.argmax(axis=1) == labels
    rank = (logits > own[:, None]).sum(axis=1)
    # Infinite logits give a loss that is no number: the caller's sign that training diverged.
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(n), labels]
    per_class = [
        float(correct[labels == c].mean()) if (labels == c).any() else 0.0 for c in range(classes)
    ]
    return Evaluation(
        top1=float(correct.mean()),
        top5=float((rank < 5).mean()),
        loss=float(loss.mean()),
        images=n,
        per_class_top1=tuple(per_class),
    )


def evaluate(
    network: nn.Cell, data: DataSet, split: Split, batch_size: int, workers: Workers | None = None
) -> Evaluation:
    """Return how well the network does on a split of the data set.

    With several workers, all must call it: each evaluates its share, and all get the whole's
    figures.
    """
    if workers is None or workers.size == 1:
        return evaluation_of(logits_of(network, data, split, batch_size), split.labels)
    own = split.shard(workers.rank, workers.size)
    sums = np.zeros(2 + 2 * len(data.classes))
    if len(own):
        found = evaluation_of(logits_of(network, data, own, batch_size), own.labels)
        counts = np.bincount(own.labels, minlength=len(data.classes))
        figures = np.array([found.top5, found.loss]) * found.images
        sums = np.concatenate([figures, counts, found.per_class_top1 * counts])
    # Counts below 2**24 are exact in float32.
    sums = workers.sum(sums.astype(np.float32)).astype(np.float64)
    counts, correct = np.round(sums[2:]).reshape(2, -1)
    images = int(counts.sum())
    return Evaluation(
        top1=float(correct.sum() / images),
        top5=float(np.round(sums[0]) / images),
        loss=float(sums[1] / images),
        images=images,
        per_class_top1=tuple((correct / np.maximum(counts, 1)).tolist()),
    )
