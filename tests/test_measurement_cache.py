"""The file of measurements that campaigns share."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from campaigns import mnas_here, write_synthetic

from latency.measurement import Measurement
from search.config import load_campaign_config
from search.engine import resume, start
from search.measurement_cache import MeasurementCache
from search.store import Store
from space.errors import ConfigError

OK = Measurement((2.0, 2.01, 2.02, 1.99, 2.0), 4, 10, 1, "graph", {"name": "a board"}, {}, {})
NOISY = replace(OK, samples_ms=(1.0, 2.0, 3.0, 4.0, 5.0))
WAIT = {"timeout": 0.1}
DEVICE = "device={name: one, kind: onnxruntime, threads: 1, effort: quick, attempts: 1}"


def test_the_newest_good_measurement_is_kept_for_later_processes(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path / "measurements.db")
    newer = replace(OK, samples_ms=(3.0, 3.01, 3.02))
    for measurement in (OK, newer, NOISY, replace(newer, drifted=True)):
        cache.add(measurement)
    cache.close()
    again = MeasurementCache(tmp_path / "measurements.db")
    assert again.find("graph", OK.device_fingerprint) == newer
    assert again.find("another graph", OK.device_fingerprint) is None
    assert again.find("graph", replace(OK, device={"name": "b"}).device_fingerprint) is None


def test_two_campaigns_time_a_network_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = [
        f"device={{class: 'plugin_parts:FaultyDevice', options: {{log: '{log}'}}}}",
        "controller={name: random}",
        f"measurement_cache={tmp_path / 'shared.db'}",
    ]
    samples = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        path = str(write_synthetic(tmp_path / name, trials=16, fail_share=0.0))
        start(load_campaign_config(path, settings), tmp_path / name / "run")
        store = Store(tmp_path / name / "run" / "campaign.db", read_only=True)
        trials = [trial for trial in store.trials() if trial.outcome == "completed"]
        assert len(trials) > 4
        samples.append([store.measurement(t.measurement_ids[0]).samples_ms for t in trials])
    assert samples[0] == samples[1]
    # What failed was measured by both, and what did not by the first alone.
    timed = log.read_text().split()
    good = [hash_ for hash_ in timed if int(hash_, 16) % 4]
    assert len(good) == len(set(good)) > 4
    assert len(timed) - len(good) == 2 * len({hash_ for hash_ in timed if hash_ not in good})


def test_a_campaign_outlives_its_cache(tmp_path: Path) -> None:
    cache = tmp_path / "shared.db"
    path = str(write_synthetic(tmp_path, trials=2, fail_share=0.0))
    config = load_campaign_config(path, [DEVICE, f"measurement_cache={cache}"])
    start(config, tmp_path / "run")
    cache.unlink()
    resume(tmp_path / "run", ["stop.trials=4", "measurement_cache=null"])
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    assert [trial.outcome for trial in store.trials()] == ["completed"] * 4


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, database = tmp_path / "notes.txt", tmp_path / "other.db"
    text.write_text("my notes, which are longer than the header of a database\n" * 20)
    with sqlite3.connect(database) as other:
        other.execute("CREATE TABLE mine (x)")
    for path, words in ((text, "not a database"), (database, "something else")):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=words):
            MeasurementCache(path)
        assert path.read_bytes() == before


def test_a_cache_that_cannot_be_written_for_now_costs_nothing_but_the_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **more: connect(path, **more | WAIT))
    cache = MeasurementCache(tmp_path / "measurements.db")
    with connect(tmp_path / "measurements.db") as other:
        other.execute("BEGIN IMMEDIATE")
        cache.add(OK)
        assert "is not written: database is locked" in caplog.text
        other.rollback()
    assert cache.find("graph", OK.device_fingerprint) is None
    cache.add(OK)
    assert cache.find("graph", OK.device_fingerprint) == OK


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=2)
    done = mnas_here("search", str(config), f"measurement_cache={tmp_path}/no/m.db", cwd=tmp_path)
    assert done.returncode == 2
    assert "measurement_cache: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
