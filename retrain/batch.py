"""The global batch: what a learning rate is for, and what it is scaled with."""

from __future__ import annotations

import dataclasses

from retrain.config import Recipe
from space.errors import ConfigError


def fit_batch(recipe: Recipe, workers: int, *, scale_lr: bool) -> tuple[Recipe, str]:
    """Return the recipe for so many workers, and a sentence on the batch.

    Args:
        recipe: Its learning rate is for its `global_batch`, if it names one.
        workers: Processes that train together.
        scale_lr: Whether to scale the learning rate linearly with the global batch (Goyal et al.,
            2017), where that is another one.

    Raises:
        ConfigError: The learning rate cannot be scaled, for the recipe names no global batch.
    """
    batch = recipe.batch_size * recipe.accumulate * workers
    parts = [f"{recipe.batch_size} images"]
    if recipe.accumulate > 1:
        parts.append(f"{recipe.accumulate} accumulated passes")
    if workers > 1:
        parts.append(f"{workers} workers")
    said = f"global batch {batch:,}" + (f" ({' x '.join(parts)})" if len(parts) > 1 else "")
    meant = recipe.global_batch
    if meant is None and scale_lr:
        raise ConfigError(
            "--scale_lr: needs the recipe's global_batch, the one that its learning rate is for;"
            " give global_batch=N."
        )
    if meant is None or meant == batch:
        return recipe, said
    schedule, factor = recipe.schedule, batch / meant
    rate = schedule.learning_rate * factor
    if not scale_lr:
        return recipe, (
            f"warning: {said}, but the learning rate {schedule.learning_rate:g} is for"
            f" {meant:,}; --scale_lr makes it {rate:g}"
        )
    scaled = dataclasses.replace(
        schedule, learning_rate=rate, min_learning_rate=schedule.min_learning_rate * factor
    )
    return (
        dataclasses.replace(recipe, schedule=scaled, global_batch=batch),
        f"{said}; learning rate {schedule.learning_rate:g} for {meant:,} scaled to {rate:g}",
    )
