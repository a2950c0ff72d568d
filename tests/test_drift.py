"""The drift guard on a device whose clock is the test's: what leaves it, what is taken again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from latency.config import DriftConfig
from latency.contract import check_meter
from latency.device import LatencyMeter, OnnxRuntimeConfig, make_meter
from latency.drift import DriftGuard
from latency.measurement import Measurement
from space.architecture import (
    PAPER_STYLE,
    Architecture,
    NetworkStyle,
    graph_hash,
    parse_architecture,
)
from space.errors import MeasurementError
from space.mnasnet import published


def network(width: int) -> Architecture:
    return parse_architecture(f"stem{width} | r1_k3_s11_e1_i{width}_o8 | head16 | r16 | c10 | in1")


NETWORKS = [network(width) for width in (8, 16, 24, 32, 40, 48)]
REFERENCE = published("mnasnet-small")


class StandInDevice(LatencyMeter):
    """Takes one second per measurement; `slowdown` says at which second it is how slow."""

    def __init__(self, slowdown: Callable[[float], float]) -> None:
        self.now_s = 0.0
        self.slowdown = slowdown
        self.measured: list[Architecture] = []

    def identity(self) -> dict[str, Any]:
        return {"name": "stand-in"}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        factor = self.slowdown(self.now_s)
        self.now_s += 1.0
        self.measured.append(architecture)
        if factor == 0:
            raise MeasurementError("unplugged")
        ms = factor * architecture.stem_filters
        return Measurement(
            (ms,), 1, 0, 1, graph_hash(architecture, style), self.identity(), {}, {}
        )

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def guard(self, **changes: Any) -> DriftGuard:
        config = DriftConfig(**{"every": 2, "pause_s": 10.0, **changes})
        return DriftGuard(self, config, sleep=self.sleep)


def between(start_s: float, end_s: float, factor: float) -> Callable[[float], float]:
    return lambda now_s: factor if start_s <= now_s < end_s else 1.0


def measured(guard: DriftGuard, networks: Sequence[Architecture]) -> list[Measurement]:
    outcomes = list(guard.measure_all(networks))
    assert [architecture for architecture, _ in outcomes] == list(networks)
    taken = [outcome for _, outcome in outcomes if isinstance(outcome, Measurement)]
    assert len(taken) == len(networks)
    return taken


def test_a_steady_device_is_checked_at_the_start_and_after_every_so_many_networks() -> None:
    device = StandInDevice(lambda now_s: 1.0)
    taken = measured(device.guard(), NETWORKS[:5])
    r, (a, b, c, d, e) = REFERENCE, NETWORKS[:5]
    assert device.measured == [r, r, a, b, r, c, d, r, e, r]
    assert [found.verdict for found in taken] == ["ok"] * 5
    assert taken[0].environment["drift"] == {
        "reference": REFERENCE.text, "start_ms": 8.0, "change": 0.0,
    }  # fmt: skip


def test_figures_taken_while_the_device_was_slow_are_taken_again_when_it_has_rested() -> None:
    # 0, 1: the start. 2, 3: two networks. 4: a check. 5, 6: the next two, slow. 7: the check.
    device = StandInDevice(between(5.0, 15.0, 1.5))
    taken = measured(device.guard(), NETWORKS)
    assert [found.median_ms for found in taken] == [8, 16, 24, 32, 40, 48]
    assert [found.verdict for found in taken] == ["ok"] * 6
    assert device.measured.count(NETWORKS[2]) == 2
    assert device.measured.count(NETWORKS[0]) == device.measured.count(NETWORKS[4]) == 1


def test_a_device_that_stays_slow_flags_its_figures_and_recovers() -> None:
    device = StandInDevice(between(5.0, 41.0, 1.2))
    taken = measured(device.guard(tries=3), NETWORKS)
    assert [found.verdict for found in taken] == ["ok", "ok", "drifted", "drifted", "ok", "ok"]
    assert taken[2].environment["drift"]["change"] == pytest.approx(0.2)
    assert taken[4].median_ms == 40


@pytest.mark.parametrize("end_s", [41.0, 42.0, 43.0])
def test_what_was_measured_before_a_device_recovered_is_measured_again(end_s: float) -> None:
    # Slow at the last check, it comes to rest before, among or after the next two networks.
    device = StandInDevice(between(5.0, end_s, 1.2))
    taken = measured(device.guard(tries=3), NETWORKS)
    assert [found.verdict for found in taken] == ["ok", "ok", "drifted", "drifted", "ok", "ok"]
    assert [found.median_ms for found in taken[4:]] == [40, 48]


def test_a_device_that_gets_faster_has_drifted_too() -> None:
    device = StandInDevice(lambda now_s: 1.0 if now_s < 5 else 0.9)
    taken = measured(device.guard(tries=1), NETWORKS[:4])
    assert [found.drifted for found in taken] == [False, False, True, True]


def test_a_device_that_was_slow_at_its_start_is_held_against_its_faster_time_later() -> None:
    device = StandInDevice(between(0.0, 5.0, 1.3))
    taken = measured(device.guard(tries=1), [*NETWORKS, network(56)])
    verdicts = [found.verdict for found in taken]
    assert verdicts == ["ok", "ok", *["drifted"] * 4, "ok"]
    starts_ms = [found.environment["drift"]["start_ms"] for found in taken[::2]]
    assert starts_ms == pytest.approx([10.4, 10.4, 10.4, 8.0])


def test_a_device_that_is_fast_only_now_and_then_keeps_its_start() -> None:
    # 2, 3: two networks. 4, 6: checks, fast both. 9: the next one, as at the start.
    device = StandInDevice(between(4.0, 7.0, 0.5))
    taken = measured(device.guard(tries=1, pause_s=1.0), NETWORKS)
    assert {found.environment["drift"]["start_ms"] for found in taken} == {8.0}
    assert [found.verdict for found in taken] == ["drifted"] * 2 + ["ok"] * 4


def test_a_change_within_the_bound_is_accepted() -> None:
    device = StandInDevice(between(5.0, 1000.0, 1.04))
    assert not any(found.drifted for found in measured(device.guard(bound=0.05), NETWORKS))
    assert len(device.measured) == 2 + len(NETWORKS) + 3


def test_nothing_leaves_before_the_check_that_follows_it() -> None:
    device = StandInDevice(lambda now_s: 1.0)
    outcomes = device.guard(every=3).measure_all(NETWORKS)
    next(outcomes)
    assert device.measured[2:] == [*NETWORKS[:3], REFERENCE]


def test_one_network_is_checked_by_itself() -> None:
    device = StandInDevice(between(2.0, 8.0, 2.0))
    assert device.guard().measure(NETWORKS[0]).median_ms == 8


def test_the_start_waits_for_two_times_that_agree() -> None:
    device = StandInDevice(lambda now_s: 1.0 + max(0.0, 0.3 - 0.1 * now_s))
    guard = device.guard(tries=5)
    assert guard.measure(NETWORKS[0]).environment["drift"]["start_ms"] == pytest.approx(8.0)


def test_a_device_that_never_comes_to_rest_gives_no_figures() -> None:
    device = StandInDevice(lambda now_s: 1.0 + now_s)
    outcomes = list(device.guard().measure_all(NETWORKS[:2]))
    errors = [str(outcome) for _, outcome in outcomes]
    assert all("must take the same time twice in a row within 5%" in error for error in errors)
    with pytest.raises(MeasurementError, match="let the device come to rest"):
        device.guard().measure(NETWORKS[0])


def test_a_reference_that_cannot_be_measured_flags_what_was() -> None:
    device = StandInDevice(lambda now_s: 0.0 if now_s == 4 or now_s > 10 else 1.0)
    taken = measured(device.guard(tries=2), NETWORKS[:2])
    assert [found.verdict for found in taken] == ["drifted", "drifted"]
    assert taken[0].environment["drift"]["change"] is None


def test_a_network_without_a_figure_keeps_its_reason() -> None:
    device = StandInDevice(lambda now_s: 0.0 if now_s == 2 else 1.0)
    (_, first), (_, second) = device.guard().measure_all(NETWORKS[:2])
    assert isinstance(first, MeasurementError)
    assert str(first) == "unplugged"
    assert isinstance(second, Measurement)


def test_a_guarded_meter_keeps_the_contract_and_its_identity() -> None:
    guard = StandInDevice(lambda now_s: 1.0).guard()
    assert [r for r in check_meter(guard, NETWORKS[0]) if not r.passed] == []
    assert guard.identity() == {"name": "stand-in"}


def test_a_device_s_configuration_puts_it_under_its_guard() -> None:
    plain = OnnxRuntimeConfig("here", "onnxruntime", effort="quick")
    guarded = OnnxRuntimeConfig("here", "onnxruntime", effort="quick", drift=DriftConfig())
    meter = make_meter(guarded)
    assert isinstance(meter, DriftGuard)
    assert meter.identity() == make_meter(plain).identity()
