"""Campaigns side by side, and one that is watched while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from campaigns import mnas, start_mnas, wait_for_results, write_synthetic

from search.compare import compare
from search.config import load_campaign_config
from search.engine import start
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
