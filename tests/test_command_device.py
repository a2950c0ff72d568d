"""The command device: the shipped Android profiles with stand-in tools, rules, and every fault."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from boards import program

from latency.checks import check_device
from latency.command import CommandMeter, times
from latency.contract import check_meter
from latency.device import CommandConfig, DeviceConfig, load_device, make_meter
from latency.lock import device_lock, host_lock
from latency.processes import Finished
from space.architecture import graph_hash, parse_architecture
from space.errors import ConfigError, MeasurementError
from space.records import build, to_plain

STAND_INS = Path(__file__).with_name("stand_ins.py")
SMALL = parse_architecture(
    "stem8_s11 | r1_k3_s11_e1_i8_o8 | r2_k3_s22_e3_i8_o16_se0.25 | head32 | r16 | c10 | in1"
)
NUMBERS = "import sys; print('\\n'.join(f't={1 + i / 100}' for i in range(int(sys.argv[1]))))"
GOOD: dict[str, Any] = {
    "name": "tool",
    "kind": "command",
    "run": [sys.executable, "-c", NUMBERS, "{runs}"],
    "parse": {"kind": "regex", "pattern": "t=(?P<value>.*)", "unit": "ms", "each": "sample"},
    "runs": 10,
}


def config(**changes: Any) -> CommandConfig:
    made: CommandConfig = build(DeviceConfig, {**GOOD, **changes}, where="test")  # type: ignore[assignment, arg-type]
    return made


def fault(changed: CommandConfig) -> MeasurementError:
    with pytest.raises(MeasurementError) as caught:
        CommandMeter(changed).measure(SMALL)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for a phone; returns the folder that plays its /data/local/tmp."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("adb", "onnx2tf", "converter_lite"):
        program(tools / name, f'#!/bin/sh\nexec {sys.executable} {STAND_INS} {name} "$@"\n')
    folder = tmp_path / "phone" / "data" / "local" / "tmp"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PHONE", str(tmp_path / "phone"))
    return folder


# ---------------------------------------------------------------------------- shipped profiles


@pytest.mark.parametrize(
    ("name", "median_ms", "inner", "samples"),
    [
        ("android_onnxruntime", 1.85674, 1, 100),
        ("android_tflite", 33.0718, 50, 10),
        ("android_mindspore_lite", 72.556, 50, 10),
    ],
)
def test_a_shipped_profile_reads_what_its_tool_prints(
    phone: Path, name: str, median_ms: float, inner: int, samples: int
) -> None:
    meter = make_meter(load_device(name))
    taken = meter.measure(SMALL)
    assert taken.median_ms == pytest.approx(median_ms, rel=0.011)
    assert (taken.inner_iterations, len(taken.samples_ms)) == (inner, samples)
    assert taken.graph_hash == graph_hash(SMALL)
    assert taken.device == meter.identity()
    assert taken.device["identified"] == ["Stand-in 1", "stand/in:14/UP1A/1:user/release-keys"]
    meaning = "one inference" if inner == 1 else "mean of the 50 inferences of one call"
    assert taken.environment["sample"].startswith(meaning)
    assert list(phone.iterdir()) == []
    json.dumps(to_plain(taken), allow_nan=False)


def test_a_phone_that_is_offline_is_the_device_s_fault(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "offline")
    error = fault(load_device("android_tflite"))  # type: ignore[arg-type]
    assert "identify failed with status 1: adb: error: device offline" in str(error)
    assert error.cause == "infrastructure"


def test_a_network_that_the_phone_rejects_is_the_network_s_fault(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "rejects")
    error = fault(load_device("android_onnxruntime"))  # type: ignore[arg-type]
    assert "run failed with status 255: Could not find an implementation" in str(error)
    assert error.cause == "architecture"
    assert list(phone.iterdir()) == []


def test_a_tool_that_made_fewer_runs_than_asked_for_is_not_believed(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "fewer runs")
    error = fault(load_device("android_tflite"))  # type: ignore[arg-type]
    assert "it was asked for 50 runs, but made 7" in str(error)


def test_a_check_names_the_programs_that_are_missing(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = {f.name: f.state for f in check_device(load_device("android_tflite"))}
    assert findings == {"onnx2tf": "ok", "adb": "ok", "identity": "ok"}
    monkeypatch.setenv("PATH", "/nonexistent")
    findings = {f.name: f.state for f in check_device(load_device("android_tflite"))}
    assert findings == {"onnx2tf": "lacks", "adb": "lacks", "identity": "lacks"}


# ---------------------------------------------------------------------------- a measurement


def test_samples_are_taken_in_order_and_in_milliseconds() -> None:
    parse = {**GOOD["parse"], "unit": "us"}
    taken = CommandMeter(config(parse=parse)).measure(SMALL)
    assert taken.samples_ms == pytest.approx([(1 + i / 100) / 1000 for i in range(10)])
    assert (taken.inner_iterations, taken.attempts, taken.warmup_runs) == (1, 1, 1)


def test_the_command_meter_keeps_the_contract() -> None:
    results = check_meter(make_meter(config()), SMALL)
    assert [r for r in results if not r.passed] == []


def test_a_noisy_tool_is_asked_again_and_the_best_attempt_kept() -> None:
    noisy = "for t in range(1, 6): print('t=%d' % t)"
    taken = CommandMeter(config(run=[sys.executable, "-c", noisy], attempts=2)).measure(SMALL)
    assert taken.attempts == 2
    assert taken.verdict == "noisy"
    assert len(taken.environment["spreads"]) == 2


def test_an_argument_with_spaces_and_dollars_stays_one_argument(tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    odd = f"{{runs}} $(touch {bait}); `touch {bait}`"
    check = "import sys; assert len(sys.argv) == 2, sys.argv; print(sys.argv[1])"
    changed = config(
        run=[sys.executable, "-c", check, odd],
        fetch=[sys.executable, "-c", NUMBERS, "{runs}"],
    )
    assert CommandMeter(changed).measure(SMALL).median_ms > 0
    assert not bait.exists()


def test_braces_that_are_doubled_stand_for_themselves() -> None:
    taken = CommandMeter(config(run=["awk", "BEGIN {{print}}"], fetch=GOOD["run"])).measure(SMALL)
    assert taken.median_ms > 0


def test_the_environment_reaches_the_tool_and_the_identity() -> None:
    show = "import os; print('\\n'.join(['t=' + os.environ['TIME_OF_A_TOOL']] * 5))"
    changed = config(run=[sys.executable, "-c", show], env={"TIME_OF_A_TOOL": "2.5"})
    taken = CommandMeter(changed).measure(SMALL)
    assert taken.median_ms == 2.5
    assert taken.device["env"] == {"TIME_OF_A_TOOL": "2.5"}


@pytest.mark.parametrize(
    "changes",
    [{"threads": 2}, {"runs": 11}, {"warmup": 2}, {"identify": [["echo", "other"]]}, {"batch": 2}],
)
def test_identity_tells_conditions_apart_that_change_the_figure(changes: dict[str, Any]) -> None:
    assert CommandMeter(config(**changes)).identity() != CommandMeter(config()).identity()


# ---------------------------------------------------------------------------- faults


def test_a_missing_program_is_named() -> None:
    error = fault(config(run=["no-such-tool", "{model}"]))
    assert "run needs the program 'no-such-tool', which cannot be started: No such file" in str(
        error
    )
    assert error.cause == "infrastructure"


def test_a_tool_that_hangs_is_killed_with_its_children_and_cleaned_up(tmp_path: Path) -> None:
    done = tmp_path / "done"
    hang = "import subprocess; subprocess.run(['sleep', '1234'])"
    changed = config(
        run=[sys.executable, "-c", hang], cleanup=[["touch", str(done)]], time_limit_s=1.0
    )
    assert "run did not end within time_limit_s (1 s) and was killed" in str(fault(changed))
    assert done.exists()
    names = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert ["sleep", "1234"] not in names


def test_a_tool_that_dies_is_said_to_have_died() -> None:
    die = "import os; os.kill(os.getpid(), 9)"
    assert "run failed with status -9: nothing printed" in str(
        fault(config(run=[sys.executable, "-c", die]))
    )


def test_endless_output_is_cut() -> None:
    assert "run printed without end and was killed" in str(fault(config(run=["yes"])))


def test_a_cleanup_that_fails_is_recorded_and_the_figure_kept() -> None:
    taken = CommandMeter(config(cleanup=[["false"]])).measure(SMALL)
    assert "cleanup failed with status 1" in taken.environment["cleanup"]


def test_one_process_measures_at_a_time() -> None:
    with device_lock("command-tool", "on tool", 5.0):
        error = fault(config(lock_timeout_s=0.05))
    assert "another process has been measuring on tool" in str(error)
    assert error.cause == "infrastructure"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nothing", "it has no time in 'nothing"),
        ("t=abc", "could not convert string to float"),
        ("t=-1", "times must be > 0, but it has -1.0"),
        ("t=nan", "times must be > 0, but it has nan"),
        ("t=1", "at least 5 times are needed"),
    ],
)
def test_output_that_is_not_as_promised_is_no_figure(output: str, message: str) -> None:
    assert message in str(fault(config(run=["echo", output])))


def printed(text: str) -> Finished:
    return Finished(0, text, "", "ended")


def test_a_json_rule_follows_keys_positions_and_stars() -> None:
    def rule(path: str) -> CommandConfig:
        return config(parse={"kind": "json", "path": path, "unit": "ms", "each": "sample"})

    text = '{"runs": [{"ms": 1}, {"ms": 2.5}], "all": {"ms": [3, 4]}}'
    assert times(rule("runs.*.ms"), printed(text)) == [1.0, 2.5]
    assert times(rule("all.ms.1"), printed(text)) == [4.0]
    assert times(rule("all.ms.*"), printed(text)) == [3.0, 4.0]
    for path, message in (
        ("runs.*.s", "leads nowhere at 's'"), ("all", "must lead to numbers"),
        ("runs.7.ms", "leads nowhere at '7'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            times(rule(path), printed(text))
    with pytest.raises(ValueError, match="not one JSON document"):
        times(rule("runs"), printed("Runs: 7"))


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run": []}, "run must start with a program"),
        ({"run": "tool {model}"}, "run must be a list, but got 'tool {model}'"),
        ({"run": ["tool", "{modle}"]}, "got {modle}; did you mean 'model'?"),
        ({"run": ["tool", "{remote_model}"]}, "{remote_model} only with a remote_folder"),
        ({"run": ["tool", "{converted}"]}, "{converted} only with convert"),
        ({"identify": [["tool", "{model}"]]}, "identify must use known placeholders"),
        ({"converted": "{folder}/a"}, "converted must name the file that convert makes"),
        ({"convert": [["a"]], "converted": "{model}"}, "converted must use known placeholders"),
        ({"model_format": "tflite"}, "model_format must be one of onnx, but got 'tflite'"),
        ({"remote_folder": "/a;b"}, "remote_folder must be a path of letters"),
        ({"rejects": "("}, "rejects must be a regular expression"),
        ({"runs": 0}, "runs must be in [1, 100000], but got 0"),
        ({"parse": {**GOOD["parse"], "each": "mean"}}, "invocations must be >= 5"),
        ({"parse": {**GOOD["parse"], "unit": "hours"}}, "parse.unit must be one of s, ms, us, ns"),
        ({"parse": {**GOOD["parse"], "pattern": "("}}, "parse.pattern must be a regular"),
        ({"parse": {**GOOD["parse"], "pattern": "x"}}, "must have a group (?P<value>...)"),
        ({"parse": {"kind": "xml"}}, "parse has the unknown kind 'xml'"),
    ],
)
def test_a_wrong_value_gets_a_sentence_with_the_rule(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert sentence in str(caught.value)


def test_identity_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "tool.yaml"
    path.write_text(json.dumps(to_plain(config(identify=[["echo", "a phone"]]))))
    text = (
        "import json, sys\n"
        "from latency.device import load_device, make_meter\n"
        "print(json.dumps(make_meter(load_device(sys.argv[1])).identity()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, str(path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    here = make_meter(load_device(str(path))).identity()
    assert json.loads(done.stdout) == here
    assert dataclasses.replace(config(), lock_timeout_s=1.0).name == here["name"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_by_a_signal_ends_its_tool_and_cleans_up(
    number: signal.Signals, tmp_path: Path
) -> None:
    begun, done, device = tmp_path / "begun", tmp_path / "done", tmp_path / "tool.yaml"
    hang = f"import pathlib, time; pathlib.Path({str(begun)!r}).write_text(''); time.sleep(60)"
    tool = {**GOOD, "run": [sys.executable, "-c", hang], "cleanup": [["touch", str(done)]]}
    device.write_text(json.dumps(tool))
    command = [sys.executable, "-m", "latency", "measure", SMALL.text, "--device", str(device)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not begun.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "mnas: stopped.\n")
    assert done.exists()
    running = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not any(hang in arguments for arguments in running)


def test_two_profiles_of_one_phone_and_a_tool_on_this_host_wait_for_one_another() -> None:
    with device_lock("command-emulator-5554", "on it", 5.0):
        error = fault(config(address="emulator-5554", lock_timeout_s=0.05))
    assert "another process has been measuring" in str(error)
    with host_lock(5.0):
        assert CommandMeter(config(lock_timeout_s=0.05)).measure(SMALL).samples_ms
        error = fault(config(shares_cores=True, lock_timeout_s=0.05))
    assert "another process has been measuring on this host" in str(error)
