"""The one training loop: it serves a child's few epochs and a full retrain.

GRAPH_MODE, with MindSpore's plain value_and_grad and optimizer. Everything random (weights, order,
augmentation, dropout) depends on the seed and the step alone, so that a training can be repeated,
and resumed at any step as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from retrain.checkpoint import TrainState, Weights
from retrain.config import Recipe
from retrain.data import DataSet, class_names, load_data, train_batches
from retrain.distributed import Workers
from retrain.drop_path import DropPathFeatures
from retrain.dropout import drop_path_mask, drop_path_rates, dropout_mask
from retrain.ema import Averages
from retrain.evaluate import Evaluation, evaluate
from retrain.loop import Loop
from retrain.loss_scale import LossScale
from retrain.optimizer import make_optimizer, set_learning_rate
from retrain.progress import TrainProgress
from retrain.schedule import learning_rate
from space.architecture import Architecture
from space.errors import ConfigError, Diverged, TrialFailed
from space.network import MnasNet, build_network, network_weights
from space.records import record
from space.signals import interruptible


@record
class TrainResult:
    """What a training gives.

    Attributes:
        validation: Figures on the validation images after the last epoch.
        losses: Mean training loss of each epoch.
        accuracies: Validation accuracy of each epoch evaluated; the last is `accuracy`.
        steps: Optimizer steps.
        images_per_s: Training images per second of all workers, after the first step's
            compilation.
        compile_s: Of the first step.
        seconds: Of everything.
        weights: Those evaluated: averaged ones if the recipe averages.
        network: The network with these weights.
        data: The data set.
    """

    validation: Evaluation
    losses: list[float]
    accuracies: list[float]
    steps: int
    images_per_s: float
    compile_s: float
    seconds: float
    weights: Weights
    network: Any
    data: Any

    @property
    def accuracy(self) -> float:
        """Top-1 on the validation images after the last epoch, fraction."""
        return self.validation.top1


def prepare_process(threads: int) -> None:
    """Set MindSpore up for this process: GRAPH_MODE, the device it is made for, CPU threads.

    Of several NPUs it takes the one that is visible, or that msrun gives this process. May be
    called again; MindSpore makes its threads at the first computation and keeps them.
    space/depthwise.py reads the same setting for its own.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    ms.set_context(mode=ms.GRAPH_MODE)
    if ms.get_context("device_target") == "CPU":
        ms.set_context(runtime_num_threads=threads)
    else:
        _take_device(ms.get_context("device_target"))


@functools.cache
def _take_device(target: str) -> None:
    """Choose the NPU, once: MindSpore refuses it when it has computed something."""
    ms.set_device(target)


def warm_up(recipe: Recipe, *, threads: int) -> None:
    """Load what every training with a recipe needs, ahead of the first one.

    Raises:
        ConfigError: The data are not on this machine.
    """
    prepare_process(threads)
    class_names(recipe.data)
    if recipe.data.name == "digits":
        load_data(recipe.data, 8, 1)


def train(
    architecture: Architecture,
    recipe: Recipe,
    *,
    seed: int,
    threads: int,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    deadline: float | None = None,
    start: Weights | None = None,
    state: TrainState | None = None,
    on_state: Callable[[TrainState], None] | None = None,
    workers: Workers | None = None,
) -> TrainResult:
    """Train a network with a recipe and evaluate it on the held-out validation images.

    Args:
        architecture: The network; its classes and channels must fit the data set.
        recipe: How to train.
        seed: 0 to 2**32 - 1: of weights, order, augmentation and dropout.
        threads: CPU threads.
        on_progress: Called some times an epoch.
        on_epoch: Called after every epoch with the epochs done, from 1, and the validation
            accuracy, for which every epoch is then validated. What it raises ends the training.
        deadline: time.monotonic() at which to give up.
        start: Weights to start from, by name; those of other names stay random.
        state: Where to go on; None starts anew.
        on_state: Called with the state to go on from after every epoch, and so often within one
            as the recipe's `checkpoints` say.
        workers: The processes that train together; None: this one alone.

    Raises:
        Diverged: The loss, a gradient or a weight became infinite or no number.
        TrialFailed: The deadline passed, or MindSpore cannot compute this network.
        ConfigError: Network and data set do not fit.
    """
    started = time.monotonic()
    try:
        prepare_process(threads)
        data = load_data(
            recipe.data, architecture.resolution, architecture.input_channels, recipe.augment
        )
        trainer = Trainer(
            architecture, recipe, data, seed=seed, threads=threads, start=start, workers=workers
        )
        loop = Loop(trainer, deadline, on_progress, on_epoch)
        if state is not None:
            loop.restore(state)
            for epoch, accuracy in enumerate(state.accuracies, 1):
                if on_epoch is not None:
                    on_epoch(epoch, accuracy)
        with interruptible(), trainer.waited_for():
            loop.run(on_state)
            validation = loop.validation or loop.validate()
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrialFailed(f"MindSpore failed: {reason}", detail=traceback.format_exc()) from error
    return TrainResult(
        validation=validation,
        losses=loop.losses,
        accuracies=loop.accuracies,
        steps=trainer.steps,
        images_per_s=loop.images_per_s(),
        compile_s=loop.compile_s,
        seconds=time.monotonic() - started,
        weights=network_weights(trainer.network),
        network=trainer.network,
        data=data,
    )


def check_fit(
    architecture: Architecture, recipe: Recipe, data: DataSet, global_batch: int
) -> None:
    """Raise unless the network can be trained on the data.

    Raises:
        ConfigError: Other number of classes, too few images for one step, or more frozen stages
            than there are.
    """
    if architecture.classes != len(data.classes):
        raise ConfigError(
            f"classes: the network has {architecture.classes}, but the data set"
            f" {recipe.data.name} has {len(data.classes)}; change one of them."
        )
    if len(data.train) < global_batch:
        raise ConfigError(
            f"batch_size (times accumulate and workers) must be at most the {len(data.train)}"
            f" training images, but got {global_batch}."
        )
    stages = len(architecture.blocks) + 2
    if recipe.frozen_stages > stages:
        raise ConfigError(
            f"frozen_stages must be at most {stages}, the stem, {stages - 2} blocks and the head,"
            f" but got {recipe.frozen_stages}."
        )


# ---------------------------------------------------------------------------- graphs


class _Loss(nn.Cell):  # type: ignore[misc]
    """Network and loss as one graph: cross entropy with label smoothing, masked features."""

    def __init__(
        self, network: MnasNet, label_smoothing: float, drop_path: DropPathFeatures | None = None
    ) -> None:
        # The network's parameters keep their names.
        super().__init__(auto_prefix=False)
        self.network = network
        self.label_smoothing = label_smoothing
        self.drop_path = drop_path

    def construct(
        self,
        images: ms.Tensor,
        labels: ms.Tensor,
        mask: ms.Tensor,
        scale: ms.Tensor | None = None,
        paths: ms.Tensor | None = None,
    ) -> ms.Tensor:
        """Mean loss, times `scale`.

        images (n, channels, size, size), labels (n,) or shares (n, classes), mask (n, head) or
        (1, 1), scale (), paths (n, residual layers).
        """
        if self.drop_path is None:
            features = self.network.features(images)
        else:
            features = self.drop_path(images, paths)
        logits = self.network.classify(features * mask.astype(features.dtype))
        loss = ops.cross_entropy(
            logits.astype(ms.float32), labels, label_smoothing=self.label_smoothing
        )
        return loss if scale is None else loss * scale


class _Sum(nn.Cell):  # type: ignore[misc]
    """Gradients of two passes, added."""

    def __init__(self) -> None:
        super().__init__()
        # Else a tuple of tensors is taken for a constant, and each step compiles anew.
        self.enable_tuple_broaden = True

    def construct(self, first: Any, second: Any) -> Any:
        """Two tuples of gradients -> one."""
        total: Any = ()
        for a, b in zip(first, second):  # noqa: B905  # graphs know no `strict`
            total = (*total, a + b)
        return total


class _Finish(nn.Cell):  # type: ignore[misc]
    """Gradients times a factor, then scaled down to a largest global norm, if there is one."""

    def __init__(self, clip_norm: float | None) -> None:
        super().__init__()
        # Else a tuple of tensors is taken for a constant, and each step compiles anew.
        self.enable_tuple_broaden = True
        self.clip_norm = clip_norm

    def construct(self, gradients: Any, factor: ms.Tensor) -> Any:
        """A tuple of gradients, () -> the same and the square of their norm before clipping."""
        scaled: Any = ()
        square = ms.Tensor(0.0, ms.float32)
        for gradient in gradients:
            scaled = (*scaled, gradient * factor)
            square = square + ops.square(gradient * factor).sum()
        if self.clip_norm is not None:
            scaled = ops.clip_by_global_norm(scaled, self.clip_norm)
        return scaled, square


# ---------------------------------------------------------------------------- steps


class Trainer:
    """One training as a sequence of optimizer steps.

    Attributes:
        network: Of its own for evaluations: once parameters that a compiled training graph holds
            were set from outside, its further steps no longer show in them.
        global_batch: Images per optimizer step, of all workers.
        steps_per_epoch: Optimizer steps; the images that do not fill another one are dropped.
        steps: Of the whole training.
        step: Steps done.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        data: DataSet,
        *,
        seed: int,
        threads: int,
        start: Weights | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.workers = workers or Workers()
        self._seed = seed
        self._threads = threads
        self.global_batch = recipe.batch_size * recipe.accumulate * self.workers.size
        check_fit(architecture, recipe, data, self.global_batch)
        self.steps_per_epoch = len(data.train) // self.global_batch
        self.steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self._batches: Iterator[Any] | None = None
        self._features = architecture.head_filters
        self._path_rates = drop_path_rates(recipe.drop_path, architecture)
        self.network = build_network(architecture, recipe.style, seed=seed)
        self._trained = _trained_network(architecture, recipe, seed)
        if start is not None:
            set_weights(self._trained, {**network_weights(self._trained), **start})
        parameters = list(self._trained.trainable_params())
        self._optimizer = make_optimizer(recipe.optimizer, parameters)
        drop_path = DropPathFeatures(self._trained) if recipe.drop_path else None
        loss = _Loss(self._trained, recipe.label_smoothing, drop_path)
        self._value_and_grad = ms.value_and_grad(loss, None, parameters)
        self._mean = self.workers.gradient_mean(parameters)
        self._loss_scale = LossScale(recipe.precision)
        self._scaled = self._loss_scale.dynamic or self._loss_scale.value != 1
        self._add = _Sum() if recipe.accumulate > 1 else None
        self._finish = None
        if self._scaled or recipe.accumulate > 1 or recipe.clip_norm is not None:
            self._finish = _Finish(recipe.clip_norm)
        self._averages = None
        if recipe.ema_decay is not None:
            self._averages = Averages(list(self._trained.get_parameters()), recipe.ema_decay)

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        return learning_rate(
            self.recipe.schedule,
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.recipe.epochs,
        )

    def take_step(self) -> ms.Tensor:
        """Take the next optimizer step and return this worker's mean loss, not waited for."""
        set_learning_rate(self._optimizer, self.learning_rate(self.step))
        losses, total = [], None
        for index in range(self.recipe.accumulate):
            loss, gradients = self._value_and_grad(*self._inputs(index))
            losses.append(loss / self._loss_scale.value if self._scaled else loss)
            total = gradients if total is None else self._add(total, gradients)  # type: ignore[misc]
        self._update(total)
        if self._averages is not None:
            self._averages.step(self.step)
        self.step += 1
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)

    def _inputs(self, index: int) -> list[ms.Tensor]:
        """The loss's arguments for one of the accumulated passes of the next step."""
        recipe, step, seed = self.recipe, self.step, self._seed
        if self._batches is None or (index == 0 and step % self.steps_per_epoch == 0):
            self._batches = self._epoch_batches()
        images, labels = next(self._batches)
        # A pass's images are rows of the step's, as one process would have them.
        first = (index * self.workers.size + self.workers.rank) * recipe.batch_size
        rows = slice(first, first + recipe.batch_size)
        mask = dropout_mask(
            recipe.dropout, (self.global_batch, self._features), seed=seed, step=step
        )
        arrays: list[NDArray[Any]] = [images, labels, mask[rows] if recipe.dropout else mask]
        if self._scaled or recipe.drop_path:
            arrays.append(np.array(self._loss_scale.value, np.float32))
        if recipe.drop_path:
            paths = drop_path_mask(self._path_rates, self.global_batch, seed=seed, step=step)
            arrays.append(paths[rows])
        return [ms.Tensor(array) for array in arrays]

    def _epoch_batches(self) -> Iterator[Any]:
        """The batches of the epoch that the next step belongs to, from that step on."""
        return train_batches(
            self.data,
            self.recipe.augment,
            batch_size=self.recipe.batch_size,
            seed=self._seed,
            epoch=self.epoch,
            start_batch=self.step % self.steps_per_epoch * self.recipe.accumulate,
            rank=self.workers.rank,
            ranks=self.workers.size,
            workers=self._threads,
        )

    def _update(self, gradients: Any) -> None:
        if self._mean is not None:
            gradients = self._mean(gradients)
        if self._finish is not None:
            factor = 1 / (self._loss_scale.value * self.recipe.accumulate)
            gradients, square = self._finish(gradients, ms.Tensor(factor, ms.float32))
            if self._loss_scale.dynamic:
                finite = math.isfinite(float(square.asnumpy()))
                self._loss_scale.update(finite=finite)
                if not finite:
                    return
        self._optimizer(gradients)

    def validate(self) -> Evaluation:
        """Evaluate on the validation images, with averaged weights if there are any.

        Raises:
            Diverged: A weight or the loss is no number.
        """
        weights = self._with_mean_statistics(
            network_weights(self._trained) if self._averages is None else self._averages.values()
        )
        # ReLU makes 0 of what is no number: a diverged network may still give a finite loss.
        bad = [name for name, value in weights.items() if not np.isfinite(value).all()]
        if bad:
            raise Diverged(f"{bad[0]} was not finite after epoch {self.epoch}")
        set_weights(self.network, weights)
        evaluation = evaluate(
            self.network, self.data, self.data.validation, self.recipe.eval_batch_size,
            self.workers,
        )  # fmt: skip
        if not math.isfinite(evaluation.loss):
            raise Diverged(f"the validation loss was {evaluation.loss} after epoch {self.epoch}")
        return evaluation

    def _with_mean_statistics(self, weights: Weights) -> Weights:
        """The weights with batch-norm statistics of all workers' images, not of this one's."""
        statistics = {name: v for name, v in weights.items() if ".moving_" in name}
        return {**weights, **self.workers.mean_arrays(statistics)}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that the next step depends on, by name; all workers must call it."""
        arrays: dict[str, NDArray[Any]] = self._with_mean_statistics(
            network_weights(self._trained)
        )
        for p in self._optimizer.get_parameters():
            if p.name not in arrays:
                arrays[f"optimizer.{p.name}"] = p.asnumpy().copy()
        if self._averages is not None:
            averages = self._with_mean_statistics(self._averages.values())
            arrays.update({f"ema.{name}": value for name, value in averages.items()})
        arrays["loss_scale"] = np.array(self._loss_scale.state(), np.float64)
        return arrays

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Let MindSpore end the step before an exception leaves, and drops the network.

        It computes gradients while Python goes on. Dropping a network clears its graphs, holding
        the interpreter's lock and waiting for their kernels; those of space/depthwise.py need that
        lock: both would wait for ever.
        """
        try:
            yield
        except BaseException:
            for parameter in self._trained.get_parameters():
                with contextlib.suppress(Exception):  # what the step says is no news any more
                    parameter.asnumpy()
            raise

    def restore(self, step: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Go on after `step` steps from what `arrays` gave."""
        own = {p.name for p in self._trained.get_parameters()}
        set_weights(self._trained, {name: arrays[name] for name in own})
        for p in self._optimizer.get_parameters():
            if p.name not in own:
                p.set_data(ms.Tensor(arrays[f"optimizer.{p.name}"], p.dtype))
        if self._averages is not None:
            self._averages.restore({name: arrays[f"ema.{name}"] for name in own})
        value, good_steps = arrays["loss_scale"].tolist()
        self._loss_scale.restore(value, good_steps)
        self.step = step


def _trained_network(architecture: Architecture, recipe: Recipe, seed: int) -> MnasNet:
    """The network in training mode, with what the recipe freezes, in the recipe's precision."""
    level = recipe.precision.amp_level
    # The CPU kernel of space/depthwise.py computes in float32 only.
    network = build_network(
        architecture, recipe.style, seed=seed, depthwise="auto" if level == "O0" else "native"
    )
    network.set_train(True)
    stages = [network.stem, *network.blocks, network.head]
    for stage in stages[: recipe.frozen_stages]:
        for parameter in stage.get_parameters():
            parameter.requires_grad = False
    for stage in stages if recipe.batch_norm == "frozen" else stages[: recipe.frozen_stages]:
        for _, cell in stage.cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                cell.set_train(False)
    if level != "O0":
        # In place; the classifier's output is cast by the loss.
        ms.amp.auto_mixed_precision(network, level)
    return network


def set_weights(network: nn.Cell, weights: Weights) -> None:
    """Put arrays into a network's parameters; names and shapes must be its own."""
    for parameter in network.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
