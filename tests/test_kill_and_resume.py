"""Killed, interrupted and resumed: the same rows, bit for bit, as a campaign never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from campaigns import controller_states, mnas, rows, start_mnas, wait_for_results, write_synthetic

from search.config import load_campaign_config
from search.engine import Silent, resume, start
from search.store import Store
from search.trial import Trial

TRIALS = 48


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that nobody disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    config = write_synthetic(folder, trials=TRIALS)
    done = mnas("search", str(config), "--out", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_kill_9_anywhere_and_resume_is_bit_identical(tmp_path: Path, quiet: Path) -> None:
    config = write_synthetic(tmp_path, trials=TRIALS, seconds=0.02)
    folder = tmp_path / "run"
    rng = random.Random(5)
    process = start_mnas("search", str(config), "--out", str(folder))
    for results in sorted(rng.sample(range(1, TRIALS - 4), 4)):
        wait_for_results(folder, results)
        time.sleep(rng.random() * 0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
        process = start_mnas("resume", str(folder))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    # The quiet run pretends no seconds; nothing else may differ.
    assert rows(folder) == rows(quiet)
    assert controller_states(folder) == controller_states(quiet)


def test_ctrl_c_ends_within_five_seconds_says_how_to_go_on_and_resume_does(
    tmp_path: Path, quiet: Path
) -> None:
    config = write_synthetic(tmp_path, trials=TRIALS, seconds=0.1)
    folder = tmp_path / "run"
    process = start_mnas("search", str(config), "--out", str(folder))
    wait_for_results(folder, 10)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - interrupted < 5
    assert process.returncode == 130
    said = f"mnas: stopped; nothing is lost, go on with: mnas resume {folder}"
    assert output.strip().splitlines()[-1] == said
    assert "Traceback" not in output
    done = mnas("resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert rows(folder) == rows(quiet)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_a_closed_terminal_end_a_campaign_as_ctrl_c_does(
    number: int, tmp_path: Path, quiet: Path
) -> None:
    config = write_synthetic(tmp_path, trials=TRIALS, seconds=0.1)
    folder = tmp_path / "run"
    process = start_mnas("search", str(config), "--out", str(folder))
    wait_for_results(folder, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "mnas resume" in output
    assert not (folder / "campaign.owner.json").exists()
    done = mnas("resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert rows(folder) == rows(quiet)


class Handlers(Silent):
    """Notes what a signal does while a campaign runs."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: set[object] = set()

    def trial(self, trial: Trial) -> None:
        self.seen.add(signal.getsignal(self.number))


def test_a_closed_terminal_is_ignored_where_nohup_says_so(tmp_path: Path) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=8)))
    watcher = Handlers(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        start(config, tmp_path / "run", watcher)
        after = signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert watcher.seen == {signal.SIG_IGN}
    assert after is signal.SIG_IGN


def test_status_works_from_another_process_while_the_search_runs(tmp_path: Path) -> None:
    # Slow enough that it still runs while the two other processes start.
    config = write_synthetic(tmp_path, trials=TRIALS, seconds=1.0)
    folder = tmp_path / "run"
    process = start_mnas("search", str(config), "--out", str(folder))
    try:
        wait_for_results(folder, 3)
        done = mnas("status", str(folder), "--json")
        status = json.loads(done.stdout)
        second = mnas("resume", str(folder))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    assert status["state"] == "running"
    assert status["trials_total"] == TRIALS
    assert second.returncode == 2
    assert f"in use by process {process.pid}" in second.stderr
    after = json.loads(mnas("status", str(folder), "--json").stdout)
    assert after["state"] == "stopped"


#: Small enough for all of them to be past their start when they are killed.
CONTROLLERS = {
    "random": "random",
    "evolution": "evolution, population: 12, sample_size: 4",
    "local": "local, starts: 8",
    "reinforce": "reinforce",
    "guided": "guided, initial: 8, starts: 2",
    "pareto": "pareto, initial: 8, starts: 2",
}
SHORT, KILLED_AT, EXTENDED_AT = 28, 13, 16

#: Runs a campaign in processes that kill themselves as soon as these trials' results are recorded:
#: one in the midst of a batch leaves it half done, the last of one leaves it unlearned.
KILLED = """
import os, signal, sys
from pathlib import Path
from search.config import load_campaign_config
from search.engine import Silent, resume, start

class Kills(Silent):
    def __init__(self, at):
        self.at = at

    def trial(self, trial):
        if trial.id == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

config, mode, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
for at in map(int, sys.argv[4:]):
    process = os.fork()
    if process == 0:
        if folder.exists():
            resume(folder, watcher=Kills(at))
        else:
            start(load_campaign_config(config, [f"mode={mode}"]), folder, Kills(at))
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
"""


@pytest.fixture(scope="module", params=CONTROLLERS)
def controller(request: pytest.FixtureRequest) -> str:
    return CONTROLLERS[request.param]


@pytest.fixture(scope="module", params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, controller: str, mode: str) -> Path:
    """A short campaign of a controller and a mode that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_synthetic(folder, trials=SHORT, controller=controller)
    start(load_campaign_config(str(path), [f"mode={mode}"]), folder / "run")
    return folder / "run"


def test_kill_9_and_resume_is_bit_identical_with_every_controller_and_mode(
    tmp_path: Path, controller: str, mode: str, whole: Path
) -> None:
    path = write_synthetic(tmp_path, trials=SHORT, controller=controller)
    folder, at = str(tmp_path / "run"), (str(KILLED_AT), str(EXTENDED_AT - 1))
    subprocess.run(
        [sys.executable, "-c", KILLED, str(path), mode, folder, *at], timeout=60, check=True
    )
    resume(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole)
    assert controller_states(tmp_path / "run") == controller_states(whole)


def test_a_longer_campaign_equals_an_extended_one_with_every_controller_and_mode(
    tmp_path: Path, controller: str, mode: str, whole: Path
) -> None:
    path = write_synthetic(tmp_path, trials=EXTENDED_AT, controller=controller)
    start(load_campaign_config(str(path), [f"mode={mode}"]), tmp_path / "run")
    resume(tmp_path / "run", [f"stop.trials={SHORT}"])
    assert rows(tmp_path / "run") == rows(whole)
    assert controller_states(tmp_path / "run") == controller_states(whole)


RAY = "executor={name: ray, workers: 2, time_limit_s: 60}"


@pytest.mark.slow
def test_sigterm_ends_a_campaign_with_ray_workers_as_ctrl_c_does(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=TRIALS, seconds=0.2)
    process = start_mnas("search", str(config), RAY, "--out", str(tmp_path / "run"))
    wait_for_results(tmp_path / "run", 3)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "mnas resume" in output
    assert "SIGTERM" not in output


@pytest.mark.slow
def test_with_ray_workers_ctrl_c_and_kill_9_leave_no_process_and_lose_nothing(
    tmp_path: Path, quiet: Path
) -> None:
    config = write_synthetic(tmp_path, trials=TRIALS, seconds=0.1)
    folder = tmp_path / "run"
    process = start_mnas("search", str(config), RAY, "--out", str(folder))
    wait_for_results(folder, 5)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - interrupted < 5
    assert process.returncode == 130
    process = start_mnas("resume", str(folder))
    wait_for_results(folder, 20)
    family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
    process.kill()
    process.communicate(timeout=10)
    # Workers and schedulers end in seconds; Ray's agents look for their raylet once a minute.
    deadline = time.monotonic() + 120
    while any(_alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in family if _alive(pid)]
    done = mnas("resume", str(folder), timeout_s=180)
    assert done.returncode == 0, done.stderr
    assert rows(folder) == rows(quiet)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_children_that_hang_or_crash_their_worker_are_failed_trials(tmp_path: Path) -> None:
    config = tmp_path / "faults.yaml"
    (tmp_path / "marks").mkdir()
    config.write_text(
        "name: faults\nspace: {name: small_image}\ncontroller: {name: random}\n"
        "evaluator:\n  class: plugin_parts:FaultyEvaluator\n"
        f"  options: {{faults: [diverge, crash, hang, crash_once], folder: {tmp_path}/marks}}\n"
        "objective: {name: soft, target_ms: 1.0}\nbatch_size: 8\nstop: {trials: 24}\n"
        "executor: {name: ray, workers: 2, time_limit_s: 2, retries: 1}\n"
    )
    done = mnas("search", str(config), "--out", str(tmp_path / "run"), timeout_s=400)
    assert done.returncode == 0, done.stderr
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    assert len(trials) == 24
    for trial in trials:
        fault = int(trial.architecture_hash, 16) % 8
        if fault == 2:
            assert trial.failure is not None
            assert "time limit of 2 s" in trial.failure.reason
            assert trial.failure.cause == "architecture"
        elif fault == 1:
            assert trial.failure is not None
            assert "worker died 2 times" in trial.failure.reason
            assert trial.failure.cause == "infrastructure"
            assert trial.failure.quarantined
            assert trial.attempt == 2
        elif fault == 3:
            assert trial.outcome == "completed"
            assert trial.attempt == 2
    assert {int(t.architecture_hash, 16) % 8 for t in trials} >= {1, 2, 3}
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    retried = {line["trial"] for line in log if "is tried again" in line["message"]}
    assert retried == {t.id for t in trials if t.attempt == 2 and t.reused_from is None}


@pytest.mark.slow
def test_a_network_that_kills_every_worker_is_not_given_to_another_one(tmp_path: Path) -> None:
    config = tmp_path / "poison.yaml"
    config.write_text(
        "name: poison\nspace: {name: small_image}\n"
        "controller: {class: plugin_parts:OneNetwork, options: {}}\n"
        "evaluator:\n  class: plugin_parts:FaultyEvaluator\n"
        "  options: {faults: [crash, crash, crash, crash, crash, crash, crash, crash]}\n"
        "objective: {name: soft, target_ms: 1.0}\nbatch_size: 2\nstop: {trials: 4}\n"
        "executor: {name: ray, workers: 1, retries: 1}\n"
    )
    done = mnas("search", str(config), "--out", str(tmp_path / "run"), timeout_s=200)
    assert done.returncode == 0, done.stderr
    first, *others = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    assert (first.attempt, first.outcome) == (2, "failed")
    assert [(t.attempt, t.outcome, t.reused_from) for t in others] == [(0, "failed", 0)] * 3


def test_a_process_that_cannot_start_ray_says_so(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path)
    done = mnas(
        "search", str(config), "executor={name: ray, workers: 2, address: 127.0.0.1:1}",
        "--out", str(tmp_path / "run"), timeout_s=200,
    )  # fmt: skip
    assert done.returncode == 2
    assert "executor.address" in done.stderr
    assert "Traceback" not in done.stderr
