"""The Pareto front of a campaign: the networks that no other beats in all objectives at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from controller.front import ACCURACY, OBJECTIVES, non_dominated, signs_of
from controller.pareto_evolution import ParetoConfig
from search.config import CampaignConfig
from search.trial import Trial


def pareto_front(trials: Iterable[Trial], objectives: Sequence[str] = OBJECTIVES) -> list[Trial]:
    """Return the trials that no other trial dominates, best first in the last objective.

    By default the objectives are accuracy and latency, and the fastest comes first. A trial
    dominates another if it is at least as good in every objective, and better in one. Of equal
    networks the earliest trial stands for all; trials without a reward, or without one of the
    objectives, are left out.

    Args:
        trials: In any order.
        objectives: `accuracy`, which is to be large, and names of metrics, which are to be small.
    """
    rows: list[tuple[Trial, list[float]]] = []
    for trial in trials:
        known = {**(trial.metrics or {}), ACCURACY: trial.accuracy}
        values = [value for name in objectives if (value := known.get(name)) is not None]
        if trial.reward is not None and len(values) == len(objectives):
            rows.append((trial, values))
    rows.sort(key=lambda row: row[0].id)
    table = np.array([values for _, values in rows]).reshape(-1, len(objectives))
    points = table * signs_of(objectives)
    (on_front,) = np.nonzero(non_dominated(points))
    order = on_front[np.argsort(-points[on_front, -1], kind="stable")]
    return [rows[k][0] for k in order]


def front_objectives(config: CampaignConfig) -> Sequence[str]:
    """Return the objectives of a campaign's front: its controller's, or accuracy and latency."""
    controller = config.controller
    return controller.objectives if isinstance(controller, ParetoConfig) else OBJECTIVES


def best_networks(trials: Iterable[Trial], count: int) -> list[Trial]:
    """Return the `count` different networks with the highest reward, best first.

    Equal rewards are ordered by trial id, so that the choice never depends on the order of rows.
    """
    chosen: dict[str, Trial] = {}
    rewarded = [trial for trial in trials if trial.reward is not None]
    for trial in sorted(rewarded, key=lambda t: (-(t.reward or 0.0), t.id)):
        chosen.setdefault(trial.architecture_hash, trial)
        if len(chosen) == count:
            break
    return list(chosen.values())
