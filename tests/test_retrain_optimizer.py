"""Optimizers and averaged weights against their formulas in NumPy."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest

from retrain import ema
from retrain.config import OptimizerConfig
from retrain.ema import Averages
from retrain.optimizer import decays, make_optimizer, set_learning_rate

ms.set_context(mode=ms.GRAPH_MODE)

START = {
    "a.conv.weight": np.array([0.5, -1.0, 2.0], np.float32),
    "a.norm.gamma": np.array([1.0, 1.5], np.float32),
    "classifier.bias": np.array([0.1], np.float32),
}
RATES = (0.1, 0.03, 0.2)


def parameters() -> list[ms.Parameter]:
    return [ms.Parameter(ms.Tensor(value), name=name) for name, value in START.items()]


def gradients(step: int) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    return [rng.normal(size=value.shape).astype(np.float32) for value in START.values()]


def trained(config: OptimizerConfig) -> list[np.ndarray]:
    weights = parameters()
    optimizer = make_optimizer(config, weights)
    for step, rate in enumerate(RATES):
        set_learning_rate(optimizer, rate)
        optimizer(tuple(ms.Tensor(g) for g in gradients(step)))
    return [p.asnumpy() for p in weights]


def rmsprop(value: np.ndarray, index: int, config: OptimizerConfig, decay: float) -> np.ndarray:
    """TensorFlow 1's RMSProp: the mean square starts at 1, epsilon is inside the root."""
    w = value.astype(np.float64)
    mean_square, moment = np.ones_like(w), np.zeros_like(w)
    for step, rate in enumerate(RATES):
        g = gradients(step)[index] + decay * w
        mean_square = config.decay * mean_square + (1 - config.decay) * g**2
        moment = config.momentum * moment + rate * g / np.sqrt(mean_square + config.epsilon)
        w = w - moment
    return w


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_rmsprop_is_tensorflows(decay_norm_and_bias: bool) -> None:
    config = OptimizerConfig(
        decay=0.8, epsilon=0.01, weight_decay=0.05, decay_norm_and_bias=decay_norm_and_bias
    )
    found = trained(config)
    for index, (name, value) in enumerate(START.items()):
        decayed = decay_norm_and_bias or name == "a.conv.weight"
        expected = rmsprop(value, index, config, 0.05 if decayed else 0.0)
        np.testing.assert_allclose(found[index], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_has_momentum_and_nesterovs_look_ahead(nesterov: bool) -> None:
    config = OptimizerConfig(name="sgd", momentum=0.7, nesterov=nesterov, weight_decay=0.05)
    found = trained(config)
    for index, (name, value) in enumerate(START.items()):
        w, moment = value.astype(np.float64), np.zeros(value.shape)
        for step, rate in enumerate(RATES):
            g = gradients(step)[index] + (0.05 * w if decays(name) else 0.0)
            moment = 0.7 * moment + g
            w = w - rate * (g + 0.7 * moment if nesterov else moment)
        np.testing.assert_allclose(found[index], w, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("blocks.0.0.depthwise.conv.weight", True),
        ("classifier.weight", True),
        ("classifier.bias", False),
        ("stem.norm.gamma", False),
        ("stem.norm.beta", False),
        ("blocks.0.0.se.reduce.bias", False),
    ],
)
def test_only_convolutions_and_the_classifier_are_decayed(name: str, decayed: bool) -> None:
    assert decays(name) is decayed


def test_adamw_corrects_its_bias_and_decays_weights_apart_from_gradients() -> None:
    config = OptimizerConfig(name="adamw", beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.05)
    found = trained(config)
    for index, (name, value) in enumerate(START.items()):
        w, mean, square = value.astype(np.float64), np.zeros(value.shape), np.zeros(value.shape)
        for step, rate in enumerate(RATES):
            g = gradients(step)[index]
            mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g**2
            w = w * (1 - rate * (0.05 if decays(name) else 0.0))
            corrected = rate * np.sqrt(1 - 0.9 ** (step + 1)) / (1 - 0.8 ** (step + 1))
            w = w - corrected * mean / (np.sqrt(square) + 1e-3)
        np.testing.assert_allclose(found[index], w, rtol=1e-5, atol=1e-5)


def test_an_optimizer_whose_weights_are_all_decayed_works() -> None:
    weight = ms.Parameter(ms.Tensor(np.ones(3, np.float32)), name="classifier.weight")
    optimizer = make_optimizer(OptimizerConfig(name="sgd", weight_decay=0.5), [weight])
    set_learning_rate(optimizer, 0.1)
    optimizer((ms.Tensor(np.zeros(3, np.float32)),))
    np.testing.assert_allclose(weight.asnumpy(), 0.95, rtol=1e-6)


@pytest.mark.parametrize("move", [ema._move, ema._move_arrays])
def test_averages_follow_their_formula_from_the_first_step(
    move: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ema, "_move", move)
    weights = [ms.Parameter(ms.Tensor(np.array([1.0, 2.0], np.float32)), name="w")]
    averages = Averages(weights, 0.5)
    expected = np.array([1.0, 2.0])
    for step in range(12):
        value = np.array([step, -step], np.float32)
        weights[0].set_data(ms.Tensor(value))
        averages.step(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(averages.values()["w"], expected, rtol=1e-6)
    assert weights[0].asnumpy().tolist() == [11, -11]


def test_rmsprops_root_is_taken_to_three_digits_in_long_arrays() -> None:
    value = np.random.default_rng(9).normal(size=1000).astype(np.float32)
    weight = ms.Parameter(ms.Tensor(value), name="a.weight")
    config = OptimizerConfig(weight_decay=0.0)
    optimizer = make_optimizer(config, [weight])
    w, mean_square, moment = value.astype(np.float64), np.ones(1000), np.zeros(1000)
    for step in range(8):
        g = np.random.default_rng(step).normal(size=1000).astype(np.float32)
        set_learning_rate(optimizer, 0.05)
        optimizer((ms.Tensor(g),))
        mean_square = 0.9 * mean_square + 0.1 * g.astype(np.float64) ** 2
        moment = 0.9 * moment + 0.05 * g / np.sqrt(mean_square + 1e-3)
        w = w - moment
    assert np.abs(weight.asnumpy() - w).max() < 2e-3 * np.abs(w - value).max()
