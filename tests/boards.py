"""An OpenSSH server on loopback that plays the board, and stand-ins for what a board may lack."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latency.device import SshConfig

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv XDG_CACHE_HOME={folder}/cache
LogLevel INFO
"""


@dataclass(frozen=True)
class Board:
    """A running server: its port and the folder with its keys."""

    port: int
    folder: Path

    @property
    def cache(self) -> Path:
        """Where the board keeps its lock."""
        return self.folder / "cache"

    def config(self, **changes: Any) -> SshConfig:
        """The device that it is, for the current user, with this process's Python."""
        settings: dict[str, Any] = {
            "name": "board", "kind": "ssh", "host": "127.0.0.1", "port": self.port,
            "user": getpass.getuser(), "identity_file": str(self.folder / "user_key"),
            "known_hosts": str(self.folder / "known_hosts"), "python": sys.executable,
            "effort": "quick", "attempts": 1, "lock_timeout_s": 30.0, "time_limit_s": 60.0,
        }  # fmt: skip
        return SshConfig(**{**settings, **changes})


def make_key(path: Path) -> str:
    """Make a key without a password; return its public half."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)],
        check=True, timeout=30, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return path.with_name(f"{path.name}.pub").read_text()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_board(folder: Path) -> Iterator[Board]:
    """Start a server for the current user, with keys of its own; no rights are needed."""
    assert SSHD is not None
    port = free_port()
    host_key = make_key(folder / "host_key")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "authorized_keys").write_text(make_key(folder / "user_key"))
    (folder / "sshd_config").write_text(CONFIG.format(port=port, folder=folder))
    if os.getuid() == 0:
        # As root, sshd wants the folder that its service would make.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = (folder / "sshd.log").open("w+")
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Server listening" in line:
                break
        else:
            raise AssertionError(f"sshd did not start: {''.join(lines)}")
        # Somebody must read on: a full pipe would stop it.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
        process.stderr.close()
        yield Board(port, folder)
    finally:
        process.terminate()
        process.wait(timeout=10)
        with contextlib.suppress(UnboundLocalError):
            drain.wait(timeout=10)
        log.close()


def program(path: Path, text: str) -> str:
    """Write an executable script and return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def python_with(folder: Path, **modules: str) -> str:
    """A stand-in for the board's Python: the real one, with modules replaced by these texts."""
    shadow = folder / "shadow"
    shadow.mkdir()
    for name, text in modules.items():
        (shadow / f"{name}.py").write_text(text)
    return program(
        folder / "python", f'#!/bin/sh\nPYTHONPATH={shadow} exec {sys.executable} "$@"\n'
    )
