"""campaign.db: exactly-once results, transactions, read-only readers, versions."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from latency.measurement import Measurement
from search.store import SCHEMA_VERSION, Store
from search.trial import Failure, RewardParts, Trial
from space.errors import ConfigError

PARTS = RewardParts(0.5, 1.0, 2.0, 0.5, -0.07, 1.05)


def make_trial(trial_id: int, batch: int = 0) -> Trial:
    return Trial(
        id=trial_id, batch=batch, role="search", proposal_id=trial_id, tokens=(1, 2, 0),
        log_prob=-3.5, architecture="text", architecture_hash="ab", seed=2**32 - 1, epochs=3.0,
        created_at=1.5,
    )  # fmt: skip


def finished(trial: Trial) -> Trial:
    return replace(
        trial, outcome="completed", accuracy=0.5, metrics={"latency_ms": 1.0}, reward=0.525,
        parts=PARTS, measurement_ids=(1,), timings={"train_s": 2.0}, finished_at=9.0,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "campaign.db", read_only=False)


def test_trials_come_back_as_they_went_in(store: Store) -> None:
    trials = [make_trial(0), make_trial(1)]
    store.begin_batch(trials, b"state")
    assert store.trials() == trials
    assert store.snapshot() == (0, b"state")
    done = finished(trials[0])
    failed = replace(trials[1], outcome="failed", failure=Failure("why", "architecture", "trace"))
    assert store.finish_trial(done)
    assert store.finish_trial(failed)
    assert store.trials() == [done, failed]
    assert store.counts() == {"completed": 1, "failed": 1}
    assert store.next_ids() == (2, 1)


def test_a_result_is_recorded_exactly_once(store: Store) -> None:
    store.begin_batch([make_trial(0)], b"")
    first = finished(make_trial(0))
    assert store.finish_trial(first)
    assert not store.finish_trial(replace(first, reward=0.9))
    assert store.trial(0) == first


def test_a_batch_is_committed_whole_or_not_at_all(store: Store) -> None:
    store.begin_batch([make_trial(0)], b"old")
    with pytest.raises(sqlite3.IntegrityError):
        store.begin_batch([make_trial(1, 1), make_trial(0, 1)], b"new")
    assert [trial.id for trial in store.trials()] == [0]
    assert store.snapshot() == (0, b"old")


def test_updates_keep_their_order_and_diagnostics(store: Store) -> None:
    store.commit_update(0, [3, 1, 2], {"entropy": 1.25})
    store.commit_update(1, [], {})
    assert store.updates() == [(0, [3, 1, 2], {"entropy": 1.25}), (1, [], {})]
    assert store.has_update(1)
    assert not store.has_update(2)


def test_only_good_measurements_are_found_again_and_only_for_their_device(store: Store) -> None:
    good = Measurement((1.0, 1.01, 1.02), 1, 3, 1, "graph", {"name": "a"}, {}, {})
    noisy = Measurement((1.0, 5.0, 9.0), 1, 3, 3, "graph2", {"name": "a"}, {}, {})
    good_id = store.add_measurement(good)
    noisy_id = store.add_measurement(noisy)
    assert store.find_measurement("graph", good.device_fingerprint) == (good_id, good)
    assert store.find_measurement("graph2", noisy.device_fingerprint) is None
    assert store.find_measurement("graph", "another device") is None
    assert store.measurement(noisy_id) == noisy


def test_finalists_count_down_and_leave_the_searchs_numbers_alone(store: Store) -> None:
    store.begin_batch([make_trial(0), make_trial(1)], b"")
    assert store.next_other_id() == -1
    store.add_trials([replace(make_trial(-1, -1), role="finalist", finalist_of=1)])
    assert store.next_other_id() == -2
    assert store.next_ids() == (2, 1)
    assert [trial.finalist_of for trial in store.trials(role="finalist")] == [1]


def test_a_reader_sees_what_is_committed_and_cannot_write(store: Store) -> None:
    store.begin_batch([make_trial(0)], b"")
    reader = Store(store.path, read_only=True)
    assert len(reader.trials()) == 1
    store.finish_trial(finished(make_trial(0)))
    assert reader.trials()[0].outcome == "completed"
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.set_meta("key", 1)


def test_a_newer_database_is_refused_and_other_files_too(tmp_path: Path, store: Store) -> None:
    store.close()
    with sqlite3.connect(store.path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(ConfigError, match="newer engine"):
        Store(store.path, read_only=True)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE x (y)")
    with pytest.raises(ConfigError, match="not a campaign"):
        Store(other, read_only=False)
    text = tmp_path / "text.db"
    text.write_text("this is not a database, whatever its name says" * 100)
    with pytest.raises(ConfigError, match="not a campaign database"):
        Store(text, read_only=True)
    with pytest.raises(ConfigError, match="no such file"):
        Store(tmp_path / "none.db", read_only=True)


def test_meta_holds_json_and_the_last_value_counts(store: Store) -> None:
    assert store.meta("winner") is None
    store.set_meta("winner", {"trial": 1})
    store.set_meta("winner", {"trial": 2})
    assert store.meta("winner") == {"trial": 2}


def test_a_folder_that_cannot_be_written_can_be_read(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.begin_batch([make_trial(0)], b"state")
    store.close()
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    reader = Store(tmp_path / "campaign.db", read_only=True)
    assert [trial.id for trial in reader.trials()] == [0]
    # SQLite would have made its log's files, or failed.
    assert sorted(path.name for path in tmp_path.iterdir()) == before == ["campaign.db"]
    reader.close()


def test_a_network_file_system_is_known_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    mounts = [SimpleNamespace(mountpoint=str(tmp_path / "mount"), fstype="fuse.sshfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    Store(tmp_path / "link" / "campaign.db", read_only=False).close()
    journal = sqlite3.connect(tmp_path / "mount" / "campaign.db").execute("PRAGMA journal_mode")
    assert journal.fetchone() == ("delete",)
