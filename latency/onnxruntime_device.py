"""Times networks on this host with ONNX Runtime: pinned cores, one measurement at a time.

Nothing is kept between measurements but the configuration: the graph is built, its session opened,
timed and dropped within `measure`, in this process or in one of its own. A lock that all processes
of this user respect keeps two measurements on the host from disturbing each other; other load is
recorded, and a measurement that it disturbed is repeated.
"""

from __future__ import annotations

import functools
import json
import platform
import socket
from typing import Any

import numpy as np
import onnxruntime
import psutil

from latency import runner
from latency.config import OnnxRuntimeConfig
from latency.device import LatencyMeter, Timed
from latency.fits import needed_bytes
from latency.host import CpuTimes, check_memory
from latency.lock import host_lock
from latency.measurement import Measurement
from latency.pace import PaceHistory
from latency.reports import run_module
from latency.runs import (
    graph_versions,
    model_file,
    precision_identity,
    runner_settings,
    to_measurement,
)
from latency.timing import is_noisy
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import ConfigError, MeasurementError
from space.records import did_you_mean

_runtime_identity = functools.cache(runner.runtime_identity)


class OnnxRuntimeMeter(LatencyMeter):
    """Times networks on this host.

    Raises:
        ConfigError: This host lacks the provider, the cores or the calibration file that the
            configuration asks for.
    """

    def __init__(self, config: OnnxRuntimeConfig) -> None:
        self._config = config
        self._precision = precision_identity(config)
        _check_provider(config)
        try:
            runner.cores_to_use(config.threads, config.cores)
        except MeasurementError as error:
            raise ConfigError(f"device {config.name!r}: {error}.") from None

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter; `cores` is null where the configuration leaves them open."""
        config = self._config
        return {
            "name": config.name,
            "kind": config.kind,
            "provider": config.provider,
            **_runtime_identity(),
            "threads": config.threads,
            "cores": None if config.cores is None else list(config.cores),
            **self._precision,
            "batch": config.batch,
            "effort": config.effort,
            # A figure without the peak of memory cannot stand in for one with it.
            **({"own_process": True} if config.own_process else {}),
        }

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter. An attempt takes at most about 1 s (`quick`) or 4 s (`full`)."""
        config = self._config
        needed = needed_bytes(architecture, config.batch)
        memory = psutil.virtual_memory()
        check_memory(needed, (memory.total, memory.available))
        with host_lock(config.lock_timeout_s):
            try:
                earlier, history = CpuTimes(), self._history()
                model = model_file(config, architecture, style)
                settings = runner_settings(
                    config, architecture, needed_bytes=0, known_pace_s=history.fastest_s()
                )
                if config.own_process:
                    files = {"model.onnx": model, "settings.json": json.dumps(settings).encode()}
                    report = run_module("latency.runner", files, time_limit_s=config.time_limit_s)
                else:
                    report = runner.measure(model, runner.Settings(**settings), earlier)
                    # What earlier networks left in this process falsifies it.
                    report["peak_memory_bytes"] = None
                taken = to_measurement(
                    report,
                    architecture,
                    style,
                    device=self.identity(),
                    model_bytes=len(model),
                    environment=graph_versions(),
                )
                history.add(taken.environment.get("pace_s"))
                return taken
            except MemoryError as error:
                raise MeasurementError("memory ran out") from error

    def measure_in_turn(
        self, first: Architecture, second: Architecture, rounds: int
    ) -> list[tuple[Timed, Timed]]:
        """See LatencyMeter: inference by inference, a second of them a round."""
        config = self._config
        if config.own_process:  # one that ends with each network
            return super().measure_in_turn(first, second, rounds)
        networks = []
        for architecture in (first, second):
            settings = runner_settings(
                config,
                architecture,
                needed_bytes=needed_bytes(architecture, config.batch),
                known_pace_s=None,
            )
            model = model_file(config, architecture, PAPER_STYLE)
            networks.append((model, runner.Settings(**settings)))
        with host_lock(config.lock_timeout_s):
            taken = runner.run_in_turn(networks, rounds)
        first_s, second_s = (
            [Timed(float(np.median(times)), not is_noisy(times, ())) for times in each]
            for each in zip(*taken, strict=True)
        )
        return list(zip(first_s, second_s, strict=True))

    def _history(self) -> PaceHistory:
        """How fast the core has been, in this Python."""
        core = runner.cores_to_use(self._config.threads, self._config.cores)[0]
        return PaceHistory(f"{socket.gethostname()}-{core}-{platform.python_version()}")


def _check_provider(config: OnnxRuntimeConfig) -> None:
    available = onnxruntime.get_available_providers()
    if config.provider not in available:
        hint = did_you_mean(config.provider, available) or "."
        raise ConfigError(
            f"device {config.name!r}: provider must be one of {', '.join(available)} with this"
            f" installation of ONNX Runtime, but got {config.provider!r}{hint}"
        )
