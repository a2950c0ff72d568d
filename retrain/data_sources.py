"""The data sets, each from its own kind of files: classes, training images and test images."""

from __future__ import annotations

import functools
import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrain.data_cache import Arrays, mapped_arrays
from retrain.data_config import AugmentConfig, DataConfig
from retrain.data_images import (
    EncodedImage,
    EncodedImages,
    Pixels,
    Rows,
    Split,
    available_cores,
    decode,
)
from retrain.mindrecord import load_manifest, record_stream
from space.errors import ConfigError

#: The arrays of one data set may take so much memory; image files beyond that are decoded late.
MAX_ARRAY_BYTES = 2 * 2**30

#: Classes, training images, test images.
Loaded = tuple[tuple[str, ...], Split, Split]

_DIGITS = tuple(str(digit) for digit in range(10))
#: Of the digits, every fifth image of each class is a test image.
_DIGITS_TEST_EVERY = 5
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
#: Name -> folder in the archive, training files, test file, names' file, bytes of labels before
#: each image; the last of them counts.
_CIFAR = {
    "cifar10": (
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "cifar100": ("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
}
IMAGE_ENDINGS = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)

#: Folders beside the classes' that hold copies.
_LEFTOVERS = frozenset({".ipynb_checkpoints", "@eaDir"})


def load_source(
    config: DataConfig, resolution: int, channels: int, augment: AugmentConfig
) -> Loaded:
    """Return a data set's classes, training and test images at a resolution.

    Raises:
        ConfigError: The folder lacks files, or one is damaged.
    """
    folder = Path(config.path or "")
    if config.name == "digits":
        return _digits(resolution, channels)
    if config.name == "image_folder":
        return _image_folder(folder, resolution, channels, augment)
    if config.name == "mindrecord":
        return _mindrecord(folder, resolution, channels, augment)
    if config.name == "fashion_mnist":
        classes: tuple[str, ...] = _FASHION_CLASSES
        sources = [folder / file for file in _IDX_FILES.values()]
        read: Callable[[], Arrays] = functools.partial(_fashion_mnist, folder)
    else:
        classes = _cifar_classes(config.name, folder)
        sources = _cifar_files(config.name, folder)
        read = functools.partial(_cifar, config.name, sources, len(classes))
    for path in sources:
        _require_file(path, config.name)
    settings = {"name": config.name, "resolution": resolution, "channels": channels}
    arrays = mapped_arrays(settings, sources, lambda: _all_resized(read(), resolution, channels))
    return classes, *_splits(arrays)


def source_classes(config: DataConfig) -> tuple[str, ...]:
    """Return a data set's classes without decoding its images.

    Raises:
        ConfigError: The folder lacks files, or one is damaged as far as a quick look shows.
    """
    folder = Path(config.path or "")
    if config.name == "digits":
        return _DIGITS
    if config.name == "fashion_mnist":
        for file in _IDX_FILES.values():
            _read_idx(folder / file)
        return _FASHION_CLASSES
    if config.name == "image_folder":
        return tuple(sorted(class_folders(folder)[0]))
    if config.name == "mindrecord":
        return load_manifest(folder).classes
    for path in _cifar_files(config.name, folder):
        _require_file(path, config.name)
    return _cifar_classes(config.name, folder)


# ---------------------------------------------------------------------------- small images


def _digits(resolution: int, channels: int) -> Loaded:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::_DIGITS_TEST_EVERY]] = True
    resized = _resized(pixels, resolution, channels)
    return _DIGITS, Split(resized[~test], labels[~test]), Split(resized[test], labels[test])


def _all_resized(arrays: Arrays, resolution: int, channels: int) -> Arrays:
    return {
        name: _resized(values, resolution, channels) if name.endswith("_images") else values
        for name, values in arrays.items()
    }


def _splits(arrays: Arrays) -> tuple[Split, Split]:
    train, test = (
        Split(arrays[f"{part}_images"], np.array(arrays[f"{part}_labels"]))
        for part in ("train", "test")
    )
    return train, test


def _resized(pixels: Pixels, resolution: int, channels: int) -> Pixels:
    """(n, height, width) or (n, height, width, 3) -> (n, channels, resolution, resolution)."""
    from PIL import Image

    shape = (len(pixels), channels, resolution, resolution)
    resized = np.empty(shape, np.uint8)
    for index, values in enumerate(pixels):
        image = Image.fromarray(values)
        if channels == 1:
            image = image.convert("L")
        if image.size != shape[2:]:
            image = image.resize(shape[2:], Image.Resampling.BILINEAR)
        # A gray image fills all channels.
        array = np.asarray(image)
        resized[index] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return resized


def _require_file(path: Path, name: str) -> None:
    if path.is_file():
        return
    if name == "fashion_mnist":
        needed = (
            f"{', '.join(_IDX_FILES.values())} (Debian's package dataset-fashion-mnist puts them"
            " into /usr/share/datasets/fashion-mnist)"
        )
    else:
        _, train, test, names, _ = _CIFAR[name]
        needed = f"{', '.join((*train, test, names))} of the binary version"
    raise ConfigError(f"data.path: {path} does not exist; the folder must hold {needed}.")


def _fashion_mnist(folder: Path) -> Arrays:
    arrays: Arrays = {name: _read_idx(folder / file) for name, file in _IDX_FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int32)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            raise ConfigError(
                f"{folder}: the {part} files must hold as many images as labels, but have the"
                f" shapes {images.shape} and {labels.shape}."
            )
        _require_labels(folder, labels, len(_FASHION_CLASSES))
        arrays[f"{part}_labels"] = labels
    return arrays


def _require_labels(where: Path, labels: NDArray[np.int32], classes: int) -> None:
    if labels.max() >= classes:
        raise ConfigError(f"{where}: labels must be below {classes}, but got {labels.max()}.")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped idx file of unsigned bytes."""
    _require_file(path, "fashion_mnist")
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
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


def _cifar_files(name: str, folder: Path) -> list[Path]:
    """The files of images, training's first; the folder may be the one that the archive is in."""
    inner, train, test, _, _ = _CIFAR[name]
    folder = folder / inner if (folder / inner).is_dir() else folder
    return [folder / file for file in (*train, test)]


def _cifar_classes(name: str, folder: Path) -> tuple[str, ...]:
    path = _cifar_files(name, folder)[0].with_name(_CIFAR[name][3])
    _require_file(path, name)
    names = tuple(path.read_text(encoding="ascii", errors="replace").split())
    expected = int(name.removeprefix("cifar"))
    if len(names) != expected:
        raise ConfigError(f"data.path: {path} must name {expected} classes, but has {len(names)}.")
    return names


def _cifar(name: str, files: list[Path], classes: int) -> Arrays:
    """Rows of label bytes and 3 x 32 x 32 pixels, the planes red, green and blue."""
    label_bytes = _CIFAR[name][4]
    rows = []
    for path in files:
        values = np.fromfile(path, np.uint8)
        if not len(values) or len(values) % (label_bytes + 3072):
            raise ConfigError(
                f"data.path: {path} must hold rows of {label_bytes + 3072} bytes, but has"
                f" {len(values)}: it is cut short, or another file."
            )
        rows.append(values.reshape(-1, label_bytes + 3072))
        _require_labels(path, rows[-1][:, label_bytes - 1].astype(np.int32), classes)
    arrays: Arrays = {}
    for part, values in (("train", np.concatenate(rows[:-1])), ("test", rows[-1])):
        planes = values[:, label_bytes:].reshape(-1, 3, 32, 32)
        arrays[f"{part}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{part}_labels"] = values[:, label_bytes - 1].astype(np.int32)
    return arrays


# ---------------------------------------------------------------------------- image files


def _image_folder(folder: Path, resolution: int, channels: int, augment: AugmentConfig) -> Loaded:
    train, test = class_folders(folder)
    names = tuple(sorted(train))
    files, splits = [], []
    for classes in (train, test):
        part = [file for name in names for file in classes[name]]
        counts = [len(classes[name]) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        encoded = EncodedImages(
            len(part),
            functools.partial(_file_stream, _Names(part)),
            size=resolution,
            channels=channels,
            augment=augment,
        )
        files += part
        splits.append(Split(encoded, labels))
    if augment.scale is None and len(files) * channels * resolution**2 <= MAX_ARRAY_BYTES:
        settings = {
            "resolution": resolution, "channels": channels, "crop_pct": augment.crop_pct,
            "interpolation": augment.interpolation, "classes": names,
        }  # fmt: skip
        arrays = mapped_arrays(settings, files, lambda: _decoded(*splits))
        return names, *_splits(arrays)
    return names, splits[0], splits[1]


class _Names:
    """File names as one array: 1.3 million of them take 70 MB, and as Path objects 400 MB."""

    def __init__(self, files: list[Path]) -> None:
        self._names = np.array([os.fsencode(file) for file in files])

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self._names[row])


def _file_stream(names: _Names, rows: Rows) -> Iterator[EncodedImage]:
    for row in rows:
        yield EncodedImage(names[row], None)


def _decoded(train: Split, test: Split) -> Arrays:
    return {
        "train_images": train.images, "train_labels": train.labels,
        "test_images": test.images, "test_labels": test.labels,
    }  # fmt: skip


def class_folders(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return class -> image files, sorted, of train/ and val/, which have the same classes.

    Raises:
        ConfigError: A folder is missing, a class has no images, or only one of them has it.
    """
    train, test = _classes_in(folder / "train"), _classes_in(folder / "val")
    for there, lacking, classes in (
        ("val", "train", set(test) - set(train)),
        ("train", "val", set(train) - set(test)),
    ):
        if classes:
            raise ConfigError(
                f"data.path: {folder / there} has the class {min(classes)!r}, which {lacking}/ has"
                f" not ({len(train)} classes in train/, {len(test)} in val/)."
            )
    return train, test


def unreadable(files: list[Path], on_progress: Callable[[int], None]) -> list[str]:
    """Return a message for each image file that cannot be decoded; tells how many are done."""
    messages = []
    with ThreadPoolExecutor(available_cores()) as pool:
        # In parts: each waiting call takes memory.
        for start in range(0, len(files), 1024):
            found = pool.map(_complaint, files[start : start + 1024])
            messages += [message for message in found if message]
            on_progress(min(start + 1024, len(files)))
    return messages


def _complaint(file: Path) -> str:
    try:
        decode(EncodedImage(str(file), None), 3)
    except ConfigError as error:
        return str(error).removeprefix("data.path: ")
    return ""


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise ConfigError(f"data.path: {folder} does not exist; it must hold a folder per class.")
    classes, loose = {}, 0
    for entry in _visible(folder):
        if entry.is_dir():
            files = [file for file in _visible(entry) if _is_image(file)]
            if not files and entry.name.startswith("."):
                continue
            if not files:
                raise ConfigError(
                    f"data.path: the class folder {entry} holds no images; they must lie in it"
                    f" directly and end in {', '.join(sorted(IMAGE_ENDINGS))}."
                )
            classes[entry.name] = files
        else:
            loose += _is_image(entry)
    if len(classes) < 2:
        found = f"{len(classes)}" + (f" and {loose:,} images beside them" if loose else "")
        raise ConfigError(
            f"data.path: {folder} must hold at least two class folders, but has {found}; move each"
            " image into the folder of its class."
        )
    return classes


def passed_over(folder: Path) -> list[Path]:
    """Return the files in class folders of train/ and val/ that are not taken for images."""
    return [
        file
        for part in ("train", "val")
        for entry in _visible(folder / part)
        if entry.is_dir()
        for file in _visible(entry)
        if not _is_image(file)
    ]


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but for what file managers and notebooks leave there."""
    entries = folder.iterdir()
    return sorted(e for e in entries if e.name not in _LEFTOVERS and not e.name.startswith("._"))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_ENDINGS


def _mindrecord(folder: Path, resolution: int, channels: int, augment: AugmentConfig) -> Loaded:
    manifest = load_manifest(folder)
    splits = []
    for part in ("train", "val"):
        labels = manifest.labels(part)
        encoded = EncodedImages(
            len(labels),
            functools.partial(record_stream, manifest.files(folder, part)),
            size=resolution,
            channels=channels,
            augment=augment,
        )
        splits.append(Split(encoded, labels))
    return manifest.classes, splits[0], splits[1]
