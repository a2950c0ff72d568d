"""What a network's time is made of: named amounts that a linear model weighs in milliseconds.

A time is nearly the sum of its operations' times, and in a factorized space blocks interact
little. So each kind of features turns an Architecture into `terms`, name -> amount, and a table
(latency/lookup_table.py) finds the milliseconds of each name. Stem and classifier are the same
throughout a space and have no terms.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from space.architecture import Architecture, Layer, format_block
from space.records import record

FeatureKind = Literal["blocks", "work", "operations"]

Terms = Mapping[str, float]
Array = NDArray[np.float64]

#: Root mean square of a column of work, in the units of `scaled_matrix`.
_WORK_SCALE = 30.0

#: The amounts of an operation that its time may grow with; the names of work terms end in them.
WORK = ("count", "macs", "read", "written", "weights")


@record
class Operation:
    """One operation of a network, with all that its time depends on.

    Attributes:
        kind: `conv`, `expand` and `project` (1x1), `depthwise`, `se` (all of
            squeeze-and-excitation), `pool` and `identity` (residual branches), `head`.
        kernel_size: Of a convolution or pooling; 1 otherwise.
        stride: 1 or 2.
        input_filters: Channels in.
        output_filters: Channels out; of `se` the reduced width.
        input_size: Pixels of the square map in.
        output_size: Pixels of the square map out.
    """

    kind: str
    kernel_size: int
    stride: int
    input_filters: int
    output_filters: int
    input_size: int
    output_size: int

    @property
    def family(self) -> str:
        """The operations whose times grow alike."""
        return f"{self.kind} k{self.kernel_size} s{self.stride}"

    @property
    def shape(self) -> str:
        """The whole operation as a name."""
        return f"{self.family} i{self.input_filters} o{self.output_filters} {self.input_size}px"

    @property
    def work(self) -> tuple[float, ...]:
        """In the order of WORK: 1, multiply-adds, numbers read, written and kept as weights."""
        weights = self.kernel_size**2 * self.input_filters * self.output_filters
        if self.kind in ("identity", "pool"):
            weights = 0
        elif self.kind == "depthwise":
            weights = self.kernel_size**2 * self.input_filters
        elif self.kind == "se":
            weights *= 2  # there and back
        # Squeeze-and-excitation scales the whole map, but its convolutions see one pixel.
        pixels = 1 if self.kind == "se" else self.output_size**2
        written = self.input_filters if self.kind == "se" else self.output_filters
        return (
            1.0,
            float(weights * pixels),
            float(self.input_filters * self.input_size**2),
            float(written * self.output_size**2),
            float(weights),
        )


def operations(architecture: Architecture) -> Iterator[Operation]:
    """Yield a network's operations between stem and classifier, in order."""
    for layer in architecture.layers():
        yield from _layer_operations(layer)
    last, head = architecture.layers()[-1], architecture.head_filters
    size = last.output_size
    yield Operation("head", 1, 1, last.output_filters, head, size, size)


@functools.lru_cache(maxsize=65_536)
def _layer_operations(layer: Layer) -> tuple[Operation, ...]:
    first, middle, last = layer.input_filters, layer.mid_filters, layer.output_filters
    size, out_size = layer.input_size, layer.output_size
    kernel, stride = layer.kernel_size, layer.stride
    made = []
    if layer.op == "conv":
        made.append(Operation("conv", kernel, stride, first, last, size, out_size))
    else:
        if layer.op == "mbconv":
            made.append(Operation("expand", 1, 1, first, middle, size, size))
        made.append(Operation("depthwise", kernel, stride, middle, middle, size, out_size))
        made.append(Operation("project", 1, 1, middle, last, out_size, out_size))
    if layer.se_filters:
        made.append(Operation("se", 1, 1, middle, layer.se_filters, out_size, out_size))
    if layer.skip == "identity":
        made.append(Operation("identity", 1, 1, last, last, out_size, out_size))
    if layer.skip == "pool":
        made.append(Operation("pool", 3, stride, first, last, size, out_size))
    return tuple(made)


def block_terms(architecture: Architecture) -> Terms:
    """Return one term for each block: its position with its whole configuration."""
    terms, filters = {}, architecture.stem_filters
    for index, block in enumerate(architecture.blocks):
        terms[f"block {index}: {format_block(block, filters)}"] = 1.0
        filters = block.filters
    return terms


def work_terms(architecture: Architecture) -> Terms:
    """Return how much of each kind of work every family of operations does."""
    return _total(_work(operation) for operation in operations(architecture))


def operation_terms(architecture: Architecture) -> Terms:
    """Return `work_terms`, and how often each operation occurs: for what is not in proportion."""
    counts = Counter(operation.shape for operation in operations(architecture))
    return {**work_terms(architecture), **counts}


@functools.lru_cache(maxsize=65_536)
def _work(operation: Operation) -> Terms:
    return {
        f"{operation.family} {what}": amount
        for what, amount in zip(WORK, operation.work, strict=True)
        if amount
    }


def _total(parts: Iterable[Terms]) -> Terms:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def scaled_matrix(terms: Sequence[Terms]) -> tuple[list[str], Array, Array]:
    """Return the names of all terms, the networks' amounts in columns, and the columns' units.

    The columns are as large as the terms are likely to matter, which is what ridge regression
    and the choice of networks go by: work counts more than single operations, whose counts are
    small whole numbers and stay.

    Returns:
        Names, in order; float64, (networks, names), in the units; float64, (names,), the units.
    """
    names = sorted({name for row in terms for name in row})
    columns = {name: column for column, name in enumerate(names)}
    amounts = np.zeros((len(terms), len(names)))
    for row, given in enumerate(terms):
        for name, amount in given.items():
            amounts[row, columns[name]] = amount
    is_work = np.array([name.rpartition(" ")[2] in WORK for name in names])
    units = np.where(is_work, np.sqrt(np.mean(amounts**2, axis=0)) / _WORK_SCALE, 1.0)
    return names, amounts / units, units


#: Kinds of features, by the name that a table's file has for them.
TERMS: dict[FeatureKind, Callable[[Architecture], Terms]] = {
    "blocks": block_terms,
    "work": work_terms,
    "operations": operation_terms,
}
