"""Starting from weights: other classes, frozen stages, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import make_image_folder
from retrain_parts import TINY, TINY_TEXT

from retrain.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retrain.commands import train_command
from retrain.config import load_recipe
from retrain.data import Normalisation
from retrain.folder import TrainReport
from retrain.request import TrainRequest
from retrain.start import make_start
from space.architecture import NetworkStyle
from space.errors import ConfigError
from space.parameters import initial_parameters

RECIPE = """
data: {name: image_folder, path: none, validation_fraction: 0.2}
epochs: 1
batch_size: 16
optimizer: {name: sgd}
schedule: {learning_rate: 0.1}
"""
DIGITS = RECIPE.replace("image_folder, path: none", "digits")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    return str(make_image_folder(folder, classes=4, train=10, val=2))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for ten classes, as `mnas convert` leaves them: without a training."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    checkpoint = Checkpoint(
        architecture=TINY,
        style=NetworkStyle("symmetric", 1e-5, 0.9),
        normalisation=Normalisation((0.25,), (0.5,)),
        classes=(),
        versions={},
        weights=initial_parameters(TINY, 7),
    )
    save_checkpoint(path, checkpoint)
    return path


def request_for(tmp_path: Path, text: str, **asked: Any) -> TrainRequest:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return TrainRequest(str(path), out=tmp_path / "out", threads=1, **asked)


def finished(request: TrainRequest) -> TrainReport:
    report = train_command(request)
    assert report is not None
    return report


def test_finetuning_gives_the_network_new_classes_and_leaves_frozen_stages_alone(
    tmp_path: Path, images: str, weights: Path
) -> None:
    report = finished(
        request_for(
            tmp_path, RECIPE, ckpt_path=weights, finetune=True, data_dir=images,
            overrides=("frozen_stages=2",),
        )
    )  # fmt: skip
    made = load_checkpoint(tmp_path / "out" / "model.safetensors")
    assert made.architecture == dataclasses.replace(TINY, classes=4)
    assert made.classes == ("class00", "class01", "class02", "class03")
    # The weights are for this padding, epsilon and normalisation; the momentum is the recipe's.
    assert made.style == NetworkStyle("symmetric", 1e-5, 0.99)
    assert made.normalisation == Normalisation((0.25,), (0.5,))
    start = load_checkpoint(weights).weights
    kept = {n for n, value in made.weights.items() if np.array_equal(value, start[n])}
    assert kept == {n for n in start if n.startswith(("stem.", "blocks."))}
    assert report.start is not None


def test_the_classifier_is_kept_for_the_same_classes_only(tmp_path: Path, weights: Path) -> None:
    asked = request_for(tmp_path, DIGITS, ckpt_path=weights, finetune=True)
    recipe = load_recipe(asked.config)
    unknown = make_start(recipe, asked)
    assert unknown.weights is not None
    assert "classifier.weight" in unknown.weights
    renamed = tmp_path / "renamed.safetensors"
    checkpoint = load_checkpoint(weights)
    save_checkpoint(renamed, dataclasses.replace(checkpoint, classes=tuple("abcdefghij")))
    other = make_start(recipe, dataclasses.replace(asked, ckpt_path=renamed))
    assert other.weights is not None
    assert "classifier.weight" not in other.weights
    assert other.note is not None
    assert other.note.endswith("random are classifier.bias, classifier.weight")


def test_a_training_that_starts_from_weights_takes_the_network_from_them(
    tmp_path: Path, weights: Path
) -> None:
    asked = request_for(tmp_path, DIGITS, ckpt_path=weights)
    start = make_start(load_recipe(asked.config), asked)
    assert start.architecture == TINY
    assert start.weights is not None
    assert np.array_equal(
        start.weights["stem.conv.weight"], initial_parameters(TINY, 7)["stem.conv.weight"]
    )


def test_weights_of_another_network_are_refused_before_a_folder_is_made(
    tmp_path: Path, weights: Path
) -> None:
    other = TINY_TEXT.replace("head48", "head24")
    with pytest.raises(ConfigError, match=r"misshapen: head.conv.weight \(must be \(24,"):
        finished(request_for(tmp_path, DIGITS, arch=other, ckpt_path=weights))
    assert not (tmp_path / "out").exists()


def test_a_resumed_training_must_have_started_from_the_same_weights(
    tmp_path: Path, weights: Path
) -> None:
    finished(request_for(tmp_path, DIGITS, ckpt_path=weights))
    with pytest.raises(ConfigError, match=r"start is '[0-9a-f]{64}', not None"):
        finished(request_for(tmp_path, DIGITS, arch=TINY_TEXT, resume=True))


def test_finetuning_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ckpt_path: is missing"):
        request_for(tmp_path, DIGITS, finetune=True)
