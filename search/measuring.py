"""Latencies: a campaign's devices with their targets, and the figures that they have given.

With several devices a network has one latency on each, `latency_ms:NAME`, and one that counts,
`latency_ms`: the ratios LAT / T of the devices' latencies to their targets, the worst of them or
their weighted mean, in milliseconds of the first device. So every objective works unchanged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from latency.device import LatencyMeter
from latency.measurement import Measurement, fingerprint
from latency.processes import rest
from search.evaluation import Evaluator
from search.measurement_cache import MeasurementCache
from search.objective import LATENCY, ObjectiveConfig
from search.store import Store
from search.trial import Trial
from space.architecture import Architecture, graph_hash
from space.errors import ConfigError, MeasurementError

logger = logging.getLogger(__name__)

#: How often a reference network is measured at most, until a measurement is good: every reward of
#: a campaign depends on it.
REFERENCE_TRIES = 5

#: A device that has no figure for so many networks in a row is gone, by the machine's fault each.
LOST_AFTER = 10
#: A failure that several networks share, since they were to be measured together, counts as so
#: many at most.
SHARED_COUNTS = 4
#: The pauses before a device that does not answer is asked again; then it is gone.
PAUSES_S = (1.0, 4.0, 15.0)

#: The metric of a finalist that was quantized: accuracy in int8, a fraction.
INT8_ACCURACY = "int8_accuracy"


def in_int8(store: Store, trials: Iterable[Trial]) -> bool:
    """Return whether a device of a campaign computes in int8, as the trials' measurements say."""
    ids = next((trial.measurement_ids for trial in trials if trial.measurement_ids), ())
    return any(store.measurement(key).device.get("precision") == "int8" for key in ids)


class Figures(NamedTuple):
    """What the devices say of a network.

    Attributes:
        measurement_ids: Rows of the table `measurement`, one per device.
        metrics: `latency_ms` and what else the devices give.
        seconds: What it took.
    """

    measurement_ids: tuple[int, ...]
    metrics: dict[str, float]
    seconds: float


class Latencies:
    """Measures networks on all devices of a campaign, each network once.

    Without a device the figures are those that the evaluator knows without an evaluation.

    Args:
        config: The objective: its targets and what several devices' latencies come to.
        meters: Name -> meter; the first one's milliseconds are those that count.
        evaluator: Of the campaign.
        store: Where measurements are kept.
        reference: The network whose latency the targets are multiples of, if that is configured.
        reference_meters: Name -> what measures it: at full precision, since every reward depends
            on it. None takes `meters`.
        cache: Measurements that are common to several campaigns.

    Raises:
        ConfigError: The reference network cannot be measured.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        meters: Mapping[str, LatencyMeter],
        evaluator: Evaluator,
        store: Store,
        reference: Architecture | None,
        reference_meters: Mapping[str, LatencyMeter] | None = None,
        cache: MeasurementCache | None = None,
    ) -> None:
        self._config = config
        self._meters = meters
        self._reference_meters = meters if reference_meters is None else reference_meters
        self._evaluator = evaluator
        self._store = store
        self._cache = cache
        self._failures = dict.fromkeys(meters, 0)  # in a row
        self._shared: dict[str, tuple[MeasurementError, int]] = {}  # the last one, how often
        self._targets = self._known_targets() or self._new_targets(reference)
        store.set_meta("targets", self._targets)
        store.set_meta("target_ms", self.target_ms)

    @property
    def target_ms(self) -> float:
        """T of the first device, in milliseconds."""
        return next(iter(self._targets.values()))

    def measure(
        self, networks: Iterable[Architecture], *, anew: bool = False
    ) -> Iterator[tuple[Architecture, Figures | MeasurementError]]:
        """Yield every network once, in an order that is the devices' own, with its figures.

        Args:
            networks: Different ones.
            anew: Measure also what has been measured before.

        Raises:
            MeasurementError: A device is gone (`LOST_AFTER`): its networks wait for it.
        """
        waiting = {network.hash: network for network in networks}
        found: dict[str, dict[str, tuple[int, Measurement]]] = {key: {} for key in waiting}
        before = time.monotonic()
        for name, meter in self._meters.items():
            for network, outcome in self._on_one(name, meter, list(waiting.values()), anew=anew):
                if isinstance(outcome, MeasurementError):
                    del waiting[network.hash]
                    yield network, outcome
                    continue
                found[network.hash][name] = outcome
                if len(found[network.hash]) == len(self._meters):
                    now = time.monotonic()
                    yield network, self._figures(found[network.hash], now - before)
                    before = now
        if not self._meters:
            for network in waiting.values():
                yield network, Figures((), self._evaluator.metrics(network), 0.0)

    def _note_failure(self, name: str, error: MeasurementError) -> None:
        """Count a device's failures: one that is unplugged must not cost a campaign its trials."""
        if error.cause != "infrastructure":
            self._failures[name] = 0  # it answered
            return
        last, times = self._shared.get(name, (None, 0))
        times = times + 1 if error is last else 1
        self._shared[name] = error, times
        self._failures[name] += times <= SHARED_COUNTS
        if self._failures[name] >= LOST_AFTER:
            raise _gone(f"has given no figure for {LOST_AFTER} networks in a row", name, error)

    def _on_one(
        self, name: str, meter: LatencyMeter, networks: list[Architecture], *, anew: bool
    ) -> Iterator[tuple[Architecture, tuple[int, Measurement] | MeasurementError]]:
        """The networks' measurements on one device, from the databases or the device."""
        if not networks:
            return
        device = _identified(name, meter)
        missing = []
        for network in networks:
            known = None if anew else self._known(graph_hash(network), device)
            if known is None:
                missing.append(network)
            else:
                yield network, known
        for network, outcome in meter.measure_all(missing):
            if isinstance(outcome, MeasurementError):
                self._note_failure(name, outcome)
                yield network, outcome
            else:
                self._failures[name] = 0
                kept = (self._store.add_measurement(outcome), outcome)
                if self._cache is not None:
                    self._cache.add(outcome)
                yield network, kept

    def _known(self, graph: str, device: str) -> tuple[int, Measurement] | None:
        """A graph's earlier measurement: the campaign's own, or a copy of the cache's."""
        own = self._store.find_measurement(graph, device)
        if own is not None or self._cache is None:
            return own
        shared = self._cache.find(graph, device)
        return None if shared is None else (self._store.add_measurement(shared), shared)

    def _figures(
        self, by_device: Mapping[str, tuple[int, Measurement]], seconds: float
    ) -> Figures:
        latencies = {name: measurement.median_ms for name, (_, measurement) in by_device.items()}
        first = next(iter(by_device))
        metrics = {**by_device[first][1].metrics, LATENCY: self._counts(latencies)}
        if len(latencies) > 1:
            metrics.update({f"{LATENCY}:{name}": value for name, value in latencies.items()})
        return Figures(tuple(key for key, _ in by_device.values()), metrics, seconds)

    def _counts(self, latencies: Mapping[str, float]) -> float:
        """The latency that counts, in milliseconds of the first device."""
        if len(latencies) == 1:
            return next(iter(latencies.values()))
        ratios = {name: value / self._targets[name] for name, value in latencies.items()}
        weights = self._config.device_weights
        if weights is None:
            return self.target_ms * max(ratios.values())
        total = sum(weights[name] * ratio for name, ratio in ratios.items())
        return self.target_ms * total / sum(weights.values())

    # ------------------------------------------------------------------ targets

    def _known_targets(self) -> dict[str, float]:
        """What an earlier session of the campaign settled."""
        known: dict[str, float] = self._store.meta("targets", {})
        alone = self._store.meta("target_ms")  # all that older campaigns have
        if known or alone is None:
            return known
        return {next(iter(self._meters), ""): alone}

    def _new_targets(self, reference: Architecture | None) -> dict[str, float]:
        if self._config.target_ms is not None:
            first = {next(iter(self._meters), ""): self._config.target_ms}
            return first | (self._config.other_targets_ms or {})
        assert self._config.target is not None  # ObjectiveConfig demands one of the two
        assert reference is not None  # there is a target
        times = self._config.target.times
        targets = {}
        for name, meter in self._reference_meters.items():
            measurement_id, measurement = self._of_reference(name, meter, reference)
            targets[name] = times * measurement.median_ms
            if len(targets) == 1:
                self._store.set_meta("target_measurement", measurement_id)
        return targets

    def _of_reference(
        self, name: str, meter: LatencyMeter, reference: Architecture
    ) -> tuple[int, Measurement]:
        """The reference's measurement: a good one, or after several the least noisy."""
        taken: list[tuple[int, Measurement]] = []
        while len(taken) < REFERENCE_TRIES:
            outcome: tuple[int, Measurement] | MeasurementError
            try:
                ((_, outcome),) = self._on_one(name, meter, [reference], anew=bool(taken))
            except MeasurementError as error:
                outcome = error
            if isinstance(outcome, MeasurementError):
                if taken:
                    break
                raise ConfigError(
                    f"objective.target: the reference network cannot be measured on {name}:"
                    f" {outcome}"
                )
            taken.append(outcome)
            if outcome[1].verdict == "ok":
                return outcome
        best = min(taken, key=lambda found: (found[1].drifted, found[1].spread))
        sentence = (
            f"the target rests on a {best[1].verdict} measurement: none of {len(taken)} of the"
            f" reference network on {name} was ok; the best has {best[1].median_ms:.4g} ms with a"
            f" spread of {best[1].spread:.0%}"
        )
        logger.warning("%s", sentence)
        self._store.add_event("target", sentence)
        return best


def _identified(name: str, meter: LatencyMeter) -> str:
    """A device's fingerprint; it may answer a little later.

    Raises:
        MeasurementError: It does not.
    """
    for pause in (*PAUSES_S, None):
        try:
            return fingerprint(meter.identity())
        except MeasurementError as error:
            if pause is None:
                raise _gone("does not answer", name, error) from error
            logger.warning("%s: %s; it is asked again in %g s", name, error, pause)
            rest(pause)
    raise AssertionError  # the last round returns or raises


def _gone(what: str, name: str, error: MeasurementError) -> MeasurementError:
    return MeasurementError(
        f"{name} {what}, so the search stops; see to it and go on with `mnas resume`. The last"
        f" time: {error}"
    )
