"""Journal: measurements appended to a file as they are taken, so that a killed run goes on.

One JSON line per network: `architecture` with `measurement` (raw samples and all), or with
`failure`, why the device cannot run it. A line is written by one call and is on the disk before
the next network is measured; what a kill left of a last line is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from latency.device import LatencyMeter
from latency.lookup_table import check_device
from latency.measurement import Measurement
from space.architecture import Architecture
from space.errors import ConfigError, MeasurementError
from space.records import build, record, to_plain

#: What failed so often in a row fails because of the device.
_MOST_FAILURES = 3

#: A measurement that is not `ok` is taken again once, at the end.
_MOST_TAKEN = 2

Outcome = Measurement | MeasurementError

#: Is told how many networks of how many are done, and the latest outcome.
Watch = Callable[[int, int, Outcome], None]


@record
class Line:
    """A line of the file.

    Attributes:
        architecture: The network's text form.
        measurement: Its time, or None.
        failure: Why there is none.
    """

    architecture: str
    measurement: Measurement | None = None
    failure: str | None = None


class Journal:
    """The measurements of one device in one file; a context manager that keeps others out.

    Args:
        path: Is made if there is none.
        device: Identity of the device; those of the file must be equal.

    Raises:
        ConfigError: The file is another device's, is in use, or is not a journal.
    """

    def __init__(self, path: Path, device: dict[str, Any]) -> None:
        self._path = path
        self._found: dict[str, list[Line]] = {}
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(device)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{path}: another process is measuring into it; wait for it or name another --out."
            ) from None
        except ConfigError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def get(self, architecture: Architecture) -> Measurement | None:
        """Return a network's measurement: of several an `ok` one, or else the least noisy."""
        lines = self._found.get(architecture.text, [])
        taken = [line.measurement for line in lines if line.measurement is not None]
        return min(taken, key=lambda m: (m.verdict != "ok", m.spread), default=None)

    def missing(self, architectures: Iterable[Architecture]) -> list[Architecture]:
        """Return the networks that are still to be measured."""
        return [network for network in architectures if network.text not in self._found]

    def disturbed(self, architectures: Iterable[Architecture]) -> list[Architecture]:
        """Return the networks whose measurement is not `ok` and was not taken again."""
        return [
            network
            for network in architectures
            if (found := self.get(network)) is not None
            and found.verdict != "ok"
            and len(self._found[network.text]) < _MOST_TAKEN
        ]

    def measure(
        self, meter: LatencyMeter, architectures: Sequence[Architecture], watch: Watch
    ) -> None:
        """Measure networks and keep what they take.

        Args:
            meter: Of the journal's device.
            architectures: Which.
            watch: Is called after each network, once its outcome is kept.

        Raises:
            MeasurementError: The device failed several times in a row.
        """
        errors: list[MeasurementError] = []  # of the device, different ones in a row
        for done, (network, outcome) in enumerate(meter.measure_all(architectures), start=1):
            if self._keep(network, outcome):
                errors.clear()
            elif not errors or outcome is not errors[-1]:  # several networks may share one
                errors.append(cast(MeasurementError, outcome))
            if len(errors) == _MOST_FAILURES:
                raise errors[-1]
            watch(done, len(architectures), outcome)

    def _keep(self, network: Architecture, outcome: Measurement | MeasurementError) -> bool:
        """Append what will not change, and return whether there was that: the device works."""
        if isinstance(outcome, Measurement):
            self._append(Line(network.text, outcome))
            return True
        if outcome.cause == "architecture":
            self._append(Line(network.text, failure=str(outcome)))
            return True
        return False

    def _append(self, line: Line) -> None:
        text = json.dumps(to_plain(line), allow_nan=False) + "\n"
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MeasurementError(f"{self._path} cannot be written: {error.strerror}") from error
        self._found.setdefault(line.architecture, []).append(line)

    def _read(self, device: dict[str, Any]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), start=1):
            where = f"{self._path}: line {number}"
            try:
                values = json.loads(text)
            except ValueError:
                raise ConfigError(f"{where}: must be JSON; name another --out.") from None
            line = build(Line, values, where=where)
            if line.measurement is not None:
                check_device(device, line.measurement.device, where)
            self._found.setdefault(line.architecture, []).append(line)
        if len(whole) < len(content):
            self._file.truncate(len(whole))
