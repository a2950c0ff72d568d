"""Advantages of results, relative to the moving mean and spread of the rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import Result


class RewardScale:
    """Moving mean and spread of the rewards: what an advantage is relative to.

    Exponential moving averages over *trials*, not over updates, so that `decay` means the same in
    batches of 1 and of 100. A batch enters before its advantages are taken: while the policy
    improves, a mean that lags behind would call almost every trial good.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weight = 0.0  # of all rewards so far; below 1 while few have been seen
        self.mean_sum = 0.0
        self.square_sum = 0.0

    @property
    def mean(self) -> float:
        """The baseline; 0 before the first reward."""
        return self.mean_sum / self.weight if self.weight else 0.0

    @property
    def spread(self) -> float:
        """Square root of the mean squared distance from the mean."""
        return math.sqrt(self.square_sum / self.weight) if self.weight else 0.0

    def advantages(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take note of rewards, (n,), and return their distance from the mean in spreads, (n,)."""
        if not len(rewards):
            return rewards
        keep = self.decay ** len(rewards)
        self.weight = keep * self.weight + (1 - keep)
        self.mean_sum = keep * self.mean_sum + (1 - keep) * float(rewards.mean())
        distance = rewards - self.mean
        self.square_sum = keep * self.square_sum + (1 - keep) * float((distance**2).mean())
        # Equal rewards differ by rounding errors, which must not be blown up to advantages.
        if self.spread <= 1e-9 * max(abs(self.mean), 1e-300):
            return np.zeros_like(rewards)
        return np.asarray(distance / self.spread)

    def advantages_of(self, results: Sequence[Result], failure: float) -> NDArray[np.float64]:
        """Take note of results and return their advantages, (n,): `failure` without a reward."""
        rewards = np.array([r.reward for r in results if r.reward is not None], dtype=np.float64)
        made = np.full(len(results), failure)
        made[[r.reward is not None for r in results]] = self.advantages(rewards)
        return made

    def diagnostics(self, results: Sequence[Result]) -> dict[str, float]:
        """Return what a controller says of the results that it has just learned from.

        Keys: baseline, spread (of rewards), unique_share (of the tokens), mean_reward (if any had
        one).
        """
        found = {
            "baseline": self.mean,
            "spread": self.spread,
            "unique_share": len({r.proposal.tokens for r in results}) / len(results),
        }
        rewards = [r.reward for r in results if r.reward is not None]
        if rewards:
            found["mean_reward"] = float(np.mean(rewards))
        return found

    def state(self) -> dict[str, float]:
        """Return the sums."""
        return {
            "weight": self.weight,
            "mean_sum": self.mean_sum,
            "square_sum": self.square_sum,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave."""
        self.weight = float(state["weight"])
        self.mean_sum = float(state["mean_sum"])
        self.square_sum = float(state["square_sum"])
