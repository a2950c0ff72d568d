"""TensorBoard curves of a search: `tensorboard --logdir DIR/tensorboard`, also while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from search.engine import CampaignWatcher, Relay
from search.trial import Trial


class TensorBoard(Relay):
    """A watcher that draws what it is told, and passes it on to another one.

    Reward, accuracy, metrics and times are drawn over trials, the controller's diagnostics (the
    entropy among them) over updates, and so is `workers/busy`: the share of the workers' time
    since the update before in which they evaluated. An evaluation counts where it ends: in mode
    async an update may have a little of its neighbours' time, and be above 1.

    Args:
        watcher: Is told everything, too.
        folder: Of the event files; a resumed campaign adds a file.
        workers: Evaluations at once; None, where a cluster decides, draws no share.
    """

    def __init__(self, watcher: CampaignWatcher, folder: Path, workers: int | None) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        super().__init__(watcher)
        self._writer = SummaryWriter(str(folder))
        self._workers = workers
        self._busy_s = 0.0
        self._update_before = self._last_end = time.time()

    def trial(self, trial: Trial) -> None:
        """Draw a trial's figures."""
        super().trial(trial)
        figures = {"reward": trial.reward, "accuracy": trial.accuracy, **(trial.metrics or {})}
        self._draw("trial", figures, trial.id)
        self._draw("seconds", trial.timings or {}, trial.id)
        self._busy_s += (trial.timings or {}).get("train_s", 0.0)
        self._last_end = max(self._last_end, trial.finished_at or 0.0)

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Draw a controller's diagnostics."""
        super().update(batch, diagnostics)
        self._draw("controller", diagnostics, batch)
        wall_s = self._last_end - self._update_before
        if self._workers is not None and wall_s > 0:
            self._draw("workers", {"busy": self._busy_s / (self._workers * wall_s)}, batch)
        self._busy_s, self._update_before = 0.0, self._last_end
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _draw(self, group: str, figures: Mapping[str, float | None], step: int) -> None:
        for name, value in figures.items():
            if value is not None:
                # TensorBoard takes a colon in a name for something else.
                self._writer.add_scalar(f"{group}/{name.replace(':', '_')}", value, step)
