"""A training's curves for TensorBoard: loss, learning rate, speed, validation accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrain.progress import TrainProgress


@contextmanager
def curves(folder: Path, *, done: int) -> Iterator[Callable[[TrainProgress], None]]:
    """Give a function that adds a training's progress to the curves in a folder.

    Look at them with `tensorboard --logdir FOLDER`.

    Args:
        folder: Of TensorBoard's files.
        done: Optimizer steps that a resumed training has done; what is there beyond is hidden.
    """
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

    def add(progress: TrainProgress) -> None:
        if progress.accuracy is not None:
            writer.add_scalar("accuracy/validation", progress.accuracy, progress.step)
            return
        writer.add_scalar("loss/train", progress.loss, progress.step)
        writer.add_scalar("learning_rate", progress.learning_rate, progress.step)
        if progress.images_per_s > 0:
            writer.add_scalar("images_per_s", progress.images_per_s, progress.step)

    with SummaryWriter(str(folder), purge_step=done + 1 if done else None) as writer:
        yield add
