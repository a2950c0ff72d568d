"""Refuses networks that no ONNX file or no memory can hold, before anything is built."""

from __future__ import annotations

from space.architecture import Architecture
from space.cost import count
from space.errors import MeasurementError

#: Protocol buffers end at 2 GiB, and with them an ONNX file without external data; 16 MiB are left
#: for all that is not weights.
MAX_WEIGHT_BYTES = 2**31 - 2**24

#: Copies of the weights alive at once: drawn, folded, in the graph, serialized, in the session,
#: and there once more in the layout of the kernels.
_WEIGHT_COPIES = 6


def weight_bytes(architecture: Architecture) -> int:
    """Return the bytes of a network's float32 weights.

    Raises:
        MeasurementError: They do not fit an ONNX file.
    """
    size = 4 * count(architecture).parameters
    if size > MAX_WEIGHT_BYTES:
        raise MeasurementError(
            f"the weights must take at most {MAX_WEIGHT_BYTES:,} bytes to fit an ONNX file,"
            f" but take {size:,}",
            cause="architecture",
        )
    return size


def needed_bytes(architecture: Architecture, batch: int) -> int:
    """Return the memory, about, that building and running a network takes.

    Raises:
        MeasurementError: Its weights do not fit an ONNX file.
    """
    weights = _WEIGHT_COPIES * weight_bytes(architecture)
    return weights + 4 * batch * _peak_activations(architecture)


def _peak_activations(architecture: Architecture) -> int:
    """Numbers alive at once for one image, about: the largest layer's maps, its input kept."""
    image = architecture.input_channels * architecture.resolution**2
    peak = image + architecture.stem_filters * architecture.stem_size**2
    for layer in architecture.layers():
        before = (layer.input_filters + layer.mid_filters) * layer.input_size**2
        after = (layer.mid_filters + layer.output_filters) * layer.output_size**2
        peak = max(peak, before + after)
    last = architecture.layers()[-1]
    return max(peak, (last.output_filters + architecture.head_filters) * last.output_size**2)
