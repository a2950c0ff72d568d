"""The shipped ImageNet recipes are the published ones, number by number and step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retrain.batch import fit_batch
from retrain.config import Recipe, load_recipe
from retrain.schedule import learning_rate
from space.architecture import NetworkStyle
from space.cost import count
from space.errors import ConfigError
from space.mnasnet import adapt, published
from space.records import build

#: Recipe -> width, batch per device (of 8), epochs, peak and last learning rate, interpolation,
#: amp level, parameters with batch-norm statistics.
ZOO = {
    "mnasnet_0.5": (0.5, 512, 400, 0.1, 5e-6, "bicubic", "O3", 2_239_136),
    "mnasnet_0.75": (0.75, 256, 350, 0.016, 1e-10, "bilinear", "O0", 3_200_016),
    "mnasnet_1.0": (1.0, 256, 450, 0.016, 1e-10, "bilinear", "O0", 4_421_232),
    "mnasnet_1.3": (1.3, 128, 400, 0.032, 1e-10, "bicubic", "O3", 6_331_072),
    "mnasnet_1.4": (1.4, 256, 400, 0.016, 1e-10, "bilinear", "O0", 7_168_176),
    "mnasnet_0.75_gpu": (0.75, 128, 350, 0.012, 1e-10, "bilinear", "O0", 3_200_016),
    "mnasnet_1.0_gpu": (1.0, 128, 450, 0.012, 1e-10, "bilinear", "O0", 4_421_232),
    "mnasnet_1.4_gpu": (1.4, 64, 400, 0.008, 1e-10, "bilinear", "O0", 7_168_176),
}
STEPS_PER_EPOCH = 100


def rates(recipe: Recipe) -> np.ndarray:
    steps = range(recipe.epochs * STEPS_PER_EPOCH)
    return np.array(
        [
            learning_rate(
                recipe.schedule, step, steps_per_epoch=STEPS_PER_EPOCH, epochs=recipe.epochs
            )
            for step in steps
        ]
    )


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_recipe_of_the_model_zoo_has_its_numbers(name: str) -> None:
    width, batch, epochs, peak, low, interpolation, amp, parameters = ZOO[name]
    recipe = load_recipe(name)
    assert (recipe.batch_size, recipe.global_batch, recipe.epochs) == (batch, 8 * batch, epochs)
    schedule = recipe.schedule
    assert (schedule.learning_rate, schedule.min_learning_rate) == (peak, low)
    assert (schedule.name, schedule.warmup_epochs) == ("cosine", 5)
    assert (recipe.precision.amp_level, recipe.precision.loss_scale) == (amp, 256)
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.epsilon) == ("rmsprop", 0.9, 1e-3)
    assert (optimizer.weight_decay, optimizer.decay_norm_and_bias) == (1e-5, False)
    augment = recipe.augment
    assert (augment.scale, augment.ratio) == ((0.08, 1.0), (0.75, 1.333))
    assert (augment.hflip, augment.crop_pct) == (0.5, 0.875)
    assert augment.interpolation == interpolation
    assert recipe.label_smoothing == 0.1
    assert recipe.network is not None
    network = adapt(published(recipe.network.name), width=width)
    assert (recipe.network.width, recipe.network.resolution) == (width, 224)
    assert count(network).parameters_with_statistics == parameters


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_model_zoo_schedule_is_its_formula_at_every_step(name: str) -> None:
    _, _, epochs, peak, low, *_ = ZOO[name]
    warmup = peak * np.arange(1, 5 * STEPS_PER_EPOCH + 1) / (5 * STEPS_PER_EPOCH)
    done = np.arange((epochs - 5) * STEPS_PER_EPOCH) / ((epochs - 5) * STEPS_PER_EPOCH)
    cosine = low + (peak - low) * (1 + np.cos(math.pi * done)) / 2
    np.testing.assert_allclose(
        rates(load_recipe(name)), np.concatenate([warmup, cosine]), rtol=1e-12
    )


def test_the_papers_recipe_has_its_numbers_and_its_stairs_at_every_step() -> None:
    recipe = load_recipe("mnasnet_a1_paper")
    assert (recipe.global_batch, recipe.ema_decay, recipe.dropout) == (4096, 0.9999, 0.2)
    assert recipe.style == NetworkStyle("same", 1e-3, 0.99)
    assert recipe.data.validation_images == 50_000
    warmup = 0.256 * np.arange(1, 501) / 500
    stairs = 0.256 * 0.97 ** (np.arange((recipe.epochs - 5) * STEPS_PER_EPOCH) // 240)
    np.testing.assert_allclose(rates(recipe), np.concatenate([warmup, stairs]), rtol=1e-12)


# ---------------------------------------------------------------------------- global batch


def recipe_for(global_batch: int | None) -> Recipe:
    values = {
        "data": {"name": "digits"},
        "epochs": 1,
        "batch_size": 32,
        "accumulate": 2,
        "global_batch": global_batch,
        "schedule": {"learning_rate": 0.1, "min_learning_rate": 0.01},
    }
    return build(Recipe, values, where="r.yaml")


def test_the_recipes_own_global_batch_changes_nothing() -> None:
    recipe = recipe_for(256)
    fitted, said = fit_batch(recipe, 4, scale_lr=True)
    assert fitted == recipe
    assert said == "global batch 256 (32 images x 2 accumulated passes x 4 workers)"


def test_another_global_batch_is_warned_of_with_what_scaling_would_make_of_it() -> None:
    recipe = recipe_for(256)
    fitted, said = fit_batch(recipe, 1, scale_lr=False)
    assert fitted == recipe
    assert said.startswith("warning: global batch 64 (32 images x 2 accumulated passes), but")
    assert said.endswith("the learning rate 0.1 is for 256; --scale_lr makes it 0.025")


def test_scaling_is_linear_and_scaled_once() -> None:
    fitted, _ = fit_batch(recipe_for(256), 1, scale_lr=True)
    assert fitted.schedule.learning_rate == pytest.approx(0.025)
    assert fitted.schedule.min_learning_rate == pytest.approx(0.0025)
    assert fit_batch(fitted, 1, scale_lr=True)[0] == fitted


def test_a_recipe_that_names_no_global_batch_cannot_be_scaled() -> None:
    with pytest.raises(ConfigError, match="--scale_lr: needs the recipe's global_batch"):
        fit_batch(recipe_for(None), 2, scale_lr=True)
