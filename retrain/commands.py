"""The retrain room's commands as plain functions: train into a folder, validate, export.

A training's folder holds recipe.yaml and architecture.txt (what was asked), state.safetensors
(where a killed training goes on; removed at the end), model.safetensors and result.json (what came
out), train.log.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from retrain.checkpoint import (
    Checkpoint,
    SavedState,
    Training,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
)
from retrain.config import Recipe, load_recipe
from retrain.data import DataSet, load_data
from space.architecture import Architecture
from space.errors import ConfigError
from space.files import versions, write_atomically
from space.mnasnet import adapt, find_architecture
from space.records import build, did_you_mean, dump_yaml, parse_yaml, read_text, record, to_plain

if TYPE_CHECKING:
    from retrain.export import ExportReport
    from retrain.train import TrainProgress, TrainState

logger = logging.getLogger(__name__)

RECIPE, ARCHITECTURE, LOG = "recipe.yaml", "architecture.txt", "train.log"
STATE, WEIGHTS, RESULT = "state.safetensors", "model.safetensors", "result.json"

#: Export format -> ending of its files.
EXPORT_SUFFIXES = {"onnx": ".onnx", "mindir": ".mindir", "python": ".py"}

_GRAY = ("digits", "fashion_mnist")


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
        threads: CPU threads.
        resumed_at_epoch: Epochs that an earlier, killed process had done.
        images_per_s: Training speed of this process, without compilation.
        compile_s: Seconds until the first step was done.
        seconds: Of this process's training with everything.
        weights: The checkpoint's name in the folder.
        versions: Package -> version.
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


@record
class ValidationReport:
    """How well a checkpoint does on a part of its data set.

    Attributes:
        ckpt_path: The checkpoint.
        split: `validation` or `test`.
        top1: Fraction of images whose class has the highest logit.
        top5: Fraction of images whose class is among the five highest.
        loss: Mean cross entropy, nats.
        images: How many were evaluated, each once.
        per_class_top1: Class -> fraction.
    """

    ckpt_path: str
    split: str
    top1: float
    top5: float
    loss: float
    images: int
    per_class_top1: dict[str, float]


# ---------------------------------------------------------------------------- train


def train_command(
    config: str,
    arch: str,
    *,
    out: Path | None = None,
    resolution: int | None = None,
    data_dir: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainReport:
    """Train a network with a recipe into a folder and return what came out.

    Args:
        config: A recipe by shipped name or path.
        arch: A published network's name, set to the data's classes and channels, or a text form.
        out: The folder; by default runs/retrain-<recipe>-<network>-seed<seed>.
        resolution: Replaces the network's input size in pixels.
        data_dir: Replaces the recipe's `data.path`.
        seed: 0 to 2**32 - 1.
        threads: CPU threads; by default all that this process may use.
        resume: Go on in a folder that holds an unfinished training, after its last whole epoch;
            start anew where there is none; return a finished one's report.
        overrides: `key=value` for the recipe.
        on_progress: Called some times an epoch.

    Raises:
        ConfigError: Bad input, or the folder holds a training and `resume` is not asked for.
        TrialFailed: The training diverged.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed: must be in [0, 2**32), but got {seed}.")
    threads = checked_threads(threads)
    recipe = load_recipe(config, overrides, data_dir=data_dir)
    architecture = network_for(arch, recipe, resolution=resolution)
    if out is None:
        out = Path("runs") / f"retrain-{Path(config).stem}-{architecture.hash[:8]}-seed{seed}"
    with _claimed(out):
        finished, state = _what_is_there(out, architecture, recipe, seed, resume=resume)
        if finished is not None:
            return finished
        write_atomically(out / RECIPE, dump_yaml(recipe).encode())
        write_atomically(out / ARCHITECTURE, (architecture.text + "\n").encode())
        with _log_file(out / LOG):
            return _train_into(out, architecture, recipe, seed, threads, state, on_progress)


def network_for(arch: str, recipe: Recipe, *, resolution: int | None = None) -> Architecture:
    """Return the network that a name or a text form stands for, ready for a recipe's data.

    A text form is taken as it is; a published network gets the data's classes and channels.

    Raises:
        ConfigError: Neither, or it cannot have this resolution.
    """
    architecture = adapt(find_architecture(arch), resolution=resolution)
    if "|" in arch:
        return architecture
    channels = 1 if recipe.data.name in _GRAY else 3
    data = load_data(recipe.data, architecture.resolution, channels)
    return adapt(architecture, classes=len(data.classes), input_channels=channels)


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


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Make the folder and hold its lock."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
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


def _what_is_there(
    out: Path, architecture: Architecture, recipe: Recipe, seed: int, *, resume: bool
) -> tuple[TrainReport | None, SavedState | None]:
    """The finished or unfinished training that a folder holds; (None, None) for neither.

    Raises:
        ConfigError: It holds one, but `resume` is not asked for, or it is another training.
    """
    if not resume:
        for name in (RESULT, WEIGHTS, STATE, RECIPE):
            if (out / name).exists():
                what = "a finished" if name in (RESULT, WEIGHTS) else "an unfinished"
                raise ConfigError(
                    f"{out}: holds {what} training already ({name}); choose another folder, or go"
                    " on with --resume."
                )
        return None, None
    if (out / RESULT).exists():
        report = load_report(out)
        there = _described(report.architecture, _saved_recipe(out), report.seed)
        _refuse_another(out, there, _described(architecture.text, recipe, seed))
        return report, None
    if (out / STATE).exists():
        state = load_state(out / STATE)
        there = _described(state.architecture, state.recipe, state.seed)
        _refuse_another(out, there, _described(architecture.text, recipe, seed))
        return None, state
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


def _saved_recipe(out: Path) -> Recipe:
    path = out / RECIPE
    return build(Recipe, parse_yaml(read_text(path), where=str(path)), where=str(path))


def _described(architecture: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Dotted key -> value of everything that decides what a training gives."""
    plain = {"architecture": architecture, "seed": seed, **to_plain(recipe)}
    # The same images may lie in another place.
    plain["data"].pop("path")
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


def _train_into(
    out: Path,
    architecture: Architecture,
    recipe: Recipe,
    seed: int,
    threads: int,
    saved: SavedState | None,
    on_progress: Callable[[TrainProgress], None] | None,
) -> TrainReport:
    from retrain.train import TrainState, train

    state, done = None, 0
    if saved is not None:
        done = saved.epoch
        state = TrainState(done, saved.arrays, list(saved.losses), list(saved.accuracies))
        logger.info("going on after epoch %d of %d", done, recipe.epochs)

    def keep(state: TrainState) -> None:
        logger.info(
            "epoch %d of %d: loss %.4f, validation accuracy %.4f",
            state.epoch, recipe.epochs, state.losses[-1], state.accuracies[-1],
        )  # fmt: skip
        save_state(
            out / STATE,
            SavedState(
                architecture.text, recipe, seed, state.epoch, tuple(state.losses),
                tuple(state.accuracies), state.arrays,
            ),
        )  # fmt: skip

    logger.info("training %s with seed %d on %d threads", architecture.text, seed, threads)
    try:
        result = train(
            architecture,
            recipe,
            seed=seed,
            threads=threads,
            on_progress=on_progress,
            state=state,
            on_epoch=keep,
        )
    except Exception:
        logger.exception("the training failed")
        raise
    made_by = versions()
    checkpoint = Checkpoint(
        architecture=architecture,
        style=recipe.style,
        normalisation=result.data.normalisation,
        classes=tuple(result.data.classes),
        versions=made_by,
        weights=dict(result.weights),
        training=Training(recipe, seed, recipe.epochs, result.accuracy),
    )
    save_checkpoint(out / WEIGHTS, checkpoint)
    report = TrainReport(
        folder=str(out),
        architecture=architecture.text,
        architecture_hash=architecture.hash,
        validation_accuracy=result.accuracy,
        validation_loss=result.validation.loss,
        validation_images=result.validation.images,
        losses=tuple(result.losses),
        accuracies=tuple(result.accuracies),
        epochs=recipe.epochs,
        steps=result.steps,
        train_images=len(result.data.train),
        seed=seed,
        threads=threads,
        resumed_at_epoch=done,
        images_per_s=result.images_per_s,
        compile_s=result.compile_s,
        seconds=result.seconds,
        weights=WEIGHTS,
        versions=made_by,
    )
    # Last, so that a folder with a result holds all the rest.
    text = json.dumps(to_plain(report), indent=1, allow_nan=False)
    write_atomically(out / RESULT, text.encode())
    (out / STATE).unlink(missing_ok=True)
    logger.info("done: validation accuracy %.4f", result.accuracy)
    return report


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Let this room's messages go to a file, too."""
    room = logging.getLogger("retrain")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = room.level
    room.addHandler(handler)
    room.setLevel(logging.INFO)
    try:
        yield
    finally:
        room.removeHandler(handler)
        room.setLevel(before)
        handler.close()


# ---------------------------------------------------------------------------- validate, export


def validate_command(
    ckpt_path: Path,
    *,
    config: str | None = None,
    split: Literal["validation", "test"] = "validation",
    data_dir: str | None = None,
    threads: int | None = None,
) -> ValidationReport:
    """Evaluate a checkpoint on a part of a data set, by default the one it was trained on.

    Args:
        ckpt_path: The checkpoint, model.safetensors of a training's folder or a converted one.
        config: A recipe by shipped name or path, whose data are taken; the network's style is
            the checkpoint's, whatever the recipe says.
        split: `test` stands apart from all choices: use it once, at the end.
        data_dir: Where the images are, if not where they were.
        threads: CPU threads; by default all that this process may use.

    Raises:
        ConfigError: The checkpoint or the data do not work.
    """
    if split not in ("validation", "test"):
        raise ConfigError(f"--split: must be validation or test, but got {split!r}.")
    threads = checked_threads(threads)
    checkpoint = load_checkpoint(ckpt_path)
    recipe = _recipe_of(checkpoint, ckpt_path, config, data_dir)
    data = _data_of(checkpoint, recipe)
    from retrain.evaluate import evaluate

    network = _network_of(checkpoint, threads)
    found = evaluate(network, data, data.split(split), recipe.eval_batch_size)
    return ValidationReport(
        ckpt_path=str(ckpt_path),
        split=split,
        top1=found.top1,
        top5=found.top5,
        loss=found.loss,
        images=found.images,
        per_class_top1=dict(zip(data.classes, found.per_class_top1, strict=True)),
    )


def export_command(
    ckpt_path: Path,
    out: Path,
    *,
    format: str = "onnx",
    config: str | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> ExportReport:
    """Export a checkpoint, checked against the MindSpore network on the validation images.

    Args:
        ckpt_path: The checkpoint, model.safetensors of a training's folder or a converted one.
        out: The file, with the ending of the format.
        format: `onnx`, `mindir` (with a description beside it, `out` with .json added) or
            `python`, a module that stands alone.
        config: A recipe by shipped name or path, whose data are taken.
        data_dir: Where the images are, if not where they were.
        overwrite: Replace `out` if it is there.
        threads: CPU threads; by default all that this process may use.

    Raises:
        ConfigError: The checkpoint or the data do not work, or `out` is there already.
        MnasError: The export is not the network; nothing is written.
    """
    threads = checked_threads(threads)
    suffix = export_suffix(format)
    if out.suffix != suffix:
        raise ConfigError(f"{out}: must end in {suffix} for the format {format}.")
    for path in (out, out.with_name(out.name + ".json")) if format == "mindir" else (out,):
        if path.is_dir():
            raise ConfigError(f"{path}: must be a file, but it is a folder.")
        if path.exists() and not overwrite:
            raise ConfigError(
                f"{path}: is there already; choose another name, or give --overwrite."
            )
    checkpoint = load_checkpoint(ckpt_path)
    recipe = _recipe_of(checkpoint, ckpt_path, config, data_dir)
    data = _data_of(checkpoint, recipe)
    from retrain.export import export_checkpoint

    return export_checkpoint(
        checkpoint,
        out,
        format=format,
        network=_network_of(checkpoint, threads),
        data=data,
        batch_size=recipe.eval_batch_size,
        threads=threads,
    )


def export_suffix(format: str) -> str:
    """Return the ending of an export format's files.

    Raises:
        ConfigError: There is no such format; names the nearest.
    """
    if format not in EXPORT_SUFFIXES:
        hint = did_you_mean(format, list(EXPORT_SUFFIXES))
        known = hint or f"; must be one of {', '.join(EXPORT_SUFFIXES)}."
        raise ConfigError(f"--format: unknown format {format!r}{known}")
    return EXPORT_SUFFIXES[format]


def _recipe_of(
    checkpoint: Checkpoint, ckpt_path: Path, config: str | None, data_dir: str | None
) -> Recipe:
    """The recipe asked for, or that of the checkpoint's training in the folder asked for.

    Raises:
        ConfigError: Neither is there, or its data cannot lie in a folder.
    """
    if config is not None:
        return load_recipe(config, data_dir=data_dir)
    if checkpoint.training is None:
        raise ConfigError(
            f"{ckpt_path}: holds weights from elsewhere, without a training whose data could be"
            " taken; say which data with --config RECIPE."
        )
    recipe = checkpoint.training.recipe
    if data_dir is None:
        return recipe
    try:
        return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=data_dir))
    except ValueError as error:
        raise ConfigError(f"--data_dir: {error}.") from None


def _data_of(checkpoint: Checkpoint, recipe: Recipe) -> DataSet:
    """A recipe's data set, normalised as the checkpoint says.

    Raises:
        ConfigError: Its classes are not those of the checkpoint.
    """
    network = checkpoint.architecture
    data = copy.copy(load_data(recipe.data, network.resolution, network.input_channels))
    if len(data.classes) != network.classes:
        raise ConfigError(
            f"data: the data set must have as many classes as the network, {network.classes}, but"
            f" has {len(data.classes)}."
        )
    if checkpoint.classes and tuple(data.classes) != checkpoint.classes:
        differing = sorted(set(data.classes) ^ set(checkpoint.classes))[:5]
        raise ConfigError(
            f"data.path: the data set's classes must be those of the checkpoint, but they differ"
            f" in {', '.join(differing) or 'their order'}."
        )
    data.normalisation = checkpoint.normalisation
    return data


def _network_of(checkpoint: Checkpoint, threads: int) -> Any:
    """The MindSpore network with the checkpoint's weights."""
    from retrain.train import prepare_process, set_weights
    from space.network import build_network

    prepare_process(threads)
    network = build_network(checkpoint.architecture, checkpoint.style, seed=0)
    set_weights(network, checkpoint.weights)
    network.set_train(False)
    return network
