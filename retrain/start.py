"""What a training begins with: its network, and a checkpoint's weights where one is given."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from retrain.checkpoint import Checkpoint, Weights, check_weights
from retrain.config import Recipe
from retrain.data import class_names
from retrain.foreign_weights import open_checkpoint
from retrain.request import TrainRequest
from space.architecture import Architecture
from space.errors import ConfigError
from space.mnasnet import adapt, find_architecture
from space.records import record

_GRAY = ("digits", "fashion_mnist")


@record
class Start:
    """What a training begins with.

    Attributes:
        architecture: The network.
        recipe: As given, but with the checkpoint's style and, where the recipe says nothing of it,
            its normalisation: its weights are for these.
        weights: Name -> array, of the checkpoint; names that are missing stay random. None: all.
        sha256: Of the checkpoint's file; None without one.
        note: A sentence on what is taken over; None without a checkpoint.
    """

    architecture: Architecture
    recipe: Recipe
    weights: Weights | None = None
    sha256: str | None = None
    note: str | None = None


def make_start(recipe: Recipe, request: TrainRequest) -> Start:
    """Return what a training begins with.

    From a checkpoint without `finetune`, the network must be the checkpoint's. With it, the
    network gets the data's classes; the classifier is kept where they are the same ones, and
    begins anew elsewhere.

    Raises:
        ConfigError: There is no such network, its checkpoint does not work, or the weights are
            another network's.
    """
    arch, path, resolution = request.arch, request.ckpt_path, request.resolution
    if path is None:
        return Start(network_for(arch, recipe, resolution=resolution), recipe)
    checkpoint = open_checkpoint(path)
    weights = dict(checkpoint.weights)
    if request.finetune:
        classes = class_names(recipe.data)
        network = adapt(checkpoint.architecture, classes=len(classes), resolution=resolution)
        same = len(classes) == checkpoint.architecture.classes
        if not same or classes != (checkpoint.classes or classes):
            weights = {n: v for n, v in weights.items() if not n.startswith("classifier.")}
    elif arch is None and recipe.network is None:
        network = adapt(checkpoint.architecture, resolution=resolution)
    else:
        network = network_for(arch, recipe, resolution=resolution)
        check_weights(network, weights, where=str(path))
    return _start(path, checkpoint, network, recipe, weights)


def _start(
    path: Path,
    checkpoint: Checkpoint,
    architecture: Architecture,
    recipe: Recipe,
    weights: Weights,
) -> Start:
    augment = recipe.augment
    if augment.mean is None:
        normalisation = checkpoint.normalisation
        augment = dataclasses.replace(
            augment, mean=normalisation.mean, std=normalisation.deviation
        )
    # Padding and epsilon are the weights' own; how fast statistics follow is the training's.
    momentum = recipe.style.batch_norm_momentum
    style = dataclasses.replace(checkpoint.style, batch_norm_momentum=momentum)
    anew = sorted(set(checkpoint.weights) - set(weights))
    return Start(
        architecture,
        dataclasses.replace(recipe, style=style, augment=augment),
        weights,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        f"starting from {path}" + (f"; random are {', '.join(anew)}" if anew else ""),
    )


def network_for(
    arch: str | None, recipe: Recipe, *, resolution: int | None = None
) -> Architecture:
    """Return the network to train, ready for a recipe's data.

    Args:
        arch: A published name, which gets the data's classes and channels, or a text form, which
            is taken as it is; None: the recipe's network.
        recipe: With data, and perhaps a network.
        resolution: Replaces the network's input size in pixels.

    Raises:
        ConfigError: There is no such network, or it cannot have this resolution.
    """
    if arch is not None:
        architecture = adapt(find_architecture(arch), resolution=resolution)
    elif recipe.network is not None:
        arch, chosen = recipe.network.name, recipe.network
        architecture = adapt(
            find_architecture(arch),
            width=chosen.width,
            resolution=resolution or chosen.resolution,
        )
    else:
        raise ConfigError(
            "--arch: must name a network, a published one or a text form, for the recipe names"
            " none."
        )
    if "|" in arch:
        return architecture
    channels = 1 if recipe.data.name in _GRAY else 3
    return adapt(architecture, classes=len(class_names(recipe.data)), input_channels=channels)
