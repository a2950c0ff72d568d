"""The reward in closed form (MnasNet paper, equations 2 and 3), and the Pareto front."""

from __future__ import annotations

import numpy as np
import pytest

from search.objective import Objective, ObjectiveConfig, TargetConfig
from search.pareto import best_networks, pareto_front
from search.trial import Trial
from space.errors import ConfigError
from space.records import build


def make_trial(
    trial_id: int, accuracy: float, latency_ms: float, reward: float = 0.5, **metrics: float
) -> Trial:
    return Trial(
        id=trial_id, batch=0, role="search", proposal_id=trial_id, tokens=(0,), log_prob=0.0,
        architecture="", architecture_hash=f"{trial_id:016x}", seed=0, epochs=1.0,
        outcome="completed", accuracy=accuracy, metrics={"latency_ms": latency_ms, **metrics},
        reward=reward,
    )  # fmt: skip


SOFT = Objective(ObjectiveConfig("soft", target_ms=80.0), 80.0)
ABSOLUTE = Objective(ObjectiveConfig("absolute", target_ms=80.0), 80.0)
HARD = Objective(ObjectiveConfig("hard", target_ms=80.0), 80.0)


@pytest.mark.parametrize(
    ("objective", "accuracy", "latency_ms", "reward"),
    [
        (SOFT, 0.75, 80.0, 0.75),
        (SOFT, 0.75, 160.0, 0.75 * 2**-0.07),
        (SOFT, 0.75, 40.0, 0.75 * 2**0.07),
        (HARD, 0.75, 80.0, 0.75),
        (HARD, 0.75, 40.0, 0.75),
        (HARD, 0.75, 160.0, 0.75 / 2),
        (HARD, 0.0, 160.0, 0.0),
        (ABSOLUTE, 0.75, 80.0, 0.75),
        (ABSOLUTE, 0.75, 160.0, 0.75 - 0.07),
        (ABSOLUTE, 0.75, 40.0, 0.75 - 0.035),
        (ABSOLUTE, 0.1, 800.0, 0.1 - 0.63),
    ],
)
def test_rewards_have_their_closed_form(
    objective: Objective, accuracy: float, latency_ms: float, reward: float
) -> None:
    value, parts = objective.reward(accuracy, {"latency_ms": latency_ms})
    assert value == pytest.approx(reward, rel=1e-12)
    assert parts.accuracy * parts.factor - parts.penalty == pytest.approx(value, rel=1e-12)
    assert parts.ratio == latency_ms / 80.0


def test_doubling_the_latency_costs_five_percent_of_relative_accuracy() -> None:
    slow, _ = SOFT.reward(0.75 * 1.05, {"latency_ms": 160.0})
    fast, _ = SOFT.reward(0.75, {"latency_ms": 80.0})
    assert slow == pytest.approx(fast, rel=0.001)


@pytest.mark.parametrize("objective", [SOFT, HARD, ABSOLUTE])
def test_the_vectorised_score_is_the_same_formula(objective: Objective) -> None:
    rng = np.random.default_rng(0)
    accuracy, latency = rng.random(50), rng.uniform(1, 300, 50)
    scores = objective.score(accuracy, {"latency_ms": latency})
    single = [
        objective.reward(float(a), {"latency_ms": float(m)})[0]
        for a, m in zip(accuracy, latency, strict=True)
    ]
    np.testing.assert_allclose(scores, single, rtol=1e-12)


def test_a_custom_exponent_replaces_the_names_own() -> None:
    custom = Objective(ObjectiveConfig("soft", target_ms=10.0, beta=-0.5), 10.0)
    assert custom.reward(1.0, {"latency_ms": 40.0})[0] == pytest.approx(0.5)
    assert custom.reward(1.0, {"latency_ms": 5.0})[0] == pytest.approx(2**0.07)


@pytest.mark.parametrize("latency", [0.0, -1.0, float("nan"), float("inf")])
def test_a_latency_that_is_none_never_becomes_a_reward(latency: float) -> None:
    with pytest.raises(ValueError, match="latency_ms must be finite and > 0"):
        SOFT.reward(0.5, {"latency_ms": latency})
    with pytest.raises(ValueError, match="latency_ms"):
        SOFT.reward(0.5, {})


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"target_ms": 0}, "target_ms must be > 0, but got 0.0"),
        ({"target_ms": -5}, "target_ms must be > 0"),
        ({}, "target_ms or target must be given, one of them, but got neither"),
        ({"target_ms": 5, "target": {"reference": "x"}}, "but got both"),
        ({"target": {"reference": "x", "times": 0}}, "target.times must be > 0"),
        ({"target_ms": 5, "alpha": 0.1}, "alpha must be <= 0"),
        ({"target_ms": 5, "name": "absolute", "alpha": -0.1}, "alpha must be left out"),
        ({"target_ms": 5, "reject_above": 0.5}, "reject_above must be >= 1"),
        ({"target_ms": 5, "name": "sofd"}, "did you mean 'soft'"),
    ],
)
def test_a_wrong_objective_gets_a_sentence(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(ObjectiveConfig, values, where="x.yaml")
    assert part in str(caught.value)


def test_a_target_may_be_a_multiple_of_a_reference() -> None:
    config = build(ObjectiveConfig, {"target": {"reference": "mnasnet-a1"}}, where="x")
    assert config.target == TargetConfig("mnasnet-a1", 1.0)


def test_rejection_before_training_is_off_by_default_and_counts_from_the_target() -> None:
    assert not SOFT.rejects({"latency_ms": 1e6})
    strict = Objective(ObjectiveConfig("soft", target_ms=10.0, reject_above=1.5), 10.0)
    assert not strict.rejects({"latency_ms": 15.0})
    assert strict.rejects({"latency_ms": 15.01})


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    trials = [
        make_trial(0, 0.70, 10.0),
        make_trial(1, 0.60, 12.0),  # beaten by 0
        make_trial(2, 0.80, 20.0),
        make_trial(3, 0.80, 20.0),  # equal to 2: the earlier one stands
        make_trial(4, 0.65, 5.0),
        make_trial(5, 0.80, 25.0),  # as accurate as 2, slower
    ]
    assert [t.id for t in pareto_front(trials)] == [4, 0, 2]


def test_a_front_of_other_objectives_keeps_what_is_best_in_each() -> None:
    trials = [
        make_trial(k, accuracy, 1.0 + k, macs=macs)
        for k, (accuracy, macs) in enumerate([(0.7, 5.0), (0.8, 9.0), (0.6, 3.0), (0.6, 6.0)])
    ]
    trials += [make_trial(4, 0.9, 0.1)]  # no macs
    assert [t.id for t in pareto_front(trials, ["accuracy", "macs"])] == [2, 0, 1]
    assert [t.id for t in pareto_front(trials, ["accuracy", "macs", "latency_ms"])] == [0, 1, 2]
    assert pareto_front(trials, ["accuracy", "energy_mj"]) == []


def test_the_best_networks_are_different_and_ties_go_to_the_earlier_trial() -> None:
    trials = [make_trial(i, 0.5, 1.0, reward) for i, reward in enumerate([0.3, 0.9, 0.9, 0.5])]
    assert [t.id for t in best_networks(trials, 3)] == [1, 2, 3]
    assert [t.id for t in best_networks(list(reversed(trials)), 3)] == [1, 2, 3]
