"""Architecture -> ONNX graph, written directly: no training framework, batch norms folded.

Latency does not depend on weights, so a graph for timing has random ones; a graph for deployment
has trained ones, by the names of space/parameters.py. The batch is dynamic. Input `input`: float32
(batch, channels, resolution, resolution), normalised; output `logits`: float32 (batch, classes).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from space.architecture import PAPER_STYLE, Architecture, Layer, NetworkStyle
from space.errors import ConfigError
from space.parameters import initial_parameters, layer_prefix, parameter_shapes

#: Old enough for devices' runtimes, new enough for every operator used.
OPSET = 17
IR_VERSION = 8

INPUT_NAME, OUTPUT_NAME = "input", "logits"

Weights = Mapping[str, NDArray[np.float32]]


def onnx_model(
    architecture: Architecture,
    style: NetworkStyle = PAPER_STYLE,
    *,
    weights: Weights | None = None,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the network as an ONNX model.

    Args:
        architecture: The network.
        style: Padding and batch-norm epsilon.
        weights: Name -> float32 array of every parameter and statistic; None draws initial ones.
        seed: Of the initial weights.
        metadata: Key -> text put beside the architecture's text and hash.

    Raises:
        ConfigError: Weights are missing, unexpected or misshapen; all of them are listed.
    """
    if weights is None:
        weights = initial_parameters(architecture, seed)
    check_weights(architecture, weights)
    writer = _Writer(weights, style)
    last = writer.network(architecture)
    batch, size = "batch", architecture.resolution
    graph = helper.make_graph(
        writer.nodes,
        f"mnas_{architecture.hash}",
        [
            helper.make_tensor_value_info(
                INPUT_NAME, TensorProto.FLOAT, [batch, architecture.input_channels, size, size]
            )
        ],
        [
            helper.make_tensor_value_info(
                OUTPUT_NAME, TensorProto.FLOAT, [batch, architecture.classes]
            )
        ],
        writer.initializers,
    )
    assert last == OUTPUT_NAME
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="mnas",
        producer_version=_version(),
    )
    model.ir_version = IR_VERSION
    described = {
        "architecture": architecture.text,
        "architecture_hash": architecture.hash,
        "padding": style.padding,
        "batch_norm_epsilon": repr(style.batch_norm_epsilon),
        **(metadata or {}),
    }
    helper.set_model_props(model, described)
    return model


def with_metadata(model: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return an ONNX file with further metadata, key -> text; known keys get the new text."""
    loaded = onnx.load_from_string(model)
    known = {entry.key: entry.value for entry in loaded.metadata_props}
    helper.set_model_props(loaded, {**known, **metadata})
    content: bytes = loaded.SerializeToString()
    return content


def check_weights(architecture: Architecture, weights: Mapping[str, Any]) -> None:
    """Raise unless the weights are exactly the network's, by name and shape.

    Raises:
        ConfigError: Lists what is missing, unexpected or misshapen.
    """
    shapes = parameter_shapes(architecture)
    faults = [f"{name} is missing" for name in shapes if name not in weights]
    faults += [f"{name} is unexpected" for name in weights if name not in shapes]
    faults += [
        f"{name} must have the shape {shape}, but has {tuple(weights[name].shape)}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ConfigError(
            f"weights do not fit network {architecture.hash}: {'; '.join(faults[:5])}{more}."
        )


def _version() -> str:
    try:
        return importlib.metadata.version("mnas")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class _Writer:
    """Collects nodes and initializers; every method returns the name of its output."""

    def __init__(self, weights: Weights, style: NetworkStyle) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._weights = weights
        self._style = style

    def network(self, architecture: Architecture) -> str:
        """The whole network from INPUT_NAME to OUTPUT_NAME."""
        size = architecture.resolution
        x = self._conv_norm("stem", INPUT_NAME, 3, architecture.stem_stride, size)
        for layer in architecture.layers():
            x = self._layer(layer, x)
        x = self._conv_norm("head", x, 1, 1, size)
        x = self._mean(x, "features", keepdims=0)
        weight = self._constant("classifier.weight", self._weights["classifier.weight"])
        bias = self._constant("classifier.bias", self._weights["classifier.bias"])
        return self._node("Gemm", [x, weight, bias], OUTPUT_NAME, transB=1)

    def _layer(self, layer: Layer, x: str) -> str:
        prefix, size = layer_prefix(layer), layer.input_size
        kernel, stride = layer.kernel_size, layer.stride
        y = x
        if layer.op == "mbconv":
            y = self._conv_norm(f"{prefix}.expand", y, 1, 1, size)
        if layer.op == "conv":
            y = self._conv_norm(f"{prefix}.spatial", y, kernel, stride, size)
        else:
            group = layer.mid_filters
            y = self._conv_norm(f"{prefix}.depthwise", y, kernel, stride, size, group=group)
        if layer.se_filters:
            y = self._squeeze_excite(f"{prefix}.se", y)
        if layer.op != "conv":
            y = self._conv_norm(f"{prefix}.project", y, 1, 1, size, relu=False)
        if layer.skip == "identity":
            y = self._node("Add", [y, x], f"{prefix}.sum")
        if layer.skip == "pool":
            y = self._node("Add", [y, self._pool_skip(layer, prefix, x)], f"{prefix}.sum")
        return y

    def _conv_norm(
        self,
        prefix: str,
        x: str,
        kernel: int,
        stride: int,
        size: int,
        *,
        group: int = 1,
        relu: bool = True,
    ) -> str:
        """A convolution with its batch norm folded in."""
        weights, norm = self._weights, f"{prefix}.norm"
        deviation = np.sqrt(
            weights[f"{norm}.moving_variance"].astype(np.float64) + self._style.batch_norm_epsilon
        )
        scale = weights[f"{norm}.gamma"] / deviation
        kernel_values = weights[f"{prefix}.conv.weight"] * scale[:, None, None, None]
        offset = weights[f"{norm}.beta"] - weights[f"{norm}.moving_mean"] * scale
        inputs = [
            x,
            self._constant(f"{prefix}.weight", kernel_values),
            self._constant(f"{prefix}.bias", offset),
        ]
        y = self._node(
            "Conv",
            inputs,
            f"{prefix}.conv",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=self._pads(kernel, stride, size),
            group=group,
        )
        return self._node("Relu", [y], f"{prefix}.relu") if relu else y

    def _squeeze_excite(self, prefix: str, x: str) -> str:
        gate = self._mean(x, f"{prefix}.mean", keepdims=1)
        for name, activation in (("reduce", "Relu"), ("expand", "Sigmoid")):
            weight = self._constant(
                f"{prefix}.{name}.weight", self._weights[f"{prefix}.{name}.weight"]
            )
            bias = self._constant(f"{prefix}.{name}.bias", self._weights[f"{prefix}.{name}.bias"])
            gate = self._node(
                "Conv", [gate, weight, bias], f"{prefix}.{name}", kernel_shape=[1, 1]
            )
            gate = self._node(activation, [gate], f"{prefix}.{name}.{activation.lower()}")
        return self._node("Mul", [x, gate], f"{prefix}.scaled")

    def _mean(self, x: str, output: str, *, keepdims: int) -> str:
        """The mean over rows and columns.

        Not GlobalAveragePool: on a map of 112 x 112, ONNX Runtime's is off by 3e-5 of the mean
        (1e-7 with this node), which ended in logits wrong by 1.6e-4; and it is no faster.
        """
        return self._node("ReduceMean", [x], output, axes=[2, 3], keepdims=keepdims)

    def _pool_skip(self, layer: Layer, prefix: str, x: str) -> str:
        """3x3 max pooling, whose border never counts; channels cut or zero-padded."""
        y = self._node(
            "MaxPool",
            [x],
            f"{prefix}.pool",
            kernel_shape=[3, 3],
            strides=[layer.stride, layer.stride],
            pads=self._pads(3, layer.stride, layer.input_size),
        )
        missing = layer.output_filters - layer.input_filters
        if missing > 0:
            pads = np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64)
            return self._node(
                "Pad", [y, self._constant(f"{prefix}.pads", pads)], f"{prefix}.padded"
            )
        if missing < 0:
            bounds = [
                self._constant(f"{prefix}.cut.{name}", np.array([value], np.int64))
                for name, value in (("start", 0), ("end", layer.output_filters), ("axis", 1))
            ]
            return self._node("Slice", [y, *bounds], f"{prefix}.cut")
        return y

    def _pads(self, kernel: int, stride: int, size: int) -> list[int]:
        if self._style.padding == "symmetric":
            return [kernel // 2] * 4
        # TensorFlow's `same`: the surplus of an odd sum comes after.
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return [total // 2, total // 2, total - total // 2, total - total // 2]

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if values.dtype != np.int64:
            values = values.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name
