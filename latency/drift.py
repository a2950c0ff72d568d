"""Watches a device for drift: no figure leaves before a check has found the device unchanged.

A reference network is measured at the start. The figures of at most `every` networks are held back
until the reference is measured again. Where its time has shifted by more than `bound` (the device
throttles, somebody else uses it), the held networks are measured again after a pause; where that
does not help, they leave flagged: verdict `drifted`. So every figure that is not flagged stands
between two good checks, and a caller needs no way to take figures back.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from latency.config import DriftConfig
from latency.device import LatencyMeter, Outcome, measured_or_why, only_measurement
from latency.measurement import Measurement
from latency.processes import rest
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import MeasurementError
from space.mnasnet import find_architecture

_LOG = logging.getLogger(__name__)


class DriftGuard(LatencyMeter):
    """A meter under a drift guard; its identity, and what a figure means, are the meter's.

    What the reference takes at the start is kept: a device that gets slower for good has all its
    later figures flagged, for they compare with none before. One that is faster at two ends of
    held networks in a row was disturbed at its start: both are flagged, and from there on its
    faster time is what counts.

    Args:
        meter: What measures.
        config: When, and what is accepted.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        meter: LatencyMeter,
        config: DriftConfig,
        *,
        sleep: Callable[[float], None] = rest,
    ) -> None:
        self._meter = meter
        self._config = config
        self._sleep = sleep
        self._reference = find_architecture(config.reference)
        self._start_ms: float | None = None
        #: Whether the last check was a good one.
        self._was_good = True
        #: The reference's time after the last networks, if it was faster than at the start.
        self._faster_ms: float | None = None

    @property
    def batch(self) -> int:
        """The most networks between two checks."""
        return self._config.every

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter."""
        return self._meter.identity()

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter; a check follows. `measure_all` has one check for many networks."""
        return only_measurement(self.measure_all([architecture], style))

    def measure_all(
        self, architectures: Iterable[Architecture], style: NetworkStyle = PAPER_STYLE
    ) -> Iterator[Outcome]:
        """See LatencyMeter: in order, up to `every` at a time, each time after a check."""
        waiting = iter(architectures)
        while held := list(itertools.islice(waiting, self._config.every)):
            yield from self._checked(held, style)

    def _checked(self, held: list[Architecture], style: NetworkStyle) -> list[Outcome]:
        """Networks measured, then the reference; again after a pause where that has shifted."""
        try:
            start_ms = self._start()
        except MeasurementError as error:
            return [(architecture, error) for architecture in held]
        outcomes = self._measured(held, style)
        change = self._change(start_ms)
        if self._is_accepted(change) and not self._was_good:
            # It came to rest somewhere among these: they stand between no two good checks.
            outcomes = self._measured(held, style)
            change = self._change(start_ms)
        for number in range(self._config.tries):
            if self._is_accepted(change):
                break
            _LOG.warning(
                "the reference network's time shifted by %s; rest %d of %d, %g s",
                _shown(change), number + 1, self._config.tries, self._config.pause_s,
            )  # fmt: skip
            self._sleep(self._config.pause_s)
            change = self._change(start_ms)
            if self._is_accepted(change):
                outcomes = self._measured(held, style)
                change = self._change(start_ms)
        flagged = [(network, self._flagged(outcome, change)) for network, outcome in outcomes]
        self._was_good = self._is_accepted(change)
        self._note_recovery(start_ms, change)
        return flagged

    def _note_recovery(self, start_ms: float, change: float | None) -> None:
        """Start anew where the device is faster than at its start for the second time in a row."""
        bound, last_ms, self._faster_ms = self._config.bound, self._faster_ms, None
        if change is None or change >= -bound:
            return
        self._faster_ms = start_ms * (1 + change)
        if last_ms is not None and abs(self._faster_ms / last_ms - 1) <= bound:
            self._start_ms, self._was_good = self._faster_ms, True
            _LOG.warning(
                "the device was slow at the start: its reference network takes %.4g ms now, not"
                " %.4g; from here on figures are held against that", self._start_ms, start_ms,
            )  # fmt: skip

    def _start(self) -> float:
        """The reference's time at the start: the first that the next one confirms.

        Raises:
            MeasurementError: There is none, or no two in a row agree.
        """
        if self._start_ms is not None:
            return self._start_ms
        times_ms = [self._reference_ms()]
        for _ in range(self._config.tries + 1):
            times_ms.append(self._reference_ms())
            if abs(times_ms[-1] / times_ms[-2] - 1) <= self._config.bound:
                self._start_ms = times_ms[-1]
                return self._start_ms
        shown = ", ".join(f"{t:.4g}" for t in times_ms)
        raise MeasurementError(
            f"the drift guard's reference network must take the same time twice in a row within"
            f" {self._config.bound:.0%}, but took {shown} ms; let the device come to rest or raise"
            " drift.bound"
        )

    def _reference_ms(self) -> float:
        return self._meter.measure(self._reference).median_ms

    def _change(self, start_ms: float) -> float | None:
        """The reference's relative shift since the start; None if it cannot be measured now."""
        try:
            return self._reference_ms() / start_ms - 1
        except MeasurementError as error:
            _LOG.warning("the reference network cannot be measured: %s", error)
            return None

    def _is_accepted(self, change: float | None) -> bool:
        return change is not None and abs(change) <= self._config.bound

    def _measured(self, held: list[Architecture], style: NetworkStyle) -> list[Outcome]:
        return [(network, measured_or_why(self._meter, network, style)) for network in held]

    def _flagged(
        self, outcome: Measurement | MeasurementError, change: float | None
    ) -> Measurement | MeasurementError:
        """An outcome with what the check after it found."""
        if isinstance(outcome, MeasurementError):
            return outcome
        found = {"reference": self._reference.text, "start_ms": self._start_ms, "change": change}
        environment = {**outcome.environment, "drift": found}
        accepted = self._is_accepted(change)
        return replace(outcome, environment=environment, drifted=not accepted)


def _shown(change: float | None) -> str:
    return "an unknown share" if change is None else f"{change:+.1%}"
