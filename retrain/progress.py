"""How far a training is: what the loop reports, a bar on a terminal, lines in a pipe."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from space.records import record

#: In a pipe, a line of progress is printed at most this often.
LINE_INTERVAL_S = 5.0


@record
class TrainProgress:
    """How far a training is.

    Attributes:
        epoch: From 1.
        epochs: Of the whole training.
        step: Optimizer steps done, from 1.
        steps: Of the whole training.
        loss: Of the last step looked at.
        learning_rate: Of the last step.
        images_per_s: Of all workers, since the compilation.
        seconds_left: Estimated, without evaluations; 0 before a step was timed.
        accuracy: On the validation images, at an epoch's end.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_s: float
    seconds_left: float
    accuracy: float | None


class ProgressDisplay:
    """A bar with one line of figures on a terminal, a line now and then in a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}"), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._accuracy: float | None = None
        self._next_line = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        self._task = self._bar.add_task("loading and compiling", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, progress: TrainProgress) -> None:
        """Show how far the training is."""
        if progress.accuracy is not None:
            self._accuracy = progress.accuracy
        line = _line(progress, self._accuracy)
        if self._console.is_terminal:
            assert self._task is not None  # made on entering
            self._bar.update(
                self._task, total=progress.steps, completed=progress.step, description=line
            )
            return
        now = time.monotonic()
        if now >= self._next_line or progress.step == progress.steps:
            self._next_line = now + LINE_INTERVAL_S
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _line(progress: TrainProgress, accuracy: float | None) -> str:
    parts = [
        f"epoch {progress.epoch}/{progress.epochs}",
        f"step {progress.step:,}/{progress.steps:,}",
        f"loss {progress.loss:.4f}",
        f"lr {progress.learning_rate:.3g}",
    ]
    if accuracy is not None:
        parts.append(f"validation accuracy {accuracy:.4f}")
    if progress.images_per_s > 0:
        parts.append(f"{progress.images_per_s:,.0f} images/s")
        parts.append(f"{_duration(progress.seconds_left)} left")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    if seconds < 36_000:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h"
