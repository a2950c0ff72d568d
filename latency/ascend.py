"""Times networks on an Ascend NPU of this host with MindSpore in graph mode, device-synchronised.

Every network has a process of its own, `python -m latency.ascend network.json settings.json`: only
there is MindSpore loaded, and with its end the NPU is free again. It prints one JSON line: what
`_report` returns, or `{"fault": ..., "cause": ...}`. The protocol is latency/timing.py's.

Not tried on an NPU. With `target: CPU` the same steps run on a processor and prove their order
alone; such a device records itself as kind `mindspore-cpu`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from latency.config import AscendConfig
from latency.device import LatencyMeter
from latency.fits import needed_bytes, weight_bytes
from latency.host import allowed_cores, check_memory, environment, processor_name
from latency.lock import device_lock, host_lock
from latency.measurement import Measurement
from latency.reports import run_module
from latency.runs import input_shape, to_measurement
from latency.timing import PROTOCOLS, Timing, time_runs
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, parse_architecture
from space.errors import MeasurementError
from space.records import build, to_plain

#: Loading MindSpore and asking for the device's name.
_DESCRIBE_LIMIT_S = 120.0


class AscendMeter(LatencyMeter):
    """Times networks on an NPU of this host."""

    def __init__(self, config: AscendConfig) -> None:
        self._config = config
        self._runtime: dict[str, str] | None = None

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter; the hardware is asked once, in a process that loads MindSpore."""
        config = self._config
        if self._runtime is None:
            settings = json.dumps(self._settings()).encode()
            report = run_module(
                "latency.ascend", {"settings.json": settings}, time_limit_s=_DESCRIBE_LIMIT_S
            )
            self._runtime = report["runtime"]
        return {
            "name": config.name,
            "kind": "ascend" if config.target == "Ascend" else "mindspore-cpu",
            **self._runtime,
            "device_id": config.device_id,
            "precision": config.precision,
            "batch": config.batch,
            "effort": config.effort,
        }

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter. Most of it is MindSpore's start and its compilation of the graph."""
        config = self._config
        memory = psutil.virtual_memory()
        check_memory(needed_bytes(architecture, 0), (memory.total, memory.available))
        device = self.identity()
        network = {"architecture": architecture.text, "style": to_plain(style)}
        files = {
            "network.json": json.dumps(network).encode(),
            "settings.json": json.dumps(self._settings()).encode(),
        }
        with self._lock():
            report = run_module("latency.ascend", files, time_limit_s=config.time_limit_s)
        if report.get("runtime") != self._runtime:
            raise MeasurementError(
                f"MindSpore or the hardware changed: {report.get('runtime')!r}; start again"
            )
        return to_measurement(
            report,
            architecture,
            style,
            device=device,
            # MindSpore times no file: its parameters, as they lie on the device.
            model_bytes=weight_bytes(architecture) // (2 if config.precision == "float16" else 1),
            environment={"mnas": importlib.metadata.version("mnas")},
        )

    def _settings(self) -> dict[str, Any]:
        names = ("target", "device_id", "precision", "batch", "effort", "attempts", "time_limit_s")
        return {name: getattr(self._config, name) for name in names}

    def _lock(self) -> Any:
        """The host's lock for its processor, or one of the NPU's own."""
        config = self._config
        if config.target == "CPU":
            return host_lock(config.lock_timeout_s)
        name = f"ascend-{socket.gethostname()}-{config.device_id}"
        return device_lock(name, f"on NPU {config.device_id}", config.lock_timeout_s)


# ---------------------------------------------------------------------------- on its own


def _report(architecture: Architecture, style: NetworkStyle, settings: Any) -> dict[str, Any]:
    """Return the best of the attempts at timing a network; see latency.runner.measure.

    `peak_memory_bytes` is the NPU's, None on a processor.

    Raises:
        MeasurementError: There is no figure.
    """
    conditions = environment(allowed_cores()[-1])
    run, peak_bytes = _ready(architecture, style, settings)
    attempts: list[Timing] = []
    while len(attempts) < settings["attempts"]:
        attempts.append(time_runs(run, PROTOCOLS[settings["effort"]]))
        if attempts[-1].settled and not attempts[-1].is_noisy:
            break
    best = min(attempts, key=lambda timing: (not timing.settled, timing.spread))
    return {
        "timing": dataclasses.asdict(best),
        "attempts": len(attempts),
        "peak_memory_bytes": peak_bytes(),
        "runtime": _runtime(settings),
        "environment": {
            **conditions,
            "settled": best.settled,
            "ending": best.ending,
            "spreads": [timing.spread for timing in attempts],
        },
    }


def _runtime(settings: Any) -> dict[str, str]:
    """What figures depend on beside settings, in the words of latency.runner.runtime_identity."""
    import mindspore as ms

    _set_device(settings)
    name = processor_name()
    if settings["target"] != "CPU":
        name = str(ms.hal.get_device_name(settings["device_id"], settings["target"]))
    return {
        "runtime": f"mindspore {ms.__version__}",
        "processor": name,
        "machine": os.uname().machine,
    }


def _set_device(settings: Any) -> None:
    """Choose the hardware, which MindSpore allows once; the same choice may be repeated."""
    import mindspore as ms

    target = settings["target"]
    try:
        ms.set_device(target, *([] if target == "CPU" else [settings["device_id"]]))
    except Exception as error:  # MindSpore's errors have no root of their own
        raise MeasurementError(f"MindSpore cannot use {target} here: {_first(error)}") from error
    ms.set_context(mode=ms.GRAPH_MODE)


def _ready(
    architecture: Architecture, style: NetworkStyle, settings: Any
) -> tuple[Callable[[], None], Callable[[], int | None]]:
    """A network compiled: what runs it once to its end, and what tells its peak of memory."""
    import mindspore as ms

    from space.network import build_network

    _set_device(settings)
    shape = input_shape(architecture, settings["batch"])
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    on_cpu = settings["target"] == "CPU"

    def run() -> None:
        logits = network(inputs)
        if on_cpu:
            logits.asnumpy()  # synchronize() is the NPU's and the GPU's
        else:
            ms.runtime.synchronize()

    try:
        network = build_network(architecture, style, seed=0, depthwise="native")
        network.set_train(False)
        if settings["precision"] == "float16":
            network.to_float(ms.float16)
        inputs = ms.Tensor(images)
        run()
    except MemoryError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"MindSpore cannot run the network: {_first(error)}", cause="architecture"
        ) from error
    return run, lambda: None if on_cpu else int(ms.runtime.max_memory_allocated())


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def main(*paths: str) -> None:
    """Print the report of a network, or with the settings alone that of the hardware."""
    *network_path, settings_path = paths
    with open(settings_path, encoding="utf-8") as file:
        settings = json.load(file)
    # The alarm's default action ends the process wherever it is, amid a compilation as well.
    signal.setitimer(signal.ITIMER_REAL, settings["time_limit_s"])
    try:
        if not network_path:
            report: dict[str, Any] = {"runtime": _runtime(settings)}
        else:
            with open(network_path[0], encoding="utf-8") as file:
                values = json.load(file)
            style = build(NetworkStyle, values["style"], where="network.json")
            report = _report(parse_architecture(values["architecture"]), style, settings)
    except MeasurementError as error:
        report = {"fault": str(error), "cause": error.cause}
    except MemoryError:
        report = {"fault": "memory ran out", "cause": "infrastructure"}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
