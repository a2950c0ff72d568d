"""PPO: what it does with each outcome, its baseline and guards, resuming, and the bar to clear."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from toy_spaces import best_of_seeds, completed, rewards_of, toy_space

from controller.base import Proposal, Result, state_from_bytes, state_to_bytes
from controller.contract import play
from controller.policy import LSTMPolicy, PolicyConfig
from controller.ppo import PPO, PPOConfig, Surrogate
from controller.random_search import RandomConfig, RandomSearch
from controller.registry import (
    CONTROLLERS,
    BuiltInControllerConfig,
    ControllerConfig,
    make_controller,
)
from controller.reward_scale import RewardScale
from space.errors import ConfigError
from space.records import build, record

CHOICES = (3, 2, 4)


def make_ppo(
    num_choices: tuple[int, ...] = CHOICES, *, seed: int = 0, config: PPOConfig | None = None
) -> PPO:
    return PPO(config or PPOConfig(), num_choices, np.random.default_rng(seed))


def probability(ppo: PPO, tokens: tuple[int, ...]) -> float:
    log_probs = ppo.policy.evaluate(np.array([tokens], dtype=np.int64)).log_probs
    return float(np.exp(log_probs.sum()))


def failed(proposal: Proposal) -> Result:
    return Result(proposal, "failed", None, None, {}, cause="architecture")


# ---------------------------------------------------------------- learning


def test_a_better_reward_makes_its_tokens_more_likely() -> None:
    ppo = make_ppo()
    good, bad = (0, 0, 0), (2, 1, 3)
    before = probability(ppo, good), probability(ppo, bad)
    proposals = [
        dataclasses.replace(p, tokens=t, log_prob=float(np.log(probability(ppo, t))))
        for p, t in zip(ppo.propose(2), (good, bad), strict=True)
    ]
    ppo.update([completed(proposals[0], 0.9), completed(proposals[1], 0.1)])
    assert probability(ppo, good) > before[0]
    assert probability(ppo, bad) < before[1]


def test_a_reused_result_teaches_like_a_completed_one() -> None:
    fresh, reused = make_ppo(), make_ppo()
    rewards = (0.1, 0.5, 0.9, 0.3)
    fresh.update([completed(p, r) for p, r in zip(fresh.propose(4), rewards, strict=True)])
    reused.update(
        [
            Result(p, "reused", r, r, {}, reused=True)
            for p, r in zip(reused.propose(4), rewards, strict=True)
        ]
    )
    np.testing.assert_array_equal(fresh.policy.parameters, reused.policy.parameters)


@pytest.mark.parametrize("outcome", ["failed", "rejected", "stopped"])
def test_an_outcome_without_reward_makes_its_tokens_less_likely(outcome: str) -> None:
    ppo = make_ppo()
    proposal = ppo.propose(1)[0]
    before = probability(ppo, proposal.tokens)
    ppo.update([Result(proposal, outcome, None, None, {})])  # type: ignore[arg-type]
    assert probability(ppo, proposal.tokens) < before


def test_outcomes_without_reward_leave_the_baseline_alone() -> None:
    ppo = make_ppo()
    proposals = ppo.propose(4)
    ppo.update([completed(p, r) for p, r in zip(proposals, (0.2, 0.4, 0.6, 0.8), strict=True)])
    before = ppo.diagnostics()
    ppo.update([failed(p) for p in ppo.propose(4)])
    after = ppo.diagnostics()
    assert (after["baseline"], after["spread"]) == (before["baseline"], before["spread"])
    assert "mean_reward" not in after


def test_the_scale_of_the_rewards_does_not_matter() -> None:
    small, large = make_ppo(), make_ppo()
    for ppo, factor in ((small, 1.0), (large, 1024.0)):
        for _ in range(3):
            made = ppo.propose(4)
            ppo.update([completed(p, factor * (sum(p.tokens) - 3.0)) for p in made])
    assert [p.tokens for p in small.propose(20)] == [p.tokens for p in large.propose(20)]


def test_equal_rewards_give_no_advantage() -> None:
    scale = RewardScale(0.75)
    for _ in range(3):
        np.testing.assert_array_equal(scale.advantages(np.full(4, 0.1 + 0.2)), np.zeros(4))


def test_the_first_advantages_are_the_rewards_standardised() -> None:
    rewards = np.array([0.1, 0.4, 0.3, 0.8])
    expected = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(RewardScale(0.75).advantages(rewards), expected)


def test_single_rewards_are_compared_with_those_before_them() -> None:
    scale = RewardScale(0.75)
    values = [float(scale.advantages(np.array([r]))[0]) for r in (0.5, 0.6, 0.4)]
    assert values[0] == 0
    assert values[1] > 0 > values[2]


def test_the_baseline_is_the_moving_average_of_its_definition() -> None:
    scale = RewardScale(0.5)
    for batch in ([1.0], [2.0, 4.0]):
        scale.advantages(np.array(batch))
    # Weights: 1/2 for the first reward, decayed twice; 3/4 for the mean of the second batch.
    assert scale.mean == pytest.approx((0.125 * 1 + 0.75 * 3) / 0.875)


def test_no_reward_at_all_leaves_the_scale_empty() -> None:
    scale = RewardScale(0.75)
    assert len(scale.advantages(np.array([]))) == 0
    assert (scale.mean, scale.spread) == (0, 0)


# ---------------------------------------------------------------- the clipped loss


def surrogate(log_ratio: float, advantage: float) -> Surrogate:
    """Of one trial of one uniform decision of two choices, entropy left out."""
    policy = LSTMPolicy(PolicyConfig(), (2,), np.random.default_rng(0))
    policy.weights["output_weight"][...] = 0
    evaluation = policy.evaluate(np.array([[0]]))
    return Surrogate(
        evaluation,
        old_log_prob=np.array([np.log(0.5) - log_ratio]),
        advantages=np.array([advantage]),
        clip_range=0.2,
        entropy_weight=0.0,
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # has gained enough
        (0.5, 2.0, -1.0, -1.0),  # may come back
        (0.5, -2.0, 1.6, 0.0),  # has lost enough
        (1.5, -2.0, 3.0, 3.0),  # may come back
    ],
)
def test_the_clipped_loss_has_the_values_of_its_paper(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    found = surrogate(float(np.log(ratio)), advantage)
    assert found.loss == pytest.approx(loss)
    assert found.d_log_probs[0, 0] == pytest.approx(slope)


def test_a_hopelessly_old_log_probability_stays_finite() -> None:
    found = surrogate(1e6, -1.0)
    assert np.isfinite([found.loss, found.approx_kl, found.d_log_probs[0, 0]]).all()


# ---------------------------------------------------------------- late, double, unknown results


def test_late_results_are_learned_from_until_they_are_too_old() -> None:
    ppo = make_ppo(config=PPOConfig(max_staleness=2))
    late, too_late = ppo.propose(2)
    for _ in range(2):
        ppo.update([completed(p, 0.5) for p in ppo.propose(1)])
    ppo.update([completed(late, 0.9)])
    assert ppo.diagnostics()["dropped"] == 0
    before = ppo.policy.parameters.copy()
    ppo.update([completed(too_late, 0.9)])
    assert ppo.diagnostics()["dropped"] == 1
    np.testing.assert_array_equal(ppo.policy.parameters, before)


def test_a_late_result_pushes_no_further_than_the_clip_range() -> None:
    config = PPOConfig(epochs=1, entropy_weight=0.0)
    ppo = make_ppo(config=config)
    ppo.update([completed(p, 0.1 * p.id) for p in ppo.propose(4)])
    # Good tokens that the policy has learned to draw at e times the probability meanwhile.
    late = ppo.propose(1)[0]
    late = dataclasses.replace(late, log_prob=late.log_prob - 1.0)
    ppo.update([completed(late, 0.9)])
    assert ppo.diagnostics()["clip_fraction"] == 1
    assert ppo.diagnostics()["gradient_norm"] == 0


def test_every_minibatch_is_a_step_of_its_own() -> None:
    ppo = make_ppo(config=PPOConfig(epochs=3, minibatch_size=2))
    ppo.update([completed(p, 0.1 * p.id) for p in ppo.propose(5)])
    assert ppo.state_dict()["adam"]["steps"] == 3 * 3


def test_a_second_result_of_a_proposal_is_dropped() -> None:
    ppo = make_ppo()
    results = [completed(p, 0.1 * p.id) for p in ppo.propose(4)]
    ppo.update(results)
    before = ppo.policy.parameters.copy()
    ppo.update(results)
    assert ppo.diagnostics()["dropped"] == 4
    np.testing.assert_array_equal(ppo.policy.parameters, before)


def test_a_proposal_that_was_never_made_is_refused() -> None:
    ppo = make_ppo()
    ppo.propose(2)
    with pytest.raises(ValueError, match=r"proposal\.id .* got 2"):
        ppo.update([completed(Proposal(2, (0, 0, 0), -1.0), 0.5)])


@pytest.mark.parametrize("tokens", [(0, 0), (0, 2, 0), (-1, 0, 0)])
def test_tokens_of_another_space_are_refused(tokens: tuple[int, ...]) -> None:
    ppo = make_ppo()
    ppo.propose(1)
    with pytest.raises(ValueError, match="tokens must be"):
        ppo.update([completed(Proposal(0, tokens, -1.0), 0.5)])


def test_less_than_one_proposal_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be >= 1"):
        make_ppo().propose(0)


def test_observed_trials_change_nothing() -> None:
    ppo = make_ppo()
    before = state_to_bytes(ppo.state_dict())
    ppo.observe([completed(Proposal(0, (0, 0, 0), 0.0), 0.9)])
    assert state_to_bytes(ppo.state_dict()) == before


# ---------------------------------------------------------------- entropy


def one_winner(tokens: Sequence[int]) -> float:
    return float(np.mean([token == 0 for token in tokens]))


def test_exploration_keeps_a_policy_without_bonus_from_collapsing() -> None:
    shares = []
    for exploration in (0.0, 1.0):
        policy = PolicyConfig(hidden_size=16, embedding_size=16, exploration=exploration)
        config = PPOConfig(
            entropy_weight=0.0, min_entropy_share=0.0, learning_rate=2e-2, policy=policy
        )
        ppo = make_ppo((4,) * 6, config=config)
        rewards_of(ppo, one_winner, trials=640, batch=16)
        shares.append(ppo.diagnostics()["unique_share"])
    assert shares[0] == 1 / 16
    assert shares[1] > 0.15


def test_a_policy_that_collapses_is_reported_and_its_entropy_restored() -> None:
    policy = PolicyConfig(hidden_size=16, embedding_size=16, exploration=0.0)
    config = PPOConfig(
        entropy_weight=0.0, min_entropy_share=0.3, learning_rate=2e-2, policy=policy
    )
    ppo = make_ppo((4,) * 6, config=config)
    found = []
    for _ in range(40):
        rewards_of(ppo, one_winner, trials=16, batch=16)
        found.append(ppo.diagnostics())
    assert {d["entropy_weight"] for d in found if d["collapsed"]} == {1.0}
    assert {d["entropy_weight"] for d in found if not d["collapsed"]} == {0.0}
    assert all((d["entropy_share"] < 0.3) == bool(d["collapsed"]) for d in found)
    assert min(d["entropy_share"] for d in found) > 0.15
    assert found[-1]["unique_share"] > 0.15


def test_the_entropy_weight_falls_to_its_final_value() -> None:
    config = PPOConfig(entropy_weight=0.3, entropy_weight_final=0.1, entropy_trials=8)
    ppo = make_ppo(config=config)
    weights = []
    for _ in range(4):
        ppo.update([completed(p, 0.5) for p in ppo.propose(4)])
        weights.append(ppo.diagnostics()["entropy_weight"])
    assert weights == pytest.approx([0.3, 0.2, 0.1, 0.1])


def test_diagnostics_say_what_their_names_say() -> None:
    ppo = make_ppo((2,) * 4)
    ppo.update([completed(p, r) for p, r in zip(ppo.propose(2), (0.2, 0.4), strict=True)])
    found = ppo.diagnostics()
    assert found["mean_reward"] == pytest.approx(0.3)
    assert found["baseline"] == pytest.approx(0.3)
    assert found["spread"] == pytest.approx(0.1)
    assert found["entropy"] == pytest.approx(np.log(2), rel=0.02)
    assert found["entropy_share"] == pytest.approx(1, rel=0.02)
    assert found["approx_kl"] >= 0
    assert found["unique_share"] in (0.5, 1.0)


# ---------------------------------------------------------------- states

CONTINUE = """
import json, sys
import numpy as np
from controller.base import state_from_bytes, state_to_bytes
from controller.contract import play
from controller.ppo import PPO, PPOConfig
ppo = PPO(PPOConfig(), {choices}, np.random.default_rng(99))
with open(sys.argv[1], "rb") as file:
    ppo.load_state_dict(state_from_bytes(file.read()))
made = play(ppo, {choices}, batch=16)
with open(sys.argv[2], "wb") as file:
    file.write(state_to_bytes(ppo.state_dict()))
print(json.dumps([[p.id, p.tokens, p.log_prob.hex()] for p in made]))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_new_process_continues_a_saved_state_bit_for_bit(tmp_path: Path, threads: str) -> None:
    ppo = make_ppo()
    play(ppo, CHOICES, batch=16)
    ppo.propose(2)  # without a result yet
    (tmp_path / "before").write_bytes(state_to_bytes(ppo.state_dict()))
    program = CONTINUE.format(choices=CHOICES)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "before"), str(tmp_path / "after")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
    )
    made = play(ppo, CHOICES, batch=16)
    expected = [[p.id, list(p.tokens), p.log_prob.hex()] for p in made]
    assert json.loads(done.stdout) == expected
    assert (tmp_path / "after").read_bytes() == state_to_bytes(ppo.state_dict())


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_state_of_another_space_is_refused_and_both_are_named(controller: str) -> None:
    config = build(_Holder, {"controller": {"name": controller}}, where="test").controller
    other = make_controller(config, (2, 2), np.random.default_rng(0))
    mine = make_controller(config, CHOICES, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\[3, 2, 4\].*\[2, 2\]"):
        mine.load_state_dict(state_from_bytes(state_to_bytes(other.state_dict())))


def test_a_state_of_another_controller_is_refused_and_both_are_named() -> None:
    state = RandomSearch(RandomConfig(), CHOICES, np.random.default_rng(0)).state_dict()
    with pytest.raises(ValueError, match=r"'ppo'.*'random'"):
        make_ppo().load_state_dict(state)


def test_a_state_of_a_policy_of_another_size_is_refused_and_changes_nothing() -> None:
    small = make_ppo(config=PPOConfig(policy=PolicyConfig(hidden_size=8)))
    ppo = make_ppo()
    before = state_to_bytes(ppo.state_dict())
    with pytest.raises(ValueError, match="parameters"):
        ppo.load_state_dict(small.state_dict())
    assert state_to_bytes(ppo.state_dict()) == before


# ---------------------------------------------------------------- configuration


@record
class _Holder:
    controller: ControllerConfig


def read(values: dict[str, object]) -> BuiltInControllerConfig:
    return build(_Holder, {"controller": values}, where="test").controller


def test_a_name_chooses_the_controller() -> None:
    assert read({"name": "random"}) == RandomConfig()
    config = read({"name": "ppo", "learning_rate": 1e-4, "policy": {"hidden_size": 32}})
    assert config == PPOConfig(learning_rate=1e-4, policy=PolicyConfig(hidden_size=32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", "1e-4"),
        ("clip_range", 1.0),
        ("epochs", 0),
        ("minibatch_size", 0),
        ("entropy_weight", -0.1),
        ("entropy_weight_final", -1.0),
        ("entropy_trials", 0),
        ("min_entropy_share", 1.0),
        ("baseline_decay", 1.0),
        ("failure_advantage", 0.0),
        ("max_gradient_norm", 0.0),
        ("max_staleness", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"controller.{key} must be"):
        read({"name": "ppo", key: value})


def test_an_unknown_controller_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        read({"name": "randon"})


# ---------------------------------------------------------------- the bar


def test_ppo_beats_random_search_and_comes_near_the_optimum() -> None:
    space = toy_space(0)
    assert space.size >= 100_000
    assert space.values.max() == 1
    ppo = best_of_seeds(PPOConfig(), space, 20)
    random = best_of_seeds(RandomConfig(), space, 20)
    assert (ppo > random).sum() >= 18
    assert (ppo >= 0.95).sum() >= 16


def test_ppo_beats_random_search_where_interactions_prevail() -> None:
    space = toy_space(11, interaction=2.0)
    ppo = best_of_seeds(PPOConfig(), space, 6)
    random = best_of_seeds(RandomConfig(), space, 6)
    assert (ppo > random).all()
    assert np.median(ppo) >= 0.95
