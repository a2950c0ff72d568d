"""Starting workers: what a launcher says to them, and msrun as a launcher of our own."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from space.errors import ConfigError, Diverged, Interrupted, MnasError

#: A worker that ends with an error leaves msrun so long to end the others.
_END_LIMIT_S = 20.0
_LOOK_INTERVAL_S = 0.2

#: The variable that names the process without which this one must not live on, by its number: the
#: parent or, after "msrun:", the parent's parent, where `launch` has started this one. Somebody
#: else's msrun may leave its workers running.
PARENT, MSRUN = "MNAS_PARENT_PID", "msrun:"
_PR_SET_PDEATHSIG = 1

#: A worker's last line: its exit status, which msrun keeps to itself, and a sentence.
_COMPLAINT = re.compile(r"retrain\[(\d+)\]: (.*)")


def complaint(sentence: str, status: int) -> str:
    """Return the line with which a process of this room says why it ends."""
    launched = os.environ.get(PARENT, "").startswith(MSRUN)
    return f"retrain[{status}]: {sentence}" if launched else f"retrain: {sentence}"


def launched_workers() -> int:
    """Return how many workers msrun or mpirun started together with this process; 1 for none."""
    for name in ("MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1


def launched_by_msrun() -> bool:
    """Whether msrun, not mpirun, started this process."""
    return "MS_ROLE" in os.environ


def stands_by() -> bool:
    """Whether a launcher started this process beside the one that trains, where only one does.

    That is msrun's scheduler, and every worker but the first.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return True
    ranks = [os.environ.get(name) for name in ("RANK_ID", "OMPI_COMM_WORLD_RANK")]
    return launched_workers() > 1 and any(rank not in (None, "0") for rank in ranks)


def die_with_parent(parent: int) -> bool:
    """Let the kernel kill this process when its parent dies; return whether that is `parent`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the kernel was asked.
    return os.getppid() == parent


def die_with_launcher(launcher: int) -> bool:
    """The same for a worker of msrun, which `launcher` has started; it dies with msrun."""
    msrun = os.getppid()
    try:
        return die_with_parent(msrun) and psutil.Process(msrun).ppid() == launcher
    except psutil.NoSuchProcess:
        return False


def launch(
    workers: int, arguments: Sequence[str], logs: Path, on_line: Callable[[str], None]
) -> None:
    """Run `python -m retrain ARGUMENTS` as so many workers on this machine, with msrun.

    Args:
        workers: At least 2.
        arguments: Of the command.
        logs: The folder of the workers' output.
        on_line: Is told what the first worker prints.

    Raises:
        ConfigError: A worker refused its input, or msrun is not there.
        Diverged: The training diverged.
        Interrupted: It was stopped.
        MnasError: A worker failed.
    """
    # msrun starts `python`, whichever comes first in PATH.
    scripts = Path(sys.executable).parent
    if not (scripts / "msrun").exists():
        raise ConfigError(f"--workers: needs msrun, MindSpore's launcher, in {scripts}.")
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    command = [
        str(scripts / "msrun"), "--worker_num", str(workers), "--local_worker_num", str(workers),
        "--master_port", str(_free_port()), "--log_dir", str(logs), "--join", "True",
        "python", "-m", "retrain", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    # msrun dies with this process, and its workers with msrun, whose number is not known yet.
    environment[PARENT] = f"{MSRUN}{os.getpid()}"
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    try:
        found = _follow(process, logs, on_line)
    finally:
        if process.poll() is None:
            # msrun ends its workers on Ctrl-C.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if found is not None:
        raise _error(*found)
    if process.returncode != 0:
        raise MnasError(f"a worker failed; its output is in {logs}.")


def _follow(
    process: subprocess.Popen[bytes], logs: Path, on_line: Callable[[str], None]
) -> tuple[int, str] | None:
    """Pass on what the first worker prints until all have ended or one complains.

    Returns:
        The exit status and the sentence with which a worker ended, if one did so.
    """
    known: dict[Path, _GrowingFile] = {}
    found = None
    while True:
        ended = process.poll() is not None
        for log in sorted(logs.glob("worker_*.log")):
            for line in known.setdefault(log, _GrowingFile(log)).new_lines():
                if (match := _COMPLAINT.match(line)) is not None:
                    found = found or (int(match[1]), match[2])
                elif log.name == "worker_0.log" and not line.startswith("["):
                    on_line(line)
        if ended or found is not None:
            return found
        time.sleep(_LOOK_INTERVAL_S)


class _GrowingFile:
    """A log that is read as it grows; a line that is being written is for the next look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0

    def new_lines(self) -> list[str]:
        """Return the lines that it has gained since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            gained = file.read()
        whole = gained[: gained.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return whole.decode(errors="replace").splitlines()


def _error(status: int, sentence: str) -> MnasError:
    if status == Diverged.exit_status:
        return Diverged(sentence.removeprefix(Diverged.BEGINNING))
    kinds = {kind.exit_status: kind for kind in (ConfigError, Interrupted)}
    return kinds.get(status, MnasError)(sentence)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
