"""Campaign: the folder that holds everything of a search, and the rules for opening it.

    config.yaml      the resolved configuration
    campaign.db      every trial, measurement and update
    campaign.log     what happened, with times and trial ids
    finalists/       one folder for each network that was fully retrained
    export/          the winner: architecture, weights, ONNX
    report.html      made from the database at the end, or by `mnas report`

One process writes, and holds campaign.lock; another that wants to write is refused and told who
holds it. Readers open the database read-only and need no lock.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import psutil

from search.config import (
    RESUMABLE,
    CampaignConfig,
    campaign_config,
    config_to_plain,
    differences,
    may_change,
)
from search.store import Store
from space.errors import ConfigError
from space.files import versions, write_atomically
from space.records import apply_overrides, dump_yaml, load_yaml


class Campaign:
    """An open campaign folder whose lock this process holds. Use it as a context manager.

    Attributes:
        folder: The folder.
        config: The resolved configuration.
        store: The database, open for writing.
    """

    def __init__(self, folder: Path, config: CampaignConfig, store: Store, lock: Any) -> None:
        self.folder = folder
        self.config = config
        self.store = store
        self._lock = lock

    def __enter__(self) -> Campaign:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.store.close()
        finally:
            _release(self.folder, self._lock)


def create(folder: Path, config: CampaignConfig) -> Campaign:
    """Return a new campaign in a folder that is empty or does not exist.

    Raises:
        ConfigError: The folder holds another campaign or anything else: nothing is overwritten.
    """
    if (folder / "campaign.db").exists():
        raise ConfigError(
            f"{folder}: holds a campaign already; continue it with `mnas resume {folder}` or"
            " choose another folder with --out."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: must be a folder, but it is a file.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder}: must be empty or not exist yet, but it holds other files;"
            " choose another folder with --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
        write_atomically(folder / "config.yaml", _config_file(config))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror or error}.") from None
    store = Store(folder / "campaign.db", read_only=False)
    store.set_meta("versions", versions())
    store.set_meta("host", socket.gethostname())
    store.set_meta("command", sys.argv)
    store.add_event("created", f"seed {config.seed}")
    return Campaign(folder, config, store, lock)


def open_to_write(folder: Path, overrides: Iterable[str] = ()) -> Campaign:
    """Return an existing campaign to go on with; settings that may change are changed and logged.

    Raises:
        ConfigError: No campaign there, another process holds it, or an override would change what
            its results mean.
    """
    return continue_with(folder, resumed_config(folder, overrides))


def resumed_config(folder: Path, overrides: Iterable[str]) -> CampaignConfig:
    """Return a campaign's saved configuration with `key=value` overrides; needs no lock.

    Raises:
        ConfigError: The folder holds no campaign, or an override is none.
    """
    values = apply_overrides(config_to_plain(read_config(folder)), overrides)
    return campaign_config(values, where="command line", folder=folder)


def continue_with(folder: Path, wanted: CampaignConfig) -> Campaign:
    """Return an existing campaign to go on with under `wanted`, where that is allowed.

    Raises:
        ConfigError: See `open_to_write`; all differences that are not allowed are listed.
    """
    saved = read_config(folder)
    changes = differences(config_to_plain(saved), config_to_plain(wanted))
    refused = [change for change in changes if not may_change(change[0])]
    if refused:
        listed = "; ".join(f"{key} is {ours!r}, given {theirs!r}" for key, ours, theirs in refused)
        raise ConfigError(
            f"{folder}: the saved configuration rules, but the given one differs: {listed}."
            f" Only {', '.join(RESUMABLE)} may change."
        )
    lock = _acquire(folder)
    store = Store(folder / "campaign.db", read_only=False)
    if changes:
        for key, ours, theirs in changes:
            store.add_event("changed", f"{key}: {ours!r} -> {theirs!r}")
        write_atomically(folder / "config.yaml", _config_file(wanted))
    return Campaign(folder, wanted, store, lock)


def read_config(folder: Path) -> CampaignConfig:
    """Return a campaign's resolved configuration; needs no lock.

    Raises:
        ConfigError: The folder holds no campaign.
    """
    path = folder / "config.yaml"
    if not folder.is_dir() or not path.exists():
        raise ConfigError(f"{folder}: holds no campaign (there is no config.yaml in it).")
    return campaign_config(load_yaml(path), where=str(path), folder=folder)


def open_to_read(folder: Path) -> Store:
    """Return a campaign's database for reading, also while another process writes it.

    Raises:
        ConfigError: The folder holds no campaign.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder.")
    return Store(folder / "campaign.db", read_only=True)


def _config_file(config: CampaignConfig) -> bytes:
    header = "# The resolved configuration of this campaign; `mnas resume` reads it.\n"
    return (header + dump_yaml(config_to_plain(config))).encode()


def _acquire(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / "campaign.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(f"{folder}: is in use{_holder(folder)}; only one may write.") from None
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    write_atomically(folder / "campaign.owner.json", json.dumps(owner).encode())
    return lock


def _holder(folder: Path) -> str:
    try:
        owner = json.loads((folder / "campaign.owner.json").read_text())
        since = datetime.datetime.fromtimestamp(owner["started"]).isoformat(" ", "seconds")
        return f" by process {owner['pid']} on {owner['host']} since {since}"
    except (OSError, ValueError, KeyError):
        return " by another process"


def _release(folder: Path, lock: Any) -> None:
    (folder / "campaign.owner.json").unlink(missing_ok=True)
    lock.release()


def is_running(folder: Path) -> bool:
    """Whether some process on this host holds the campaign's lock."""
    try:
        owner = json.loads((folder / "campaign.owner.json").read_text())
        process = psutil.Process(owner["pid"])
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return False
    started: float = owner["started"]
    return owner["host"] == socket.gethostname() and abs(process.create_time() - started) < 1
