"""Runs one module of ours on a device elsewhere and leaves nothing behind.

latency/remote.py sends this text through `ssh` to a Python there, which executes it; then follow a
JSON line (the order) and the files. It must run on Python 3.8 with the standard library alone.

The order's keys: `module` and `arguments` (what to run), `files` (list of [path, size in bytes]),
`folder` (where the temporary folder goes, or null), `lock_timeout_s` (null: needs no lock),
`time_limit_s` (of the module). Standard input stays open while the sender is there: at its end the
module is killed. The answer is one JSON line: `{"status": N, "output": ..., "errors": ...}`, or
`{"fault": ..., "kind": ...}`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

#: How much of the module's output is kept.
_MOST_BYTES = 4_000_000

#: Beside the files: for what the module prints.
_SPARE_BYTES = 1_000_000

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Fault(Exception):
    """Ends the order: kind (`busy`, `full`, `folder`, `hang`) and what happened."""


def _lock(timeout_s: float) -> Any:
    """The machine's one lock for measuring; the same file and kind as latency/lock.py's.

    It falls with the process that holds it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "mnas")
    path = os.path.join(folder, f"measuring-{socket.gethostname()}.lock")
    deadline = time.monotonic() + timeout_s
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        kind = "full" if error.errno in _FULL else "folder"
        raise _Fault(kind, f"{path} cannot be locked: {error.strerror}") from error
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _Fault("busy", path) from None
            time.sleep(0.05)


def _receive(folder: str, files: Any, limit_s: float) -> None:
    """Write the files that come; a sender that falls silent must not hold the lock for hours."""

    def give_up(number: int, frame: Any) -> None:
        raise _Fault("folder", "the sender fell silent amid the files")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    source = sys.stdin.buffer
    for path, size in files:
        target = os.path.join(folder, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            left = size
            while left:
                part = source.read(min(left, 1 << 20))
                if not part:
                    raise _Fault("folder", "the sender went away amid the files")
                file.write(part)
                left -= len(part)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _kill_when_sender_leaves(process: Any) -> None:
    """Wait for the end of standard input in a thread, then kill the module's group."""

    def watch() -> None:
        # Not through sys.stdin: its lock, held here, would block the interpreter's exit.
        while os.read(0, 1024):
            pass
        _kill(process)

    threading.Thread(target=watch, daemon=True).start()


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _run(folder: str, order: Any) -> dict[str, Any]:
    """Run the module and return its status and output; output goes to files, which never block."""
    paths = [os.path.join(folder, name) for name in ("output", "errors")]
    search = os.pathsep.join(p for p in (folder, os.environ.get("PYTHONPATH")) if p)
    with open(paths[0], "wb") as output, open(paths[1], "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", order["module"], *order["arguments"]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": search, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        _kill_when_sender_leaves(process)
        try:
            status = process.wait(order["time_limit_s"])
        except subprocess.TimeoutExpired:
            raise _Fault("hang", f"{order['time_limit_s']:g}") from None
        finally:
            _kill(process)
            process.wait()
    texts = []
    for path in paths:
        with open(path, "rb") as file:
            texts.append(file.read(_MOST_BYTES).decode("utf-8", "replace"))
    return {"status": status, "output": texts[0], "errors": texts[1][-2000:]}


def _follow(order: Any) -> dict[str, Any]:
    if order["lock_timeout_s"] is not None:
        # Before the files come: receiving them would disturb the one who measures.
        descriptor = _lock(order["lock_timeout_s"])
        assert descriptor >= 0  # kept open, and with it the lock, until this process ends
    folder = ""
    try:
        # As `mktemp -d` does it: a new name, for this user alone.
        folder = tempfile.mkdtemp(prefix="mnas-", dir=order["folder"])
        needed = sum(size for _, size in order["files"]) + _SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise _Fault("full", f"{folder} has {free:,} bytes left, but {needed:,} are needed")
        _receive(folder, order["files"], order["transfer_s"])
        return _run(folder, order)
    except OSError as error:
        where = folder or order["folder"] or "a temporary folder"
        kind = "full" if error.errno in _FULL else "folder"
        raise _Fault(kind, f"{where}: {error.strerror or error}") from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _leave(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # through every `finally`


def main() -> None:
    """Take the order from standard input, follow it, and print the answer."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    order = json.loads(sys.stdin.buffer.readline())
    try:
        answer = _follow(order)
    except _Fault as fault:
        answer = {"kind": fault.args[0], "fault": fault.args[1]}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
