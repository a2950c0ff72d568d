"""A training's folder: what is in it, who may write to it, and which training it belongs to.

recipe.yaml and architecture.txt say what was asked; state.safetensors is where a killed training
goes on (removed at the end); model.safetensors and result.json are what came out; best.safetensors
and checkpoints/ hold weights of single epochs, curves/ TensorBoard's files, workers/ what workers
printed, train.log the story.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from retrain.checkpoint import SavedState, TrainState, load_state
from retrain.config import Recipe
from space.architecture import Architecture
from space.errors import ConfigError
from space.log_file import LogFile
from space.records import build, parse_yaml, read_text, record, to_plain

RECIPE, ARCHITECTURE, LOG = "recipe.yaml", "architecture.txt", "train.log"
STATE, RESULT = "state.safetensors", "result.json"
CURVES, EPOCHS, WORKERS = "curves", "checkpoints", "workers"

#: Held by a command that starts workers, until they have ended; the first of them holds the other.
LAUNCH_LOCK = ".launch.lock"


@record
class TrainReport:
    """A finished training; result.json holds it.

    Attributes:
        folder: Where everything is.
        architecture: The network's text.
        architecture_hash: Its identity.
        validation_accuracy: Top-1 on the images held out from the training set, fraction.
        validation_loss: Cross entropy there, nats.
        validation_images: How many.
        losses: Mean training loss of each epoch.
        accuracies: Validation accuracy after each epoch.
        epochs: Passes over the training images.
        steps: Optimizer steps.
        train_images: Images trained on.
        seed: Of weights, order, augmentation and dropout.
        threads: CPU threads of a worker.
        resumed_at_epoch: Epochs that an earlier, killed process had done; workers, global_batch
            and steps are those of the last process, as if it had trained alone.
        images_per_s: Training speed of this process and its fellow workers, without compilation.
        compile_s: Seconds until the first step was done.
        seconds: Of this process's training with everything.
        weights: The checkpoint's name in the folder.
        versions: Package -> version.
        workers: Processes that trained together.
        global_batch: Images per optimizer step, of all workers.
        start: SHA-256 of the checkpoint that it started from; null for random weights.
    """

    folder: str
    architecture: str
    architecture_hash: str
    validation_accuracy: float
    validation_loss: float
    validation_images: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    epochs: int
    steps: int
    train_images: int
    seed: int
    threads: int
    resumed_at_epoch: int
    images_per_s: float
    compile_s: float
    seconds: float
    weights: str
    versions: dict[str, str]
    workers: int = 1
    global_batch: int | None = None
    start: str | None = None


@record
class Plan:
    """All that decides what a training gives.

    Attributes:
        architecture: The network.
        recipe: How to train it.
        seed: Of everything random.
        start: SHA-256 of the checkpoint to start from; None for random weights.
    """

    architecture: Architecture
    recipe: Recipe
    seed: int
    start: str | None

    def described(self) -> dict[str, Any]:
        """Return dotted key -> value of everything that decides what a training gives."""
        return _described(self.architecture.text, self.recipe, self.seed, self.start)


def weights_name(recipe: Recipe, stem: str = "model") -> str:
    """Return the name of a weights file in a training's folder."""
    return f"{stem}.{recipe.checkpoints.format}"


@contextmanager
def claimed(out: Path, lock_name: str = ".lock") -> Iterator[None]:
    """Make the folder and hold a lock of it: the training's own, or `LAUNCH_LOCK`.

    Raises:
        ConfigError: Another process holds it, or it cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / lock_name)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{out}: another process is training into this folder.") from None
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be used as a folder: {error.strerror or error}."
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_used(out: Path, recipe: Recipe) -> None:
    """Raise if a folder holds a finished or unfinished training.

    Raises:
        ConfigError: It does.
    """
    finished = (RESULT, weights_name(recipe))
    # What stopped before its first state, for a mistake in the recipe perhaps, may begin anew; a
    # recipe by itself is somebody's own.
    begun = all((out / name).exists() for name in (RECIPE, ARCHITECTURE, LOG))
    for name in (*finished, STATE, *(() if begun else (RECIPE,))):
        if (out / name).exists():
            what = "a finished" if name in finished else "an unfinished"
            raise ConfigError(
                f"{out}: holds {what} training already ({name}); choose another folder, or go"
                " on with --resume."
            )


def what_is_there(out: Path, plan: Plan) -> tuple[TrainReport | None, TrainState | None]:
    """Return the finished or unfinished training that a folder holds; (None, None) for neither.

    Raises:
        ConfigError: It is another training.
    """
    if (out / RESULT).exists():
        report = load_report(out)
        path = out / RECIPE
        recipe = build(Recipe, parse_yaml(read_text(path), where=str(path)), where=str(path))
        there = _described(report.architecture, recipe, report.seed, report.start)
        _refuse_another(out, there, plan.described())
        return report, None
    if (out / STATE).exists():
        saved: SavedState = load_state(out / STATE)
        there = _described(saved.architecture, saved.recipe, saved.seed, saved.start)
        _refuse_another(out, there, plan.described())
        return None, saved.state
    return None, None


def load_report(out: Path) -> TrainReport:
    """Return the report of a finished training's folder.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    path = out / RESULT
    values = parse_yaml(read_text(path), where=str(path))
    # The folder may have been moved since.
    return build(TrainReport, {**values, "folder": str(out)}, where=str(path))


def _described(architecture: str, recipe: Recipe, seed: int, start: str | None) -> dict[str, Any]:
    plain = {"architecture": architecture, "seed": seed, "start": start, **to_plain(recipe)}
    # The same images may lie in another place; the others name, keep or check what is the same.
    plain["data"].pop("path")
    for key in ("network", "checkpoints", "global_batch"):
        plain.pop(key)
    return _flat(plain)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _refuse_another(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in asked if asked[key] != there.get(key)]
    if differing:
        listed = "; ".join(f"{key} is {there.get(key)!r}, not {asked[key]!r}" for key in differing)
        raise ConfigError(f"{out}: holds another training: {listed}. Choose another folder.")


@contextmanager
def log_file(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Let this room's messages go to a file, too; `tell` hears it if that cannot be written."""
    room = logging.getLogger("retrain")
    handler = LogFile(path, logging.Formatter("%(asctime)s %(levelname)s %(message)s"), tell)
    before = room.level
    room.addHandler(handler)
    room.setLevel(logging.INFO)
    try:
        yield
    finally:
        room.removeHandler(handler)
        room.setLevel(before)
        handler.close()
