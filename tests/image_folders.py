"""Miniature image folders for tests: odd sizes and every mode that real folders hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_MODES = ("RGB", "L", "CMYK")


def make_image_folder(folder: Path, *, classes: int = 20, train: int = 5, val: int = 2) -> Path:
    """Write train/ and val/ with JPEG files of odd sizes, a third of them gray, a third CMYK.

    An image is a blurred random pattern with a colour of its class, so that a network can learn.
    """
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (classes, 3))
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            target = folder / part / f"class{label:02d}"
            target.mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(-40, 41, (6, 6, 3))
                pixels = np.clip(colours[label] + noise, 0, 255).astype(np.uint8)
                size = tuple(int(side) for side in rng.integers(33, 131, 2))
                image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                image = image.convert(_MODES[index % len(_MODES)])
                image.save(target / f"{index}.jpg", quality=90)
    return folder
