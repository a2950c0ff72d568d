"""The one training loop: it serves a child's few epochs and a full retrain.

GRAPH_MODE, with MindSpore's plain value_and_grad and optimizer. Everything random (weights, order,
augmentation, dropout) depends on the seed and the step alone, so that a training can be repeated,
and resumed at an epoch's end as if it had never stopped.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from retrain.config import Recipe
from retrain.data import DataSet, epoch_order, load_data, train_batch
from retrain.evaluate import Evaluation, evaluate
from retrain.optimizer import Averages, make_optimizer, set_learning_rate
from retrain.schedule import learning_rate
from space.architecture import Architecture
from space.errors import ConfigError, TrialFailed
from space.network import MnasNet, build_network, network_weights
from space.records import record

Weights = dict[str, NDArray[np.float32]]

#: The loss is looked at (which waits for the device) once in so many steps, and at an epoch's end.
CHECK_EVERY = 20


@record
class TrainProgress:
    """How far a training is.

    Attributes:
        epoch: From 1.
        epochs: Of the whole training.
        step: From 1.
        steps: Of the whole training.
        loss: Of the last step looked at.
        learning_rate: Of the last step.
        images_per_s: Since the compilation.
        seconds_left: Estimated.
        accuracy: On the validation images, at an epoch's end.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_s: float
    seconds_left: float
    accuracy: float | None


class TrainState:
    """What a training continues from: weights, optimizer and averages after whole epochs.

    Attributes:
        epoch: Epochs done.
        arrays: Name -> array; optimizer's under `optimizer.`, averages under `ema.`.
        losses: Mean training loss of each epoch done.
        accuracies: Validation accuracy after each epoch done.
    """

    def __init__(
        self,
        epoch: int,
        arrays: dict[str, NDArray[Any]],
        losses: list[float],
        accuracies: list[float],
    ) -> None:
        self.epoch = epoch
        self.arrays = arrays
        self.losses = losses
        self.accuracies = accuracies


class TrainResult:
    """What a training gives.

    Attributes:
        accuracy: Top-1 on the validation images after the last epoch, fraction.
        validation: All figures of that evaluation.
        losses: Mean training loss of each epoch.
        accuracies: Validation accuracy of each epoch evaluated; the last is `accuracy`.
        steps: Optimizer steps.
        images_per_s: Training images per second after the first step's compilation.
        compile_s: Of the first step.
        seconds: Of everything.
        weights: Those evaluated: averaged ones if the recipe averages.
        network: The network with these weights.
        data: The data set.
    """

    def __init__(
        self,
        *,
        validation: Evaluation,
        losses: list[float],
        accuracies: list[float],
        steps: int,
        images_per_s: float,
        compile_s: float,
        seconds: float,
        weights: Weights,
        network: MnasNet,
        data: DataSet,
    ) -> None:
        self.accuracy = validation.top1
        self.validation = validation
        self.losses = losses
        self.accuracies = accuracies
        self.steps = steps
        self.images_per_s = images_per_s
        self.compile_s = compile_s
        self.seconds = seconds
        self.weights = weights
        self.network = network
        self.data = data


class _Loss(nn.Cell):  # type: ignore[misc]
    """Network and loss as one graph: cross entropy with label smoothing, masked features."""

    def __init__(self, network: MnasNet, label_smoothing: float) -> None:
        # The network's parameters keep their names.
        super().__init__(auto_prefix=False)
        self.network = network
        self.label_smoothing = label_smoothing

    def construct(self, images: ms.Tensor, labels: ms.Tensor, mask: ms.Tensor) -> ms.Tensor:
        """(n, channels, size, size), (n,), (n, head) or (1, 1) -> mean loss."""
        logits = self.network.classify(self.network.features(images) * mask)
        return ops.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class _Clip(nn.Cell):  # type: ignore[misc]
    """Gradients scaled down to a largest global norm."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest = largest

    def construct(self, gradients: Any) -> Any:
        """A tuple of gradients -> the same, clipped."""
        return ops.clip_by_global_norm(gradients, self.largest)


def prepare_process(threads: int) -> None:
    """Set MindSpore up for this process: GRAPH_MODE on its default device, so many CPU threads.

    May be called again; MindSpore makes its threads at the first computation and keeps them.
    space/depthwise.py reads the same setting for its own.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    ms.set_context(mode=ms.GRAPH_MODE)
    if ms.context.get_context("device_target") == "CPU":
        ms.set_context(runtime_num_threads=threads)


def warm_up(recipe: Recipe, *, threads: int) -> None:
    """Load what every training with a recipe needs, ahead of the first one."""
    prepare_process(threads)
    if recipe.data.name == "digits":
        load_data(recipe.data, 8, 1)


def train(
    architecture: Architecture,
    recipe: Recipe,
    *,
    seed: int,
    threads: int,
    on_progress: Callable[[TrainProgress], None] | None = None,
    deadline: float | None = None,
    state: TrainState | None = None,
    on_epoch: Callable[[TrainState], None] | None = None,
) -> TrainResult:
    """Train a network with a recipe and evaluate it on the held-out validation images.

    Args:
        architecture: The network; its classes and channels must fit the data set.
        recipe: How to train.
        seed: 0 to 2**32 - 1: of weights, order, augmentation and dropout.
        threads: CPU threads.
        on_progress: Called some times an epoch.
        deadline: time.monotonic() at which to give up.
        state: Where to go on; None starts anew.
        on_epoch: Called after every epoch with the state to go on from.

    Raises:
        TrialFailed: The loss became infinite or no number, the deadline passed, or MindSpore
            cannot compute this network.
        ConfigError: Network and data set do not fit.
    """
    try:
        return _train(architecture, recipe, seed, threads, on_progress, deadline, state, on_epoch)
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrialFailed(f"MindSpore failed: {reason}", detail=traceback.format_exc()) from error


def _train(
    architecture: Architecture,
    recipe: Recipe,
    seed: int,
    threads: int,
    on_progress: Callable[[TrainProgress], None] | None,
    deadline: float | None,
    state: TrainState | None,
    on_epoch: Callable[[TrainState], None] | None,
) -> TrainResult:
    started = time.monotonic()
    prepare_process(threads)
    data = load_data(recipe.data, architecture.resolution, architecture.input_channels)
    check_fit(architecture, recipe, data)
    run = _Run(architecture, recipe, data, seed, deadline, on_progress)
    if state is not None:
        run.restore(state)
    every_epoch = on_epoch is not None
    for epoch in range(run.epoch, recipe.epochs):
        run.train_epoch(epoch)
        if every_epoch or epoch == recipe.epochs - 1:
            run.validate()
        if on_epoch is not None:
            on_epoch(run.state())
    validation = run.validation or run.validate()
    return TrainResult(
        validation=validation,
        losses=run.losses,
        accuracies=run.accuracies,
        steps=run.steps,
        images_per_s=run.images_per_s(),
        compile_s=run.compile_s,
        seconds=time.monotonic() - started,
        weights=run.evaluated_weights(),
        network=run.network,
        data=data,
    )


def check_fit(architecture: Architecture, recipe: Recipe, data: DataSet) -> None:
    """Raise unless the network can be trained on the data.

    Raises:
        ConfigError: Other number of classes, or too few images for one batch.
    """
    if architecture.classes != len(data.classes):
        raise ConfigError(
            f"classes: the network has {architecture.classes}, but the data set"
            f" {recipe.data.name} has {len(data.classes)}; change one of them."
        )
    if len(data.train) < recipe.batch_size:
        raise ConfigError(
            f"batch_size must be at most the {len(data.train)} training images, but got"
            f" {recipe.batch_size}."
        )


class _Run:
    """The moving parts of one training."""

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        data: DataSet,
        seed: int,
        deadline: float | None,
        on_progress: Callable[[TrainProgress], None] | None,
    ) -> None:
        self._recipe = recipe
        self._data = data
        self._seed = seed
        self._deadline = deadline
        self._on_progress = on_progress
        self._trained = build_network(architecture, recipe.style, seed=seed)
        # A network of its own for evaluations: once parameters that a compiled training graph
        # holds were set from outside, its further steps no longer show in them.
        self.network = build_network(architecture, recipe.style, seed=seed)
        parameters = list(self._trained.trainable_params())
        self._optimizer = make_optimizer(recipe.optimizer, parameters)
        self._value_and_grad = ms.value_and_grad(
            _Loss(self._trained, recipe.label_smoothing), None, parameters
        )
        self._clip = None if recipe.clip_norm is None else _Clip(recipe.clip_norm)
        self._averages = None
        if recipe.ema_decay is not None:
            self._averages = Averages(list(self._trained.get_parameters()), recipe.ema_decay)
        self._features = architecture.head_filters
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.epoch = 0
        self._validated = 0
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.validation: Evaluation | None = None
        self.compile_s = 0.0
        self._train_s = 0.0
        self._timed_steps = 0

    @property
    def steps(self) -> int:
        return self._recipe.epochs * self.steps_per_epoch

    def images_per_s(self) -> float:
        return self._recipe.batch_size * self._timed_steps / max(self._train_s, 1e-9)

    def train_epoch(self, epoch: int) -> None:
        recipe, size = self._recipe, self._recipe.batch_size
        self._trained.set_train(True)
        order = epoch_order(len(self._data.train), seed=self._seed, epoch=epoch)
        losses: list[ms.Tensor] = []
        for index in range(self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + index
            started = time.monotonic()
            if self._deadline is not None and started > self._deadline:
                raise TrialFailed(f"time limit reached at step {step} of {self.steps}")
            batch = train_batch(
                self._data,
                order[index * size : (index + 1) * size],
                recipe.augment,
                seed=self._seed,
                step=step,
            )
            losses.append(self._step(step, *batch))
            last = index == self.steps_per_epoch - 1
            if step == 0 or last or step % CHECK_EVERY == 0:
                self._report(epoch, step, self._checked(losses, step), None)
            self._note_time(time.monotonic() - started)
        self.losses.append(float(np.mean([loss.asnumpy() for loss in losses])))
        self.epoch = epoch + 1
        self.validation = None

    def _step(
        self, step: int, images: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> ms.Tensor:
        rate = learning_rate(
            self._recipe.schedule,
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self._recipe.epochs,
        )
        set_learning_rate(self._optimizer, rate)
        shape = (self._recipe.batch_size, self._features)
        mask = dropout_mask(self._recipe.dropout, shape, seed=self._seed, step=step)
        loss, gradients = self._value_and_grad(
            ms.Tensor(images), ms.Tensor(labels), ms.Tensor(mask)
        )
        if self._clip is not None:
            gradients = self._clip(gradients)
        self._optimizer(gradients)
        if self._averages is not None:
            self._averages.step(step)
        return loss

    def _checked(self, losses: list[ms.Tensor], step: int) -> float:
        """The loss of the last step, if it and those since the last look are numbers."""
        recent = losses[-CHECK_EVERY:]
        first = step - len(recent) + 1
        values = [float(loss.asnumpy()) for loss in recent]
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise TrialFailed(f"diverged: the loss was {value} at step {first + offset + 1}")
        return values[-1]

    def _note_time(self, seconds: float) -> None:
        if self.compile_s == 0.0:
            self.compile_s = seconds
        else:
            self._train_s += seconds
            self._timed_steps += 1

    def _report(self, epoch: int, step: int, loss: float, accuracy: float | None) -> None:
        if self._on_progress is None:
            return
        each = self._train_s / self._timed_steps if self._timed_steps else 0.0
        rate = learning_rate(
            self._recipe.schedule,
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self._recipe.epochs,
        )
        self._on_progress(
            TrainProgress(
                epoch=epoch + 1,
                epochs=self._recipe.epochs,
                step=step + 1,
                steps=self.steps,
                loss=loss,
                learning_rate=rate,
                images_per_s=self.images_per_s(),
                seconds_left=each * (self.steps - step - 1),
                accuracy=accuracy,
            )
        )

    def evaluated_weights(self) -> Weights:
        """The weights that are evaluated and kept."""
        return (
            network_weights(self._trained) if self._averages is None else self._averages.values()
        )

    def validate(self) -> Evaluation:
        """Evaluate on the validation images, with averaged weights if there are any."""
        weights = self.evaluated_weights()
        # ReLU makes 0 of what is no number: a diverged network may still give a finite loss.
        bad = [name for name, value in weights.items() if not np.isfinite(value).all()]
        if bad:
            raise TrialFailed(f"diverged: {bad[0]} was not finite after epoch {self.epoch}")
        set_weights(self.network, weights)
        evaluation = evaluate(
            self.network, self._data, self._data.validation, self._recipe.eval_batch_size
        )
        if not math.isfinite(evaluation.loss):
            raise TrialFailed(
                f"diverged: the validation loss was {evaluation.loss} after epoch {self.epoch}"
            )
        self.validation = evaluation
        if self.epoch > self._validated:
            self._validated = self.epoch
            self.accuracies.append(evaluation.top1)
        last = self.epoch * self.steps_per_epoch - 1
        self._report(self.epoch - 1, last, self.losses[-1], evaluation.top1)
        return evaluation

    def state(self) -> TrainState:
        arrays: dict[str, NDArray[Any]] = dict(network_weights(self._trained))
        for p in self._optimizer.get_parameters():
            if p.name not in arrays:
                arrays[f"optimizer.{p.name}"] = p.asnumpy().copy()
        if self._averages is not None:
            arrays.update({f"ema.{n}": value for n, value in self._averages.values().items()})
        return TrainState(self.epoch, arrays, list(self.losses), list(self.accuracies))

    def restore(self, state: TrainState) -> None:
        own = {p.name for p in self._trained.get_parameters()}
        set_weights(self._trained, {name: state.arrays[name] for name in own})
        for p in self._optimizer.get_parameters():
            if p.name not in own:
                value = state.arrays[f"optimizer.{p.name}"]
                p.set_data(ms.Tensor(value, p.dtype))
        if self._averages is not None:
            self._averages.restore({name: state.arrays[f"ema.{name}"] for name in own})
        self.epoch = self._validated = state.epoch
        self.losses, self.accuracies = list(state.losses), list(state.accuracies)


def dropout_mask(
    rate: float, shape: tuple[int, int], *, seed: int, step: int
) -> NDArray[np.float32]:
    """Return dropout's mask of the pooled features: 0, or 1 / (1 - rate) for the kept ones.

    It depends on seed and step alone, so that a resumed training draws the same. A rate of 0 gives
    a single 1, float32 (1, 1).
    """
    if rate == 0:
        return np.ones((1, 1), np.float32)
    kept = np.random.default_rng([seed, 3, step]).random(shape, np.float32) >= rate
    return kept.astype(np.float32) / np.float32(1 - rate)


def set_weights(network: nn.Cell, weights: Weights) -> None:
    """Put arrays into a network's parameters; names and shapes must be its own."""
    for parameter in network.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
