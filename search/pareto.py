"""The Pareto front of accuracy and latency: the networks that no other beats in both."""

from __future__ import annotations

from collections.abc import Iterable

from search.trial import Trial


def pareto_front(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that no other trial dominates, fastest first.

    A trial dominates another if it is at least as accurate and at least as fast, and better in one
    of the two. Of equal networks the earliest trial stands for all; trials without a reward are
    left out.
    """
    rewarded = [
        (trial.latency_ms, trial.accuracy, trial)
        for trial in trials
        if trial.reward is not None and trial.accuracy is not None and trial.latency_ms is not None
    ]
    front: list[Trial] = []
    best = -1.0
    for _, accuracy, trial in sorted(rewarded, key=lambda row: (row[0], -row[1], row[2].id)):
        if accuracy > best:
            front.append(trial)
            best = accuracy
    return front


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
