"""The asynchronous search: no barrier, every trial learned from exactly once, resumed exactly."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from campaigns import comparable, controller_states, mnas, rows, start_mnas, wait_for_results
from campaigns import write_synthetic as write

from search.config import load_campaign_config
from search.engine import start
from search.store import Store
from space.errors import ConfigError

TRIALS = 48


def learned(folder: Path) -> list[int]:
    """Ids in the order in which the controller learned from them."""
    store = Store(folder / "campaign.db", read_only=True)
    ids = [trial_id for _, ids, _ in store.updates() for trial_id in ids]
    store.close()
    return ids


@pytest.mark.parametrize("controller", ["ppo", "evolution", "random"])
def test_every_trial_is_evaluated_and_learned_from_once(tmp_path: Path, controller: str) -> None:
    path = write(tmp_path, controller=controller, trials=TRIALS)
    outcome = start(load_campaign_config(str(path), ["mode=async"]), tmp_path / "run")
    assert outcome.trials == TRIALS
    assert sorted(learned(tmp_path / "run")) == list(range(TRIALS))
    found = rows(tmp_path / "run")
    assert [row["id"] for row in found] == list(range(TRIALS))
    assert all(row["outcome"] for row in found)


def test_with_one_worker_kill_9_and_resume_is_bit_identical(tmp_path: Path) -> None:
    quiet = tmp_path / "quiet"
    start(load_campaign_config(str(write(tmp_path, trials=TRIALS)), ["mode=async"]), quiet)
    config = write(tmp_path, trials=TRIALS, seconds=0.02)
    folder = tmp_path / "run"
    rng = random.Random(3)
    process = start_mnas("search", str(config), "mode=async", "--out", str(folder))
    for results in sorted(rng.sample(range(1, TRIALS - 4), 3)):
        wait_for_results(folder, results)
        time.sleep(rng.random() * 0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
        process = start_mnas("resume", str(folder))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert rows(folder) == rows(quiet)
    assert controller_states(folder) == controller_states(quiet)


def test_an_extended_search_goes_on_without_a_seam(tmp_path: Path) -> None:
    path = str(write(tmp_path, trials=40))
    start(load_campaign_config(path, ["mode=async", "stop.trials=21"]), tmp_path / "run")
    done = mnas("resume", str(tmp_path / "run"), "stop.trials=40")
    assert done.returncode == 0, done.stderr
    start(load_campaign_config(path, ["mode=async"]), tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_the_mode_of_a_campaign_does_not_change(tmp_path: Path) -> None:
    start(load_campaign_config(str(write(tmp_path, trials=8))), tmp_path / "run")
    done = mnas("resume", str(tmp_path / "run"), "mode=async", "stop.trials=16")
    assert done.returncode == 2
    assert "mode is 'sync', given 'async'" in done.stderr


def test_a_device_that_shares_its_cores_with_trainings_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode must be sync for a device that shares its cores"):
        load_campaign_config("digits", ["mode=async"])


@pytest.mark.slow
def test_workers_go_on_while_a_slow_child_trains_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    config = write(tmp_path, trials=TRIALS, seconds=0.05)
    folder = tmp_path / "run"
    process = start_mnas(
        "search",
        str(config),
        "mode=async",
        "evaluator.slowest_seconds=3.0",
        "executor={name: ray, workers: 2, trials_per_process: 100}",
        "--out",
        str(folder),
    )
    wait_for_results(folder, 20)
    process.kill()
    process.communicate(timeout=10)
    store = Store(folder / "campaign.db", read_only=True)
    before = {trial.id: comparable(trial) for trial in store.trials() if trial.outcome}
    store.close()
    done = mnas("resume", str(folder), timeout_s=240)
    assert done.returncode == 0, done.stderr
    after = {row["id"]: row for row in rows(folder)}
    assert {trial_id: after[trial_id] for trial_id in before} == before
    order = learned(folder)
    assert sorted(order) == list(range(TRIALS))
    # Short children overtook long ones: learned from before what was proposed earlier.
    assert order != sorted(order)
