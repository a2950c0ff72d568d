"""The ssh device against a real OpenSSH server on loopback: what it measures, and every fault."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from boards import SSHD, Board, free_port, make_key, program, python_with, running_board
from onnx import TensorProto, helper, numpy_helper

from latency import remote, runs
from latency.checks import check_device
from latency.contract import check_meter
from latency.device import DeviceConfig, PoolConfig, SshConfig, make_meter
from latency.lock import device_lock
from latency.remote import SHIPPED, SshMeter, ssh_command
from space.architecture import graph_hash, parse_architecture
from space.errors import MeasurementError
from space.records import build, to_plain

ROOT = Path(__file__).parents[1]
SMALL = parse_architecture(
    "stem8_s11 | r1_k3_s11_e1_i8_o8 | r2_k3_s22_e3_i8_o16_se0.25 | head32 | r16 | c10 | in1"
)

pytestmark = pytest.mark.skipif(SSHD is None, reason="needs Debian's package openssh-server")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with running_board(tmp_path_factory.mktemp("board")) as running:
        yield running


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))


@pytest.fixture
def remote_folder(tmp_path: Path) -> Path:
    """Where the board puts its temporary folder; empty afterwards, whatever happened."""
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


def fault(config: SshConfig) -> MeasurementError:
    with pytest.raises(MeasurementError) as caught:
        SshMeter(config).measure(SMALL)
    assert "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------------------- a measurement


def test_a_measurement_is_the_board_s_and_leaves_nothing_there(
    board: Board, remote_folder: Path
) -> None:
    device = SshMeter(board.config(folder=str(remote_folder)))
    taken = device.measure(SMALL)
    assert 0 < taken.median_ms < 1000
    assert len(taken.samples_ms) >= 5
    assert taken.graph_hash == graph_hash(SMALL)
    assert taken.device == device.identity()
    assert taken.environment["cores"] == [max(os.sched_getaffinity(0))]
    assert {"hostname", "governor", "temperature_c", "load_average", "onnx"} <= set(
        taken.environment
    )
    assert taken.metrics["peak_memory_mb"] > taken.metrics["model_mb"] > 0
    json.dumps(to_plain(taken), allow_nan=False)
    assert list(remote_folder.iterdir()) == []


def test_the_ssh_meter_keeps_the_contract(board: Board) -> None:
    results = [
        r for r in check_meter(make_meter(board.config()), SMALL) if "medians" not in r.name
    ]
    assert [r for r in results if not r.passed] == []
    assert len(results) >= 9


def test_the_identity_names_the_machine_and_no_secret(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SshMeter(board.config())
    identity = device.identity()
    assert (identity["kind"], identity["host"]) == ("ssh", "127.0.0.1")
    assert identity["runtime"].startswith("onnxruntime ")
    assert identity["processor"]
    text = json.dumps(identity)
    assert str(board.folder) not in text
    assert "user" not in identity
    # Asked once: the board need not be there any more.
    monkeypatch.setenv("PATH", "/nonexistent")
    assert device.identity() == identity


def test_int8_is_quantized_here_and_timed_there(board: Board) -> None:
    taken = SshMeter(board.config(precision="int8")).measure(SMALL)
    assert taken.device["precision"] == "int8"
    assert taken.device["calibration"] == "4 random images"


def test_settings_reach_the_board(board: Board) -> None:
    core = min(os.sched_getaffinity(0))
    taken = SshMeter(board.config(cores=(core,))).measure(SMALL)
    assert taken.environment["cores"] == [core]
    assert "the cores that this process may use" in str(fault(board.config(threads=1024)))
    assert "provider must be one of" in str(fault(board.config(provider="NoSuchProvider")))


# ---------------------------------------------------------------------------- the connection


def test_a_host_that_cannot_be_reached_is_said_to_be(board: Board) -> None:
    error = fault(board.config(port=free_port()))
    assert "127.0.0.1: it cannot be reached (" in str(error)
    assert error.cause == "infrastructure"


def test_a_wrong_host_key_is_refused(board: Board, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{board.port} {make_key(tmp_path / 'other_key')}")
    error = fault(board.config(known_hosts=str(known)))
    assert "its host key is not the one in known_hosts" in str(error)
    assert error.cause == "infrastructure"


def test_an_unknown_host_key_is_refused_and_not_learnt(board: Board, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.touch()
    assert "host key" in str(fault(board.config(known_hosts=str(known))))
    assert known.read_text() == ""


def test_a_refused_key_is_a_sentence_and_no_question(board: Board, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    assert "it refused the login" in str(
        fault(board.config(identity_file=str(tmp_path / "stranger")))
    )


def test_a_host_without_ssh_says_what_to_install(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "install OpenSSH's client" in str(fault(board.config()))


def test_nothing_of_the_configuration_reaches_a_shell(board: Board, tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    odd = tmp_path / "a b"
    odd.mkdir()
    python = program(odd / "python 3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    taken = SshMeter(board.config(python=python, folder=str(odd))).measure(SMALL)
    assert taken.median_ms > 0
    quoting = f"/$(touch {bait});`touch {bait}`"
    error = fault(board.config(folder=quoting))
    assert "cannot take the files" in str(error)
    assert not bait.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "-oProxyCommand=touch x"}, "host must be a host's name"),
        ({"host": "a b"}, "host must be a host's name"),
        ({"user": "-x"}, "user must be a user's name"),
        ({"python": "python3; touch x"}, "python must be a program's name"),
        ({"python": "-c"}, "python must be a program's name"),
        ({"identity_file": 'a" -o "b'}, "identity_file must be a path"),
        ({"known_hosts": "%h"}, "known_hosts must be a path"),
        ({"folder": "tmp"}, "folder must be an absolute path"),
        ({"port": 0}, "port must be in"),
        ({"connect_timeout_s": 0.0}, "connect_timeout_s must be in"),
    ],
)
def test_a_configuration_that_could_pass_for_an_option_or_a_command_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(DeviceConfig, {"name": "b", "kind": "ssh", "host": "b", **changes}, where="test")  # type: ignore[arg-type]


def test_every_word_of_the_remote_line_is_quoted() -> None:
    argv = ssh_command(SshConfig("b", "ssh", "board", python="/opt/my python"), 10)
    assert argv[-2] == "board"
    assert argv[-3] == "--"
    assert argv[-1].startswith("'/opt/my python' -c 'import sys;")
    assert "StrictHostKeyChecking=yes" in argv
    assert "BatchMode=yes" in argv


# ---------------------------------------------------------------------------- the board


def test_a_board_without_python_says_so(board: Board) -> None:
    error = fault(board.config(python="/no/such/python"))
    assert "has no Python called '/no/such/python'" in str(error)
    assert error.cause == "infrastructure"


def test_a_python_that_is_too_old_says_so(board: Board, tmp_path: Path) -> None:
    # The stand-in is given `-c PROGRAM` and executes it as if it were an older Python.
    pretend = "import sys; sys.version_info = (3, 6, 0); exec(sys.argv[2])"
    python = program(
        tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$@"\n'
    )
    error = fault(board.config(python=python))
    assert "127.0.0.1: Python >= 3.8 is needed, but this is 3.6; set `python`" in str(error)


def test_a_board_without_onnxruntime_says_what_to_install(board: Board, tmp_path: Path) -> None:
    python = python_with(tmp_path, onnxruntime="raise ImportError('not there')")
    error = fault(board.config(python=python))
    assert "lacks onnxruntime (ImportError: not there); install it there" in str(error)


#: A stand-in for ONNX Runtime whose sessions do something else.
RUNTIME = """
__version__ = "1.0 (stand-in)"
import json, os, signal, sys, time
def get_available_providers(): return ["CPUExecutionProvider"]
class ExecutionMode: ORT_SEQUENTIAL = 0
class RunOptions: pass
class SessionOptions:
    def add_session_config_entry(self, key, value): pass
    def set_load_cancellation_flag(self, flag): pass
def InferenceSession(*arguments, **options):
    {act}
"""


def acting(folder: Path, act: str) -> str:
    return python_with(folder, onnxruntime=RUNTIME.format(act=act))


def test_a_runner_that_dies_amid_its_work_is_said_to_have_died(
    board: Board, tmp_path: Path, remote_folder: Path
) -> None:
    python = acting(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    error = fault(board.config(python=python, folder=str(remote_folder)))
    assert "the runner on 127.0.0.1 died with signal 9" in str(error)
    assert error.cause == "infrastructure"
    assert list(remote_folder.iterdir()) == []


def test_a_supervisor_that_dies_is_a_lost_connection(
    board: Board, tmp_path: Path, remote_folder: Path
) -> None:
    python = acting(tmp_path, "os.kill(os.getppid(), signal.SIGKILL)")
    error = fault(board.config(python=python, folder=str(remote_folder)))
    assert "ended before an answer came" in str(error)


@pytest.mark.parametrize(
    "act",
    [
        "print('Bus error? {]'); os._exit(0)",
        "print(json.dumps({'timing': 7})); sys.stdout.flush(); os._exit(0)",
        "print(json.dumps({'timing': {}, 'runtime': 0})); sys.stdout.flush(); os._exit(0)",
        "print(json.dumps({'timing': float('nan')})); sys.stdout.flush(); os._exit(0)",
    ],
)
def test_garbage_in_place_of_an_answer_is_no_figure(
    board: Board, tmp_path: Path, act: str
) -> None:
    error = fault(board.config(python=acting(tmp_path, act)))
    assert "cannot be read" in str(error) or "another machine" in str(error)
    assert error.cause == "infrastructure"


@pytest.mark.parametrize(
    "text",
    [
        "Welcome!", "[1, 2]", '{"status"', "", '{"status": "0"}', '{"fault": 7}',
        '{"status": 0, "output": "{}"}',
    ],
)  # fmt: skip
def test_a_python_that_answers_nonsense_is_no_python(
    board: Board, tmp_path: Path, text: str
) -> None:
    python = program(tmp_path / "python", f"#!/bin/sh\nprintf '%s\\n' '{text}'\n")
    assert "cannot be read" in str(fault(board.config(python=python)))


def test_endless_output_is_cut(board: Board, tmp_path: Path) -> None:
    python = program(tmp_path / "python", "#!/bin/sh\nexec yes\n")
    assert "there was too much of it" in str(fault(board.config(python=python)))


def test_a_measurement_that_hangs_is_killed_by_the_board_s_own_alarm(
    board: Board, tmp_path: Path, remote_folder: Path
) -> None:
    python = acting(tmp_path, "time.sleep(1000)")
    error = fault(board.config(python=python, folder=str(remote_folder), time_limit_s=0.2))
    assert "hung and was killed after time_limit_s (0.2 s)" in str(error)
    assert error.cause == "infrastructure"
    assert list(remote_folder.iterdir()) == []


def test_a_runner_that_ignores_its_alarm_is_killed_by_the_supervisor(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "START_S", 2.5)
    act = "signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(1000)"
    error = fault(board.config(python=acting(tmp_path, act), time_limit_s=0.5))
    assert "hung and was killed after 3 s" in str(error)


def test_a_board_that_freezes_is_given_up_and_no_ssh_is_left(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SshMeter(board.config(connect_timeout_s=1.0, lock_timeout_s=0.0, time_limit_s=0.5))
    device.identity()
    frozen = program(tmp_path / "python", "#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(remote, "START_S", 0.0)
    monkeypatch.setattr(remote, "TRANSFER_S", 0.5)
    monkeypatch.setattr(device, "_config", dataclasses.replace(device._config, python=frozen))
    with pytest.raises(
        MeasurementError, match=r"gave no answer within 2\.[0-9]+ s and was given up"
    ):
        device.measure(SMALL)
    left = [p.name() for p in psutil.Process().children(recursive=True) if p.name() == "ssh"]
    assert left == []


def test_the_runner_is_killed_when_the_sender_is(board: Board, tmp_path: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    act = f"print(os.getpid(), file=open({str(started)!r}, 'w')); time.sleep(1000)"
    program_text = (
        "import sys\n"
        "from latency.device import load_device, make_meter\n"
        "from space.architecture import parse_architecture\n"
        f"make_meter(load_device(sys.argv[1])).measure(parse_architecture({SMALL.text!r}))\n"
    )
    device = tmp_path / "board.yaml"
    device.write_text(json.dumps(to_plain(board.config(python=acting(tmp_path, act)))))
    sender = subprocess.Popen([sys.executable, "-c", program_text, str(device)], cwd=ROOT)
    try:
        runner = psutil.Process(int(started.read_text()))
        for child in psutil.Process(sender.pid).children(recursive=True):
            child.kill()
        runner.wait(timeout=30)
    finally:
        sender.kill()
        sender.wait(timeout=10)


def test_a_full_disk_on_the_board_is_said_to_be_full(board: Board, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mount = f'mount -t tmpfs -o size=64k tmpfs {full} && exec {sys.executable} "$@"'
    probe = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", "-c", ""],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    if probe.returncode != 0:
        pytest.skip("this kernel lets nobody mount a small disk of his own")
    python = program(
        tmp_path / "python", f"#!/bin/sh\nexec unshare -rm sh -c '{mount}' sh \"$@\"\n"
    )
    device = SshMeter(board.config())
    device.identity()
    with pytest.raises(MeasurementError, match=r"the disk of 127.0.0.1 is full: .*are needed"):
        SshMeter(board.config(python=python, folder=str(full))).measure(SMALL)


def test_a_disk_that_fills_while_files_arrive_is_full_too(
    board: Board, tmp_path: Path, remote_folder: Path
) -> None:
    # A limit on the size of a file fails the same write that a full disk fails.
    python = program(
        tmp_path / "python", f'#!/bin/bash\nulimit -f 1\nexec {sys.executable} "$@"\n'
    )
    error = fault(board.config(python=python, folder=str(remote_folder)))
    assert "the disk of 127.0.0.1 is full" in str(error)
    assert list(remote_folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(board: Board) -> None:
    assert "cannot take the files: /no/such: No such file" in str(
        fault(board.config(folder="/no/such"))
    )


# ---------------------------------------------------------------------------- one at a time


@contextlib.contextmanager
def board_measuring_itself(cache: Path) -> Iterator[None]:
    """Another process on the board that holds its lock, as `kind: onnxruntime` there would."""
    text = (
        "import sys\n"
        "from latency.lock import host_lock\n"
        "with host_lock(10.0):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
    finally:
        process.communicate(timeout=60)


def test_a_board_that_measures_for_another_host_or_itself_is_waited_for(board: Board) -> None:
    config = board.config(lock_timeout_s=0.2)
    with board_measuring_itself(board.cache):
        error = fault(config)
        assert "another process has been measuring on 127.0.0.1 for 0.2 s" in str(error)
        assert "locked there" in str(error)
        assert error.cause == "infrastructure"
    assert SshMeter(config).measure(SMALL).median_ms > 0


def test_two_processes_here_measure_on_a_board_one_after_the_other(board: Board) -> None:
    config = board.config(lock_timeout_s=0.0)
    with device_lock(f"ssh-127.0.0.1-{board.port}", "on it", 5.0):
        error = fault(config)
    assert "another process has been measuring on 127.0.0.1" in str(error)
    assert "there" not in str(error)


def test_a_pool_retires_a_board_that_cannot_be_reached_and_measures_on_the_other(
    board: Board,
) -> None:
    gone = board.config(name="gone", port=free_port())
    meter = make_meter(PoolConfig("rack", "pool", (gone, board.config()), retire_after=1))
    networks = [SMALL, dataclasses.replace(SMALL, head_filters=64)]
    found = dict(meter.measure_all(networks))
    assert [found[network].environment["member"] for network in networks] == ["board"] * 2
    assert found[SMALL].device == meter.identity()
    assert (found[SMALL].device["kind"], found[SMALL].device["member"]) == ("pool", "ssh")


# ---------------------------------------------------------------------------- the network's fault


def broken_model(node: onnx.NodeProto, constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    images = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 16, 16])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "broken", [images], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


@pytest.mark.parametrize(
    ("node", "constants", "message"),
    [
        (helper.make_node("NoSuchOperator", ["input"], ["logits"]), [], "rejects the network"),
        (
            helper.make_node("Reshape", ["input", "shape"], ["logits"]),
            [numpy_helper.from_array(np.array([7, 7], np.int64), "shape")],
            "failed to run the network",
        ),
    ],
)
def test_a_graph_that_the_board_refuses_is_the_network_s_fault(
    board: Board,
    node: onnx.NodeProto,
    constants: list[onnx.TensorProto],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = broken_model(node, constants)
    monkeypatch.setattr(runs, "onnx_model", lambda architecture, style: model)
    error = fault(board.config())
    assert message in str(error)
    assert error.cause == "architecture"


def test_a_network_that_takes_too_long_there_is_the_network_s_fault(board: Board) -> None:
    slow = dataclasses.replace(SMALL, resolution=1024, stem_filters=64)
    with pytest.raises(MeasurementError, match="longer than time_limit_s") as caught:
        SshMeter(board.config(time_limit_s=0.2)).measure(slow)
    assert caught.value.cause == "architecture"


# ---------------------------------------------------------------------------- what is sent


def test_what_is_sent_needs_nothing_else_of_ours_and_an_old_python() -> None:
    allowed = {"numpy", "onnxruntime", *sys.stdlib_module_names}
    modules = {path.removesuffix(".py").replace("/", ".") for path in SHIPPED}
    for path in (*SHIPPED, "latency/supervisor.py"):
        tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            strangers = [n for n in names if n.split(".")[0] not in allowed and n not in modules]
            assert strangers == [], path


# ---------------------------------------------------------------------------- the check


def test_a_check_says_what_the_board_has(board: Board) -> None:
    findings = {finding.name: finding for finding in check_device(board.config())}
    assert list(findings) == [
        "ssh client", "reachable", "host key", "login", "python", "numpy", "onnxruntime",
        "provider", "cores", "memory", "free disk", "governor", "load",
        "temperature", "processor",
    ]  # fmt: skip
    assert all(finding.state != "lacks" for finding in findings.values())
    assert findings["python"].text.startswith(sys.version.split()[0])
    assert getpass.getuser() not in findings["login"].text


def test_a_check_says_what_the_board_lacks(board: Board, tmp_path: Path) -> None:
    python = python_with(tmp_path, onnxruntime="raise ImportError('not there')")
    findings = {f.name: f for f in check_device(board.config(python=python))}
    assert findings["numpy"].state == "ok"
    assert findings["onnxruntime"].state == "lacks"
    assert "not there" in findings["onnxruntime"].text
    known = tmp_path / "known_hosts"
    known.touch()
    findings = {f.name: f for f in check_device(board.config(known_hosts=str(known)))}
    assert findings["reachable"].state == "ok"
    assert findings["host key"].state == "lacks"
    assert findings["python"].state == "unknown"
