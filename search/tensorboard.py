"""TensorBoard curves of a search: `tensorboard --logdir DIR/tensorboard`, also while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from search.engine import CampaignWatcher, Relay
from search.trial import Trial


class TensorBoard(Relay):
    """A watcher that draws what it is told, and passes it on to another one.

    Reward, accuracy, metrics and times are drawn over trials, the controller's diagnostics (the
    entropy among them) over updates.

    Args:
        watcher: Is told everything, too.
        folder: Of the event files; a resumed campaign adds a file.
    """

    def __init__(self, watcher: CampaignWatcher, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        super().__init__(watcher)
        self._writer = SummaryWriter(str(folder))

    def trial(self, trial: Trial) -> None:
        """Draw a trial's figures."""
        super().trial(trial)
        figures = {"reward": trial.reward, "accuracy": trial.accuracy, **(trial.metrics or {})}
        self._draw("trial", figures, trial.id)
        self._draw("seconds", trial.timings or {}, trial.id)

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Draw a controller's diagnostics."""
        super().update(batch, diagnostics)
        self._draw("controller", diagnostics, batch)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _draw(self, group: str, figures: Mapping[str, float | None], step: int) -> None:
        for name, value in figures.items():
            if value is not None:
                # TensorBoard takes a colon in a name for something else.
                self._writer.add_scalar(f"{group}/{name.replace(':', '_')}", value, step)
