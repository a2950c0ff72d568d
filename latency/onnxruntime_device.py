"""Times networks on this host with ONNX Runtime: pinned cores, one measurement at a time.

Nothing is kept between measurements but the configuration: the graph is built, its session opened,
timed and dropped within `measure`. A lock that all processes of this user respect keeps two
measurements on the host from disturbing each other; other load is recorded, not prevented.
"""

from __future__ import annotations

import functools
from typing import Any

import onnxruntime
import psutil

from latency import runner
from latency.device import LatencyMeter, OnnxRuntimeConfig
from latency.fits import needed_bytes
from latency.host import CpuTimes, check_memory
from latency.lock import host_lock
from latency.measurement import Measurement
from latency.runs import graph_versions, runner_settings, to_measurement
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import ConfigError, MeasurementError
from space.onnx_graph import onnx_model
from space.records import did_you_mean

_runtime_identity = functools.cache(runner.runtime_identity)


class OnnxRuntimeMeter(LatencyMeter):
    """Times networks on this host.

    Raises:
        ConfigError: This host lacks the provider or the cores that the configuration asks for.
    """

    def __init__(self, config: OnnxRuntimeConfig) -> None:
        self._config = config
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
            "precision": config.precision,
            "batch": config.batch,
            "effort": config.effort,
        }

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter. An attempt takes at most about 1 s (`quick`) or 5 s (`full`)."""
        config = self._config
        needed = needed_bytes(architecture, config.batch)
        memory = psutil.virtual_memory()
        check_memory(needed, (memory.total, memory.available))
        with host_lock(config.lock_timeout_s):
            try:
                earlier = CpuTimes()
                model: bytes = onnx_model(architecture, style).SerializeToString()
                settings = runner_settings(config, architecture, needed_bytes=0)
                report = runner.measure(model, runner.Settings(**settings), earlier)
            except MemoryError as error:
                raise MeasurementError("memory ran out") from error
        return to_measurement(
            report,
            architecture,
            style,
            device=self.identity(),
            model_bytes=len(model),
            environment=graph_versions(),
        )


def _check_provider(config: OnnxRuntimeConfig) -> None:
    available = onnxruntime.get_available_providers()
    if config.provider not in available:
        hint = did_you_mean(config.provider, available) or "."
        raise ConfigError(
            f"device {config.name!r}: provider must be one of {', '.join(available)} with this"
            f" installation of ONNX Runtime, but got {config.provider!r}{hint}"
        )
