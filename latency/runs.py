"""What the devices that time ONNX files share: the runner's settings, a report's Measurement."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from latency.config import OnnxRuntimeConfig, SshConfig
from latency.measurement import Measurement
from latency.reports import DeviceFault
from space.architecture import Architecture, NetworkStyle, graph_hash
from space.onnx_graph import INPUT_NAME, OUTPUT_NAME, onnx_model

_MB = 1e6


def input_shape(architecture: Architecture, batch: int) -> tuple[int, int, int, int]:
    """Return a network's input: batch, channels, height, width."""
    size = architecture.resolution
    return batch, architecture.input_channels, size, size


def model_file(
    config: OnnxRuntimeConfig | SshConfig, architecture: Architecture, style: NetworkStyle
) -> bytes:
    """Return the ONNX file that is timed, in the configuration's precision.

    Raises:
        MeasurementError: It cannot be quantized.
    """
    model: bytes = onnx_model(architecture, style).SerializeToString()
    if config.precision == "float32":
        return model
    from latency.int8 import calibration_images, int8_model

    shape = input_shape(architecture, batch=1)[1:]
    return int8_model(model, calibration_images(config.calibration, shape))


def precision_identity(config: OnnxRuntimeConfig | SshConfig) -> dict[str, str]:
    """Return the part of a device's identity that says in which numbers it computes.

    Raises:
        ConfigError: The calibration file is not one.
    """
    if config.precision == "float32":
        return {"precision": config.precision}
    from latency.int8 import calibration_identity

    return {
        "precision": config.precision,
        "calibration": calibration_identity(config.calibration),
    }


def runner_settings(
    config: OnnxRuntimeConfig | SshConfig,
    architecture: Architecture,
    *,
    needed_bytes: int,
    known_pace_s: float | None,
) -> dict[str, Any]:
    """Return latency.runner.Settings' fields for a device's configuration and a network."""
    return {
        "shape": input_shape(architecture, config.batch),
        "input_name": INPUT_NAME,
        "output_name": OUTPUT_NAME,
        "provider": config.provider,
        "threads": config.threads,
        "cores": config.cores,
        "effort": config.effort,
        "attempts": config.attempts,
        "time_limit_s": config.time_limit_s,
        "needed_bytes": needed_bytes,
        "known_pace_s": known_pace_s,
    }


def to_measurement(
    report: dict[str, Any],
    architecture: Architecture,
    style: NetworkStyle,
    *,
    device: dict[str, Any],
    model_bytes: int,
    environment: dict[str, Any],
) -> Measurement:
    """Return the Measurement of a report as latency.runner.measure gives it.

    Raises:
        DeviceFault: The report is not one.
    """
    try:
        timing, peak_bytes = report["timing"], report["peak_memory_bytes"]
        metrics = model_metrics(model_bytes)
        if peak_bytes is not None:
            metrics["peak_memory_mb"] = peak_bytes / _MB
        return Measurement(
            samples_ms=tuple(float(sample) for sample in timing["samples_ms"]),
            inner_iterations=int(timing["inner_iterations"]),
            warmup_runs=int(timing["warmup_runs"]),
            attempts=int(report["attempts"]),
            graph_hash=graph_hash(architecture, style),
            device=device,
            environment={**report["environment"], **environment},
            metrics=metrics,
            disturbed=tuple(int(k) for k in timing.get("disturbed", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceFault(
            f"{device['name']} gave an answer that cannot be read: {type(error).__name__}: {error}"
        ) from error


def model_metrics(model_bytes: int) -> dict[str, float]:
    """Return a measurement's metrics that follow from the size of the file that is timed."""
    return {"model_mb": model_bytes / _MB}


def graph_versions() -> dict[str, str | None]:
    """Return the versions of what wrote the graph, for a measurement's environment."""
    return {package: _installed_version(package) for package in ("mnas", "onnx")}


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
