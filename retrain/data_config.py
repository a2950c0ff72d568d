"""What is trained on, and how its images are changed: the records `data:` and `augment:`."""

from __future__ import annotations

import re
from typing import Literal

from space.records import record

_RANDAUG = re.compile(r"randaug(-(m\d+(\.\d+)?|n\d+|mstd\d+(\.\d+)?))*")


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], but got {value!r}")


def _require_rising(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(
            f"{name} must be two rising numbers in [{low:g}, {high:g}], but got {list(value)}"
        )


#: The data sets of image files of any size.
IMAGE_FILES = ("image_folder", "mindrecord")


@record
class DataConfig:
    """A data set and how its training set is split.

    Attributes:
        name: `digits` (scikit-learn's, nothing to download), `fashion_mnist` (a folder with the
            four idx .gz files), `cifar10` and `cifar100` (a folder with the binary version's
            files), `image_folder` (train/<class>/ and val/<class>/ folders), `mindrecord` (what
            `mnas data to-mindrecord` made of one).
        path: The folder; none for digits.
        validation_fraction: Share of each class of the *training* set that is held out.
        validation_images: Hold out so many images instead, in proportion to the classes: the
            paper's 50,000 of ImageNet's training set.
        split_seed: Of the choice of held-out images: the same for all networks of a campaign.
        train_images: Train on so many of the remaining images; None takes all.
    """

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "image_folder", "mindrecord"]
    path: str | None = None
    validation_fraction: float = 0.1
    validation_images: int | None = None
    split_seed: int = 0
    train_images: int | None = None

    def __post_init__(self) -> None:
        _require("validation_fraction", self.validation_fraction, 0.001, 0.9)
        _require("split_seed", self.split_seed, 0, 2**63)
        if self.validation_images is not None and self.validation_images < 1:
            raise ValueError(f"validation_images must be >= 1, but got {self.validation_images}")
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images must be >= 1, but got {self.train_images}")
        if (self.path is None) != (self.name == "digits"):
            given = repr(self.path)
            rule = "must be left out for digits" if self.name == "digits" else "must be a folder"
            raise ValueError(f"path {rule}, but got {given}")


@record
class AugmentConfig:
    """How an image becomes the network's input: fixed in evaluation, random in training.

    The names are those of MindSpore's model zoo. Random changes are drawn anew in every epoch and
    made in this order: random resized crop, shift, flips, AutoAugment or colour jitter, erasing,
    mixing.

    Attributes:
        crop_pct: Evaluation scales the shorter side of an image file to the network's input /
            crop_pct and cuts the centre out; the small sets' images are scaled as a whole.
        interpolation: Of both crops.
        mean: Of each channel, of 1; with std. None: both are measured on the training images.
        std: Deviation of each channel, of 1.
        scale: Area of the random resized crop, as a share of the image; None: no such crop,
            training sees what evaluation sees.
        ratio: Width / height of the random resized crop.
        shift: Largest shift in pixels, each direction; the border is filled with black.
        flip: The same as an hflip of 0.5.
        hflip: Probability of a flip left to right.
        vflip: Probability of a flip upside down.
        color_jitter: Largest change of brightness, contrast, saturation and, if given, hue: three
            or four numbers, or one for the first three.
        auto_augment: `autoaug` (AutoAugment's policy for ImageNet), `randaug` with magnitude (of
            10), number of changes and deviation of the magnitude as in `randaug-m9-n2-mstd0.5`, or
            `trivialaugwide`; takes the place of color_jitter.
        re_prob: Probability of erasing a rectangle.
        re_scale: Its area, as a share of the image.
        re_ratio: Its height / width.
        re_value: What it is filled with, after normalisation: 0 or `random` (normal noise).
        re_max_attempts: Tries to fit a rectangle before the image stays as it is.
        mixup: Alpha of the Beta distribution of mixup's weight; 0: off.
        cutmix: Alpha of CutMix; 0: off. With both, each batch takes one of them, half and half.
        cutmix_prob: Probability that a batch is mixed at all.
    """

    crop_pct: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (0.75, 1.333)
    shift: int = 0
    flip: bool = False
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: float | tuple[float, ...] | None = None
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_scale: tuple[float, float] = (0.02, 0.33)
    re_ratio: tuple[float, float] = (0.3, 3.3)
    re_value: Literal[0, "random"] = 0
    re_max_attempts: int = 10
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_prob: float = 1.0

    def __post_init__(self) -> None:
        _require("crop_pct", self.crop_pct, 0.1, 1)
        if self.scale is not None:
            _require_rising("scale", self.scale, 0.001, 1)
        _require_rising("ratio", self.ratio, 0.01, 100)
        _require("shift", self.shift, 0, 64)
        _require("hflip", self.hflip, 0, 1)
        _require("vflip", self.vflip, 0, 1)
        _require("re_prob", self.re_prob, 0, 1)
        _require_rising("re_scale", self.re_scale, 0.001, 1)
        _require_rising("re_ratio", self.re_ratio, 0.01, 100)
        _require("re_max_attempts", self.re_max_attempts, 1, 1000)
        _require("mixup", self.mixup, 0, 100)
        _require("cutmix", self.cutmix, 0, 100)
        _require("cutmix_prob", self.cutmix_prob, 0, 1)
        if self.flip and self.hflip:
            raise ValueError(f"hflip must be left out where flip is true, but got {self.hflip}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"std must be given where mean is, and only there, but got {self.std} with mean"
                f" {self.mean}"
            )
        if len(self.std or ()) != len(self.mean or ()):
            raise ValueError(
                f"std must have as many numbers as mean, {len(self.mean or ())}, but got"
                f" {list(self.std or ())}"
            )
        for deviation in self.std or ():
            _require("std", deviation, 1e-6, 1e6)
        self._check_colours()

    def _check_colours(self) -> None:
        jitter = self.jitter
        if self.color_jitter is not None and (
            len(jitter) not in (3, 4)
            or not all(0 <= value <= 1 for value in jitter)
            or jitter[3:] > (0.5,)
        ):
            raise ValueError(
                "color_jitter must be one, three or four numbers in [0, 1], the fourth (hue) at"
                f" most 0.5, but got {self.color_jitter!r}"
            )
        if self.auto_augment is None:
            return
        if self.auto_augment not in ("autoaug", "trivialaugwide") and not _RANDAUG.fullmatch(
            self.auto_augment
        ):
            raise ValueError(
                "auto_augment must be autoaug, trivialaugwide or randaug with -m, -n, -mstd as in"
                f" randaug-m9-n2-mstd0.5, but got {self.auto_augment!r}"
            )
        if self.color_jitter is not None:
            raise ValueError(
                f"color_jitter must be left out where auto_augment is given, but got"
                f" {self.color_jitter!r}"
            )

    @property
    def jitter(self) -> tuple[float, ...]:
        """color_jitter as three or four numbers, or none."""
        if isinstance(self.color_jitter, (int, float)):
            return (float(self.color_jitter),) * 3
        return self.color_jitter or ()

    @property
    def hflip_probability(self) -> float:
        """Of a flip left to right, however it is written."""
        return 0.5 if self.flip else self.hflip

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of two classes."""
        return self.cutmix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def changes_colours(self) -> bool:
        """Whether colours are changed, which needs three channels."""
        return self.auto_augment is not None or any(self.jitter)

    @property
    def per_image(self) -> bool:
        """Whether something is drawn for each image alone: all but shift, flips and mixing."""
        return self.scale is not None or self.changes_colours or self.re_prob > 0
