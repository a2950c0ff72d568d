"""Regularized evolution: the oldest die, not the worst.

Real, Aggarwal, Huang & Le, "Regularized Evolution for Image Classifier Architecture Search",
AAAI 2019, algorithm 1. The population holds the latest `population` results. A parent is the best
of `sample_size` members drawn at random; its child differs from it in one decision, or in more if
that child was proposed before. Each result pushes the oldest member out, however good: under
noise, what lasts is not the network that was lucky once but the one whose descendants do well.
"""

from __future__ import annotations

from collections import deque
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
from controller.seen import Seen
from controller.state import (
    check_identity,
    check_num_choices,
    check_results,
    check_tokens,
    identity,
    pack_tokens,
    unpack_tokens,
)
from space.records import record
from space.tokens import Tokens, mutated, uniform_tokens


@record
class EvolutionConfig:
    """How strongly evolution selects.

    Attributes:
        population: Number of members; as many random proposals come first. 100 in the paper.
        sample_size: Members drawn, with replacement, for each parent; 25 in the paper. More
            select more strongly; 1 is a random walk.
    """

    name: Literal["evolution"] = "evolution"
    population: int = 100
    sample_size: int = 25

    def __post_init__(self) -> None:
        if not 1 <= self.population <= 100_000:
            raise ValueError(f"population must be in [1, 100000], but got {self.population!r}")
        if not 1 <= self.sample_size <= self.population:
            raise ValueError(
                f"sample_size must be in [1, population ({self.population})], but got"
                f" {self.sample_size!r}"
            )


class Evolution(Controller):
    """Mutates the best of random samples of its latest results.

    Outcomes without a reward (stopped, rejected, failed) never join the population and are never
    proposed again. A reused result joins like a completed one: its tokens are new to the
    population. Members age in the order in which their results arrive, whichever batch proposed
    them; a batch's children all come from the population as it was before the batch. Observed
    trials with a reward join in the same way and take the place of random first proposals.

    No tokens are proposed twice before the whole space was, not even where a result never came.
    Different tokens may still stand for one network, which the controller cannot know.
    """

    def __init__(
        self,
        config: EvolutionConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        score: Score | None = None,
        metrics_of: MetricsOf | None = None,
    ) -> None:
        """Take over `rng`; `score` and `metrics_of` are not used."""
        self.config = config
        self.num_choices = check_num_choices(num_choices)
        self._rng = rng
        self._next_id = 0
        self._members: deque[tuple[Tokens, float]] = deque(maxlen=config.population)
        self._seen = Seen(self.num_choices)
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Return `n` children, or random tokens at first; log_prob is 0, there is no policy."""
        if n < 1:
            raise ValueError(f"n must be >= 1, but got {n!r}")
        proposals = [Proposal(self._next_id + k, self._child(), 0.0) for k in range(n)]
        self._next_id += n
        return proposals

    def update(self, results: Sequence[Result]) -> None:
        """Let results with a reward join the population.

        Raises:
            ValueError: A proposal was never made, or its tokens do not fit the space.
        """
        check_results(results, self.num_choices, self._next_id)
        self._join(results)
        self._diagnostics = self._figures(results)

    def observe(self, results: Sequence[Result]) -> None:
        """Let trials that it did not propose join the population like its own.

        Raises:
            ValueError: Tokens do not fit the space.
        """
        for result in results:
            check_tokens(result.proposal.tokens, self.num_choices)
        self._seen.add(result.proposal.tokens for result in results)
        self._join(results)

    def diagnostics(self) -> dict[str, float]:
        """Return figures after the last update.

        Keys: members (in the population), mean_reward (of the update, if any trial had one), and
        of the population, if it has members: population_reward (mean) and entropy (nats, mean
        per decision, of how often each choice occurs).
        """
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return the population in its order, all tokens proposed, the counter and the RNG."""
        return {
            **identity("evolution", self.num_choices),
            "members": pack_tokens((tokens for tokens, _ in self._members), self.num_choices),
            "rewards": np.array([reward for _, reward in self._members], dtype=np.float64),
            "seen": self._seen.to_array(),
            "next_id": self._next_id,
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of evolution in the same space.

        Raises:
            ValueError: The state is another controller's or another space's.
        """
        check_identity(state, "evolution", self.num_choices)
        set_rng_state(self._rng, state["rng"])
        members = zip(unpack_tokens(state["members"]), state["rewards"].tolist(), strict=True)
        self._members = deque(members, maxlen=self.config.population)
        self._seen.load_array(state["seen"])
        self._next_id = int(state["next_id"])
        self._diagnostics = dict(state["diagnostics"])

    def _child(self) -> Tokens:
        beginning = len(self._seen) < self.config.population or not self._members
        if beginning or self._seen.is_whole_space:
            tokens = uniform_tokens(self.num_choices, self._rng)
        else:
            tokens = mutated(self._parent(), self.num_choices, self._rng)
        return self._seen.fresh(tokens, self._rng)

    def _parent(self) -> Tokens:
        """The best of `sample_size` members; of equal ones the one drawn first."""
        drawn = self._rng.integers(len(self._members), size=self.config.sample_size)
        sample = [self._members[k] for k in drawn.tolist()]
        return max(sample, key=lambda member: member[1])[0]

    def _join(self, results: Sequence[Result]) -> None:
        self._members.extend(
            (result.proposal.tokens, result.reward)
            for result in results
            if result.reward is not None
        )

    def _figures(self, results: Sequence[Result]) -> dict[str, float]:
        figures = {"members": float(len(self._members))}
        rewards = [result.reward for result in results if result.reward is not None]
        if rewards:
            figures["mean_reward"] = float(np.mean(rewards))
        if self._members:
            tokens = np.array([tokens for tokens, _ in self._members])
            shares = [np.bincount(column) / len(tokens) for column in tokens.T]
            entropies = [-np.sum(p[p > 0] * np.log(p[p > 0])) for p in shares]
            figures["population_reward"] = float(np.mean([r for _, r in self._members]))
            figures["entropy"] = float(np.mean(entropies))
        return figures
