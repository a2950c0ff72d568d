"""Campaigns side by side, and one that is watched while it runs."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from campaigns import mnas, start_mnas, wait_for_results, write_synthetic

from search import cli
from search.async_loop import make_search
from search.campaign import create
from search.compare import compare
from search.config import load_campaign_config
from search.engine import Silent, start
from search.parts import Parts
from space.errors import ConfigError


def run(folder: Path, *overrides: str, trials: int, controller: str = "random") -> Path:
    folder.mkdir()
    path = write_synthetic(folder, controller=controller, trials=trials)
    start(load_campaign_config(str(path), overrides), folder / "run")
    return folder / "run"


def test_campaigns_are_compared_at_the_trials_that_all_of_them_have(tmp_path: Path) -> None:
    long = run(tmp_path / "long", trials=32)
    short = run(tmp_path / "short", "seed=1", trials=16, controller="ppo")
    longer, shorter = compare([long, short])
    assert [row["controller"] for row in (longer, shorter)] == ["random", "ppo"]
    assert list(longer["reward_at"]) == list(shorter["reward_at"]) == ["4", "8", "16"]
    assert shorter["reward_at"]["16"] == shorter["reward"]
    values = list(longer["reward_at"].values())
    assert values == sorted(values)
    assert longer["reward"] >= values[-1]


def test_the_command_prints_a_row_for_each(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", trials=8)
    done = mnas("compare", str(folder), str(folder), "--json")
    rows = json.loads(done.stdout)["campaigns"]
    assert [row["trials"] for row in rows] == [8, 8]
    table = mnas("compare", str(folder), str(folder))
    assert table.returncode == 0, table.stderr
    assert "reward at 8" in " ".join(table.stdout.split())


def test_rewards_of_different_objectives_are_not_compared(tmp_path: Path) -> None:
    soft = run(tmp_path / "a", trials=8)
    hard = run(tmp_path / "b", "objective.name=hard", trials=8)
    with pytest.raises(ConfigError, match="their rewards cannot be compared"):
        compare([soft, hard])
    done = mnas("compare", str(soft), str(tmp_path / "none"))
    assert done.returncode == 2
    assert "holds no campaign" in done.stderr


def test_a_watched_campaign_is_shown_until_it_ends(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=60, seconds=0.05)
    process = start_mnas("search", str(config), "--out", str(tmp_path / "run"))
    try:
        wait_for_results(tmp_path / "run", 4)
        done = mnas("status", str(tmp_path / "run"), "--watch", timeout_s=60)
    finally:
        process.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    assert "60 of 60" in done.stdout


class LooksAgain(Exception):
    """Ends a watch where it would wait for its next look."""


def test_a_watch_holds_nothing_that_lets_the_write_ahead_file_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=16)))
    log = tmp_path / "run" / "campaign.db-wal"
    found = []

    def fold_in(seconds: float) -> None:
        campaign.store.add_event("test", "something to fold in")
        with closing(sqlite3.connect(tmp_path / "run" / "campaign.db")) as other:
            # A reader in a transaction makes it busy, and the file stays as long as it is.
            (busy, _, _) = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        found.append((busy, log.stat().st_size))
        raise LooksAgain

    monkeypatch.setattr(time, "sleep", fold_in)
    with create(tmp_path / "run", config) as campaign:
        make_search(campaign, Parts(config), Silent()).run()
        before = log.stat().st_size
        with pytest.raises(LooksAgain):
            cli.status_command(tmp_path / "run", watch=True)
    assert before > 0
    assert found == [(0, 0)]
