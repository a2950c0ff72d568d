"""Runs a module of ours in another process and reads what it prints; also if it ran elsewhere."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import latency
from latency.processes import run_to_end, temporary_folder
from space.errors import FailureCause, MeasurementError

#: For Python to start and the libraries to load; then a module's own alarm is on.
START_S = 20.0


class DeviceFault(MeasurementError):
    """A process or a device elsewhere that did not do what it was asked.

    Attributes:
        stage: How far it came: `ssh` (no client here), `reachable`, `host key`, `login`, `python`,
            or `answer`.
    """

    def __init__(
        self, reason: str, stage: str = "answer", *, cause: FailureCause = "infrastructure"
    ) -> None:
        super().__init__(reason, cause=cause)
        self.stage = stage


def run_module(module: str, files: dict[str, bytes], *, time_limit_s: float) -> dict[str, Any]:
    """Return the report of a module of ours that is run here, in a process of its own.

    Args:
        module: `latency.runner`; its arguments are the paths of the files.
        files: Name -> content.
        time_limit_s: At which its own alarm ends it; where it does not, it is killed later.

    Raises:
        MeasurementError: See `read_report`.
    """
    assert latency.__file__ is not None
    root = str(Path(latency.__file__).parents[1])
    search = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    with temporary_folder() as folder:
        paths = [folder / name for name in files]
        for path in paths:
            path.write_bytes(files[path.name])
        finished = run_to_end(
            [sys.executable, "-m", module, *map(str, paths)],
            timeout_s=time_limit_s + START_S,
            env={"PYTHONPATH": search},
        )
    where = "in a process of its own"
    if finished.ending != "ended":
        what = "hung" if finished.ending == "time" else "printed without end"
        raise DeviceFault(f"the measurement {where} {what} and was killed")
    return read_report(
        where, finished.status, finished.output, finished.errors, time_limit_s=time_limit_s
    )


def read_report(
    where: str, status: int, output: str, errors: str, *, time_limit_s: float
) -> dict[str, Any]:
    """Return the JSON object that a module printed last.

    Args:
        where: It ran, for messages: `on board.local`.
        status: Its exit status; negative: the signal that ended it.
        output: What it printed.
        errors: What it printed on standard error.
        time_limit_s: At which its own alarm ends it.

    Raises:
        DeviceFault: It hung, died, or printed something else.
        MeasurementError: The report is that there is no figure.
    """
    if status == -signal.SIGALRM:
        raise DeviceFault(
            f"the measurement {where} hung and was killed after time_limit_s ({time_limit_s:g} s)"
        )
    if status != 0:
        raise DeviceFault(f"the runner {where} died with {_ending(status)}: {last_line(errors)!r}")
    report = json_line(output)
    if report is None:
        raise DeviceFault(
            f"the runner {where} gave an answer that cannot be read: {last_line(output)!r}"
        )
    if "fault" in report:
        cause: FailureCause = (
            "architecture" if report.get("cause") == "architecture" else "infrastructure"
        )
        raise MeasurementError(f"{where}: {report['fault']}", cause=cause)
    return report


def json_line(text: str) -> dict[str, Any] | None:
    """Return the last line that is a JSON object; a shell's greeting may come before it."""
    for line in reversed(text.splitlines()):
        try:
            value = json.loads(line, parse_constant=_refuse)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def last_line(text: str) -> str:
    """Return the last line that is not blank, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    hint = ", often for lack of memory" if status == -signal.SIGKILL else ""
    return f"signal {-status} ({signal.strsignal(-status)}{hint})"
