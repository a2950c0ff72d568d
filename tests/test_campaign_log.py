"""A campaign's logs: what programs read of a trial, and that a full disk ends no campaign."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from campaigns import rows, write_synthetic

from search.campaign_log import about, campaign_logs
from search.config import load_campaign_config
from search.engine import Silent, resume, start
from search.store import Store

DIVERGING = "evaluator={class: 'plugin_parts:FaultyEvaluator', options: {faults: [raise]}}"
FULL_DISK = Path("/dev/full")


class Notes(Silent):
    """Keeps the sentences that it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_trial_has_one_line_that_says_what_came_of_it(tmp_path: Path) -> None:
    start(load_campaign_config(str(write_synthetic(tmp_path, trials=24))), tmp_path / "run")
    log = lines(tmp_path / "run" / "log.jsonl")
    ends = {line["trial"]: line for line in log if "outcome" in line}
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    assert list(ends) == [trial.id for trial in trials]
    for trial in trials:
        end = ends[trial.id]
        assert end["outcome"] == trial.outcome
        assert (end["reward"], end["accuracy"]) == (trial.reward, trial.accuracy)
        assert (end["latency_ms"], end["attempts"]) == (trial.latency_ms, trial.attempt)
        assert end["reason"] == (trial.failure.reason if trial.failure else None)
        assert end.get("train_s") == (trial.timings or {}).get("train_s")
        time = datetime.datetime.fromisoformat(end["time"])
        assert time.utcoffset() == datetime.timedelta(0)
        assert abs(time.timestamp() - (trial.finished_at or 0.0)) < 5
    assert {line["level"] for line in ends.values()} == {"INFO", "WARNING"}
    assert "search ended" in log[-1]["message"]


def test_all_that_is_said_of_a_trial_has_its_id(tmp_path: Path) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=16)), [DIVERGING])
    start(config, tmp_path / "run")
    about_trials = [
        line
        for line in lines(tmp_path / "run" / "log.jsonl")
        if line["message"].startswith("trial ")
    ]
    assert any("Traceback" in line["message"] for line in about_trials)
    for line in about_trials:
        assert line["message"].startswith(f"trial {line['trial']} ")


def test_a_message_is_one_line_with_its_traceback_whatever_it_holds(tmp_path: Path) -> None:
    room = logging.getLogger("search.some")
    with campaign_logs(tmp_path, Notes().note):
        room.warning("two\nlines, %s \udcff", "é", extra=about(7))
        try:
            raise OSError("gone")
        except OSError:
            room.exception("failed")
    first, second = lines(tmp_path / "log.jsonl")
    assert (first["trial"], first["level"], first["logger"]) == (7, "WARNING", "search.some")
    assert first["message"] == "two\nlines, é \udcff"
    assert "OSError: gone" in second["traceback"]
    assert "trial" not in second
    assert "two\nlines" in (tmp_path / "campaign.log").read_text()


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs a device that is always full")
def test_logs_on_a_full_disk_are_told_of_once_each_and_no_trial_is_lost(tmp_path: Path) -> None:
    folder, notes = tmp_path / "run", Notes()
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=16)))
    start(config, folder)
    for name in ("campaign.log", "log.jsonl"):
        (folder / name).unlink()
        (folder / name).symlink_to(FULL_DISK)
    outcome = resume(folder, ["stop.trials=48"], notes)
    assert outcome.trials == 48
    assert all(row["outcome"] is not None for row in rows(folder))
    warnings = [note for note in notes.notes if note.startswith("WARNING")]
    assert [warning.split(": ")[0] for warning in warnings] == [
        f"WARNING {folder / 'campaign.log'}",
        f"WARNING {folder / 'log.jsonl'}",
    ]


def test_a_log_that_cannot_be_made_is_told_of_and_ends_nothing(tmp_path: Path) -> None:
    notes = Notes()
    (tmp_path / "log.jsonl").mkdir()
    with campaign_logs(tmp_path, notes.note):
        logging.getLogger("search.some").info("one")
        logging.getLogger("search.some").info("two")
    (warning,) = notes.notes
    assert f"{tmp_path / 'log.jsonl'}: is not written, the work goes on: " in warning
    assert len((tmp_path / "campaign.log").read_text().splitlines()) == 2


def test_half_a_line_of_a_killed_process_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"time": "2026')
    with campaign_logs(tmp_path, Notes().note):
        logging.getLogger("search.some").info("one")
        logging.getLogger("search.some").info("two")
    half, *whole = (tmp_path / "log.jsonl").read_text().splitlines()
    assert half == '{"time": "2026'
    assert [json.loads(line)["message"] for line in whole] == ["one", "two"]
