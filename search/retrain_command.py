"""A command of the retrain room as a child process, which is ended when it hangs."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from latency.processes import kill_group
from space.errors import Diverged, TrialFailed

#: A command that prints nothing for so long is taken to hang. A training prints a line in 20 steps
#: and at every validation, but `validate` and `export` print at their end only: exported in int8,
#: ImageNet's 50,000 validation images go three times through a network, hours on a small CPU.
SILENCE_LIMIT_S = 6 * 3600.0

#: For a command that is asked to end, to end in order: Ctrl-C waits for it.
_END_LIMIT_S = 3.0

#: How often a silent command is looked at.
_LOOK_INTERVAL_S = 1.0


class _SilentError(Exception):
    """Nothing was printed for too long."""


def run_retrain(
    arguments: Sequence[str],
    on_line: Callable[[str], None],
    *,
    silence_limit_s: float = SILENCE_LIMIT_S,
) -> list[str]:
    """Run `python -m retrain ARGUMENTS` to its end and return the lines that it printed.

    Args:
        arguments: The command and its own arguments.
        on_line: Is told every line at once.
        silence_limit_s: A command that prints nothing for so long is killed, with what it started.

    Raises:
        TrialFailed: It ended with an error, with its last line as the reason, or it hung.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "retrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "MNAS_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        # Its own session: Ctrl-C reaches the engine, which then ends it in order.
        start_new_session=True,
    )
    lines: list[str] = []
    hung = False
    try:
        for line in _lines(process, silence_limit_s):
            lines.append(line)
            on_line(line)
        process.wait(silence_limit_s)
    except (_SilentError, subprocess.TimeoutExpired):
        hung = True
    finally:
        _end(process)
    if hung:
        fault = f"hung: it printed nothing for {silence_limit_s:g} s and was killed"
    elif process.returncode != 0:
        last = lines[-1] if lines else "it printed nothing"
        fault = f"ended with status {process.returncode}: {last}"
    else:
        return lines
    # A training that diverged would do so again.
    diverged = not hung and process.returncode == Diverged.exit_status
    raise TrialFailed(
        f"retrain {arguments[0]} {fault}",
        cause="architecture" if diverged else "infrastructure",
        detail="\n".join(lines[-50:]),
    )


def _lines(process: subprocess.Popen[bytes], silence_limit_s: float) -> Iterator[str]:
    """The lines that a process prints, without empty ones, until it ends or closes its output.

    Raises:
        _SilentError: Nothing came for so long.
    """
    assert process.stdout is not None  # it is a pipe
    rest, heard = b"", time.monotonic()
    with process.stdout as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            # Asked first: what an ended process has printed is all in the pipe, and is read.
            ended = process.poll() is not None
            if selector.select(min(_LOOK_INTERVAL_S, silence_limit_s)):
                part = os.read(pipe.fileno(), 1 << 16)
                if not part:
                    break
                heard = time.monotonic()
                *whole, rest = (rest + part).split(b"\n")
                yield from _texts(whole)
            elif ended:
                # Something that it has started still holds the pipe.
                break
            elif time.monotonic() - heard > silence_limit_s:
                raise _SilentError
    yield from _texts([rest])


def _texts(lines: Sequence[bytes]) -> Iterator[str]:
    yield from filter(None, (line.decode(errors="replace").rstrip() for line in lines))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process in order if it will, and kill what is left of its group.

    Workers of msrun are in groups of their own: they die with msrun (see retrain/launch.py).
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_LIMIT_S)
    kill_group(process)
