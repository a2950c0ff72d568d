"""The timing protocol on a clock that only the timed runs advance: counts in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, cycle, islice, repeat

import numpy as np
import pytest

from latency.measurement import median_interval
from latency.timing import FEWEST_SAMPLES, PROTOCOLS, TimingProtocol, time_runs, undisturbed
from space.errors import MeasurementError

#: Durations are powers of two, so that sums of them are exact.
MS = 2.0**-10

PROTOCOL = TimingProtocol(
    warmup_window=4,
    warmup_tolerance=0.05,
    min_warmup_runs=8,
    min_warmup_s=0.0,
    max_warmup_runs=100,
    min_sample_s=8 * MS,
    min_repeats=20,
    min_total_s=0.0,
    max_repeats=500,
    relative_width=0.01,
    time_budget_s=1e6,
)


class Simulation:
    """A callable whose runs take given times, and the clock that shows them."""

    def __init__(self, durations_s: Iterable[float]) -> None:
        self._durations_s: Iterator[float] = iter(durations_s)
        self.now_s = 1000.0
        self.runs = 0

    def run(self) -> None:
        self.now_s += next(self._durations_s)
        self.runs += 1

    def clock(self) -> float:
        return self.now_s


def protocol(**changes: float) -> TimingProtocol:
    return dataclasses.replace(PROTOCOL, **changes)  # type: ignore[arg-type]


def test_equal_runs_take_the_fewest_runs_that_the_protocol_allows() -> None:
    simulation = Simulation(repeat(3 * MS))
    timing = time_runs(simulation.run, PROTOCOL, clock=simulation.clock)
    assert timing.warmup_runs == 8
    assert timing.inner_iterations == 3  # 9 ms is the first multiple of 3 ms to reach 8 ms
    assert timing.samples_ms == (3e3 * MS,) * 20
    assert (timing.settled, timing.ending) == (True, "narrow")
    assert simulation.runs == 8 + 3 * 20


def test_short_runs_are_warmed_up_and_sampled_for_the_shortest_times() -> None:
    simulation = Simulation(repeat(MS))
    timing = time_runs(
        simulation.run,
        protocol(min_warmup_s=50 * MS, min_total_s=1024 * MS),
        clock=simulation.clock,
    )
    assert timing.warmup_runs == 52  # the first whole window at or after 50 ms
    assert timing.inner_iterations == 8
    assert len(timing.samples_ms) == 128  # 1024 ms / 8 ms


def test_a_run_longer_than_a_sample_is_one_sample() -> None:
    simulation = Simulation(repeat(100 * MS))
    assert time_runs(simulation.run, PROTOCOL, clock=simulation.clock).inner_iterations == 1


def test_warm_up_lasts_until_two_windows_agree() -> None:
    # Windows of 4: 64, 32, 16, 8, 8 ms: the fifth is the first that agrees with the one before.
    falling = chain.from_iterable(repeat(n * MS, 4) for n in (64, 32, 16))
    simulation = Simulation(chain(falling, repeat(8 * MS)))
    timing = time_runs(simulation.run, PROTOCOL, clock=simulation.clock)
    assert timing.warmup_runs == 20
    assert timing.settled
    assert set(timing.samples_ms) == {8e3 * MS}


def test_one_slow_run_does_not_prolong_the_warm_up() -> None:
    simulation = Simulation(chain([8 * MS] * 5, [800 * MS], repeat(8 * MS)))
    assert time_runs(simulation.run, PROTOCOL, clock=simulation.clock).warmup_runs == 8


def test_a_warm_up_that_never_settles_ends_at_its_limit_and_says_so() -> None:
    drifting = (8 * MS * 1.1**n for n in count())
    simulation = Simulation(islice(drifting, 200))
    timing = time_runs(
        simulation.run, protocol(max_warmup_runs=40, max_repeats=20), clock=simulation.clock
    )
    assert timing.warmup_runs == 40
    assert not timing.settled


def test_a_warm_up_takes_at_most_half_of_the_budget() -> None:
    drifting = (8 * MS * 2**n for n in range(10))
    simulation = Simulation(chain(drifting, repeat(MS)))
    timing = time_runs(
        simulation.run, protocol(time_budget_s=2 * 8 * MS * 15), clock=simulation.clock
    )
    assert timing.warmup_runs == 4  # 1 + 2 + 4 + 8 = 15 times 8 ms
    assert not timing.settled


def test_sampling_goes_on_until_the_interval_is_narrow() -> None:
    # A fifth of the samples is 10 % slower, in an order that begins with the slow ones.
    durations = chain(repeat(8 * MS, 8), repeat(9 * MS, 12), repeat(8 * MS))
    simulation = Simulation(durations)
    timing = time_runs(simulation.run, PROTOCOL, clock=simulation.clock)
    samples = np.asarray(timing.samples_ms)
    low, high = median_interval(samples)
    assert timing.ending == "narrow"
    assert len(samples) > 20
    assert high - low <= 0.01 * np.median(samples)
    earlier_low, earlier_high = median_interval(samples[:-1])
    assert earlier_high - earlier_low > 0.01 * np.median(samples[:-1])


def test_an_interval_that_stays_wide_ends_at_the_number_of_repeats() -> None:
    simulation = Simulation(chain(repeat(8 * MS, 8), cycle([8 * MS, 16 * MS])))
    timing = time_runs(simulation.run, protocol(max_repeats=75), clock=simulation.clock)
    assert len(timing.samples_ms) == 75
    assert timing.ending == "repeats"


def test_an_interval_that_stays_wide_ends_with_the_budget() -> None:
    simulation = Simulation(chain(repeat(8 * MS, 8), cycle([8 * MS, 16 * MS])))
    # 64 ms of warm-up, then 12 ms per sample on average.
    timing = time_runs(
        simulation.run, protocol(time_budget_s=(64 + 40 * 12) * MS), clock=simulation.clock
    )
    assert len(timing.samples_ms) == 40
    assert timing.ending == "budget"


def test_a_run_longer_than_the_budget_still_gets_the_fewest_samples() -> None:
    simulation = Simulation(repeat(60.0))
    timing = time_runs(simulation.run, protocol(time_budget_s=1.0), clock=simulation.clock)
    assert timing.samples_ms == (60e3,) * FEWEST_SAMPLES
    assert (timing.warmup_runs, timing.settled, timing.ending) == (2, True, "budget")


def test_a_network_too_slow_for_two_windows_settles_with_two_runs_alike() -> None:
    slowly = protocol(time_budget_s=1.0, warmup_tolerance=0.05)
    for durations, settled in ([0.4, 0.41], True), ([0.6, 0.4], False):
        simulation = Simulation(chain(durations, repeat(0.4)))
        timing = time_runs(simulation.run, slowly, clock=simulation.clock)
        assert (timing.warmup_runs, timing.settled) == (2, settled)


def test_inner_iterations_stay_as_first_calibrated() -> None:
    simulation = Simulation(chain(repeat(MS, 8), repeat(4 * MS)))
    timing = time_runs(simulation.run, PROTOCOL, clock=simulation.clock)
    assert timing.inner_iterations == 8
    assert simulation.runs == 8 + 8 * len(timing.samples_ms)
    assert set(timing.samples_ms) == {4e3 * MS}


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="clock did not advance during 8 runs"):
        time_runs(lambda: None, PROTOCOL, clock=lambda: 5.0)


def test_an_error_of_the_timed_run_is_the_callers() -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the run")

    with pytest.raises(ZeroDivisionError, match="in the run"):
        time_runs(fail, PROTOCOL)


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_presets_give_at_least_the_samples_that_they_promise(effort: str) -> None:
    chosen = PROTOCOLS[effort]  # type: ignore[index]
    simulation = Simulation(repeat(MS / 8))
    timing = time_runs(simulation.run, chosen, clock=simulation.clock)
    total_s = sum(timing.samples_ms) * timing.inner_iterations / 1e3
    assert len(timing.samples_ms) >= chosen.min_repeats
    assert total_s >= chosen.min_total_s
    assert timing.inner_iterations * MS / 8 >= chosen.min_sample_s
    assert simulation.now_s - 1000.0 < chosen.time_budget_s


def test_full_takes_at_least_50_samples_and_one_second() -> None:
    assert PROTOCOLS["full"].min_repeats >= 50
    assert PROTOCOLS["full"].min_total_s >= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_window": 0}, "warmup_window must be >= 1, but got 0"),
        ({"min_repeats": 0}, "min_repeats must be >= 1"),
        ({"min_sample_s": -1.0}, "min_sample_s must be >= 0"),
        ({"min_total_s": float("nan")}, "min_total_s must be >= 0"),
        ({"relative_width": 0.0}, "relative_width must be > 0"),
        ({"time_budget_s": float("inf")}, "time_budget_s must be > 0"),
        ({"max_warmup_runs": 7}, "max_warmup_runs must be at least"),
        ({"max_repeats": 19}, "max_repeats must be at least min_repeats"),
    ],
)
def test_an_impossible_protocol_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(**changes)


def test_the_timed_runs_alone_are_in_the_samples() -> None:
    simulation = Simulation(repeat(8 * MS))
    readings = 0

    def slow_clock() -> float:
        nonlocal readings
        readings += 1
        return simulation.clock()

    timing = time_runs(simulation.run, PROTOCOL, clock=slow_clock)
    # One reading at the start, two per run of the warm-up, two per sample.
    assert readings == 1 + 2 * timing.warmup_runs + 2 * len(timing.samples_ms)


# ---------------------------------------------------------------------------- disturbances


class SharedCore:
    """Runs of 16 ms and probes of 1 ms, both slower while another thread has the same core."""

    def __init__(self, busy: Iterable[bool]) -> None:
        self._busy = iter(busy)
        self.now_s = 0.0

    def run(self) -> None:
        self.now_s += 20 * MS if self._is_busy else 16 * MS

    def probe(self) -> None:
        # The neighbour comes and goes between a sample and the next.
        self._is_busy = next(self._busy)
        self.now_s += 2 * MS if self._is_busy else MS

    _is_busy = False

    def clock(self) -> float:
        return self.now_s


def test_samples_beside_a_slow_probe_are_marked_and_waited_for() -> None:
    # Probe k stands before sample k; a sample is disturbed if either of its probes is slow.
    core = SharedCore(cycle([False, False, False, True, True]))
    timing = time_runs(core.run, PROTOCOL, probe=core.probe, clock=core.clock)
    slow = {k for k in range(len(timing.samples_ms)) if k % 5 in (2, 3, 4)}
    assert set(timing.disturbed) == slow
    assert len(timing.samples_ms) - len(timing.disturbed) == 20
    assert set(undisturbed(timing.samples_ms, timing.disturbed)) == {16e3 * MS}
    assert (timing.ending, timing.is_noisy) == ("narrow", False)


def test_the_samples_own_time_marks_nothing() -> None:
    simulation = Simulation(chain(repeat(8 * MS, 8), cycle([8 * MS, 80 * MS])))
    timing = time_runs(
        simulation.run, protocol(max_repeats=60), probe=advance(simulation), clock=simulation.clock
    )
    assert timing.disturbed == ()
    assert timing.is_noisy


def advance(simulation: Simulation) -> Callable[[], None]:
    def probe() -> None:
        simulation.now_s += MS

    return probe


def test_a_core_that_is_hardly_ever_free_gives_a_noisy_figure_of_all_samples() -> None:
    core = SharedCore(chain([False, False], repeat(True)))
    timing = time_runs(core.run, protocol(max_repeats=40), probe=core.probe, clock=core.clock)
    assert len(timing.disturbed) == 39
    assert timing.ending == "repeats"
    assert undisturbed(timing.samples_ms, timing.disturbed) == timing.samples_ms
    assert timing.is_noisy


def test_probes_that_differ_little_mark_nothing() -> None:
    jitter = np.random.default_rng(0)
    simulation = Simulation(repeat(8 * MS))

    def probe() -> None:
        simulation.now_s += MS * (1 + 0.1 * jitter.random())

    timing = time_runs(simulation.run, PROTOCOL, probe=probe, clock=simulation.clock)
    assert timing.disturbed == ()
    assert len(timing.samples_ms) == 20


def test_a_neighbour_who_never_rests_is_told_from_the_pace_of_earlier_measurements() -> None:
    quiet = SharedCore(repeat(False))
    known_s = time_runs(quiet.run, PROTOCOL, probe=quiet.probe, clock=quiet.clock).pace_s
    assert known_s == MS
    core = SharedCore(repeat(True))
    chosen = protocol(max_repeats=40)
    unaware = time_runs(core.run, chosen, probe=core.probe, clock=core.clock)
    assert not unaware.is_noisy
    told = time_runs(core.run, chosen, probe=core.probe, known_pace_s=known_s, clock=core.clock)
    assert told.is_noisy
    assert len(told.disturbed) == len(told.samples_ms) == 40
    assert told.pace_s == 2 * MS
