"""Ray clusters of several nodes, simulated on this machine, whose nodes and workers are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from campaigns import TESTS, mnas, rows, start_mnas, wait_for_results, write_synthetic

from search.config import PluginConfig, RayConfig, campaign_config, load_campaign_config
from search.engine import start
from search.evaluation import Evaluation
from search.executor import Finished, Job
from search.ray_executor import RayExecutor
from search.store import Store
from space.errors import ConfigError
from space.mnasnet import find_architecture

#: In the environment of what this run starts.
MARK = f"MNAS_TEST_{os.getpid()}"
SLOWLY = ["evaluator.seconds=0.1", "evaluator.slowest_seconds=0.5"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose head has no CPUs, so that every worker is on a node that may die."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(MARK, "1")
    # What a user's own classes need on every node of a cluster.
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    # A dead node is noticed after 3 s instead of 20; a slow one still gets Ray's 10 s to answer.
    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 3,
    }
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
    yield made
    made.shutdown()


def executor(cluster: Any, **settings: Any) -> str:
    """The override that runs a campaign on the cluster."""
    made = {"name": "ray", "address": cluster.address, "retries": 20, **settings}
    return "executor={" + ", ".join(f"{key}: {value}" for key, value in made.items()) + "}"


def quiet_rows(folder: Path, config: Path) -> list[dict[str, Any]]:
    """The rows of the same campaign without a cluster, instant and undisturbed."""
    start(load_campaign_config(str(config)), folder / "quiet")
    return rows(folder / "quiet")


def finish(process: subprocess.Popen[str], timeout_s: float = 150) -> None:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def workers() -> list[psutil.Process]:
    """The processes of this run's campaign workers, and of nobody else's."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if command[0].startswith("ray::Worker") and MARK in process.environ():
                found.append(process)
    return found


@pytest.mark.slow
def test_a_device_is_measured_at_the_node_where_it_hangs(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1)
    values = {
        "name": "at_node",
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"name": "synthetic"},
        "objective": {"target_ms": 3.0},
        "device": {"class": "plugin_parts:DeviceAtNode", "options": {"log": "none"}},
        "executor": {
            "name": "ray", "address": cluster.address, "devices": ["plugin"], "workers": 1,
        },
        "batch_size": 8,
        "stop": {"trials": 16},
    }  # fmt: skip
    config = campaign_config(values, where="test", folder=tmp_path)
    monkeypatch.syspath_prepend(str(TESTS))
    with pytest.raises(ConfigError, match="no node of Ray's cluster offers 'device:plugin'"):
        start(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with monkeypatch.context() as at_node:
        at_node.setenv("PLUGIN_DEVICE", "1")
        cluster.add_node(num_cpus=0, resources={"device:plugin": 1})
    start(config, tmp_path / "run")
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    trials = store.trials()
    # A network of which the device's process dies has no figure; another process measures on.
    completed = [trial for trial in trials if trial.outcome == "completed"]
    failed = [trial for trial in trials if trial.outcome == "failed"]
    assert len(completed) + len(failed) == 16
    assert completed
    assert failed
    assert all("device:plugin gives no figure" in t.failure.reason for t in failed if t.failure)
    pids = {store.measurement(t.measurement_ids[0]).environment["pid"] for t in completed}
    assert os.getpid() not in pids


@pytest.mark.slow
def test_a_real_device_at_a_node_measures_the_target_and_the_networks(
    tmp_path: Path, cluster: Any
) -> None:
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=0, resources={"device:host_quick": 1})
    values = {
        "name": "at_node",
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"name": "synthetic"},
        "objective": {"target": {"reference": "mnasnet-small", "times": 0.5}},
        "device": "host_quick",
        "executor": {
            "name": "ray", "address": cluster.address, "devices": ["host_quick"], "workers": 1,
        },
        "batch_size": 2,
        "stop": {"trials": 4},
    }  # fmt: skip
    start(campaign_config(values, where="test", folder=tmp_path), tmp_path / "run")
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    assert [trial.outcome for trial in store.trials()] == ["completed"] * 4
    target = store.measurement(store.meta("target_measurement"))
    quick = store.measurement(store.trials()[0].measurement_ids[0])
    # The reference is measured fully, all others as the device is configured.
    assert (target.device["effort"], quick.device["effort"]) == ("full", "quick")
    assert store.meta("target_ms") == pytest.approx(0.5 * target.median_ms)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_campaign_outlives_a_node_and_takes_in_a_new_one(tmp_path: Path, cluster: Any) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    config = write_synthetic(tmp_path, trials=240)
    expected = quiet_rows(tmp_path, config)
    folder = tmp_path / "run"
    log = folder / "campaign.log"
    process = start_mnas("search", str(config), executor(cluster), *SLOWLY, "--out", str(folder))
    try:
        wait_for_results(folder, 16)
        cluster.remove_node(nodes[0], allow_graceful=False)
        until(lambda: "a worker waits for another one" in log.read_text())
        cluster.add_node(num_cpus=2)
        finish(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert rows(folder) == expected


@pytest.mark.slow
def test_workers_follow_the_nodes_of_the_cluster(cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1)
    config = RayConfig("ray", address=cluster.address)
    evaluator = load_campaign_config("digits", ["evaluator={name: synthetic}"]).evaluator
    made = RayExecutor(config, evaluator)
    try:
        until(lambda: not made.wait(0.1) and made.capacity == 1)
        cluster.add_node(num_cpus=2)
        until(lambda: not made.wait(0.1) and made.capacity == 3)
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: not made.wait(0.1) and made.capacity == 2)
        made.submit(Job(0, find_architecture("mnasnet-small"), 1))
        found: list[Finished] = []
        until(lambda: bool(found.extend(made.wait(1.0)) or found))
        assert isinstance(found[0].outcome, Evaluation)
    finally:
        made.close()


@pytest.mark.slow
def test_results_that_came_in_time_are_kept_however_long_the_driver_was_busy(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.ray_executor.KILL_GRACE_S", 0.0)
    cluster.add_node(num_cpus=2)
    config = RayConfig("ray", address=cluster.address, workers=2, time_limit_s=2.0)
    evaluator = load_campaign_config("digits", ["evaluator={name: synthetic}"]).evaluator
    made = RayExecutor(config, evaluator)
    try:
        made.quiesce()
        for trial_id in range(2):
            made.submit(Job(trial_id, find_architecture("mnasnet-small"), 1))
        time.sleep(4.0)  # the driver measures latencies, say; both results are there long before
        found: list[Finished] = []
        until(lambda: len(found.extend(made.wait(1.0)) or found) == 2)
        assert all(isinstance(end.outcome, Evaluation) for end in found)
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["no data at the start", "a disk that fails", "an NPU that fails"]
)
def test_a_bad_node_costs_no_trial(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with monkeypatch.context() as at_node:
        at_node.setenv("PLUGIN_BAD_NODE", fault)
        cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    evaluator = PluginConfig("plugin", "plugin_parts:BadAtOneNode", {})
    made = RayExecutor(RayConfig("ray", address=cluster.address), evaluator)
    try:
        assert made.capacity == 2
        # So long that the bad node has taken part; it fails faster than the good one succeeds.
        for trial_id in range(60):
            made.submit(Job(trial_id, find_architecture("mnasnet-small"), 1))
        found: list[Finished] = []
        until(lambda: len(found.extend(made.wait(1.0)) or found) == 60)
        assert all(isinstance(end.outcome, Evaluation) for end in found)
        assert max(end.attempts for end in found) == (1 if "start" in fault else 2)
    finally:
        made.close()


@pytest.mark.slow
def test_a_campaign_of_this_machine_does_not_join_a_cluster_that_happens_to_run_here(
    tmp_path: Path, cluster: Any
) -> None:
    cluster.add_node(num_cpus=1)
    config = write_synthetic(tmp_path, trials=8)
    own = "executor={name: ray, workers: 1}"
    done = mnas("search", str(config), own, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run")) == 8


@pytest.mark.slow
def test_code_of_a_user_reaches_the_nodes(tmp_path: Path, cluster: Any) -> None:
    cluster.add_node(num_cpus=1)
    package = tmp_path / "brought_along"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\n"
        "from plugin_parts import FaultyEvaluator\n"
        "from search.evaluation import Evaluation\n"
        "class Brought(FaultyEvaluator):\n"
        "    def evaluate(self, architecture, *, seed, time_limit_s):\n"
        "        copied = 'runtime_resources' in __file__\n"
        "        mark = float(os.environ['MARK'])\n"
        "        return Evaluation(0.5, {'copied': copied, 'mark': mark}, 1.0)\n"
    )
    environment = {"py_modules": [str(package)], "env_vars": {"MARK": "3"}}
    config = RayConfig("ray", address=cluster.address, runtime_env=environment)
    made = RayExecutor(config, PluginConfig("plugin", "brought_along:Brought", {}))
    try:
        made.submit(Job(0, find_architecture("mnasnet-small"), 1))
        found: list[Finished] = []
        until(lambda: bool(found.extend(made.wait(1.0)) or found))
        assert isinstance(found[0].outcome, Evaluation)
        assert found[0].outcome.metrics == {"copied": True, "mark": 3.0}
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "per_process"), [({"trials_per_process": 2}, 2), ({"max_memory_mb": 1}, 1)]
)
def test_a_worn_process_is_replaced_by_one_that_has_warmed_up_meanwhile(
    cluster: Any, limit: dict[str, int], per_process: int
) -> None:
    cluster.add_node(num_cpus=1)
    config = RayConfig("ray", address=cluster.address, **limit)  # type: ignore[arg-type]
    made = RayExecutor(config, PluginConfig("plugin", "plugin_parts:TellsItsProcess", {}))
    most = 0
    try:
        for trial_id in range(4):
            made.submit(Job(trial_id, find_architecture("mnasnet-small"), 1))
        pids: list[float] = []
        while len(pids) < 4:
            for end in made.wait(0.2):
                assert isinstance(end.outcome, Evaluation)
                pids.append(end.outcome.metrics["pid"])
            most = max(most, len(workers()))
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [per_process] * (
            4 // per_process
        )
        assert most == 2  # the next one warms up beside the last trial
    finally:
        made.close()


@pytest.mark.slow
def test_each_worker_sees_one_npu_of_its_own(cluster: Any) -> None:
    # Stand-ins for NPUs: Ray hands out what the node says it has.
    cluster.add_node(num_cpus=4, resources={"NPU": 2})
    evaluator = PluginConfig("plugin", "plugin_parts:NpuEvaluator", {})
    made = RayExecutor(RayConfig("ray", address=cluster.address, npus=1), evaluator)
    try:
        # Enough of them that the other worker, however late it starts, gets one.
        for trial_id in range(40):
            made.submit(Job(trial_id, find_architecture("mnasnet-small"), 1))
        found: list[Finished] = []
        until(lambda: len(found.extend(made.wait(1.0)) or found) == 40)
        assert made.capacity == 2
        seen = {end.outcome.metrics["npu"] for end in found if isinstance(end.outcome, Evaluation)}
        assert seen == {0.0, 1.0}
    finally:
        made.close()


class Monkey:
    """Kills workers, nodes and drivers of a campaign at random moments, and resumes it.

    Args:
        cluster: Gets three nodes of one CPU.
        folder: The campaign's.
        seed: Of what is killed.
        patience_s: Without a new result for so long, the campaign is taken to hang.
    """

    def __init__(self, cluster: Any, folder: Path, seed: int, patience_s: float = 120) -> None:
        self._cluster = cluster
        self._folder = folder
        self._patience_s = patience_s
        self._output = folder.with_name("output.txt")
        self._rng = np.random.default_rng(seed)
        self._nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]

    def run(self, arguments: list[str], kills: dict[str, int], results_between: int) -> None:
        """Start the campaign, kill what `kills` says, and see it end well."""
        events = self._rng.permutation([kind for kind, n in kills.items() for _ in range(n)])
        process = self._start(*arguments)
        try:
            for number, event in enumerate(events, 1):
                try:
                    needed = results_between * number
                    wait_for_results(self._folder, needed, timeout_s=self._patience_s)
                except TimeoutError:
                    os.killpg(process.pid, signal.SIGABRT)
                    process.wait(10)
                    log = (self._folder / "campaign.log").read_text()[-6000:]
                    pytest.fail(f"no progress before {event} {number}: {log}\n{self._printed()}")
                if event == "driver":
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(10)
                    process = self._start("resume", str(self._folder))
                else:
                    self._kill_worker() if event == "worker" else self._kill_node()
            assert process.wait(timeout=300) == 0, self._printed()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        until(lambda: not workers())

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        # A file: Ray tells of every death, and a pipe that nobody reads stops who writes.
        with self._output.open("a") as output:
            return start_mnas(*arguments, output=output)

    def _printed(self) -> str:
        return self._output.read_text()[-2000:]

    def _kill_worker(self) -> None:
        until(lambda: bool(workers()))
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            self._rng.choice(np.array(workers())).kill()

    def _kill_node(self) -> None:
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=1))


@pytest.mark.slow
@pytest.mark.timeout(900)  # 3 to 4 minutes on a quiet machine
def test_chaos_changes_nothing(tmp_path: Path, cluster: Any) -> None:
    config = write_synthetic(tmp_path, trials=300)
    expected = quiet_rows(tmp_path, config)
    folder = tmp_path / "run"
    arguments = ["search", str(config), executor(cluster), *SLOWLY, "--out", str(folder)]
    kills = {"worker": 22, "node": 4, "driver": 4}
    Monkey(cluster, folder, seed=20).run(arguments, kills, results_between=9)
    assert rows(folder) == expected
    assert [row["id"] for row in rows(folder)] == list(range(300))
    assert "finished" in mnas("status", str(folder)).stdout


@pytest.mark.chaos
@pytest.mark.timeout(5400)
def test_100_kills_with_mindspore_children_lose_no_trial(tmp_path: Path, cluster: Any) -> None:
    folder = tmp_path / "run"
    arguments = [
        "search", "digits", executor(cluster), "controller={name: random}", "retrain=null",
        "device=null", "objective={name: soft, target_ms: 1.0}", "stop.trials=110",
        "evaluator={class: plugin_parts:OneEpoch, options: {}}", "--out", str(folder),
    ]  # fmt: skip
    kills = {"worker": 80, "node": 10, "driver": 10}
    # A driver starts, workers start, and a child trains: minutes on a busy machine.
    monkey = Monkey(cluster, folder, seed=21, patience_s=600)
    monkey.run(arguments, kills, results_between=1)
    store = Store(folder / "campaign.db", read_only=True)
    trials = store.trials()
    assert [trial.id for trial in trials] == list(range(110))
    assert {trial.outcome for trial in trials} <= {"completed", "reused"}
