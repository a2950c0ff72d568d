"""Quantizes a network's ONNX file to int8 with ONNX Runtime's static quantization.

Activations are uint8 with ranges seen in calibration, weights int8 with one scale per output
channel: what ONNX Runtime's documentation advises for x64 processors. The format is QDQ (pairs of
QuantizeLinear and DequantizeLinear around operators, which the runtime fuses), ONNX Runtime's
default; QOperator was tried and was not measurably faster.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from latency.processes import temporary_folder
from space.errors import ConfigError, MeasurementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: How many random images stand in for real ones.
_NUM_RANDOM = 4


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Hands out images one by one, as ONNX Runtime's calibration wants them."""

    def __init__(self, input_name: str, images: NDArray[np.float32]) -> None:
        self._left: Iterator[dict[str, Any]] = iter(
            [{input_name: image[np.newaxis]} for image in images]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def quantized(model: bytes, input_name: str, images: NDArray[np.float32]) -> bytes:
    """Return a network's ONNX file with int8 weights and uint8 activations.

    Args:
        model: The float32 file.
        input_name: Of its input.
        images: float32, (count, channels, height, width), as the network sees them in training.

    Raises:
        MeasurementError: ONNX Runtime cannot quantize the network.
    """
    with temporary_folder() as folder, _root_logger_as_it_was():
        source, prepared, target = (
            folder / f"{name}.onnx" for name in ("float32", "prepared", "int8")
        )
        source.write_bytes(model)
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Images(input_name, images),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        except OSError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no root of their own
            raise MeasurementError(
                f"ONNX Runtime cannot quantize the network: {error}".splitlines()[0][:300],
                cause="architecture",
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


def calibration_images(path: str | None, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return float32 images, (count, *shape): a file's, or four seeded random ones.

    Args:
        path: A .npy file, or None.
        shape: Channels, height, width.

    Raises:
        MeasurementError: The file's images do not fit the network.
    """
    if path is None:
        return np.random.default_rng(0).standard_normal((_NUM_RANDOM, *shape), dtype=np.float32)
    images = _load(path)
    if images.shape[1:] != shape:
        raise MeasurementError(
            f"{path} must hold images of the network's shape {shape}, but has {images.shape[1:]}",
            cause="architecture",
        )
    return images


@functools.cache
def calibration_identity(path: str | None) -> str:
    """Return what tells calibration data apart: `random`, or 16 digits of the file's SHA-256.

    Raises:
        ConfigError: The file cannot be read, or does not hold images.
    """
    if path is None:
        return f"{_NUM_RANDOM} random images"
    _load(path)
    return f"sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


def _load(path: str) -> NDArray[np.float32]:
    """A file's images.

    Raises:
        ConfigError: See calibration_identity.
    """
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a .npy file of images, but: {error}.") from error
    if images.dtype != np.float32 or images.ndim != 4 or not len(images):
        raise ConfigError(
            f"{path} must hold float32 images (count, channels, height, width), but holds"
            f" {images.dtype} {images.shape}."
        )
    found: NDArray[np.float32] = images
    return found
