"""What a user asks of a training, the same as the arguments of a command, and of an export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from space.errors import ConfigError
from space.records import record


@record
class TrainRequest:
    """What a user asks of a training.

    Attributes:
        config: A recipe by shipped name or path.
        arch: A published network's name, which is set to the data's classes and channels, or a
            text form; None: the recipe's network, else the checkpoint's.
        ckpt_path: Weights to start from; None: random ones.
        finetune: Take the checkpoint's network to the classes of the data.
        out: The folder; None: runs/<retrain or finetune>-<recipe>-<network>-seed<seed>.
        resolution: Replaces the network's input size in pixels.
        data_dir: Replaces the recipe's `data.path`.
        seed: 0 to 2**32 - 1, of everything random.
        threads: CPU threads of a worker; None: its share of all that may be used.
        resume: Go on in a folder that holds an unfinished training, where its state was last
            saved; start anew where there is none; return a finished one's report.
        scale_lr: Scale the learning rate with the global batch, where that is not the recipe's.
        tensorboard: Write curves into the folder.
        overrides: `key=value` for the recipe.
    """

    config: str
    arch: str | None = None
    ckpt_path: Path | None = None
    finetune: bool = False
    out: Path | None = None
    resolution: int | None = None
    data_dir: str | None = None
    seed: int = 0
    threads: int | None = None
    resume: bool = False
    scale_lr: bool = False
    tensorboard: bool = False
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed: must be in [0, 2**32), but got {self.seed}.")
        checked_threads(self.threads)
        if self.finetune and self.ckpt_path is None:
            raise ConfigError("--ckpt_path: is missing; name the weights to start from.")

    def arguments(self) -> list[str]:
        """Return the arguments of `python -m retrain` that ask for the same."""
        values = {
            "--config": self.config,
            "--arch": self.arch,
            "--ckpt_path": self.ckpt_path,
            "--out": self.out,
            "--resolution": self.resolution,
            "--data_dir": self.data_dir,
            "--seed": self.seed,
            "--threads": self.threads,
        }
        flags = {
            "--resume": self.resume,
            "--scale_lr": self.scale_lr,
            "--tensorboard": self.tensorboard,
        }
        return [
            "finetune" if self.finetune else "train",
            *(part for key, v in values.items() if v is not None for part in (key, str(v))),
            *(flag for flag, given in flags.items() if given),
            *self.overrides,
        ]


@record
class Int8Request:
    """How an exported ONNX file is to be quantized, and what that may cost.

    Attributes:
        calibration_images: How many training images, drawn at random, show the ranges of the
            activations; all, where there are fewer.
        max_drop: Largest loss of top-1 accuracy on the validation images, fraction.
    """

    calibration_images: int = 256
    max_drop: float = 0.02

    def __post_init__(self) -> None:
        if self.calibration_images < 1:
            raise ConfigError(
                f"--calibration_images: must be >= 1, but got {self.calibration_images}."
            )
        if not 0 <= self.max_drop <= 1:
            raise ConfigError(
                f"--max_drop: must be a fraction in [0, 1], but got {self.max_drop:g}; 0.02 is two"
                " points."
            )


def int8_request(
    asked: bool, calibration_images: int | None, max_drop: float | None
) -> Int8Request | None:
    """Return what `--int8` and the options that go with it ask for; None: float32.

    Raises:
        ConfigError: An option without `--int8`, or out of its range.
    """
    options = {"calibration_images": calibration_images, "max_drop": max_drop}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if asked:
        return Int8Request(**given)
    if given:
        raise ConfigError(f"--{next(iter(given))}: goes with --int8 only; give that, too.")
    return None


def checked_threads(threads: int | None) -> int:
    """Return the number of CPU threads to use: by default all that this process may use.

    Raises:
        ConfigError: Below 1.
    """
    if threads is None:
        return len(os.sched_getaffinity(0))
    if threads < 1:
        raise ConfigError(f"--threads: must be >= 1, but got {threads}.")
    return threads
