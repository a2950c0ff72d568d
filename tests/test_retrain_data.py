"""Data sets: nothing lost, nothing counted twice, nothing shared by splits, clear refusals."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from retrain import data_cache
from retrain.config import AugmentConfig, DataConfig
from retrain.data import (
    DataSet,
    Split,
    _held_out_counts,
    class_names,
    epoch_order,
    eval_batches,
    load_data,
    train_batch,
)
from retrain.data_sources import class_folders, passed_over
from space.errors import ConfigError

DIGITS = DataConfig("digits", validation_fraction=0.2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_digits_are_split_without_a_shared_image_or_a_lost_one() -> None:
    data = load_data(DIGITS, 8, 1)
    parts = (data.train, data.validation, data.test)
    assert sum(len(part) for part in parts) == 1797
    everything = [rows(part) for part in parts]
    # Two pictures among the 1,797 might be equal; then they would have to lie in one split.
    assert not everything[0] & everything[1]
    assert not everything[0] & everything[2]
    assert not everything[1] & everything[2]


def test_every_class_has_its_share_of_the_validation_images() -> None:
    data = load_data(DIGITS, 8, 1)
    held_out = np.bincount(data.validation.labels)
    total = held_out + np.bincount(data.train.labels)
    assert np.abs(held_out / total - 0.2).max() < 0.005


def test_the_test_split_does_not_depend_on_the_seed_of_the_validation_split() -> None:
    one = load_data(DIGITS, 8, 1)
    other = load_data(DataConfig("digits", validation_fraction=0.2, split_seed=1), 8, 1)
    assert np.array_equal(one.test.images, other.test.images)
    assert rows(one.validation) != rows(other.validation)


def test_pixels_span_the_bytes_and_normalise_to_mean_0_and_deviation_1() -> None:
    data = load_data(DIGITS, 16, 3)
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert data.train.images.dtype == np.uint8
    assert load_data(DIGITS, 8, 1).train.images.max() == 255
    normalised = data.normalise(data.train.images)
    assert normalised.dtype == np.float32
    assert np.abs(normalised.mean(axis=(0, 2, 3))).max() < 0.01
    assert np.abs(normalised.std(axis=(0, 2, 3)) - 1).max() < 0.01


def test_fewer_training_images_leave_the_validation_images_as_they_are() -> None:
    few = load_data(DataConfig("digits", validation_fraction=0.2, train_images=100), 8, 1)
    assert len(few.train) == 100
    assert rows(few.validation) == rows(load_data(DIGITS, 8, 1).validation)
    assert rows(few.train) < rows(load_data(DIGITS, 8, 1).train)


def test_a_number_of_validation_images_is_held_out_exactly_and_in_proportion() -> None:
    data = load_data(DataConfig("digits", validation_images=151), 8, 1)
    assert len(data.validation) == 151
    held_out = np.bincount(data.validation.labels)
    total = held_out + np.bincount(data.train.labels)
    assert np.abs(held_out - 151 * total / total.sum()).max() < 1
    again = load_data.__wrapped__(DataConfig("digits", validation_images=151), 8, 1)
    assert np.array_equal(again.validation.images, data.validation.images)


def test_more_validation_images_than_half_of_the_training_set_are_refused() -> None:
    with pytest.raises(ConfigError, match="validation_images: must be at most half of the 1433"):
        load_data(DataConfig("digits", validation_images=800), 8, 1)


def test_more_training_images_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_images: must be at most the 14"):
        load_data(DataConfig("digits", train_images=1700, validation_fraction=0.01), 8, 1)


def test_a_network_with_two_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="input_channels: must be 1 or 3"):
        load_data(DIGITS, 8, 2)


# ---------------------------------------------------------------------------- batches


def small_data(count: int = 10, size: int = 6) -> DataSet:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (count, 1, size, size), dtype=np.uint8)
    split = Split(images, np.arange(count, dtype=np.int32))
    return DataSet(("a", "b"), split, split, split)


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    order = epoch_order(50, seed=3, epoch=2)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, epoch_order(50, seed=3, epoch=2))
    assert not np.array_equal(order, epoch_order(50, seed=3, epoch=3))
    assert not np.array_equal(order, epoch_order(50, seed=4, epoch=2))


def test_evaluation_gives_every_image_once_and_the_last_batch_what_is_left() -> None:
    data = small_data(10)
    batches = list(eval_batches(data, data.test, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert np.concatenate([labels for _, labels in batches]).tolist() == list(range(10))
    assert np.array_equal(
        np.concatenate([images for images, _ in batches]), data.normalise(data.test.images)
    )


def test_without_augmentation_a_batch_is_the_images_themselves() -> None:
    data = small_data()
    images, labels = train_batch(data, np.array([3, 1]), AugmentConfig(), seed=0, step=0)
    assert np.array_equal(images, data.normalise(data.train.images[[3, 1]]))
    assert labels.tolist() == [3, 1]


def test_a_shifted_image_is_the_image_at_one_of_the_offsets_with_a_dark_border() -> None:
    data = small_data()
    shifted, _ = train_batch(data, np.arange(10), AugmentConfig(shift=2), seed=0, step=5)
    padded = np.pad(data.train.images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    offsets = set()
    for index, image in enumerate(shifted):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.allclose(image, data.normalise(padded[index, :, top : top + 6, left : left + 6]))
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 3


def test_flipping_mirrors_about_half_of_the_images_left_to_right() -> None:
    data = small_data(200)
    flipped, _ = train_batch(data, np.arange(200), AugmentConfig(flip=True), seed=0, step=0)
    plain = data.normalise(data.train.images)
    mirrored = (flipped == plain[:, :, :, ::-1]).all(axis=(1, 2, 3))
    kept = (flipped == plain).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all()
    # Binomial(200, 1/2): outside of 60..140 with a probability below 1e-7.
    assert 60 <= mirrored.sum() <= 140


def test_augmentation_depends_on_seed_and_step_alone() -> None:
    data, augment = small_data(), AugmentConfig(shift=2, flip=True)
    first, _ = train_batch(data, np.arange(10), augment, seed=1, step=7)
    again, _ = train_batch(data, np.arange(10), augment, seed=1, step=7)
    other, _ = train_batch(data, np.arange(10), augment, seed=1, step=8)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# ---------------------------------------------------------------------------- fashion_mnist


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}i", *values.shape
    )
    return gzip.compress(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return tmp_path


def test_idx_files_give_their_images_and_labels(fashion: Path) -> None:
    data = load_data(DataConfig("fashion_mnist", path=str(fashion)), 28, 1)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
    assert data.classes[9] == "Ankle boot"
    assert data.test.labels.tolist() == [*range(10), *range(10)]


def test_a_missing_idx_file_is_named_and_the_message_says_where_to_get_it(fashion: Path) -> None:
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1.*dataset-fashion-mnist"):
        load_data(DataConfig("fashion_mnist", path=str(fashion)), 28, 1)


def damaged(content: bytes, kind: str) -> bytes:
    plain = gzip.decompress(content)
    return {
        "cut": content[: len(content) // 2],
        "no gzip": plain,
        "garbled": content[:200] + bytes(200) + content[400:],
        "magic": gzip.compress(b"\x01" + plain[1:]),
        "short": gzip.compress(plain[:-1]),
        "long": gzip.compress(plain + b"x"),
        "empty": b"",
        "header only": gzip.compress(plain[:3]),
        "negative": gzip.compress(plain[:4] + struct.pack(">3i", -1, -28, 28) + plain[16:]),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["cut", "no gzip", "garbled", "magic", "short", "long", "empty", "header only", "negative"],
)
def test_a_damaged_idx_file_is_named(fashion: Path, kind: str) -> None:
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(damaged(file.read_bytes(), kind))
    with pytest.raises(ConfigError, match=r"data.path: .*train-images-idx3-ubyte.gz"):
        load_data(DataConfig("fashion_mnist", path=str(fashion)), 28, 1)


def test_more_labels_than_images_is_refused(fashion: Path) -> None:
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(101) % 10))
    with pytest.raises(ConfigError, match="as many images as labels"):
        load_data(DataConfig("fashion_mnist", path=str(fashion)), 28, 1)


# ---------------------------------------------------------------------------- cifar


def write_cifar(folder: Path, name: str) -> Path:
    """The binary version with 20 training and 10 test images; pixel = 10 * label + plane."""
    label_bytes, classes = (1, 10) if name == "cifar10" else (2, 100)
    target = folder / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
    target.mkdir()

    def rows(count: int) -> bytes:
        planes = bytes(plane for plane in range(3) for _ in range(1024))
        return b"".join(
            bytes([0] * (label_bytes - 1) + [label]) + bytes(10 * label + p for p in planes)
            for label in (index % 10 for index in range(count))
        )

    if name == "cifar10":
        for number in range(1, 6):
            (target / f"data_batch_{number}.bin").write_bytes(rows(10))
        (target / "test_batch.bin").write_bytes(rows(10))
        (target / "batches.meta.txt").write_text(
            "\n".join(f"class{i}" for i in range(10)) + "\n\n"
        )
    else:
        (target / "train.bin").write_bytes(rows(50))
        (target / "test.bin").write_bytes(rows(10))
        (target / "fine_label_names.txt").write_text("\n".join(f"f{i}" for i in range(classes)))
    return target


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_binaries_give_their_images_fine_labels_and_colours(
    tmp_path: Path, name: str, classes: int
) -> None:
    write_cifar(tmp_path, name)
    config = DataConfig(name, path=str(tmp_path))
    data = load_data(config, 32, 3)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 10, 10)
    assert len(data.classes) == classes == len(class_names(config))
    planes = data.test.images[:, :, 5, 5].astype(int)
    assert np.array_equal(planes, 10 * data.test.labels[:, None] + np.arange(3))
    # The folder with the files themselves does as well as the one around it.
    inner = next(tmp_path.glob("cifar*"))
    assert len(load_data(DataConfig(name, path=str(inner)), 16, 1).test) == 10


def test_a_cut_cifar_file_is_named(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, "cifar10") / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"data_batch_3.bin must hold rows of 3073 bytes"):
        load_data(DataConfig("cifar10", path=str(tmp_path)), 32, 3)


def test_a_missing_cifar_file_is_named_with_what_the_folder_must_hold(tmp_path: Path) -> None:
    (write_cifar(tmp_path, "cifar100") / "test.bin").unlink()
    with pytest.raises(ConfigError, match=r"test.bin does not exist; .*train.bin, test.bin, fine"):
        load_data(DataConfig("cifar100", path=str(tmp_path)), 32, 3)


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, "cifar10") / "test_batch.bin"
    file.write_bytes(b"\x0b" + file.read_bytes()[1:])
    with pytest.raises(ConfigError, match=r"test_batch.bin: labels must be below 10, but got 11"):
        load_data(DataConfig("cifar10", path=str(tmp_path)), 32, 3)


# ---------------------------------------------------------------------------- shared arrays


def test_a_data_set_worth_a_file_is_made_once_and_mapped_by_all(
    tmp_path: Path, fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cache, "_MIN_BYTES", 1)
    config = DataConfig("fashion_mnist", path=str(fashion))
    first = load_data.__wrapped__(config, 28, 1)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    again = load_data.__wrapped__(config, 28, 1)
    assert len(made) == 4
    mapped = {Path(area.path) for area in psutil.Process().memory_maps()}
    assert {path for path in made if path.stem.endswith("images")} <= mapped
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert np.array_equal(first.train.images, again.train.images)
    other = load_data.__wrapped__(config, 14, 1)
    assert other.train.images.shape[2:] == (14, 14)


def test_changed_files_are_another_data_set(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cache, "_MIN_BYTES", 1)
    config = DataConfig("fashion_mnist", path=str(fashion))
    load_data.__wrapped__(config, 28, 1)
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(idx(np.zeros((100, 28, 28), np.uint8)))
    assert not load_data.__wrapped__(config, 28, 1).train.images.any()


def test_without_a_place_for_the_file_the_images_stay_in_memory(
    tmp_path: Path, fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(data_cache, "_MIN_BYTES", 1)
    data = load_data.__wrapped__(DataConfig("fashion_mnist", path=str(fashion)), 28, 1)
    assert len(data.train) == 90


# ---------------------------------------------------------------------------- image_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, light and dark, in many formats; 6 training and 2 validation images each."""
    formats = ["L", "RGB", "CMYK", "P", "RGBA", "I;16"]
    for part, count in (("train", 6), ("val", 2)):
        for name, value in (("dark", 30), ("light", 220)):
            target = tmp_path / part / name
            target.mkdir(parents=True)
            for index in range(count):
                image = Image.new("L", (20, 12), value + index)
                mode = formats[index]
                if mode == "I;16":
                    pixels = np.full((12, 20), (value + index) * 256, np.uint16)
                    image = Image.fromarray(pixels)
                ending = "jpg" if mode == "CMYK" else "png"
                if mode not in ("L", "I;16"):
                    image = image.convert("RGB").convert(mode)
                image.save(target / f"{index}.{ending}")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_are_read_with_their_brightness(folder: Path, channels: int) -> None:
    config = DataConfig("image_folder", path=str(folder), validation_fraction=0.2)
    data = load_data(config, 8, channels)
    assert data.classes == ("dark", "light")
    assert data.train.images.shape == (10, channels, 8, 8)
    assert len(data.test) == 4
    brightness = data.train.images.mean(axis=(1, 2, 3))
    # JPEG and CMYK are not exact.
    assert np.abs(brightness[data.train.labels == 0] - 32).max() < 12
    assert np.abs(brightness[data.train.labels == 1] - 222).max() < 12


def test_the_centre_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(2):
                image = Image.new("L", (30, 10), 0)
                image.paste(200, (10, 0, 20, 10))
                image.save(tmp_path / part / name / f"{index}.png")
    data = load_data(DataConfig("image_folder", path=str(tmp_path)), 10, 1)
    assert (data.test.images == 200).all()


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "train" / "light" / "3.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"light/3\.png cannot be read"):
        load_data(DataConfig("image_folder", path=str(folder)), 8, 1)


def test_a_cut_image_is_named(folder: Path) -> None:
    file = folder / "train" / "dark" / "2.jpg"
    file.write_bytes(file.read_bytes()[:-150])
    with pytest.raises(ConfigError, match=r"dark/2\.jpg cannot be read"):
        load_data(DataConfig("image_folder", path=str(folder)), 8, 1)


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"train/empty holds no images"):
        load_data(DataConfig("image_folder", path=str(folder)), 8, 1)


def test_what_file_managers_and_notebooks_leave_is_no_class_and_no_image(folder: Path) -> None:
    train, val = class_folders(folder)
    for part in ("train", "val"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        Image.new("L", (9, 9)).save(folder / part / ".ipynb_checkpoints" / "0-checkpoint.png")
        (folder / part / ".Trash").mkdir()
        (folder / part / "@eaDir").mkdir()
        (folder / part / "dark" / "._0.jpg").write_bytes(b"Mac OS X")
        (folder / part / "dark" / "notes.txt").write_text("n")
    assert class_folders(folder) == (train, val)
    assert passed_over(folder) == [folder / p / "dark" / "notes.txt" for p in ("train", "val")]


def test_images_that_lie_in_no_class_folder_are_told_of(folder: Path) -> None:
    for file in (folder / "val").rglob("*.*"):
        file.rename(folder / "val" / f"{file.parent.name}-{file.name}")
    for name in ("dark", "light"):
        (folder / "val" / name).rmdir()
    with pytest.raises(ConfigError, match=r"but has 0 and \d+ images beside them; move each"):
        class_folders(folder)


def test_a_class_that_only_the_training_folder_has_is_named(folder: Path) -> None:
    for part in ("dark", "light"):
        (folder / "train" / f"more {part}").mkdir()
        Image.new("L", (9, 9)).save(folder / "train" / f"more {part}" / "0.png")
    with pytest.raises(
        ConfigError, match=r"'more dark', which val/ has not \(4 classes in train/"
    ):
        load_data(DataConfig("image_folder", path=str(folder)), 8, 1)


def test_a_class_that_only_the_validation_folder_has_is_named(folder: Path) -> None:
    (folder / "val" / "dark").rename(folder / "val" / "other")
    with pytest.raises(ConfigError, match="has the class 'other'"):
        load_data(DataConfig("image_folder", path=str(folder)), 8, 1)


def test_a_folder_without_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train does not exist"):
        load_data(DataConfig("image_folder", path=str(tmp_path)), 8, 1)


def test_a_number_of_validation_images_leaves_every_class_one() -> None:
    sizes = np.array([1] * 100 + [900])
    counts = _held_out_counts(sizes, DataConfig("digits", validation_images=100))
    assert counts.sum() == 100
    assert (counts[:100] == 0).all()
    with pytest.raises(ConfigError, match="must be at most 4, so that every class keeps an image"):
        _held_out_counts(
            np.array([1, 1, 1, 1, 1, 1, 5]), DataConfig("digits", validation_images=5)
        )


def test_the_normalisation_is_that_of_all_pixels_together() -> None:
    data = load_data(DataConfig("digits"), 8, 1)
    pixels = data.train.views(np.arange(len(data.train))).astype(np.float64) / 255
    assert data.normalisation.mean == (round(float(pixels.mean()), 4),)
    assert data.normalisation.deviation == (round(float(pixels.std()), 4),)
