"""A campaign as another host sees it that shares its folder."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from campaigns import mnas_here, write_synthetic

from search import campaign, cli
from search.config import load_campaign_config
from search.engine import start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A campaign that another host's process seems to hold."""
    start(load_campaign_config(str(write_synthetic(tmp_path, trials=8))), tmp_path / "run")
    owner = {"host": "elsewhere", "pid": os.getpid(), "started": 0.0}
    (tmp_path / "run" / "campaign.owner.json").write_text(json.dumps(owner))
    return tmp_path / "run"


def silence(folder: Path) -> None:
    """Let the other host have been silent for long."""
    long_ago = time.time() - 2 * campaign.SILENCE_S
    os.utime(folder / "campaign.owner.json", (long_ago, long_ago))


def test_it_runs_there_as_long_as_that_host_is_heard_of(folder: Path) -> None:
    status = json.loads(mnas_here("status", str(folder), "--json").stdout)
    assert (status["state"], status["running_on"]) == ("running", "elsewhere")
    assert "running on elsewhere (cannot be checked from here" in (
        mnas_here("status", str(folder)).stdout.replace("\n", " ")
    )
    silence(folder)
    status = json.loads(mnas_here("status", str(folder), "--json").stdout)
    assert (status["state"], status["running_on"]) == ("finished", None)


def test_status_watches_until_the_other_host_is_silent(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = iter([lambda: None, lambda: None, lambda: silence(folder)])
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: next(waits)())
    cli._watch(folder)
    assert list(waits) == []
    assert "finished" in capsys.readouterr().out


def test_an_open_campaign_is_heard_of_until_it_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "BEAT_S", 0.01)
    with campaign.open_to_write(folder):
        assert campaign.running_on(folder) == socket.gethostname()
        silence(folder)
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        deadline = time.monotonic() + 20
        while campaign.running_on(folder) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert campaign.running_on(folder) is not None
    assert campaign.running_on(folder) is None


@pytest.mark.parametrize("text", ["", "[]", '{"host": "elsewhere"}', '{"pid": {}}'])
def test_an_owners_file_that_is_none_is_nobodys(folder: Path, text: str) -> None:
    (folder / "campaign.owner.json").write_text(text)
    assert campaign.running_on(folder) is None
