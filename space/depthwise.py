"""Depthwise convolution on a CPU, compiled by numba: a cell that is nn.Conv2d but for its speed.

MindSpore's own depthwise kernel takes most of a training step on a CPU. This one copies planes
into a padded buffer, several images behind one another, where every tap of the filter is one
shift of the whole buffer: the inner loops are long, contiguous and vectorised however small the
maps are. A stride of 2 splits the padded plane into its even and odd rows and columns first, so
that it too is a sum of shifts. Gradients are sums of the same kind.

The kernels hold no lock: channels are shared out to a few threads of this process, as many as
MindSpore was given.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from space.compiled import compiled

Padding = Literal["same", "symmetric"]
Array = NDArray[np.float32]

#: Elements of the padded buffer: large enough to be worth a loop, small enough for the L1 cache.
_GROUP_ELEMENTS = 1024

#: Multiply-adds below which a second thread costs more than it gives.
_MACS_PER_THREAD = 200_000


class DepthwiseConv2d(nn.Cell):  # type: ignore[misc]
    """Depthwise convolution: float32 (batch, channels, height, width), one filter per channel.

    Differentiable by x and by the weight once; in graph mode and in PyNative mode, on CPU only.

    Args:
        weight: Initial value, float32 (channels, 1, k, k), k odd; the parameter `weight`.
        stride: 1 or 2.
        padding: `same` as TensorFlow pads, `symmetric` as k // 2 pads.
        threads: At most so many. By default the least of the process's cores, MindSpore's
            `runtime_num_threads`, NUMBA_NUM_THREADS and OMP_NUM_THREADS, when built.
    """

    def __init__(
        self,
        weight: ms.Tensor,
        *,
        stride: int = 1,
        padding: Padding = "same",
        threads: int | None = None,
    ) -> None:
        super().__init__()
        _, per_group, kernel_size, width = weight.shape
        if per_group != 1 or kernel_size != width or kernel_size % 2 == 0:
            raise ValueError(f"weight must be (channels, 1, k, k), k odd, but got {weight.shape}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, but got {stride!r}")
        if padding not in ("same", "symmetric"):
            raise ValueError(f"padding must be same or symmetric, but got {padding!r}")
        self.weight = ms.Parameter(weight, name="weight")
        self.convolve = _operator(stride, padding, threads or _default_threads())

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(batch, channels, height, width) -> (batch, channels, ceil(h / s), ceil(w / s))."""
        return self.convolve(x, self.weight)


def convolve(
    x: Array, weight: Array, *, stride: int = 1, padding: Padding = "same", threads: int = 1
) -> Array:
    """Return the convolution, float32 (batch, channels, ceil(h / stride), ceil(w / stride)).

    Args:
        x: float32, (batch, channels, height, width).
        weight: float32, (channels, 1, k, k), k odd.
        stride: 1 or 2.
        padding: See DepthwiseConv2d.
        threads: At least 1.
    """
    rows, columns = _axes(x.shape, weight.shape[2], stride, padding)
    x, taps = np.ascontiguousarray(x), _live_taps(weight, rows, columns)
    y = np.empty((*x.shape[:2], rows.outputs, columns.outputs), np.float32)
    plane, pads = (rows.plane, columns.plane), (rows.pad, columns.pad)

    def run(start: int, stop: int) -> None:
        _forward(x, taps, y, stride, plane, pads, start, stop)

    _share_channels(run, x.shape[1], y.size * taps[0].size, threads)
    return y


def gradients(
    x: Array,
    weight: Array,
    dy: Array,
    *,
    stride: int = 1,
    padding: Padding = "same",
    threads: int = 1,
) -> tuple[Array, Array]:
    """Return the gradients by x and by the weight, given that by the output.

    Args:
        x: As in `convolve`.
        weight: As in `convolve`.
        dy: float32, of the output's shape.
        stride: As in `convolve`.
        padding: As in `convolve`.
        threads: As in `convolve`.
    """
    rows, columns = _axes(x.shape, weight.shape[2], stride, padding)
    x, dy, taps = (
        np.ascontiguousarray(x),
        np.ascontiguousarray(dy),
        _live_taps(weight, rows, columns),
    )
    dx, dtaps = np.empty(x.shape, np.float32), np.empty(taps.shape, np.float32)
    plane, pads = (rows.plane, columns.plane), (rows.pad, columns.pad)

    def run(start: int, stop: int) -> None:
        _backward(x, taps, dy, dx, dtaps, stride, plane, pads, start, stop)

    _share_channels(run, x.shape[1], 2 * dy.size * taps[0].size, threads)
    dw = np.zeros(weight.shape, np.float32)
    dw[:, 0, rows.first : rows.last + 1, columns.first : columns.last + 1] = dtaps
    return dx, dw


# ---------------------------------------------------------------------------- MindSpore


@functools.cache
def _operator(stride: int, padding: Padding, threads: int) -> ops.Custom:
    """The primitive, one per kind: MindSpore never lets go of a function registered with it."""

    def forward(x: Array, weight: Array) -> Array:
        return convolve(x, weight, stride=stride, padding=padding, threads=threads)

    def backward(x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
        return gradients(x, weight, dy, stride=stride, padding=padding, threads=threads)

    def output_shape(x: Any, weight: Any) -> Any:
        return _output_shape(x, stride)

    def output_dtype(x: Any, weight: Any) -> Any:
        return x

    def input_shapes(x: Any, weight: Any, dy: Any) -> Any:
        return x, weight

    gradient = ops.Custom(backward, input_shapes, input_shapes, "pyfunc")

    def bprop(x: Any, weight: Any, out: Any, dout: Any) -> Any:
        return gradient(x, weight, dout)

    return ops.Custom(forward, output_shape, output_dtype, "pyfunc", bprop=bprop)


def _default_threads() -> int:
    """The least of what the process may run on, MindSpore was given, and the environment says."""
    given = [len(os.sched_getaffinity(0)), int(ms.get_context("runtime_num_threads"))]
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "")
        given += [int(text)] if text.isdecimal() else []
    return max(1, min(given))


# ---------------------------------------------------------------------------- threads, shapes


@functools.cache
def _pool(process_id: int, threads: int) -> ThreadPoolExecutor:
    """This process's threads (a forked child inherits the object, but no thread)."""
    return ThreadPoolExecutor(threads, thread_name_prefix="depthwise")


def _share_channels(
    run: Callable[[int, int], None], channels: int, macs: int, threads: int
) -> None:
    """Call run(start, stop) for parts of the channels, in several threads where it pays."""
    parts = max(1, min(threads, channels, macs // _MACS_PER_THREAD))
    if parts == 1:
        run(0, channels)
        return
    bounds = [channels * part // parts for part in range(parts + 1)]
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(run, bounds[part], bounds[part + 1]) for part in range(1, parts)]
    run(bounds[0], bounds[1])
    for other in others:
        other.result()


def _output_shape(x: Any, stride: int) -> Any:
    return (x[0], x[1], -(-x[2] // stride), -(-x[3] // stride))


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The geometry of a convolution along the height or the width of a map.

    Attributes:
        outputs: ceil(size / stride).
        first, last: The taps that meet a pixel anywhere; on small maps not all do.
        pad: Zeros before the first pixel that the first of these taps meets.
        plane: Length of one phase of the buffer: see the comment above the kernels.
    """

    outputs: int
    first: int
    last: int
    pad: int
    plane: int


def _axes(
    shape: tuple[int, ...], kernel_size: int, stride: int, padding: Padding
) -> tuple[_Axis, _Axis]:
    rows, columns = (_axis(size, kernel_size, stride, padding) for size in shape[2:])
    return rows, columns


def _axis(size: int, kernel_size: int, stride: int, padding: Padding) -> _Axis:
    outputs = -(-size // stride)
    pad = kernel_size // 2
    if padding == "same":
        pad = max(0, (outputs - 1) * stride + kernel_size - size) // 2
    first = max(0, pad - (outputs - 1) * stride)
    last = min(kernel_size - 1, pad + size - 1)
    pad -= first
    zeros = pad // stride
    distance = (last - first) // stride
    plane = max(outputs + distance - zeros, (pad + size - 1) // stride + 1)
    return _Axis(outputs, first, last, pad, plane)


def _live_taps(weight: Array, rows: _Axis, columns: _Axis) -> Array:
    """The filters without the taps that meet no pixel, (channels, tap rows, tap columns)."""
    return np.ascontiguousarray(
        weight[:, 0, rows.first : rows.last + 1, columns.first : columns.last + 1]
    )


# ---------------------------------------------------------------------------- kernels
#
# The buffer of one channel: `stride * stride` phases, each of a group of images, each a plane of
# plane[0] rows and plane[1] columns. Pixel (Y, X) of a padded image is in phase (Y % stride,
# X % stride) at (Y // stride, X // stride). Output (oy, ox) is then at oy * plane[1] + ox, and its
# tap (i, j) is at a distance from there that depends on i and j alone. Places that are no
# output's are computed too and dropped.
#
# The zeros before a row also serve as those behind the row above, the zeros above an image as
# those below the image before. So a plane need hold only what `_axis` says: the pixels, and
# outputs + (greatest distance of a tap) - (zeros before) places. The same bound keeps the taps
# that are read backwards, for the gradient by x, from reaching another row's outputs.


@compiled
def _add_taps(source: Array, offsets: Any, weights: Array, target: Array, length: int) -> None:
    """target[t] = sum over m of weights[m] * source[offsets[m] + t], t < length."""
    target[:length] = 0
    taps, m = len(offsets), 0
    while m + 5 <= taps:
        s0 = source[offsets[m] : offsets[m] + length]
        s1 = source[offsets[m + 1] : offsets[m + 1] + length]
        s2 = source[offsets[m + 2] : offsets[m + 2] + length]
        s3 = source[offsets[m + 3] : offsets[m + 3] + length]
        s4 = source[offsets[m + 4] : offsets[m + 4] + length]
        w0, w1, w2, w3, w4 = (
            weights[m],
            weights[m + 1],
            weights[m + 2],
            weights[m + 3],
            weights[m + 4],
        )
        for t in range(length):
            target[t] += w0 * s0[t] + w1 * s1[t] + w2 * s2[t] + w3 * s3[t] + w4 * s4[t]
        m += 5
    while m + 2 <= taps:
        s0 = source[offsets[m] : offsets[m] + length]
        s1 = source[offsets[m + 1] : offsets[m + 1] + length]
        w0, w1 = weights[m], weights[m + 1]
        for t in range(length):
            target[t] += w0 * s0[t] + w1 * s1[t]
        m += 2
    if m < taps:
        s0 = source[offsets[m] : offsets[m] + length]
        w0 = weights[m]
        for t in range(length):
            target[t] += w0 * s0[t]


@compiled
def _add_dots(source: Array, offsets: Any, dy: Array, sums: Any, length: int) -> None:
    """sums[m] += sum over t < length of source[offsets[m] + t] * dy[t]."""
    taps, m = len(offsets), 0
    while m + 3 <= taps:
        s0 = source[offsets[m] : offsets[m] + length]
        s1 = source[offsets[m + 1] : offsets[m + 1] + length]
        s2 = source[offsets[m + 2] : offsets[m + 2] + length]
        a0, a1, a2 = np.float32(0), np.float32(0), np.float32(0)
        for t in range(length):
            a0 += s0[t] * dy[t]
            a1 += s1[t] * dy[t]
            a2 += s2[t] * dy[t]
        sums[m] += a0
        sums[m + 1] += a1
        sums[m + 2] += a2
        m += 3
    while m < taps:
        s0 = source[offsets[m] : offsets[m] + length]
        a0 = np.float32(0)
        for t in range(length):
            a0 += s0[t] * dy[t]
        sums[m] += a0
        m += 1


@compiled
def _copy_split(
    images: Array,
    n: int,
    c: int,
    buffer: Array,
    start: int,
    phase: int,
    plane_columns: int,
    stride: int,
    pads: tuple[int, int],
    inwards: bool,
) -> None:
    """Copy channel c of image n into its padded, split plane, or back out of it.

    `start` is the plane's place in a phase, `phase` the distance of two phases.
    """
    top, left = pads
    shift = stride - 1
    for y in range(images.shape[2]):
        row = start + (((y + top) & shift) * stride) * phase + ((y + top) >> shift) * plane_columns
        for parity in range(stride):
            first = (parity - left) & shift
            base = row + parity * phase + ((first + left) >> shift)
            pixels = (images.shape[3] - first + shift) >> shift
            if inwards:
                for i in range(pixels):
                    buffer[base + i] = images[n, c, y, first + i * stride]
            else:
                for i in range(pixels):
                    images[n, c, y, first + i * stride] = buffer[base + i]


@compiled
def _tap_places(rows: int, columns: int, stride: int, plane_columns: int) -> Any:
    """Two (rows * columns,) integer arrays in the filter's order: phase, distance in a plane."""
    phases = np.empty(rows * columns, np.int64)
    distances = np.empty(rows * columns, np.int64)
    for i in range(rows):
        for j in range(columns):
            m = i * columns + j
            phases[m] = (i % stride) * stride + j % stride
            distances[m] = (i // stride) * plane_columns + j // stride
    return phases, distances


@compiled
def _forward(
    x: Array,
    taps: Array,
    y: Array,
    stride: int,
    plane: tuple[int, int],
    pads: tuple[int, int],
    start: int,
    stop: int,
) -> None:
    """Write y's channels start to stop - 1."""
    batch, _, rows, columns = y.shape
    size = plane[0] * plane[1]
    group = max(1, min(batch, _GROUP_ELEMENTS // size))
    phase = group * size
    phases, distances = _tap_places(taps.shape[1], taps.shape[2], stride, plane[1])
    offsets = phases * phase + distances
    source = np.zeros(stride * stride * phase + distances.max(), np.float32)
    target = np.empty(phase, np.float32)
    for c in range(start, stop):
        weights = taps[c].reshape(-1)
        for n0 in range(0, batch, group):
            images = min(group, batch - n0)
            for n in range(images):
                _copy_split(x, n0 + n, c, source, n * size, phase, plane[1], stride, pads, True)
            _add_taps(source, offsets, weights, target, images * size)
            for n in range(images):
                for row in range(rows):
                    base = n * size + row * plane[1]
                    for column in range(columns):
                        y[n0 + n, c, row, column] = target[base + column]


@compiled
def _backward(
    x: Array,
    taps: Array,
    dy: Array,
    dx: Array,
    dtaps: Array,
    stride: int,
    plane: tuple[int, int],
    pads: tuple[int, int],
    start: int,
    stop: int,
) -> None:
    """Write dx's and dtaps' channels start to stop - 1."""
    batch, _, rows, columns = dy.shape
    size = plane[0] * plane[1]
    group = max(1, min(batch, _GROUP_ELEMENTS // size))
    phase = group * size
    phases, distances = _tap_places(taps.shape[1], taps.shape[2], stride, plane[1])
    offsets = phases * phase + distances
    # By phase, so that the taps that reach one phase of x are a run.
    order = np.argsort(phases, kind="mergesort")
    # dy stands behind `reach` zeros: the taps read it backwards.
    reach = distances.max()
    backwards = (reach - distances)[order]
    source = np.zeros(stride * stride * phase + reach, np.float32)
    output = np.zeros(reach + phase, np.float32)
    target = np.empty(stride * stride * phase, np.float32)
    sums = np.empty(len(offsets), np.float64)
    for c in range(start, stop):
        weights = taps[c].reshape(-1)[order]
        sums[:] = 0
        for n0 in range(0, batch, group):
            images = min(group, batch - n0)
            for n in range(images):
                _copy_split(x, n0 + n, c, source, n * size, phase, plane[1], stride, pads, True)
                for row in range(rows):
                    base = reach + n * size + row * plane[1]
                    for column in range(columns):
                        output[base + column] = dy[n0 + n, c, row, column]
            _add_dots(source, offsets, output[reach:], sums, images * size)
            first = 0
            for p in range(stride * stride):
                last = first
                while last < len(order) and phases[order[last]] == p:
                    last += 1
                into = target[p * phase :]
                _add_taps(output, backwards[first:last], weights[first:last], into, images * size)
                first = last
            for n in range(images):
                _copy_split(dx, n0 + n, c, target, n * size, phase, plane[1], stride, pads, False)
        dtaps[c] = sums.reshape(taps.shape[1], taps.shape[2])
