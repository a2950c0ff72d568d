"""Several identical devices share the networks to be measured; one that keeps failing is retired.

Every device has a thread of its own and at most one measurement under way. A network that a device
failed to measure goes to another one; only where each has failed it is there no figure.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from latency.device import LatencyMeter, Outcome, only_measurement
from latency.drift import DriftGuard
from latency.measurement import Measurement
from latency.processes import breaking_off
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import MeasurementError

_LOG = logging.getLogger(__name__)

#: What may differ between the identities of a pool's members.
_OWN = frozenset({"name", "host"})


@dataclass(eq=False)
class Member:
    """One device of a pool.

    Attributes:
        name: Of the device.
        meter: What measures on it.
        failures: In a row, up to now; one that several networks share counts once.
        retired: Whether it gets no more work.
        last_error: Of the last failure.
    """

    name: str
    meter: LatencyMeter
    failures: int = 0
    retired: bool = False
    last_error: MeasurementError | None = None

    def take(self, jobs: list[_Job], num_members: int) -> list[_Job]:
        """Remove this member's next networks from `jobs` and return them.

        That is one, or with a drift guard, which checks once for all that it is given together,
        its batch, but no more than a fair share.
        """
        fit = [job for job in jobs if self not in job.failed_by]
        batch = self.meter.batch if isinstance(self.meter, DriftGuard) else 1
        taken = fit[: min(batch, math.ceil(len(fit) / num_members))]
        for job in taken:
            jobs.remove(job)
        return taken

    def work(self, jobs: list[_Job], style: NetworkStyle) -> list[tuple[_Job, Outcome]]:
        """Measure networks; runs in a thread."""
        outcomes = self.meter.measure_all([job.architecture for job in jobs], style)
        return list(zip(jobs, outcomes, strict=True))


@dataclass(eq=False)
class _Job:
    """A network to be measured, the members that failed to, and why the last one did."""

    architecture: Architecture
    failed_by: list[Member] = field(default_factory=list)
    error: MeasurementError | None = None


@contextlib.contextmanager
def _broken_off_with(running: Iterable[Future[Any]]) -> Iterator[None]:
    """Have measurements end with the one who asked for them: Ctrl-C must not wait for minutes."""
    try:
        yield
    except BaseException:
        with breaking_off():
            wait(running)
        raise


class PoolMeter(LatencyMeter):
    """Times networks on whichever of several identical devices is free.

    A member that was retired stays so for the meter's life.

    Args:
        name: Of the pool.
        members: Its devices.
        retire_after: Failures in a row after which a member gets no more work.
    """

    def __init__(self, name: str, members: list[Member], *, retire_after: int) -> None:
        self._name = name
        self._members = members
        self._retire_after = retire_after
        self._shared: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter: what the members share, with the pool's name and `kind`.

        A member that does not answer now is compared when it gives its first figure.

        Raises:
            MeasurementError: Two members differ in more than name and address, or none answers.
        """
        if self._shared is None:
            self._shared = self._compared()
        shared = self._shared
        return {**shared, "name": self._name, "kind": "pool", "member": shared["kind"]}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter; on one member after the other until one gives a figure."""
        return only_measurement(self.measure_all([architecture], style))

    def measure_all(
        self, architectures: Iterable[Architecture], style: NetworkStyle = PAPER_STYLE
    ) -> Iterator[Outcome]:
        """See LatencyMeter: on all members at a time, in the order in which they are ready."""
        jobs = [_Job(architecture) for architecture in architectures]
        try:
            self.identity()
        except MeasurementError as error:
            yield from ((job.architecture, error) for job in jobs)
            return
        running: dict[Future[list[tuple[_Job, Outcome]]], Member] = {}
        with ThreadPoolExecutor(len(self._members)) as threads, _broken_off_with(running):
            while jobs or running:
                active = [member for member in self._members if not member.retired]
                for member in active:
                    busy = member in running.values()
                    taken = [] if busy else member.take(jobs, len(active))
                    if taken:
                        running[threads.submit(member.work, taken, style)] = member
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    member = running.pop(future)
                    for job, (architecture, outcome) in future.result():
                        settled = self._settled(member, job, outcome)
                        if settled is None:
                            jobs.append(job)
                        else:
                            yield architecture, settled
        for job in jobs:
            yield job.architecture, self._nobody(job)

    def _compared(self) -> dict[str, Any]:
        """What the identities of the members that answer share."""
        answers: list[tuple[str, dict[str, Any]]] = []
        errors = []
        for member in self._members:
            try:
                answers.append((member.name, _without_address(member.meter.identity())))
            except MeasurementError as error:
                errors.append(f"{member.name}: {error}")
        if not answers:
            raise MeasurementError(f"no device of {self._name} answers ({'; '.join(errors)})")
        first, shared = answers[0]
        for name, found in answers[1:]:
            if found != shared:
                raise MeasurementError(self._difference(first, shared, name, found))
        return shared

    def _settled(
        self, member: Member, job: _Job, outcome: Measurement | MeasurementError
    ) -> Measurement | MeasurementError | None:
        """What a job ends with; None if another member must try, for this one failed."""
        assert self._shared is not None  # identity() was asked before
        if isinstance(outcome, Measurement):
            found = _without_address(outcome.device)
            if found == self._shared:
                member.failures = 0
                environment = {**outcome.environment, "member": member.name}
                return replace(outcome, device=self.identity(), environment=environment)
            outcome = MeasurementError(
                self._difference("the others", self._shared, member.name, found)
            )
        if outcome.cause == "architecture":
            member.failures = 0
            return outcome
        member.failures += outcome is not member.last_error
        member.last_error = outcome
        job.failed_by.append(member)
        job.error = outcome
        if member.failures >= self._retire_after and not member.retired:
            member.retired = True
            _LOG.warning(
                "%s is retired from %s after %d failures in a row; the last: %s",
                member.name, self._name, member.failures, outcome,
            )  # fmt: skip
        return None

    def _nobody(self, job: _Job) -> MeasurementError:
        """Why a network that no member is left for has no figure."""
        if job.error is None:
            return MeasurementError(f"every device of {self._name} is retired")
        return MeasurementError(
            f"no device of {self._name} is left for the network; {job.failed_by[-1].name}:"
            f" {job.error}"
        )

    def _difference(
        self, first: str, expected: dict[str, Any], second: str, found: dict[str, Any]
    ) -> str:
        differ = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        sides = [f"{k} {expected.get(k)!r} and {found.get(k)!r}" for k in differ[:5]]
        return (
            f"the devices of {self._name} must be identical, but {first} and {second} have"
            f" {', '.join(sides)}"
        )


def _without_address(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in _OWN}
