"""Measurement: what was timed, where, and the raw samples that every figure is derived from."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import numpy as np

from latency.timing import interquartile_range, is_noisy, median_interval, undisturbed
from space.records import record, to_plain

Verdict = Literal["ok", "noisy", "drifted"]


@record
class Measurement:
    """Raw samples of one network on one device, and the figures derived from them.

    Attributes:
        samples_ms: Time of one inference, milliseconds, in the order taken; each is the mean of
            `inner_iterations` inferences. At least one, all > 0.
        inner_iterations: Inferences per sample.
        warmup_runs: Inferences before the first sample.
        attempts: How often the whole measurement was taken; 2 or more after a noisy one.
        graph_hash: Identifies what was timed (space.architecture.graph_hash).
        device: The device's configuration and identity as plain values.
        environment: Load, frequency, governor, temperature, versions, where readable.
        metrics: Other figures of the same run, e.g. `model_mb`, `peak_memory_mb`.
        drifted: Whether the device's drift guard found it changed around these samples.
        disturbed: Indices of the samples during which the core was not ours alone (see
            latency.timing), ascending. The figures leave them out.
    """

    samples_ms: tuple[float, ...]
    inner_iterations: int
    warmup_runs: int
    attempts: int
    graph_hash: str
    device: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, float]
    drifted: bool = False
    disturbed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(0 < s < float("inf") for s in self.samples_ms):
            raise ValueError(
                f"samples_ms must be finite, positive numbers, but got {self.samples_ms[:5]!r}"
            )
        marks = list(self.disturbed)
        if marks != sorted(set(marks)) or not set(marks) <= set(range(len(self.samples_ms))):
            raise ValueError(
                f"disturbed must be indices of samples, ascending, but got {marks[:5]!r}"
            )

    @property
    def counted_ms(self) -> tuple[float, ...]:
        """The samples that nothing disturbed, in the order taken; all if they are too few."""
        return undisturbed(self.samples_ms, self.disturbed)

    @property
    def median_ms(self) -> float:
        """The figure: median of the samples that count."""
        return float(np.median(self.counted_ms))

    @property
    def iqr_ms(self) -> float:
        """Third minus first quartile."""
        return interquartile_range(self.counted_ms)

    @property
    def spread(self) -> float:
        """IQR / median."""
        return self.iqr_ms / self.median_ms

    @property
    def verdict(self) -> Verdict:
        """`drifted` if the device was found changed; `noisy` if IQR / median exceeds 10 %, or if
        samples were disturbed and hardly any was not.
        """
        if self.drifted:
            return "drifted"
        return "noisy" if is_noisy(self.samples_ms, self.disturbed) else "ok"

    def percentile_ms(self, percent: float) -> float:
        """Percentile of the samples that count, `percent` in [0, 100]."""
        return float(np.percentile(self.counted_ms, percent))

    @property
    def median_interval_ms(self) -> tuple[float, float]:
        """95 % confidence interval of the median, distribution-free (order statistics)."""
        return median_interval(np.asarray(self.counted_ms))

    @property
    def device_fingerprint(self) -> str:
        """16 hexadecimal digits of `device`: equal only for equal conditions of measuring."""
        return fingerprint(self.device)


def fingerprint(device: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify a device's configuration and runtime."""
    text = json.dumps(to_plain(device), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summary(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement's figures as JSON values, for tables and `--json`.

    Keys: median_ms, median_low_ms and median_high_ms (95 % interval), mean_ms, min_ms, iqr_ms,
    spread (IQR / median), p90_ms, p99_ms (all without the disturbed samples), samples, disturbed
    (how many of them), inner_iterations, warmup_runs, attempts,
    verdict, device (configuration and identity), device_fingerprint, graph_hash, environment,
    metrics.
    """
    low_ms, high_ms = measurement.median_interval_ms
    figures: dict[str, Any] = to_plain(
        {
            "median_ms": measurement.median_ms,
            "median_low_ms": low_ms,
            "median_high_ms": high_ms,
            "mean_ms": float(np.mean(measurement.counted_ms)),
            "min_ms": min(measurement.counted_ms),
            "iqr_ms": measurement.iqr_ms,
            "spread": measurement.spread,
            "p90_ms": measurement.percentile_ms(90),
            "p99_ms": measurement.percentile_ms(99),
            "samples": len(measurement.samples_ms),
            "disturbed": len(measurement.disturbed),
            "inner_iterations": measurement.inner_iterations,
            "warmup_runs": measurement.warmup_runs,
            "attempts": measurement.attempts,
            "verdict": measurement.verdict,
            "device": measurement.device,
            "device_fingerprint": measurement.device_fingerprint,
            "graph_hash": measurement.graph_hash,
            "environment": measurement.environment,
            "metrics": measurement.metrics,
        }
    )
    return figures
