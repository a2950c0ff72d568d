"""TensorBoard curves of a search: `tensorboard --logdir DIR/tensorboard`, also while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from search.trial import Trial

if TYPE_CHECKING:
    from search.engine import CampaignWatcher


class TensorBoard:
    """A watcher that draws what it is told, and passes it on to another one.

    Reward, accuracy, metrics and times are drawn over trials, the controller's diagnostics (the
    entropy among them) over updates.

    Args:
        watcher: Is told everything, too.
        folder: Of the event files; a resumed campaign adds a file.
    """

    def __init__(self, watcher: CampaignWatcher, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        self._watcher = watcher
        self._writer = SummaryWriter(str(folder))

    def phase(self, name: str, total: int) -> None:
        """Pass it on."""
        self._watcher.phase(name, total)

    def advance(self) -> None:
        """Pass it on."""
        self._watcher.advance()

    def line(self, text: str) -> None:
        """Pass it on."""
        self._watcher.line(text)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._watcher.note(text)

    def trial(self, trial: Trial) -> None:
        """Draw a trial's figures."""
        self._watcher.trial(trial)
        figures = {"reward": trial.reward, "accuracy": trial.accuracy, **(trial.metrics or {})}
        self._draw("trial", figures, trial.id)
        self._draw("seconds", trial.timings or {}, trial.id)

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Draw a controller's diagnostics."""
        self._watcher.update(batch, diagnostics)
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
