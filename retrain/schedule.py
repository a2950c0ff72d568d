"""Learning rates step by step, as pure functions."""

from __future__ import annotations

import math

from retrain.config import ScheduleConfig


def warmup_note(config: ScheduleConfig, epochs: int) -> str | None:
    """Return a sentence where the training ends within its warm-up, else None."""
    if config.warmup_epochs < epochs:
        return None
    return (
        f"warning: schedule.warmup_epochs is {config.warmup_epochs:g} and epochs {epochs}: the"
        f" learning rate rises to the end and never falls; shorten the warm-up with the training"
    )


def learning_rate(
    config: ScheduleConfig, step: int, *, steps_per_epoch: int, epochs: int
) -> float:
    """Return the learning rate of a step.

    Warm-up is linear: step s (from 0) of w warm-up steps has (s + 1) / w of the peak. Then, with p
    the share of the remaining steps that is done, in [0, 1):

        cosine       min + (peak - min) * (1 + cos(pi * p)) / 2
        exponential  max(min, peak * decay_rate ** floor(epochs since the warm-up / decay_epochs))
        constant     peak

    Args:
        config: The schedule.
        step: From 0.
        steps_per_epoch: At least 1.
        epochs: Of the whole training.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = step - warmup
    if config.name == "constant":
        return peak
    if config.name == "exponential":
        stairs = math.floor(done / (config.decay_epochs * steps_per_epoch))
        return max(low, peak * config.decay_rate**stairs)
    remaining = max(1, epochs * steps_per_epoch - warmup)
    return low + (peak - low) * (1 + math.cos(math.pi * min(1.0, done / remaining))) / 2
