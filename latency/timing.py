"""Times a callable until the figure can be believed: warm-up, calibration, repeats, raw samples.

The protocol, in this order; the clock is injected, so that tests need no real time:

1. Warm up, run by run, until the medians of two consecutive windows agree.
2. Choose, once, how many runs make one sample, so that the clock's resolution and the cost of
   reading it vanish; keep the number for all samples.
3. Take samples until the 95 % confidence interval of their median is narrow, or time is up.
4. Before and after every sample a fixed piece of work, the probe, is timed, too. Where it took
   longer than the fastest one known, the core was not ours alone (another thread of the same core,
   which on a shared host is another guest's and shows in no load figure) or its clock was down:
   that sample is marked as disturbed. The mark looks at the probe only, never at the sample's own
   time, so that leaving such samples out favours no figure.

TFLite's benchmark_model runs once to warm up, then at least 50 times and 1 s; `full` is that
with a warm-up that proves itself and a width that is demanded. `quick` is for searches, where many
networks are timed and their order counts.

This file is also sent to devices elsewhere (latency/remote.py): of ours it may import only what is
sent along, it must run on Python 3.8, and beyond the standard library it needs numpy alone.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from space.errors import MeasurementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Effort = Literal["quick", "full"]
Ending = Literal["narrow", "repeats", "budget"]

#: Samples that even an exhausted budget leaves room for: fewer have no quartiles.
FEWEST_SAMPLES = 5

#: IQR / median above which a measurement is noisy: repeated, then flagged.
NOISY_SPREAD = 0.10

#: A probe is slow from this multiple of the fastest one on. Probes on an undisturbed core differ
#: by 5 %; a busy thread on the same core makes them take up to twice as long.
SLOW_PROBE = 1.15

#: A measurement with fewer undisturbed samples than this, and more disturbed ones, is noisy.
FEWEST_UNDISTURBED = 10

#: Steps of the probe's loop: 0.15 ms on a server's core, 1 ms on a small board's.
_PROBE_STEPS = 5000


@dataclass(frozen=True)
class TimingProtocol:
    """How a callable is timed.

    Attributes:
        warmup_window: Runs whose median is compared with that of the window before it.
        warmup_tolerance: Relative difference at which two windows agree.
        min_warmup_runs: Runs before the warm-up may end.
        min_warmup_s: ... and how long it takes at least, so that a processor's clock can rise.
        max_warmup_runs: Runs after which sampling starts although the windows differ.
        min_sample_s: Shortest time of one sample; short runs are repeated within it.
        min_repeats: Samples before sampling may end.
        min_total_s: ... and how long the samples take together at least.
        max_repeats: Samples after which it ends, however wide the interval.
        relative_width: Width of the median's 95 % interval, relative to the median, at which it
            ends.
        time_budget_s: When it ends, however wide the interval: seconds from the first run. Half
            of it may go into the warm-up. The first five samples are taken in any case.
    """

    warmup_window: int = 5
    warmup_tolerance: float = 0.05
    min_warmup_runs: int = 10
    min_warmup_s: float = 0.1
    max_warmup_runs: int = 10_000
    min_sample_s: float = 5e-3
    min_repeats: int = 50
    min_total_s: float = 1.0
    max_repeats: int = 1000
    relative_width: float = 0.015
    time_budget_s: float = 4.0

    def __post_init__(self) -> None:
        for name in ("warmup_window", "min_warmup_runs", "min_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, but got {getattr(self, name)}")
        for name in ("min_warmup_s", "min_sample_s", "min_total_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, but got {getattr(self, name)!r}")
        for name in ("warmup_tolerance", "relative_width", "time_budget_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0, but got {getattr(self, name)!r}")
        fewest_runs = max(self.min_warmup_runs, 2 * self.warmup_window)
        if self.max_warmup_runs < fewest_runs:
            raise ValueError(
                f"max_warmup_runs must be at least min_warmup_runs and two windows"
                f" ({fewest_runs}), but got {self.max_warmup_runs}"
            )
        if self.max_repeats < self.min_repeats:
            raise ValueError(
                f"max_repeats must be at least min_repeats ({self.min_repeats}),"
                f" but got {self.max_repeats}"
            )


#: For thousands of networks: a tenth of a second each, and an interval almost three times as wide.
QUICK = TimingProtocol(
    warmup_window=3,
    min_warmup_runs=6,
    min_warmup_s=0.02,
    min_sample_s=1e-3,
    min_repeats=15,
    min_total_s=0.1,
    max_repeats=400,
    relative_width=0.04,
    time_budget_s=1.0,
)
#: For figures that are published.
FULL = TimingProtocol()

PROTOCOLS: dict[Effort, TimingProtocol] = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True)
class Timing:
    """What timing a callable gave.

    Attributes:
        samples_ms: Milliseconds of one run, in the order taken; each is the mean of
            `inner_iterations` runs.
        disturbed: Indices of the samples beside which a probe was slow, ascending.
        inner_iterations: Runs per sample.
        warmup_runs: Runs before the first sample.
        settled: Whether the warm-up ended because two windows agreed.
        pace_s: Median time of the fast probes, seconds; None without a probe.
        ending: What ended the sampling: the interval was `narrow`, or the number of `repeats`
            or the time `budget` was used up.
    """

    samples_ms: tuple[float, ...]
    inner_iterations: int
    warmup_runs: int
    settled: bool
    ending: Ending
    disturbed: tuple[int, ...] = ()
    pace_s: float | None = None

    @property
    def spread(self) -> float:
        """IQR / median of the samples that count."""
        counted = undisturbed(self.samples_ms, self.disturbed)
        return interquartile_range(counted) / float(np.median(counted))

    @property
    def is_noisy(self) -> bool:
        """See the function of this name."""
        return is_noisy(self.samples_ms, self.disturbed)


def probe() -> None:
    """Keep the core as busy as one thread can; touches next to no memory."""
    total = 0
    for step in range(_PROBE_STEPS):
        total += step


def undisturbed(samples_ms: tuple[float, ...], disturbed: tuple[int, ...]) -> tuple[float, ...]:
    """Return the samples that figures are derived from.

    They are those that nothing disturbed, or all if fewer than FEWEST_SAMPLES are left.
    """
    if len(samples_ms) - len(disturbed) < FEWEST_SAMPLES:
        return samples_ms
    left_out = frozenset(disturbed)
    return tuple(sample for k, sample in enumerate(samples_ms) if k not in left_out)


def is_noisy(samples_ms: tuple[float, ...], disturbed: tuple[int, ...]) -> bool:
    """Whether a measurement's samples scatter too much, or too few of them were undisturbed."""
    left = len(samples_ms) - len(disturbed)
    if left < min(FEWEST_UNDISTURBED, len(disturbed)):
        return True
    counted = undisturbed(samples_ms, disturbed)
    return interquartile_range(counted) > NOISY_SPREAD * float(np.median(counted))


def time_runs(
    run: Callable[[], object],
    protocol: TimingProtocol,
    *,
    probe: Callable[[], object] | None = None,
    known_pace_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Return the times of `run` under a protocol.

    Args:
        run: What is timed; it must have finished its work when it returns.
        protocol: How it is timed.
        probe: What is timed before and after every sample to tell whether the core is ours
            alone. With one, the protocol's numbers are of samples that nothing disturbed, and
            only the budget and `max_repeats` end the wait for them. None marks no sample.
        known_pace_s: How long a probe took on this core in earlier measurements, seconds. Without
            it a neighbour who is busy all the time is not noticed.
        clock: Monotonic seconds.

    Raises:
        MeasurementError: The clock does not advance while `run` runs.
        Exception: Whatever `run` raises.
    """
    start = clock()
    run_s, warmup_runs, settled = _warm_up(run, protocol, clock, start)
    if run_s <= 0:
        raise MeasurementError(f"the clock did not advance during {warmup_runs} runs")
    inner = max(1, math.ceil(protocol.min_sample_s / run_s))
    samples_s: list[float] = []
    probes_s = [] if probe is None else [_seconds(probe, clock)]
    total_s = 0.0
    ending: Ending | None = None
    while ending is None:
        before = clock()
        for _ in range(inner):
            run()
        after = clock()
        samples_s.append((after - before) / inner)
        if probe is not None:
            probes_s.append(_seconds(probe, clock))
        total_s += after - before
        is_quiet = _is_quiet(len(samples_s), probes_s, known_pace_s)
        ending = _ending(
            np.asarray(samples_s)[is_quiet], len(samples_s), total_s, after - start, protocol
        )
    if min(samples_s) <= 0:
        raise MeasurementError(f"the clock did not advance during {inner} runs")
    fast_s = [p for p in probes_s if p <= SLOW_PROBE * min(probes_s)]
    return Timing(
        samples_ms=tuple(1e3 * sample for sample in samples_s),
        disturbed=tuple(np.flatnonzero(~is_quiet).tolist()),
        pace_s=float(np.median(fast_s)) if fast_s else None,
        inner_iterations=inner,
        warmup_runs=warmup_runs,
        settled=settled,
        ending=ending,
    )


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    before = clock()
    run()
    return clock() - before


def _is_quiet(count: int, probes_s: list[float], known_pace_s: float | None) -> NDArray[np.bool_]:
    """Whether the probes before and after each of `count` samples were fast, or there are none."""
    if not probes_s:
        return np.ones(count, dtype=bool)
    fastest_s = min(probes_s) if known_pace_s is None else min(known_pace_s, *probes_s)
    is_fast = np.asarray(probes_s) <= SLOW_PROBE * fastest_s
    return is_fast[:-1] & is_fast[1:]


def _warm_up(
    run: Callable[[], object],
    protocol: TimingProtocol,
    clock: Callable[[], float],
    start: float,
) -> tuple[float, int, bool]:
    """Seconds of a warm run, the number of runs, and whether two windows agreed."""
    runs_s: list[float] = []
    while True:
        before = clock()
        run()
        after = clock()
        runs_s.append(after - before)
        count, elapsed_s = len(runs_s), after - start
        settled = (
            count >= protocol.min_warmup_runs
            and elapsed_s >= protocol.min_warmup_s
            and _windows_agree(runs_s, protocol)
        )
        is_over = count >= protocol.max_warmup_runs or elapsed_s >= protocol.time_budget_s / 2
        if is_over and not settled and 2 <= count < 2 * protocol.warmup_window:
            # So slow that there was no time for two windows: two runs must do.
            settled = abs(runs_s[-1] - runs_s[-2]) <= protocol.warmup_tolerance * min(runs_s[-2:])
        if settled or (is_over and count >= 2):
            return float(np.median(runs_s[-protocol.warmup_window :])), count, settled


def _windows_agree(runs_s: list[float], protocol: TimingProtocol) -> bool:
    """Whether the last two windows are complete and their medians are close."""
    window = protocol.warmup_window
    if len(runs_s) % window or len(runs_s) < 2 * window:
        return False
    earlier = float(np.median(runs_s[-2 * window : -window]))
    latest = float(np.median(runs_s[-window:]))
    return abs(latest - earlier) <= protocol.warmup_tolerance * min(latest, earlier)


def _ending(
    quiet_s: NDArray[np.float64],
    count: int,
    total_s: float,
    elapsed_s: float,
    protocol: TimingProtocol,
) -> Ending | None:
    """Why sampling ends now, if it does; `quiet_s` are those of `count` that count."""
    if len(quiet_s) >= protocol.min_repeats and total_s >= protocol.min_total_s:
        low, high = median_interval(quiet_s)
        if high - low <= protocol.relative_width * float(np.median(quiet_s)):
            return "narrow"
    if count >= protocol.max_repeats:
        return "repeats"
    if elapsed_s >= protocol.time_budget_s and count >= FEWEST_SAMPLES:
        return "budget"
    return None


def median_interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a median by order statistics.

    As many samples are left out at its lower end as at its upper one: the most with which a fair
    coin, thrown for each sample, makes it miss in 5 % of the cases at most. Below six samples none
    are, and it covers less than that.

    Args:
        samples: float64, (n,), any order.
    """
    ordered = np.sort(samples)
    left_out = _left_out(len(ordered))
    return float(ordered[left_out]), float(ordered[-1 - left_out])


@functools.lru_cache(maxsize=4096)
def _left_out(n: int) -> int:
    """The largest k with 2 P(Binomial(n, 1/2) <= k) <= 5 %, in whole numbers; at least 0."""
    k, term, total = 0, n, 1 + n  # C(n, k + 1), and the sum of C(n, 0) to that
    while 40 * total <= 1 << n:
        k += 1
        term = term * (n - k) // (k + 1)
        total += term
    return k


def interquartile_range(samples_ms: tuple[float, ...]) -> float:
    """Return the third minus the first quartile, in the samples' unit."""
    low, high = np.percentile(samples_ms, [25, 75])
    return float(high - low)
