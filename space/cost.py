"""Exact counts of a network: parameters, multiply-adds, activations.

Multiply-adds count convolutions, squeeze-and-excitation's 1x1 convolutions and the classifier, as
the MnasNet paper's figures do (A1: 312 M); not batch norms, activations, additions or pooling.
Every count is an exact integer and depends on the Architecture alone: both paddings give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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


class _Convolution(NamedTuple):
    """A convolution: with batch norm, or with bias (squeeze-and-excitation)."""

    weights: int
    filters: int
    output_size: int
    batch_norm: bool


@functools.lru_cache(maxsize=1024)
def count(architecture: Architecture) -> Cost:
    """Return the whole network's cost: the sum of its stages'."""
    filters, size = architecture.stem_filters, architecture.stem_size
    parts = [_single_totals(_stem(architecture))]
    for block in architecture.blocks:
        totals, size = _block_totals(block, filters, size)
        parts.append(totals)
        filters = block.filters
    parts.append(_single_totals(_head(architecture, filters, size)))
    parts.append(_classifier(architecture))
    return Cost(*map(sum, zip(*parts, strict=True)))


def stage_table(architecture: Architecture) -> tuple[StageCost, ...]:
    """Return the cost of stem, blocks, head and classifier, in order; they add up to `count`."""
    filters, size = architecture.stem_filters, architecture.stem_size
    pixels, stride = architecture.resolution, architecture.stem_stride
    rows = [
        StageCost(
            "stem", f"k3_s{stride}{stride}_o{filters}",
            (architecture.input_channels, pixels, pixels), (filters, size, size),
            *_single_totals(_stem(architecture)),
        )
    ]  # fmt: skip
    for index, block in enumerate(architecture.blocks):
        totals, out_size = _block_totals(block, filters, size)
        rows.append(
            StageCost(
                f"block {index}", format_block(block, filters),
                (filters, size, size), (block.filters, out_size, out_size), *totals,
            )
        )  # fmt: skip
        filters, size = block.filters, out_size
    head, classes = architecture.head_filters, architecture.classes
    rows += [
        StageCost(
            "head", f"k1_s11_o{head}", (filters, size, size), (head, size, size),
            *_single_totals(_head(architecture, filters, size)),
        ),
        StageCost(
            "classifier", f"c{classes}", (head, 1, 1), (classes,), *_classifier(architecture)
        ),
    ]  # fmt: skip
    return tuple(rows)


#: In the order of Cost's attributes.
_Totals = tuple[int, int, int, int]


# As many as the paper's space has, where they differ in the channels before them.
@functools.lru_cache(maxsize=16384)
def _block_totals(block: BlockSpec, filters: int, size: int) -> tuple[_Totals, int]:
    """What a block at a place costs, and the pixels after it."""
    layers = block_layers(0, block, filters, size)
    totals = _totals(convolution for layer in layers for convolution in _convolutions(layer))
    return totals, layers[-1].output_size


@functools.lru_cache(maxsize=1024)
def _single_totals(convolution: _Convolution) -> _Totals:
    """What the stem or the head costs: the same for most networks of a space."""
    return _totals([convolution])


def _totals(convolutions: Iterable[_Convolution]) -> _Totals:
    parameters = statistics = macs = activations = 0
    for weights, filters, size, batch_norm in convolutions:
        parameters += weights + (2 * filters if batch_norm else filters)
        statistics += 2 * filters if batch_norm else 0
        macs += weights * size**2
        activations += filters * size**2
    return parameters, parameters + statistics, macs, activations


def _stem(architecture: Architecture) -> _Convolution:
    filters = architecture.stem_filters
    weights = 9 * architecture.input_channels * filters
    return _Convolution(weights, filters, architecture.stem_size, True)


def _head(architecture: Architecture, filters: int, size: int) -> _Convolution:
    head = architecture.head_filters
    return _Convolution(filters * head, head, size, True)


def _classifier(architecture: Architecture) -> _Totals:
    dense = architecture.head_filters * architecture.classes
    parameters = dense + architecture.classes
    return parameters, parameters, dense, 0


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
