"""A file of measurements that campaigns share, so that no network is timed twice on one device.

A SQLite database of one table. A campaign copies what it takes from there into its own
campaign.db, which stays whole without the file. Several campaigns may have it open at once.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from pathlib import Path

from latency.measurement import Measurement
from space.errors import ConfigError
from space.records import build, to_plain

logger = logging.getLogger(__name__)

#: Marks the file as ours (SQLite's application_id): "mnas" in ASCII.
_APPLICATION_ID = 0x6D6E6173

_TABLE = """
CREATE TABLE IF NOT EXISTS measurement (
    graph_hash TEXT NOT NULL,
    device_fingerprint TEXT NOT NULL,
    payload TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (graph_hash, device_fingerprint)
) WITHOUT ROWID
"""


class MeasurementCache:
    """The newest good measurement of each network on each device.

    The key is what was timed (space.architecture.graph_hash) and the device's fingerprint, which
    covers the runtime's version, threads, cores, precision, batch and effort.

    Args:
        path: Is made if there is none.

    Raises:
        ConfigError: The file cannot be opened, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A rollback journal, SQLite's default: unlike a write-ahead log it needs no shared
            # memory, so that the file may lie on a network's file system.
            # An asynchronous search measures in a thread of its own, and nowhere else meanwhile.
            self._db = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except sqlite3.Error as error:
            raise ConfigError(
                f"measurement_cache: {path} cannot be used: {error}; name another file."
            ) from None

    def _prepare(self) -> None:
        # For writing at once: a file that cannot be written is found now, not after a measurement.
        self._db.execute("BEGIN IMMEDIATE")
        mark = self._db.execute("PRAGMA application_id").fetchone()[0]
        if mark != _APPLICATION_ID:
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._db.close()
                raise ConfigError(
                    f"measurement_cache: {self.path} is a database of something else; name another"
                    " file."
                )
            self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute(_TABLE)
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def find(self, graph_hash: str, device_fingerprint: str) -> Measurement | None:
        """Return the measurement of a graph on a device, if there is one."""
        row = self._db.execute(
            "SELECT payload FROM measurement WHERE graph_hash = ? AND device_fingerprint = ?",
            (graph_hash, device_fingerprint),
        ).fetchone()
        if row is None:
            return None
        return build(Measurement, json.loads(row[0]), where=f"{self.path}: measurement")

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement in the place of an older one; not if it is noisy or drifted.

        A file that cannot be written now (locked for long, a full disk) is no reason to stop: the
        campaign has the measurement in its own database.
        """
        if measurement.verdict != "ok":
            return
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO measurement VALUES (?, ?, ?, ?)",
                (
                    measurement.graph_hash,
                    measurement.device_fingerprint,
                    json.dumps(to_plain(measurement), allow_nan=False),
                    time.time(),
                ),
            )
        except sqlite3.OperationalError as error:
            logger.warning("measurement_cache: %s is not written: %s", self.path, error)
