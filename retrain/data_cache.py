"""Prepared arrays in files that all processes of a machine map: one copy in memory, made once."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

#: Raised whenever the same files and settings would give other arrays.
_FORMAT = 1
#: Less is not worth a file.
_MIN_BYTES = 16 * 2**20
_NOT_SHARED = "%s cannot be written (%s): each process keeps the images in its own memory"


def mapped_arrays(
    settings: dict[str, Any], sources: list[Path], make: Callable[[], Arrays]
) -> Arrays:
    """Return arrays that the settings and source files decide, mapped read-only from files.

    The first process makes the files, in the user's cache folder (`mnas/data`, which may be
    deleted at any time); the others wait for it. A source that changes its size or time of change
    is another one. Small arrays, and all where the folder cannot be written, stay in memory.

    Args:
        settings: Plain values that decide the arrays, beside the files.
        sources: The files that they are made from.
        make: Makes them, by name.
    """
    folder = platformdirs.user_cache_path("mnas") / "data" / _key(settings, sources)
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(folder.with_name(".lock")).acquire()
        except OSError as error:
            logger.warning(_NOT_SHARED, folder, error)
            return make()
        with held:
            # It may have been made while this process waited.
            if not folder.is_dir():
                arrays = make()
                if not _write(folder, arrays):
                    return arrays
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _key(settings: dict[str, Any], sources: list[Path]) -> str:
    files = []
    for path in sources:
        status = path.stat()
        files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    text = json.dumps([_FORMAT, settings, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(folder: Path, arrays: Arrays) -> bool:
    """Write the arrays, whole or not at all; say whether they were."""
    if sum(values.nbytes for values in arrays.values()) < _MIN_BYTES:
        return False
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        # A killed process may have left one.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        logger.warning(_NOT_SHARED, folder, error)
        return False
    return True
