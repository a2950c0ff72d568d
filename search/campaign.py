"""Campaign: the folder that holds everything of a search, and the rules for opening it.

    config.yaml      the resolved configuration
    campaign.db      every trial, measurement and update
    campaign.log     what happened, with times and trial ids
    log.jsonl        the same for programs
    finalists/       one folder for each network that was fully retrained
    export/          the winner: architecture and ONNX; its weights are in finalists/
    report.html      made from the database at the end, or by `mnas report`

One process writes, and holds campaign.lock; another that wants to write is refused and told who
holds it. Readers open the database read-only and need no lock. While the process lives it touches
campaign.owner.json, from which another host can tell that it does.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
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

#: The owner's file is touched so often, and its owner believed to be gone after so long: clocks of
#: hosts that share a folder differ, and shared file systems tell late.
BEAT_S, SILENCE_S = 30.0, 300.0


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
        self._ended = threading.Event()

    def __enter__(self) -> Campaign:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # Only readers on other hosts look at it, and the end of the campaign takes it away.
            with contextlib.suppress(OSError):
                os.utime(_owner_file(self.folder))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
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
    if folder.is_dir() and not _is_free(folder):
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


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, or holds no more than a campaign that was killed as it began."""
    paths = list(folder.iterdir())
    # A kill amid a write leaves `.config.yaml.PID.tmp`.
    names = {path.name for path in paths if not (path.suffix == ".tmp" and path.name[0] == ".")}
    begun = {"campaign.lock", "campaign.owner.json", "config.yaml"}
    # Without our lock the config.yaml is somebody's own.
    return not names or ("campaign.lock" in names and names <= begun)


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
    if refused and all(key.split(".")[0] == "retrain" for key, _, _ in refused):
        # What becomes of the best networks is open until the first of them is handed over.
        with contextlib.closing(open_to_read(folder)) as reading:
            refused = refused if reading.trials(role="finalist") else []
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
    write_atomically(_owner_file(folder), json.dumps(owner).encode())
    return lock


def _holder(folder: Path) -> str:
    try:
        owner = json.loads(_owner_file(folder).read_text())
        since = datetime.datetime.fromtimestamp(owner["started"]).isoformat(" ", "seconds")
        return f" by process {owner['pid']} on {owner['host']} since {since}"
    except (OSError, ValueError, KeyError):
        return " by another process"


def _release(folder: Path, lock: Any) -> None:
    _owner_file(folder).unlink(missing_ok=True)
    lock.release()


def _owner_file(folder: Path) -> Path:
    return folder / "campaign.owner.json"


def running_on(folder: Path) -> str | None:
    """Return the host on which a process holds the campaign's lock, or None.

    On another host it cannot be looked for: it runs as long as it touches its file.
    """
    path = _owner_file(folder)
    try:
        owner = json.loads(path.read_text())
        host, pid, started = str(owner["host"]), int(owner["pid"]), float(owner["started"])
        if host != socket.gethostname():
            return host if time.time() - path.stat().st_mtime < SILENCE_S else None
        # A process's start is counted from the clock, which may have been set since: one that has
        # touched its file lately is the same, too.
        touched = time.time() - path.stat().st_mtime < 2 * BEAT_S
        same = abs(psutil.Process(pid).create_time() - started) < 1 or touched
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return None
    return host if same else None


def running_text(host: str) -> str:
    """Return `running`, with where and how that is known if it is another host."""
    if host == socket.gethostname():
        return "running"
    return f"running on {host} (cannot be checked from here; it was heard of lately)"
