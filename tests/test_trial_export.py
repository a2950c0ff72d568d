"""What other tools read of a campaign: tables of its trials, TensorBoard's curves."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns import mnas_here, write_synthetic

from search.config import load_campaign_config
from search.engine import Silent, start
from search.store import Store
from search.tensorboard import TensorBoard
from search.trial import Trial
from search.trial_export import COLUMNS, export_trials


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaign")
    config = load_campaign_config(
        str(write_synthetic(folder, trials=24, seconds=0.01)), ["baseline_share=0.25"]
    )
    watcher = TensorBoard(Silent(), folder / "run" / "tensorboard", workers=2)
    start(config, folder / "other", watcher)
    watcher.close()
    (folder / "other").rename(folder / "campaign")
    return folder


def trials_of(folder: Path) -> list[Trial]:
    return Store(folder / "campaign" / "campaign.db", read_only=True).trials()


def test_a_csv_file_holds_every_trial_with_its_figures(campaign: Path, tmp_path: Path) -> None:
    out = tmp_path / "trials.csv"
    done = mnas_here("trials", str(campaign / "campaign"), "--out", str(out), "--json")
    assert json.loads(done.stdout) == {"file": str(out), "trials": 24}
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, trials_of(campaign), strict=True):
        assert int(row["trial"]) == trial.id
        assert row["role"] == trial.role
        assert row["architecture"] == trial.architecture
        assert json.loads(row["tokens"]) == list(trial.tokens)
        assert json.loads(row["metrics"]) == (trial.metrics or {})
        assert (float(row["reward"]) if row["reward"] else None) == trial.reward


def test_a_parquet_file_holds_the_same(campaign: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the [parquet] extra is missing")
    out = tmp_path / "trials.parquet"
    done = mnas_here("trials", str(campaign / "campaign"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(out).to_pydict()
    assert table["trial"] == [trial.id for trial in trials_of(campaign)]
    assert table["reward"] == [trial.reward for trial in trials_of(campaign)]


def test_another_suffix_is_refused_in_one_sentence(campaign: Path, tmp_path: Path) -> None:
    out = tmp_path / "trials.xlsx"
    done = mnas_here("trials", str(campaign / "campaign"), "--out", str(out))
    assert done.returncode == 2
    assert "must end in .csv or .parquet" in done.stderr
    assert not out.exists()


def test_tensorboard_gets_the_curves_of_a_search(campaign: Path) -> None:
    (events,) = (campaign / "run" / "tensorboard").glob("events.out.tfevents.*")
    data = events.read_bytes()
    for name in ("trial/reward", "trial/accuracy", "trial/latency_ms", "controller/entropy"):
        assert name.encode() in data


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of what a folder's only event file holds."""
    proto: Any = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = folder.glob("events.out.tfevents.*")
    with path.open("rb") as file:
        # A record: its length, a checksum of that, the event, a checksum of it.
        while head := file.read(12):
            event = proto.Event.FromString(file.read(struct.unpack("<Q4x", head)[0]))
            file.read(4)
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def test_the_busy_share_is_the_evaluations_time_in_that_of_all_workers(campaign: Path) -> None:
    told = scalars(campaign / "run" / "tensorboard")
    busy = {step: value for tag, step, value in told if tag == "workers/busy"}
    assert list(busy) == [0, 1, 2]
    ends, evaluated_s = [0.0] * 3, [0.0] * 3
    for trial in trials_of(campaign):
        ends[trial.batch] = max(ends[trial.batch], trial.finished_at or 0.0)
        evaluated_s[trial.batch] += (trial.timings or {}).get("train_s", 0.0)
    for batch in (1, 2):
        wall_s = ends[batch] - ends[batch - 1]
        assert busy[batch] == pytest.approx(evaluated_s[batch] / (2 * wall_s), rel=1e-5)
        # One evaluation after another: never more than one of the two workers.
        assert 0 < busy[batch] <= 0.5


def test_without_a_number_of_workers_no_busy_share_is_drawn(tmp_path: Path) -> None:
    watcher = TensorBoard(Silent(), tmp_path / "tensorboard", workers=None)
    start(
        load_campaign_config(str(write_synthetic(tmp_path, trials=8))), tmp_path / "run", watcher
    )
    watcher.close()
    assert "workers/busy" not in {tag for tag, *_ in scalars(tmp_path / "tensorboard")}


def test_a_campaign_without_trials_has_the_columns(tmp_path: Path) -> None:
    export_trials(Store(tmp_path / "campaign.db", read_only=False), tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text() == ",".join(COLUMNS) + "\n"
