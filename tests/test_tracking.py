"""MLflow beside a search: what a run holds, and that no server can end a campaign."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from campaigns import write_synthetic

from search import tracking
from search.campaign import continue_with, create, open_to_read, resumed_config
from search.config import load_campaign_config
from search.engine import CampaignOutcome, Silent, run
from search.parts import Parts
from space.errors import ConfigError

mlflow = pytest.importorskip("mlflow", reason="the [tracking] extra is missing")

# MLflow's database layer warns of its own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("default")


class Told(Silent):
    """Keeps the updates and MLflow's warnings that it is told."""

    def __init__(self, on_update: Callable[[int], None] = lambda batch: None) -> None:
        self.warnings: list[str] = []
        self.updates: dict[int, Mapping[str, float]] = {}
        self._on_update = on_update

    def note(self, text: str) -> None:
        self.warnings += [text] if "MLflow" in text else []

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        self.updates[batch] = diagnostics
        self._on_update(batch)


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own for what MLflow writes; environment and logging are put back."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in tracking._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    level = logging.getLogger("mlflow").level
    yield
    logging.getLogger("mlflow").setLevel(level)


def connected(folder: Path) -> Any:
    return tracking.connect(f"sqlite:///{folder / 'mlflow.db'}")


def tracked(
    folder: Path, client: Any, *overrides: str, watcher: Silent | None = None
) -> CampaignOutcome:
    """Run or go on with a small campaign in folder/run, tracked as the command line does."""
    there = (folder / "run").exists()
    if there:
        config = resumed_config(folder / "run", overrides)
    else:
        config = load_campaign_config(str(write_synthetic(folder, trials=24)), overrides)
    with (
        (continue_with if there else create)(folder / "run", config) as campaign,
        tracking.MlflowTracking(watcher or Silent(), client, campaign.folder, config) as told,
    ):
        return run(campaign, Parts(config), told)


def only_run(client: Any, name: str = "synthetic") -> Any:
    experiment = client.get_experiment_by_name(name)
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def history(client: Any, name: str) -> dict[int, float]:
    points = client.get_metric_history(only_run(client).info.run_id, name)
    return {point.step: point.value for point in points}


def test_a_run_holds_what_the_campaign_does(tmp_path: Path) -> None:
    client, watcher = connected(tmp_path), Told()
    outcome = tracked(tmp_path, client, "baseline_share=0.25", watcher=watcher)
    with_run = only_run(client)
    assert with_run.info.run_name == "run"
    assert with_run.info.status == "FINISHED"
    assert with_run.data.tags["mnas.stop_reason"] == outcome.stop_reason
    assert float(with_run.data.tags["mnas.target_ms"]) == outcome.target_ms
    parameters = with_run.data.params
    assert parameters["controller.name"] == "ppo"
    assert parameters["stop.trials"] == "24"
    assert parameters["objective.target_ms"] == "3.0"
    assert parameters["device"] == "null"
    trials = {t.id: t for t in open_to_read(tmp_path / "run").trials()}
    for name in ("reward", "accuracy", "latency_ms"):
        wanted = {i: getattr(t, name) for i, t in trials.items() if t.reward is not None}
        got = history(client, f"trial/{name}")
        assert {step: got[step] for step in wanted} == wanted
    assert set(history(client, "seconds/train_s")) <= set(trials)
    entropies = {batch: told["entropy"] for batch, told in watcher.updates.items()}
    assert history(client, "controller/entropy") == entropies
    artefacts = {file.path for file in client.list_artifacts(with_run.info.run_id)}
    assert artefacts == {"config.yaml", "report.html"}
    assert watcher.warnings == []


def test_a_campaign_that_goes_on_goes_on_with_its_run(tmp_path: Path) -> None:
    client = connected(tmp_path)

    def interrupt(batch: int) -> None:
        if batch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracked(tmp_path, client, watcher=Told(interrupt))
    assert only_run(client).info.status == "KILLED"
    assert only_run(client).data.tags["mnas.stop_reason"] == "interrupted"
    # A parameter cannot change any more: the changed configuration is in the file.
    tracked(tmp_path, connected(tmp_path), "stop.trials=32")
    assert only_run(client).info.status == "FINISHED"
    assert only_run(client).data.params["stop.trials"] == "24"
    rewards = {t.id: t.reward for t in open_to_read(tmp_path / "run").trials()}
    got = history(client, "trial/reward")
    assert len(rewards) == 32
    assert got == {i: reward for i, reward in rewards.items() if reward is not None}


def test_a_run_that_was_deleted_or_is_elsewhere_is_begun_anew(tmp_path: Path) -> None:
    client = connected(tmp_path)
    tracked(tmp_path, client)
    client.delete_run(only_run(client).info.run_id)
    tracked(tmp_path, client, "stop.trials=32")
    assert min(history(client, "trial/reward")) >= 24
    (tmp_path / "other").mkdir()
    other = connected(tmp_path / "other")
    tracked(tmp_path, other, "stop.trials=40")
    assert min(history(other, "trial/reward")) >= 32


def test_names_that_mlflow_does_not_take_are_written_otherwise(tmp_path: Path) -> None:
    client = connected(tmp_path)
    config = load_campaign_config(str(write_synthetic(tmp_path)))
    with create(tmp_path / "run", config) as campaign:
        with tracking.MlflowTracking(Silent(), client, campaign.folder, config) as told:
            told.update(0, {"latency_ms:board/1": 2.0, "accuracy@3": 0.5})
    data = only_run(client).data.metrics
    assert data == {"controller/latency_ms_board/1": 2.0, "controller/accuracy_3": 0.5}


class Away:
    """A client whose server is away while `away`."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.away = False
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            if self.away:
                self.asked += 1
                raise ConnectionError("refused\nwith a second line")
            return found(*arguments, **named)

        return call


def test_a_server_that_goes_away_is_warned_of_once_and_sent_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Away(connected(tmp_path))
    monkeypatch.setattr(tracking, "SEND_INTERVAL_S", 0.0)
    monkeypatch.setattr(tracking, "RETRY_INTERVAL_S", 0.0)

    def come_and_go(batch: int) -> None:
        client.away = batch == 0

    watcher = Told(come_and_go)
    tracked(tmp_path, client, watcher=watcher)
    assert client.asked > 1
    (line,) = watcher.warnings
    assert line == "WARNING MLflow does not answer, the campaign goes on: refused"
    rewards = {t.id: t.reward for t in open_to_read(tmp_path / "run").trials()}
    got = history(client, "trial/reward")
    assert got == {i: reward for i, reward in rewards.items() if reward is not None}
    assert "MLflow: refused" in (tmp_path / "run" / "campaign.log").read_text()


def test_a_server_that_stays_away_costs_a_campaign_few_tries(tmp_path: Path) -> None:
    client = Away(connected(tmp_path))
    client.away = True
    watcher = Told()
    outcome = tracked(tmp_path, client, watcher=watcher)
    assert outcome.trials == 24
    assert len(watcher.warnings) == 1
    # At the start and at the end; in between it is asked once a minute.
    assert client.asked == 2
    assert not (tmp_path / "run" / tracking.RUN_FILE).exists()
    # The next process begins the run.
    client.away = False
    tracked(tmp_path, client, "stop.trials=32")
    assert min(history(client, "trial/reward")) >= 24


def test_a_server_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ConfigError, match=rf"--mlflow: {uri} cannot be used: .*") as caught:
        tracking.connect(uri)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


def test_without_the_package_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install mnas\[tracking\]"):
        tracking.connect(None)


def test_mlflow_is_loaded_only_where_it_is_asked_for() -> None:
    code = "import search.cli, search.tracking, sys; sys.exit('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_server_killed_in_the_middle_ends_no_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SEND_INTERVAL_S", 0.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--workers", "1",
    ]  # fmt: skip
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        client, deadline = None, time.monotonic() + 120
        while client is None:
            try:
                client = tracking.connect(f"http://127.0.0.1:{port}")
            except ConfigError:
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.5)

        def kill(batch: int) -> None:
            if batch == 1:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(timeout=30)

        watcher = Told(kill)
        outcome = tracked(tmp_path, client, watcher=watcher)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=30)
    assert outcome.trials == 24
    assert len(watcher.warnings) == 1
    # What was sent before is there.
    stored = tracking.connect(f"sqlite:///{tmp_path / 'server.db'}")
    assert only_run(stored).info.status == "RUNNING"
    assert len(history(stored, "trial/reward")) >= 5
