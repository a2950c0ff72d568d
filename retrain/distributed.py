"""Data parallel training: equal processes, each with its own share of every step's images.

msrun starts them on Ascend or a CPU, mpirun on Ascend; each runs the same command and learns here
which of them it is. What they compute together is sums: of gradients, of losses, of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import communication, nn, ops
from numpy.typing import NDArray

from retrain.launch import launched_by_msrun, launched_workers
from space.errors import ConfigError

Gradients = tuple[ms.Tensor, ...]


class Workers:
    """The processes of one training, seen from one of them.

    Attributes:
        rank: Which one this is, from 0; the first writes files and speaks.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._all_reduce = _AllReduce() if size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the sum over all workers of float32 arrays of one shape; all must call it."""
        if self._all_reduce is None:
            return values
        total: NDArray[np.float32] = self._all_reduce(ms.Tensor(values)).asnumpy()
        return total

    def mean_arrays(self, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
        """Return the mean over all workers of float32 arrays by name; all must call it."""
        if self.size == 1 or not arrays:
            return dict(arrays)
        flat = self.sum(np.concatenate([value.ravel() for value in arrays.values()]))
        parts = _unflattened(flat / np.float32(self.size), [v.shape for v in arrays.values()])
        return dict(zip(arrays, parts, strict=True))

    def gradient_mean(
        self, parameters: Sequence[ms.Parameter]
    ) -> Callable[[Gradients], Gradients] | None:
        """Return what makes the mean over all workers of gradients; None for a single worker."""
        if self.size == 1:
            return None
        if ms.context.get_context("device_target") != "CPU":
            reducer: Callable[[Gradients], Gradients] = nn.DistributedGradReducer(
                list(parameters), mean=True, degree=self.size
            )
            return reducer
        return self._mean_on_host

    def _mean_on_host(self, gradients: Gradients) -> Gradients:
        # As one array: on a CPU every call waits for the network, 1.6 ms each for 150 arrays,
        # and a graph that joins and splits them takes minutes to compile.
        flat = self.sum(np.concatenate([g.asnumpy().ravel() for g in gradients]))
        parts = _unflattened(flat / np.float32(self.size), [g.shape for g in gradients])
        return tuple(ms.Tensor(part) for part in parts)


class _AllReduce(nn.Cell):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.all_reduce = ops.AllReduce()

    def construct(self, values: ms.Tensor) -> ms.Tensor:
        """The sum over all workers."""
        return self.all_reduce(values)


def _unflattened(
    flat: NDArray[np.float32], shapes: Sequence[tuple[int, ...]]
) -> list[NDArray[np.float32]]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [
        part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)
    ]


def join_workers(distribute: bool | None) -> Workers:
    """Return the workers that this process belongs to, after waiting for all of them.

    Call it once, after `prepare_process`. msrun's scheduler runs the same command; it stays in
    here until the workers are done, and exits.

    Args:
        distribute: Whether there must be others; None: if a launcher says so.

    Raises:
        ConfigError: There must be others, but there is no launcher, or one that does not work.
    """
    launched = launched_workers() > 1
    if distribute is False or (distribute is None and not launched):
        return Workers()
    if not launched:
        raise ConfigError(
            "--distribute: must be left out or False for a single process; start several with"
            " --workers N, or with `msrun --worker_num N ... python -m retrain ...`."
        )
    if not launched_by_msrun() and ms.context.get_context("device_target") == "CPU":
        raise ConfigError(
            "mpirun: starts workers on Ascend only; on a CPU use --workers N, or `msrun"
            " --worker_num N ... python -m retrain ...`."
        )
    communication.init()
    return Workers(communication.get_rank(), communication.get_group_size())
