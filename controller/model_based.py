"""What controllers share that propose what models of the results choose."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from controller.base import Controller, Proposal, Result, State, rng_state, set_rng_state
from controller.seen import Seen
from controller.state import (
    check_identity,
    check_num_choices,
    check_tokens,
    identity,
    one_blas_thread,
)
from space.tokens import Tokens, uniform_tokens


class ModelBased(Controller):
    """Covers the space evenly, then proposes what its models choose.

    No tokens are proposed twice before the whole space was: the engine would not evaluate them
    again.

    Args:
        num_choices: Number of choices of each decision.
        initial: Proposals that cover the space evenly.
        rng: Taken over; it draws the initial tokens.
    """

    name: ClassVar[str]

    def __init__(
        self, num_choices: tuple[int, ...], initial: int, rng: np.random.Generator
    ) -> None:
        self.num_choices = check_num_choices(num_choices)
        self._rng = rng
        self._seen = Seen(self.num_choices)
        self._initial = balanced_tokens(self.num_choices, initial, rng)
        self._next_id = 0
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Return initial tokens, then those chosen; log_prob is 0, there is no policy."""
        if n < 1:
            raise ValueError(f"n must be >= 1, but got {n!r}")
        first = self._next_id
        self._next_id += n
        initial = [tuple(row) for row in self._initial[first : self._next_id].tolist()]
        made = [self._seen.fresh(tokens, self._rng) for tokens in initial]
        if len(made) < n:
            with one_blas_thread():
                made.extend(self._chosen(n - len(made)))
        return [Proposal(first + k, tokens, 0.0) for k, tokens in enumerate(made)]

    def observe(self, results: Sequence[Result]) -> None:
        """Add trials that it did not propose to the models' data.

        Raises:
            ValueError: Tokens do not fit the space.
        """
        for result in results:
            check_tokens(result.proposal.tokens, self.num_choices)
        self._seen.add(result.proposal.tokens for result in results)
        self._learn(results)

    def diagnostics(self) -> dict[str, float]:
        """Return figures after the last update; the class says which."""
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return all data, the models' scales, the initial tokens, counters and the RNG."""
        return {
            **identity(self.name, self.num_choices),
            **self._model_state(),
            "initial": self._initial.copy(),
            "seen": self._seen.to_array(),
            "next_id": self._next_id,
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of the same controller in the same space.

        Raises:
            ValueError: The state is another controller's or another space's.
        """
        check_identity(state, self.name, self.num_choices)
        self._load_model_state(state)
        set_rng_state(self._rng, state["rng"])
        self._initial = np.array(state["initial"])
        self._seen.load_array(state["seen"])
        self._next_id = int(state["next_id"])
        self._diagnostics = dict(state["diagnostics"])

    def _chosen(self, n: int) -> list[Tokens]:
        """New tokens; random ones where there is nothing to learn from."""
        if not self._has_learned() or self._seen.is_whole_space:
            made = [uniform_tokens(self.num_choices, self._rng) for _ in range(n)]
            return [self._seen.fresh(tokens, self._rng) for tokens in made]
        return self._choose(n)

    @abstractmethod
    def _has_learned(self) -> bool:
        """Whether the models know enough to choose."""

    @abstractmethod
    def _choose(self, n: int) -> list[Tokens]:
        """Return `n` new tokens that the models choose; one BLAS thread is set."""

    @abstractmethod
    def _learn(self, results: Sequence[Result]) -> None:
        """Add results to the models' data."""

    @abstractmethod
    def _model_state(self) -> State:
        """Return the data and the models' scales."""

    @abstractmethod
    def _load_model_state(self, state: State) -> None:
        """Become what `_model_state` gave.

        Raises:
            ValueError: The state is of something else.
        """


def balanced_tokens(
    num_choices: Sequence[int], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return random tokens (count, decisions) with each choice of a decision equally often.

    Choices whose number does not divide `count` differ by one (a Latin hypercube of choices).
    """
    columns = [rng.permutation((np.arange(count) + rng.integers(n)) % n) for n in num_choices]
    rows: NDArray[np.int64] = np.stack(columns, axis=1)
    return rows
