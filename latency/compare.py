"""Compares two networks on one device: measured in turn, so that a drift meets both alike."""

from __future__ import annotations

import numpy as np

from latency.device import LatencyMeter
from latency.timing import median_interval
from space.architecture import Architecture
from space.records import record

#: The fewest pairs whose smallest and largest ratio are a 95 % interval of the median: 1 - 2^-5.
FEWEST_ROUNDS = 6


@record
class Comparison:
    """Two networks measured in turn, first, second, first, second, ...

    Attributes:
        first_ms: Median of the first network in every round, in the order taken.
        second_ms: Likewise of the second.
        ratios: Second / first, round by round.
        ratio: Their median: how many times as long the second network takes.
        ratio_low: Lower end of its 95 % confidence interval (order statistics).
        ratio_high: Upper end.
        noisy: How many of these medians are of noisy or drifted times.
    """

    first_ms: tuple[float, ...]
    second_ms: tuple[float, ...]
    ratios: tuple[float, ...]
    ratio: float
    ratio_low: float
    ratio_high: float
    noisy: int

    @property
    def verdict(self) -> str:
        """Which one is faster, if the interval says so."""
        if self.ratio_low > 1:
            return "the first is faster"
        if self.ratio_high < 1:
            return "the second is faster"
        return "no difference is shown"


def compare(
    meter: LatencyMeter, first: Architecture, second: Architecture, rounds: int = FEWEST_ROUNDS
) -> Comparison:
    """Return how long the second network takes relative to the first.

    Raises:
        MeasurementError: A measurement gives no figure.
        ValueError: There are too few rounds for an interval.
    """
    if rounds < FEWEST_ROUNDS:
        raise ValueError(f"rounds must be >= {FEWEST_ROUNDS}, but got {rounds}")
    pairs = meter.measure_in_turn(first, second, rounds)
    ratios = tuple(b.median_ms / a.median_ms for a, b in pairs)
    low, high = median_interval(np.asarray(ratios))
    return Comparison(
        first_ms=tuple(a.median_ms for a, _ in pairs),
        second_ms=tuple(b.median_ms for _, b in pairs),
        ratios=ratios,
        ratio=float(np.median(ratios)),
        ratio_low=low,
        ratio_high=high,
        noisy=sum(not timed.is_good for pair in pairs for timed in pair),
    )
