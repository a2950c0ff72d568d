"""What the devices that time ONNX files share: the runner's settings, a report's Measurement."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from latency.device import OnnxRuntimeConfig, SshConfig
from latency.measurement import Measurement
from space.architecture import Architecture, NetworkStyle, graph_hash
from space.onnx_graph import INPUT_NAME, OUTPUT_NAME


def input_shape(architecture: Architecture, batch: int) -> tuple[int, int, int, int]:
    """Return a network's input: batch, channels, height, width."""
    size = architecture.resolution
    return batch, architecture.input_channels, size, size


def runner_settings(
    config: OnnxRuntimeConfig | SshConfig, architecture: Architecture, *, needed_bytes: int
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
        KeyError, TypeError, ValueError: The report is not one.
    """
    timing = report["timing"]
    return Measurement(
        samples_ms=tuple(float(sample) for sample in timing["samples_ms"]),
        inner_iterations=int(timing["inner_iterations"]),
        warmup_runs=int(timing["warmup_runs"]),
        attempts=int(report["attempts"]),
        graph_hash=graph_hash(architecture, style),
        device=device,
        environment={**report["environment"], **environment},
        metrics={"model_bytes": float(model_bytes)},
    )


def graph_versions() -> dict[str, str | None]:
    """Return the versions of what wrote the graph, for a measurement's environment."""
    return {package: _installed_version(package) for package in ("mnas", "onnx")}


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
