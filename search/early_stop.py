"""Early stop: a child whose reward is among the worst after some epoch is trained no further.

The median stopping rule (Golovin et al., "Google Vizier", KDD 2017) with a quantile of one's
choice, as asynchronous successive halving applies it at its rungs (Li et al., MLSys 2020): after
every epoch but the last a child's reward so far is held against those that the campaign's earlier
trials had after as many epochs, those that were stopped there included.

Compared are rewards, not accuracies: a less accurate network may be the better one, if it is
faster. Only trials that the controller has learned from count, so that what happens to a child
does not depend on who else is being trained.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping

from search.evaluation import curve_of
from search.objective import LATENCY, Objective
from search.trial import Trial
from space.errors import ConfigError
from space.records import record


@record
class EarlyStopConfig:
    """Which children are stopped before their last epoch.

    Attributes:
        quantile: Of the earlier trials' rewards after as many epochs; a child below it is stopped.
            0.5 is the median rule; 0 stops none, but records every child's accuracy after each
            epoch.
        after_epochs: The first epoch that is looked at.
        min_trials: None is stopped before so many trials have a reward after that epoch.
    """

    quantile: float = 0.5
    after_epochs: int = 1
    min_trials: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 0.9:
            raise ValueError(f"quantile must be in [0, 0.9], but got {self.quantile!r}")
        for name in ("after_epochs", "min_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, but got {getattr(self, name)}")


class EarlyStop:
    """The bars that children have to clear.

    Args:
        config: The rule.
        objective: Of the campaign.
        epochs: Of a whole child training.
        learned: The trials that the controller has learned from.
    """

    def __init__(
        self,
        config: EarlyStopConfig,
        objective: Objective,
        epochs: float,
        learned: Iterable[Trial] = (),
    ) -> None:
        self._config = config
        self._objective = objective
        self._rewards: dict[int, list[float]] = {
            epoch: [] for epoch in range(config.after_epochs, int(epochs))
        }
        self.note(learned)

    def note(self, trials: Iterable[Trial]) -> None:
        """Take in trials that the controller has learned from."""
        for trial in trials:
            # Another one's curve, taken over with its result, counts once.
            metrics = trial.metrics or {}
            curve = curve_of(metrics) if trial.reused_from is None else {}
            for epoch, rewards in self._rewards.items():
                if epoch in curve:
                    bisect.insort(rewards, self._objective.reward(curve[epoch], metrics)[0])

    def bars(self, metrics: Mapping[str, float]) -> dict[int, float]:
        """Return epoch -> the accuracy under which a network with these metrics is stopped.

        Raises:
            ConfigError: The network's latency is not known yet.
        """
        if LATENCY not in metrics:
            raise ConfigError(
                "early_stop: a network's latency must be known before it is trained, but this"
                " evaluator gives it afterwards; give a device, or leave early_stop out."
            )
        return {
            # A hair less, so that rounding stops no child that is just as good.
            epoch: self._objective.accuracy_for(self._quantile(rewards), metrics) - 1e-9
            if len(rewards) >= self._config.min_trials and self._config.quantile
            else 0.0
            for epoch, rewards in self._rewards.items()
        }

    def _quantile(self, rewards: list[float]) -> float:
        return rewards[int(self._config.quantile * len(rewards))]
