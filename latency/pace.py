"""How fast a core's probe was in earlier measurements, kept beside the lock for the next process.

A neighbour who is busy for as long as a measurement lasts slows all its probes alike; only earlier
ones tell. They are the last KEPT measurements', so that a device that changes for good (another
governor, summer) is believed again after so many.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import platformdirs

from latency.lock import file_name
from space.files import write_atomically

KEPT = 20


class PaceHistory:
    """The pace of one core in the last measurements: seconds that the probe took, > 0.

    Use it under the device's lock. A file that is lost or cannot be read is an empty history.

    Args:
        name: Tells cores and interpreters apart: the probe is a loop in Python.
    """

    def __init__(self, name: str) -> None:
        folder = platformdirs.user_cache_path("mnas")
        self._path: Path = folder / f"pace-{file_name(name)}.json"

    def fastest_s(self) -> float | None:
        """Return the fastest of them; None if there is none."""
        return min(self._read(), default=None)

    def add(self, pace_s: object) -> None:
        """Remember another measurement's; one that had no probe gives none."""
        if _is_pace(pace_s):
            paces_s = [*self._read(), pace_s][-KEPT:]
            with contextlib.suppress(OSError):  # a full disk must not cost the figure
                write_atomically(self._path, json.dumps(paces_s).encode())

    def _read(self) -> list[float]:
        try:
            paces_s = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        if not isinstance(paces_s, list):
            return []
        return [p for p in paces_s if _is_pace(p)]


def _is_pace(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
