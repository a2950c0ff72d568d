"""What `augment:` does to an image, with mindspore.dataset's own transforms.

The transforms used are the deterministic ones; what they do to an image is drawn here, from the
caller's Generator. MindSpore's random transforms draw from generators of their own whose state
cannot be saved: a training could not go on in the middle of an epoch as if it had never stopped.

An image is uint8, (height, width, channels), until it is normalised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore.dataset import vision
from numpy.typing import NDArray

from retrain.data_config import AugmentConfig
from space.records import record

Pixels = NDArray[np.uint8]
Generator = np.random.Generator

_CROP_ATTEMPTS = 10

# ---------------------------------------------------------------------------- size


def evaluation_view(image: Pixels, size: int, augment: AugmentConfig) -> Pixels:
    """Return the centre of an image, (size, size, channels)."""
    scaled = math.floor(size / augment.crop_pct)
    if min(image.shape[:2]) != scaled:
        image = vision.Resize(scaled, _interpolation(augment))(image)
    if image.shape[:2] != (size, size):
        image = vision.CenterCrop(size)(image)
    return image


def random_resized_crop(
    image: Pixels, size: int, augment: AugmentConfig, rng: Generator
) -> Pixels:
    """Return a random part of an image, (size, size, channels)."""
    top, left, height, width = crop_box(image.shape[0], image.shape[1], augment, rng)
    crop = vision.ResizedCrop(top, left, height, width, (size, size), _interpolation(augment))
    cropped: Pixels = crop(image)
    return cropped


def crop_box(
    height: int, width: int, augment: AugmentConfig, rng: Generator
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a part with the recipe's area and ratio.

    After ten parts that do not fit into the image, the largest centred one with a ratio allowed.
    """
    scale = augment.scale or (1.0, 1.0)
    for _ in range(_CROP_ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        ratio = math.exp(rng.uniform(*np.log(augment.ratio)))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = rng.integers((height - rows + 1, width - columns + 1)).tolist()
            return top, left, rows, columns
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    rows = min(height, max(1, round(width / ratio)))
    columns = min(width, max(1, round(height * ratio)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _interpolation(augment: AugmentConfig) -> Any:
    return vision.Inter[augment.interpolation.upper()]


# ---------------------------------------------------------------------------- colours


def change_colours(image: Pixels, augment: AugmentConfig, rng: Generator) -> Pixels:
    """Return an image (size, size, 3) after AutoAugment or colour jitter."""
    transforms = (
        _policy(augment.auto_augment, rng)
        if augment.auto_augment is not None
        else _color_jitter(augment.jitter, rng)
    )
    for transform in transforms:
        image = transform(image)
    return image


def _color_jitter(jitter: tuple[float, ...], rng: Generator) -> list[Any]:
    """Brightness, contrast, saturation and hue, those that vary, in random order."""
    transforms: list[Any] = [
        make(rng.uniform(1 - largest, 1 + largest))
        for make, largest in zip(
            (vision.AdjustBrightness, vision.AdjustContrast, vision.AdjustSaturation),
            jitter,
            strict=False,
        )
        if largest
    ]
    if jitter[3:] > (0.0,):
        transforms.append(vision.AdjustHue(rng.uniform(-jitter[3], jitter[3])))
    return [transforms[i] for i in rng.permutation(len(transforms))]


def _affine(
    *, translate: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)
) -> Any:
    degrees = tuple(math.degrees(math.atan(share)) for share in shear)
    return vision.Affine(0.0, translate, 1.0, degrees, vision.Inter.BILINEAR, _FILL)


#: Gray, for what a turned or moved image leaves empty.
_FILL = 128

#: Change -> from its strength, which is signed where a sign makes a difference, to a transform.
_CHANGES: dict[str, Callable[[float], Any]] = {
    "ShearX": lambda share: _affine(shear=(share, 0)),
    "ShearY": lambda share: _affine(shear=(0, share)),
    "TranslateX": lambda share: _affine(translate=(share, 0)),
    "TranslateY": lambda share: _affine(translate=(0, share)),
    "Rotate": lambda degrees: vision.Rotate(degrees, vision.Inter.BILINEAR, fill_value=_FILL),
    "Brightness": lambda change: vision.AdjustBrightness(1 + change),
    "Color": lambda change: vision.AdjustSaturation(1 + change),
    "Contrast": lambda change: vision.AdjustContrast(1 + change),
    "Sharpness": lambda change: vision.AdjustSharpness(1 + change),
    "Posterize": lambda lost_bits: vision.Posterize(8 - round(lost_bits)),
    "Solarize": lambda lowered: vision.Solarize((255 - round(lowered), 255)),
    "AutoContrast": lambda _: vision.AutoContrast(),
    "Equalize": lambda _: vision.Equalize(),
    "Invert": lambda _: vision.Invert(),
    "Identity": lambda _: lambda image: image,
}
_SIGNED = frozenset(list(_CHANGES)[:9])
#: Change -> largest strength: AutoAugment's and RandAugment's (1805.09501, table 6), and that of
#: TrivialAugment's wide space (2103.10158, table 1). The others have none.
_LARGEST = {
    "ShearX": (0.3, 0.99), "ShearY": (0.3, 0.99), "TranslateX": (150 / 331, 32 / 224),
    "TranslateY": (150 / 331, 32 / 224), "Rotate": (30, 135), "Brightness": (0.9, 0.99),
    "Color": (0.9, 0.99), "Contrast": (0.9, 0.99), "Sharpness": (0.9, 0.99),
    "Posterize": (4, 6), "Solarize": (255, 255),
}  # fmt: skip
_RANDOM_CHANGES = tuple(name for name in _CHANGES if name != "Invert")
#: AutoAugment's policy for ImageNet (1805.09501, table 9): change, probability, magnitude of 9.
_POLICY = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)


def _policy(name: str, rng: Generator) -> list[Any]:
    """The transforms that a policy draws for one image."""
    if name == "autoaug":
        drawn = _POLICY[rng.integers(len(_POLICY))]
        return [
            _change(change, magnitude / 9, rng)
            for change, probability, magnitude in drawn
            if rng.random() < probability
        ]
    if name == "trivialaugwide":
        return [_change(str(rng.choice(_RANDOM_CHANGES)), rng.integers(31) / 30, rng, wide=True)]
    given = {key: float(value) for key, value in re.findall(r"-([a-z]+)([\d.]+)", name)}
    transforms = []
    for change in rng.choice(_RANDOM_CHANGES, int(given.get("n", 2))):
        magnitude = rng.normal(given.get("m", 9), given.get("mstd", 0))
        transforms.append(_change(str(change), min(max(magnitude / 10, 0), 1), rng))
    return transforms


def _change(name: str, magnitude: float, rng: Generator, *, wide: bool = False) -> Any:
    """A transform with a magnitude in [0, 1]."""
    strength = magnitude * _LARGEST.get(name, (0, 0))[wide]
    if name in _SIGNED and rng.random() < 0.5:
        strength = -strength
    return _CHANGES[name](strength)


# ---------------------------------------------------------------------------- normalised images


def erase(image: NDArray[np.float32], augment: AugmentConfig, rng: Generator) -> None:
    """Erase a rectangle of a normalised image (channels, height, width), in place, or do not."""
    if rng.random() >= augment.re_prob:
        return
    channels, height, width = image.shape
    for _ in range(augment.re_max_attempts):
        area = rng.uniform(*augment.re_scale) * height * width
        ratio = math.exp(rng.uniform(*np.log(augment.re_ratio)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            top, left = rng.integers((height - rows + 1, width - columns + 1)).tolist()
            filling: Any = 0.0
            if augment.re_value == "random":
                filling = rng.standard_normal((channels, rows, columns), np.float32)
            image[:, top : top + rows, left : left + columns] = filling
            return


@record
class Mix:
    """How the images of a batch are mixed with their neighbours.

    Attributes:
        own: Share of an image itself, in its label.
        box: Top, bottom, left and right of what comes from the neighbour (CutMix); None: both
            images are averaged (mixup).
    """

    own: float
    box: tuple[int, int, int, int] | None


def draw_mix(augment: AugmentConfig, size: int, rng: Generator) -> Mix | None:
    """Return how a batch of images of this size is mixed, if it is."""
    if rng.random() >= augment.cutmix_prob:
        return None
    cut = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    own = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(own, None)
    half = int(size * math.sqrt(1 - own)) // 2
    row, column = rng.integers(size, size=2).tolist()
    top, bottom = max(0, row - half), min(size, row + half)
    left, right = max(0, column - half), min(size, column + half)
    # What is cut off at the border is not taken from the neighbour.
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def mix_images(images: NDArray[np.float32], mix: Mix) -> None:
    """Mix normalised images (n, channels, size, size) in pairs of neighbours, in place; n is even.

    Neighbours, not the batch's first with its last, so that a batch may be shared out.
    """
    pairs = images.reshape(-1, 2, *images.shape[1:])
    if mix.box is None:
        other = np.float32(1 - mix.own) * pairs[:, ::-1]
        pairs *= np.float32(mix.own)
        pairs += other
    else:
        top, bottom, left, right = mix.box
        part = pairs[..., top:bottom, left:right]
        part[:] = part[:, ::-1].copy()


def mix_labels(labels: NDArray[np.int32], classes: int, mix: Mix | None) -> NDArray[np.float32]:
    """Return float32 (n, classes) with the shares of labels (n,) and their neighbours'."""
    shares: NDArray[np.float32] = np.eye(classes, dtype=np.float32)[labels]
    if mix is not None:
        neighbours = shares.reshape(-1, 2, classes)[:, ::-1].reshape(shares.shape)
        shares = np.float32(mix.own) * shares + np.float32(1 - mix.own) * neighbours
    return shares
