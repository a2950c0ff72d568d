"""What a user asks of a training, and the same as the arguments of a command."""

from __future__ import annotations

import os
from pathlib import Path

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
