"""Measurement: every figure follows from the raw samples."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from latency.measurement import Measurement, fingerprint, median_interval, summary
from space.records import build, to_plain


def measurement(samples_ms: tuple[float, ...], **changes: Any) -> Measurement:
    made = Measurement(
        samples_ms=samples_ms,
        inner_iterations=2,
        warmup_runs=10,
        attempts=1,
        graph_hash="0123456789abcdef",
        device={"name": "host", "threads": 1},
        environment={"load_average": 0.5},
        metrics={"model_mb": 0.1},
    )
    return dataclasses.replace(made, **changes)


def test_figures_are_those_of_the_samples() -> None:
    taken = measurement(tuple(float(n) for n in range(1, 102)))
    assert taken.median_ms == 51.0
    assert taken.iqr_ms == 50.0
    assert taken.spread == 50 / 51
    assert taken.percentile_ms(90) == 91.0


@pytest.mark.parametrize(
    ("samples_ms", "verdict"),
    [
        ((10.0,) * 20, "ok"),
        ((1.0,), "ok"),
        # Quartiles 9.5 and 10.5 around 10: exactly 10 % is still good.
        ((9.5, 9.5, 10.0, 10.5, 10.5), "ok"),
        ((9.4, 9.4, 10.0, 10.5, 10.5), "noisy"),
    ],
)
def test_more_than_a_tenth_between_the_quartiles_is_noisy(
    samples_ms: tuple[float, ...], verdict: str
) -> None:
    assert measurement(samples_ms).verdict == verdict


def test_disturbed_samples_are_kept_and_not_counted() -> None:
    taken = measurement((4.0, 9.0, 5.0, 6.0, 9.5, 7.0, 8.0) * 2, disturbed=(1, 4, 8, 11))
    assert taken.counted_ms == (4.0, 5.0, 6.0, 7.0, 8.0) * 2
    assert (taken.median_ms, taken.iqr_ms, taken.percentile_ms(100)) == (6.0, 2.0, 8.0)
    figures = summary(taken)
    assert (figures["samples"], figures["disturbed"], figures["min_ms"]) == (14, 4, 4.0)
    assert build(Measurement, json.loads(json.dumps(to_plain(taken))), where="test") == taken


def test_a_figure_of_hardly_any_undisturbed_sample_is_noisy() -> None:
    assert measurement((5.0,) * 20, disturbed=tuple(range(10))).verdict == "ok"
    assert measurement((5.0,) * 20, disturbed=tuple(range(11))).verdict == "noisy"
    assert measurement((5.0,) * 8, disturbed=(2, 5)).verdict == "ok"  # a slow network's samples
    assert measurement((5.0,) * 8, disturbed=(2, 3, 5, 6, 7)).verdict == "noisy"


@pytest.mark.parametrize("marks", [(2,), (-1,), (1, 0), (0, 0)])
def test_marks_must_be_indices_of_samples(marks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="disturbed must be indices of samples"):
        measurement((5.0, 5.0), disturbed=marks)


@pytest.mark.parametrize("samples_ms", [(), (1.0, 0.0), (1.0, -1.0), (float("nan"),), (1e999,)])
def test_samples_must_be_positive_numbers(samples_ms: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="samples_ms must be finite, positive"):
        measurement(samples_ms)


@pytest.mark.parametrize("n", [*range(6, 101), 1000])
def test_the_medians_interval_covers_95_percent_and_hardly_more(n: int) -> None:
    # With samples 0..n-1 the interval's ends are the order statistics' indices; a median lies
    # between them as often as a fair coin shows heads between so many times.
    low, high = median_interval(np.arange(n, dtype=np.float64))
    coverage = binom.cdf(high, n, 0.5) - binom.cdf(low, n, 0.5)
    assert coverage >= 0.95
    assert (low, high) == (low, n - 1 - low)
    # One more sample left out at each end would be too many.
    assert binom.cdf(high - 1, n, 0.5) - binom.cdf(low + 1, n, 0.5) < 0.95


def test_the_medians_interval_of_few_samples_is_their_range() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    assert median_interval(np.array([3.0])) == (3.0, 3.0)


def test_a_fingerprint_depends_on_every_value_but_not_on_the_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": (2,), "a": 1})
    assert fingerprint({"a": 1, "b": [2]}) != fingerprint({"a": 1, "b": [3]})


def test_a_measurement_survives_json() -> None:
    taken = measurement((1.25, 1.5))
    text = json.dumps(to_plain(taken))
    assert build(Measurement, json.loads(text), where="test") == taken


def test_a_summary_is_json_with_the_units_in_its_keys() -> None:
    taken = measurement(tuple(float(n) for n in range(1, 102)))
    figures = json.loads(json.dumps(summary(taken), allow_nan=False))
    assert figures["median_ms"] == 51.0
    assert figures["iqr_ms"] == 50.0
    assert figures["p90_ms"] == 91.0
    assert (figures["median_low_ms"], figures["median_high_ms"]) == taken.median_interval_ms
    assert figures["samples"] == 101
    assert figures["verdict"] == "noisy"
    assert figures["device"] == {"name": "host", "threads": 1}
    assert figures["device_fingerprint"] == taken.device_fingerprint
    assert figures["metrics"] == {"model_mb": 0.1}
