"""What int8 devices time: the network's file quantized, with images that show the ranges."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latency.processes import temporary_folder
from space.errors import ConfigError, MeasurementError, MnasError
from space.quantization import quantized

#: How many random images stand in for real ones.
_NUM_RANDOM = 4


def int8_model(model: bytes, images: NDArray[np.float32]) -> bytes:
    """Return a network's ONNX file with int8 weights and uint8 activations.

    Args:
        model: The float32 file.
        images: float32, (count, channels, height, width), as the network sees them in training.

    Raises:
        MeasurementError: ONNX Runtime cannot quantize the network, or the disk takes no file.
    """
    with temporary_folder() as folder:
        try:
            return quantized(model, np.split(images, len(images)), folder)
        except MnasError as error:
            raise MeasurementError(str(error), cause="architecture") from error


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
