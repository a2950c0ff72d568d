"""Recipe: everything that decides what a training gives, as frozen records with their defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from space.architecture import NetworkStyle
from space.records import apply_overrides, build, find_config, load_yaml, record


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], but got {value!r}")


@record
class DataConfig:
    """A data set and how its training set is split.

    Attributes:
        name: `digits` (scikit-learn's, nothing to download), `fashion_mnist` (a folder with the
            four idx .gz files), `image_folder` (train/<class>/ and val/<class>/ folders).
        path: The folder; none for digits.
        validation_fraction: Share of each class of the *training* set that is held out.
        split_seed: Of the choice of held-out images: the same for all networks of a campaign.
        train_images: Train on so many of the remaining images; None takes all.
    """

    name: Literal["digits", "fashion_mnist", "image_folder"]
    path: str | None = None
    validation_fraction: float = 0.1
    split_seed: int = 0
    train_images: int | None = None

    def __post_init__(self) -> None:
        _require("validation_fraction", self.validation_fraction, 0.001, 0.9)
        _require("split_seed", self.split_seed, 0, 2**63)
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images must be >= 1, but got {self.train_images}")
        if (self.path is None) != (self.name == "digits"):
            given = repr(self.path)
            rule = "must be left out for digits" if self.name == "digits" else "must be a folder"
            raise ValueError(f"path {rule}, but got {given}")


@record
class AugmentConfig:
    """Random changes of training images, drawn anew in every epoch.

    Attributes:
        shift: Largest shift in pixels, each direction; the border is filled with the first pixel
            value of the normalisation (zero).
        flip: Whether images are flipped left to right with probability 1/2.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _require("shift", self.shift, 0, 64)


@record
class OptimizerConfig:
    """How gradients change weights.

    Attributes:
        name: `rmsprop` as TensorFlow has it (epsilon inside the root, the mean square starts at 1)
            or `sgd`.
        momentum: Of both.
        decay: RMSProp's, of the mean square.
        epsilon: RMSProp's.
        nesterov: SGD's.
        weight_decay: Times the weights, added to the gradient.
        decay_norm_and_bias: Whether weight decay is applied to batch norms and biases, too.
    """

    name: Literal["rmsprop", "sgd"] = "rmsprop"
    momentum: float = 0.9
    decay: float = 0.9
    epsilon: float = 1e-3
    nesterov: bool = False
    weight_decay: float = 1e-5
    decay_norm_and_bias: bool = False

    def __post_init__(self) -> None:
        _require("momentum", self.momentum, 0, 1)
        _require("decay", self.decay, 0, 1)
        _require("epsilon", self.epsilon, 1e-12, 10)
        _require("weight_decay", self.weight_decay, 0, 1)
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov must be false unless the optimizer is sgd with a momentum, but got"
                f" {self.name} with momentum {self.momentum}"
            )


@record
class ScheduleConfig:
    """The learning rate over the steps.

    Attributes:
        name: After the warm-up: `cosine` from learning_rate to min_learning_rate, `exponential`
            (times decay_rate every decay_epochs), or `constant`.
        learning_rate: The peak.
        warmup_epochs: Linear from 0.
        min_learning_rate: Where the cosine ends, and a floor of the exponential.
        decay_rate: Of the exponential.
        decay_epochs: Of the exponential.
    """

    name: Literal["cosine", "exponential", "constant"] = "cosine"
    learning_rate: float = 0.01
    warmup_epochs: float = 0.0
    min_learning_rate: float = 0.0
    decay_rate: float = 0.97
    decay_epochs: float = 2.4

    def __post_init__(self) -> None:
        _require("learning_rate", self.learning_rate, 1e-12, 1000)
        _require("warmup_epochs", self.warmup_epochs, 0, 10_000)
        _require("min_learning_rate", self.min_learning_rate, 0, self.learning_rate)
        _require("decay_rate", self.decay_rate, 1e-6, 1)
        _require("decay_epochs", self.decay_epochs, 1e-3, 10_000)


@record
class Recipe:
    """A training: one loop serves the child training and the full retrain.

    Attributes:
        data: The data set.
        epochs: Passes over the training images.
        batch_size: Images per step; a last partial batch of an epoch is dropped.
        eval_batch_size: Images per evaluation step; every image is evaluated once.
        optimizer: How gradients change weights.
        schedule: The learning rate.
        label_smoothing: Share of the target spread over all classes.
        dropout: Share of the pooled features that are zeroed in training.
        ema_decay: Of the moving average of the weights that is evaluated and kept; None: off.
        clip_norm: Largest global norm of the gradient; None: off.
        augment: Random changes of training images.
        style: Padding and batch norm of the network.
    """

    data: DataConfig
    epochs: int
    batch_size: int = 64
    eval_batch_size: int = 256
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    label_smoothing: float = 0.1
    dropout: float = 0.0
    ema_decay: float | None = None
    clip_norm: float | None = None
    augment: AugmentConfig = AugmentConfig()
    style: NetworkStyle = NetworkStyle()

    def __post_init__(self) -> None:
        _require("epochs", self.epochs, 1, 100_000)
        _require("batch_size", self.batch_size, 1, 1_000_000)
        _require("eval_batch_size", self.eval_batch_size, 1, 1_000_000)
        _require("label_smoothing", self.label_smoothing, 0, 0.999)
        _require("dropout", self.dropout, 0, 0.999)
        if self.ema_decay is not None:
            _require("ema_decay", self.ema_decay, 0, 0.999999)
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be > 0, but got {self.clip_norm!r}")


def load_recipe(
    name_or_path: str, overrides: Iterable[str] = (), *, data_dir: str | None = None
) -> Recipe:
    """Return a recipe by shipped name or path, with `key=value` overrides.

    Args:
        name_or_path: See space.records.find_config.
        overrides: Dotted keys and YAML values.
        data_dir: Replaces `data.path`.

    Raises:
        ConfigError: Anything in it is not as this module's records say.
    """
    path = find_config(name_or_path, "retrain")
    values = apply_overrides(load_yaml(path), overrides)
    if data_dir is not None and isinstance(values.get("data"), dict):
        values["data"]["path"] = data_dir
    return build(Recipe, values, where=str(path))
