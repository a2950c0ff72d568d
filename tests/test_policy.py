"""The LSTM policy: closed-form values, exact gradients, draws that follow its probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from controller.policy import Adam, LSTMPolicy, PolicyConfig
from controller.ppo import Surrogate
from space.errors import ConfigError
from space.records import build

CHOICES = (3, 2, 5, 1, 4)


def make_policy(num_choices: tuple[int, ...] = CHOICES, **config: float | None) -> LSTMPolicy:
    """A small float64 policy with weights far from 0."""
    settings = {
        "hidden_size": 4,
        "embedding_size": 3,
        "init_scale": 0.8,
        "exploration": 0.0,
        **config,
    }
    return LSTMPolicy(PolicyConfig(**settings), num_choices, np.random.default_rng(0))


def all_tokens(num_choices: tuple[int, ...]) -> np.ndarray:
    return np.array(list(np.ndindex(*num_choices)), dtype=np.int64)


# A PPO loss whose ratios lie on both sides of the clip range, with advantages of both signs.


def ppo_loss(policy: LSTMPolicy, tokens: np.ndarray) -> Surrogate:
    shifts = np.array([0.0, 0.05, -0.05, 0.6, -0.6, 0.6, -0.6, 0.1])
    advantages = np.array([1.0, -2.0, 0.5, 1.5, -0.7, -0.3, 2.0, 0.0])
    start = LSTMPolicy(policy.config, policy.num_choices, np.random.default_rng(0))
    reference = start.evaluate(tokens).log_prob + shifts
    return Surrogate(
        policy.evaluate(tokens),
        old_log_prob=reference,
        advantages=advantages,
        clip_range=0.2,
        entropy_weight=0.3,
    )


def central_differences(
    policy: LSTMPolicy, loss: Callable[[], float], *, step: float = 1e-6
) -> np.ndarray:
    slopes = np.empty_like(policy.parameters)
    for k, value in enumerate(policy.parameters.copy()):
        policy.parameters[k] = value + step
        above = loss()
        policy.parameters[k] = value - step
        slopes[k] = (above - loss()) / (2 * step)
        policy.parameters[k] = value
    return slopes


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 1.7},
        {"tanh_constant": 2.5},
        {"exploration": 0.7},
        {"tanh_constant": 1.1, "temperature": 0.6, "exploration": 2.0},
    ],
    ids=str,
)
def test_the_gradient_of_the_whole_ppo_loss_equals_finite_differences(
    config: dict[str, float],
) -> None:
    policy = make_policy(**config)
    tokens = policy.sample(8, np.random.default_rng(1)).tokens

    surrogate = ppo_loss(policy, tokens)
    gradient = policy.backward(
        policy.evaluate(tokens), surrogate.d_log_probs, surrogate.d_entropies
    )
    numeric = central_differences(policy, lambda: ppo_loss(policy, tokens).loss)

    assert 0 < surrogate.clip_fraction < 1
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_each_decision_by_itself_equals_finite_differences() -> None:
    policy = make_policy()
    tokens = policy.sample(4, np.random.default_rng(1)).tokens
    weights = np.random.default_rng(2).normal(size=(2, 4, len(CHOICES)))

    def loss() -> float:
        evaluation = policy.evaluate(tokens)
        return float((weights[0] * evaluation.log_probs + weights[1] * evaluation.entropies).sum())

    gradient = policy.backward(policy.evaluate(tokens), weights[0], weights[1])
    np.testing.assert_allclose(gradient, central_differences(policy, loss), rtol=1e-5, atol=1e-8)


def test_the_gradient_of_a_single_decision_equals_finite_differences() -> None:
    policy = make_policy((4,))
    tokens = np.array([[0], [3], [3]])
    ones = np.ones((3, 1))

    gradient = policy.backward(policy.evaluate(tokens), ones, ones)
    numeric = central_differences(
        policy,
        lambda: float(
            policy.evaluate(tokens).log_probs.sum() + policy.evaluate(tokens).entropies.sum()
        ),
    )
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-8)


def test_zero_output_weights_give_the_uniform_distribution() -> None:
    policy = make_policy()
    policy.weights["output_weight"][...] = 0
    policy.weights["output_bias"][...] = 0
    evaluation = policy.sample(6, np.random.default_rng(1))

    expected = sum(math.log(n) for n in CHOICES)
    np.testing.assert_allclose(evaluation.log_prob, -expected, rtol=1e-12)
    np.testing.assert_allclose(evaluation.entropies.sum(axis=1), expected, rtol=1e-12)
    assert policy.max_entropy == pytest.approx(expected / len(CHOICES), rel=1e-12)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    policy = make_policy()
    evaluation = policy.evaluate(all_tokens(CHOICES))
    assert np.exp(evaluation.log_prob).sum() == pytest.approx(1, rel=1e-12)


def test_the_entropy_of_the_first_decision_is_that_of_its_probabilities() -> None:
    policy = make_policy((4,))
    evaluation = policy.evaluate(all_tokens((4,)))
    p = np.exp(evaluation.log_probs[:, 0])
    np.testing.assert_allclose(evaluation.entropies[:, 0], -(p * np.log(p)).sum(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_sampling_and_evaluating_agree_to_the_last_bit(dtype: type[np.floating]) -> None:
    config = PolicyConfig(init_scale=0.5)
    policy = LSTMPolicy(config, (3, 2) * 14, np.random.default_rng(0), dtype=dtype)
    drawn = policy.sample(16, np.random.default_rng(1))
    evaluated = policy.evaluate(drawn.tokens)
    ones = np.ones_like(drawn.log_probs)
    np.testing.assert_array_equal(drawn.log_prob, evaluated.log_prob)
    np.testing.assert_array_equal(drawn.entropies, evaluated.entropies)
    np.testing.assert_array_equal(
        policy.backward(drawn, ones, ones), policy.backward(evaluated, ones, ones)
    )


@pytest.mark.parametrize("n", [4, 7])
def test_a_reused_tape_leaves_no_trace_of_its_earlier_use(n: int) -> None:
    policy, rng = make_policy(), np.random.default_rng(1)
    first, second = policy.sample(4, rng).tokens, policy.sample(n, rng).tokens
    weights = np.random.default_rng(2).normal(size=(2, n, len(CHOICES)))

    used = policy.evaluate(first)
    policy.backward(used, *np.ones((2, 4, len(CHOICES))))
    reused = policy.evaluate(second, reuse=used)
    fresh = policy.evaluate(second)

    assert (reused.tape is used.tape) == (n == 4)
    np.testing.assert_array_equal(reused.log_probs, fresh.log_probs)
    np.testing.assert_array_equal(
        policy.backward(reused, *weights), policy.backward(fresh, *weights)
    )


def test_draws_follow_the_probabilities() -> None:
    policy = make_policy((3, 4))
    tokens = policy.sample(40_000, np.random.default_rng(1)).tokens
    points = all_tokens((3, 4))
    p = np.exp(policy.evaluate(points).log_prob)
    counts = np.bincount(np.ravel_multi_index(tokens.T, (3, 4)), minlength=12)
    chi_square = float(((counts - 40_000 * p) ** 2 / (40_000 * p)).sum())
    # 11 degrees of freedom: larger with a probability below 1e-6. The seed is fixed besides.
    assert chi_square < 50


def test_a_choice_of_probability_zero_is_never_drawn() -> None:
    policy = make_policy((3, 3))
    policy.weights["output_bias"][:, 0, 0] = -1e6
    policy.weights["output_bias"][:, 0, 2] = -1e6
    drawn = policy.sample(1000, np.random.default_rng(1))
    assert (drawn.tokens == 1).all()
    np.testing.assert_allclose(drawn.log_prob, 0, atol=1e-12)


def test_the_distribution_depends_on_earlier_choices() -> None:
    policy = make_policy((2, 3))
    evaluation = policy.evaluate(np.array([[0, 1], [1, 1]]))
    assert abs(evaluation.log_probs[0, 1] - evaluation.log_probs[1, 1]) > 1e-3


def test_tanh_constant_bounds_the_logits() -> None:
    policy = make_policy(tanh_constant=0.5)
    policy.weights["output_bias"][...] = np.random.default_rng(1).normal(
        scale=100, size=policy.weights["output_bias"].shape
    )
    evaluation = policy.evaluate(all_tokens(CHOICES))
    # Logits in [-1/2, 1/2]: the rarest of five choices has at least 1 / (1 + 4 e).
    assert evaluation.log_probs.min() >= -math.log(1 + 4 * math.e) - 1e-12


def test_a_high_temperature_draws_more_evenly() -> None:
    tokens = all_tokens(CHOICES)
    cool, warm = (make_policy(temperature=t).evaluate(tokens) for t in (1.0, 10.0))
    assert warm.entropies.mean() > cool.entropies.mean()


def test_exploration_is_a_floor_below_every_choice() -> None:
    policy = make_policy((4, 2) * 5, exploration=1.0)
    policy.parameters *= 1e3
    tokens = policy.sample(200, np.random.default_rng(1)).tokens
    p = np.exp(policy.evaluate(tokens).log_probs)
    # A tenth of every decision is uniform.
    assert p[:, ::2].min() == pytest.approx(0.1 / 4, rel=1e-9)
    assert p[:, 1::2].min() == pytest.approx(0.1 / 2, rel=1e-9)


def test_exploration_leaves_nine_tenths_of_a_single_decision_to_the_policy() -> None:
    policy = make_policy((2,), exploration=1.0)
    policy.weights["output_bias"][0, 0] = [100.0, 0.0]
    log_probs = policy.evaluate(np.array([[0]])).log_probs
    assert np.exp(log_probs[0, 0]) == pytest.approx(0.95, rel=1e-9)


def test_extreme_weights_stay_finite() -> None:
    policy = make_policy()
    policy.parameters *= 1e3
    evaluation = policy.sample(8, np.random.default_rng(1))
    gradient = policy.backward(evaluation, np.ones((8, 5)), np.ones((8, 5)))
    assert np.isfinite(evaluation.log_prob).all()
    assert np.isfinite(evaluation.entropies).all()
    assert np.isfinite(gradient).all()


def test_adam_takes_the_first_step_of_its_paper() -> None:
    parameters = np.array([1.0, -2.0, 3.0])
    adam = Adam(parameters)
    norm = adam.step(parameters, np.array([0.3, -0.4, 0.0]), learning_rate=0.1, max_norm=9.0)
    # With bias correction the first step is the learning rate times the gradient's sign.
    np.testing.assert_allclose(parameters, [0.9, -1.9, 3.0], atol=1e-7)
    assert norm == pytest.approx(0.5)


def test_adam_clips_the_norm_of_a_long_gradient() -> None:
    parameters = np.zeros(2)
    adam = Adam(parameters)
    adam.step(parameters, np.array([30.0, 40.0]), learning_rate=0.1, max_norm=1.0)
    np.testing.assert_allclose(adam.mean, [0.06, 0.08])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("embedding_size", -3),
        ("temperature", 0.0),
        ("tanh_constant", -1.0),
        ("exploration", -0.5),
        ("init_scale", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        build(PolicyConfig, {key: value}, where="test")


def test_a_space_without_decisions_is_refused() -> None:
    with pytest.raises(ValueError, match="num_choices"):
        make_policy(())


@pytest.fixture
def eagerly() -> Iterator[None]:
    import mindspore as ms

    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.mark.usefixtures("eagerly")
def test_the_gradient_equals_mindspores_autodiff() -> None:
    import mindspore as ms
    from mindspore import ops

    policy = make_policy(tanh_constant=2.0, temperature=1.3, exploration=0.5)
    tokens = policy.sample(6, np.random.default_rng(1)).tokens
    evaluation = policy.evaluate(tokens)
    old = evaluation.log_prob + np.array([0.0, 0.1, -0.1, 0.7, -0.7, 0.05])
    advantages = np.array([1.0, -1.0, 0.5, -0.4, 2.0, -3.0])
    surrogate = Surrogate(
        evaluation, old_log_prob=old, advantages=advantages, clip_range=0.2, entropy_weight=0.3
    )
    exact = policy.views(policy.backward(evaluation, surrogate.d_log_probs, surrogate.d_entropies))
    names = list(policy.weights)
    hidden_size, n = policy.config.hidden_size, len(tokens)

    def loss(*weights: ms.Tensor) -> ms.Tensor:
        w = dict(zip(names, weights, strict=True))
        hidden = cell = ops.zeros((n, hidden_size), ms.float32)
        log_prob = entropy = ops.zeros((n,), ms.float32)
        inputs = ops.broadcast_to(w["start"], (n, policy.config.embedding_size))
        for d, choices in enumerate(policy.num_choices):
            if d > 0:
                inputs = w["embedding"][d - 1][ms.Tensor(tokens[:, d - 1], ms.int32)]
            gates = ops.matmul(inputs, w["input_weight"]) + ops.matmul(hidden, w["hidden_weight"])
            i, f, g, o = ops.split(gates + w["gate_bias"], hidden_size, axis=1)
            cell = ops.sigmoid(f) * cell + ops.sigmoid(i) * ops.tanh(g)
            hidden = ops.sigmoid(o) * ops.tanh(cell)
            logits = (ops.matmul(hidden, w["output_weight"][d]) + w["output_bias"][d])[:, :choices]
            p = ops.softmax(2.0 * ops.tanh(logits / 1.3), 1)
            log_p = ops.log(0.9 * p + 0.1 / choices)
            chosen = ms.Tensor(np.eye(choices)[tokens[:, d]], ms.float32)
            log_prob = log_prob + (log_p * chosen).sum(1)
            entropy = entropy - (ops.exp(log_p) * log_p).sum(1)
        ratio = ops.exp(log_prob - ms.Tensor(old, ms.float32))
        a = ms.Tensor(advantages, ms.float32)
        gain = ops.minimum(ratio * a, ops.clamp(ratio, 0.8, 1.2) * a)
        return -(gain.mean() + 0.3 * entropy.mean())

    inputs = [ms.Tensor(policy.weights[name], ms.float32) for name in names]
    value, gradients = ms.value_and_grad(loss, tuple(range(len(names))))(*inputs)

    assert float(value.asnumpy()) == pytest.approx(surrogate.loss, rel=1e-5)
    for name, gradient in zip(names, gradients, strict=True):
        scale = np.abs(exact[name]).max()
        np.testing.assert_allclose(
            gradient.asnumpy(), exact[name], rtol=1e-4, atol=1e-4 * scale, err_msg=name
        )
