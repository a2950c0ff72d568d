"""Augmentation: closed forms, strict settings, and what MindSpore's own transforms would give."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from image_folders import make_image_folder
from mindspore.dataset import vision

from retrain.augment import (
    Mix,
    change_colours,
    crop_box,
    draw_mix,
    erase,
    evaluation_view,
    mix_images,
    mix_labels,
)
from retrain.config import Recipe
from retrain.data_config import AugmentConfig
from retrain.data_images import EncodedImage, decode
from space.errors import ConfigError
from space.records import build, parse_yaml


def image(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_pillows_pixels_of_a_jpeg_file_are_those_of_mindspores_decode(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path, classes=2, train=2, val=1)
    for path in sorted(folder.rglob("?.jpg")):
        wanted = vision.Decode()(np.fromfile(path, np.uint8))
        assert np.array_equal(decode(EncodedImage(str(path), None), 3), wanted)


def test_evaluation_is_the_resize_and_centre_crop_of_mindspores_model_zoo() -> None:
    pixels = image(300, 401)
    wanted = vision.CenterCrop(224)(vision.Resize(256, vision.Inter.BICUBIC)(pixels))
    config = AugmentConfig(crop_pct=0.875, interpolation="bicubic")
    assert np.array_equal(evaluation_view(pixels, 224, config), wanted)


@pytest.mark.parametrize("shape", [(40, 400), (400, 40), (1, 1), (33, 65)])
def test_a_random_crop_lies_in_the_image_and_has_the_area_and_ratio_asked_for(
    shape: tuple[int, int],
) -> None:
    rng = np.random.default_rng(0)
    config = AugmentConfig(scale=(0.2, 0.6), ratio=(0.8, 1.25))
    for _ in range(200):
        top, left, height, width = crop_box(*shape, config, rng)
        assert 0 <= top <= top + height <= shape[0]
        assert 0 <= left <= left + width <= shape[1]
        # Sides are whole numbers of pixels.
        assert width - 1 <= 1.25 * (height + 1)
        assert height - 1 <= 1.25 * (width + 1)


def test_random_crops_areas_are_uniform_over_the_scale() -> None:
    rng = np.random.default_rng(0)
    config = AugmentConfig(scale=(0.08, 0.5), ratio=(0.75, 1.333))
    boxes = [crop_box(1000, 1000, config, rng) for _ in range(2000)]
    areas = np.array([height * width / 1e6 for _, _, height, width in boxes])
    assert 0.079 < areas.min() < 0.085
    assert 0.495 < areas.max() < 0.501
    # Uniform: 0.29 on average, 5 standard errors are 0.0136 (a false alarm in 2 million).
    assert abs(areas.mean() - 0.29) < 0.0136


def test_color_jitter_stays_within_its_factors_and_zero_leaves_the_image_alone() -> None:
    gray = np.full((4, 4, 3), 100, np.uint8)
    config = AugmentConfig(color_jitter=(0.4, 0.0, 0.0))
    rng = np.random.default_rng(0)
    values = [int(change_colours(gray, config, rng)[0, 0, 0]) for _ in range(100)]
    assert 59 <= min(values) < 70
    assert 130 < max(values) <= 140
    unchanged = change_colours(gray, AugmentConfig(color_jitter=0.0), rng)
    assert np.array_equal(unchanged, gray)


def test_hue_alone_keeps_gray_gray() -> None:
    gray = np.full((4, 4, 3), 100, np.uint8)
    config = AugmentConfig(color_jitter=(0.0, 0.0, 0.0, 0.5))
    assert np.array_equal(change_colours(gray, config, np.random.default_rng(0)), gray)


@pytest.mark.parametrize(
    "policy", ["autoaug", "randaug", "randaug-m9-n2-mstd0.5", "randaug-m10-n3", "trivialaugwide"]
)
def test_a_policy_changes_images_in_many_ways_and_repeats_itself_from_a_seed(policy: str) -> None:
    pixels, config = image(32, 32), AugmentConfig(auto_augment=policy)
    drawn = [change_colours(pixels, config, np.random.default_rng(seed)) for seed in range(60)]
    again = [change_colours(pixels, config, np.random.default_rng(seed)) for seed in range(60)]
    assert all(one.shape == (32, 32, 3) and one.dtype == np.uint8 for one in drawn)
    assert np.array_equal(drawn, again)
    assert len({one.tobytes() for one in drawn}) > 15


def test_randaug_with_magnitude_0_changes_nothing_that_has_a_magnitude() -> None:
    # A smooth image whose values end below 255: the others are AutoContrast and Equalize.
    pixels = np.full((16, 16, 3), 90, np.uint8)
    config = AugmentConfig(auto_augment="randaug-m0-n4")
    for seed in range(40):
        assert np.array_equal(change_colours(pixels, config, np.random.default_rng(seed)), pixels)


def test_erasing_takes_a_rectangle_of_the_area_asked_for_in_its_share_of_images() -> None:
    config = AugmentConfig(re_prob=0.5, re_scale=(0.1, 0.2))
    shares = []
    for seed in range(400):
        pixels = np.ones((3, 64, 64), np.float32)
        erase(pixels, config, np.random.default_rng(seed))
        assert (pixels[0] == pixels[2]).all()
        shares.append(float((pixels[0] == 0).mean()))
    erased = [share for share in shares if share > 0]
    # Binomial(400, 1/2): outside of 140..260 with a probability below 1e-8.
    assert 140 <= len(erased) <= 260
    assert 0.08 < min(erased)
    assert max(erased) < 0.22


def test_erasing_with_noise_leaves_no_zeros() -> None:
    pixels = np.full((3, 32, 32), 100, np.float32)
    erase(pixels, AugmentConfig(re_prob=1.0, re_value="random"), np.random.default_rng(0))
    changed = pixels != 100
    assert 0.01 < changed.mean() < 0.4
    assert np.abs(pixels[changed]).max() < 6


def test_mixup_is_the_weighted_mean_of_neighbours_in_images_and_labels() -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 3, 5, 5)).astype(np.float32)
    mixed = images.copy()
    mix_images(mixed, Mix(0.7, None))
    wanted = 0.7 * images + 0.3 * images[[1, 0, 3, 2]]
    assert np.allclose(mixed, wanted, atol=1e-6)
    labels = mix_labels(np.array([0, 2, 1, 1], np.int32), 3, Mix(0.7, None))
    assert np.allclose(labels, [[0.7, 0, 0.3], [0.3, 0, 0.7], [0, 1, 0], [0, 1, 0]])


def test_cutmix_takes_a_box_from_the_neighbour_and_weighs_labels_by_its_area() -> None:
    images = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones(
        (4, 1, 8, 8), np.float32
    )
    rng = np.random.default_rng(3)
    mix = next(
        mix for mix in (draw_mix(AugmentConfig(cutmix=1.0), 8, rng) for _ in range(99)) if mix.box
    )
    mix_images(images, mix)
    assert np.isclose((images[0] == 0).mean(), mix.own)
    assert np.isclose((images[3] == 2).mean(), 1 - mix.own)


def test_with_both_alphas_half_of_the_batches_are_cut_and_cutmix_prob_leaves_some_alone() -> None:
    config = AugmentConfig(mixup=0.2, cutmix=1.0, cutmix_prob=0.5)
    drawn = [draw_mix(config, 32, np.random.default_rng(seed)) for seed in range(400)]
    mixed = [mix for mix in drawn if mix is not None]
    cut = [mix for mix in mixed if mix.box is not None]
    # Binomial: outside of these with a probability below 1e-6.
    assert 150 <= len(mixed) <= 250
    assert 0.3 < len(cut) / len(mixed) < 0.7
    assert all(0 <= mix.own <= 1 for mix in mixed)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"hflip": 1.5}, r"augment.hflip must be in \[0, 1\], but got 1.5"),
        ({"hflips": 0.5}, r"unknown key 'augment.hflips'; did you mean 'hflip'\?"),
        ({"flip": True, "hflip": 0.5}, "augment.hflip must be left out where flip is true"),
        ({"scale": [0.9, 0.1]}, "augment.scale must be two rising numbers"),
        ({"interpolation": "cubic"}, "augment.interpolation must be one of nearest, bilinear"),
        ({"color_jitter": [0.4, 0.4]}, "augment.color_jitter must be one, three or four numbers"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.6]}, "at most 0.5"),
        ({"auto_augment": "randaug-x3"}, "augment.auto_augment must be autoaug, trivialaugwide"),
        (
            {"auto_augment": "autoaug", "color_jitter": 0.4},
            "augment.color_jitter must be left out",
        ),
        ({"mean": [0.5, 0.5, 0.5]}, "augment.std must be given where mean is"),
        ({"mean": [0.5, 0.5], "std": [0.2]}, "std must have as many numbers as mean, 2, but got"),
        ({"mean": [0.5], "std": [0.0]}, "std must be in"),
        ({"re_value": 3}, "augment.re_value"),
    ],
)
def test_a_setting_out_of_order_is_refused_in_one_sentence(
    augment: dict[str, object], message: str
) -> None:
    values = {"data": {"name": "digits"}, "epochs": 1, "augment": augment}
    with pytest.raises(ConfigError, match=message):
        build(Recipe, values, where="r.yaml")


def test_the_pages_recipe_and_its_lines_of_python_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    data, augment = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    values = {**parse_yaml(data, where="page"), **parse_yaml(augment, where="page")}
    recipe = build(Recipe, {"epochs": 1, **values}, where="page")
    assert recipe.augment.scale == (0.08, 1.0)
    assert recipe.data.validation_images == 50_000
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(lines, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(64, 3, 16, 16) (64,)"
    assert printed[-1] == "182"


def test_one_number_of_color_jitter_is_three() -> None:
    assert build(AugmentConfig, {"color_jitter": 0.4}, where="").jitter == (0.4, 0.4, 0.4)
    assert build(AugmentConfig, {"color_jitter": [0.4, 0.3, 0.2, 0.1]}, where="").jitter[3] == 0.1
