"""Quantizes a network's ONNX file to int8 with ONNX Runtime's static quantization.

Activations are uint8 with ranges seen in calibration, weights int8 with one scale per output
channel: what ONNX Runtime's documentation advises for x64 processors. The format is QDQ (pairs of
QuantizeLinear and DequantizeLinear around operators, which the runtime fuses), ONNX Runtime's
default; QOperator was tried and was not measurably faster.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from space.errors import MnasError
from space.onnx_graph import INPUT_NAME


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Hands out batches one by one, as ONNX Runtime's calibration wants them."""

    def __init__(self, batches: Iterable[NDArray[np.float32]]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {INPUT_NAME: batch}


def quantized(model: bytes, batches: Iterable[NDArray[np.float32]], folder: Path) -> bytes:
    """Return a network's ONNX file with int8 weights and uint8 activations.

    Args:
        model: The float32 file, as space/onnx_graph.py writes it; its metadata are kept.
        batches: Images for calibration as evaluation sees them, normalised: each float32
            (count, channels, height, width). The least and the greatest value of each activation
            become its range.
        folder: An empty one, for files in between; they are left there.

    Raises:
        MnasError: ONNX Runtime cannot quantize the network.
        OSError: A file cannot be written.
    """
    source, prepared, target = (
        folder / f"{name}.onnx" for name in ("float32", "prepared", "int8")
    )
    source.write_bytes(model)
    with _root_logger_as_it_was():
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Images(batches),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        except (OSError, MnasError):  # a full disk; an image that cannot be read
            raise
        except Exception as error:  # ONNX Runtime's errors have no root of their own
            raise MnasError(
                f"ONNX Runtime cannot quantize the network: {error}".splitlines()[0][:300]
            ) from error
    return target.read_bytes()


@contextlib.contextmanager
def _root_logger_as_it_was() -> Iterator[None]:
    """The quantizer logs through functions that give the root logger a handler by the way."""
    handlers = list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
