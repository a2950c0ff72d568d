"""Guided search: models of accuracy and latency choose what is evaluated.

Every proposal draws one function per model from the posteriors (`controller.surrogate`), computes
rewards from them by the objective's own formula, and takes the best new tokens of the whole space:
Thompson sampling (Thompson, 1933; in batches: Kandasamy et al., "Parallelised Bayesian
Optimisation via Thompson Sampling", AISTATS 2018). With many decisions the draws of a posterior
proper wander: what they gain by chance, summed over all decisions, outweighs what is known. So
their deviations from the mean are scaled down, and every other draw is the mean itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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
    one_blas_thread,
)
from controller.surrogate import Surrogate
from controller.tables import Layout, best_first
from space.records import record
from space.tokens import Tokens, uniform_tokens


@record
class GuidedConfig:
    """How bold the search is, and how much it remembers.

    Attributes:
        initial: Proposals that cover the space evenly before the models choose.
        exploration: Scale of the draws' deviations from the posteriors' means; 1 is Thompson
            sampling proper. Every other draw is the means themselves, whatever the scale.
        starts: Climbs per draw, half of them from the best tokens evaluated.
        max_trials: How many trials the models hold. Beyond, they forget every other one of the
            worse half, so that time and memory stay the same.
        latencies_per_trial: How many networks `probe` names per proposal, for a campaign that
            measures latency (or another metric) without a training.
    """

    name: Literal["guided"] = "guided"
    initial: int = 32
    exploration: float = 0.6
    starts: int = 8
    max_trials: int = 1200
    latencies_per_trial: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.initial <= 10_000:
            raise ValueError(f"initial must be in [2, 10000], but got {self.initial!r}")
        if not 0 <= self.exploration <= 10:
            raise ValueError(f"exploration must be in [0, 10], but got {self.exploration!r}")
        if not 2 <= self.starts <= 1000:
            raise ValueError(f"starts must be in [2, 1000], but got {self.starts!r}")
        if not 100 <= self.max_trials <= 10_000:
            raise ValueError(f"max_trials must be in [100, 10000], but got {self.max_trials!r}")
        if not 0 <= self.latencies_per_trial <= 20:
            raise ValueError(
                f"latencies_per_trial must be in [0, 20], but got {self.latencies_per_trial!r}"
            )


class Guided(Controller):
    """Proposes the best tokens of functions drawn from models of all results.

    With a `score`, the accuracy and the metrics on which it depends are modelled; otherwise the
    reward. Outcomes without a reward (stopped, rejected, failed) teach one more model where
    networks complete; their tokens are not proposed again. A reused result is data only if its
    tokens are new to the models. Observed trials are data like its own.

    No tokens are proposed twice before the whole space was: the engine would not evaluate them
    again. That is why noise is dealt with by `recommend` and not by repetitions.
    """

    def __init__(
        self,
        config: GuidedConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        score: Score | None = None,
        metrics_of: MetricsOf | None = None,
    ) -> None:
        """Take over `rng`, which draws the initial tokens; `metrics_of` is not used."""
        self.config = config
        self.num_choices = check_num_choices(num_choices)
        self._rng = rng
        self._layout = Layout(self.num_choices)
        self._surrogate = Surrogate(self._layout, score, config.max_trials)
        self._seen = Seen(self.num_choices)
        self._initial = balanced_tokens(self.num_choices, config.initial, rng)
        self._next_id = 0
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Return initial tokens, then the best of draws; log_prob is 0, there is no policy."""
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

    def update(self, results: Sequence[Result]) -> None:
        """Add results to the models' data; the class says what becomes of each outcome.

        Raises:
            ValueError: A proposal was never made, or its tokens do not fit the space.
        """
        check_results(results, self.num_choices, self._next_id)
        self._learn(results)
        self._diagnostics = {
            "completed": float(len(self._surrogate)),
            "failed": float(self._surrogate.failed),
        }
        rewards = [result.reward for result in results if result.reward is not None]
        if rewards:
            self._diagnostics["mean_reward"] = float(np.mean(rewards))

    def observe(self, results: Sequence[Result]) -> None:
        """Add trials that it did not propose to the models' data.

        Raises:
            ValueError: Tokens do not fit the space.
        """
        for result in results:
            check_tokens(result.proposal.tokens, self.num_choices)
        self._seen.add(result.proposal.tokens for result in results)
        self._learn(results)

    def probe(self, count: int) -> list[Tokens]:
        """Return the best tokens of `count` draws whose metrics it did not ask for before.

        None before the models choose, or if the reward depends on no metric that they know of.
        """
        each = self.config.latencies_per_trial
        if not each or self._next_id < len(self._initial) or not self._surrogate.models_metrics:
            return []
        surrogate, asked = self._surrogate, list[Tokens]()
        with one_blas_thread():
            for candidates in self._draws(self._next_id, count):
                new = (tokens for tokens in candidates if not surrogate.knows_metrics(tokens))
                for tokens in islice(new, each):
                    surrogate.ask_for_metrics(tokens)
                    asked.append(tokens)
        return asked

    def observe_metrics(self, metrics: Sequence[tuple[Tokens, Mapping[str, float]]]) -> None:
        """Add metrics to the models' data.

        Raises:
            ValueError: Tokens do not fit the space.
        """
        for tokens, _ in metrics:
            check_tokens(tokens, self.num_choices)
        self._surrogate.add_metrics(metrics)
        self._fit()

    def recommend(self, count: int) -> list[Tokens]:
        """Return the evaluated tokens for which the models' means give the best rewards.

        Where accuracies are noisy, the best observed reward is a lucky one. None before there are
        two completed trials.
        """
        if len(self._surrogate) < 2:
            return []
        with one_blas_thread():
            one_hot = self._surrogate.one_hot()
            rewards = self._surrogate.value(self._surrogate.mean()(one_hot))
        best = np.argsort(-rewards, kind="stable")[:count]
        return [self._surrogate.tokens[k] for k in best]

    def diagnostics(self) -> dict[str, float]:
        """Return figures after the last update.

        Keys: completed and failed (trials that the models hold), and mean_reward (of the update),
        if there were rewards.
        """
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return all data, the models' scales, the initial tokens, counters and the RNG."""
        return {
            **identity("guided", self.num_choices),
            "initial": self._initial.copy(),
            "surrogate": self._surrogate.state(),
            "seen": self._seen.to_array(),
            "next_id": self._next_id,
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of guided search in the same space.

        Raises:
            ValueError: The state is another controller's or another space's.
        """
        check_identity(state, "guided", self.num_choices)
        set_rng_state(self._rng, state["rng"])
        self._initial = np.array(state["initial"])
        self._surrogate.load_state(state["surrogate"])
        self._seen.load_array(state["seen"])
        self._next_id = int(state["next_id"])
        self._diagnostics = dict(state["diagnostics"])

    def _learn(self, results: Sequence[Result]) -> None:
        self._surrogate.add(results)
        self._fit()

    def _fit(self) -> None:
        if len(self._surrogate) >= 2:
            with one_blas_thread():
                self._surrogate.fit()

    def _chosen(self, n: int) -> list[Tokens]:
        """The best new tokens of `n` draws; random ones where there is nothing to learn from."""
        if len(self._surrogate) < 2 or self._seen.is_whole_space:
            made = [uniform_tokens(self.num_choices, self._rng) for _ in range(n)]
            return [self._seen.fresh(tokens, self._rng) for tokens in made]
        chosen: list[Tokens] = []
        for candidates in self._draws(self._next_id - n, n):
            best = next(candidates)
            if best in self._seen:
                best = next((tokens for tokens in candidates if tokens not in self._seen), best)
            chosen.append(self._seen.fresh(best, self._rng))
        return chosen

    def _draws(self, first: int, n: int) -> Iterator[Iterator[Tokens]]:
        """Good tokens of each of `n` draws, for proposals from the id `first` on, best first."""
        surrogate = self._surrogate
        draws = surrogate.samples(self._scales(first, n), self._rng)
        rewards = surrogate.value(draws(surrogate.one_hot()))  # (n, completed)
        evaluated = np.array(surrogate.tokens)
        for k in range(n):
            order = np.argsort(-rewards[k], kind="stable")[: self.config.starts // 2]
            random = balanced_tokens(self.num_choices, self.config.starts - len(order), self._rng)
            starts = np.concatenate([evaluated[order], random])
            yield best_first(self._layout, draws[:, k], surrogate.value, starts)

    def _scales(self, first: int, n: int) -> NDArray[np.float64]:
        """How far each draw may deviate from the mean: not at all at odd ids, since only what is
        near the means' best can tell which of it is the best.
        """
        even = np.arange(first, first + n) % 2 == 0
        scales: NDArray[np.float64] = self.config.exploration * even
        return scales


def balanced_tokens(
    num_choices: Sequence[int], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return random tokens (count, decisions) with each choice of a decision equally often.

    Choices whose number does not divide `count` differ by one (a Latin hypercube of choices).
    """
    columns = [rng.permutation((np.arange(count) + rng.integers(n)) % n) for n in num_choices]
    rows: NDArray[np.int64] = np.stack(columns, axis=1)
    return rows
