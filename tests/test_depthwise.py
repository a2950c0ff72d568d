"""The compiled depthwise convolution is MindSpore's but for its speed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Literal

import mindspore as ms
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import nn, ops
from numpy.typing import NDArray

from space import depthwise
from space.architecture import NetworkStyle, parse_architecture
from space.compiled import compiled
from space.depthwise import DepthwiseConv2d, convolve, gradients
from space.network import build_network

ms.set_context(mode=ms.GRAPH_MODE)

Padding = Literal["same", "symmetric"]
Doubles = NDArray[np.float64]


def padded(
    x: NDArray[np.float32], kernel_size: int, stride: int, padding: Padding
) -> tuple[Doubles, tuple[int, int], tuple[int, int]]:
    """The padded images, the size of the output, the pads above and left, by the definition."""
    sizes = x.shape[2:]
    outputs = [-(-size // stride) for size in sizes]
    pads = [kernel_size // 2] * 2
    if padding == "same":
        pads = [
            max(0, (output - 1) * stride + kernel_size - size) // 2
            for output, size in zip(outputs, sizes, strict=True)
        ]
    room = [(pad, kernel_size + stride) for pad in pads]
    return (
        np.pad(x.astype(np.float64), [(0, 0), (0, 0), *room]),
        (outputs[0], outputs[1]),
        (pads[0], pads[1]),
    )


def reference(
    x: NDArray[np.float32], weight: NDArray[np.float32], stride: int, padding: Padding
) -> Doubles:
    k = weight.shape[2]
    images, (rows, columns), _ = padded(x, k, stride, padding)
    y = np.zeros((*x.shape[:2], rows, columns))
    for i, j in itertools.product(range(k), range(k)):
        window = images[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
        y += weight[None, :, 0, i, j, None, None] * window
    return y


def reference_gradients(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    dy: NDArray[np.float32],
    stride: int,
    padding: Padding,
) -> tuple[Doubles, Doubles]:
    k = weight.shape[2]
    images, (rows, columns), (top, left) = padded(x, k, stride, padding)
    d_images, dw = np.zeros_like(images), np.zeros(weight.shape)
    for i, j in itertools.product(range(k), range(k)):
        window = (
            slice(None),
            slice(None),
            slice(i, i + stride * rows, stride),
            slice(j, j + stride * columns, stride),
        )
        dw[:, 0, i, j] = (dy * images[window]).sum((0, 2, 3))
        d_images[window] += weight[None, :, 0, i, j, None, None] * dy
    return d_images[:, :, top : top + x.shape[2], left : left + x.shape[3]], dw


def draw(seed: int, *shapes: tuple[int, ...]) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.floating]) -> None:
    """Within 1e-5 of the largest value (or of 1)."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 70),
    channels=st.integers(1, 4),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    kernel_size=st.sampled_from([1, 3, 5, 7, 9, 15]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from(["same", "symmetric"]),
)
def test_values_and_gradients_are_those_of_the_definition(
    seed: int,
    batch: int,
    channels: int,
    rows: int,
    columns: int,
    kernel_size: int,
    stride: int,
    padding: Padding,
) -> None:
    x, weight = draw(
        seed, (batch, channels, rows, columns), (channels, 1, kernel_size, kernel_size)
    )
    y = convolve(x, weight, stride=stride, padding=padding)
    assert_close(y, reference(x, weight, stride, padding))
    (dy,) = draw(seed + 1, y.shape)
    dx, dw = gradients(x, weight, dy, stride=stride, padding=padding)
    expected_dx, expected_dw = reference_gradients(x, weight, dy, stride, padding)
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw)


def test_a_map_larger_than_the_buffer_is_convolved_whole() -> None:
    x, weight = draw(3, (2, 2, 75, 61), (2, 1, 5, 5))
    y = convolve(x, weight, stride=2)
    assert_close(y, reference(x, weight, 2, "same"))
    dx, dw = gradients(x, weight, y, stride=2)
    expected_dx, expected_dw = reference_gradients(x, weight, y, 2, "same")
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw)


class Weighted(nn.Cell):
    """A convolution and the sum of its output times a fixed one, to have a gradient."""

    def __init__(self, convolution: nn.Cell, dy: NDArray[np.float32]) -> None:
        super().__init__()
        self.convolution = convolution
        self.dy = ms.Tensor(dy)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        y = self.convolution(x)
        return (y * self.dy).sum(), y


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "size"), [(3, 1, 6), (3, 2, 7), (5, 2, 8), (5, 1, 2), (7, 1, 9)]
)
def test_the_cell_equals_mindspore_s_convolution_with_both_gradients(
    kernel_size: int, stride: int, size: int, padding: Padding
) -> None:
    outputs = -(-size // stride)
    x, weight, dy = draw(
        5, (3, 6, size, size), (6, 1, kernel_size, kernel_size), (3, 6, outputs, outputs)
    )
    native = nn.Conv2d(
        6,
        6,
        kernel_size,
        stride,
        pad_mode="same" if padding == "same" else "pad",
        padding=0 if padding == "same" else kernel_size // 2,
        group=6,
        weight_init=ms.Tensor(weight),
    )
    found = []
    for cell in (native, DepthwiseConv2d(ms.Tensor(weight), stride=stride, padding=padding)):
        network = Weighted(cell, dy)
        function = ms.value_and_grad(network, 0, network.trainable_params(), has_aux=True)
        (_, y), (dx, (dw,)) = function(ms.Tensor(x))
        found.append([value.asnumpy() for value in (y, dx, dw)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_close(ours, theirs)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    x, weight, dy = draw(7, (16, 33, 16, 16), (33, 1, 3, 3), (16, 33, 16, 16))
    one = (convolve(x, weight, threads=1), *gradients(x, weight, dy, threads=1))
    for threads in (2, 5):
        more = (
            convolve(x, weight, threads=threads),
            *gradients(x, weight, dy, threads=threads),
        )
        for first, second in zip(one, more, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_stays_visible(bad: float) -> None:
    x, weight, dy = draw(9, (5, 2, 6, 6), (2, 1, 3, 3), (5, 2, 6, 6))
    x[1, 0, 2, 3] = bad
    y = convolve(x, weight)
    assert not np.isfinite(y[1, 0, 1:4, 2:5]).any()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
    _, dw = gradients(x, weight, dy)
    assert not np.isfinite(dw[0]).any()
    assert np.isfinite(dw[1]).all()


def test_arrays_that_are_not_contiguous_are_read_right() -> None:
    x, weight = draw(11, (4, 6, 8, 3), (6, 1, 3, 3))
    turned = x.transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(convolve(turned, weight), convolve(turned.copy(), weight))


@pytest.mark.parametrize(
    ("shape", "stride", "padding", "field"),
    [
        ((4, 2, 3, 3), 1, "same", "weight"),
        ((4, 1, 2, 2), 1, "same", "weight"),
        ((4, 1, 3, 5), 1, "same", "weight"),
        ((4, 1, 3, 3), 3, "same", "stride"),
        ((4, 1, 3, 3), 1, "valid", "padding"),
    ],
)
def test_a_convolution_that_it_cannot_do_is_refused_by_name(
    shape: tuple[int, ...], stride: int, padding: Padding, field: str
) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        DepthwiseConv2d(ms.Tensor(np.zeros(shape, np.float32)), stride=stride, padding=padding)


def test_without_a_folder_for_the_machine_code_it_is_compiled_without_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def njit(*, cache: bool = False, **options: object) -> object:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled(draw) == ("compiled", draw)  # type: ignore[comparison-overlap]
    assert asked == [True, False]


NETWORK = (
    "stem8_s11 | r2_k3_s11_e1_i8_o8 | r2_k5_s22_e3_i8_o12_se0.25 | r1_k7_s22_e3_i12_o16_pool"
    " | head32 | r12 | c5 | in1"
)


def train(network: nn.Cell, steps: int) -> list[float]:
    """Losses of a few steps on fixed random images."""
    rng = np.random.default_rng(2)
    x = ms.Tensor(rng.standard_normal((16, 1, 12, 12), dtype=np.float32))
    y = ms.Tensor(rng.integers(0, 5, 16).astype(np.int32))
    network.set_train(True)
    # Small: rounding grows tenfold a step at ten times this rate, with either implementation.
    optimizer = nn.SGD(network.trainable_params(), 0.002)

    def loss(images: ms.Tensor, labels: ms.Tensor) -> ms.Tensor:
        return ops.cross_entropy(network(images), labels)

    function = ms.value_and_grad(loss, None, optimizer.parameters)
    losses = []
    for _ in range(steps):
        value, grads = function(x, y)
        optimizer(grads)
        losses.append(float(value.asnumpy()))
    return losses


@pytest.mark.slow
def test_a_network_trains_alike_with_both_implementations() -> None:
    architecture = parse_architecture(NETWORK)
    style = NetworkStyle("symmetric", 1e-3, 0.9)
    native = build_network(architecture, style, seed=4, depthwise="native")
    ours = build_network(architecture, style, seed=4, depthwise="numba")
    names = [(p.name, p.shape) for p in native.get_parameters()]
    assert [(p.name, p.shape) for p in ours.get_parameters()] == names
    losses = train(native, 6)
    assert losses[-1] < losses[0] - 0.05
    np.testing.assert_allclose(train(ours, 6), losses, rtol=0, atol=1e-4)


COLD_START = """
import numpy as np
from space.depthwise import convolve, gradients
rng = np.random.default_rng(0)
x, w = rng.random((4, 64, 20, 20), np.float32), rng.random((64, 1, 3, 3), np.float32)
y = convolve(x, w, threads=2)
dx, dw = gradients(x, w, y, threads=2)
print(float(y.sum(dtype=np.float64)), float(dw.sum(dtype=np.float64)))
"""


@pytest.mark.slow
def test_two_processes_that_compile_at_once_share_one_cache(tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    root = Path(depthwise.__file__).parent.parent
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COLD_START],
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=250)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert list(tmp_path.rglob("*.nbi"))
