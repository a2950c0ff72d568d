"""Networks tried before a campaign: the smallest, the largest, and some at random."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from latency.checks import Finding
from latency.device import LatencyMeter
from latency.host import memory_bytes
from latency.measurement import Measurement
from search.check import (
    Estimate,
    Plan,
    Source,
    can_evaluate,
    estimate,
    lacks,
    num_workers,
    parts_here,
)
from search.check_brief import Brief, evaluate_brief
from search.config import CampaignConfig, RayConfig
from search.extremes import extreme_network
from search.loop import stream, trial_seed
from search.objective import LATENCY
from search.progress import format_duration
from space.architecture import Architecture
from space.cost import count
from space.errors import MeasurementError
from space.records import record
from space.search_space import SearchSpace
from space.tokens import uniform_tokens

#: The random stream of a check, beside the campaign's own (search/loop.py has 0 to 3).
CHECK = 4
RANDOM_NETWORKS = 3
#: What only the networks tried tell of a machine.
LATER = ("networks", "memory", "noise")
#: The seeds of a check that is not told how many, and how long all its whole trainings may take,
#: by the extremes' times: the noise of an hours long training is not what a check should begin.
DEFAULT_REPEATS, NOISE_LIMIT_S = 3, 600.0
_WHOLE_TRAININGS = RANDOM_NETWORKS + DEFAULT_REPEATS - 1


@record
class Member:
    """A network of the space and what became of it.

    Attributes:
        role: `smallest`, `largest` (in multiply-adds) or `random`.
        step_s: Of an optimizer step after the first; None where the evaluator takes none.
        child_s: Of a whole evaluation: measured, or extrapolated from a few steps.
        accuracy: Of a whole evaluation, fraction; None after a few steps.
        latencies_ms: By device; without one, what the evaluator says, as `evaluator`: no
            measurement.
        measuring_s: What the measurements took, by device.
        peak_memory_mb: Of the process that evaluated it, where it had one of its own.
        failure: Why something is missing.
    """

    role: str
    architecture: str
    architecture_hash: str
    parameters: int
    macs: int
    step_s: float | None = None
    child_s: float | None = None
    accuracy: float | None = None
    latencies_ms: dict[str, float] | None = None
    measuring_s: dict[str, float] | None = None
    peak_memory_mb: float | None = None
    failure: str | None = None


@record
class Noise:
    """How much an accuracy owes to the seed, beside what it owes to the network.

    Attributes:
        accuracies: Of one network with different seeds.
        seed_sd: Their standard deviation; None of fewer than two.
        network_sd: That of the random networks' accuracies, one seed each.
    """

    accuracies: tuple[float, ...]
    seed_sd: float | None
    network_sd: float | None


@record
class CheckOptions:
    """What is tried and what is stated instead.

    Attributes:
        plan_only: Try no network.
        steps: Optimizer steps of a training that is tried, 2 at least.
        repeats: Seeds of the first random network; above 1 all the random networks are trained in
            full, since a few steps say nothing of accuracy. None: three, if that takes no longer
            than ten minutes.
        seconds_per_child: Of a network's evaluation on one worker: then none is evaluated.
        seconds_per_measurement: On one device: then nothing is measured.
        price: Of a worker hour, in any currency.
    """

    plan_only: bool = False
    steps: int = 8
    repeats: int | None = None
    seconds_per_child: float | None = None
    seconds_per_measurement: float | None = None
    price: float | None = None


@record
class Report:
    """All that a check has found."""

    plan: Plan
    findings: tuple[Finding, ...]
    networks: tuple[Member, ...]
    noise: Noise | None
    estimate: Estimate


def check(
    config: CampaignConfig,
    plan: Plan,
    findings: Sequence[Finding],
    options: CheckOptions,
) -> Report:
    """Try networks, as far as something can be tried here, and estimate the campaign.

    Args:
        config: Of the campaign.
        plan: Of it.
        findings: What is here and what is lacking.
        options: What to try.
    """
    found: list[Member] = []
    noise = None
    for outcome in try_networks(config, findings, options):
        if isinstance(outcome, Noise):
            noise = outcome
        else:
            found.append(outcome)
    child_s, measurement_s = mean_times(found)
    return Report(
        plan=plan,
        findings=(*findings, *findings_of(config, found), *_no_noise(options, found)),
        networks=tuple(found),
        noise=noise,
        estimate=estimate(
            config,
            child_s=_known(options.seconds_per_child, child_s),
            measurement_s=_known(options.seconds_per_measurement, measurement_s),
            price=options.price,
        ),
    )


def _known(stated: float | None, measured: float | None) -> tuple[float, Source] | None:
    if stated is not None:
        return stated, "stated"
    return None if measured is None else (measured, "measured")


def try_networks(
    config: CampaignConfig, findings: Sequence[Finding], options: CheckOptions
) -> Iterator[Member | Noise]:
    """Yield the networks tried, the smallest and the largest first; then the noise, if asked for.

    Nothing is yielded where neither evaluating nor measuring is wanted and possible.
    """
    parts = parts_here(config, findings)
    evaluate = (
        not options.plan_only
        and options.seconds_per_child is None
        and can_evaluate(config, findings)
    )
    measure = not options.plan_only and options.seconds_per_measurement is None
    meters = {
        name: meter
        for name, meter in parts.meters.items()
        if measure and not lacks(findings, f"device {name}") and name not in config.at_nodes
    }
    if not (evaluate or meters):
        return
    tried = networks(parts.space, config.seed)
    accuracies: list[float | None] = []
    extremes: list[Member] = []
    repeats = 0
    for index, (role, network) in enumerate(tried):
        brief = None
        if role == "random":
            repeats = _repeats(options, extremes)
        if evaluate:
            seed = trial_seed(config.seed, index, CHECK)
            brief = evaluate_brief(config, network, seed, None if repeats else options.steps)
            if repeats:
                accuracies.append(brief.accuracy)
        member = _member(role, network, brief, meters, evaluator_times=not config.devices)
        extremes += [] if role == "random" else [member]
        yield member
    if accuracies and accuracies[0] is not None:
        network = tried[-RANDOM_NETWORKS][1]
        seeds = (trial_seed(config.seed, len(tried) + n, CHECK) for n in range(repeats - 1))
        others = [evaluate_brief(config, network, seed, None).accuracy for seed in seeds]
        yield _noise([accuracies[0], *others], accuracies)


def _repeats(options: CheckOptions, extremes: Sequence[Member]) -> int:
    """How many seeds: as asked for, or the default if there is the time."""
    if options.repeats is not None:
        return options.repeats
    seconds = _noise_s(extremes)
    return DEFAULT_REPEATS if seconds is not None and seconds <= NOISE_LIMIT_S else 0


def _noise_s(members: Sequence[Member]) -> float | None:
    """Seconds of the default's whole trainings, by the extremes' times."""
    times = [m.child_s for m in members if m.role != "random" and m.child_s is not None]
    # Their geometric mean: sizes are orders apart, and a random network's is in the middle.
    return _WHOLE_TRAININGS * math.prod(times) ** (1 / len(times)) if times else None


def _no_noise(options: CheckOptions, members: Sequence[Member]) -> Iterator[Finding]:
    """Yield why the noise is not known, where it was left out for want of time."""
    seconds = _noise_s(members)
    if options.repeats is None and seconds is not None and seconds > NOISE_LIMIT_S:
        text = (
            f"the proxy accuracy's takes {_WHOLE_TRAININGS} whole trainings, about"
            f" {format_duration(seconds)}; --repeats {DEFAULT_REPEATS} does them"
        )
        yield Finding("noise", "unknown", text)


def _noise(seeds: Sequence[float | None], networks: Sequence[float | None]) -> Noise:
    """The spreads of the accuracies that there are."""
    known = [accuracy for accuracy in seeds if accuracy is not None]
    of_networks = [accuracy for accuracy in networks if accuracy is not None]
    return Noise(tuple(known), _sd(known), _sd(of_networks))


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def networks(space: SearchSpace, seed: int) -> list[tuple[str, Architecture]]:
    """Return role and network: the smallest, the largest, three at random."""
    rng = np.random.default_rng(stream(seed, CHECK, 0))
    drawn = [space.decode(uniform_tokens(space.num_choices, rng)) for _ in range(RANDOM_NETWORKS)]
    return [
        ("smallest", extreme_network(space, -1)),
        ("largest", extreme_network(space, 1)),
        *(("random", network) for network in drawn),
    ]


def _member(
    role: str,
    network: Architecture,
    brief: Brief | None,
    meters: Mapping[str, LatencyMeter],
    *,
    evaluator_times: bool,
) -> Member:
    cost = count(network)
    latencies: dict[str, float] = {}
    measuring: dict[str, float] = {}
    faults = [brief.failure] if brief is not None and brief.failure else []
    for name, meter in meters.items():
        started = time.monotonic()
        outcome = _measured(meter, network)
        if isinstance(outcome, str):
            faults.append(f"{name}: {outcome}")
        else:
            latencies[name] = outcome.median_ms
            measuring[name] = time.monotonic() - started
    if brief is not None and evaluator_times and LATENCY in brief.metrics:
        latencies["evaluator"] = brief.metrics[LATENCY]
    return Member(
        role=role,
        architecture=network.text,
        architecture_hash=network.hash,
        parameters=cost.parameters,
        macs=cost.macs,
        step_s=brief.step_s if brief else None,
        child_s=brief.child_s if brief else None,
        accuracy=brief.accuracy if brief else None,
        latencies_ms=latencies or None,
        measuring_s=measuring or None,
        peak_memory_mb=brief.peak_memory_mb if brief else None,
        failure="; ".join(faults) or None,
    )


def _measured(meter: LatencyMeter, network: Architecture) -> Measurement | str:
    """The network's time, or why there is none."""
    try:
        return meter.measure(network)
    except MeasurementError as error:
        return str(error)
    except Exception as error:
        # A user's own class may raise anything: before a campaign that is a finding, too.
        return f"{type(error).__name__}: {error}"


def findings_of(config: CampaignConfig, members: Sequence[Member]) -> list[Finding]:
    """Return what the networks tried say of this machine: does any work, is there the memory."""
    findings = []
    if members and all(member.failure for member in members):
        findings.append(Finding("networks", "lacks", f"all {len(members)} failed"))
    peaks = [m.peak_memory_mb for m in members if m.peak_memory_mb is not None]
    memory, workers = memory_bytes(), num_workers(config)
    local = isinstance(config.executor, RayConfig) and config.executor.address is None
    if peaks and memory and workers and local:
        needed, total = workers * max(peaks), memory[0] / 2**20
        text = f"{workers} x {max(peaks):,.0f} MB, the highest peak seen, of {total:,.0f} MB"
        findings.append(Finding("memory", "ok" if needed < total else "lacks", text))
    return findings


def mean_times(members: Sequence[Member]) -> tuple[float | None, float | None]:
    """Return the random networks' mean seconds of an evaluation and of a measurement."""
    random = [member for member in members if member.role == "random"]
    children = [m.child_s for m in random if m.child_s is not None]
    measured = [s for m in random for s in (m.measuring_s or {}).values()]
    return _mean(children), _mean(measured)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
