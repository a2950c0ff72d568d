"""Threads that fill the next batches while the network computes with one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrain.data_images import available_cores

#: Batches begun ahead of the one that is wanted.
_BATCHES_AHEAD = 2


class Begun(NamedTuple):
    """A batch whose images are complete when all its futures are."""

    images: NDArray[np.float32]
    labels: NDArray[Any]
    futures: list[Future[None]]


def batches_ahead(
    begin: Callable[[ThreadPoolExecutor, int], Begun], numbers: range, workers: int | None
) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Yield batches in the order of their numbers, the next ones begun before one is asked for.

    Args:
        begin: Hands a batch's work to the threads; called in order.
        numbers: Of the batches.
        workers: Threads; None: as many as this process has cores.

    Raises:
        Exception: What a thread raised, when its batch is reached.
    """
    pool = ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="images")
    begun: deque[Begun] = deque()
    try:
        for number in numbers:
            begun.append(begin(pool, number))
            if len(begun) > _BATCHES_AHEAD:
                yield _filled(begun.popleft())
        while begun:
            yield _filled(begun.popleft())
    finally:
        # The one who iterates may stop early.
        pool.shutdown(cancel_futures=True)


def _filled(batch: Begun) -> tuple[NDArray[np.float32], NDArray[Any]]:
    for future in batch.futures:
        future.result()
    return batch.images, batch.labels
