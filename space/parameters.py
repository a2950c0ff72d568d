"""Parameters by name and shape: what cells, graphs, checkpoints and converters share.

stem.conv.weight                     (filters, input channels, 3, 3)
stem.norm.gamma|beta|moving_mean|moving_variance
blocks.<block>.<layer>.expand.conv.weight, ....norm....      mbconv: 1x1, input to middle
blocks.<block>.<layer>.depthwise.conv.weight, ....norm....   dconv, mbconv: (middle, 1, k, k)
blocks.<block>.<layer>.spatial.conv.weight, ....norm....     conv: (output, input, k, k)
blocks.<block>.<layer>.se.reduce.weight|bias                 squeeze-and-excitation, 1x1
blocks.<block>.<layer>.se.expand.weight|bias
blocks.<block>.<layer>.project.conv.weight, ....norm....     dconv, mbconv: 1x1, linear
head.conv.weight, head.norm....
classifier.weight, classifier.bias   (classes, head), (classes,)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from space.architecture import Architecture, Layer

Shape = tuple[int, ...]

#: A batch norm's parameters and their initial value; the last two are statistics, not trained.
NORM_PARAMETERS = {"gamma": 1.0, "beta": 0.0, "moving_mean": 0.0, "moving_variance": 1.0}


def parameter_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Return name -> shape of every parameter and batch-norm statistic, in the network's order."""
    shapes: dict[str, Shape] = {}
    stem, head = architecture.stem_filters, architecture.head_filters
    _add_convolution(shapes, "stem", (stem, architecture.input_channels, 3, 3))
    for layer in architecture.layers():
        _add_layer(shapes, layer)
    _add_convolution(shapes, "head", (head, architecture.blocks[-1].filters, 1, 1))
    shapes["classifier.weight"] = (architecture.classes, head)
    shapes["classifier.bias"] = (architecture.classes,)
    return shapes


def layer_prefix(layer: Layer) -> str:
    """The start of the names of a layer's parameters."""
    return f"blocks.{layer.block_index}.{layer.layer_index}"


def _add_layer(shapes: dict[str, Shape], layer: Layer) -> None:
    prefix, kernel, middle = layer_prefix(layer), layer.kernel_size, layer.mid_filters
    if layer.op == "mbconv":
        _add_convolution(shapes, f"{prefix}.expand", (middle, layer.input_filters, 1, 1))
    if layer.op == "conv":
        shape = (middle, layer.input_filters, kernel, kernel)
        _add_convolution(shapes, f"{prefix}.spatial", shape)
    else:
        _add_convolution(shapes, f"{prefix}.depthwise", (middle, 1, kernel, kernel))
    if layer.se_filters:
        shapes[f"{prefix}.se.reduce.weight"] = (layer.se_filters, middle, 1, 1)
        shapes[f"{prefix}.se.reduce.bias"] = (layer.se_filters,)
        shapes[f"{prefix}.se.expand.weight"] = (middle, layer.se_filters, 1, 1)
        shapes[f"{prefix}.se.expand.bias"] = (middle,)
    if layer.op != "conv":
        _add_convolution(shapes, f"{prefix}.project", (layer.output_filters, middle, 1, 1))


def _add_convolution(shapes: dict[str, Shape], prefix: str, weight: Shape) -> None:
    shapes[f"{prefix}.conv.weight"] = weight
    for name in NORM_PARAMETERS:
        shapes[f"{prefix}.norm.{name}"] = (weight[0],)


def initial_parameters(architecture: Architecture, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return float32 initial values of every parameter, as the published TPU code draws them.

    Convolutions: normal with variance 2 / fan-out (He et al., 2015; a depthwise kernel's fan-out
    is k * k). Classifier: uniform within 1 / sqrt(classes). Biases 0, batch norms 1 and 0.

    Args:
        architecture: The network.
        seed: The same seed gives the same values.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in parameter_shapes(architecture).items():
        last = name.rpartition(".")[2]
        if last in NORM_PARAMETERS:
            values[name] = np.full(shape, NORM_PARAMETERS[last], np.float32)
        elif last == "bias":
            values[name] = np.zeros(shape, np.float32)
        elif name == "classifier.weight":
            bound = 1 / math.sqrt(architecture.classes)
            values[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        else:
            depthwise = ".depthwise." in name
            fan_out = shape[2] * shape[3] * (1 if depthwise else shape[0])
            deviation = math.sqrt(2 / fan_out)
            values[name] = (rng.standard_normal(shape, np.float32) * deviation).astype(np.float32)
    return values
