"""A brief evaluation: a few steps of a training, from which a whole one's time follows.

A training runs in a process of its own: so its peak of memory is known, and a crash is a reason.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from latency.host import resident_bytes
from search.config import (
    CampaignConfig,
    EvaluatorChoice,
    PluginConfig,
    RayConfig,
    RetrainConfig,
    TrainEvaluatorConfig,
)
from search.evaluation import Evaluation, make_evaluator
from search.executor import Job, run_job
from search.trial import Failure
from space.architecture import Architecture
from space.errors import FailureCause
from space.records import record

#: With more held-out images than this, a few steps are validated on so many.
VALIDATION_IMAGES = 512
#: Of the time of a training image, what a held-out one takes: half on a CPU, a third in theory.
EVALUATED = 0.5
#: A process may take so long to load its framework and its data, beside the trial's time limit.
START_LIMIT_S = 180.0


@record
class Brief:
    """What a brief evaluation tells.

    Attributes:
        failure: Why there is nothing else.
        child_s: Seconds of a whole evaluation.
        step_s: Of an optimizer step after the first, where a training was cut to a few.
        accuracy: Only of a whole evaluation.
        metrics: Of the evaluation.
        peak_memory_mb: Of its process; None if it was this one.
        validation_images: Held-out images of a whole training: its accuracy is a share of them.
        cause: Of the failure; `infrastructure`: another try may go well.
    """

    failure: str | None
    child_s: float | None
    step_s: float | None
    accuracy: float | None
    metrics: dict[str, float]
    peak_memory_mb: float | None
    validation_images: int | None = None
    cause: FailureCause | None = None


class Cut(NamedTuple):
    """A training cut short.

    Attributes:
        config: The short one's.
        step_images: Of an optimizer step.
        images_left: Training images that it leaves out, over all epochs, and held-out ones over
            all validations, these counted as EVALUATED.
    """

    config: TrainEvaluatorConfig
    step_images: int
    images_left: float


def evaluate_brief(
    config: CampaignConfig, network: Architecture, seed: int, steps: int | None
) -> Brief:
    """Evaluate a network for a few optimizer steps, where the evaluator trains in steps.

    Args:
        config: Of the campaign.
        network: The network.
        seed: 0 to 2**32 - 1.
        steps: Optimizer steps, 2 at least; None evaluates in full.
    """
    executor = config.executor
    threads, limit_s = os.cpu_count() or 1, 3600.0
    if isinstance(executor, RayConfig):
        threads, limit_s = executor.threads, executor.time_limit_s
    job = Job(0, network, seed)
    if not isinstance(config.evaluator, (TrainEvaluatorConfig, PluginConfig)):
        return _evaluate(config.evaluator, job, threads, limit_s, None)
    stops = config.early_stop is not None
    return _in_a_process(config.evaluator, job, threads, limit_s, steps, each_epoch=stops)


def train_fully(
    config: RetrainConfig,
    network: Architecture,
    seed: int,
    steps: int | None,
    states: Path | None = None,
) -> Brief:
    """Train a network with the full recipe, as the hand-over does: for as long as it takes.

    Args:
        config: What happens to the best networks.
        network: The network.
        seed: 0 to 2**32 - 1.
        steps: Optimizer steps, 2 at least; None trains to the end.
        states: A folder in which a training that is killed leaves what it goes on from.
    """
    threads = config.threads or os.cpu_count() or 1
    kept = None if states is None else str(states.absolute())
    trained = TrainEvaluatorConfig("train", config.recipe, kept)
    return _in_a_process(trained, Job(0, network, seed), threads, math.inf, steps, each_epoch=True)


def _in_a_process(
    config: EvaluatorChoice,
    job: Job,
    threads: int,
    limit_s: float,
    steps: int | None,
    *,
    each_epoch: bool = False,
) -> Brief:
    """An evaluation in a process of its own, which is killed a while after the limit.

    `each_epoch` says that the whole one is validated after each epoch.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_body, args=(sender, config, job, threads, limit_s, steps, each_epoch)
    )
    process.start()
    sender.close()
    try:
        if not receiver.poll(None if math.isinf(limit_s) else limit_s + START_LIMIT_S):
            return _failed(f"time limit of {limit_s:g} s reached; its process was killed")
        brief: Brief = receiver.recv()
        return brief
    except EOFError:
        process.join(10)
        reason = f"its process ended by itself, with status {process.exitcode}"
        return _failed(reason, "infrastructure")
    finally:
        process.kill()
        process.join()


def _body(
    sender: Connection,
    config: EvaluatorChoice,
    job: Job,
    threads: int,
    limit_s: float,
    steps: int | None,
    each_epoch: bool,
) -> None:
    """The process: sends one Brief; what a framework prints is not for the user of a check."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches both processes: the other one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    brief = _evaluate(config, job, threads, limit_s, steps, each_epoch=each_epoch)
    memory = resident_bytes()
    sender.send(replace(brief, peak_memory_mb=memory[1] / 2**20 if memory else None))


def _end_with_parent() -> None:
    """A process whose parent was killed has nobody to tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    parent.join()
    os._exit(1)


def _evaluate(
    config: EvaluatorChoice,
    job: Job,
    threads: int,
    limit_s: float,
    steps: int | None,
    *,
    each_epoch: bool = False,
) -> Brief:
    cut = None
    try:
        if steps is not None and isinstance(config, TrainEvaluatorConfig):
            cut = cut_short(config, job.architecture, steps, each_epoch=each_epoch)
        evaluator = make_evaluator(cut.config if cut else config, threads=threads)
        evaluator.warm_up()
    except Exception as error:
        # As in a trial: whatever a framework raises is this network's line in a table.
        return _failed(f"{type(error).__name__}: {error}", "infrastructure")
    started = time.monotonic()
    outcome = run_job(evaluator, job, limit_s)
    seconds = time.monotonic() - started
    if not isinstance(outcome, Evaluation):
        cause = outcome.cause if isinstance(outcome, Failure) else "architecture"
        return _failed(outcome.reason, cause)
    if cut is None:
        images = _held_out(config, job.architecture)
        return Brief(None, seconds, None, outcome.accuracy, outcome.metrics, None, images)
    pace = outcome.metrics["images_per_s"]
    whole = seconds + cut.images_left / pace
    return Brief(None, whole, cut.step_images / pace, None, outcome.metrics, None)


def _held_out(config: EvaluatorChoice, network: Architecture) -> int | None:
    """Held-out images of a training that was done in this process: they are loaded."""
    from retrain.data import load_data

    if not isinstance(config, TrainEvaluatorConfig):
        return None
    recipe = config.recipe
    data = load_data(recipe.data, network.resolution, network.input_channels, recipe.augment)
    return len(data.validation)


def _failed(reason: str, cause: FailureCause = "architecture") -> Brief:
    return Brief(reason, None, None, None, {}, None, cause=cause)


def cut_short(
    config: TrainEvaluatorConfig, network: Architecture, steps: int, *, each_epoch: bool
) -> Cut | None:
    """Return a training cut to so many steps, or None if it has no more.

    `each_epoch` says that the whole one is validated after each epoch.
    """
    from retrain.data import load_data

    recipe = config.recipe
    data = load_data(recipe.data, network.resolution, network.input_channels, recipe.augment)
    batch = recipe.batch_size * recipe.accumulate
    per_epoch = min(steps, len(data.train) // batch)
    if per_epoch == 0:
        return None  # the evaluation says so
    epochs = math.ceil(steps / per_epoch)
    left = recipe.epochs * (len(data.train) // batch) - epochs * per_epoch
    if left <= 0:
        return None
    images = replace(recipe.data, train_images=per_epoch * batch)
    held_out = len(data.validation)
    if held_out > VALIDATION_IMAGES and len(data.train) >= VALIDATION_IMAGES + per_epoch * batch:
        images = replace(images, validation_images=VALIDATION_IMAGES)
        held_out = VALIDATION_IMAGES
    # Whoever keeps a state to go on from, or may stop a training, validates after each epoch.
    each_epoch = each_epoch or config.checkpoints is not None
    validated = recipe.epochs * len(data.validation) if each_epoch else len(data.validation)
    done = epochs * held_out if config.checkpoints is not None else held_out
    images_left = left * batch + EVALUATED * (validated - done)
    short = replace(recipe, epochs=epochs, data=images)
    return Cut(replace(config, recipe=short), batch, images_left)
