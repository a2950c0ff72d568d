"""Data sets: loaded, split, and handed out in batches that seed, epoch and step alone decide.

    data = load_data(recipe.data, resolution, channels, recipe.augment)
    for images, labels in train_batches(data, recipe.augment, batch_size=64, seed=0, epoch=3):
        ...                          # float32 (64, channels, resolution, resolution), int32 (64,)
    for images, labels in eval_batches(data, data.validation, 256):
        ...                          # every image once; the last batch holds what is left

Small data sets are arrays, cut once and shared by the processes of a machine; image files and
MindRecord are decoded batch by batch, by threads, ahead of the training. The validation images are
taken from the training set; the test set stands apart.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrain.data_ahead import Begun, batches_ahead
from retrain.data_config import AugmentConfig, DataConfig
from retrain.data_images import EncodedImage, Pixels, Rows, Split, check_rank
from retrain.data_sources import load_source, source_classes
from space.errors import ConfigError
from space.records import record

if TYPE_CHECKING:
    from retrain.augment import Mix

__all__ = [
    "DataSet", "Normalisation", "Split", "class_names", "epoch_order", "eval_batches", "load_data",
    "train_batch", "train_batches",
]  # fmt: skip

#: Images, float32 (n, channels, size, size), and labels: int32 (n,), or float32 (n, classes) where
#: images are mixed.
Batch = tuple[NDArray[np.float32], NDArray[np.int32] | NDArray[np.float32]]

#: Images that a thread takes at a time; even, for mixing takes neighbours.
_CHUNK = 8
#: So many images at a time are looked at for the normalisation.
MEASURED_AT_ONCE = 64


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
        normalisation: The one given, or measured on some 2,000 of the training images, evenly
            spaced.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        train: Split,
        validation: Split,
        test: Split,
        normalisation: Normalisation | None = None,
    ) -> None:
        self.classes = classes
        self.train = train
        self.validation = validation
        self.test = test
        self.normalisation = normalisation or _measured(train)

    def split(self, name: str) -> Split:
        """Return `train`, `validation` or `test`.

        Raises:
            ConfigError: Another name.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if name not in splits:
            raise ConfigError(f"split must be one of {', '.join(splits)}, but got {name!r}.")
        return splits[name]

    def normalise(
        self, images: NDArray[np.uint8], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return float32 images of the same shape, normalised; `out`, if it is given."""
        mean = np.array(self.normalisation.mean)[:, None, None]
        deviation = np.array(self.normalisation.deviation)[:, None, None]
        scale = (1 / (255 * deviation)).astype(np.float32)
        offset = (mean / deviation).astype(np.float32)
        # Without temporary arrays, which take longer than the arithmetic.
        normalised: NDArray[np.float32] = np.multiply(images, scale, out=out, dtype=np.float32)
        normalised -= offset
        return normalised


def _measured(train: Split) -> Normalisation:
    # Evenly spaced: a folder's images come sorted by class.
    sample = np.arange(0, len(train), max(1, len(train) // 2000))
    count, total, squares = 0, np.zeros(train.shape[0]), np.zeros(train.shape[0])
    # A few images at a time: as float64, all of them take gigabytes. The sums are exact.
    for start in range(0, len(sample), MEASURED_AT_ONCE):
        pixels = train.views(sample[start : start + MEASURED_AT_ONCE]).astype(np.float64)
        count += pixels.size // len(total)
        total += pixels.sum(axis=(0, 2, 3))
        squares += np.square(pixels).sum(axis=(0, 2, 3))
    means = total / count
    deviations = np.sqrt(np.maximum(squares / count - np.square(means), 0.0))
    return Normalisation(
        tuple(round(float(mean) / 255, 4) for mean in means),
        tuple(max(0.001, round(float(deviation) / 255, 4)) for deviation in deviations),
    )


@functools.lru_cache(maxsize=2)
def load_data(
    config: DataConfig,
    resolution: int,
    channels: int,
    augment: AugmentConfig = AugmentConfig(),  # noqa: B008 (frozen)
) -> DataSet:
    """Return a data set at a network's resolution and number of channels; loaded once a process.

    Of `augment`, it matters how image files are cut in evaluation, whether training cuts them
    otherwise (then they are not kept as arrays), and the normalisation.

    Raises:
        ConfigError: The folder lacks files, a file is damaged, or there are too few images for
            what is asked.
    """
    _check_channels(channels, augment)
    classes, train, test = load_source(config, resolution, channels, augment)
    kept, held_out = _held_out(train.labels, config)
    if config.train_images is not None:
        if config.train_images > len(kept):
            raise ConfigError(
                f"data.train_images: must be at most the {len(kept)} training images that are not"
                f" held out, but got {config.train_images}."
            )
        rng = np.random.default_rng([config.split_seed, 1])
        kept = np.sort(rng.permutation(kept)[: config.train_images])
    normalisation = None
    if augment.mean is not None and augment.std is not None:
        normalisation = Normalisation(augment.mean, augment.std)
    return DataSet(classes, train.take(kept), train.take(held_out), test, normalisation)


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Return a data set's classes without decoding its images: a check before anything is begun.

    Raises:
        ConfigError: The folder lacks files, or one is damaged as far as a quick look shows.
    """
    return source_classes(config)


def _check_channels(channels: int, augment: AugmentConfig) -> None:
    if channels not in (1, 3):
        raise ConfigError(
            f"input_channels: must be 1 or 3 for images, but the network has {channels}."
        )
    if augment.changes_colours and channels != 3:
        raise ConfigError(
            "augment: color_jitter and auto_augment need a network with 3 channels, but it has"
            f" {channels}; leave them out."
        )
    if augment.mean is not None and len(augment.mean) != channels:
        raise ConfigError(
            f"augment.mean: must have a number for each of the network's {channels} channels, but"
            f" got {list(augment.mean)}."
        )


def _held_out(labels: NDArray[np.int32], config: DataConfig) -> tuple[Rows, Rows]:
    """Rows that are kept and rows that are held out, in each class its share."""
    sizes = np.bincount(labels)
    counts = _held_out_counts(sizes, config)
    if not counts.sum():
        raise ConfigError(
            f"data.validation_fraction: {config.validation_fraction} of {len(labels)} training"
            " images leaves none to validate on; every class needs two at least."
        )
    rng = np.random.default_rng(config.split_seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    held_out = [
        rng.permutation(rows)[:count]
        for rows, count in zip(by_class, counts, strict=True)
        if len(rows)
    ]
    mask = np.zeros(len(labels), bool)
    mask[np.concatenate(held_out)] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def _held_out_counts(sizes: NDArray[np.int64], config: DataConfig) -> NDArray[np.int64]:
    """How many images of each class are held out; a fraction keeps one of each, at least."""
    if config.validation_images is None:
        wanted = [max(1, round(config.validation_fraction * int(size))) for size in sizes]
        return np.minimum(wanted, np.maximum(sizes - 1, 0)).astype(np.int64)
    if config.validation_images > sizes.sum() // 2:
        raise ConfigError(
            f"data.validation_images: must be at most half of the {sizes.sum()} training images,"
            f" but got {config.validation_images}."
        )
    # Largest remainders: the counts add up to what is asked, and each class keeps an image.
    most = np.maximum(sizes - 1, 0)
    if config.validation_images > most.sum():
        raise ConfigError(
            f"data.validation_images: must be at most {most.sum()}, so that every class keeps an"
            f" image, but got {config.validation_images}."
        )
    shares = config.validation_images * sizes / sizes.sum()
    counts: NDArray[np.int64] = np.minimum(np.floor(shares).astype(np.int64), most)
    order = np.argsort(counts - shares, kind="stable")
    while missing := config.validation_images - counts.sum():
        counts[order[counts[order] < most[order]][:missing]] += 1
    return counts


# ---------------------------------------------------------------------------- training


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch's images: it depends on seed and epoch alone."""
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def train_batches(
    data: DataSet,
    augment: AugmentConfig,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Yield one process's batches of an epoch, made by threads ahead of the training.

    The epoch's order, shared by all processes, is cut into global batches of batch_size * ranks
    images, each into one batch for every process; what does not fill a last global batch is left
    out, another part in every epoch. What a batch holds depends on seed, epoch, its number, rank
    and ranks: not on how many threads make it, nor on which batch the iteration starts with. Two
    processes' batches of 32, one after the other, are one process's batch of 64.

    Args:
        data: The data set; all of its `train` is used.
        augment: Random changes. With mixup or cutmix, labels are float32 (n, classes).
        batch_size: Images of a batch of one process; even for mixup and cutmix.
        seed: 0 to 2**63.
        epoch: From 0.
        start_batch: The batch to start with: where to go on in the middle of an epoch.
        rank: This process's number.
        ranks: How many processes share the training.
        workers: Threads; None: as many as this process has cores.

    Raises:
        ConfigError: An image cannot be read (when its batch is reached), too few for one batch, or
            an odd batch size with mixup or cutmix.
    """
    check_rank(rank, ranks)
    steps = len(data.train) // (batch_size * ranks)
    if not steps:
        raise ConfigError(
            f"batch_size must be at most the {len(data.train)} training images / {ranks} workers,"
            f" but got {batch_size}."
        )
    if augment.mixes and batch_size % 2:
        raise ConfigError(f"batch_size must be even for mixup and cutmix, but got {batch_size}.")
    order = epoch_order(len(data.train), seed=seed, epoch=epoch)
    order = order[: steps * batch_size * ranks].reshape(steps, ranks, batch_size)[:, rank]
    encoded = data.train.stream(order[start_batch:].ravel())
    first = rank * batch_size

    def begin(pool: ThreadPoolExecutor, number: int) -> Begun:
        step = epoch * steps + number
        draws = _draw(augment, data, seed, step, batch_size * ranks)
        return _begin_training(
            pool,
            data,
            augment,
            order[number],
            list(itertools.islice(encoded, batch_size)),
            draws.part(first, first + batch_size),
        )

    yield from batches_ahead(begin, range(start_batch, steps), workers)


def train_batch(
    data: DataSet, indices: NDArray[np.int64], augment: AugmentConfig, *, seed: int, step: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return normalised images (n, channels, size, size), shifted and flipped, and labels (n,).

    The random changes depend on seed and step alone. For a data set in arrays; the other changes
    are train_batches'.
    """
    draws = _draw(augment, data, seed, step, len(indices))
    images = _shifted_and_flipped(data.train.views(indices), augment, draws)
    return data.normalise(images), data.train.labels[indices]


class _Draws(NamedTuple):
    """What is drawn for some images of a global batch.

    Attributes:
        seed: Of the training.
        step: The global batch's number, counted through all epochs.
        places: Of the images in the global batch; each has a Generator of its own for the rest.
        offsets: (n, 2), of the shift.
        flips: (n, 2), whether left to right and upside down.
        mix: Of the whole batch.
    """

    seed: int
    step: int
    places: range
    offsets: Rows
    flips: NDArray[np.bool_]
    mix: Mix | None

    def part(self, start: int, stop: int) -> _Draws:
        some = slice(start, stop)
        return self._replace(
            places=self.places[some], offsets=self.offsets[some], flips=self.flips[some]
        )

    def generators(self) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, 4, self.step, p]) for p in self.places]


def _draw(augment: AugmentConfig, data: DataSet, seed: int, step: int, count: int) -> _Draws:
    """Draw for a global batch of `count` images."""
    rng = np.random.default_rng([seed, 2, step])
    offsets = np.zeros((count, 2), np.int64)
    if augment.shift:
        offsets = rng.integers(0, 2 * augment.shift + 1, (count, 2))
    flips = np.zeros((count, 2), bool)
    for axis, probability in enumerate((augment.hflip_probability, augment.vflip)):
        if probability:
            flips[:, axis] = rng.random(count) < probability
    mix = None
    if augment.mixes:
        from retrain.augment import draw_mix

        mix = draw_mix(augment, data.train.shape[1], np.random.default_rng([seed, 5, step]))
    return _Draws(seed, step, range(count), offsets, flips, mix)


def _begin_training(
    pool: ThreadPoolExecutor,
    data: DataSet,
    augment: AugmentConfig,
    positions: Rows,
    encoded: list[EncodedImage],
    draws: _Draws,
) -> Begun:
    """Let threads make a batch: one for shifts and flips in arrays, else one for each chunk."""
    images = np.empty((len(positions), *data.train.shape), np.float32)
    chunk = _CHUNK if encoded or augment.per_image else len(positions)
    labels: NDArray[np.int32] | NDArray[np.float32] = data.train.labels[positions]
    if augment.mixes:
        from retrain.augment import mix_labels

        labels = mix_labels(data.train.labels[positions], len(data.classes), draws.mix)
    futures = [
        pool.submit(
            _make_chunk,
            data,
            augment,
            positions[start : start + chunk],
            encoded[start : start + chunk],
            draws.part(start, start + chunk),
            images[start : start + chunk],
        )
        for start in range(0, len(positions), chunk)
    ]
    return Begun(images, labels, futures)


def _make_chunk(
    data: DataSet,
    augment: AugmentConfig,
    positions: Rows,
    encoded: list[EncodedImage],
    draws: _Draws,
    out: NDArray[np.float32],
) -> None:
    """Make some training images: cut, shift and flip, colours, normalise, erase, mix."""
    generators = draws.generators() if augment.per_image else []
    images = data.train.cuts(positions, encoded, augment, generators)
    images = _shifted_and_flipped(images, augment, draws)
    if augment.changes_colours:
        from retrain.augment import change_colours

        for index, rng in enumerate(generators):
            pixels = np.ascontiguousarray(images[index].transpose(1, 2, 0))
            images[index] = change_colours(pixels, augment, rng).transpose(2, 0, 1)
    data.normalise(images, out)
    if augment.re_prob:
        from retrain.augment import erase

        for image, rng in zip(out, generators, strict=True):
            erase(image, augment, rng)
    if draws.mix is not None:
        from retrain.augment import mix_images

        mix_images(out, draws.mix)


def _shifted_and_flipped(images: Pixels, augment: AugmentConfig, draws: _Draws) -> Pixels:
    _, _, height, width = images.shape
    result = images
    if augment.shift:
        s = augment.shift
        padded = np.pad(images, ((0, 0), (0, 0), (s, s), (s, s)))
        result = np.empty_like(images)
        for i, (top, left) in enumerate(draws.offsets):
            result[i] = padded[i, :, top : top + height, left : left + width]
    for axis, flipped in zip((3, 2), draws.flips.T, strict=True):
        result[flipped] = np.flip(result[flipped], axis)
    return result


# ---------------------------------------------------------------------------- evaluation


def eval_batches(
    data: DataSet, split: Split, batch_size: int, *, workers: int | None = None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Yield every image once, normalised, in order; the last batch may be smaller.

    Processes that share an evaluation give their `split.shard(rank, ranks)`, and add up what they
    count over images.

    Raises:
        ConfigError: An image cannot be read (when its batch is reached).
    """
    encoded = split.stream(np.arange(len(split)))

    def begin(pool: ThreadPoolExecutor, start: int) -> Begun:
        positions = np.arange(start, min(start + batch_size, len(split)))
        images = np.empty((len(positions), *split.shape), np.float32)
        some = list(itertools.islice(encoded, len(positions)))
        chunk = _CHUNK if some else len(positions)
        futures = [
            pool.submit(
                _make_views,
                data,
                split,
                positions[first : first + chunk],
                some[first : first + chunk],
                images[first : first + chunk],
            )
            for first in range(0, len(positions), chunk)
        ]
        return Begun(images, split.labels[positions], futures)

    yield from batches_ahead(begin, range(0, len(split), batch_size), workers)


def _make_views(
    data: DataSet,
    split: Split,
    positions: Rows,
    encoded: list[EncodedImage],
    out: NDArray[np.float32],
) -> None:
    data.normalise(split.cuts(positions, encoded, AugmentConfig(), []), out)
