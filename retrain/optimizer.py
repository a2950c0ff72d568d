"""Optimizers with a learning rate that the loop sets at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import nn, ops

from retrain.config import OptimizerConfig


def decays(name: str) -> bool:
    """Whether a parameter is decayed: convolution and classifier weights are, the rest is not."""
    return name.endswith("weight")


def make_optimizer(config: OptimizerConfig, parameters: Sequence[ms.Parameter]) -> nn.Cell:
    """Return the optimizer, a cell that takes gradients; `set_learning_rate` before every step.

    nn.RMSProp is TensorFlow's: the mean square starts at 1 and epsilon is inside the root. On a
    CPU its kernel takes the root to about 1e-3 where it uses vector registers and exactly
    elsewhere, and the boundary may move after its first five steps: a resumed training has the
    same order, masks and state, but goes on bit by bit only with SGD.
    """
    with_decay = [p for p in parameters if config.decay_norm_and_bias or decays(p.name)]
    if config.name == "adamw":
        return _AdamW(config, parameters, with_decay)
    without = [p for p in parameters if not (config.decay_norm_and_bias or decays(p.name))]
    groups: list[dict[str, Any]] = []
    for group, weight_decay in ((with_decay, config.weight_decay), (without, 0.0)):
        if group:
            groups.append({"params": group, "weight_decay": weight_decay})
    # The groups must not change the order in which gradients are given.
    groups.append({"order_params": list(parameters)})
    if config.name == "sgd":
        # Not nn.Momentum: it ignores use_nesterov on a CPU.
        return nn.SGD(
            groups, learning_rate=1.0, momentum=config.momentum, nesterov=config.nesterov
        )
    return nn.RMSProp(
        groups,
        learning_rate=1.0,
        decay=config.decay,
        momentum=config.momentum,
        epsilon=config.epsilon,
    )


class _AdamW(nn.Cell):  # type: ignore[misc]
    """Adam with decoupled weight decay: weights lose learning_rate * weight_decay of themselves.

    MindSpore's own have no bias correction (nn.AdamWeightDecay), no CPU kernel (mint.optim) or
    take nine times as long there (experimental.optim: 295 against 32 ms for 60 arrays).
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Sequence[ms.Parameter],
        with_decay: Sequence[ms.Parameter],
    ) -> None:
        # The network's parameters keep their names.
        super().__init__(auto_prefix=False)
        # As every nn.Optimizer: else each step compiles anew.
        self.enable_tuple_broaden = True
        self.adam = nn.Adam(
            list(parameters),
            learning_rate=1.0,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.epsilon,
        )
        self.learning_rate = self.adam.learning_rate
        self.with_decay = ms.ParameterTuple(with_decay)
        self.weight_decay = config.weight_decay

    def construct(self, gradients: Any) -> Any:
        """Change the weights by one step."""
        for weight in self.with_decay:
            ops.assign(weight, weight * (1.0 - self.learning_rate * self.weight_decay))
        return self.adam(gradients)


def set_learning_rate(optimizer: nn.Cell, value: float) -> None:
    """Set the learning rate of the next step; nothing is compiled again."""
    rates = optimizer.learning_rate
    for rate in rates if isinstance(rates, (tuple, list, ms.ParameterTuple)) else (rates,):
        rate.set_data(ms.Tensor(value, ms.float32))
