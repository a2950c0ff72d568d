"""A disk that is full and a database that is locked: one sentence, nothing lost, resumed."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from campaigns import mnas, rows, wait_for_results, write_synthetic

from search import store as database
from search.config import load_campaign_config
from search.engine import Silent, resume, start
from search.executor import SerialExecutor
from search.trial import Trial

TRIALS = 48

#: The command line with files of at most so many bytes: what a full disk looks like to SQLite.
LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from search.__main__ import main
main()
"""
#: The command line that does not wait long for a lock.
IMPATIENT = """
import search.store
search.store.BUSY_TIMEOUT_S = 0.2
from search.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that nothing disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    path = write_synthetic(folder, controller="random", trials=TRIALS)
    start(load_campaign_config(str(path)), folder / "run")
    return folder / "run"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a campaign's database as another program would."""
    with closing(sqlite3.connect(folder / "campaign.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def results(folder: Path) -> list[dict[str, object]]:
    return [row for row in rows(folder) if row["outcome"] is not None]


# Too little for the tables, for the first batch, and for all batches.
@pytest.mark.parametrize(("limit", "least"), [(20_000, 0), (100_000, 0), (260_000, 4)])
def test_a_full_disk_is_one_sentence_and_the_campaign_goes_on_once_there_is_room(
    tmp_path: Path, quiet: Path, limit: int, least: int
) -> None:
    config = write_synthetic(tmp_path, controller="random", trials=TRIALS)
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=limit),
         "search", str(config), "--out", str(folder)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (complaint,) = done.stderr.splitlines()
    assert complaint.startswith("mnas: cannot write: ")
    assert "what was committed is safe, so make room and go on with `mnas resume`" in complaint
    told = done.stdout.count("] trial ")
    assert least <= told < TRIALS
    if least:
        assert results(folder) == rows(quiet)[:told]
    again = mnas("resume", str(folder))
    assert again.returncode == 0, again.stderr
    assert rows(folder) == rows(quiet)


def test_a_locked_database_is_one_sentence_and_the_campaign_goes_on_once_it_is_free(
    tmp_path: Path, quiet: Path
) -> None:
    config = write_synthetic(tmp_path, controller="random", trials=TRIALS, seconds=0.05)
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, "search", str(config), "--out", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_results(folder, 5)
        with locked(folder):
            _, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert complaint == (
        "mnas: cannot write: database is locked; what was committed is safe, so end the program"
        " that holds it and go on with `mnas resume`.\n"
    )
    before = results(folder)
    assert 5 <= len(before) < TRIALS
    again = mnas("resume", str(folder))
    assert again.returncode == 0, again.stderr
    assert rows(folder) == rows(quiet)
    assert before == rows(folder)[: len(before)]


class LocksItself(Silent):
    """Another program takes the database while the fifth trial is recorded, and keeps it."""

    def __init__(self, folder: Path) -> None:
        self.lock = locked(folder)

    def trial(self, trial: Trial) -> None:
        if trial.id == 4:
            self.lock.__enter__()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_workers_end_though_nothing_can_be_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    closed = []
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(SerialExecutor, "close", lambda executor: closed.append(executor))
    path = write_synthetic(tmp_path, controller="random", trials=TRIALS)
    config = load_campaign_config(str(path), [f"mode={mode}"])
    watcher = LocksItself(tmp_path / "run")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        start(config, tmp_path / "run", watcher)
    watcher.lock.__exit__(None, None, None)
    assert len(closed) == 1
    resume(tmp_path / "run")
    whole = tmp_path / "whole"
    start(config, whole)
    assert rows(tmp_path / "run") == rows(whole)
