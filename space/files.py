"""What every room that writes files needs: whole files or none, no room, and who wrote them."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = (
    "mnas", "mindspore", "numpy", "ray", "onnx", "onnxruntime", "pydantic", "numba", "safetensors",
)  # fmt: skip


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader or a crash finds the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name itself must be on the disk, too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room: a disk, a quota, a limit of size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def versions() -> dict[str, str]:
    """Return package -> version, and the interpreter's and the system's."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
