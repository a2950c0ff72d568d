"""A checkpoint made ready for use: its data, and its MindSpore network."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from retrain.checkpoint import Checkpoint
from retrain.config import Recipe, load_recipe
from retrain.data import DataSet, load_data
from space.errors import ConfigError


def recipe_of(
    checkpoint: Checkpoint, ckpt_path: Path, config: str | None, data_dir: str | None
) -> Recipe:
    """Return the recipe asked for, or that of the checkpoint's training in the folder asked for.

    Raises:
        ConfigError: Neither is there, or its data cannot lie in a folder.
    """
    if config is not None:
        return load_recipe(config, data_dir=data_dir)
    if checkpoint.training is None:
        raise ConfigError(
            f"{ckpt_path}: holds weights from elsewhere, without a training whose data could be"
            " taken; say which data with --config RECIPE."
        )
    recipe = checkpoint.training.recipe
    if data_dir is None:
        return recipe
    try:
        return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=data_dir))
    except ValueError as error:
        raise ConfigError(f"--data_dir: {error}.") from None


def data_of(checkpoint: Checkpoint, recipe: Recipe) -> DataSet:
    """Return a recipe's data set, normalised as the checkpoint says.

    Raises:
        ConfigError: Its classes are not those of the checkpoint.
    """
    network = checkpoint.architecture
    loaded = load_data(recipe.data, network.resolution, network.input_channels, recipe.augment)
    data = copy.copy(loaded)
    if len(data.classes) != network.classes:
        raise ConfigError(
            f"data: the data set must have as many classes as the network, {network.classes}, but"
            f" has {len(data.classes)}."
        )
    if checkpoint.classes and tuple(data.classes) != checkpoint.classes:
        differing = sorted(set(data.classes) ^ set(checkpoint.classes))[:5]
        raise ConfigError(
            f"data.path: the data set's classes must be those of the checkpoint, but they differ"
            f" in {', '.join(differing) or 'their order'}."
        )
    data.normalisation = checkpoint.normalisation
    return data


def network_of(checkpoint: Checkpoint, threads: int) -> Any:
    """Return the MindSpore network with the checkpoint's weights."""
    from retrain.train import prepare_process, set_weights
    from space.network import build_network

    prepare_process(threads)
    network = build_network(checkpoint.architecture, checkpoint.style, seed=0)
    set_weights(network, checkpoint.weights)
    network.set_train(False)
    return network
