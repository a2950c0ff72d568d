"""A campaign's trials as a table for other tools: CSV, or Parquet with the [parquet] extra."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from search.environment import Environments
from search.store import Store
from search.tables import trial_summary
from space.errors import ConfigError
from space.files import write_atomically

SUFFIXES = (".csv", ".parquet")
COLUMNS = (
    "trial", "role", "outcome", "reward", "accuracy", "latency_ms", "parameters", "macs", "epochs",
    "seed", "reused_from", "finalist_of", "failure", "architecture", "architecture_hash", "tokens",
    "parts", "metrics", "measure_s", "train_s", "wait_s", "batch", "attempt", "created_at",
    "finished_at", "environment",
)  # fmt: skip


def export_trials(store: Store, path: Path) -> int:
    """Write all trials, finalists and the like included, and return how many there are.

    Columns: `search.tables.trial_summary`'s, with tokens, metrics and parts as JSON; and batch,
    attempt, measure_s, train_s, wait_s, created_at and finished_at (seconds since the epoch), and
    environment (search.environment: its number).

    Raises:
        ConfigError: The suffix is unknown, or Parquet's package is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: must end in {' or '.join(SUFFIXES)}.")
    environments = Environments(store)
    rows = [
        _row(trial) | {"environment": environments.of(trial)}
        for trial in (*store.trials(), *store.others())
    ]
    write_atomically(path, _csv(rows) if path.suffix == ".csv" else _parquet(rows))
    return len(rows)


def _row(trial: Any) -> dict[str, Any]:
    row = trial_summary(trial)
    for name in ("tokens", "metrics", "parts"):
        row[name] = json.dumps(row[name])
    timings = trial.timings or {}
    row.update({name: timings.get(name) for name in ("measure_s", "train_s", "wait_s")})
    names = ("batch", "attempt", "created_at", "finished_at")
    return row | {name: getattr(trial, name) for name in names}


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet takes the package pyarrow; call `pip install mnas[parquet]`, or write .csv."
        ) from None
    buffer = io.BytesIO()
    empty = pyarrow.table({name: pyarrow.nulls(0) for name in COLUMNS})
    table = pyarrow.Table.from_pylist(rows) if rows else empty
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()
