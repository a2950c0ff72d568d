"""Run a campaign from a configuration: search, hand-over, report. The Python API's front door.

from pathlib import Path
from search.config import load_campaign_config
from search.engine import start

config = load_campaign_config("digits", ["stop.trials=8"])
outcome = start(config, Path("runs/mine"))
print(outcome.stop_reason, outcome.winner)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from search import campaign as folders
from search.async_loop import make_search
from search.campaign import Campaign
from search.campaign_log import campaign_logs
from search.config import CampaignConfig
from search.environment import note_environment
from search.finalists import LineWatcher, hand_over
from search.loop import Watcher
from search.parts import Parts
from search.trial import Trial
from search.warm_start import check_warm_start
from space.records import record
from space.signals import interruptible

logger = logging.getLogger(__name__)


class CampaignWatcher(Watcher, LineWatcher, Protocol):
    """Is told of everything that happens in a campaign."""


class Silent:
    """A watcher that watches nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignore it."""

    def advance(self) -> None:
        """Ignore it."""

    def trial(self, trial: Trial) -> None:
        """Ignore it."""

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Ignore it."""

    def line(self, text: str) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class Relay:
    """A watcher that passes on what it is told: what further watchers are made from.

    Args:
        watcher: Is told everything.
    """

    def __init__(self, watcher: CampaignWatcher) -> None:
        self._watcher = watcher

    def phase(self, name: str, total: int) -> None:
        """Pass it on."""
        self._watcher.phase(name, total)

    def advance(self) -> None:
        """Pass it on."""
        self._watcher.advance()

    def trial(self, trial: Trial) -> None:
        """Pass it on."""
        self._watcher.trial(trial)

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Pass it on."""
        self._watcher.update(batch, diagnostics)

    def line(self, text: str) -> None:
        """Pass it on."""
        self._watcher.line(text)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._watcher.note(text)


@record
class CampaignOutcome:
    """How a campaign ended.

    Attributes:
        folder: Where everything is.
        stop_reason: The sentence that says which stop rule held.
        trials: Number of proposals.
        completed: Number of networks trained.
        target_ms: T.
        best: The trial with the highest reward, if any.
        winner: What is known of the network that was retrained, tested and exported.
        report: The HTML report.
    """

    folder: str
    stop_reason: str
    trials: int
    completed: int
    target_ms: float
    best: Trial | None
    winner: dict[str, Any] | None
    report: str


def start(
    config: CampaignConfig, folder: Path, watcher: CampaignWatcher | None = None
) -> CampaignOutcome:
    """Run a new campaign in a folder that is empty or does not exist.

    Raises:
        ConfigError: The folder or a part of the configuration does not work.
        KeyboardInterrupt: Stopped; what is committed stays, `resume` goes on.
    """
    parts = Parts(config)
    check_warm_start(config)
    with folders.create(folder, config) as campaign:
        return run(campaign, parts, watcher or Silent())


def resume(
    folder: Path, overrides: Iterable[str] = (), watcher: CampaignWatcher | None = None
) -> CampaignOutcome:
    """Go on with a campaign, exactly where it stopped; a raised `stop.trials` extends it.

    Raises:
        ConfigError: No campaign there, it is in use, or an override may not change.
        KeyboardInterrupt: As `start`.
    """
    config = folders.resumed_config(folder, overrides)
    with folders.continue_with(folder, config) as campaign:
        return run(campaign, Parts(config), watcher or Silent())


def run(campaign: Campaign, parts: Parts, watcher: CampaignWatcher) -> CampaignOutcome:
    """Run an open campaign to its end: search, hand-over, report."""
    from search.report import write_report

    with campaign_logs(campaign.folder, watcher.note), interruptible():
        logger.info("campaign %s in %s", campaign.config.name, campaign.folder)
        note_environment(campaign.store, parts.meters, watcher.note)
        search = make_search(campaign, parts, watcher)
        stop_reason = search.run()
        logger.info("search ended: %s", stop_reason)
        winner = None
        if campaign.config.retrain is not None:
            winner = hand_over(campaign, parts, watcher)
        report = campaign.folder / "report.html"
        write_report(campaign.store, campaign.config, report)
        best = campaign.store.best(1)
        counts = campaign.store.counts()
        return CampaignOutcome(
            folder=str(campaign.folder),
            stop_reason=stop_reason,
            trials=sum(counts.values()),
            completed=counts.get("completed", 0),
            target_ms=search.objective.target_ms,
            best=best[0] if best else None,
            winner=winner,
            report=str(report),
        )
