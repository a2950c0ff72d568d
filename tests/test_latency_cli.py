"""`mnas latency` and `python -m latency`: tables, JSON, one sentence for bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from campaigns import mnas, mnas_here
from test_json_page import documented

import latency.__main__
from latency.checks import Finding
from latency.compare import Comparison, compare
from latency.device import DeviceConfig, LatencyMeter
from latency.measurement import Measurement
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, graph_hash
from space.mnasnet import published
from space.records import build, parse_yaml

TINY = "stem8_s11 | r1_k3_s11_e1_i8_o8 | head32 | r16 | c10 | in1"


def room(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "latency", *arguments],
        capture_output=True, text=True, timeout=120, check=False, cwd=cwd,
    )  # fmt: skip


def one_object(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout + done.stderr
    value: dict[str, Any] = json.loads(lines[0])
    return value


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """This host, one attempt per measurement, however busy it is."""
    path = tmp_path / "quick.yaml"
    path.write_text("name: quick\nkind: onnxruntime\neffort: quick\nattempts: 1\n")
    return str(path)


class DriftingMeter(LatencyMeter):
    """Gets 1 % slower with every measurement; the small network takes half as long."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"name": "drifting"}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        base = 1.0 if architecture == published("mnasnet-small") else 2.0
        sample = base * 1.01 ** len(self.measured)
        self.measured.append(architecture.hash)
        return Measurement(
            (sample,) * 5, 1, 0, 1, graph_hash(architecture), self.identity(), {}, {}
        )


def test_networks_are_measured_in_turn_so_that_a_drift_meets_both_alike() -> None:
    meter = DriftingMeter()
    small, large = published("mnasnet-small"), published("mnasnet-a1")
    found = compare(meter, small, large, rounds=8)
    assert meter.measured == [small.hash, large.hash] * 8
    # 15 % of drift in all, and of a ratio the 1 % that lies within a round.
    assert found.ratio == pytest.approx(2.02)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.verdict == "the first is faster"
    assert found.noisy == 0
    assert compare(meter, large, small).verdict == "the second is faster"


def test_an_interval_that_holds_1_shows_no_difference() -> None:
    comparison = Comparison((1.0,), (1.0,), (1.0,), 1.0, 0.98, 1.03, 0)
    assert comparison.verdict == "no difference is shown"


def test_fewer_rounds_than_an_interval_needs_are_refused() -> None:
    small = published("mnasnet-small")
    with pytest.raises(ValueError, match="rounds must be >= 6, but got 5"):
        compare(DriftingMeter(), small, small, rounds=5)
    done = mnas("latency", "compare", "mnasnet-small", "mnasnet-a1", "--rounds", "5")
    assert done.returncode == 2
    assert "--rounds" in done.stderr


def test_compare_speaks_json(quick: str) -> None:
    done = mnas(
        "latency", "compare", TINY, TINY, "--resolution", "32", "--device", quick, "--json"
    )
    report = one_object(done)
    assert len(report["ratios"]) == len(report["first_ms"]) == 6
    assert report["ratio_low"] <= report["ratio"] <= report["ratio_high"]
    assert report["second"].endswith("| r32 | c10 | in1")
    assert set(report) <= documented("**`mnas latency compare")


def test_compare_prints_a_table(quick: str) -> None:
    shown = room("compare", TINY, TINY, "--device", quick)
    assert "second / first" in shown.stdout
    assert "6 times each, in turn" in shown.stdout


def test_the_room_s_own_command_line_measures(quick: str) -> None:
    figures = one_object(room("measure", TINY, "--device", quick, "--json"))
    assert figures["median_ms"] > 0
    assert figures["device"]["name"] == "quick"


def test_the_configurations_on_the_page_are_valid() -> None:
    page = (Path(__file__).parents[1] / "docs" / "latency.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    kinds = [build(DeviceConfig, parse_yaml(b, where="page"), where="page").kind for b in blocks]  # type: ignore[arg-type, attr-defined]
    assert kinds == ["ssh", "command", "pool", "ssh"]


def test_devices_says_what_each_is() -> None:
    done = mnas_here("latency", "devices")
    assert "board.local over ssh" in done.stdout
    assert "this host, ONNX Runtime, 2 threads" in done.stdout
    assert "onnx2tf and adb, 1 thread, batch 1, means of 50 runs" in done.stdout
    assert one_object(mnas_here("latency", "devices", "--json"))["ssh_board"]["kind"] == "ssh"


def test_check_says_what_is_there_and_exits_with_1_where_something_is_lacking(
    tmp_path: Path,
) -> None:
    done = mnas("latency", "check", "host")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("OK       python")
    tool = tmp_path / "tool.yaml"
    tool.write_text(
        "name: tool\nkind: command\nrun: [no-such-tool, '{model}']\n"
        "parse: {kind: regex, pattern: '(?P<value>.*)', unit: ms, each: sample}\n"
    )
    done = room("check", str(tool), "--json")
    assert done.returncode == 1
    report = one_object(done)
    names = {field.name for field in dataclasses.fields(Finding)}
    assert {*report, *names} <= documented("**`mnas latency check")
    assert report["findings"][0]["state"] == "lacks"


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["measure", "mnasnet-smal"], 2, "did you mean 'mnasnet-small'?"),
        (["measure", "mnasnet-small", "--device", "hots"], 2, "did you mean 'host'?"),
        (["compare", "mnasnet-small"], 2, "'SECOND'"),
        (["check"], 2, "'DEVICE'"),
        (["mesure"], 2, "mesure"),
        (["measure", "mnasnet-small", "--device", "android_tflite"], 1, "measuring failed: "),
    ],
)
def test_bad_input_and_a_device_without_a_figure_get_one_sentence(
    arguments: list[str], status: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = mnas_here(*arguments, main=latency.__main__.main)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert done.stderr.startswith("mnas: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_loads_no_runtime() -> None:
    code = (
        "import sys; sys.argv = ['latency', 'measure', '--help']\n"
        "from latency.cli import make_app\n"
        "make_app(None)(standalone_mode=False)\n"
        "print(sorted({'onnx', 'onnxruntime', 'numpy', 'mindspore'} & set(sys.modules)),"
        " file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "--device" in done.stdout
    assert done.stderr.strip() == "[]"
