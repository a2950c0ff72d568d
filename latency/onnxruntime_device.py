"""Times networks on this host with ONNX Runtime: pinned cores, one measurement at a time.

Nothing is kept between measurements but the configuration: the graph is built, its session opened,
timed and dropped within `measure`. A lock that all processes of this user respect keeps two
measurements on the host from disturbing each other; other load is recorded, not prevented.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import onnxruntime
import platformdirs
import psutil

from latency.device import LatencyMeter, OnnxRuntimeConfig
from latency.measurement import Measurement
from latency.timing import PROTOCOLS, Timing, time_runs
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, graph_hash
from space.cost import count
from space.errors import ConfigError, MeasurementError
from space.onnx_graph import INPUT_NAME, OUTPUT_NAME, onnx_model
from space.records import did_you_mean

CPU_PROVIDER = "CPUExecutionProvider"

#: Protocol buffers end at 2 GiB, and with them an ONNX file without external data; 16 MiB are left
#: for all that is not weights.
MAX_WEIGHT_BYTES = 2**31 - 2**24

#: Copies of the weights alive at once: drawn, folded, in the graph, serialized, in the session,
#: and there once more in the layout of the kernels.
_WEIGHT_COPIES = 6

_ERRORS_ONLY = 3


class OnnxRuntimeMeter(LatencyMeter):
    """Times networks on this host.

    Raises:
        ConfigError: This host lacks the provider or the cores that the configuration asks for.
    """

    def __init__(self, config: OnnxRuntimeConfig) -> None:
        self._config = config
        _check_provider(config)
        _cores(config)

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter; `cores` is null where the configuration leaves them open."""
        config = self._config
        return {
            "name": config.name,
            "kind": config.kind,
            "provider": config.provider,
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "threads": config.threads,
            "cores": None if config.cores is None else list(config.cores),
            "precision": config.precision,
            "batch": config.batch,
            "effort": config.effort,
            "processor": processor_name(),
            "machine": platform.machine(),
        }

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter. An attempt takes at most about 1 s (`quick`) or 5 s (`full`)."""
        _check_fits(architecture, self._config.batch)
        with host_lock(self._config.lock_timeout_s):
            try:
                return self._measure(architecture, style)
            except MemoryError as error:
                raise MeasurementError("memory ran out") from error
            except ConfigError as error:  # the cores that this process may use have changed
                raise MeasurementError(str(error)) from error

    def _measure(self, architecture: Architecture, style: NetworkStyle) -> Measurement:
        config = self._config
        deadline = time.monotonic() + config.time_limit_s
        cores = _cores(config)
        earlier = _CpuTimes()
        model: bytes = onnx_model(architecture, style).SerializeToString()
        environment = {
            **_environment(cores[0]),
            "cores": list(cores),
            "others_cpu_share_before": earlier.others_share(),
        }
        begun = _CpuTimes()
        best: Measurement | None = None
        spreads: list[float] = []
        for attempt in range(1, config.attempts + 1):
            try:
                timing, running_share = self._attempt(architecture, model, cores, deadline)
            except _TimeIsUp:
                if best is None:
                    raise MeasurementError(
                        f"the network took longer than time_limit_s ({config.time_limit_s:g} s)",
                        cause="architecture",
                    ) from None
                break
            taken = Measurement(
                samples_ms=timing.samples_ms,
                inner_iterations=timing.inner_iterations,
                warmup_runs=timing.warmup_runs,
                attempts=attempt,
                graph_hash=graph_hash(architecture, style),
                device=self.identity(),
                environment={
                    **environment,
                    "others_cpu_share": begun.others_share(),
                    "settled": timing.settled,
                    "ending": timing.ending,
                    "running_share": running_share,
                },
                metrics={"model_bytes": float(len(model))},
            )
            spreads.append(taken.spread)
            if best is None or _is_better(taken, best):
                best = taken
            if timing.settled and taken.verdict == "ok":
                break
        assert best is not None  # there is at least one attempt
        environment = {**best.environment, "spreads": spreads}
        return dataclasses.replace(best, attempts=len(spreads), environment=environment)

    def _attempt(
        self, architecture: Architecture, model: bytes, cores: tuple[int, ...], deadline: float
    ) -> tuple[Timing, float]:
        """One whole timing in a session of its own, and the share of it that the thread ran.

        Well below 1, other processes had the core: what was timed is their turn, too.
        """
        size, batch = architecture.resolution, self._config.batch
        shape = (batch, architecture.input_channels, size, size)
        images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        options = _session_options(self._config, cores)
        run_options = onnxruntime.RunOptions()

        def stop() -> None:
            options.set_load_cancellation_flag(True)
            run_options.terminate = True

        with _pinned(cores), _stopwatch(deadline, stop):
            session = _session(model, options, self._config.provider)
            binding = session.io_binding()
            binding.bind_cpu_input(INPUT_NAME, images)
            binding.bind_output(OUTPUT_NAME)

            def run() -> None:
                try:
                    session.run_with_iobinding(binding, run_options)
                except Exception as error:  # ONNX Runtime's errors have no root of their own
                    raise MeasurementError(
                        f"ONNX Runtime failed to run the network: {_first_line(error)}",
                        cause="architecture",
                    ) from error

            with _no_garbage_collection():
                before_s, ran_s = time.perf_counter(), time.thread_time()
                timing = time_runs(run, PROTOCOLS[self._config.effort])
                ran_s, wall_s = time.thread_time() - ran_s, time.perf_counter() - before_s
            return timing, round(min(1.0, ran_s / wall_s), 3)


@functools.cache
def processor_name() -> str:
    """Return the processor's model as Linux names it, or else its architecture."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    fields = dict(line.partition(":")[::2] for line in lines)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return named.get("model name") or named.get("Model") or platform.machine()


@contextlib.contextmanager
def host_lock(timeout_s: float) -> Iterator[None]:
    """Hold this host's one lock for measuring, whatever the devices on it are called.

    All processes of this user respect it; it falls with the process that holds it.

    Raises:
        MeasurementError: It is held by another for longer than the time-out, or cannot be made.
    """
    folder = platformdirs.user_cache_path("mnas")
    path = folder / f"measuring-{socket.gethostname()}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path).acquire(timeout=timeout_s)
    except filelock.Timeout:
        raise MeasurementError(
            f"another process has been measuring on this host for {timeout_s:g} s ({path} is"
            " locked); wait for it or raise lock_timeout_s"
        ) from None
    except OSError as error:
        raise MeasurementError(
            f"{path} cannot be locked: {error.strerror or error}; set XDG_CACHE_HOME to a folder"
            " that can be written"
        ) from error
    with held:
        yield


def _is_better(one: Measurement, other: Measurement) -> bool:
    """Whether one attempt is to be kept: settled ones first, then the least noisy."""
    ranks = [(not m.environment["settled"], m.spread) for m in (one, other)]
    return ranks[0] < ranks[1]


# ---------------------------------------------------------------------------- checks


def _check_provider(config: OnnxRuntimeConfig) -> None:
    available = onnxruntime.get_available_providers()
    if config.provider not in available:
        hint = did_you_mean(config.provider, available) or "."
        raise ConfigError(
            f"device {config.name!r}: provider must be one of {', '.join(available)} with this"
            f" installation of ONNX Runtime, but got {config.provider!r}{hint}"
        )


def _cores(config: OnnxRuntimeConfig) -> tuple[int, ...]:
    """The cores to pin to, one per thread."""
    allowed = sorted(os.sched_getaffinity(0))
    if config.cores is None:
        if config.threads > len(allowed):
            raise ConfigError(
                f"device {config.name!r}: threads must be at most {len(allowed)}, the cores that"
                f" this process may use, but got {config.threads}."
            )
        return tuple(allowed[-config.threads :])
    missing = [core for core in config.cores if core not in allowed]
    if missing:
        raise ConfigError(
            f"device {config.name!r}: cores must be among those that this process may use"
            f" ({', '.join(map(str, allowed))}), but got {', '.join(map(str, missing[:5]))}."
        )
    return config.cores


def _check_fits(architecture: Architecture, batch: int) -> None:
    """Refuse, before anything is built, a network that this host cannot hold.

    Raises:
        MeasurementError: It needs more than an ONNX file or the memory can hold.
    """
    weight_bytes = 4 * count(architecture).parameters
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise MeasurementError(
            f"the weights must take at most {MAX_WEIGHT_BYTES:,} bytes to fit an ONNX file,"
            f" but take {weight_bytes:,}",
            cause="architecture",
        )
    needed = _WEIGHT_COPIES * weight_bytes + 4 * batch * _peak_activations(architecture)
    memory = psutil.virtual_memory()
    if needed > memory.total:
        raise MeasurementError(
            f"the network needs about {needed:,} bytes of memory, but there are {memory.total:,}",
            cause="architecture",
        )
    if needed > memory.available:
        raise MeasurementError(
            f"the network needs about {needed:,} bytes of memory, but only"
            f" {memory.available:,} are free now"
        )


def _peak_activations(architecture: Architecture) -> int:
    """Numbers alive at once for one image, about: the largest layer's maps, its input kept."""
    image = architecture.input_channels * architecture.resolution**2
    peak = image + architecture.stem_filters * architecture.stem_size**2
    for layer in architecture.layers():
        before = (layer.input_filters + layer.mid_filters) * layer.input_size**2
        after = (layer.mid_filters + layer.output_filters) * layer.output_size**2
        peak = max(peak, before + after)
    last = architecture.layers()[-1]
    return max(peak, (last.output_filters + architecture.head_filters) * last.output_size**2)


# ---------------------------------------------------------------------------- session


class _TimeIsUp(Exception):
    """The time limit ended an attempt."""


def _session_options(
    config: OnnxRuntimeConfig, cores: tuple[int, ...]
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    # Waiting threads spin, as they do in an application that leaves the default alone.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if config.threads > 1:
        # The calling thread computes, too; the pool holds the others. Cores count from 1 here.
        others = ";".join(str(core + 1) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", others)
    if config.provider != CPU_PROVIDER:
        # Part of a network falling back to the CPU would be timed as if it were the device's.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _session(
    model: bytes, options: onnxruntime.SessionOptions, provider: str
) -> onnxruntime.InferenceSession:
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


# ---------------------------------------------------------------------------- conditions


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


class _CpuTimes:
    """What the processors had done at one moment, to tell others' work from this process's."""

    def __init__(self) -> None:
        total = psutil.cpu_times()
        own = psutil.Process().cpu_times()
        self._idle_s = total.idle + total.iowait
        self._own_s = own.user + own.system
        self._clock_s = time.monotonic()

    def others_share(self) -> float | None:
        """Share of the host's processor time, 0 to 1, that others took since.

        None if less than 50 ms have passed: Linux counts in steps of 10 ms.
        """
        now = _CpuTimes()
        if now._clock_s - self._clock_s < 0.05:
            return None
        available_s = (psutil.cpu_count() or 1) * (now._clock_s - self._clock_s)
        used_s = available_s - (now._idle_s - self._idle_s)
        others_s = used_s - (now._own_s - self._own_s)
        return round(min(1.0, max(0.0, others_s / available_s)), 3)


def _environment(core: int) -> dict[str, Any]:
    """The conditions of a measurement, as JSON values; None where this host does not tell."""
    frequency = psutil.cpu_freq()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hostname": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mnas": _installed_version("mnas"),
        "onnx": _installed_version("onnx"),
        "cpu_count": psutil.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "frequency_mhz": round(frequency.current, 1) if frequency else None,
        "governor": _read(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"),
        "temperature_c": _temperature_c(),
    }


def _temperature_c() -> float | None:
    """The hottest sensor's reading."""
    try:
        sensors = psutil.sensors_temperatures()
    except (OSError, AttributeError):  # psutil has no such function on some systems
        return None
    readings = [reading.current for group in sensors.values() for reading in group]
    return max(readings, default=None)


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
