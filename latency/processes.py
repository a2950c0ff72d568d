"""Runs a program to its end or its time limit, keeps what it printed, leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from space.errors import MeasurementError
from space.records import record

#: For what is in a pipe to be read once its writer has ended.
_PIPE_S = 2.0

#: More output than this is no answer; the program is killed.
MOST_BYTES = 8_000_000

#: What `run_to_end` waits for in any thread, and whether that is to end: see `breaking_off`.
_running: set[subprocess.Popen[bytes]] = set()
_breaking_off = threading.Event()


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for files of ours; afterwards it is removed.

    Raises:
        MeasurementError: The disk takes no folder, or no file within.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="mnas-") as folder:
            yield Path(folder)
    except OSError as error:
        raise MeasurementError(
            f"a temporary file cannot be written: {error.strerror or error}; make room or set"
            " TMPDIR"
        ) from error


@record
class Finished:
    """How a program ended.

    Attributes:
        status: Its exit status; negative: the signal that ended it.
        output: Its standard output, as text.
        errors: Its standard error.
        ending: `ended` by itself, or killed at the `time` limit or for too much `output`.
    """

    status: int
    output: str
    errors: str
    ending: str


def run_to_end(
    argv: Sequence[str],
    *,
    timeout_s: float,
    given: bytes | None = None,
    env: Mapping[str, str] | None = None,
    to_the_end: bool = False,
) -> Finished:
    """Return how a program ended; at the time limit it is killed with all that it started.

    Its standard input is empty; or holds `given` and then stays open until the program ends, so
    that one at the other end of a connection can tell a waiting caller from one that is gone. What
    must run `to_the_end`, such as a cleanup, `breaking_off` leaves alone.

    Raises:
        OSError: It cannot be started.
        BrokenOff: See `breaking_off`.
    """
    if not to_the_end:
        heed_breaking_off()
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    ending, threads = "ended", list[threading.Thread]()
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = _Reader(process.stdout, process), _Reader(process.stderr, process)
        feeder = threading.Thread(target=_feed, args=(process.stdin, given), daemon=True)
        for thread in (feeder, output, errors):
            thread.start()
            threads.append(thread)
        if not to_the_end:
            _running.add(process)
            if _breaking_off.is_set():
                kill_group(process)
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        ending = "time"
    finally:
        _running.discard(process)
        kill_group(process)
        _close_pipes(process, threads)
    if not to_the_end:
        heed_breaking_off()
    if output.overflowed or errors.overflowed:
        ending = "output"
    return Finished(process.returncode, output.text, errors.text, ending)


def _close_pipes(process: subprocess.Popen[bytes], threads: Sequence[threading.Thread]) -> None:
    # A daemon that the program left behind, in a group of its own, may hold the pipes open.
    for thread in threads:
        thread.join(_PIPE_S)
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


class BrokenOff(BaseException):
    """Whoever asked for figures wants them no more: no reason for a figure that is missing."""


@contextlib.contextmanager
def breaking_off() -> Iterator[None]:
    """Have the measurements of other threads end: within, what they wait for raises BrokenOff.

    Their programs are killed, with all that these started.
    """
    _breaking_off.set()
    try:
        for process in list(_running):
            kill_group(process)
        yield
    finally:
        _breaking_off.clear()


def is_breaking_off() -> bool:
    """Whether measurements are being broken off."""
    return _breaking_off.is_set()


def heed_breaking_off() -> None:
    """End what this thread measures if measurements are being broken off.

    Raises:
        BrokenOff: They are.
    """
    if _breaking_off.is_set():
        raise BrokenOff


def rest(seconds: float) -> None:
    """Wait so long.

    Raises:
        BrokenOff: See `breaking_off`.
    """
    if _breaking_off.wait(seconds):
        raise BrokenOff


class _Reader(threading.Thread):
    """Reads a pipe to its end, or kills the process that writes too much into it."""

    def __init__(self, pipe: IO[bytes], process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._process = pipe, process
        self._parts: list[bytes] = []
        self.overflowed = False

    def run(self) -> None:
        size = 0
        with contextlib.suppress(OSError, ValueError):  # closed while it was being read
            while part := os.read(self._pipe.fileno(), 1 << 16):
                self._parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    self.overflowed = True
                    kill_group(self._process)
                    return

    @property
    def text(self) -> str:
        """What was read so far."""
        return b"".join(self._parts).decode("utf-8", "replace")


def _feed(pipe: IO[bytes] | None, given: bytes | None) -> None:
    if pipe is None or given is None:
        return
    with contextlib.suppress(OSError, ValueError):  # it ended without reading all of it
        pipe.write(given)
        pipe.flush()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group that a process leads, and wait for the process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
