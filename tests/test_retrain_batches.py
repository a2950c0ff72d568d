"""Batches: decided by seed, epoch and number alone, shared out without overlap, none lost."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from image_folders import make_image_folder
from PIL import Image

from retrain.data import (
    DataSet,
    Split,
    eval_batches,
    load_data,
    train_batch,
    train_batches,
)
from retrain.data_config import AugmentConfig, DataConfig
from space.errors import ConfigError

#: Everything that the model zoo's recipes may ask for.
FULL = AugmentConfig(
    scale=(0.08, 1.0), hflip=0.5, vflip=0.2, crop_pct=0.875, interpolation="bicubic",
    auto_augment="randaug-m9-mstd0.5", re_prob=0.5, re_value="random", mixup=0.2, cutmix=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSet:
    config = DataConfig("image_folder", path=str(folder), validation_images=20)
    return load_data(config, 24, 3, FULL)


def numbered(count: int) -> DataSet:
    """Images that tell which they are: each pixel of the n-th is n."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 1, 4, 4), np.uint8
    )
    split = Split(images, np.arange(count, dtype=np.int32))
    return DataSet(tuple(str(n) for n in range(count)), split, split, split)


def equal(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b)
        for pair in zip(one, other, strict=True)
        for a, b in zip(*pair, strict=True)
    )


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("augment", [FULL, AugmentConfig(shift=2, flip=True), AugmentConfig()])
def test_an_epoch_is_the_same_with_any_number_of_threads_and_from_any_batch_on(
    data: DataSet, augment: AugmentConfig
) -> None:
    whole = list(train_batches(data, augment, batch_size=8, seed=3, epoch=1, workers=3))
    assert len(whole) == 10
    assert equal(
        whole, list(train_batches(data, augment, batch_size=8, seed=3, epoch=1, workers=1))
    )
    rest = train_batches(data, augment, batch_size=8, seed=3, epoch=1, start_batch=7)
    assert equal(whole[7:], list(rest))
    assert not list(train_batches(data, augment, batch_size=8, seed=3, epoch=1, start_batch=10))


def test_another_epoch_or_seed_gives_other_batches(data: DataSet) -> None:
    def first(seed: int, epoch: int) -> np.ndarray:
        return next(train_batches(data, FULL, batch_size=8, seed=seed, epoch=epoch))[0]

    assert not np.array_equal(first(0, 0), first(0, 1))
    assert not np.array_equal(first(0, 0), first(1, 0))


@pytest.mark.parametrize("augment", [FULL, AugmentConfig(shift=2, flip=True)])
def test_processes_batches_one_after_the_other_are_one_processs_batch(
    data: DataSet, augment: AugmentConfig
) -> None:
    whole = list(train_batches(data, augment, batch_size=16, seed=3, epoch=2))
    shares = [
        list(train_batches(data, augment, batch_size=4, seed=3, epoch=2, rank=rank, ranks=4))
        for rank in range(4)
    ]
    joined = [
        tuple(np.concatenate(parts) for parts in zip(*step, strict=True))
        for step in zip(*shares, strict=True)
    ]
    assert equal(whole, joined)


def test_an_epoch_shows_every_image_at_most_once_over_all_processes_and_all_over_time() -> None:
    data = numbered(23)
    shown: set[int] = set()
    for epoch in range(30):
        batches = [
            train_batches(
                data, AugmentConfig(), batch_size=5, seed=0, epoch=epoch, rank=rank, ranks=2
            )
            for rank in (0, 1)
        ]
        labels = [labels.tolist() for images, labels in itertools.chain(*batches)]
        flat = list(itertools.chain(*labels))
        # Two global batches of 10; three images are left over.
        assert [len(batch) for batch in labels] == [5, 5, 5, 5]
        assert len(set(flat)) == 20
        shown |= set(flat)
    # An image is left out of 30 epochs with a probability of (3/23)**30.
    assert shown == set(range(23))


def test_images_and_labels_stay_together_on_the_way_through_the_threads() -> None:
    data = numbered(64)
    config = AugmentConfig(scale=(0.5, 1.0), hflip=0.5)
    for images, labels in train_batches(data, config, batch_size=16, seed=0, epoch=0, workers=4):
        wanted = data.normalise(data.train.views(labels.astype(np.int64)))
        assert np.array_equal(images, wanted)


def test_shifts_and_flips_are_those_of_train_batch() -> None:
    data, augment = numbered(32), AugmentConfig(shift=1, flip=True)
    batches = train_batches(data, augment, batch_size=8, seed=5, epoch=2)
    for number, (images, labels) in enumerate(batches):
        wanted, _ = train_batch(data, labels, augment, seed=5, step=2 * 4 + number)
        assert np.array_equal(images, wanted)


def test_mixed_labels_are_shares_of_two_classes(data: DataSet) -> None:
    for images, labels in train_batches(data, FULL, batch_size=8, seed=0, epoch=0):
        assert images.dtype == labels.dtype == np.float32
        assert labels.shape == (8, 20)
        assert np.allclose(labels.sum(axis=1), 1)
        assert ((labels > 0).sum(axis=1) <= 2).all()


def test_a_batch_that_does_not_fit_the_data_or_mixing_is_refused(data: DataSet) -> None:
    with pytest.raises(
        ConfigError, match="at most the 80 training images / 8 workers, but got 11"
    ):
        next(train_batches(data, FULL, batch_size=11, seed=0, epoch=0, ranks=8))
    with pytest.raises(ConfigError, match="batch_size must be even for mixup and cutmix"):
        next(train_batches(data, FULL, batch_size=5, seed=0, epoch=0))
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), but got 2"):
        next(train_batches(data, FULL, batch_size=8, seed=0, epoch=0, rank=2, ranks=2))


def test_colours_need_a_network_with_three_channels(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"color_jitter and auto_augment need .* 3 channels"):
        load_data(DataConfig("image_folder", path=str(folder)), 24, 1, FULL)


def test_stopping_early_ends_the_threads(data: DataSet) -> None:
    batches = train_batches(data, FULL, batch_size=8, seed=0, epoch=0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


# ---------------------------------------------------------------------------- files


def test_an_unreadable_image_is_named_when_its_batch_is_reached(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path, classes=2, train=6)
    damaged = folder / "train" / "class01" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    config = DataConfig("image_folder", path=str(folder), validation_fraction=0.2)
    recipe = AugmentConfig(scale=(0.5, 1.0), mean=(0.5,) * 3, std=(0.2,) * 3)
    data = load_data(config, 16, 3, recipe)
    batches = train_batches(data, recipe, batch_size=2, seed=0, epoch=0)
    with pytest.raises(ConfigError, match=r"the image .*class01/3.jpg cannot be read: "):
        list(itertools.chain(batches, eval_batches(data, data.validation, 2)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "I;16", "1"])
def test_an_image_of_any_mode_and_of_extreme_shape_is_trained_on_with_its_brightness(
    tmp_path: Path, mode: str
) -> None:
    for part, name in itertools.product(("train", "val"), ("a", "b")):
        (tmp_path / part / name).mkdir(parents=True)
        for index, size in enumerate([(3, 200), (200, 3), (1, 1), (57, 31)]):
            image = Image.new("L", size, 255)
            if mode == "I;16":
                image = Image.fromarray(np.full(size[::-1], 65535, np.uint16))
            elif mode != "L":
                image = image.convert("RGB").convert(mode)
            ending = "jpg" if mode == "CMYK" else "png"
            image.save(tmp_path / part / name / f"{index}.{ending}")
    recipe = AugmentConfig(scale=(0.5, 1.0), crop_pct=0.875, mean=(0.5,) * 3, std=(0.5,) * 3)
    data = load_data(DataConfig("image_folder", path=str(tmp_path)), 16, 3, recipe)
    for images, _ in itertools.chain(
        train_batches(data, recipe, batch_size=3, seed=0, epoch=0),
        eval_batches(data, data.test, 3),
    ):
        # White is 1 after this normalisation; JPEG is not exact.
        assert np.abs(images - 1).max() < 0.02


def test_the_papers_split_holds_50_000_out_of_the_training_set_at_a_scale_of_1_to_20_000(
    folder: Path,
) -> None:
    # ImageNet has 1,281,167 training images: 3.9 % are held out; here 4 of 100, one a class.
    config = DataConfig("image_folder", path=str(folder), validation_images=4)
    loaded = [load_data.__wrapped__(config, 24, 3, FULL) for _ in range(2)]
    assert [len(loaded[0].train), len(loaded[0].validation), len(loaded[0].test)] == [96, 4, 40]
    held_out = [data.validation.images for data in loaded]
    assert np.array_equal(*held_out)
    assert len(set(loaded[0].validation.labels.tolist())) == 4
    kept = {image.tobytes() for image in loaded[0].train.images}
    assert not kept & {image.tobytes() for image in held_out[0]}


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 50])
def test_shares_of_an_evaluation_hold_every_image_exactly_once(data: DataSet, ranks: int) -> None:
    whole = list(eval_batches(data, data.test, 16))
    assert [len(labels) for _, labels in whole] == [16, 16, 8]
    shared = [
        batch
        for rank in range(ranks)
        for batch in eval_batches(data, data.test.shard(rank, ranks), 16)
    ]
    wanted = [np.concatenate(parts) for parts in zip(*whole, strict=True)]
    found = [np.concatenate(parts) for parts in zip(*shared, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_decoding_late_and_decoding_at_once_give_the_same_evaluation(folder: Path) -> None:
    config = DataConfig("image_folder", path=str(folder))
    late, early = (
        load_data(config, 24, 3, AugmentConfig(scale=scale, crop_pct=0.8))
        for scale in ((0.5, 1.0), None)
    )
    assert np.array_equal(late.test.images, early.test.images)
    assert late.normalisation == early.normalisation
