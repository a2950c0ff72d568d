"""Where a split's images come from: arrays in memory or mapped, or files that are decoded late."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrain.data_config import AugmentConfig
from space.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]


class EncodedImage(NamedTuple):
    """An image as JPEG, PNG or the like.

    Attributes:
        name: Its file, or where else it is; messages name it.
        content: Its bytes; None: they are read from the file when they are wanted.
    """

    name: str
    content: bytes | None


class EncodedImages:
    """Images too many for the memory, decoded whenever they are wanted.

    Attributes:
        count: How many.
        size: Height and width for the network, pixels.
        channels: 1 or 3.
        augment: How they are brought to this size in evaluation.
        stream: From rows to their images, in the order of the rows.
    """

    def __init__(
        self,
        count: int,
        stream: Callable[[Rows], Iterator[EncodedImage]],
        *,
        size: int,
        channels: int,
        augment: AugmentConfig,
    ) -> None:
        self.count = count
        self.stream = stream
        self.size = size
        self.channels = channels
        self.augment = augment

    def view(self, image: EncodedImage) -> Pixels:
        """Return uint8 (channels, size, size): the centre, as evaluation sees it."""
        from retrain.augment import evaluation_view

        return self._resized(
            image, lambda pixels: evaluation_view(pixels, self.size, self.augment)
        )

    def random_crop(
        self, augment: AugmentConfig, image: EncodedImage, rng: np.random.Generator
    ) -> Pixels:
        """Return uint8 (channels, size, size): a random part, as training sees it."""
        from retrain.augment import random_resized_crop

        return self._resized(
            image, lambda pixels: random_resized_crop(pixels, self.size, augment, rng)
        )

    def _resized(self, image: EncodedImage, resize: Callable[[Pixels], Pixels]) -> Pixels:
        pixels = decode(image, self.channels)
        try:
            resized = resize(pixels)
        except RuntimeError as error:
            # MindSpore's message has several paragraphs.
            raise ConfigError(
                f"data.path: the image {image.name} of {pixels.shape[1]} x {pixels.shape[0]}"
                f" pixels cannot be brought to {self.size}: {str(error).splitlines()[0]}"
            ) from None
        return resized.transpose(2, 0, 1)


class Split:
    """Images and labels of one part of a data set.

    Attributes:
        labels: int32, (n,).
    """

    def __init__(
        self,
        images: Pixels | EncodedImages,
        labels: NDArray[np.int32],
        rows: Rows | None = None,
    ) -> None:
        """Take images, all of them or those at `rows`; labels are of the images taken.

        An array, uint8 (n, channels, size, size), is not copied: it may be mapped from a file.
        """
        self._images = images
        self._rows = np.arange(len(labels)) if rows is None else rows
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        if isinstance(self._images, EncodedImages):
            return self._images.channels, self._images.size, self._images.size
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    @property
    def images(self) -> Pixels:
        """uint8, (n, channels, size, size), as evaluation sees them; a copy, made anew each time.

        For small splits: all are in memory at once.
        """
        return self.views(np.arange(len(self)))

    def views(self, positions: Rows) -> Pixels:
        """Return uint8 (m, channels, size, size) of some images, as evaluation sees them."""
        if not isinstance(self._images, EncodedImages):
            images: Pixels = self._images[self._rows[positions]]
            return images
        views = np.empty((len(positions), *self.shape), np.uint8)
        with ThreadPoolExecutor(available_cores()) as pool:
            for index, view in enumerate(pool.map(self._images.view, self.stream(positions))):
                views[index] = view
        return views

    def cuts(
        self,
        positions: Rows,
        encoded: list[EncodedImage],
        augment: AugmentConfig,
        generators: list[np.random.Generator],
    ) -> Pixels:
        """Return uint8 (m, channels, size, size) of some images, as training sees them.

        Random resized crops if `augment` has them, else what evaluation sees.

        Args:
            positions: Which images.
            encoded: The same ones out of `stream`; none for an array.
            augment: What is cut.
            generators: One for each image, for crops.
        """
        if isinstance(self._images, EncodedImages):
            if augment.scale is None:
                return np.stack([self._images.view(image) for image in encoded])
            crop = functools.partial(self._images.random_crop, augment)
            return np.stack(list(map(crop, encoded, generators)))
        images = self.views(positions)
        if augment.scale is not None:
            from retrain.augment import random_resized_crop

            for image, rng in zip(images, generators, strict=True):
                pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
                cut = random_resized_crop(pixels, image.shape[1], augment, rng)
                image[:] = cut.transpose(2, 0, 1)
        return images

    def stream(self, positions: Rows) -> Iterator[EncodedImage]:
        """Yield the encoded images at these positions, in this order; for an array, nothing."""
        if isinstance(self._images, EncodedImages):
            yield from self._images.stream(self._rows[positions])

    def take(self, positions: Rows) -> Split:
        """Return the part of the split at these positions; arrays are shared."""
        return Split(self._images, self.labels[positions], self._rows[positions])

    def shard(self, rank: int, ranks: int) -> Split:
        """Return one process's share of an evaluation: every image is in exactly one share.

        The shares are not filled up, and their lengths may differ by one: sums over the images of
        all processes are those of the whole split, means of means are not.

        Raises:
            ValueError: Not 0 <= rank < ranks.
        """
        check_rank(rank, ranks)
        start, stop = (len(self) * r // ranks for r in (rank, rank + 1))
        return self.take(np.arange(start, stop))


def check_rank(rank: int, ranks: int) -> None:
    """Raise unless a process's number is one of so many.

    Raises:
        ValueError: Not 0 <= rank < ranks.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be in [0, {ranks}), but got {rank}")


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def decode(image: EncodedImage, channels: int) -> Pixels:
    """Return uint8 (height, width, channels) of an image in any format and mode that Pillow reads.

    Pillow, not MindSpore's Decode: it reads CMYK, 16 bits and palettes, names what is wrong with a
    file, and lets other threads run meanwhile.

    Raises:
        ConfigError: It cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        source = Path(image.name) if image.content is None else io.BytesIO(image.content)
        with Image.open(source) as opened:
            converted = _plain(opened).convert("L" if channels == 1 else "RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        reason = f"{error}".replace(f"{image.name!r}", "the file")
        if isinstance(error, UnidentifiedImageError):
            # Pillow's own sentence would name bytes by their address in memory.
            reason = "it is no image that Pillow knows"
        raise ConfigError(f"data.path: the image {image.name} cannot be read: {reason}.") from None
    pixels = np.asarray(converted)
    return pixels if channels == 3 else pixels[:, :, None]


def _plain(image: Image.Image) -> Image.Image:
    """An image whose conversion to gray or RGB loses nothing: 8 bits, no palette."""
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits per pixel; conversion would clip at 255.
        pixels = np.asarray(image.convert("I")) >> 8
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" else image
