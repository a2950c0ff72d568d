"""Optimizers with a learning rate that the loop sets at every step, and averaged weights (EMA)."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from retrain.config import OptimizerConfig


def decays(name: str) -> bool:
    """Whether weight decay is for a parameter: convolution and classifier weights, not the rest."""
    return name.endswith("weight")


def make_optimizer(config: OptimizerConfig, parameters: Sequence[ms.Parameter]) -> nn.Optimizer:
    """Return the optimizer; call `set_learning_rate` before every step.

    nn.RMSProp is TensorFlow's: the mean square starts at 1 and epsilon is inside the root.
    """
    with_decay = [p for p in parameters if config.decay_norm_and_bias or decays(p.name)]
    without = [p for p in parameters if not (config.decay_norm_and_bias or decays(p.name))]
    groups = [{"params": with_decay, "weight_decay": config.weight_decay}]
    if without:
        groups.append({"params": without, "weight_decay": 0.0})
    # The groups must not change the order in which gradients are given.
    groups.append({"order_params": list(parameters)})
    if config.name == "sgd":
        return nn.Momentum(
            groups, learning_rate=1.0, momentum=config.momentum, use_nesterov=config.nesterov
        )
    return nn.RMSProp(
        groups,
        learning_rate=1.0,
        decay=config.decay,
        momentum=config.momentum,
        epsilon=config.epsilon,
    )


def set_learning_rate(optimizer: nn.Optimizer, value: float) -> None:
    """Set the learning rate of the next step; nothing is compiled again."""
    rates = optimizer.learning_rate
    for rate in rates if isinstance(rates, (tuple, list, ms.ParameterTuple)) else (rates,):
        rate.set_data(ms.Tensor(value, ms.float32))


class Averages(nn.Cell):
    """Exponential moving averages of weights and batch-norm statistics.

    average = decay * average + (1 - decay) * weight, with decay = min(ema_decay, (1 + step) / (10 + step)),
    as TensorFlow's ExponentialMovingAverage has it with a step counter: early averages are not dominated by
    the initial weights.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.weights = ms.ParameterTuple(list(parameters))
        self.averages = ms.ParameterTuple(
            [
                ms.Parameter(p.value().copy(), name=f"ema.{p.name}", requires_grad=False)
                for p in parameters
            ]
        )

    def construct(self, decay: ms.Tensor) -> ms.Tensor:
        """Update every average; returns the decay."""
        for average, weight in zip(self.averages, self.weights):  # noqa: B905 (graph code)
            ops.assign(average, decay * average + (1 - decay) * weight)
        return decay

    def step(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        self(ms.Tensor(min(self.decay, (1 + step) / (10 + step)), ms.float32))

    def values(self) -> dict[str, np.ndarray]:
        """Name of the weight -> its average, float32."""
        return {p.name.removeprefix("ema."): p.asnumpy().copy() for p in self.averages}
