"""Architecture -> MindSpore cell, for GRAPH_MODE; parameters bear the names of space.parameters.

Dropout is not in the network: it belongs to the recipe, whose training loop masks the pooled
features between `features` and `classify`.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from space.architecture import PAPER_STYLE, Architecture, Layer, NetworkStyle
from space.parameters import initial_parameters

# MindSpore's oneDNN reads it at the first convolution. Where a processor has AVX-512, it takes a
# kernel that reorders MindSpore's arrays element by element: a 3 x 3 convolution of 24 channels
# and its gradients take 25 times as long as with AVX2 (432 against 17 ms), a network up to 8.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

Depthwise = Literal["auto", "native", "numba"]


def _convolution(
    weight: ms.Tensor, style: NetworkStyle, *, stride: int = 1, group: int = 1, bias: bool = False
) -> nn.Conv2d:
    out, per_group, kernel, _ = weight.shape
    same = style.padding == "same"
    return nn.Conv2d(
        per_group * group,
        out,
        kernel,
        stride=stride,
        pad_mode="same" if same else "pad",
        padding=0 if same else kernel // 2,
        group=group,
        has_bias=bias,
        weight_init=weight,
        bias_init="zeros",
    )


class ConvNorm(nn.Cell):
    """A convolution, its batch norm, and a ReLU unless it is linear."""

    def __init__(
        self,
        weight: ms.Tensor,
        style: NetworkStyle,
        *,
        stride: int = 1,
        group: int = 1,
        relu: bool = True,
        depthwise: Depthwise = "native",
    ) -> None:
        super().__init__()
        if depthwise == "numba" and group > 1:
            from space.depthwise import DepthwiseConv2d

            self.conv = DepthwiseConv2d(weight, stride=stride, padding=style.padding)
        else:
            self.conv = _convolution(weight, style, stride=stride, group=group)
        self.norm = nn.BatchNorm2d(
            weight.shape[0], eps=style.batch_norm_epsilon, momentum=style.batch_norm_momentum
        )
        self.relu = nn.ReLU() if relu else None

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, in, height, width) -> (batch, out, height / stride, width / stride)."""
        x = self.norm(self.conv(x))
        if self.relu is not None:
            x = self.relu(x)
        return x


class SqueezeExcite(nn.Cell):
    """Channels weighted by a gate that sees their means (Hu et al., 2018)."""

    def __init__(self, reduce: ms.Tensor, expand: ms.Tensor, style: NetworkStyle) -> None:
        super().__init__()
        self.reduce = _convolution(reduce, style, bias=True)
        self.expand = _convolution(expand, style, bias=True)
        self.relu = nn.ReLU()
        self.sigmoid = nn.Sigmoid()

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, channels, height, width) -> the same shape."""
        gate = ops.mean(x, (2, 3), True)
        gate = self.sigmoid(self.expand(self.relu(self.reduce(gate))))
        return x * gate


class PoolSkip(nn.Cell):
    """The pooling residual: 3x3 max pooling, channels cut or zero-padded to the output's."""

    def __init__(self, layer: Layer, style: NetworkStyle) -> None:
        super().__init__()
        # The two paddings differ only here: `same` adds a row behind, `symmetric` one before
        # (and one behind that no window reaches).
        even = layer.stride == 2 and layer.input_size % 2 == 0
        self.shifted = style.padding == "symmetric" and even
        self.pool = nn.MaxPool2d(3, layer.stride, "valid" if self.shifted else "same")
        self.missing = max(0, layer.output_filters - layer.input_filters)
        self.kept = min(layer.input_filters, layer.output_filters)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, in, height, width) -> (batch, out, height / stride, width / stride)."""
        if self.shifted:
            # Lower than any value. Not ops.pad: its gradient on a CPU may never return
            # (MindSpore 2.10).
            batch, channels, rows, columns = x.shape
            x = ops.cat((ops.full((batch, channels, 1, columns), -3.0e38, dtype=x.dtype), x), 2)
            x = ops.cat((ops.full((batch, channels, rows + 1, 1), -3.0e38, dtype=x.dtype), x), 3)
        x = self.pool(x)[:, : self.kept]
        if self.missing:
            shape = (x.shape[0], self.missing, x.shape[2], x.shape[3])
            x = ops.cat((x, ops.zeros(shape, x.dtype)), 1)
        return x


class Block(nn.Cell):
    """One layer of a block: conv, depthwise separable or inverted bottleneck, with its skip."""

    def __init__(
        self,
        layer: Layer,
        weights: dict[str, ms.Tensor],
        style: NetworkStyle,
        depthwise: Depthwise,
    ) -> None:
        super().__init__()
        prefix = f"blocks.{layer.block_index}.{layer.layer_index}"
        parts: list[tuple[str, nn.Cell]] = []
        if layer.op == "mbconv":
            parts.append(("expand", ConvNorm(weights[f"{prefix}.expand.conv.weight"], style)))
        if layer.op == "conv":
            weight = weights[f"{prefix}.spatial.conv.weight"]
            parts.append(("spatial", ConvNorm(weight, style, stride=layer.stride)))
        else:
            weight = weights[f"{prefix}.depthwise.conv.weight"]
            cell = ConvNorm(
                weight, style, stride=layer.stride, group=layer.mid_filters, depthwise=depthwise
            )
            parts.append(("depthwise", cell))
        if layer.se_filters:
            reduce = weights[f"{prefix}.se.reduce.weight"]
            expand = weights[f"{prefix}.se.expand.weight"]
            parts.append(("se", SqueezeExcite(reduce, expand, style)))
        if layer.op != "conv":
            weight = weights[f"{prefix}.project.conv.weight"]
            parts.append(("project", ConvNorm(weight, style, relu=False)))
        for name, cell in parts:
            self.insert_child_to_cell(name, cell)
        self.steps = [cell for _, cell in parts]
        self.pool_skip = PoolSkip(layer, style) if layer.skip == "pool" else None
        self.identity = layer.skip == "identity"

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, in, height, width) -> (batch, out, height / stride, width / stride)."""
        y = x
        for step in self.steps:
            y = step(y)
        if self.identity:
            y = y + x
        if self.pool_skip is not None:
            y = y + self.pool_skip(x)
        return y


class MnasNet(nn.Cell):
    """The network: stem, blocks, head, mean over the map, classifier.

    Input: float32 (batch, input_channels, resolution, resolution), normalised.
    Output: float32 logits (batch, classes).
    """

    def __init__(
        self,
        architecture: Architecture,
        style: NetworkStyle,
        weights: dict[str, ms.Tensor],
        depthwise: Depthwise,
    ) -> None:
        super().__init__()
        stem = weights["stem.conv.weight"]
        self.stem = ConvNorm(stem, style, stride=architecture.stem_stride)
        stages: list[list[nn.Cell]] = [[] for _ in architecture.blocks]
        for layer in architecture.layers():
            stages[layer.block_index].append(Block(layer, weights, style, depthwise))
        self.blocks = nn.CellList([nn.SequentialCell(stage) for stage in stages])
        self.head = ConvNorm(weights["head.conv.weight"], style)
        self.classifier = nn.Dense(
            architecture.head_filters,
            architecture.classes,
            weight_init=weights["classifier.weight"],
            bias_init="zeros",
        )

    def features(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, input_channels, resolution, resolution) -> pooled (batch, head_filters)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return ops.mean(self.head(x), (2, 3))

    def classify(self, features: ms.Tensor) -> ms.Tensor:
        """(batch, head_filters) -> logits (batch, classes)."""
        return self.classifier(features)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, input_channels, resolution, resolution) -> logits (batch, classes)."""
        return self.classify(self.features(x))


def build_network(
    architecture: Architecture,
    style: NetworkStyle = PAPER_STYLE,
    *,
    seed: int,
    depthwise: Depthwise = "auto",
) -> MnasNet:
    """Return the network with initial weights (space.parameters.initial_parameters).

    Args:
        architecture: The network.
        style: Padding and batch norm of the framework to be like.
        seed: Of the initial weights.
        depthwise: `native` is MindSpore's convolution; `numba` the CPU kernel of
            space/depthwise.py, the same but for speed; `auto` takes numba where it helps.
    """
    chosen = choose_depthwise() if depthwise == "auto" else depthwise
    initial = initial_parameters(architecture, seed)
    weights = {name: ms.Tensor(value) for name, value in initial.items()}
    return MnasNet(architecture, style, weights, chosen)


def choose_depthwise() -> Depthwise:
    """`numba` on a CPU where numba can be imported, else `native`."""
    if ms.context.get_context("device_target") != "CPU":
        return "native"
    try:
        import space.depthwise  # noqa: F401
    except ImportError:
        return "native"
    return "numba"


def network_weights(network: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return name -> float32 array, a copy, of every parameter and statistic."""
    return {p.name: p.asnumpy().copy() for p in network.get_parameters()}
