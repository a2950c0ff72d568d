"""The factor of the loss that keeps float16 gradients from vanishing."""

from __future__ import annotations

from retrain.config import PrecisionConfig
from space.errors import Diverged


class LossScale:
    """A fixed scale, or one that follows the gradients.

    Attributes:
        value: The factor now, at least 1.
        dynamic: Whether it changes.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.value = config.loss_scale
        self.dynamic = config.dynamic
        self._growth_steps = config.growth_steps
        self._good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Take in whether a step's gradients were finite.

        Raises:
            Diverged: They are not even with a scale of 1.
        """
        if not finite:
            if self.value <= 1:
                raise Diverged("a gradient was not finite with a loss scale of 1")
            self.value, self._good_steps = max(1.0, self.value / 2), 0
            return
        self._good_steps += 1
        if self._good_steps == self._growth_steps:
            self.value, self._good_steps = min(2.0**24, self.value * 2), 0

    def state(self) -> tuple[float, int]:
        """Return what `restore` takes."""
        return self.value, self._good_steps

    def restore(self, value: float, good_steps: int) -> None:
        """Go on from what `state` gave."""
        self.value, self._good_steps = float(value), int(good_steps)
