"""History: what a campaign's trials gave, in the order in which they were proposed.

Figures over all trials are numpy arrays: a million trials take seconds and some 100 MB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from controller.front import Points, hypervolume, non_dominated
from controller.pareto_evolution import reference_of
from search.report_data import LINE_POINTS, thin
from search.store import Store

#: Points (x, reward) of a staircase.
Curve = list[tuple[float, float]]


@dataclasses.dataclass(slots=True)
class History:
    """The search's trials of a campaign, finalists and the like left out.

    Attributes:
        ids: int64, (n,).
        reward, accuracy, latency_ms: float64, (n,); nan where one is missing, or where the
            network was trained again and the mean counts.
        hours: float64, (n,): from the first proposal to each result, pauses of the campaign
            included; nan without a result.
    """

    ids: NDArray[np.int64]
    reward: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    hours: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def best(self, trials: int) -> int | None:
        """Return which of the first `trials` has the highest reward, the earliest of equals."""
        rewards = self.reward[:trials]
        return int(np.nanargmax(rewards)) if np.isfinite(rewards).any() else None

    def best_so_far(self) -> NDArray[np.float64]:
        """Return the highest reward of the first 1, 2, ... n trials; nan before there is one."""
        best: NDArray[np.float64] = np.fmax.accumulate(self.reward)
        return best

    def by_trials(self) -> Curve:
        """Return the best reward so far where it changes, and at the end, against trials."""
        return _staircase(np.arange(1.0, len(self) + 1), self.reward)

    def by_hours(self) -> Curve:
        """Return the same against hours, in the order in which results came."""
        (ended,) = np.nonzero(np.isfinite(self.hours))
        order = ended[np.argsort(self.hours[ended], kind="stable")]
        return _staircase(self.hours[order], self.reward[order])

    def complete(self, trials: int | None = None) -> NDArray[np.int64]:
        """Return which of the first `trials` have a reward, an accuracy and a latency."""
        known = np.isfinite([self.reward, self.accuracy, self.latency_ms]).all(axis=0)
        return np.flatnonzero(known[:trials])

    def points(self, chosen: NDArray[np.int64]) -> Points:
        """Return (accuracy, -latency) of trials: more is better in both."""
        return np.stack([self.accuracy[chosen], -self.latency_ms[chosen]], axis=1)

    def front(self) -> NDArray[np.int64]:
        """Return which trials are on the front of accuracy and latency, fastest first.

        The same that search.pareto.pareto_front finds.
        """
        complete = self.complete()
        front = complete[non_dominated(self.points(complete))]
        return front[np.argsort(self.latency_ms[front], kind="stable")]


def read_history(store: Store) -> History:
    """Read a campaign's trials once."""
    superseded = store.superseded()
    rows = [
        (row.id, None, None, None, row.finished_at)
        if row.id in superseded
        else (row.id, row.reward, row.accuracy, row.latency_ms, row.finished_at)
        for row in store.figures()
        if row.id >= 0
    ]
    # None becomes nan.
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    first = store.trial(0)
    started_at = first.created_at if first is not None else 0.0
    return History(
        ids=table[:, 0].astype(np.int64),
        reward=table[:, 1],
        accuracy=table[:, 2],
        latency_ms=table[:, 3],
        hours=(table[:, 4] - started_at) / 3600,
    )


@dataclasses.dataclass(slots=True)
class Box:
    """Between the worst and the best accuracy and latency of all that is compared.

    Attributes:
        worst: (accuracy, -latency).
        spread: How far the best ones are from them.
    """

    worst: Points
    spread: Points

    def share(self, points: Points) -> float:
        """Return the part of it that points (m, 2) dominate, in [0, 1]."""
        return hypervolume((points - self.worst) / self.spread, np.zeros(2))


def box_of(histories: Sequence[History]) -> Box | None:
    """Return the box of all trials, or None where none is complete."""
    points = np.concatenate([history.points(history.complete()) for history in histories])
    return Box(*reference_of(points)) if len(points) else None


def on_union_front(
    histories: Sequence[History], fronts: Sequence[NDArray[np.int64]]
) -> tuple[list[NDArray[np.int64]], int]:
    """Return which trials of each front are on the front of all together, and how many points
    that one has.

    A point that several campaigns found is one of the union's and counts for each of them.
    """
    each = [history.points(front) for history, front in zip(histories, fronts, strict=True)]
    points = np.concatenate(each)
    union = {tuple(point) for point in points[non_dominated(points)].tolist()}
    found = []
    for front, own in zip(fronts, each, strict=True):
        is_on = np.array([tuple(point) in union for point in own.tolist()], dtype=np.bool_)
        found.append(front[is_on])
    return found, len(union)


def _staircase(x: NDArray[np.float64], reward: NDArray[np.float64]) -> Curve:
    (rewarded,) = np.nonzero(np.isfinite(reward))
    if not len(rewarded):
        return []
    best = np.maximum.accumulate(reward[rewarded])
    rises = np.flatnonzero(np.concatenate(([True], best[1:] > best[:-1])))
    steps = thin(rises, LINE_POINTS)
    points = list(zip(x[rewarded[steps]].tolist(), best[steps].tolist(), strict=True))
    return [*points, (float(x[-1]), float(best[-1]))]
