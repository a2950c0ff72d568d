"""The retrain room's commands as plain functions: train into a folder, validate, export."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retrain.batch import fit_batch
from retrain.checkpoint import (
    Checkpoint,
    SavedState,
    Training,
    TrainState,
    Weights,
    save_checkpoint,
    save_state,
    steps_done,
)
from retrain.config import Recipe, load_recipe
from retrain.curves import curves
from retrain.data import DataSet, load_data
from retrain.data_config import IMAGE_FILES
from retrain.folder import (
    ARCHITECTURE,
    CURVES,
    EPOCHS,
    LAUNCH_LOCK,
    LOG,
    RECIPE,
    RESULT,
    STATE,
    WORKERS,
    Plan,
    TrainReport,
    claimed,
    load_report,
    log_file,
    refuse_used,
    weights_name,
    what_is_there,
)
from retrain.foreign_weights import open_checkpoint
from retrain.launch import launch, launched_workers, stands_by
from retrain.request import Int8Request, TrainRequest, checked_threads
from retrain.restored import data_of, network_of, recipe_of
from retrain.schedule import warmup_note
from retrain.start import Start, make_start
from space.errors import ConfigError
from space.files import versions, write_atomically
from space.records import did_you_mean, dump_yaml, record, to_plain

if TYPE_CHECKING:
    from retrain.distributed import Workers
    from retrain.export import ExportReport
    from retrain.progress import TrainProgress
    from retrain.train import TrainResult

logger = logging.getLogger(__name__)

#: Export format -> ending of its files.
EXPORT_SUFFIXES = {"onnx": ".onnx", "mindir": ".mindir", "python": ".py"}


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
        confusion_matrix: The picture that was drawn; null if none was asked for.
        onnx: The ONNX file that was evaluated in place of the checkpoint's network; null if none.
        note: Why these images may have been trained on; null where they were held out.
    """

    ckpt_path: str
    split: str
    top1: float
    top5: float
    loss: float
    images: int
    per_class_top1: dict[str, float]
    confusion_matrix: str | None = None
    onnx: str | None = None
    note: str | None = None


# ---------------------------------------------------------------------------- train


def train_command(
    request: TrainRequest,
    *,
    distribute: bool | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainReport | None:
    """Train a network with a recipe into a folder and return what came out.

    With several workers, all call it; it is the first one's to return the report.

    Args:
        request: What to train, and how.
        distribute: Whether a launcher must have started several workers; None: whether it has.
        on_progress: Called some times an epoch, by the first worker.
        on_note: Called with sentences that a user should know, by the first worker.

    Raises:
        ConfigError: Bad input, or the folder holds a training and `resume` is not asked for.
        Diverged: The training diverged.
        TrialFailed: MindSpore cannot compute this network.
    """
    size = 1 if distribute is False else launched_workers()
    if size == 1 and stands_by():
        return None
    threads = request.threads or max(1, checked_threads(None) // size)
    recipe = load_recipe(request.config, request.overrides, data_dir=request.data_dir)
    start = make_start(recipe, request)
    recipe, batch_note = fit_batch(start.recipe, size, scale_lr=request.scale_lr)
    plan = Plan(start.architecture, recipe, request.seed, start.sha256)
    out = _folder(request, plan)
    workers = _joined(threads, distribute) if size > 1 or distribute else None
    first = workers is None or workers.first
    with ExitStack() as stack:
        if first:
            stack.enter_context(claimed(out))
            if not request.resume:
                refuse_used(out, recipe)
        finished, state = what_is_there(out, plan) if request.resume else (None, None)
        if not first:
            if finished is None:
                _train(plan, start, out, threads, workers, state, None)
            return None
        if finished is not None:
            return finished
        write_atomically(out / RECIPE, dump_yaml(recipe).encode())
        write_atomically(out / ARCHITECTURE, (start.architecture.text + "\n").encode())
        stack.enter_context(log_file(out / LOG, on_note or (lambda sentence: None)))
        _note([batch_note, warmup_note(recipe.schedule, recipe.epochs), start.note], on_note)
        shown = [on_progress] if on_progress is not None else []
        if request.tensorboard:
            done = steps_done(state, recipe.batch_size * recipe.accumulate * size)
            shown.append(stack.enter_context(curves(out / CURVES, done=done)))
        return _train(plan, start, out, threads, workers, state, shown)


def _note(sentences: list[str | None], on_note: Callable[[str], None] | None) -> None:
    for sentence in filter(None, sentences):
        logger.info("%s", sentence)
        if on_note is not None:
            on_note(sentence)


def launch_command(
    request: TrainRequest, workers: int, *, on_line: Callable[[str], None]
) -> TrainReport:
    """Train as `train_command` does, in so many processes of this machine that msrun starts.

    Args:
        request: What to train, and how; threads are those of each process.
        workers: How many.
        on_line: Is told what the first one prints; the others' output is in the folder.

    Raises:
        ConfigError: Bad input.
        Diverged: The training diverged.
        Interrupted: It was stopped.
        MnasError: The training failed.
    """
    if workers < 2:
        raise ConfigError(f"--workers: must be >= 2, but got {workers}; leave it out for one.")
    recipe = load_recipe(request.config, request.overrides, data_dir=request.data_dir)
    start = make_start(recipe, request)
    out = _folder(request, Plan(start.architecture, recipe, request.seed, start.sha256))
    threads = request.threads or max(1, checked_threads(None) // workers)
    asked = dataclasses.replace(request, out=out, threads=threads)
    with claimed(out, LAUNCH_LOCK):
        # Before msrun: its workers' old output goes, and that may be of a training that runs.
        with claimed(out):
            if not request.resume:
                refuse_used(out, recipe)
        launch(workers, asked.arguments(), out / WORKERS, on_line)
    return load_report(out)


def _folder(request: TrainRequest, plan: Plan) -> Path:
    if request.out is not None:
        return request.out
    kind = "finetune" if request.finetune else "retrain"
    name = f"{kind}-{Path(request.config).stem}-{plan.architecture.hash[:8]}-seed{plan.seed}"
    return Path("runs") / name


def _joined(threads: int, distribute: bool | None) -> Workers:
    from retrain.distributed import join_workers
    from retrain.train import prepare_process

    prepare_process(threads)
    return join_workers(distribute)


def _train(
    plan: Plan,
    start: Start,
    out: Path,
    threads: int,
    workers: Workers | None,
    state: TrainState | None,
    shown: list[Callable[[TrainProgress], None]] | None,
) -> TrainReport:
    """Train; the first worker, which has a list of whom to show progress, writes the files."""
    from retrain.train import train

    def show(progress: TrainProgress) -> None:
        for one in shown or ():
            one(progress)

    def keep(state: TrainState) -> None:
        if shown is not None:
            _keep(out, plan, state)

    done = state.epoch if state is not None else 0
    logger.info(
        "training %s with seed %d on %d threads from epoch %d on",
        plan.architecture.text, plan.seed, threads, done + 1,
    )  # fmt: skip
    try:
        result = train(
            plan.architecture,
            plan.recipe,
            seed=plan.seed,
            threads=threads,
            on_progress=show,
            start=start.weights,
            state=state,
            on_state=keep,
            workers=workers,
        )
    except Exception:
        logger.exception("the training failed")
        raise
    report = _report(out, plan, result, threads, done, 1 if workers is None else workers.size)
    if shown is not None:
        _save_weights(
            out / report.weights, plan, plan.recipe.epochs, result.accuracy, result.weights,
            result.data,
        )  # fmt: skip
        # Last, so that a folder with a result holds all the rest.
        text = json.dumps(to_plain(report), indent=1, allow_nan=False)
        write_atomically(out / RESULT, text.encode())
        (out / STATE).unlink(missing_ok=True)
        logger.info("done: validation accuracy %.4f", result.accuracy)
    return report


def _keep(out: Path, plan: Plan, state: TrainState) -> None:
    """Save where to go on, and at an epoch's end the weights that the recipe wants kept.

    The state comes last: killed before it, the training goes through the epoch once more and
    writes the same weights again.
    """
    if not len(state.arrays["epoch_losses"]):
        _keep_weights(out, plan, state)
    save_state(
        out / STATE, SavedState(plan.architecture.text, plan.recipe, plan.seed, plan.start, state)
    )


def _keep_weights(out: Path, plan: Plan, state: TrainState) -> None:
    recipe, kept = plan.recipe, plan.recipe.checkpoints
    epoch, accuracy = state.epoch, state.accuracies[-1]
    logger.info(
        "epoch %d of %d: loss %.4f, validation accuracy %.4f",
        epoch, recipe.epochs, state.losses[-1], accuracy,
    )  # fmt: skip
    paths = []
    if kept.keep_best and accuracy > max(state.accuracies[:-1], default=-1.0):
        paths.append(out / weights_name(recipe, "best"))
    if kept.keep_last:
        (out / EPOCHS).mkdir(exist_ok=True)
        paths.append(out / EPOCHS / weights_name(recipe, f"epoch_{epoch:04d}"))
        old = weights_name(recipe, f"epoch_{epoch - kept.keep_last:04d}")
        (out / EPOCHS / old).unlink(missing_ok=True)
    if not paths:
        return
    network = plan.architecture
    data = load_data(recipe.data, network.resolution, network.input_channels, recipe.augment)
    weights = state.evaluated_weights(network)
    for path in paths:
        _save_weights(path, plan, epoch, accuracy, weights, data)


def _save_weights(
    path: Path, plan: Plan, epochs: int, accuracy: float, weights: Weights, data: DataSet
) -> None:
    checkpoint = Checkpoint(
        architecture=plan.architecture,
        style=plan.recipe.style,
        normalisation=data.normalisation,
        classes=tuple(data.classes),
        versions=versions(),
        weights=dict(weights),
        training=Training(plan.recipe, plan.seed, epochs, accuracy),
    )
    save_checkpoint(path, checkpoint)


def _report(
    out: Path, plan: Plan, result: TrainResult, threads: int, done: int, workers: int
) -> TrainReport:
    recipe = plan.recipe
    return TrainReport(
        folder=str(out),
        architecture=plan.architecture.text,
        architecture_hash=plan.architecture.hash,
        validation_accuracy=result.accuracy,
        validation_loss=result.validation.loss,
        validation_images=result.validation.images,
        losses=tuple(result.losses),
        accuracies=tuple(result.accuracies),
        epochs=recipe.epochs,
        steps=result.steps,
        train_images=len(result.data.train),
        seed=plan.seed,
        threads=threads,
        resumed_at_epoch=done,
        images_per_s=result.images_per_s,
        compile_s=result.compile_s,
        seconds=result.seconds,
        weights=weights_name(recipe),
        versions=versions(),
        workers=workers,
        global_batch=recipe.batch_size * recipe.accumulate * workers,
        start=plan.start,
    )


# ---------------------------------------------------------------------------- validate, export


def validate_command(
    ckpt_path: Path,
    *,
    config: str | None = None,
    split: Literal["validation", "test"] | None = None,
    data_dir: str | None = None,
    confusion_matrix: Path | None = None,
    threads: int | None = None,
    onnx: Path | None = None,
) -> ValidationReport:
    """Evaluate a checkpoint on a part of a data set, by default the one it was trained on.

    Args:
        ckpt_path: The checkpoint, model.safetensors of a training's folder, or weights of another
            framework (see retrain.foreign_weights.open_checkpoint).
        config: A recipe by shipped name or path, whose data are taken; the network's style is
            the checkpoint's, whatever the recipe says.
        split: `validation` for weights that were trained here, by default: images held out from
            the training set. `test` stands apart from all choices: use it once, at the end. It is
            the default for weights from elsewhere, which nobody held our images out from.
        data_dir: Where the images are, if not where they were.
        confusion_matrix: Draw which class was taken for which into this PNG file.
        threads: CPU threads; by default all that this process may use.
        onnx: An export of the checkpoint, evaluated in its place by ONNX Runtime.

    Raises:
        ConfigError: The checkpoint, the export or the data do not work.
    """
    if confusion_matrix is not None and confusion_matrix.suffix != ".png":
        raise ConfigError(f"--confusion_matrix: must end in .png, but got {confusion_matrix}.")
    if split not in ("validation", "test", None):
        raise ConfigError(f"--split: must be validation or test, but got {split!r}.")
    if confusion_matrix is not None:
        # Before the evaluation, which takes its time.
        confusion_matrix.parent.mkdir(parents=True, exist_ok=True)
    threads = checked_threads(threads)
    checkpoint = open_checkpoint(ckpt_path)
    if split is None:
        split = "test" if checkpoint.training is None else "validation"
    recipe = recipe_of(checkpoint, ckpt_path, config, data_dir)
    data = data_of(checkpoint, recipe)
    from retrain.evaluate import evaluation_of, logits_of

    images, labels = data.split(split), data.split(split).labels
    if onnx is None:
        network = network_of(checkpoint, threads)
        logits = logits_of(network, data, images, recipe.eval_batch_size)
    else:
        from retrain.export import exported_logits

        logits = exported_logits(
            onnx, checkpoint, data, images, recipe.eval_batch_size, threads=threads
        )
    found = evaluation_of(logits, labels)
    if confusion_matrix is not None:
        from retrain.confusion import confusion_png, count_confusions

        counts = count_confusions(labels, logits.argmax(axis=1), len(data.classes))
        write_atomically(confusion_matrix, confusion_png(counts, data.classes))
    return ValidationReport(
        ckpt_path=str(ckpt_path),
        split=split,
        top1=found.top1,
        top5=found.top5,
        loss=found.loss,
        images=found.images,
        per_class_top1=dict(zip(data.classes, found.per_class_top1, strict=True)),
        confusion_matrix=None if confusion_matrix is None else str(confusion_matrix),
        onnx=None if onnx is None else str(onnx),
        note=_seen_note(checkpoint, recipe) if split == "validation" else None,
    )


def _seen_note(checkpoint: Checkpoint, recipe: Recipe) -> str | None:
    """Why a recipe's validation images may be among those that the weights were trained on."""
    if checkpoint.training is None:
        return "these weights come from elsewhere: they may have been trained on these images"
    theirs, ours = checkpoint.training.recipe.data, recipe.data
    # The same images in the same order, as files or packed.
    name = ours.name if {theirs.name, ours.name} <= set(IMAGE_FILES) else theirs.name
    if dataclasses.replace(theirs, path=ours.path, name=name) == ours:
        return None
    return (
        "the recipe holds out other images than this training did: some may have been trained on"
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
    int8: Int8Request | None = None,
) -> ExportReport:
    """Export a checkpoint, checked against the MindSpore network on the validation images.

    Args:
        ckpt_path: The checkpoint, model.safetensors of a training's folder, or weights of another
            framework (see retrain.foreign_weights.open_checkpoint).
        out: The file, with the ending of the format.
        format: `onnx`, `mindir` (with a description beside it, `out` with .json added) or
            `python`, a module that stands alone.
        config: A recipe by shipped name or path, whose data are taken.
        data_dir: Where the images are, if not where they were.
        overwrite: Replace `out` if it is there.
        threads: CPU threads; by default all that this process may use.
        int8: Quantize the ONNX file; None leaves it float32.

    Raises:
        ConfigError: The checkpoint or the data do not work, `out` is there already, or int8 is not
            for that format.
        MnasError: The export is not the network, or int8 costs too much accuracy; nothing is
            written.
    """
    threads = checked_threads(threads)
    suffix = export_suffix(format)
    if int8 is not None and format != "onnx":
        raise ConfigError(
            f"--int8: must be with --format onnx, but got {format}, which is written in float32"
            " only; leave --int8 out, or give --format onnx."
        )
    if out.suffix != suffix:
        raise ConfigError(f"{out}: must end in {suffix} for the format {format}.")
    for path in (out, out.with_name(out.name + ".json")) if format == "mindir" else (out,):
        if path.is_dir():
            raise ConfigError(f"{path}: must be a file, but it is a folder.")
        if path.exists() and not overwrite:
            raise ConfigError(
                f"{path}: is there already; choose another name, or give --overwrite."
            )
    checkpoint = open_checkpoint(ckpt_path)
    recipe = recipe_of(checkpoint, ckpt_path, config, data_dir)
    data = data_of(checkpoint, recipe)
    if recipe.data.name in IMAGE_FILES:
        crop = recipe.augment.crop_pct, recipe.augment.interpolation
        checkpoint = dataclasses.replace(checkpoint, crop=crop)
    from retrain.export import export_checkpoint

    return export_checkpoint(
        checkpoint,
        out,
        format=format,
        network=network_of(checkpoint, threads),
        data=data,
        batch_size=recipe.eval_batch_size,
        threads=threads,
        int8=int8,
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
