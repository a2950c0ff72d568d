"""Pairs of campaigns that differ in one thing and share a seed, and what the one thing changes.

The difference of a pair is the second's figure less the first's, after as many trials as both
have: above 0 the second is better. The seed's luck is in both figures, so that few pairs say more
than as many campaigns with seeds of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from search.config import CampaignConfig, config_to_plain, differences, may_change
from search.history import Box, History

#: What is compared: the best trial's reward and its accuracy, and how good the front is.
FIGURES = ("reward", "accuracy", "hypervolume")

#: Keys that have no part in what a search finds, beside those that may change on resume.
_OUTSIDE = ("name", "seed", "retrain")
#: Of fewer pairs, no sign test gives a p under 0.05, whatever the signs.
FEWEST_FOR_A_TEST = 6

_LABEL_LETTERS = 40

Figures = dict[str, float | None]


@dataclasses.dataclass(slots=True)
class Entry:
    """A campaign that is compared."""

    folder: str
    config: CampaignConfig
    history: History

    def figures(self, trials: int, box: Box | None) -> Figures:
        """Return its FIGURES after so many trials; None where there is no such figure."""
        history = self.history
        best = history.best(trials)
        known = history.complete(trials)
        values = (
            None if best is None else history.reward[best],
            None if best is None else history.accuracy[best],
            None if box is None else box.share(history.points(known)),
        )
        return {
            name: None if value is None else float(value)
            for name, value in zip(FIGURES, values, strict=True)
        }


@dataclasses.dataclass(slots=True)
class Pair:
    """Two campaigns with one seed.

    Attributes:
        seed: Of both.
        first, second: Which of those compared, from 0.
        trials: After so many of each.
        differences: The second's FIGURES less the first's.
    """

    seed: int
    first: int
    second: int
    trials: int
    differences: Figures


@dataclasses.dataclass(slots=True)
class Pairing:
    """All pairs of campaigns with the same two settings.

    Attributes:
        differ_in: The one key of the configuration that differs.
        first, second: What it is in them.
        pairs: In the order in which the campaigns were given.
    """

    differ_in: str
    first: str
    second: str
    pairs: list[Pair]

    def summary(self, figure: str) -> dict[str, Any]:
        """Return how a figure's differences lie.

        Keys: pairs (that have it), median and positive (how many are above 0), both null of fewer
        than 2; sign_p, the two-sided p of the exact sign test, in which zeros have no say: null of
        fewer than 6 others.
        """
        found = [pair.differences[figure] for pair in self.pairs]
        values = [value for value in found if value is not None]
        signed = [value for value in values if value != 0]
        positive = sum(value > 0 for value in values)
        several, enough = len(values) >= 2, len(signed) >= FEWEST_FOR_A_TEST
        return {
            "pairs": len(values),
            "median": statistics.median(values) if several else None,
            "positive": positive if several else None,
            "sign_p": _sign_test(positive, len(signed)) if enough else None,
        }


def difference(first: Figures, second: Figures) -> Figures:
    """Return the second's figures less the first's; None where one of them is missing."""
    return {
        name: None if (ours := first[name]) is None or (theirs := second[name]) is None
        else theirs - ours
        for name in FIGURES
    }  # fmt: skip


def variants_of(entries: Sequence[Entry]) -> list[int]:
    """Return for each campaign the first one that differs from it in the seed alone, if at all."""
    plain = [config_to_plain(entry.config) for entry in entries]
    chosen: list[int] = []
    for index, ours in enumerate(plain):
        same = (k for k in dict.fromkeys(chosen) if not _differing(plain[k], ours))
        chosen.append(next(same, index))
    return chosen


def things_that_differ(first: CampaignConfig, second: CampaignConfig) -> list[str]:
    """Return the keys in which two campaigns differ, the seed left out."""
    found = _differing(config_to_plain(first), config_to_plain(second))
    return list(dict.fromkeys(key.split(".")[0] for key, _, _ in found))


def pair_up(entries: Sequence[Entry], variants: Sequence[int], box: Box | None) -> list[Pairing]:
    """Return the pairings of all campaigns that differ in one thing and share seeds.

    Of several campaigns with one seed and the same settings, the first goes with the first.
    """
    pairings = []
    for first, second in itertools.combinations(dict.fromkeys(variants), 2):
        one, other = entries[first].config, entries[second].config
        things = things_that_differ(one, other)
        if len(things) != 1:
            continue
        pairs = [
            _pair(entries, left, right, box)
            for left, right in _same_seeds(entries, variants, first, second)
        ]
        if pairs:
            pairings.append(Pairing(things[0], *_labels(one, other), pairs))
    return pairings


def why_not_paired(entries: Sequence[Entry]) -> str:
    """Return a sentence on campaigns of which no two are a pair."""
    if len(entries) > 2:
        return "Not paired: no two of the campaigns share a seed and differ in one setting."
    first, second = (entry.config for entry in entries)
    things = " and ".join(things_that_differ(first, second))
    if first.seed != second.seed:
        causes = f"luck and of {things}" if things else "luck alone"
        return (
            f"Not paired: the seeds differ ({first.seed} and {second.seed}), so the differences"
            f" are of {causes}."
        )
    if things:
        return f"Not paired: the campaigns differ in more than one setting ({things})."
    return "Not paired: the campaigns have the same seed and the same settings."


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (key, one, other)
        for key, one, other in differences(ours, theirs)
        if key.split(".")[0] not in _OUTSIDE and not may_change(key)
    ]


def _same_seeds(
    entries: Sequence[Entry], variants: Sequence[int], first: int, second: int
) -> list[tuple[int, int]]:
    """Which campaigns of two variants have the same seed."""
    ours = [k for k, variant in enumerate(variants) if variant == first]
    left = [k for k, variant in enumerate(variants) if variant == second]
    found = []
    for one in ours:
        seed = entries[one].config.seed
        other = next((k for k in left if entries[k].config.seed == seed), None)
        if other is not None:
            left.remove(other)
            found.append((one, other))
    return found


def _pair(entries: Sequence[Entry], first: int, second: int, box: Box | None) -> Pair:
    one, other = entries[first], entries[second]
    trials = min(len(one.history), len(other.history))
    found = difference(one.figures(trials, box), other.figures(trials, box))
    return Pair(one.config.seed, first, second, trials, found)


def _labels(first: CampaignConfig, second: CampaignConfig) -> tuple[str, str]:
    """What the one thing is in two campaigns: its names, or else the settings in it."""
    found = _differing(config_to_plain(first), config_to_plain(second))
    for key, one, other in found:
        if key.partition(".")[2] == "name":
            return str(one), str(other)
    texts = [
        ", ".join(
            str(values[side]) if "." not in key else f"{key.split('.', 1)[1]}={values[side]}"
            for key, *values in found
        )
        for side in (0, 1)
    ]
    return _cut(texts[0]), _cut(texts[1])


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL_LETTERS else text[: _LABEL_LETTERS - 1] + "…"


def _sign_test(positive: int, number: int) -> float:
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return float(binomtest(positive, number, 0.5).pvalue)
