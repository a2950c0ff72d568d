"""Checks a LatencyMeter, a user's own included, against the contract of latency.device."""

from __future__ import annotations

import json
import math
from typing import Any

from latency.device import LatencyMeter
from latency.measurement import Measurement
from space.architecture import (
    PAPER_STYLE,
    Architecture,
    BlockSpec,
    NetworkStyle,
    graph_hash,
)
from space.checks import CheckResult
from space.errors import MeasurementError
from space.records import to_plain

#: Relative difference of two measurements' medians that a device must stay below.
REPEATABLE = 0.30

_OTHER_STYLE = NetworkStyle(padding="symmetric")


def check_meter(meter: LatencyMeter, architecture: Architecture) -> list[CheckResult]:
    """Return what a meter does right and wrong; it measures the network three times.

    A rule that needs a measurement is left out where there is none.
    """
    results = _check_identity(meter)
    first, fault = _measure(meter, architecture)
    results.append(_result("measure gives a Measurement", fault))
    if first is not None:
        results += _check_measurement(meter, first)
        results += _check_repeated(meter, architecture, first)
    _, fault = _measure(meter, architecture, style=_OTHER_STYLE, allow_error=True)
    results.append(_result("measure takes a style, or refuses it with MeasurementError", fault))
    _, fault = _measure(meter, too_large(architecture), allow_error=True)
    results.append(
        _result("a network that fits no device raises MeasurementError or is measured", fault)
    )
    return results


def too_large(architecture: Architecture) -> Architecture:
    """Return a network for the same images whose weights take 3.9 TB."""
    block = BlockSpec(
        op="conv", kernel_size=15, expand_ratio=1, se_ratio=0.0, skip="none",
        filters=65_536, layers=1, stride=1,
    )  # fmt: skip
    return Architecture(
        stem_filters=65_536,
        blocks=(block,),
        head_filters=8,
        resolution=architecture.resolution,
        classes=architecture.classes,
        input_channels=architecture.input_channels,
    )


def _result(name: str, fault: str) -> CheckResult:
    return CheckResult(name, not fault, fault)


def _check_identity(meter: LatencyMeter) -> list[CheckResult]:
    try:
        first: Any = meter.identity()
        second: Any = meter.identity()
        text = json.dumps(to_plain(first), allow_nan=False)
    except Exception as error:
        return [_result("identity is a dict of JSON values", f"{type(error).__name__}: {error}")]
    is_plain = isinstance(first, dict) and json.loads(text) == to_plain(first)
    if not is_plain:
        return [_result("identity is a dict of JSON values", f"got {first!r}")]
    name = first.get("name")
    return [
        _result("identity is a dict of JSON values", ""),
        _result(
            "identity is the same at each call",
            "" if first == second else f"got {first!r}, then {second!r}",
        ),
        _result(
            "identity holds a name", "" if isinstance(name, str) and name else f"got {name!r}"
        ),
    ]


def _measure(
    meter: LatencyMeter,
    architecture: Architecture,
    *,
    style: NetworkStyle = PAPER_STYLE,
    allow_error: bool = False,
) -> tuple[Measurement | None, str]:
    """A measurement, or what came instead; a MeasurementError is none of it if allowed."""
    try:
        found: Any = meter.measure(architecture, style)
    except MeasurementError as error:
        return None, "" if allow_error else f"MeasurementError: {error}"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    if not isinstance(found, Measurement):
        return None, f"got {type(found).__name__}"
    expected = graph_hash(architecture, style)
    if found.graph_hash != expected:
        return found, f"graph_hash must be {expected!r}, but got {found.graph_hash!r}"
    return found, ""


def _check_measurement(meter: LatencyMeter, found: Measurement) -> list[CheckResult]:
    counts = (found.inner_iterations, found.warmup_runs + 1, found.attempts)
    identity = meter.identity()
    return [
        _result(
            "samples are positive and finite, at least one",
            "" if all(0 < s < math.inf for s in found.samples_ms or [0]) else "they are not",
        ),
        _result(
            "inner_iterations and attempts are >= 1, warmup_runs is >= 0",
            ""
            if min(counts) >= 1
            else f"got {found.inner_iterations}, {found.attempts}, {found.warmup_runs}",
        ),
        _result(
            "the measurement's device is the identity",
            "" if found.device == identity else f"got {found.device!r}, not {identity!r}",
        ),
        _result("environment holds JSON values", _json_fault(found.environment)),
        _result("metrics holds finite numbers", _metrics_fault(found.metrics)),
    ]


def _check_repeated(
    meter: LatencyMeter, architecture: Architecture, first: Measurement
) -> list[CheckResult]:
    name = f"medians of two measurements differ by at most {REPEATABLE:.0%}"
    second, fault = _measure(meter, architecture)
    if second is None:
        return [_result(name, fault)]
    low, high = sorted((first.median_ms, second.median_ms))
    agree = high - low <= REPEATABLE * low
    return [_result(name, "" if agree else f"got {low:.4g} and {high:.4g} ms")]


def _json_fault(values: object) -> str:
    try:
        json.dumps(to_plain(values), allow_nan=False)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _metrics_fault(metrics: dict[str, Any]) -> str:
    wrong = [
        f"{name}={value!r}"
        for name, value in metrics.items()
        if isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
    ]
    return f"got {', '.join(wrong[:5])}" if wrong else ""
