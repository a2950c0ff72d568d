"""Data sets as arrays in memory: loaded, resized once, split, and handed out in batches.

Small images fit in memory and are cheaper to slice there than to push through a pipeline of
threads: a batch of 64 digits takes 0.8 ms of CPU with its shifts, and 4.8 ms without any through
MindSpore's NumpySlicesDataset with one worker. The validation images are taken from the training
set; the test set stands apart.
"""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrain.config import AugmentConfig, DataConfig
from space.errors import ConfigError
from space.records import record

if TYPE_CHECKING:
    from PIL import Image

#: The arrays of one data set may take so much memory.
MAX_ARRAY_BYTES = 8 * 2**30

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
#: Of the digits, every fifth image of each class is a test image.
_DIGITS_TEST_EVERY = 5


class Split:
    """Images and labels of one part of a data set.

    Attributes:
        images: uint8, (n, channels, size, size).
        labels: int32, (n,).
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int32]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


@record
class Normalisation:
    """Pixels in [0, 255] -> (pixel / 255 - mean) / deviation, one number each per channel."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.deviation):
            raise ValueError(
                f"deviation must have as many numbers as mean ({len(self.mean)}), but got"
                f" {len(self.deviation)}"
            )
        if not all(value > 0 for value in self.deviation):
            raise ValueError(f"deviation must be > 0, but got {self.deviation}")


class DataSet:
    """A data set, resized for a network.

    Attributes:
        classes: Names in the order of the labels.
        train: What is trained on.
        validation: Held out from the training set; chooses.
        test: Used once, at the end.
        normalisation: Measured on the training images, at most 2,000 of them, evenly spaced.
    """

    def __init__(
        self, classes: tuple[str, ...], train: Split, validation: Split, test: Split
    ) -> None:
        self.classes = classes
        self.train = train
        self.validation = validation
        self.test = test
        # Evenly spaced: a folder's images come sorted by class.
        sample = train.images[:: max(1, len(train) // 2000)]
        pixels = sample.astype(np.float64) / 255
        self.normalisation = Normalisation(
            tuple(round(float(mean), 4) for mean in pixels.mean(axis=(0, 2, 3))),
            tuple(max(0.001, round(float(std), 4)) for std in pixels.std(axis=(0, 2, 3))),
        )

    def split(self, name: str) -> Split:
        """Return `train`, `validation` or `test`.

        Raises:
            ConfigError: Another name.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if name not in splits:
            raise ConfigError(f"split must be one of {', '.join(splits)}, but got {name!r}.")
        return splits[name]

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 images of the same shape, normalised."""
        mean = np.array(self.normalisation.mean)[:, None, None]
        deviation = np.array(self.normalisation.deviation)[:, None, None]
        scale = (1 / (255 * deviation)).astype(np.float32)
        offset = (mean / deviation).astype(np.float32)
        normalised: NDArray[np.float32] = images.astype(np.float32) * scale - offset
        return normalised


@functools.lru_cache(maxsize=2)
def load_data(config: DataConfig, resolution: int, channels: int) -> DataSet:
    """Return a data set at a network's resolution and number of channels; loaded once a process.

    Raises:
        ConfigError: The folder lacks files, a file is damaged, the images take too much memory, or
            there are too few of them for what is asked.
    """
    if channels not in (1, 3):
        raise ConfigError(
            f"input_channels: must be 1 or 3 for images, but the network has {channels}."
        )
    loaders = {"digits": _digits, "fashion_mnist": _fashion_mnist, "image_folder": _image_folder}
    classes, train, test = loaders[config.name](config.path or "", resolution, channels)
    kept, held_out = _stratified(train.labels, config.validation_fraction, config.split_seed)
    if not len(held_out):
        raise ConfigError(
            f"data.validation_fraction: {config.validation_fraction} of {len(train)} training"
            " images leaves none to validate on; every class needs two at least."
        )
    if config.train_images is not None:
        if config.train_images > len(kept):
            raise ConfigError(
                f"data.train_images: must be at most the {len(kept)} training images that are not"
                f" held out, but got {config.train_images}."
            )
        rng = np.random.default_rng([config.split_seed, 1])
        kept = np.sort(rng.permutation(kept)[: config.train_images])
    return DataSet(
        classes,
        Split(train.images[kept], train.labels[kept]),
        Split(train.images[held_out], train.labels[held_out]),
        test,
    )


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Return a data set's classes without decoding its images: a check before anything is begun.

    Raises:
        ConfigError: The folder lacks files, or one is damaged as far as a quick look shows.
    """
    folder = Path(config.path or "")
    if config.name == "digits":
        return tuple(str(digit) for digit in range(10))
    if config.name == "fashion_mnist":
        for file in _IDX_FILES.values():
            _read_idx(folder / file)
        return _FASHION_CLASSES
    _class_folders(folder / "val")
    return tuple(sorted(_class_folders(folder / "train")))


def _stratified(
    labels: NDArray[np.int32], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices that are kept and that are held out, the same share of each class, at least one."""
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held_out.append(rng.permutation(members)[:count])
    chosen = np.sort(np.concatenate(held_out))
    mask = np.ones(len(labels), bool)
    mask[chosen] = False
    return np.flatnonzero(mask), chosen


# ---------------------------------------------------------------------------- batches


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch's images: it depends on seed and epoch alone."""
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def train_batch(
    data: DataSet, indices: NDArray[np.int64], augment: AugmentConfig, *, seed: int, step: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return normalised, augmented images (n, channels, size, size) and labels (n,).

    The random changes depend on seed and step alone.
    """
    images = data.train.images[indices]
    if augment.shift or augment.flip:
        images = _augmented(images, augment, np.random.default_rng([seed, 2, step]))
    return data.normalise(images), data.train.labels[indices]


def _augmented(
    images: NDArray[np.uint8], augment: AugmentConfig, rng: np.random.Generator
) -> NDArray[np.uint8]:
    n, _, height, width = images.shape
    result = images
    if augment.shift:
        s = augment.shift
        padded = np.pad(images, ((0, 0), (0, 0), (s, s), (s, s)))
        result = np.empty_like(images)
        offsets = rng.integers(0, 2 * s + 1, (n, 2))
        for i, (top, left) in enumerate(offsets):
            result[i] = padded[i, :, top : top + height, left : left + width]
    if augment.flip:
        flipped = rng.random(n) < 0.5
        result = result.copy() if result is images else result
        result[flipped] = result[flipped, :, :, ::-1]
    return result


def eval_batches(
    data: DataSet, split: Split, batch_size: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Yield every image once, normalised, in order; the last batch may be smaller."""
    for start in range(0, len(split), batch_size):
        stop = start + batch_size
        yield data.normalise(split.images[start:stop]), split.labels[start:stop]


# ---------------------------------------------------------------------------- sources


Loaded = tuple[tuple[str, ...], Split, Split]


def _digits(path: str, resolution: int, channels: int) -> Loaded:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::_DIGITS_TEST_EVERY]] = True
    resized = _resized(pixels, resolution, channels)
    names = tuple(str(digit) for digit in range(10))
    return names, Split(resized[~test], labels[~test]), Split(resized[test], labels[test])


def _fashion_mnist(path: str, resolution: int, channels: int) -> Loaded:
    folder = Path(path)
    arrays = {name: _read_idx(folder / file) for name, file in _IDX_FILES.items()}
    splits = []
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int32)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            raise ConfigError(
                f"{folder}: the {part} files must hold as many images as labels, but have the"
                f" shapes {images.shape} and {labels.shape}."
            )
        if labels.max() >= len(_FASHION_CLASSES):
            raise ConfigError(f"{folder}: labels must be below 10, but got {labels.max()}.")
        splits.append(Split(_resized(images, resolution, channels), labels))
    return _FASHION_CLASSES, splits[0], splits[1]


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped idx file of unsigned bytes."""
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise ConfigError(
            f"data.path: {path} does not exist; the folder must hold"
            f" {', '.join(_IDX_FILES.values())} (Debian's package dataset-fashion-mnist puts"
            " them into /usr/share/datasets/fashion-mnist)."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.path: {path} is damaged or no gzip file: {error}.") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ConfigError(f"data.path: {path} is not an idx file of unsigned bytes.")
    shape = tuple(np.frombuffer(raw, ">i4", raw[3], 4).tolist())
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if min(shape, default=0) < 1 or math.prod(shape) != len(values):
        raise ConfigError(
            f"data.path: {path} must hold {shape} values, but has {len(values)}: it is cut short."
        )
    return values.reshape(shape)


def _image_folder(path: str, resolution: int, channels: int) -> Loaded:
    folder = Path(path)
    train = _class_folders(folder / "train")
    test = _class_folders(folder / "val")
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise ConfigError(
            f"data.path: {folder / 'val'} has the class {unknown[0]!r}, which train/ has not."
        )
    names = tuple(sorted(train))
    return (
        names,
        _read_class_folders(train, names, resolution, channels),
        _read_class_folders(test, names, resolution, channels),
    )


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise ConfigError(f"data.path: {folder} does not exist; it must hold a folder per class.")
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            files = sorted(f for f in entry.iterdir() if f.suffix.lower() in _IMAGE_ENDINGS)
            if not files:
                raise ConfigError(f"data.path: the class folder {entry} holds no images.")
            classes[entry.name] = files
    if len(classes) < 2:
        raise ConfigError(
            f"data.path: {folder} must hold at least two class folders, but has {len(classes)}."
        )
    return classes


def _read_class_folders(
    classes: dict[str, list[Path]], names: tuple[str, ...], resolution: int, channels: int
) -> Split:
    files = [(file, names.index(name)) for name in sorted(classes) for file in classes[name]]
    size = len(files) * channels * resolution**2
    if size > MAX_ARRAY_BYTES:
        raise ConfigError(
            f"data.path: {len(files):,} images at {resolution} pixels take {size / 2**30:.1f} GiB,"
            f" but at most {MAX_ARRAY_BYTES / 2**30:.0f} are held in memory; use fewer images or a"
            " lower resolution."
        )
    images = np.empty((len(files), channels, resolution, resolution), np.uint8)
    for index, (file, _) in enumerate(files):
        images[index] = _read_image(file, resolution, channels)
    return Split(images, np.array([label for _, label in files], np.int32))


def _read_image(path: Path, resolution: int, channels: int) -> NDArray[np.uint8]:
    """(channels, resolution, resolution): the shorter side is scaled, the centre cut out."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = _plain(opened).convert("L" if channels == 1 else "RGB")
    except (
        OSError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        SyntaxError,
        ValueError,
    ) as error:
        raise ConfigError(f"data.path: the image {path} cannot be read: {error}.") from None
    scale = resolution / min(image.size)
    size = (
        max(resolution, round(image.width * scale)),
        max(resolution, round(image.height * scale)),
    )
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    cropped = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    return _with_channels(cropped[None] if channels == 1 else cropped.transpose(2, 0, 1), channels)


def _plain(image: Image.Image) -> Image.Image:
    """An image whose conversion to gray or RGB loses nothing: 8 bits, no palette."""
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits per pixel; conversion would clip at 255.
        pixels = np.asarray(image.convert("I")) >> 8
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" else image


def _resized(pixels: NDArray[np.uint8], resolution: int, channels: int) -> NDArray[np.uint8]:
    """Gray (n, height, width) -> (n, channels, resolution, resolution), bilinear."""
    from PIL import Image

    if pixels.shape[1:] != (resolution, resolution):
        size = (resolution, resolution)
        pixels = np.stack(
            [
                np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
                for image in pixels
            ]
        )
    return _with_channels(pixels[:, None], channels, axis=1)


def _with_channels(
    images: NDArray[np.uint8], channels: int, *, axis: int = 0
) -> NDArray[np.uint8]:
    """Repeat a gray image's channel where a network wants several."""
    if images.shape[axis] == channels:
        return np.ascontiguousarray(images)
    return np.ascontiguousarray(np.repeat(images[:, :1] if axis else images[:1], channels, axis))
