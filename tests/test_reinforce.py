"""REINFORCE: exact gradients, what each outcome teaches, and the bar."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toy_spaces import best_of_seeds, completed, toy_space

from controller.base import Outcome, Proposal, Result, state_to_bytes
from controller.policy import LSTMPolicy, PolicyConfig
from controller.ppo import Surrogate
from controller.random_search import RandomConfig
from controller.reinforce import Reinforce, ReinforceConfig, Softmaxes
from space.errors import ConfigError
from space.records import build

CHOICES = (3, 2, 4)


def make_reinforce(*, config: ReinforceConfig | None = None) -> Reinforce:
    return Reinforce(config or ReinforceConfig(), CHOICES, np.random.default_rng(0))


def random_softmaxes() -> Softmaxes:
    policy = Softmaxes(CHOICES)
    policy.logits[...] = np.random.default_rng(1).normal(size=policy.logits.shape)
    return policy


def probability(reinforce: Reinforce, tokens: tuple[int, ...]) -> float:
    p = reinforce.policy.probabilities()
    return float(np.prod(p[np.arange(len(tokens)), list(tokens)]))


# ---------------------------------------------------------------- the policy


def test_zero_logits_are_the_uniform_distribution() -> None:
    policy = Softmaxes(CHOICES)
    tokens, log_prob = policy.sample(5, np.random.default_rng(0))
    assert tokens.shape == (5, 3)
    np.testing.assert_allclose(log_prob, -math.log(3 * 2 * 4))
    np.testing.assert_allclose(policy.entropies(), np.log(CHOICES))


def test_draws_follow_the_probabilities_and_log_prob_is_theirs() -> None:
    policy = random_softmaxes()
    tokens, log_prob = policy.sample(20_000, np.random.default_rng(2))
    p = policy.probabilities()
    for d, n in enumerate(CHOICES):
        expected = 20_000 * p[d, :n]
        counts = np.bincount(tokens[:, d], minlength=n)
        # At most 3 degrees of freedom: above 32 with a probability below 6e-7.
        assert ((counts - expected) ** 2 / expected).sum() < 32
    np.testing.assert_allclose(log_prob, np.log(p[np.arange(3), tokens]).sum(axis=1))


def test_the_gradient_equals_finite_differences() -> None:
    policy = random_softmaxes()
    tokens, _ = policy.sample(6, np.random.default_rng(3))
    advantages = np.random.default_rng(4).normal(size=6)

    def objective() -> float:
        log_p = np.log(policy.probabilities()[np.arange(3), tokens]).sum(axis=1)
        return float((advantages * log_p).mean() + 0.3 * policy.entropies().sum())

    gradient = policy.gradient(tokens, advantages, 0.3)
    numeric = np.zeros_like(gradient)
    for index in np.ndindex(*gradient.shape):
        logit = policy.logits[index]
        policy.logits[index] = logit + 1e-6
        above = objective()
        policy.logits[index] = logit - 1e-6
        numeric[index] = (above - objective()) / 2e-6
        policy.logits[index] = logit
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)


def test_extreme_logits_stay_finite() -> None:
    policy = Softmaxes(CHOICES)
    policy.logits[...] = np.array([1e4, 0, -1e4, -1e4])
    policy.logits[1] = -1e6  # far below the padding
    tokens, log_prob = policy.sample(50, np.random.default_rng(0))
    assert set(tokens[:, 0]) == {0}
    assert np.isfinite(log_prob).all()
    assert np.isfinite(policy.gradient(tokens, np.ones(50), 0.1)).all()


def test_one_epoch_of_ppo_on_fresh_results_is_this_update_of_the_papers_policy() -> None:
    policy = LSTMPolicy(PolicyConfig(hidden_size=8), CHOICES, np.random.default_rng(0))
    drawn = policy.sample(5, np.random.default_rng(1))
    advantages = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    loss = Surrogate(
        policy.evaluate(drawn.tokens),
        old_log_prob=drawn.log_prob,
        advantages=advantages,
        clip_range=0.5,
        entropy_weight=0.2,
    )
    expected = np.broadcast_to(-advantages[:, None] / 5, (5, 3))
    np.testing.assert_allclose(loss.d_log_probs, expected)
    np.testing.assert_allclose(loss.d_entropies, -0.2 / 5)


# ---------------------------------------------------------------- learning


def test_a_better_reward_makes_its_tokens_more_likely() -> None:
    reinforce = make_reinforce()
    good, bad = (0, 0, 0), (2, 1, 3)
    before = probability(reinforce, good)
    reinforce.propose(2)
    reinforce.update(
        [completed(Proposal(0, good, 0.0), 0.9), completed(Proposal(1, bad, 0.0), 0.1)]
    )
    assert probability(reinforce, good) > before > probability(reinforce, bad)


@pytest.mark.parametrize("outcome", ["failed", "rejected", "stopped"])
def test_an_outcome_without_reward_makes_its_tokens_less_likely(outcome: Outcome) -> None:
    reinforce = make_reinforce()
    proposal = reinforce.propose(1)[0]
    before = probability(reinforce, proposal.tokens)
    reinforce.update([Result(proposal, outcome, None, None, {})])
    assert probability(reinforce, proposal.tokens) < before
    assert reinforce.diagnostics()["baseline"] == 0


def test_equal_rewards_leave_the_uniform_policy_alone() -> None:
    reinforce = make_reinforce()
    reinforce.update([completed(p, 0.1 + 0.2) for p in reinforce.propose(4)])
    np.testing.assert_allclose(reinforce.policy.logits, 0, atol=1e-6)


def test_the_entropy_bonus_pulls_a_policy_back_to_uniform() -> None:
    reinforce = make_reinforce()
    reinforce.policy.logits[0, 0] = 3.0
    before = reinforce.policy.entropies()[0]
    for _ in range(3):
        reinforce.update([completed(p, 0.5) for p in reinforce.propose(4)])
    assert reinforce.policy.entropies()[0] > before


def test_the_scale_of_the_rewards_does_not_matter() -> None:
    small, large = make_reinforce(), make_reinforce()
    for reinforce, factor in ((small, 1.0), (large, 1024.0)):
        for _ in range(3):
            made = reinforce.propose(4)
            reinforce.update([completed(p, factor * (sum(p.tokens) - 3.0)) for p in made])
    np.testing.assert_array_equal(small.policy.logits, large.policy.logits)


def test_a_part_of_a_batch_teaches_as_if_it_were_the_batch() -> None:
    whole, part = make_reinforce(), make_reinforce()
    whole.update([completed(p, 0.1 * p.id) for p in whole.propose(3)])
    part.update([completed(p, 0.1 * p.id) for p in part.propose(5)[:3]])
    np.testing.assert_array_equal(whole.policy.logits, part.policy.logits)


def test_no_results_and_observed_trials_change_nothing() -> None:
    reinforce = make_reinforce()
    reinforce.propose(2)
    before = state_to_bytes(reinforce.state_dict())
    reinforce.update([])
    reinforce.observe([completed(Proposal(0, (0, 0, 0), 0.0), 0.9)])
    assert state_to_bytes(reinforce.state_dict()) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("entropy_weight", -0.1),
        ("baseline_decay", 1.0),
        ("failure_advantage", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be in"):
        build(ReinforceConfig, {key: value}, where="test")


def test_reinforce_beats_random_search_and_comes_near_the_optimum() -> None:
    space = toy_space(0)
    reinforce = best_of_seeds(ReinforceConfig(), space, 20)
    random = best_of_seeds(RandomConfig(), space, 20)
    assert (reinforce > random).sum() >= 18
    assert (reinforce >= 0.95).sum() >= 10
