"""Toy search spaces whose best tokens are known exactly: helpers of the controllers' tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from controller.base import Controller, Proposal, Result
from controller.registry import BuiltInControllerConfig, make_controller


@dataclass(frozen=True)
class ToySpace:
    """A reward in [0, 1] over tokens: 1 is the best point's, 0 the worst one's.

    Each decision's choice has a utility; choices of the two decisions of each pair in `pairs` have
    one together. The best and the worst value are found exactly by elimination over all points.
    """

    num_choices: tuple[int, ...]
    values: np.ndarray  # (number of points,), in the order of np.ravel_multi_index

    @property
    def size(self) -> int:
        return len(self.values)

    def reward(self, tokens: tuple[int, ...]) -> float:
        return float(self.values[np.ravel_multi_index(tokens, self.num_choices)])


def toy_space(
    seed: int,
    *,
    num_choices: tuple[int, ...] = (3, 4, 5, 3, 4, 5, 3, 4, 5, 3),
    interaction: float = 1.0,
    pairs: int = 9,
) -> ToySpace:
    """Return a space with random utilities, and interactions of `interaction` times their size."""
    rng = np.random.default_rng(seed)
    total = np.zeros(num_choices)
    for d, n in enumerate(num_choices):
        shape = [1] * len(num_choices)
        shape[d] = n
        total = total + rng.normal(size=n).reshape(shape)
    possible = list(itertools.combinations(range(len(num_choices)), 2))
    for k in rng.permutation(len(possible))[:pairs]:
        a, b = possible[k]
        shape = [n if d in (a, b) else 1 for d, n in enumerate(num_choices)]
        total = total + interaction * rng.normal(size=(num_choices[a], num_choices[b])).reshape(
            shape
        )
    values = (total - total.min()) / (total.max() - total.min())
    return ToySpace(num_choices, values.ravel())


def completed(proposal: Proposal, reward: float) -> Result:
    """A completed result with this reward."""
    return Result(proposal, "completed", reward, reward, {})


def best_reward(controller: Controller, space: ToySpace, *, trials: int, batch: int) -> float:
    """The best reward that a controller finds within `trials`, learning after each batch."""
    return max(rewards_of(controller, space.reward, trials=trials, batch=batch))


def rewards_of(
    controller: Controller,
    reward: Callable[[tuple[int, ...]], float],
    *,
    trials: int,
    batch: int,
) -> list[float]:
    """The rewards of `trials` proposals in order, with an update after each batch."""
    rewards: list[float] = []
    while len(rewards) < trials:
        proposals = controller.propose(min(batch, trials - len(rewards)))
        results = [completed(p, reward(p.tokens)) for p in proposals]
        controller.update(results)
        rewards.extend(r.reward for r in results if r.reward is not None)
    return rewards


def best_of_seeds(config: BuiltInControllerConfig, space: ToySpace, seeds: int) -> np.ndarray:
    """The best reward after 300 trials in the default batches of 16, for each seed."""
    return np.array(
        [
            best_reward(
                make_controller(config, space.num_choices, np.random.default_rng(seed)),
                space,
                trials=300,
                batch=16,
            )
            for seed in range(seeds)
        ]
    )
