"""Helpers of the campaign tests: configurations, subprocesses with time-outs, comparable rows."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any

from search.__main__ import main
from search.store import Store
from search.trial import Trial
from space.records import to_plain

TESTS = Path(__file__).parent

SYNTHETIC = """
name: synthetic
seed: {seed}
space: {{name: small_image}}
controller: {{name: {controller}}}
evaluator: {{name: synthetic, seconds: {seconds}, fail_share: {fail_share}}}
objective: {{name: soft, target_ms: 3.0}}
batch_size: 8
executor: {{name: serial}}
stop: {{trials: {trials}}}
"""


def write_synthetic(
    folder: Path,
    *,
    seed: int = 0,
    controller: str = "ppo",
    seconds: float = 0.0,
    fail_share: float = 0.1,
    trials: int = 64,
) -> Path:
    """Write a campaign of the deterministic evaluator and return its path."""
    path = folder / "synthetic.yaml"
    path.write_text(
        SYNTHETIC.format(
            seed=seed, controller=controller, seconds=seconds, fail_share=fail_share, trials=trials
        )
    )
    return path


def mnas_command(*arguments: str) -> list[str]:
    """The command line as a list for subprocess."""
    return [sys.executable, "-m", "search", *arguments]


def mnas(
    *arguments: str, cwd: Path | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        mnas_command(*arguments),
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def mnas_here(
    *arguments: str, cwd: Path | None = None, main: Callable[[], object] = main
) -> subprocess.CompletedProcess[str]:
    """Run a command that computes little to its end in this process: a second less each.

    Args:
        arguments: Of the command line.
        cwd: Where it runs.
        main: Whose command it is; `mnas` without one.
    """
    out, errors = io.StringIO(), io.StringIO()
    given = sys.argv
    answers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["mnas", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(errors), chdir(cwd or Path.cwd()):
            main()
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv = given
        for number, answer in answers.items():
            signal.signal(number, answer)
    assert isinstance(status, int)
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), errors.getvalue())


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """Work in a folder for a while; contextlib has one from Python 3.11 on."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def start_mnas(
    *arguments: str, cwd: Path | None = None, output: IO[str] | None = None
) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own.

    What it prints goes to a pipe, which stops it when 64 KiB are not read, or to `output`.
    """
    return subprocess.Popen(
        mnas_command(*arguments),
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        },
        stdout=subprocess.PIPE if output is None else output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_results(folder: Path, results: int, *, timeout_s: float = 90) -> None:
    """Wait until a running campaign has recorded so many results."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (folder / "campaign.db").exists():
            try:
                store = Store(folder / "campaign.db", read_only=True)
            except Exception:
                time.sleep(0.02)
                continue
            counts = store.counts()
            store.close()
            if sum(counts.values()) - counts.get("pending", 0) >= results:
                return
        time.sleep(0.02)
    raise TimeoutError(f"{folder} had not {results} results after {timeout_s} s")


def comparable(trial: Trial) -> dict[str, Any]:
    """A trial's plain values without what a clock or a retry wrote."""
    plain: dict[str, Any] = to_plain(trial)
    for name in ("created_at", "finished_at", "timings", "attempt"):
        del plain[name]
    return plain


def rows(folder: Path) -> list[dict[str, Any]]:
    """All comparable rows of a campaign."""
    store = Store(folder / "campaign.db", read_only=True)
    found = [comparable(trial) for trial in store.trials()]
    store.close()
    return found


def controller_states(folder: Path) -> tuple[int, bytes, list[Any]]:
    """The last snapshot and all updates."""
    store = Store(folder / "campaign.db", read_only=True)
    snapshot, updates = store.snapshot(), store.updates()
    store.close()
    assert snapshot is not None
    return snapshot[0], snapshot[1], updates
