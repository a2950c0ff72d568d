"""Pareto fronts in any number of objectives: which points are on one, and how much it dominates.

Points are float64 rows (n, objectives), and more is better in every objective. Results become
points by `signs_of`: accuracy is to be large, every other objective is a metric that is to be
small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

ACCURACY = "accuracy"

#: The objectives where none are named.
OBJECTIVES = (ACCURACY, "latency_ms")


def signs_of(objectives: Sequence[str]) -> Points:
    """Return 1 for an objective of which more is better, -1 for one of which less is."""
    return np.array([1.0 if name == ACCURACY else -1.0 for name in objectives])


def non_dominated(points: Points) -> NDArray[np.bool_]:
    """Return for each point whether no other dominates it: is as good in all, better in one.

    Of equal points the first stands for all.
    """
    on_front = np.zeros(len(points), dtype=np.bool_)
    # Nothing dominates what comes before it in this order; it is stable, so equals stay in turn.
    remaining = np.lexsort(-points.T[::-1])
    if points.shape[1] == 2:  # the same, without a loop
        second = points[remaining, 1]
        on_front[remaining] = second > np.append(-np.inf, np.maximum.accumulate(second))[:-1]
        return on_front
    while len(remaining):
        first = remaining[0]
        on_front[first] = True
        remaining = remaining[(points[remaining] > points[first]).any(axis=1)]
    return on_front


def best_layers(points: Points, count: int) -> NDArray[np.int64]:
    """Return the indices, in order, of the `count` best points: the front, the front of the rest,
    and so on; of the last layer that has a part in it, the latest points.
    """
    remaining = np.arange(len(points))
    layers: list[NDArray[np.int64]] = []
    while count > 0 and len(remaining):
        on_front = non_dominated(points[remaining])
        layers.append(remaining[on_front][-count:])
        count -= len(layers[-1])
        remaining = remaining[~on_front]
    return np.sort(np.concatenate(layers)) if layers else remaining


def hypervolume(points: Points, reference: Points) -> float:
    """Return the volume that points dominate above a reference (objectives,).

    Exact, by slices along the last objective, so that the time grows with the number of points on
    the front to the power of objectives - 1.
    """
    above = points[(points > reference).all(axis=1)]
    front = above[non_dominated(above)]
    if not len(front):
        return 0.0
    if front.shape[1] == 1:
        return float(front[0, 0] - reference[0])
    front = front[np.argsort(-front[:, -1], kind="stable")]
    heights = front[:, -1] - np.append(front[1:, -1], reference[-1])
    if front.shape[1] == 2:  # on a front, the first objective grows where the last one falls
        return float((front[:, 0] - reference[0]) @ heights)
    slices = [hypervolume(front[: k + 1, :-1], reference[:-1]) for k in range(len(front))]
    return float(np.dot(slices, heights))


def spread_out(points: Points, count: int, reference: Points) -> list[int]:
    """Return the indices of up to `count` points, each the one that adds most hypervolume to those
    before it; points that add none are left out.
    """
    chosen: list[int] = []
    volume = 0.0
    gains = np.prod(np.maximum(points - reference, 0.0), axis=1)
    while len(chosen) < count:
        # Gains only shrink as more is chosen: what is best by a fresh one is best of all.
        fresh: set[int] = set()
        while (best := int(gains.argmax())) not in fresh:
            gains[best] = hypervolume(points[[*chosen, best]], reference) - volume
            fresh.add(best)
        if gains[best] <= 0:
            break
        chosen.append(best)
        volume = hypervolume(points[chosen], reference)
    return chosen
