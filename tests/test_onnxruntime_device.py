"""The ONNX Runtime device on this host: what it reports, pins, locks, refuses and gives back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from boards import program
from onnx import TensorProto, helper, numpy_helper

from latency import reports, runner, runs
from latency.contract import check_meter, too_large
from latency.device import LatencyMeter, OnnxRuntimeConfig, make_meter
from latency.measurement import Measurement
from latency.timing import Timing, TimingProtocol, time_runs
from space.architecture import (
    PAPER_STYLE,
    Architecture,
    NetworkStyle,
    graph_hash,
    parse_architecture,
)
from space.errors import MeasurementError
from space.records import to_plain

SMALL = parse_architecture(
    "stem8_s11 | r1_k3_s11_e1_i8_o8 | r2_k3_s22_e3_i8_o16_se0.25 | head32 | r16 | c10 | in1"
)
QUICK = OnnxRuntimeConfig("here", "onnxruntime", effort="quick", attempts=1)

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two threads are pinned to two cores"
)


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def meter(**changes: Any) -> LatencyMeter:
    return make_meter(dataclasses.replace(QUICK, **changes))


def timing(*samples_ms: float, settled: bool = True) -> Timing:
    return Timing(samples_ms, 1, 10, settled, "narrow")


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Timing]], list[Timing]]:
    """Gives the meter timings instead of the clock's; returns those not yet used."""

    def use(given: list[Timing]) -> list[Timing]:
        def next_timing(run: Callable[[], None], protocol: TimingProtocol, **_: object) -> Timing:
            run()
            return given.pop(0)

        monkeypatch.setattr(runner, "time_runs", next_timing)
        monkeypatch.setattr(runner, "FEWEST_RUNNING", 0.0)  # this machine may be busy
        return given

    return use


# ---------------------------------------------------------------------------- a measurement


def test_a_measurement_says_what_was_timed_where_and_under_which_conditions() -> None:
    device = meter()
    taken = device.measure(SMALL)
    assert 0 < taken.median_ms < 1000
    assert len(taken.samples_ms) >= 5
    assert taken.device == device.identity()
    assert taken.graph_hash == graph_hash(SMALL)
    assert taken.metrics["model_mb"] > 0.001
    assert 0 < taken.environment["running_share"] <= 1
    text = json.dumps(to_plain(taken), allow_nan=False)
    assert set(json.loads(text)["environment"]) == {
        "time", "hostname", "system", "python", "mnas", "onnx", "cpu_count", "load_average",
        "frequency_mhz", "governor", "temperature_c", "cores", "others_cpu_share_before",
        "others_cpu_share", "settled", "ending", "running_share", "spreads",
        "pace_s",
    }  # fmt: skip


def test_the_style_is_part_of_what_was_timed() -> None:
    style = NetworkStyle(padding="symmetric")
    assert meter().measure(SMALL, style).graph_hash == graph_hash(SMALL, style)


def test_the_meter_keeps_the_contract() -> None:
    # Two medians on a busy machine may differ: the rest of the contract has no such excuse.
    results = [r for r in check_meter(meter(), SMALL) if "medians" not in r.name]
    assert [r for r in results if not r.passed] == []
    assert len(results) >= 9


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "there"},
        {"batch": 2},
        {"effort": "full"},
        {"cores": (max(os.sched_getaffinity(0)),)},
    ],
)
def test_identity_tells_conditions_apart_that_change_the_figure(changes: dict[str, Any]) -> None:
    assert meter(**changes).identity() != meter().identity()


def test_identity_does_not_depend_on_how_often_or_how_long_it_is_tried() -> None:
    patient = meter(attempts=7, lock_timeout_s=1.0, time_limit_s=1.0, shares_cores=False)
    assert patient.identity() == meter().identity()


def test_identity_is_the_same_in_another_process() -> None:
    program = (
        "import json\n"
        "from latency.device import OnnxRuntimeConfig, make_meter\n"
        "config = OnnxRuntimeConfig('here', 'onnxruntime', effort='quick')\n"
        "print(json.dumps(make_meter(config).identity()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == meter().identity()


def test_the_whole_batch_is_one_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    bind = onnxruntime.IOBinding.bind_cpu_input

    def recording(binding: Any, name: str, values: Any) -> None:
        shapes.append(values.shape)
        bind(binding, name, values)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_cpu_input", recording)
    meter(batch=3).measure(SMALL)
    assert shapes == [(3, 1, 16, 16)]


# ---------------------------------------------------------------------------- noise


def test_a_noisy_measurement_is_repeated_and_the_quiet_one_kept(timings: Any) -> None:
    left = timings([timing(1, 2, 3), timing(2, 2, 2), timing(9, 9, 9)])
    taken = meter(attempts=3).measure(SMALL)
    assert taken.samples_ms == (2, 2, 2)
    assert taken.attempts == 2
    assert taken.verdict == "ok"
    assert len(left) == 1


def test_a_measurement_that_stays_noisy_keeps_the_best_attempt_and_is_flagged(
    timings: Any,
) -> None:
    left = timings([timing(1, 2, 3), timing(4, 5, 6), timing(1, 5, 9)])
    taken = meter(attempts=3).measure(SMALL)
    assert taken.samples_ms == (4, 5, 6)
    assert taken.attempts == 3
    assert taken.verdict == "noisy"
    assert taken.environment["spreads"] == pytest.approx([0.5, 0.2, 0.8])
    assert left == []


def test_a_measurement_that_did_not_settle_is_repeated(timings: Any) -> None:
    timings([timing(2, 2, 2, settled=False), timing(3, 3, 3)])
    taken = meter(attempts=2).measure(SMALL)
    assert taken.samples_ms == (3, 3, 3)
    assert taken.environment["settled"] is True


def test_a_measurement_during_which_others_had_the_core_is_repeated(
    timings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = timings([timing(2, 2, 2), timing(3, 3, 3)])
    monkeypatch.setattr(runner, "FEWEST_RUNNING", 1.1)  # no thread can run so much
    taken = meter(attempts=2).measure(SMALL)
    assert taken.attempts == 2
    assert left == []
    # Each time: quiet as the samples look, the figure is not to be trusted.
    assert (taken.median_ms, taken.verdict) == (2, "noisy")


# ---------------------------------------------------------------------------- a process of its own


def test_a_process_of_its_own_gives_the_same_and_the_peak_of_memory() -> None:
    device = meter(own_process=True)
    small = device.measure(SMALL)
    wide = device.measure(dataclasses.replace(SMALL, head_filters=65_536))
    assert small.device == device.identity() != meter().identity()
    assert small.environment["cores"] == [max(os.sched_getaffinity(0))]
    # Head and classifier have 1.7 million weights more, and the head's map 4.2 million numbers.
    more_mb = wide.metrics["peak_memory_mb"] - small.metrics["peak_memory_mb"]
    assert 20 < more_mb < 100
    assert 6 < wide.metrics["model_mb"] - small.metrics["model_mb"] < 8
    assert "peak_memory_mb" not in meter().measure(SMALL).metrics


def test_what_is_the_network_s_fault_is_so_in_a_process_of_its_own() -> None:
    slow = dataclasses.replace(SMALL, resolution=1024, stem_filters=64)
    with pytest.raises(MeasurementError, match="longer than time_limit_s") as caught:
        meter(own_process=True, time_limit_s=0.2).measure(slow)
    assert caught.value.cause == "architecture"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died with signal 11"),
        ("print('{]')", "gave an answer that cannot be read: '{]'"),
        ("print('{}')", "here gave an answer that cannot be read: KeyError"),
        ("sys.exit('no memory')", "died with exit status 1: 'no memory'"),
        ("signal.setitimer(signal.ITIMER_REAL, 0.1); time.sleep(1000)", "hung and was killed"),
        ("time.sleep(1000)", "hung and was killed"),
        ("print('7' * 9_000_000)", "printed without end and was killed"),
    ],
)
def test_a_process_of_its_own_that_goes_wrong_is_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, message: str
) -> None:
    program_text = f"import os, signal, sys, time; {act}"
    python = program(
        tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} -c "{program_text}"\n'
    )
    monkeypatch.setattr(reports.sys, "executable", python)
    monkeypatch.setattr(reports, "START_S", 2.0)
    with pytest.raises(MeasurementError, match=message) as caught:
        meter(own_process=True, time_limit_s=0.5).measure(SMALL)
    assert caught.value.cause == "infrastructure"


@pytest.mark.parametrize("changes", [{"own_process": True}, {"precision": "int8"}])
def test_a_disk_that_takes_no_file_is_the_device_s_fault(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    with pytest.raises(MeasurementError, match="a temporary file cannot be written") as caught:
        meter(**changes).measure(SMALL)
    assert caught.value.cause == "infrastructure"


# ---------------------------------------------------------------------------- cores, sessions


def test_the_thread_is_pinned_while_it_measures_and_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = os.sched_getaffinity(0)
    seen = []

    def recording(run: Callable[[], None], protocol: TimingProtocol, **_: object) -> Timing:
        seen.append(os.sched_getaffinity(0))
        return time_runs(run, protocol)

    monkeypatch.setattr(runner, "time_runs", recording)
    taken = meter().measure(SMALL)
    assert seen == [{max(allowed)}]
    assert taken.environment["cores"] == [max(allowed)]
    assert os.sched_getaffinity(0) == allowed


@needs_two_cores
def test_every_thread_of_the_pool_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = tuple(sorted(os.sched_getaffinity(0))[-2:])
    seen = []
    before = {thread.id for thread in psutil.Process().threads()}

    def recording(run: Callable[[], None], protocol: TimingProtocol, **_: object) -> Timing:
        # Neither Python's own threads (the stopwatch) nor those of earlier tests are the pool's.
        known = before | {thread.native_id for thread in threading.enumerate()}
        started = {thread.id for thread in psutil.Process().threads()} - known
        seen.extend(os.sched_getaffinity(thread) for thread in started)
        return time_runs(run, protocol)

    monkeypatch.setattr(runner, "time_runs", recording)
    meter(threads=2, cores=cores).measure(SMALL)
    assert seen == [{cores[1]}]


def test_a_failed_measurement_frees_the_thread_and_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = os.sched_getaffinity(0)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "time_runs", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            meter().measure(SMALL)
    assert os.sched_getaffinity(0) == allowed
    assert gc.isenabled()
    assert meter(lock_timeout_s=0.0).measure(SMALL).median_ms > 0


def test_no_session_outlives_its_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = []
    original = onnxruntime.InferenceSession

    def recording(*arguments: Any, **options: Any) -> Any:
        session = original(*arguments, **options)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    for _ in range(3):
        meter().measure(SMALL)
    assert len(sessions) == 3
    assert [session() for session in sessions] == [None, None, None]


def test_cores_that_were_taken_away_are_a_measurement_s_error() -> None:
    allowed = os.sched_getaffinity(0)
    device = meter(cores=(max(allowed),))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with pytest.raises(MeasurementError, match="cores must be among") as caught:
            device.measure(SMALL)
    finally:
        os.sched_setaffinity(0, allowed)
    assert caught.value.cause == "infrastructure"


# ---------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def another_process_measuring(folder: Path) -> Iterator[None]:
    program = (
        "import sys\n"
        "from latency.lock import host_lock\n"
        "with host_lock(10.0):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
    finally:
        process.communicate(timeout=60)


def test_one_process_measures_at_a_time(tmp_path: Path) -> None:
    impatient = meter(lock_timeout_s=0.05)
    with another_process_measuring(tmp_path / "cache"):
        with pytest.raises(MeasurementError, match="another process has been measuring") as caught:
            impatient.measure(SMALL)
        assert caught.value.cause == "infrastructure"
    assert impatient.measure(SMALL).median_ms > 0


def test_a_lock_that_cannot_be_made_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MeasurementError, match=r"cannot be locked: .*XDG_CACHE_HOME"):
        meter().measure(SMALL)


# ---------------------------------------------------------------------------- what it refuses


def test_a_network_that_fits_no_file_is_refused_before_it_is_built() -> None:
    with pytest.raises(MeasurementError, match="weights must take at most") as caught:
        meter().measure(too_large(SMALL))
    assert caught.value.cause == "architecture"


def test_a_network_whose_maps_fit_no_memory_is_refused_before_it_is_built() -> None:
    wide = dataclasses.replace(SMALL, stem_filters=4096, resolution=4096)
    with pytest.raises(MeasurementError, match="bytes of memory") as caught:
        meter(batch=64).measure(wide)
    assert caught.value.cause == "architecture"


def test_memory_that_is_taken_now_is_not_the_network_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MeasurementError, match="only 1,000 are free now") as caught:
        meter().measure(SMALL)
    assert caught.value.cause == "infrastructure"


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
def test_a_graph_that_the_runtime_refuses_is_the_network_s_fault(
    node: onnx.NodeProto,
    constants: list[onnx.TensorProto],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = broken_model(node, constants)
    monkeypatch.setattr(runs, "onnx_model", lambda architecture, style: model)
    with pytest.raises(MeasurementError, match=message) as caught:
        meter().measure(SMALL)
    assert caught.value.cause == "architecture"


def test_the_time_limit_ends_an_inference_that_is_under_way() -> None:
    slow = dataclasses.replace(SMALL, resolution=1024, stem_filters=64)
    with pytest.raises(MeasurementError, match="longer than time_limit_s"):
        meter(time_limit_s=0.2).measure_in_turn(SMALL, slow, 6)
    with pytest.raises(MeasurementError, match="longer than time_limit_s") as caught:
        meter(time_limit_s=0.2).measure(slow)
    assert caught.value.cause == "architecture"


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a provider that computes nothing of these networks",
)
def test_a_network_is_not_timed_on_the_processor_in_the_place_of_another_provider() -> None:
    with pytest.raises(MeasurementError, match=r"rejects the network|fell back"):
        meter(provider="AzureExecutionProvider").measure(SMALL)


# ---------------------------------------------------------------------------- contract checks


class SteadyMeter(LatencyMeter):
    """Keeps the contract; its subclasses below break one rule each."""

    def identity(self) -> dict[str, Any]:
        return {"name": "steady"}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        return Measurement(
            (1.0, 1.0), 1, 0, 1, graph_hash(architecture, style), self.identity(), {}, {}
        )


class Nameless(SteadyMeter):
    def identity(self) -> dict[str, Any]:
        return {"threads": 1}


class NotJson(SteadyMeter):
    def identity(self) -> dict[str, Any]:
        return {"name": "odd", "since": object()}


class Unstable(SteadyMeter):
    calls = 0

    def identity(self) -> dict[str, Any]:
        self.calls += 1
        return {"name": f"call {self.calls}"}


class Crashing(SteadyMeter):
    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        raise OSError("no cable")


class NumberOnly(SteadyMeter):
    def measure(self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE) -> Any:
        return 1.0


class StyleBlind(SteadyMeter):
    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        return super().measure(architecture)


class Drifting(SteadyMeter):
    calls = 0

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        self.calls += 1
        found = super().measure(architecture, style)
        return dataclasses.replace(found, samples_ms=(1.0 + self.calls,))


class NotANumber(SteadyMeter):
    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        found = super().measure(architecture, style)
        return dataclasses.replace(found, metrics={"watts": float("nan")})


def failed(device: LatencyMeter) -> list[str]:
    return [result.name for result in check_meter(device, SMALL) if not result.passed]


def test_a_meter_that_keeps_the_contract_passes_every_check() -> None:
    assert failed(SteadyMeter()) == []


@pytest.mark.parametrize(
    ("device", "rule"),
    [
        (Nameless(), "identity holds a name"),
        (NotJson(), "identity is a dict of JSON values"),
        (Unstable(), "identity is the same at each call"),
        (Crashing(), "measure gives a Measurement"),
        (NumberOnly(), "measure gives a Measurement"),
        (StyleBlind(), "measure takes a style, or refuses it with MeasurementError"),
        (Drifting(), "medians of two measurements differ by at most 30%"),
        (NotANumber(), "metrics holds finite numbers"),
    ],
)
def test_a_meter_that_breaks_a_rule_fails_its_check(device: LatencyMeter, rule: str) -> None:
    assert rule in failed(device)
