"""The asynchronous search: no barrier, every trial learned from exactly once, resumed exactly."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from campaigns import (
    TESTS,
    comparable,
    controller_states,
    mnas,
    rows,
    start_mnas,
    wait_for_results,
)
from campaigns import write_synthetic as write

from search.config import campaign_config, load_campaign_config
from search.engine import start
from search.store import Store
from search.trial import Trial
from space.errors import ConfigError, MnasError

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


@pytest.mark.slow
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


def run_with_device(folder: Path, controller: str, device: str, evaluator: str) -> list[Trial]:
    """The trials of an asynchronous campaign of tests/plugin_parts.py's parts."""
    options = {"folder": str(folder), "log": str(folder / "log")}
    values = {
        "name": "beside",
        "space": {"name": "small_image"},
        "controller": {"name": controller},
        "evaluator": {"class": f"plugin_parts:{evaluator}", "options": options},
        "device": {"class": f"plugin_parts:{device}", "options": options},
        "objective": {"target_ms": 3.0},
        "executor": {"name": "serial"},
        "mode": "async",
        "batch_size": 4,
        "stop": {"trials": 24},
    }
    start(campaign_config(values, where="test", folder=folder), folder / "run")
    with closing(Store(folder / "run" / "campaign.db", read_only=True)) as store:
        return store.trials()


def test_more_workers_than_ppo_can_learn_from_are_told(tmp_path: Path) -> None:
    config = load_campaign_config(
        str(write(tmp_path, trials=8)),
        ["mode=async", "batch_size=2", "controller.max_staleness=0"],
    )
    start(config, tmp_path / "run")
    assert "ppo drops results older than 0 updates" in (tmp_path / "run/campaign.log").read_text()


def test_a_device_measures_while_children_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    trials = run_with_device(tmp_path, "random", "MeetingDevice", "MeetingEvaluator")
    assert [trial.outcome for trial in trials] == ["completed"] * 24


@pytest.mark.parametrize("controller", ["random", "guided"])
def test_a_device_that_fails_beside_the_trainings_costs_its_own_trials_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    trials = run_with_device(tmp_path, controller, "FaultyDevice", "FaultyEvaluator")
    failed = [trial for trial in trials if int(trial.architecture_hash, 16) % 4 == 0]
    assert 0 < len(failed) < 24
    assert {trial.id for trial in trials if trial.outcome == "failed"} == {t.id for t in failed}
    assert all("the device went away" in t.failure.reason for t in failed if t.failure)
    measured = [trial for trial in trials if trial not in failed and trial.reused_from is None]
    assert all(trial.timings and "measure_s" in trial.timings for trial in measured)


def test_a_device_that_ends_its_thread_ends_the_search_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    with pytest.raises(MnasError, match=r"meter ended its thread: SystemExit\(3\)"):
        run_with_device(tmp_path, "random", "QuittingDevice", "FaultyEvaluator")


def test_a_measurement_that_runs_ends_with_the_search(tmp_path: Path) -> None:
    config = tmp_path / "endless.yaml"
    config.write_text(
        "name: endless\nspace: {name: small_image}\ncontroller: {name: random}\n"
        "evaluator: {class: plugin_parts:FaultyEvaluator, options: {}}\n"
        f"device: {{class: plugin_parts:EndlessDevice, options: {{log: {tmp_path}/mark/log}}}}\n"
        "objective: {name: soft, target_ms: 1.0}\nmode: async\nstop: {trials: 8}\n"
        "executor: {name: serial}\n"
    )
    process = start_mnas("search", str(config), "--out", str(tmp_path / "run"))
    try:
        deadline = time.monotonic() + 60
        while not programs_of(tmp_path / "mark"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert programs_of(tmp_path / "mark") == []


def programs_of(mark: Path) -> list[int]:
    """The processes that have this argument."""
    every = psutil.process_iter(["pid", "cmdline"])
    return [p.info["pid"] for p in every if str(mark) in (p.info["cmdline"] or [])]


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
