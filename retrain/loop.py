"""From the first step to the last: losses, validations, times, and when to save the state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np

from retrain.checkpoint import TrainState, steps_done
from retrain.evaluate import Evaluation
from retrain.progress import TrainProgress
from space.errors import ConfigError, Diverged, TrialFailed

if TYPE_CHECKING:
    from retrain.train import Trainer

#: The loss is looked at (which waits for the device) once in so many steps, and at an epoch's end.
CHECK_EVERY = 20


class Loop:
    """Takes a trainer's steps to the end.

    Attributes:
        losses: Mean training loss of each epoch, over all workers.
        accuracies: Of the validations at epochs' ends.
        validation: The last one; None once a step was taken after it.
        compile_s: Of the first step.
    """

    def __init__(
        self,
        trainer: Trainer,
        deadline: float | None,
        on_progress: Callable[[TrainProgress], None] | None,
        on_epoch: Callable[[int, float], None] | None = None,
    ) -> None:
        self._trainer = trainer
        self._deadline = deadline
        self._on_progress = on_progress
        self._on_epoch = on_epoch
        self._epoch_losses: list[float | ms.Tensor] = []
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.validation: Evaluation | None = None
        self.compile_s = 0.0
        self._train_s = 0.0
        self._timed_steps = 0

    def images_per_s(self) -> float:
        """Return training images per second of all workers, after the first step's compilation."""
        return self._trainer.global_batch * self._timed_steps / max(self._train_s, 1e-9)

    def run(self, on_state: Callable[[TrainState], None] | None) -> None:
        """Take all steps that are left.

        Raises:
            Diverged: The loss is no number.
            TrialFailed: The deadline passed.
        """
        trainer = self._trainer
        every = trainer.recipe.checkpoints.every_steps
        while trainer.step < trainer.steps:
            self._take_step()
            if trainer.step % trainer.steps_per_epoch == 0:
                wanted = on_state is not None or self._on_epoch is not None
                self._end_epoch(validate=wanted or trainer.step == trainer.steps)
            elif every is None or trainer.step % every:
                continue
            else:
                self._checked()  # no state of a training that diverged takes the last one's place
            if on_state is not None:
                on_state(self._state())

    def _take_step(self) -> None:
        trainer = self._trainer
        started = time.monotonic()
        if self._deadline is not None and started > self._deadline:
            raise TrialFailed(f"time limit reached at step {trainer.step} of {trainer.steps}")
        self.validation = None
        self._epoch_losses.append(trainer.take_step())
        done = trainer.step
        if done == 1 or done % trainer.steps_per_epoch == 0 or (done - 1) % CHECK_EVERY == 0:
            self._report(self._checked(), None)
        self._note_time(time.monotonic() - started)

    def _end_epoch(self, *, validate: bool) -> None:
        workers = self._trainer.workers
        own = np.mean([np.float32(loss) for loss in self._epoch_losses], dtype=np.float32)
        total = workers.sum(np.array([own], np.float32))
        self.losses.append(float(total[0]) / workers.size)
        self._epoch_losses = []
        if validate:
            accuracy = self.validate().top1
            if self._on_epoch is not None:
                self._on_epoch(self._trainer.epoch, accuracy)

    def _checked(self) -> float:
        """The loss of the last step, if it and those since the last look are numbers."""
        first = max(0, len(self._epoch_losses) - CHECK_EVERY)
        step = self._trainer.step - len(self._epoch_losses) + first
        for index in range(first, len(self._epoch_losses)):
            step += 1
            value = float(self._epoch_losses[index])
            if not math.isfinite(value):
                raise Diverged(f"the loss was {value} at step {step}")
            self._epoch_losses[index] = value
        return value

    def _note_time(self, seconds: float) -> None:
        if self.compile_s == 0.0:
            self.compile_s = seconds
        else:
            self._train_s += seconds
            self._timed_steps += 1

    def _report(self, loss: float, accuracy: float | None) -> None:
        if self._on_progress is None:
            return
        trainer = self._trainer
        each = self._train_s / self._timed_steps if self._timed_steps else 0.0
        self._on_progress(
            TrainProgress(
                epoch=(trainer.step - 1) // trainer.steps_per_epoch + 1,
                epochs=trainer.recipe.epochs,
                step=trainer.step,
                steps=trainer.steps,
                loss=loss,
                learning_rate=trainer.learning_rate(trainer.step - 1),
                images_per_s=self.images_per_s(),
                seconds_left=each * (trainer.steps - trainer.step),
                accuracy=accuracy,
            )
        )

    def validate(self) -> Evaluation:
        """Evaluate, report, and note the accuracy of an epoch that has none yet."""
        self.validation = self._trainer.validate()
        if len(self.accuracies) < len(self.losses):
            self.accuracies.append(self.validation.top1)
        self._report(self.losses[-1], self.validation.top1)
        return self.validation

    def _state(self) -> TrainState:
        return TrainState(
            step=self._trainer.step,
            epoch=self._trainer.epoch,
            losses=tuple(self.losses),
            accuracies=tuple(self.accuracies),
            global_batch=self._trainer.global_batch,
            train_images=len(self._trainer.data.train),
            arrays={
                **self._trainer.arrays(),
                "epoch_losses": np.array([float(x) for x in self._epoch_losses], np.float32),
            },
        )

    def restore(self, state: TrainState) -> None:
        """Go on from a state; where the workers' number has changed, from an epoch's end.

        Raises:
            ConfigError: The training images are not as many as they were, or the images of a step
                within an epoch.
        """
        trainer = self._trainer
        images = len(trainer.data.train)
        if state.train_images != images:
            raise ConfigError(
                f"data: must hold the {state.train_images:,} training images that the training"
                f" began with, but holds {images:,}; put them back, or train into another folder."
            )
        within = len(state.arrays["epoch_losses"]) > 0
        if within and state.global_batch != trainer.global_batch:
            raise ConfigError(
                f"the global batch must be {state.global_batch:,}, for the training was stopped"
                f" within an epoch, but got {trainer.global_batch:,}; go on with as many workers"
                " as before."
            )
        trainer.restore(steps_done(state, trainer.global_batch), state.arrays)
        self._epoch_losses = state.arrays["epoch_losses"].tolist()
        self.losses, self.accuracies = list(state.losses), list(state.accuracies)
