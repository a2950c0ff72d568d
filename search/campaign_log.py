"""A campaign's log, twice: campaign.log for people, log.jsonl for programs.

    jq 'select(.trial == 17)' DIR/log.jsonl

Every line of log.jsonl is an object with `time`, `level`, `logger` and `message`; what is about a
trial has its id as `trial`, and a trial's end also what came of it (`tell_end`). A log that cannot
be written is told once and ends nothing: the database is the truth.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search.trial import Trial
from space.log_file import LogFile

logger = logging.getLogger("search.trial")

#: Whose messages are a campaign's.
_ROOMS = ("search", "latency", "controller", "space")


def about(trial_id: int) -> dict[str, Any]:
    """Return a message's `extra` that says which trial it is about."""
    return {"trial": trial_id}


def tell_end(trial: Trial) -> None:
    """Log that a trial has its result, and what came of it.

    Keys in log.jsonl: trial, role, outcome, reward, accuracy, latency_ms, attempts, reused_from,
    reason and cause (of a failure), and the trial's timings: `train_s` of a worker, `wait_s`,
    `measure_s`.
    """
    failure = trial.failure
    result = {
        "role": trial.role,
        "outcome": trial.outcome,
        "reward": trial.reward,
        "accuracy": trial.accuracy,
        "latency_ms": trial.latency_ms,
        "attempts": trial.attempt,
        "reused_from": trial.reused_from,
        "reason": failure.reason if failure else None,
        "cause": failure.cause if failure else None,
        **(trial.timings or {}),
    }
    level = logging.WARNING if trial.outcome == "failed" else logging.INFO
    why = f": {failure.reason}" if failure else ""
    extra = {**about(trial.id), "result": result}
    logger.log(level, "trial %d %s%s", trial.id, trial.outcome, why, extra=extra)
    if failure is not None and failure.detail:
        logger.info("trial %d detail:\n%s", trial.id, failure.detail, extra=about(trial.id))


@contextmanager
def campaign_logs(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Let the engine's messages go to a campaign's two logs.

    Args:
        folder: The campaign's.
        tell: Is given a sentence, once for each log, if it cannot be written.
    """
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handlers = [
        LogFile(folder / "campaign.log", text, tell),
        LogFile(folder / "log.jsonl", JsonFormatter(), tell),
    ]
    rooms = [logging.getLogger(room) for room in _ROOMS]
    for room in rooms:
        room.setLevel(logging.INFO)
        room.propagate = False
        for handler in handlers:
            room.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            for room in rooms:
                room.removeHandler(handler)
            handler.close()


class JsonFormatter(logging.Formatter):
    """A message as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        extra = record.__dict__
        if "trial" in extra:
            line["trial"] = extra["trial"]
        line["message"] = record.getMessage()
        line.update(extra.get("result", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
