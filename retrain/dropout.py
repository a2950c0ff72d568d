"""Dropout and drop-path as masks that depend on the seed and the step alone.

MindSpore's own dropout has a random state that cannot be saved; a mask that is an input of the
graph is drawn again alike when a training goes on. Masks are drawn for all images of an optimizer
step: workers and accumulated passes take their rows, as one process would have them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from space.architecture import Architecture


def dropout_mask(
    rate: float, shape: tuple[int, int], *, seed: int, step: int
) -> NDArray[np.float32]:
    """Return dropout's mask of the pooled features: 0, or 1 / (1 - rate) for the kept ones.

    It depends on seed and step alone, so that a resumed training draws the same. A rate of 0 gives
    a single 1, float32 (1, 1).
    """
    if rate == 0:
        return np.ones((1, 1), np.float32)
    kept = np.random.default_rng([seed, 3, step]).random(shape, np.float32) >= rate
    return kept.astype(np.float32) / np.float32(1 - rate)


def drop_path_rates(rate: float, architecture: Architecture) -> NDArray[np.float32]:
    """Return the probability of each residual layer to be left out, float32 (layers,).

    Layer i (from 0) of all n has rate * i / n, as the published code of MnasNet's successors has
    it; only layers with a residual are listed.
    """
    layers = list(architecture.layers())
    rates = [rate * i / len(layers) for i, layer in enumerate(layers) if layer.skip != "none"]
    return np.array(rates, np.float32)


def drop_path_mask(
    rates: NDArray[np.float32], images: int, *, seed: int, step: int
) -> NDArray[np.float32]:
    """Return the factors of the residual layers' branches, float32 (images, layers).

    0 for a layer that an image skips, else 1 / (1 - rate).
    """
    drawn = np.random.default_rng([seed, 6, step]).random((images, len(rates)), np.float32)
    return (drawn >= rates).astype(np.float32) / (1 - rates)
