"""`mnas latency table` and `predict` on this host, killed and called again; `measure --plot`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_lookup_table import TINY

from latency.cli import make_app
from space.errors import ConfigError
from space.mnasnet import find_architecture
from space.records import build, parse_yaml
from space.search_space import SearchSpace, SpaceConfig

DEVICE = "name: quick\nkind: onnxruntime\neffort: quick\nattempts: 1\n"


def command(folder: Path, *arguments: str) -> list[str]:
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "quick.yaml").write_text(DEVICE)
    (folder / "other.yaml").write_text(DEVICE + "batch: 2\n")
    return [sys.executable, "-m", "latency", *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments),
        capture_output=True, text=True, timeout=240, check=False, cwd=folder,
    )  # fmt: skip


def table_options(device: str = "quick.yaml") -> list[str]:
    return [
        "table", "--device", device, "--space", "tiny.yaml", "--networks", "12",
        "--held-out", "3", "--out", "t.json",
    ]  # fmt: skip


def member() -> str:
    space = SearchSpace(build(SpaceConfig, parse_yaml(TINY, where="tiny"), where="tiny"))
    return space.decode((0,) * len(space.num_choices)).text


def kill_after(folder: Path, lines: int) -> bytes:
    """Start a table, kill it when it has measured a few networks, return what it kept."""
    journal = folder / "t.json.measurements.jsonl"
    with subprocess.Popen(
        command(folder, *table_options()), cwd=folder, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    return journal.read_bytes()


def call(*arguments: str) -> None:
    """Run a command in this process."""
    make_app(find_architecture)(arguments, standalone_mode=False)


@pytest.mark.slow
def test_a_table_of_this_host_survives_kill_9_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = kill_after(tmp_path, 4)
    assert not (tmp_path / "t.json").exists()
    done = run(tmp_path, *table_options(), "--plot", "t.png", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fitted_networks"] == 12
    assert report["held_out"]["networks"] == 3
    journal = (tmp_path / "t.json.measurements.jsonl").read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    assert journal.startswith(whole)
    left = 15 - whole.count(b"\n")
    assert f"1 of {left}: " in done.stderr
    assert " left" in done.stderr
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")

    call("predict", "--table", "t.json", "--device", "quick.yaml", member())
    assert capsys.readouterr().out.startswith("predicted")
    call("predict", "--table", "t.json", "--json", member(), member())
    shown = capsys.readouterr().out
    predictions = json.loads(shown)["predictions"]
    assert [p["architecture"] for p in predictions] == [member()] * 2
    assert predictions[0]["predicted_ms"] > 0
    assert "median_ms" not in shown

    kept = (tmp_path / "t.json").read_bytes()
    refused = {
        "batch 1 and not 2": ["predict", "--table", "t.json", "--device", "other.yaml", member()],
        "t.json: must belong to the device": table_options("other.yaml"),
        "members of the space 'tiny'": ["predict", "--table", "t.json", "mnasnet-a1"],
        "differs in resolution": [*table_options(), "--resolution", "32"],
        "must end in .png": [*table_options(), "--plot", "t.jpg"],
        "t.png: must be UTF-8 text": ["predict", "--table", "t.png", member()],
        "there is no folder": [*table_options()[:-1], "none/t.json"],
    }
    for sentence, arguments in refused.items():
        with pytest.raises(ConfigError) as caught:
            call(*arguments)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "t.json").read_bytes() == kept


@pytest.mark.parametrize("arguments", [["--networks", "9"], ["--held-out", "0"]])
def test_too_few_networks_are_refused(arguments: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, *table_options(), *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_measure_draws_its_samples(tmp_path: Path) -> None:
    done = run(tmp_path, "measure", member(), "--device", "quick.yaml", "--plot", "samples.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
