"""Stochastic depth: the network's features with residual layers left out for some images."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from space.network import MnasNet


class DropPathFeatures(nn.Cell):  # type: ignore[misc]
    """MnasNet.features whose residual layers' branches are weighted image by image."""

    def __init__(self, network: MnasNet) -> None:
        # The network's parameters keep their names.
        super().__init__(auto_prefix=False)
        self.network = network
        self.layers = [block for stage in network.blocks for block in stage]

    def construct(self, images: ms.Tensor, paths: ms.Tensor) -> ms.Tensor:
        """(n, channels, size, size), (n, residual layers) -> pooled (n, head_filters)."""
        x = self.network.stem(images)
        index = 0
        for layer in self.layers:
            y = x
            for step in layer.steps:
                y = step(y)
            if layer.identity or layer.pool_skip is not None:
                y = y * paths[:, index].reshape((-1, 1, 1, 1)).astype(y.dtype)
                index += 1
            if layer.identity:
                y = y + x
            if layer.pool_skip is not None:
                y = y + layer.pool_skip(x)
            x = y
        return ops.mean(self.network.head(x), (2, 3))
