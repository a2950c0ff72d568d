"""Times an ONNX file with ONNX Runtime, in this process: pinned cores, raw samples.

`python -m latency.runner model.onnx settings.json` prints one JSON line: what `measure` returns,
or `{"fault": ..., "cause": ...}`. This host is timed by the same functions, called directly.

This file is also sent to devices elsewhere (latency/remote.py): of ours it may import only what is
sent along, and it must run on Python 3.8 with numpy and ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from latency.host import (
    CpuTimes,
    allowed_cores,
    check_memory,
    environment,
    memory_bytes,
    processor_name,
    resident_bytes,
)
from latency.timing import FEWEST_SAMPLES, PROTOCOLS, Effort, Timing, probe, time_runs
from space.errors import MeasurementError

if TYPE_CHECKING:  # NumPy 1.20 and earlier have no such module
    from numpy.typing import NDArray

CPU_PROVIDER = "CPUExecutionProvider"

_ERRORS_ONLY = 3

#: An earlier peak of the process's memory that is this much higher would falsify the next one.
_HIDDEN_BYTES = 1 << 20

#: Share of the time that the thread must have had its core; below, the attempt is repeated.
FEWEST_RUNNING = 0.95

#: After the time limit, for ONNX Runtime to stop by itself; then an alarm ends the process.
GRACE_S = 2.0

#: Networks that are timed in turn: seconds of a round, and before it, of its warm-up.
ROUND_S, ROUND_WARM_UP_S = 1.0, 0.2


@dataclass(frozen=True)
class Settings:
    """What to time, and how.

    Attributes:
        shape: Of the input: batch, channels, height, width; float32.
        input_name: Of the graph's input.
        output_name: Of the graph's output.
        provider: ONNX Runtime's execution provider.
        threads: Threads that compute one inference.
        cores: One core per thread; None takes the last ones that may be used.
        effort: Which protocol of latency.timing.
        attempts: How often a noisy measurement is taken.
        time_limit_s: Of all attempts together.
        needed_bytes: Memory that the network needs, about.
        known_pace_s: See latency.timing.time_runs.
    """

    shape: tuple[int, ...]
    input_name: str
    output_name: str
    provider: str
    threads: int
    cores: tuple[int, ...] | None
    effort: Effort
    attempts: int
    time_limit_s: float
    needed_bytes: int
    known_pace_s: float | None


@dataclass(frozen=True)
class Attempt:
    """One whole timing in a session of its own.

    Attributes:
        timing: What it gave.
        running_share: Share of the time that the thread ran: well below 1, other processes had
            the core, and what was timed is their turn, too. None where the provider is not the
            CPU: there the thread waits.
        others_cpu_share: Share of the host's processor time that others took until its end.
        peak_memory_bytes: How far the process's resident memory rose above where it was before
            the session was opened: weights in all their copies, maps, and what the runtime needs
            for itself. None where it cannot be told, or where the process had held more before,
            which would hide it.
    """

    timing: Timing
    running_share: float | None
    others_cpu_share: float | None
    peak_memory_bytes: int | None

    @property
    def kept_core(self) -> bool:
        """Whether the thread had its core for itself, as far as that is known."""
        return self.running_share is None or self.running_share >= FEWEST_RUNNING

    @property
    def is_undisturbed(self) -> bool:
        """Whether the warm-up settled and the thread kept its core."""
        return self.timing.settled and self.kept_core

    @property
    def is_good(self) -> bool:
        """Whether it need not be repeated."""
        return self.is_undisturbed and not self.timing.is_noisy


def measure(model: bytes, settings: Settings, earlier: CpuTimes | None = None) -> dict[str, Any]:
    """Return the best attempt at timing a network, as JSON values.

    What others do before the measurement is told from `earlier` on, or else from a short wait.

    Keys: `timing` (latency.timing.Timing's fields), `attempts` (how many), `peak_memory_bytes` (of
    the first one, see Attempt), `runtime` (see `runtime_identity`), and `environment`: the
    conditions, with `cores`, `spreads` (IQR / median of every attempt), `running_share`, `pace_s`,
    `settled`, `ending`, and the share of others.

    Raises:
        MeasurementError: There is no figure.
    """
    deadline = time.monotonic() + settings.time_limit_s
    if earlier is None:
        earlier = CpuTimes()
        time.sleep(0.1)
    check_memory(settings.needed_bytes, memory_bytes())
    cores = cores_to_use(settings.threads, settings.cores)
    conditions = environment(cores[0])
    before = earlier.others_share()
    attempts = _attempts(model, settings, cores, deadline)
    best = min(
        attempts,
        key=lambda a: (not a.is_undisturbed, a.timing.is_noisy, a.timing.spread),
    )
    timing = best.timing
    if not best.kept_core:
        # Others had the core in turn, in every attempt: that is in each sample.
        everything = tuple(range(len(timing.samples_ms)))
        timing = dataclasses.replace(timing, disturbed=everything)
    return {
        "timing": dataclasses.asdict(timing),
        "attempts": len(attempts),
        "peak_memory_bytes": attempts[0].peak_memory_bytes,
        "runtime": runtime_identity(),
        "environment": {
            **conditions,
            "cores": list(cores),
            "others_cpu_share_before": before,
            "others_cpu_share": best.others_cpu_share,
            "settled": best.timing.settled,
            "ending": best.timing.ending,
            "running_share": best.running_share,
            "pace_s": best.timing.pace_s,
            "spreads": [attempt.timing.spread for attempt in attempts],
        },
    }


def runtime_identity() -> dict[str, str]:
    """Return `runtime`, `processor` and `machine`: what figures depend on beside settings."""
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "processor": processor_name(),
        "machine": os.uname().machine,
    }


def cores_to_use(threads: int, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the cores to pin to, one per thread.

    Raises:
        MeasurementError: This process may not use so many, or not those.
    """
    allowed = allowed_cores()
    if wanted is None:
        if threads > len(allowed):
            raise MeasurementError(
                f"threads must be at most {len(allowed)}, the cores that this process may use,"
                f" but got {threads}"
            )
        return tuple(allowed[-threads:])
    missing = [core for core in wanted if core not in allowed]
    if missing:
        raise MeasurementError(
            "cores must be among those that this process may use"
            f" ({', '.join(map(str, allowed))}), but got {', '.join(map(str, missing[:5]))}"
        )
    return wanted


# ---------------------------------------------------------------------------- attempts


class _TimeIsUp(Exception):
    """The time limit ended an attempt."""


def _attempts(
    model: bytes, settings: Settings, cores: tuple[int, ...], deadline: float
) -> list[Attempt]:
    """Attempts until one is good, `attempts` are made, or the time is up; at least one."""
    taken: list[Attempt] = []
    while len(taken) < settings.attempts:
        try:
            taken.append(_attempt(model, settings, cores, deadline))
        except _TimeIsUp:
            if not taken:
                raise _too_slow(settings) from None
            break
        if taken[-1].is_good:
            break
    return taken


def _too_slow(settings: Settings) -> MeasurementError:
    return MeasurementError(
        f"the network took longer than time_limit_s ({settings.time_limit_s:g} s)",
        cause="architecture",
    )


def _attempt(model: bytes, settings: Settings, cores: tuple[int, ...], deadline: float) -> Attempt:
    begun = CpuTimes()
    images = _images(settings)
    options = _session_options(settings, cores)
    run_options = onnxruntime.RunOptions()
    with _pinned(cores), _stopwatch(deadline, _stopper([options], run_options)):
        before = resident_bytes()
        run = _opened(model, settings, options, run_options, images)
        # Elsewhere the processor's core only waits, and its pace says nothing.
        on_cpu = settings.provider == CPU_PROVIDER
        with _no_garbage_collection():
            before_s, ran_s = time.perf_counter(), time.thread_time()
            timing = time_runs(
                run,
                PROTOCOLS[settings.effort],
                probe=probe if on_cpu else None,
                known_pace_s=settings.known_pace_s,
            )
            ran_s, wall_s = time.thread_time() - ran_s, time.perf_counter() - before_s
        share = round(min(1.0, ran_s / wall_s), 3) if on_cpu else None
        return Attempt(timing, share, begun.others_share(), _growth(before, resident_bytes()))


def _images(settings: Settings) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(settings.shape, dtype=np.float32)


def _opened(
    model: bytes,
    settings: Settings,
    options: onnxruntime.SessionOptions,
    run_options: onnxruntime.RunOptions,
    images: NDArray[np.float32],
) -> Callable[[], None]:
    """Open a session and return what runs the network once."""
    session = _session(model, options, settings.provider)
    binding = session.io_binding()
    binding.bind_cpu_input(settings.input_name, images)
    binding.bind_output(settings.output_name)

    def run() -> None:
        try:
            session.run_with_iobinding(binding, run_options)
        except Exception as error:  # ONNX Runtime's errors have no root of their own
            raise MeasurementError(
                f"ONNX Runtime failed to run the network: {_first_line(error)}",
                cause="architecture",
            ) from error

    return run


def run_in_turn(
    networks: Sequence[tuple[bytes, Settings]], rounds: int
) -> list[tuple[tuple[float, ...], ...]]:
    """Return the milliseconds of inferences taken in turn: first, second, first, second, ...

    Whatever changes from one second to the next meets all alike. Each round opens sessions of its
    own: where one happens to lie in memory makes it faster or slower by a percent for its life.

    Args:
        networks: Models and how they are run, on the same cores.
        rounds: How many; one takes ROUND_WARM_UP_S and ROUND_S, or FEWEST_SAMPLES inferences of
            each network in place of either, and may take as long as a measurement.

    Returns:
        For each round, each network's times.

    Raises:
        MeasurementError: There is no figure.
    """
    settings = networks[0][1]
    check_memory(sum(each.needed_bytes for _, each in networks), memory_bytes())
    cores = cores_to_use(settings.threads, settings.cores)
    taken = []
    with _pinned(cores), _no_garbage_collection():
        for index in range(rounds):
            try:
                # Neither has the better place more often.
                if index % 2:
                    taken.append(_one_round(networks[::-1], cores)[::-1])
                else:
                    taken.append(_one_round(networks, cores))
            except _TimeIsUp:
                raise _too_slow(settings) from None
    return taken


def _one_round(
    networks: Sequence[tuple[bytes, Settings]], cores: tuple[int, ...]
) -> tuple[tuple[float, ...], ...]:
    options = [_session_options(settings, cores) for _, settings in networks]
    run_options = onnxruntime.RunOptions()
    deadline = time.monotonic() + networks[0][1].time_limit_s
    with _stopwatch(deadline, _stopper(options, run_options)):
        runs = [
            _opened(model, settings, each, run_options, _images(settings))
            for (model, settings), each in zip(networks, options, strict=True)
        ]
        _in_turn(runs, ROUND_WARM_UP_S)
        return _in_turn(runs, ROUND_S)


def _in_turn(runs: Sequence[Callable[[], None]], seconds: float) -> tuple[tuple[float, ...], ...]:
    taken_ms: tuple[list[float], ...] = tuple([] for _ in runs)
    end = time.perf_counter() + seconds
    while len(taken_ms[0]) < FEWEST_SAMPLES or time.perf_counter() < end:
        for run, times_ms in zip(runs, taken_ms, strict=True):
            before = time.perf_counter()
            run()
            times_ms.append(1e3 * (time.perf_counter() - before))
    return tuple(map(tuple, taken_ms))


def _growth(before: tuple[int, int] | None, after: tuple[int, int] | None) -> int | None:
    """How far the peak (now, peak) rose above `before`; None if an earlier peak hides it."""
    if before is None or after is None or before[1] - before[0] > _HIDDEN_BYTES:
        return None
    return after[1] - before[0]


def _session_options(settings: Settings, cores: tuple[int, ...]) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    # Waiting threads spin, as they do in an application that leaves the default alone.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if settings.threads > 1:
        # The calling thread computes, too; the pool holds the others. Cores count from 1 here.
        others = ";".join(str(core + 1) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", others)
    if settings.provider != CPU_PROVIDER:
        # Part of a network falling back to the CPU would be timed as if it were the device's.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _session(
    model: bytes, options: onnxruntime.SessionOptions, provider: str
) -> onnxruntime.InferenceSession:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise MeasurementError(
            f"provider must be one of {', '.join(available)} with that installation of ONNX"
            f" Runtime, but got {provider!r}"
        )
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors have no root of their own
        raise MeasurementError(
            f"ONNX Runtime rejects the network: {_first_line(error)}", cause="architecture"
        ) from error
    if session.get_providers()[0] != provider:
        raise MeasurementError(
            f"{provider} could not be started; ONNX Runtime fell back to"
            f" {session.get_providers()[0]}"
        )
    return session


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


@contextlib.contextmanager
def _pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """Pin the calling thread to the first core; ONNX Runtime pins its pool to the others."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores[:1])
    except OSError as error:
        raise MeasurementError(
            f"core {cores[0]} cannot be used: {error.strerror or error}"
        ) from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _stopper(
    options: Sequence[onnxruntime.SessionOptions], run_options: onnxruntime.RunOptions
) -> Callable[[], None]:
    """Return what ends the loading of sessions with these options, and their inferences."""

    def stop() -> None:
        for each in options:
            with contextlib.suppress(AttributeError):  # older ONNX Runtimes cannot stop loading
                each.set_load_cancellation_flag(True)
        run_options.terminate = True

    return stop


@contextlib.contextmanager
def _stopwatch(deadline: float, stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` from another thread at the deadline; what then fails raises _TimeIsUp."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        stop()

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except MeasurementError as error:
        if expired.is_set():
            raise _TimeIsUp from error
        raise
    finally:
        timer.cancel()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection amid a sample would count as the network's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---------------------------------------------------------------------------- on its own


def main(model_path: str, settings_path: str) -> None:
    """Time the network of a file and print the report as one JSON line."""
    with open(settings_path, encoding="utf-8") as file:
        values = json.load(file)
    for name in ("shape", "cores"):
        values[name] = None if values[name] is None else tuple(values[name])
    settings = Settings(**values)
    # The alarm's default action ends the process wherever it is, also where nobody watches it.
    signal.setitimer(signal.ITIMER_REAL, settings.time_limit_s + GRACE_S)
    with open(model_path, "rb") as file_:
        model = file_.read()
    try:
        report = measure(model, settings)
    except MeasurementError as error:
        report = {"fault": str(error), "cause": error.cause}
    except MemoryError:
        report = {"fault": "memory ran out", "cause": "infrastructure"}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
