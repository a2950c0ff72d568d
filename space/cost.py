"""Exact counts of a network: parameters, multiply-adds, activations.

Multiply-adds count convolutions, squeeze-and-excitation's 1x1 convolutions and the classifier, as
the MnasNet paper's figures do (A1: 312 M); not batch norms, activations, additions or pooling.
Every count is an exact integer and depends on the Architecture alone: both paddings give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from space.architecture import Architecture, BlockSpec, Layer, block_layers, format_block
from space.records import record


@record
class Cost:
    """What a network costs.

    Attributes:
        parameters: Trainable parameters (batch norm: gamma and beta).
        parameters_with_statistics: Together with the batch norms' moving means and variances.
        macs: Multiply-adds of one image.
        activations: Output elements of all convolutions of one image.
    """

    parameters: int
    parameters_with_statistics: int
    macs: int
    activations: int


@record
class StageCost:
    """One row of a network's table.

    Attributes:
        name: `stem`, `block 0`, ..., `head`, `classifier`.
        text: What it is, in the text form's notation.
        input_shape: (channels, height, width).
        output_shape: (channels, height, width); (classes,) of the classifier.
        parameters: See Cost.
        parameters_with_statistics: See Cost.
        macs: See Cost.
        activations: See Cost.
    """

    name: str
    text: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    parameters_with_statistics: int
    macs: int
    activations: int


@record
class _Convolution:
    """A convolution: with batch norm, or with bias (squeeze-and-excitation)."""

    weights: int
    filters: int
    output_size: int
    batch_norm: bool

    @property
    def parameters(self) -> int:
        return self.weights + self.filters * (2 if self.batch_norm else 1)

    @property
    def statistics(self) -> int:
        return 2 * self.filters if self.batch_norm else 0

    @property
    def macs(self) -> int:
        return self.weights * self.output_size**2

    @property
    def activations(self) -> int:
        return self.filters * self.output_size**2


@functools.lru_cache(maxsize=1024)
def count(architecture: Architecture) -> Cost:
    """Return the whole network's cost."""
    stages = stage_table(architecture)
    return Cost(
        parameters=sum(stage.parameters for stage in stages),
        parameters_with_statistics=sum(stage.parameters_with_statistics for stage in stages),
        macs=sum(stage.macs for stage in stages),
        activations=sum(stage.activations for stage in stages),
    )


def stage_table(architecture: Architecture) -> tuple[StageCost, ...]:
    """Return the cost of stem, blocks, head and classifier, in order; they add up to `count`."""
    size, filters = architecture.stem_size, architecture.stem_filters
    stem = _Convolution(9 * architecture.input_channels * filters, filters, size, True)
    rows = [
        _stage(
            "stem",
            f"k3_s{architecture.stem_stride}{architecture.stem_stride}_o{filters}",
            (architecture.input_channels, architecture.resolution, architecture.resolution),
            (filters, size, size),
            [stem],
        )
    ]
    for index, block in enumerate(architecture.blocks):
        stage = _block_stage(index, block, filters, size)
        rows.append(stage)
        filters, size = block.filters, stage.output_shape[1]
    head = architecture.head_filters
    rows.append(
        _stage(
            "head",
            f"k1_s11_o{head}",
            (filters, size, size),
            (head, size, size),
            [_Convolution(filters * head, head, size, True)],
        )
    )
    classes = architecture.classes
    dense = head * classes
    rows.append(
        StageCost(
            "classifier", f"c{classes}", (head, 1, 1), (classes,),
            dense + classes, dense + classes, dense, 0,
        )
    )  # fmt: skip
    return tuple(rows)


@functools.lru_cache(maxsize=4096)
def _block_stage(index: int, block: BlockSpec, filters: int, size: int) -> StageCost:
    layers = block_layers(index, block, filters, size)
    out_size = layers[-1].output_size
    return _stage(
        f"block {index}",
        format_block(block, filters),
        (filters, size, size),
        (block.filters, out_size, out_size),
        [convolution for layer in layers for convolution in _convolutions(layer)],
    )


def _stage(
    name: str,
    text: str,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    convolutions: list[_Convolution],
) -> StageCost:
    parameters = sum(c.parameters for c in convolutions)
    return StageCost(
        name=name,
        text=text,
        input_shape=input_shape,
        output_shape=output_shape,
        parameters=parameters,
        parameters_with_statistics=parameters + sum(c.statistics for c in convolutions),
        macs=sum(c.macs for c in convolutions),
        activations=sum(c.activations for c in convolutions),
    )


def _convolutions(layer: Layer) -> Iterator[_Convolution]:
    middle, out, size = layer.mid_filters, layer.output_filters, layer.output_size
    kernel = layer.kernel_size**2
    if layer.op == "conv":
        yield _Convolution(kernel * layer.input_filters * out, out, size, True)
    else:
        if layer.op == "mbconv":
            yield _Convolution(layer.input_filters * middle, middle, layer.input_size, True)
        yield _Convolution(kernel * middle, middle, size, True)
    if layer.se_filters:
        yield _Convolution(middle * layer.se_filters, layer.se_filters, 1, False)
        yield _Convolution(layer.se_filters * middle, middle, 1, False)
    if layer.op != "conv":
        yield _Convolution(middle * out, out, size, True)
