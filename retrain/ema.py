"""Averaged weights (EMA): what is evaluated, kept and exported where a recipe asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

try:
    from space.compiled import compiled
except ImportError:  # as space.network.choose_depthwise has it: slower, but it trains
    compiled = None  # type: ignore[assignment]


class Averages:
    """Exponential moving averages of weights and batch-norm statistics, on the host.

    average = decay * average + (1 - decay) * weight
    decay = min(ema_decay, (1 + step) / (10 + step))

    as TensorFlow's ExponentialMovingAverage has it with a step counter: early averages are not
    dominated by the initial weights. On the host, because on a CPU the same as a graph takes four
    times as long (8.6 against 2.3 ms a step for 105 arrays) and three seconds to compile.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], decay: float) -> None:
        self._decay = decay
        self._parameters = list(parameters)
        self._averages = [p.asnumpy().copy() for p in self._parameters]

    def step(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        share = np.float32(1 - min(self._decay, (1 + step) / (10 + step)))
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            _move(average.reshape(-1), parameter.asnumpy().reshape(-1), share)

    def values(self) -> dict[str, NDArray[np.float32]]:
        """Name of the weight -> its average, float32, a copy."""
        pairs = zip(self._parameters, self._averages, strict=True)
        return {p.name: average.copy() for p, average in pairs}

    def restore(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on from averages that `values` gave."""
        self._averages = [values[p.name].copy() for p in self._parameters]


def _move_elements(average: NDArray[Any], weight: NDArray[Any], share: np.float32) -> None:
    """Move the averages, (n,), towards the weights, (n,), in one pass over the memory."""
    for i in range(average.size):
        average[i] += share * (weight[i] - average[i])


def _move_arrays(average: NDArray[Any], weight: NDArray[Any], share: np.float32) -> None:
    """The same by NumPy, which takes three passes."""
    average += share * (weight - average)


_move = _move_arrays if compiled is None else compiled(_move_elements)
