"""Recipe: everything that decides what a training gives, as frozen records with their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from retrain.data_config import AugmentConfig, DataConfig
from space.architecture import NetworkStyle
from space.records import apply_overrides, build, find_config, load_yaml, record


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], but got {value!r}")


@record
class OptimizerConfig:
    """How gradients change weights.

    Attributes:
        name: `rmsprop` as TensorFlow has it (epsilon inside the root, the mean square starts at
            1), `sgd`, or `adamw` (Loshchilov and Hutter, 2019), with the epsilon beside
            the root of the mean square before its bias is corrected, as TensorFlow has it.
        momentum: RMSProp's and SGD's.
        decay: RMSProp's, of the mean square.
        epsilon: RMSProp's and AdamW's; 0 stands for 1e-3 and 1e-8.
        nesterov: SGD's.
        beta1: AdamW's, of the mean gradient.
        beta2: AdamW's, of the mean square.
        weight_decay: Times the weights, added to the gradient; AdamW takes it off the weights
            themselves, times the learning rate.
        decay_norm_and_bias: Whether weight decay is applied to batch norms and biases, too.
    """

    name: Literal["rmsprop", "sgd", "adamw"] = "rmsprop"
    momentum: float = 0.9
    decay: float = 0.9
    epsilon: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-5
    decay_norm_and_bias: bool = False

    def __post_init__(self) -> None:
        _require("momentum", self.momentum, 0, 1)
        _require("decay", self.decay, 0, 1)
        if self.epsilon == 0:
            object.__setattr__(self, "epsilon", 1e-8 if self.name == "adamw" else 1e-3)
        _require("epsilon", self.epsilon, 1e-12, 10)
        _require("beta1", self.beta1, 0, 0.999999)
        _require("beta2", self.beta2, 0, 0.999999)
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
class PrecisionConfig:
    """In which numbers a step computes; the weights and the optimizer stay float32.

    Attributes:
        amp_level: MindSpore's: `O0` all float32, `O2` float16 but for batch norms, `O3` all
            float16. On a CPU, float16 runs but is no faster.
        loss_scale: The loss is multiplied by it, and the gradients divided; where it changes by
            itself, where it starts. 0 stands for 1, or 2**16 where it changes.
        dynamic: Halve the scale and leave out the step when a gradient is not finite; double it
            after `growth_steps` steps without that.
        growth_steps: Optimizer steps.
    """

    amp_level: Literal["O0", "O2", "O3"] = "O0"
    loss_scale: float = 0.0
    dynamic: bool = False
    growth_steps: int = 2000

    def __post_init__(self) -> None:
        if self.loss_scale == 0:
            object.__setattr__(self, "loss_scale", 2.0**16 if self.dynamic else 1.0)
        _require("loss_scale", self.loss_scale, 1, 2**24)
        _require("growth_steps", self.growth_steps, 1, 1_000_000)


@record
class CheckpointConfig:
    """What a training keeps on the way; none of it changes what comes out.

    Attributes:
        every_steps: Besides every epoch's end, save the state to go on from so often, in optimizer
            steps; None: at epochs' ends only.
        keep_last: Keep the weights of so many last epochs.
        keep_best: Keep the weights of the epoch with the highest validation accuracy.
        format: Of all weights written: `safetensors`, or MindSpore's `ckpt`.
    """

    every_steps: int | None = None
    keep_last: int = 0
    keep_best: bool = True
    format: Literal["safetensors", "ckpt"] = "safetensors"

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            _require("every_steps", self.every_steps, 1, 2**31)
        _require("keep_last", self.keep_last, 0, 100_000)


@record
class NetworkConfig:
    """The network that a recipe is for, where the command line names none.

    Attributes:
        name: A published name or a text form (space.mnasnet.find_architecture).
        width: Multiplier of stem and blocks.
        resolution: Input pixels; None: the network's own.
    """

    name: str
    width: float = 1.0
    resolution: int | None = None

    def __post_init__(self) -> None:
        _require("width", self.width, 0.01, 16)


@record
class Recipe:
    """A training: one loop serves the child training and the full retrain.

    Attributes:
        data: The data set.
        epochs: Passes over the training images.
        batch_size: Images per worker and forward pass; what does not fill a last optimizer step
            of an epoch is dropped.
        accumulate: Forward passes whose gradients are averaged for one optimizer step.
        global_batch: The images per optimizer step, batch_size * accumulate * workers, that the
            learning rate is for; another one is warned of. None: any.
        eval_batch_size: Images per evaluation step; every image is evaluated once.
        optimizer: How gradients change weights.
        schedule: The learning rate.
        label_smoothing: Share of the target spread over all classes.
        dropout: Share of the pooled features that are zeroed in training.
        drop_path: Probability with which a residual layer at the network's end would be left out
            for an image in training; the i-th of n layers is with i / n of it (Huang et al.,
            2016).
        ema_decay: Of the moving average of the weights that is evaluated and kept; None: off.
        clip_norm: Largest global norm of the gradient; None: off.
        precision: Number formats and the scale of the loss.
        batch_norm: `train` normalises with each worker's batch and moves the statistics; `frozen`
            normalises with the statistics and leaves them alone.
        frozen_stages: Of the stem, the blocks and the head, in this order, so many first ones keep
            their weights and statistics.
        network: The network that the recipe is for.
        checkpoints: What is kept on the way.
        augment: Random changes of training images.
        style: Padding and batch norm of the network.
    """

    data: DataConfig
    epochs: int
    batch_size: int = 64
    accumulate: int = 1
    global_batch: int | None = None
    eval_batch_size: int = 256
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    label_smoothing: float = 0.1
    dropout: float = 0.0
    drop_path: float = 0.0
    ema_decay: float | None = None
    clip_norm: float | None = None
    precision: PrecisionConfig = PrecisionConfig()
    batch_norm: Literal["train", "frozen"] = "train"
    frozen_stages: int = 0
    augment: AugmentConfig = AugmentConfig()
    style: NetworkStyle = NetworkStyle()
    network: NetworkConfig | None = None
    checkpoints: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        _require("epochs", self.epochs, 1, 100_000)
        _require("batch_size", self.batch_size, 1, 1_000_000)
        _require("accumulate", self.accumulate, 1, 100_000)
        if self.global_batch is not None:
            _require("global_batch", self.global_batch, 1, 100_000_000)
        _require("eval_batch_size", self.eval_batch_size, 1, 1_000_000)
        _require("label_smoothing", self.label_smoothing, 0, 0.999)
        _require("dropout", self.dropout, 0, 0.999)
        _require("drop_path", self.drop_path, 0, 0.999)
        _require("frozen_stages", self.frozen_stages, 0, 1000)
        if self.ema_decay is not None:
            _require("ema_decay", self.ema_decay, 0, 0.999999)
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be > 0, but got {self.clip_norm!r}")


def load_recipe(
    name_or_path: str, overrides: Iterable[str] = (), *, data_dir: str | None = None
) -> Recipe:
    """Return a recipe by shipped name or path, with `key=value` overrides.

    Where the file names no global batch, its batch_size x accumulate is taken for it.

    Args:
        name_or_path: See space.records.find_config.
        overrides: Dotted keys and YAML values.
        data_dir: Replaces `data.path`.

    Raises:
        ConfigError: Anything in it is not as this module's records say.
    """
    path = find_config(name_or_path, "retrain")
    values = load_yaml(path)
    if "global_batch" not in values:
        # What the file says without overrides and other workers is what its rate is for.
        values["global_batch"] = _batch_of(values)
    values = apply_overrides(values, overrides)
    if data_dir is not None and isinstance(values.get("data"), dict):
        values["data"]["path"] = data_dir
    return build(Recipe, values, where=str(path))


def _batch_of(values: dict[str, Any]) -> int | None:
    """Images of an optimizer step of one process; None where that is not told well."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    size, passes = (values.get(key, defaults[key]) for key in ("batch_size", "accumulate"))
    return size * passes if isinstance(size, int) and isinstance(passes, int) else None
