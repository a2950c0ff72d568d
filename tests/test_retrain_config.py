"""Recipes: strict, with a sentence for every bad value."""

from __future__ import annotations

import subprocess
import sys

import pytest

from retrain.config import DataConfig, OptimizerConfig, PrecisionConfig, Recipe, load_recipe
from space.errors import ConfigError
from space.records import build, shipped_names, to_plain


def recipe(**changes: object) -> Recipe:
    return build(Recipe, {"data": {"name": "digits"}, "epochs": 1, **changes}, where="r.yaml")


@pytest.mark.parametrize("name", shipped_names("retrain"))
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name: str) -> None:
    loaded = load_recipe(name)
    assert build(Recipe, to_plain(loaded), where=name) == loaded


def test_a_recipes_own_batch_is_what_its_learning_rate_is_for() -> None:
    assert load_recipe("digits", ["batch_size=256"]).global_batch == 64
    assert load_recipe("digits", ["batch_size=256", "global_batch=null"]).global_batch is None
    assert load_recipe("mnasnet_1.0", ["batch_size=8"]).global_batch == 2048


def test_what_depends_on_another_setting_follows_it() -> None:
    assert OptimizerConfig(name="adamw").epsilon == 1e-8
    assert OptimizerConfig(name="adamw", epsilon=1e-3).epsilon == 1e-3
    assert PrecisionConfig().loss_scale == 1
    assert PrecisionConfig(dynamic=True).loss_scale == 2**16
    assert PrecisionConfig(dynamic=True, loss_scale=4.0).loss_scale == 4


def test_the_defaults_are_the_papers_optimizer() -> None:
    made = recipe()
    optimizer = made.optimizer
    assert (optimizer.name, optimizer.decay, optimizer.momentum) == ("rmsprop", 0.9, 0.9)
    assert (optimizer.epsilon, optimizer.weight_decay, made.label_smoothing) == (1e-3, 1e-5, 0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be in [1, 100000], but got 0"),
        ({"epochs": 1.5}, "epochs must be an integer, but got 1.5"),
        ({"epochs": True}, "epochs must be an integer, but got True"),
        ({"batch_size": 0}, "batch_size must be in [1, 1e+06], but got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 0.999], but got 1.0"),
        ({"dropout": -0.1}, "dropout must be in [0, 0.999], but got -0.1"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0, but got 0.0"),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'?"),
        ({"schedule": {"learning_rate": 0.0}}, "schedule.learning_rate must be in"),
        ({"schedule": {"learning_rate": "1e-4"}}, "schedule.learning_rate must be a number"),
        ({"schedule": {"learning_rate": 1.0, "min_learning_rate": 2.0}}, "min_learning_rate must"),
        ({"schedule": {"name": "cosin"}}, "did you mean 'cosine'?"),
        ({"optimizer": {"name": "adam"}}, "rmsprop, sgd, adamw, but got 'adam'; did you mean"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2 must be in [0, 0.999999], but got 1.0"),
        ({"accumulate": 0}, "accumulate must be in [1, 100000], but got 0"),
        ({"global_batch": 0}, "global_batch must be in [1, 1e+08], but got 0"),
        ({"drop_path": 1.0}, "drop_path must be in [0, 0.999], but got 1.0"),
        ({"precision": {"amp_level": "O1"}}, "must be one of O0, O2, O3, but got 'O1'"),
        ({"precision": {"loss_scale": 0.5}}, "precision.loss_scale must be in [1,"),
        ({"checkpoints": {"every_steps": 0}}, "checkpoints.every_steps must be in [1,"),
        ({"checkpoints": {"format": "pth"}}, "must be one of safetensors, ckpt, but got 'pth'"),
        ({"network": {"width": 0.5}}, "network.name is missing"),
        ({"batch_norm": "sync"}, "batch_norm must be one of train, frozen, but got 'sync'"),
        ({"optimizer": {"momentum": 1.5}}, "optimizer.momentum must be in [0, 1], but got 1.5"),
        ({"optimizer": {"nesterov": True}}, "optimizer.nesterov must be false unless"),
        ({"data": {"name": "digits", "path": "/x"}}, "data.path must be left out for digits"),
        ({"data": {"name": "fashion_mnist"}}, "data.path must be a folder, but got None"),
        ({"data": {"name": "digits", "validation_fraction": 0.0}}, "validation_fraction must be"),
        ({"data": {"name": "digits", "train_images": 0}}, "train_images must be >= 1, but got 0"),
        ({"augment": {"shift": -1}}, "augment.shift must be in [0, 64], but got -1"),
        ({"style": {"batch_norm_momentum": 2.0}}, "style.batch_norm_momentum must be in"),
    ],
)
def test_a_bad_value_gets_a_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**changes)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("r.yaml: ")


def test_overrides_and_the_data_folder_replace_what_the_file_says() -> None:
    made = load_recipe("fashion_mnist", ["epochs=7", "schedule.name=constant"], data_dir="/there")
    assert (made.epochs, made.schedule.name) == (7, "constant")
    assert made.data == DataConfig(
        "fashion_mnist", path="/there", validation_fraction=made.data.validation_fraction
    )


def test_a_misspelt_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_recipe("digit")


def test_reading_recipes_loads_no_framework() -> None:
    code = (
        "import sys, retrain.config, retrain.data, retrain.checkpoint, retrain.commands;"
        "print(sorted({'mindspore', 'ray', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
