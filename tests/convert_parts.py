"""What the tests of conversion share: weights that look trained, and files of other frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from retrain.checkpoint import Checkpoint, Weights
from retrain.convert import to_framework
from retrain.data import Normalisation
from retrain.frameworks import FRAMEWORKS, IMAGENET_DEVIATION, IMAGENET_MEAN
from space.architecture import Architecture, NetworkStyle
from space.parameters import parameter_shapes


def lively(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random float32 values for one of a network's arrays, in any framework's names.

    The scales keep activations and logits near 1; no batch norm is at its initial value.
    """
    if len(shape) > 1:  # a convolution or the classifier
        deviation = np.sqrt(1 / np.prod(shape[1:]))
        return rng.normal(0, deviation, shape).astype(np.float32)
    if name.rpartition(".")[2] in ("weight", "gamma", "running_var", "moving_variance"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.normal(0, 0.2, shape).astype(np.float32)


def lively_weights(architecture: Architecture, seed: int) -> Weights:
    """Random weights under our names."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(architecture)
    return {name: lively(name, shape, rng) for name, shape in shapes.items()}


def lively_checkpoint(
    architecture: Architecture, style: NetworkStyle, *, seed: int = 0
) -> Checkpoint:
    """A checkpoint of weights from nowhere, with ImageNet's normalisation where it fits."""
    channels = architecture.input_channels
    usual = Normalisation(IMAGENET_MEAN, IMAGENET_DEVIATION)
    other = Normalisation((0.5,) * channels, (0.25,) * channels)
    return Checkpoint(
        architecture=architecture,
        style=style,
        normalisation=usual if channels == 3 else other,
        classes=(),
        versions={},
        weights=lively_weights(architecture, seed),
    )


def foreign_arrays(framework: str, architecture: Architecture, *, seed: int = 0) -> dict[str, Any]:
    """Lively weights as a framework names them."""
    made = FRAMEWORKS[framework]
    return to_framework(made, lively_checkpoint(architecture, made.style, seed=seed), [])


def foreign_file(path: Path, framework: str, architecture: Architecture, *, seed: int = 0) -> Path:
    """Write lively weights as a framework's safetensors."""
    save_file(foreign_arrays(framework, architecture, seed=seed), path)
    return path


def same_arrays(left: Path, right: Path) -> bool:
    """Whether two safetensors files hold the same names, types, shapes and bits."""
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )
