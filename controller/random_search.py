"""Random search: every proposal uniform over tokens; the baseline to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from controller.base import (
    Controller,
    MetricsOf,
    Proposal,
    Result,
    Score,
    State,
    rng_state,
    set_rng_state,
)
from controller.state import check_identity, check_num_choices, check_tokens, identity
from space.records import record


@record
class RandomConfig:
    """Random search has nothing to set."""

    name: Literal["random"] = "random"


class RandomSearch(Controller):
    """Draws tokens uniformly and independently; networks may repeat.

    Results are not learned from, whatever their outcome; `diagnostics` shows the mean of the last
    batch's rewards.
    """

    def __init__(
        self,
        config: RandomConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        score: Score | None = None,
        metrics_of: MetricsOf | None = None,
    ) -> None:
        """Take over `rng`; `score` and `metrics_of` are not used."""
        self.num_choices = check_num_choices(num_choices)
        self._rng = rng
        self._next_id = 0
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Return `n` uniform proposals; each log-probability is -sum(log(number of choices))."""
        if n < 1:
            raise ValueError(f"n must be >= 1, but got {n!r}")
        log_prob = -float(np.sum(np.log(self.num_choices)))
        drawn = self._rng.integers(0, self.num_choices, size=(n, len(self.num_choices)))
        first = self._next_id
        self._next_id += n
        return [
            Proposal(first + k, tuple(tokens), log_prob) for k, tokens in enumerate(drawn.tolist())
        ]

    def update(self, results: Sequence[Result]) -> None:
        """Learn nothing."""
        for result in results:
            check_tokens(result.proposal.tokens, self.num_choices)
        rewards = [result.reward for result in results if result.reward is not None]
        self._diagnostics = {"entropy": float(np.mean(np.log(self.num_choices)))}
        if rewards:
            self._diagnostics["mean_reward"] = float(np.mean(rewards))

    def observe(self, results: Sequence[Result]) -> None:
        """Learn nothing."""

    def diagnostics(self) -> dict[str, float]:
        """Return `entropy` (nats, mean per decision; constant) and `mean_reward`, if any."""
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return the counter of proposals and the RNG."""
        return {
            **identity("random", self.num_choices),
            "next_id": self._next_id,
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of random search in the same space."""
        check_identity(state, "random", self.num_choices)
        set_rng_state(self._rng, state["rng"])
        self._next_id = int(state["next_id"])
        self._diagnostics = dict(state["diagnostics"])
