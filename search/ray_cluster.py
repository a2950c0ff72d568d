"""Ray's door: joins a cluster, or starts one on this machine, for executor and devices alike."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

from space.errors import ConfigError

if TYPE_CHECKING:
    from search.config import RayConfig


def connect(config: RayConfig) -> Any:
    """Return Ray, joined to the cluster that a configuration names, or to a new local one.

    Raises:
        ConfigError: The cluster cannot be joined.
    """
    # Workers inherit these; the driver's own environment decides where nothing is set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.exceptions
    import ray.util
    import ray.util.scheduling_strategies

    # Its remarks about a cluster's defaults are not for the user of a campaign; errors still come.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():  # the executor and a device at a node share a connection
        return ray
    _check_reachable(config.address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        environment = config.runtime_env or None
        if config.address is None:
            ray.init(
                address="local",  # a cluster that happens to run on this machine is not joined
                runtime_env=environment,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=200 * 2**20,
                configure_logging=False,
            )
        else:
            ray.init(
                address=config.address,
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, TypeError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        if config.runtime_env and ray.is_initialized():
            ray.shutdown()
        raise ConfigError(
            f"executor.address: cannot join Ray at {config.address!r}: {first_line}"
        ) from error
    # Ray's own handler prints a stack and ends the engine at once.
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    return ray


def _check_reachable(address: str | None) -> None:
    """Refuse at once a cluster that nobody listens for: Ray would try for minutes.

    Raises:
        ConfigError: No connection to `host:port` within 5 s.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"executor.address: no Ray cluster answers at {address!r} ({error}); start it with"
            " `ray start --head`, or leave the address out for a local one."
        ) from None


def gist(error: Exception) -> str:
    """Return one line of an error of Ray's: the exception that ended the worker, if it tells."""
    lines = str(error).strip().splitlines() or [""]
    # After the worker's traceback, its exception is the last line; a dead process has none.
    traced = any(line.lstrip().startswith("File ") for line in lines)
    return lines[-1 if traced else 0].strip()
