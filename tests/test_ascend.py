"""The ascend device without an NPU: its steps on a processor, by another name; its faults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from boards import program

from latency import reports
from latency.checks import check_device
from latency.config import AscendConfig
from latency.device import make_meter
from space.architecture import NetworkStyle, graph_hash, parse_architecture
from space.errors import MeasurementError

SMALL = parse_architecture("stem8 | r1_k3_s11_e1_i8_o8_se0.25 | head16 | r16 | c10 | in1")


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GLOG_v", "3")


def config(**changes: Any) -> AscendConfig:
    return AscendConfig("npu", "ascend", effort="quick", attempts=1, **changes)


@pytest.mark.slow
def test_the_same_steps_on_a_processor_are_never_recorded_as_an_npu_s() -> None:
    meter = make_meter(config(target="CPU"))
    style = NetworkStyle(padding="symmetric")
    taken = meter.measure(SMALL, style)
    assert taken.device == meter.identity()
    assert taken.device["kind"] == "mindspore-cpu"
    assert taken.device["runtime"].startswith("mindspore ")
    assert len(taken.samples_ms) >= 5
    assert taken.graph_hash == graph_hash(SMALL, style)
    assert taken.metrics["model_mb"] > 0
    assert "peak_memory_mb" not in taken.metrics


@pytest.mark.slow
def test_a_host_without_an_npu_says_so_and_times_nothing() -> None:
    with pytest.raises(MeasurementError, match="MindSpore cannot use Ascend here") as caught:
        make_meter(config()).measure(SMALL)
    assert caught.value.cause == "infrastructure"
    (finding,) = check_device(config())
    assert (finding.name, finding.state) == ("mindspore", "lacks")


#: A stand-in for the process that loads MindSpore: it knows who it is, then acts.
PRETEND = """\
import json, os, signal, sys, time
runtime = {{"runtime": "mindspore (stand-in)", "processor": "NPU", "machine": "x"}}
if len(sys.argv) == 4:
    print(json.dumps({{"runtime": runtime}}))
else:
    {act}
"""
REPORT = (
    "print(json.dumps({'runtime': runtime, 'attempts': 1, 'peak_memory_bytes': 5000000,"
    " 'environment': {}, 'timing': {'samples_ms': [2.0] * 5, 'inner_iterations': 1,"
    " 'warmup_runs': 3}}))"
)


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    (folder / "pretend.py").write_text(PRETEND.format(act=act))
    python = program(
        folder / "python", f'#!/bin/sh\nexec {sys.executable} {folder}/pretend.py "$@"\n'
    )
    monkeypatch.setattr(reports.sys, "executable", python)


def test_an_npu_s_report_becomes_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch, REPORT)
    taken = make_meter(config(precision="float16")).measure(SMALL)
    assert taken.median_ms == 2.0
    assert (taken.device["kind"], taken.device["processor"]) == ("ascend", "NPU")
    assert taken.metrics["peak_memory_mb"] == 5.0
    assert make_meter(config()).measure(SMALL).metrics["model_mb"] == pytest.approx(
        2 * taken.metrics["model_mb"], abs=1e-6
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "died with signal 9"),
        ("os.kill(os.getpid(), signal.SIGALRM)", "hung and was killed after time_limit_s"),
        ("sys.exit('no driver')", "died with exit status 1: 'no driver'"),
        ("print('{]')", "gave an answer that cannot be read"),
        ("print(json.dumps({'runtime': runtime}))", "gave an answer that cannot be read"),
        ("print(json.dumps({'runtime': {}}))", "MindSpore or the hardware changed"),
        ("time.sleep(1000)", "hung and was killed"),
    ],
)
def test_a_process_that_goes_wrong_is_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, message: str
) -> None:
    pretend(tmp_path, monkeypatch, act)
    meter = make_meter(config(time_limit_s=0.1))
    meter.identity()
    monkeypatch.setattr(reports, "START_S", 3.0)
    with pytest.raises(MeasurementError, match=message) as caught:
        meter.measure(SMALL)
    assert caught.value.cause == "infrastructure"


def test_what_the_npu_cannot_run_is_the_network_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = "print(json.dumps({'fault': 'no kernel', 'cause': 'architecture'}))"
    pretend(tmp_path, monkeypatch, fault)
    with pytest.raises(MeasurementError, match="no kernel") as caught:
        make_meter(config()).measure(SMALL)
    assert caught.value.cause == "architecture"
