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
    MetricsOf,
    Result,
    Score,
    State,
)
from controller.model_based import ModelBased, balanced_tokens
from controller.state import (
    check_results,
    check_tokens,
    one_blas_thread,
)
from controller.surrogate import Surrogate
from controller.tables import Layout, best_first
from space.records import record
from space.tokens import Tokens


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


class Guided(ModelBased):
    """Proposes the best tokens of functions drawn from models of all results.

    With a `score`, the accuracy and the metrics on which it depends are modelled; otherwise the
    reward. Outcomes without a reward (stopped, rejected, failed) teach one more model where
    networks complete; their tokens are not proposed again. A reused result is data only if its
    tokens are new to the models. Observed trials are data like its own.

    No tokens are proposed twice: noise is dealt with by `recommend` and not by repetitions.

    Diagnostics: completed and failed (trials that the models hold), and mean_reward (of the
    update), if there were rewards.
    """

    name = "guided"

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
        super().__init__(num_choices, config.initial, rng)
        self.config = config
        self._layout = Layout(self.num_choices)
        self._surrogate = Surrogate(self._layout, score, config.max_trials)

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
        if not self._has_learned():
            return []
        with one_blas_thread():
            one_hot = self._surrogate.one_hot()
            rewards = self._surrogate.value(self._surrogate.mean()(one_hot))
        best = np.argsort(-rewards, kind="stable")[:count]
        return [self._surrogate.tokens[k] for k in best]

    def _has_learned(self) -> bool:
        return len(self._surrogate) >= 2

    def _model_state(self) -> State:
        return {"surrogate": self._surrogate.state()}

    def _load_model_state(self, state: State) -> None:
        self._surrogate.load_state(state["surrogate"])

    def _learn(self, results: Sequence[Result]) -> None:
        self._surrogate.add(results)
        self._fit()

    def _fit(self) -> None:
        if self._has_learned():
            with one_blas_thread():
                self._surrogate.fit()

    def _choose(self, n: int) -> list[Tokens]:
        """The best new tokens of `n` draws."""
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
