"""Locks that keep two measurements on one device apart, across processes."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import filelock
import platformdirs

from latency.processes import heed_breaking_off, is_breaking_off
from space.errors import MeasurementError


@contextlib.contextmanager
def host_lock(timeout_s: float) -> Iterator[None]:
    """Hold this host's one lock for measuring, whatever the devices on it are called.

    The same file is locked where another machine measures on this one through `ssh`
    (latency/supervisor.py), so that the two respect each other.

    Raises:
        MeasurementError: See `device_lock`.
    """
    with device_lock(socket.gethostname(), "on this host", timeout_s):
        yield


def file_name(name: str) -> str:
    """Return a device's name with `_` for whatever a file's name cannot hold."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


@contextlib.contextmanager
def device_lock(name: str, where: str, timeout_s: float) -> Iterator[None]:
    """Hold the lock of a device.

    All processes of this user on this host respect it; it falls with the process that holds it.

    Args:
        name: Tells devices apart; what a file's name cannot hold becomes `_`.
        where: The device in a message: `on this host`.
        timeout_s: How long to wait while another process holds it.

    Raises:
        MeasurementError: It is held by another for longer than the time-out, or cannot be made.
        BrokenOff: See latency.processes.breaking_off.
    """
    folder = platformdirs.user_cache_path("mnas")
    path = folder / f"measuring-{file_name(name)}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        held = lock.acquire(timeout=timeout_s, cancel_check=is_breaking_off)
    except filelock.Timeout:
        heed_breaking_off()
        raise MeasurementError(
            f"another process has been measuring {where} for {timeout_s:g} s ({path} is"
            " locked); wait for it or raise lock_timeout_s"
        ) from None
    except OSError as error:
        raise MeasurementError(
            f"{path} cannot be locked: {error.strerror or error}; set XDG_CACHE_HOME to a folder"
            " that can be written"
        ) from error
    with held:
        yield
