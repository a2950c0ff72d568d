"""campaign.db: the one truth of a campaign, written in three transactions.

    begin_batch     (a) a batch's proposals with their seeds and the controller's state, before
                        anything is submitted
    finish_trial    (b) each result as it ends, together with nothing else
    commit_update   (c) a marker that names the results the controller learned from, in order; in
                        mode `async` with the controller's state, since updates follow no batch

Resume = the state of the last (a), or (c), + the update of a marked batch that came after it +
evaluation of proposals without a result. One process writes (search/campaign.py holds the lock);
readers open the file read-only and keep their transactions short.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil

from controller.base import Outcome
from latency.measurement import Measurement
from search.trial import Role, Trial
from space.errors import ConfigError
from space.records import build, to_plain

SCHEMA_VERSION = 1

#: So long a write waits for another program that holds the file.
BUSY_TIMEOUT_S = 30.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trial (
    id INTEGER PRIMARY KEY,
    batch INTEGER NOT NULL,
    role TEXT NOT NULL,
    proposal_id INTEGER,
    tokens TEXT NOT NULL,
    log_prob REAL NOT NULL,
    architecture TEXT NOT NULL,
    architecture_hash TEXT NOT NULL,
    seed INTEGER NOT NULL,
    epochs REAL NOT NULL,
    outcome TEXT,
    attempt INTEGER NOT NULL,
    reused_from INTEGER REFERENCES trial (id),
    accuracy REAL,
    metrics TEXT,
    reward REAL,
    parts TEXT,
    measurement_ids TEXT NOT NULL,
    timings TEXT,
    failure TEXT,
    created_at REAL NOT NULL,
    finished_at REAL,
    finalist_of INTEGER REFERENCES trial (id)
);
CREATE TABLE measurement (
    id INTEGER PRIMARY KEY,
    graph_hash TEXT NOT NULL,
    device_fingerprint TEXT NOT NULL,
    verdict TEXT NOT NULL,
    median_ms REAL NOT NULL,
    iqr_ms REAL NOT NULL,
    payload TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE batch_update (
    batch INTEGER PRIMARY KEY,
    trial_ids TEXT NOT NULL,
    diagnostics TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE snapshot (
    batch INTEGER PRIMARY KEY,
    controller_state BLOB NOT NULL
);
CREATE TABLE event (
    id INTEGER PRIMARY KEY,
    created_at REAL NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL
);
"""

#: What is asked of all trials is answered by these alone: a large campaign's rows take many
#: seconds to read. A campaign that has them not is given them when it is next opened for writing.
#: They are few, since each costs every result a page to write: one index is of all results.
_INDEXES = """
DROP INDEX IF EXISTS trial_reward_id;
DROP INDEX IF EXISTS trial_outcome;
CREATE INDEX IF NOT EXISTS trial_batch ON trial (batch);
CREATE INDEX IF NOT EXISTS trial_hash ON trial (architecture_hash);
CREATE INDEX IF NOT EXISTS trial_result ON trial (reward DESC, id, outcome, role)
    WHERE outcome IS NOT NULL;
CREATE INDEX IF NOT EXISTS measurement_key ON measurement (graph_hash, device_fingerprint);
"""

_COLUMNS = (
    "id", "batch", "role", "proposal_id", "tokens", "log_prob", "architecture",
    "architecture_hash", "seed", "epochs", "outcome", "attempt", "reused_from", "accuracy",
    "metrics", "reward", "parts", "measurement_ids", "timings", "failure", "created_at",
    "finished_at", "finalist_of",
)  # fmt: skip
#: What a trial's result consists of; the rest is fixed when it is proposed.
_RESULT_COLUMNS = (
    "outcome", "attempt", "reused_from", "accuracy", "metrics", "reward", "parts",
    "measurement_ids", "timings", "failure", "finished_at",
)  # fmt: skip
_JSON_COLUMNS = frozenset({"tokens", "metrics", "parts", "measurement_ids", "timings", "failure"})
_OUTCOMES = get_args(Outcome)
_SEARCHED_ROLES: tuple[Role, ...] = ("search", "baseline")
#: The search's trials, which `stop.trials` counts: the controller's and the baseline's.
_SEARCHED = "id >= 0"
#: Whatever became of a trial, the machine is not to blame.
_OWN_FAULT = "coalesce(json_extract(failure, '$.cause'), '') <> 'infrastructure'"
#: The key of meta with the trials that are no network's last training.
_SUPERSEDED = "superseded"
#: The key of meta with the figures of full trainings, by the finalist's id.
FULL_TRAININGS = "full_trainings"
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "beegfs", "afs", "9p"}
)

#: Rows that one short read takes, and ids that one statement names.
_PAGE, _IDS = 20_000, 500


class TrialFigures(NamedTuple):
    """What a figure over all trials needs of one, without the cost of a whole Trial."""

    id: int
    role: str
    outcome: str | None
    accuracy: float | None
    latency_ms: float | None
    reward: float | None
    failure: str | None  # JSON of a search.trial.Failure
    finished_at: float | None


class Store:
    """A campaign's database.

    Args:
        path: campaign.db.
        read_only: Readers never write and never wait for the writer.

    Raises:
        ConfigError: The file is no campaign database, or a newer engine's.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        if read_only and not path.is_file():
            raise ConfigError(f"{path}: no such file; {path.parent} holds no campaign.")
        mode = "ro" if read_only else "rwc"
        if read_only and not os.access(path.parent, os.W_OK) and not _has_log(path):
            # To read a file with a write-ahead log, SQLite makes files beside it; here it cannot,
            # and nobody writes: the log is gone once the last writer has ended.
            mode = "ro&immutable=1"
        self._db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
        )
        try:
            self._prepare(read_only=read_only)
        except sqlite3.DatabaseError as error:
            self._db.close()
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise ConfigError(f"{path}: is not a campaign database: {error}.") from None
        except ConfigError:
            self._db.close()
            raise

    def _prepare(self, *, read_only: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{self.path}: was written by a newer engine (schema {version}, this one reads"
                f" {SCHEMA_VERSION}); update the engine."
            )
        if read_only:
            if version == 0:
                raise ConfigError(f"{self.path}: is not a campaign database.")
            return
        journal = "TRUNCATE" if _on_network_file_system(self.path) else "WAL"
        self._db.execute(f"PRAGMA journal_mode = {journal}")
        self._db.execute("PRAGMA synchronous = NORMAL" if journal == "WAL" else
                         "PRAGMA synchronous = FULL")  # fmt: skip
        self._db.execute("PRAGMA foreign_keys = ON")
        if version == 0:
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise ConfigError(f"{self.path}: is a database, but not a campaign's.")
            self._db.executescript(
                f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;"
            )
        self._db.executescript(_INDEXES)

    def close(self) -> None:
        """Close the file; the write-ahead log is folded in."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk can end the transaction by itself.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------------ the transactions

    def begin_batch(self, trials: Sequence[Trial], controller_state: bytes) -> None:
        """(a) Record a batch's proposals and the controller's state after it proposed them."""
        with self._transaction():
            self._insert(trials)
            self._db.execute("DELETE FROM snapshot WHERE batch < ?", (trials[0].batch,))
            self._db.execute(
                "INSERT INTO snapshot (batch, controller_state) VALUES (?, ?)",
                (trials[0].batch, controller_state),
            )

    def add_trials(self, trials: Sequence[Trial]) -> None:
        """Record trials that are not the search's, before they are evaluated."""
        with self._transaction():
            self._insert(trials)

    def start_attempts(self, ids: Iterable[int]) -> None:
        """Count an attempt of each before it begins: what kills the engine is seen to have."""
        with self._transaction():
            self._db.executemany(
                "UPDATE trial SET attempt = attempt + 1 WHERE id = ? AND outcome IS NULL",
                [(trial_id,) for trial_id in ids],
            )

    def finish_trial(self, trial: Trial, superseded: Sequence[int] = ()) -> bool:
        """(b) Record a result; exactly once: False if the trial already had one.

        Args:
            trial: With its outcome.
            superseded: Ids of the earlier trainings that its accuracy is the mean of, too.
        """
        if superseded:
            with self._transaction():
                self.set_meta(_SUPERSEDED, sorted({*self.superseded(), *superseded}))
                return self._finish(trial)
        return self._finish(trial)

    def _finish(self, trial: Trial) -> bool:
        sets = ", ".join(f"{name} = ?" for name in _RESULT_COLUMNS)
        # One statement is a transaction of its own.
        cursor = self._db.execute(
            f"UPDATE trial SET {sets} WHERE id = ? AND outcome IS NULL",
            [*_values(trial, _RESULT_COLUMNS), trial.id],
        )
        return cursor.rowcount == 1

    def commit_update(
        self,
        batch: int,
        trial_ids: Sequence[int],
        diagnostics: dict[str, float],
        controller_state: bytes | None = None,
    ) -> None:
        """(c) Record that the controller learned from these results, in this order.

        Args:
            batch: The batch, or the number of the update where there are no batches.
            trial_ids: Whose results.
            diagnostics: What the controller says of it.
            controller_state: Afterwards; None where it follows from the state of (a).
        """
        with self._transaction():
            self._db.execute(
                "INSERT INTO batch_update (batch, trial_ids, diagnostics, created_at)"
                " VALUES (?, ?, ?, ?)",
                (batch, json.dumps(list(trial_ids)), json.dumps(diagnostics), time.time()),
            )
            if controller_state is not None:
                self._db.execute("UPDATE snapshot SET controller_state = ?", (controller_state,))

    # ------------------------------------------------------------------ the rest

    def add_measurement(self, measurement: Measurement) -> int:
        """Record a measurement and return its id."""
        cursor = self._db.execute(
            "INSERT INTO measurement (graph_hash, device_fingerprint, verdict, median_ms, iqr_ms,"
            " payload, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                measurement.graph_hash,
                measurement.device_fingerprint,
                measurement.verdict,
                measurement.median_ms,
                measurement.iqr_ms,
                json.dumps(to_plain(measurement)),
                time.time(),
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def find_measurement(
        self, graph_hash: str, device_fingerprint: str
    ) -> tuple[int, Measurement] | None:
        """Return the newest good measurement of a graph on a device; noisy ones don't count."""
        row = self._db.execute(
            "SELECT id, payload FROM measurement WHERE graph_hash = ? AND device_fingerprint = ?"
            " AND verdict = 'ok' ORDER BY id DESC LIMIT 1",
            (graph_hash, device_fingerprint),
        ).fetchone()
        return None if row is None else (row[0], _measurement(row[1]))

    def measurement(self, measurement_id: int) -> Measurement:
        """Return a measurement by id."""
        row = self._db.execute(
            "SELECT payload FROM measurement WHERE id = ?", (measurement_id,)
        ).fetchone()
        if row is None:
            raise ValueError(f"measurement_id must be in the database, but got {measurement_id}")
        return _measurement(row[0])

    def measurement_verdicts(self, ids: Sequence[int]) -> dict[int, tuple[str, float, float]]:
        """Return id -> (verdict, median_ms, iqr_ms) of measurements."""
        rows = self._by_id("SELECT id, verdict, median_ms, iqr_ms FROM measurement", ids)
        return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def set_meta(self, key: str, value: Any) -> None:
        """Record a JSON value under a key."""
        self._db.execute(
            "INSERT INTO meta (key, value) VALUES (?, ?)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, json.dumps(value)),
        )

    def meta(self, key: str, default: Any = None) -> Any:
        """Return the JSON value under a key."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def add_event(self, kind: str, message: str) -> None:
        """Record something that a reader of the campaign should know (a changed setting)."""
        self._db.execute(
            "INSERT INTO event (created_at, kind, message) VALUES (?, ?, ?)",
            (time.time(), kind, message),
        )

    def events(self) -> list[tuple[float, str, str]]:
        """Return (seconds since the epoch, kind, message), oldest first."""
        return list(self._db.execute("SELECT created_at, kind, message FROM event ORDER BY id"))

    def snapshot(self) -> tuple[int, bytes] | None:
        """Return the last (batch, controller state after it proposed that batch)."""
        row = self._db.execute(
            "SELECT batch, controller_state FROM snapshot ORDER BY batch DESC LIMIT 1"
        ).fetchone()
        return None if row is None else (row[0], row[1])

    def updates(self, *, last: int | None = None) -> list[tuple[int, list[int], dict[str, float]]]:
        """Return (batch, trial ids, diagnostics) of every update, or the `last` ones, in order."""
        limit = -1 if last is None else last
        rows = self._db.execute(
            "SELECT batch, trial_ids, diagnostics FROM batch_update ORDER BY batch DESC LIMIT ?",
            (limit,),
        ).fetchall()
        return [(row[0], json.loads(row[1]), json.loads(row[2])) for row in reversed(rows)]

    def diagnostics(self, *, limit: int) -> list[tuple[int, dict[str, float]]]:
        """Return (batch, diagnostics) of about `limit` updates at most, evenly spaced."""
        batches = self._db.execute("SELECT count(*) FROM batch_update").fetchone()[0]
        rows = self._db.execute(
            "SELECT batch, diagnostics FROM batch_update WHERE batch % ? = 0 ORDER BY batch",
            (-(-batches // limit) or 1,),
        )
        return [(row[0], json.loads(row[1])) for row in rows]

    def has_update(self, batch: int) -> bool:
        """Whether the controller has learned from a batch."""
        row = self._db.execute("SELECT 1 FROM batch_update WHERE batch = ?", (batch,)).fetchone()
        return row is not None

    def trials(self, *, batch: int | None = None, role: str | None = None) -> list[Trial]:
        """Return trials in order of id.

        Args:
            batch: Only this batch's.
            role: Only this role's; None takes all of the search's.
        """
        conditions, values = ([_SEARCHED], []) if role is None else (["role = ?"], [role])
        if batch is not None:
            conditions.append("batch = ?")
            values.append(str(batch))
        return list(self._trials(f"WHERE {' AND '.join(conditions)} ORDER BY id", values))

    def others(self) -> list[Trial]:
        """Return the trials that are not the search's, in the order in which they were made."""
        return list(self._trials(f"WHERE NOT {_SEARCHED} ORDER BY id DESC"))

    def superseded(self) -> frozenset[int]:
        """Return the ids of trainings whose network was trained again: their mean counts there."""
        return frozenset(self.meta(_SUPERSEDED, []))

    def best(self, count: int) -> list[Trial]:
        """Return the `count` different networks of the search with the highest reward, best first.

        Of equal rewards the earliest comes first. Of a network that was trained several times the
        last training counts, whose accuracy is the mean of all.
        """
        chosen: dict[str, Trial] = {}
        superseded = self.superseded()
        for trial in self._trials(
            f"WHERE +{_SEARCHED} AND outcome IS NOT NULL AND reward IS NOT NULL"
            " ORDER BY reward DESC, id"
        ):
            if trial.id in superseded:
                continue
            chosen.setdefault(trial.architecture_hash, trial)
            if len(chosen) == count:
                break
        return list(chosen.values())

    def open_trials(self) -> list[Trial]:
        """Return the search's trials without a result, in order of id."""
        # Not `outcome IS NULL`, for which every row would be read.
        return list(
            self._trials(
                f"WHERE {_SEARCHED} AND id IN (SELECT id FROM trial"
                " EXCEPT SELECT id FROM trial WHERE outcome IS NOT NULL) ORDER BY id"
            )
        )

    def unlearned_trials(self) -> list[Trial]:
        """Return the search's trials whose results no update names, in the order they ended.

        Failures of the machine are left out: no update ever names them.
        """
        return list(
            self._trials(
                f"WHERE {_SEARCHED} AND outcome IS NOT NULL AND {_OWN_FAULT}"
                " AND id NOT IN"
                " (SELECT value FROM batch_update, json_each(batch_update.trial_ids))"
                " ORDER BY finished_at, id"
            )
        )

    def learned_trials(self) -> Iterator[Trial]:
        """Yield the trials whose results some update names. Reads every row."""
        yield from self._trials(
            "WHERE id IN (SELECT value FROM batch_update, json_each(batch_update.trial_ids))"
        )

    def trial(self, trial_id: int) -> Trial | None:
        """Return one trial, or None."""
        return next(self._trials("WHERE id = ?", [trial_id]), None)

    def trials_by_id(self, ids: Sequence[int]) -> list[Trial]:
        """Return the trials with these ids, in order of id; unknown ids are left out."""
        rows = self._by_id(f"SELECT {', '.join(_COLUMNS)} FROM trial", sorted(ids))
        return [_trial(row) for row in rows]

    def _trials(self, rest: str, values: Sequence[Any] = ()) -> Iterator[Trial]:
        """The trials that the rest of a SELECT statement chooses, read as they are taken."""
        rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM trial {rest}", values)
        return (_trial(row) for row in rows)

    def figures(self) -> Iterator[TrialFigures]:
        """Yield the figures of all trials in order of id, in many short reads.

        For large campaigns: a million rows take seconds and next to no memory.
        """
        last_id, decode = -(2**63), json.JSONDecoder().raw_decode
        while True:
            rows = self._db.execute(
                "SELECT id, role, outcome, accuracy, metrics, reward, failure, finished_at"
                " FROM trial WHERE id > ? ORDER BY id LIMIT ?",
                (last_id, _PAGE),
            ).fetchall()
            for trial_id, role, outcome, accuracy, metrics, *rest in rows:
                latency_ms = decode(metrics)[0].get("latency_ms") if metrics else None
                yield TrialFigures(trial_id, role, outcome, accuracy, latency_ms, *rest)
            if len(rows) < _PAGE:
                return
            last_id = rows[-1][0]

    def own_results(
        self, architecture_hashes: Sequence[str], epochs: float
    ) -> dict[str, list[Trial]]:
        """Return by network the trials at this fidelity with a result of their own, oldest first.

        Trials of an earlier campaign count; full trainings do not. Results that are the machine's
        fault don't count, so that the network is evaluated again, unless it is quarantined.
        Networks without one are left out.
        """
        found: dict[str, list[Trial]] = {}
        for start in range(0, len(architecture_hashes), _IDS):
            part = architecture_hashes[start : start + _IDS]
            for trial in self._trials(
                f"WHERE architecture_hash IN ({', '.join('?' * len(part))}) AND epochs = ?"
                " AND role <> 'finalist' AND outcome IS NOT NULL AND reused_from IS NULL"
                f" AND ({_OWN_FAULT} OR json_extract(failure, '$.quarantined'))"
                # Those of an earlier campaign come first; their ids count down.
                " ORDER BY id >= 0, abs(id)",
                [*part, epochs],
            ):
                found.setdefault(trial.architecture_hash, []).append(trial)
        return found

    def training_s(self) -> float:
        """Return the time of all the search's trainings, in seconds, summed over the workers.

        Reads every row: seconds for a large campaign.
        """
        row = self._db.execute(
            "SELECT coalesce(sum(json_extract(timings, '$.train_s')), 0) FROM trial"
            f" WHERE {_SEARCHED} AND timings IS NOT NULL"
        ).fetchone()
        return float(row[0])

    def last_success(self) -> int:
        """Return the highest id of a search trial that has a result and did not fail, or -1."""
        row = self._db.execute(
            f"SELECT id FROM trial NOT INDEXED WHERE {_SEARCHED}"
            " AND outcome IS NOT NULL AND outcome <> 'failed' ORDER BY id DESC LIMIT 1"
        ).fetchone()
        return int(row[0]) if row else -1

    def last_failure(self) -> str:
        """Return the reason of the search's last failure, or an empty string."""
        row = self._db.execute(
            "SELECT json_extract(failure, '$.reason') FROM trial"
            f" WHERE +{_SEARCHED} AND reward IS NULL AND outcome = 'failed'"
            " ORDER BY id DESC LIMIT 1"
        ).fetchone()
        return str(row[0]) if row else ""

    def counts(self) -> dict[str, int]:
        """Return outcome -> number of search trials; `pending` for those without a result."""
        # One pass over an index; GROUP BY would sort a million rows.
        each = ", ".join(f"count(*) FILTER (WHERE outcome = '{name}')" for name in _OUTCOMES)
        ended = self._db.execute(
            f"SELECT (SELECT count(*) FROM trial WHERE +{_SEARCHED}), {each} FROM trial"
            f" WHERE +{_SEARCHED} AND outcome IS NOT NULL"
        ).fetchone()
        counts = {
            "pending": ended[0] - sum(ended[1:]),
            **dict(zip(_OUTCOMES, ended[1:], strict=True)),
        }
        return {name: count for name, count in counts.items() if count}

    def rewards(self) -> dict[str, tuple[int, float, float]]:
        """Return role -> (number, highest, mean) of the rewards of the search's trials."""
        each = ", ".join(
            f"{figure} FILTER (WHERE role = '{role}')"
            for role in _SEARCHED_ROLES
            for figure in ("count(*)", "max(reward)", "avg(reward)")
        )
        superseded = self.superseded()
        # Most campaigns have none, and looking in an empty list takes half as long again.
        without = "AND id NOT IN (SELECT value FROM json_each(?))" if superseded else ""
        figures = self._db.execute(
            f"SELECT {each} FROM trial WHERE +{_SEARCHED} AND outcome IN ('completed', 'reused')"
            f" {without}",
            [json.dumps(sorted(superseded))] if superseded else [],
        ).fetchone()
        by_role = {role: figures[3 * k : 3 * k + 3] for k, role in enumerate(_SEARCHED_ROLES)}
        return {role: found for role, found in by_role.items() if found[0]}

    def next_ids(self) -> tuple[int, int]:
        """Return the next free (trial id, batch index) of the search."""
        row = self._db.execute(
            "SELECT (SELECT coalesce(max(id), -1) FROM trial),"
            " (SELECT coalesce(max(batch), -1) FROM trial)"
        ).fetchone()
        return max(row[0], -1) + 1, row[1] + 1

    def next_other_id(self) -> int:
        """Return the next free id of a trial that is not the search's; they count down from -1."""
        row = self._db.execute("SELECT min(0, coalesce(min(id), 0)) - 1 FROM trial").fetchone()
        return int(row[0])

    def _by_id(self, select: str, ids: Sequence[int]) -> list[Any]:
        """The rows of a SELECT that have these ids, read a few hundred at a time."""
        rows: list[Any] = []
        for start in range(0, len(ids), _IDS):
            part = ids[start : start + _IDS]
            marks = ", ".join("?" * len(part))
            rows += self._db.execute(f"{select} WHERE id IN ({marks}) ORDER BY id", part)
        return rows

    def _insert(self, trials: Sequence[Trial]) -> None:
        marks = ", ".join("?" * len(_COLUMNS))
        self._db.executemany(
            f"INSERT INTO trial ({', '.join(_COLUMNS)}) VALUES ({marks})",
            [_values(trial, _COLUMNS) for trial in trials],
        )


_encode = json.JSONEncoder(allow_nan=False, default=to_plain).encode


def _values(trial: Trial, columns: Sequence[str]) -> list[Any]:
    values = [getattr(trial, name) for name in columns]
    for index, name in enumerate(columns):
        if name in _JSON_COLUMNS and values[index] is not None:
            values[index] = _encode(values[index])
    return values


def _trial(row: Sequence[Any]) -> Trial:
    values = {
        name: json.loads(value) if name in _JSON_COLUMNS and value is not None else value
        for name, value in zip(_COLUMNS, row, strict=True)
    }
    return build(Trial, values, where="campaign.db: trial")


def _measurement(payload: str) -> Measurement:
    return build(Measurement, json.loads(payload), where="campaign.db: measurement")


def _on_network_file_system(path: Path) -> bool:
    """Whether SQLite's write-ahead log, which needs shared memory, must be avoided."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if str(folder) in mounts:
            kind = mounts[str(folder)]
            return kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")
    return False


def _has_log(path: Path) -> bool:
    return path.with_name(f"{path.name}-wal").exists()
