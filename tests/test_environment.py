"""A campaign that goes on with other software or another device says so and marks its trials."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from campaigns import mnas, mnas_here, write_synthetic

from search import environment
from search.config import campaign_config, load_campaign_config
from search.engine import resume, start
from search.report import write_report
from search.store import Store
from space.errors import MeasurementError
from space.files import versions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished campaign of 20 trials that can be extended."""
    start(load_campaign_config(str(write_synthetic(tmp_path, trials=20))), tmp_path / "run")
    return tmp_path / "run"


def made_with(folder: Path, **packages: str) -> None:
    """Let a campaign have been made with other versions."""
    store = Store(folder / "campaign.db", read_only=False)
    first = store.meta("environments")[0]
    first["versions"] |= packages
    store.set_meta("environments", [first])
    store.close()


def events(folder: Path) -> list[str]:
    store = Store(folder / "campaign.db", read_only=True)
    said = [message for _, kind, message in store.events() if kind == "environment"]
    store.close()
    return said


def exported(folder: Path) -> list[dict[str, str]]:
    out = folder / "trials.csv"
    done = mnas_here("trials", str(folder), "--out", str(out))
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_changed_version_warns_once_and_marks_the_later_trials(folder: Path) -> None:
    made_with(folder, onnxruntime="0.9", mindspore="0.8")
    done = mnas("resume", str(folder), "stop.trials=32")
    assert done.returncode == 0, done.stderr
    now = versions()
    (warning,) = (line for line in done.stdout.splitlines() if line.startswith("Warning: "))
    assert "from trial 20 on it is environment 2" in warning
    assert f"onnxruntime 0.9 -> {now['onnxruntime']}" in warning
    assert f"mindspore 0.8 -> {now['mindspore']}" in warning
    assert "numpy" not in warning
    (event,) = events(folder)
    assert "from trial 20 on" in event
    rows = exported(folder)
    ended = {int(row["trial"]): row for row in rows}
    for trial_id, row in ended.items():
        made = int(row["reused_from"] or trial_id)
        assert row["environment"] == ("1" if made < 20 else "2")
    assert mnas("resume", str(folder), "stop.trials=40").stdout.count("Warning: ") == 0
    assert len(events(folder)) == 1


def test_status_top_and_the_report_show_the_change(folder: Path) -> None:
    made_with(folder, onnxruntime="0.9")
    resume(folder, ["stop.trials=32"])
    note = f"environment 2 from trial 20 on: onnxruntime 0.9 -> {versions()['onnxruntime']}"
    assert note in mnas_here("status", str(folder)).stdout
    status = json.loads(mnas_here("status", str(folder), "--json").stdout)
    assert [entry["first_trial"] for entry in status["environments"]] == [0, 20]
    top = mnas_here("top", str(folder), "-n", "30").stdout
    assert note in top
    (heads,) = (line for line in top.splitlines() if "reward" in line)
    assert heads.split()[-1] == "env"
    assert "…" not in heads
    best = json.loads(mnas_here("top", str(folder), "-n", "30", "--json").stdout)["trials"]
    assert {trial["environment"] for trial in best} == {1, 2}
    page = (folder / "report.html").read_text()
    assert f"The trials' figures come from more than one environment: {note}" in (
        page.replace("&#x27;", "'").replace("-&gt;", "->")
    )


def test_an_unchanged_environment_says_nothing(folder: Path) -> None:
    done = mnas("resume", str(folder), "stop.trials=32")
    assert "Warning" not in done.stdout
    assert events(folder) == []
    assert {row["environment"] for row in exported(folder)} == {"1"}
    assert "changed  " not in mnas_here("top", str(folder)).stdout


def test_trials_that_were_open_are_of_the_environment_that_finished_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a kill: two results of the last batch are not there yet.
    store = Store(folder / "campaign.db", read_only=False)
    store._db.execute("UPDATE trial SET outcome = NULL, reused_from = NULL WHERE id IN (16, 18)")
    store._db.execute("DELETE FROM batch_update WHERE batch = 2")
    store.close()
    changed = {**versions(), "mindspore": "99"}
    monkeypatch.setattr(environment, "versions", lambda: changed)
    resume(folder)
    assert "from trial 16 on" in events(folder)[0]
    later = {row["trial"] for row in exported(folder) if row["environment"] == "2"}
    assert {"16", "18"} <= later
    assert not {"0", "15", "17", "19"} & later


def test_a_campaign_of_an_earlier_engine_opens_and_its_versions_are_compared(
    folder: Path,
) -> None:
    store = Store(folder / "campaign.db", read_only=False)
    store._db.execute("DELETE FROM meta WHERE key = 'environments'")
    store.set_meta("versions", {**versions(), "ray": "0.1"})
    write_report(store, load_campaign_config(str(folder / "config.yaml")), folder / "page.html")
    store.close()
    assert "changed  " not in mnas_here("status", str(folder)).stdout
    assert {row["environment"] for row in exported(folder)} == {"1"}
    resume(folder, ["stop.trials=24"])
    assert "ray 0.1 -> " in events(folder)[0]


def test_another_device_under_the_same_name_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "name": "device",
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"name": "synthetic"},
        "device": {
            "class": "plugin_parts:FaultyDevice", "options": {"log": str(tmp_path / "log")},
        },
        "objective": {"name": "soft", "target_ms": 2.0},
        "executor": {"name": "serial"},
        "batch_size": 8,
        "stop": {"trials": 16},
    }  # fmt: skip
    start(campaign_config(values, where="test", folder=tmp_path), tmp_path / "run")
    identity = {"name": "faulty", "kind": "test", "processor": "a faster one"}
    monkeypatch.setattr("plugin_parts.FaultyDevice.identity", lambda device: identity)
    resume(tmp_path / "run", ["stop.trials=24"])
    (event,) = events(tmp_path / "run")
    assert "from trial 16 on" in event
    assert "processor (none) -> a faster one" in event

    def away(device: object) -> dict[str, Any]:
        raise MeasurementError("the device went away")

    # One that does not answer is not taken for another one.
    monkeypatch.setattr("plugin_parts.FaultyDevice.identity", away)
    monkeypatch.setattr("search.measuring.PAUSES_S", (0.0, 0.0))
    with pytest.raises(MeasurementError, match="does not answer, so the search stops"):
        resume(tmp_path / "run", ["stop.trials=25"])
    monkeypatch.setattr("plugin_parts.FaultyDevice.identity", lambda device: identity)
    resume(tmp_path / "run", ["stop.trials=26"])
    assert len(events(tmp_path / "run")) == 1
