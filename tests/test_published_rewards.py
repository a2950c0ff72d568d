"""The published networks' rewards, from the accuracies and latencies that the paper gives itself.

Figures are those of Tan et al., "MnasNet: Platform-Aware Neural Architecture Search for Mobile",
CVPR 2019: top-1 on ImageNet and milliseconds on a Pixel 1, from the paper's table of results for
mobile networks (A1, A2, A3, B1, MobileNetV2) and from its comparison of small networks searched
for 22 ms (`small`, and A1 and MobileNetV2 at 0.35 of their width). Nothing here is measured.
"""

from __future__ import annotations

import pytest

from search.objective import Objective, ObjectiveConfig

#: Name -> top-1 (fraction), milliseconds.
PUBLISHED = {
    "mnasnet-a1": (0.752, 78.0),
    "mnasnet-a2": (0.756, 84.0),
    "mnasnet-a3": (0.767, 103.0),
    "mnasnet-b1": (0.745, 77.0),
    "mobilenet-v2": (0.720, 75.0),
}
#: The same for a target of 22 ms; `small` is the one of 2.0 M parameters.
PUBLISHED_SMALL = {
    "mnasnet-small": (0.660, 23.2),
    "small of 1.9 M": (0.649, 22.0),
    "mnasnet-a1 x0.35": (0.641, 22.8),
    "mobilenet-v2 x0.35": (0.603, 21.4),
}

SOFT = Objective(ObjectiveConfig("soft", target_ms=75.0), 75.0)
SOFT_AS_WRITTEN = Objective(ObjectiveConfig("soft", target_ms=75.0, alpha=-0.07, beta=-0.07), 75.0)
HARD = Objective(ObjectiveConfig("hard", target_ms=75.0, alpha=0.0, beta=-1.0), 75.0)
SOFT_SMALL = Objective(ObjectiveConfig("soft", target_ms=22.0), 22.0)


def reward(objective: Objective, figures: tuple[float, float]) -> float:
    accuracy, latency_ms = figures
    return objective.reward(accuracy, {"latency_ms": latency_ms})[0]


def ranked(objective: Objective, figures: dict[str, tuple[float, float]]) -> list[str]:
    return sorted(figures, key=lambda name: -reward(objective, figures[name]))


@pytest.mark.parametrize("objective", [SOFT, SOFT_AS_WRITTEN])
def test_the_papers_soft_metric_puts_a1_before_b1_and_small(objective: Objective) -> None:
    a1, b1 = PUBLISHED["mnasnet-a1"], PUBLISHED["mnasnet-b1"]
    small = PUBLISHED_SMALL["mnasnet-small"]
    # ACC * (LAT / 75) ** -0.07
    assert reward(objective, a1) == pytest.approx(0.752 * 1.04**-0.07, rel=1e-12)
    assert reward(objective, a1) == pytest.approx(0.749938, abs=5e-7)
    assert reward(objective, b1) == pytest.approx(0.745 * (77 / 75) ** -0.07, rel=1e-12)
    assert reward(objective, b1) == pytest.approx(0.743629, abs=5e-7)
    # The 23 ms of `small` are rewarded, but not as much as its 9.2 points less accuracy cost.
    assert reward(objective, small) == pytest.approx(0.660 * (23.2 / 75) ** -0.07, rel=1e-12)
    assert reward(objective, small) == pytest.approx(0.716496, abs=5e-7)
    figures = {"mnasnet-small": small, "mnasnet-b1": b1, "mnasnet-a1": a1}
    assert ranked(objective, figures) == ["mnasnet-a1", "mnasnet-b1", "mnasnet-small"]


def test_the_papers_hard_metric_takes_from_a1_and_b1_what_they_are_above_the_target() -> None:
    a1, b1 = PUBLISHED["mnasnet-a1"], PUBLISHED["mnasnet-b1"]
    small = PUBLISHED_SMALL["mnasnet-small"]
    assert reward(HARD, a1) == pytest.approx(0.752 * 75 / 78, rel=1e-12)
    assert reward(HARD, b1) == pytest.approx(0.745 * 75 / 77, rel=1e-12)
    assert reward(HARD, small) == 0.660
    # B1 is a millisecond nearer to 75. From 78 ms on nothing is taken from either: A1 is first.
    figures = {"mnasnet-small": small, "mnasnet-a1": a1, "mnasnet-b1": b1}
    assert ranked(HARD, figures) == ["mnasnet-b1", "mnasnet-a1", "mnasnet-small"]
    at_78 = Objective(ObjectiveConfig("hard", target_ms=78.0, alpha=0.0, beta=-1.0), 78.0)
    assert ranked(at_78, figures) == ["mnasnet-a1", "mnasnet-b1", "mnasnet-small"]


def test_soft_holds_a1_a2_and_a3_for_equally_good_and_all_others_for_worse() -> None:
    family = ["mnasnet-a3", "mnasnet-a2", "mnasnet-a1"]
    assert ranked(SOFT, PUBLISHED) == [*family, "mnasnet-b1", "mobilenet-v2"]
    rewards = [reward(SOFT, PUBLISHED[name]) for name in family]
    # 1.5 points and 25 ms apart, 0.0002 apart in reward: what the exponent was chosen for.
    assert rewards == pytest.approx([0.750155, 0.750026, 0.749938], abs=5e-7)


def test_the_network_searched_for_22_ms_is_before_scaled_ones_there() -> None:
    order = ["mnasnet-small", "small of 1.9 M", "mnasnet-a1 x0.35", "mobilenet-v2 x0.35"]
    assert ranked(SOFT_SMALL, PUBLISHED_SMALL) == order
    expected = 0.660 * (23.2 / 22) ** -0.07
    assert reward(SOFT_SMALL, PUBLISHED_SMALL["mnasnet-small"]) == pytest.approx(expected)
