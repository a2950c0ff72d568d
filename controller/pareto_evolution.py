"""Pareto search: several objectives at once, and a front in place of one best network.

Accuracy is maximised; every other objective is a metric, e.g. `latency_ms`, and minimised. What is
to be enlarged is the hypervolume that the front dominates (Zitzler & Thiele, 1998), by random
scalarizations (Zhang & Golovin, "Random Hypervolume Scalarizations for Provable Multi-Objective
Black Box Optimization", ICML 2020): with directions w uniform on the positive part of the sphere,
the expectation of

    max over points y of  min over objectives i of  max(0, y_i - reference_i) / w_i

to the power of the number of objectives is the hypervolume, up to a constant. So every proposal
draws a direction, and one function per objective from Gaussian processes of all results (Thompson
sampling, as in `controller.guided`), and climbs to the best new tokens in that direction from the
best ones of the front. The reference is the worst value of each objective among all results. No
hypervolume has to be computed, whatever the number of objectives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from controller.base import (
    MetricsOf,
    Result,
    Score,
    State,
)
from controller.front import (
    ACCURACY,
    OBJECTIVES,
    best_layers,
    hypervolume,
    non_dominated,
    signs_of,
    spread_out,
)
from controller.gaussian_process import PairwiseProcess
from controller.model_based import ModelBased
from controller.state import (
    check_results,
    one_blas_thread,
    pack_tokens,
    unpack_tokens,
)
from controller.tables import Array, Layout, Tables, Value, best_first, stack
from space.errors import ConfigError
from space.records import record
from space.tokens import Tokens

#: So many proposals of a batch share one draw of functions, each with a direction of its own.
PROPOSALS_PER_DRAW = 4

#: The models' scales are fitted to at most so many trials, anew when there are so many times the
#: trials of the last fit, by so many steps of L-BFGS.
FIT_TRIALS, FIT_GROWTH, FIT_STEPS = 300, 1.5, 30

#: What is taken off a scalarization where networks are not expected to complete.
INFEASIBLE = 1e6


@record
class ParetoConfig:
    """What is wanted, and how bold the search for it is.

    Attributes:
        objectives: `accuracy`, which is maximised, and names of results' metrics, which are
            minimised: `latency_ms`, `parameters`, `macs`, or what a device or an evaluator adds.
        initial: Proposals that cover the space evenly before the models choose.
        exploration: Scale of the draws' deviations from the models' means; every other draw of a
            batch has half of it. 1 is Thompson sampling proper; 0 trusts the means.
        starts: Tokens of the front from which each proposal climbs.
        max_trials: How many trials the models learn from: the front, the front of the rest, and
            so on.
    """

    name: Literal["pareto"] = "pareto"
    objectives: tuple[str, ...] = OBJECTIVES
    initial: int = 32
    exploration: float = 0.4
    starts: int = 4
    max_trials: int = 600

    def __post_init__(self) -> None:
        if not 2 <= len(self.objectives) <= 4 or ACCURACY not in self.objectives:
            raise ValueError(
                f"objectives must be {ACCURACY} and 1 to 3 metrics, but got"
                f" {list(self.objectives)!r}"
            )
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must differ, but got {list(self.objectives)!r}")
        if not 2 <= self.initial <= 10_000:
            raise ValueError(f"initial must be in [2, 10000], but got {self.initial!r}")
        if not 0 <= self.exploration <= 10:
            raise ValueError(f"exploration must be in [0, 10], but got {self.exploration!r}")
        if not 1 <= self.starts <= 1000:
            raise ValueError(f"starts must be in [1, 1000], but got {self.starts!r}")
        if not 100 <= self.max_trials <= 10_000:
            raise ValueError(f"max_trials must be in [100, 10000], but got {self.max_trials!r}")


class Pareto(ModelBased):
    """Proposes tokens that enlarge the front, in random directions; see the module.

    Rewards are not used. Outcomes without a reward (stopped, rejected, failed) are never on the
    front nor climbed from; they teach one more model where networks complete. A result with a
    reward that lacks an objective is nothing to learn from; if the first results all lack one,
    that is an error, for the objective's name must be wrong. A reused result counts if its tokens
    are new. Observed trials are data like its own.

    No tokens are proposed twice. So where accuracies are noisy, the observed `front` is
    optimistic: it prefers the lucky. `recommend` goes by the models' means, in which every result
    has a say.

    Diagnostics: complete (results with all objectives), failed, and once there are complete ones:
    front (its size), and with two or three objectives hypervolume (the part of the box between
    the worst and the best values of all results that the front dominates).
    """

    name = "pareto"

    def __init__(
        self,
        config: ParetoConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        score: Score | None = None,
        metrics_of: MetricsOf | None = None,
    ) -> None:
        """Take over `rng`, which draws the initial tokens; the callables are not used."""
        super().__init__(num_choices, config.initial, rng)
        self.config = config
        self._layout = Layout(self.num_choices)
        self._models = Models(self._layout, config)
        self._values: dict[Tokens, list[float]] = {}  # by objective, as reported
        self._failed: dict[Tokens, None] = {}

    def update(self, results: Sequence[Result]) -> None:
        """Add results to the data; the class says what becomes of each outcome.

        Raises:
            ValueError: A proposal was never made, or its tokens do not fit the space.
            ConfigError: An objective is in none of the first results.
        """
        check_results(results, self.num_choices, self._next_id)
        self._learn(results)
        rewarded = [result for result in results if result.reward is not None]
        if rewarded and not self._values:
            given = sorted(set().union(*(result.metrics for result in rewarded)))
            raise ConfigError(
                f"controller.objectives: results must have {', '.join(self.config.objectives)},"
                f" but their metrics are {', '.join(given) or 'none'}; name some of these."
            )
        self._diagnostics = self._figures()

    def front(self) -> list[tuple[Tokens, dict[str, float]]]:
        """Return the evaluated tokens that no others dominate, and their values by objective.

        Best first in the first objective. The values are those observed: see the class on noise.
        Of tokens with equal values the first evaluated ones stand for all.
        """
        members = list(self._values.items())
        points = self._points()
        (on_front,) = np.nonzero(non_dominated(points))
        order = on_front[np.argsort(-points[on_front, 0], kind="stable")]
        names = self.config.objectives
        return [(members[k][0], dict(zip(names, members[k][1], strict=True))) for k in order]

    def recommend(self, count: int) -> list[Tokens]:
        """Return evaluated tokens that spread over the front of the models' means.

        Each is the one that adds most hypervolume to those before it. None before there are two
        complete results.
        """
        if not self._has_learned():
            return []
        with one_blas_thread():
            tokens, points = self._models.means(self._values, self._failed)
        on_front = non_dominated(points)
        front = points[on_front]
        chosen = spread_out(front, count, reference_of(points)[0])
        members = np.flatnonzero(on_front)
        return [tokens[members[k]] for k in chosen]

    def _has_learned(self) -> bool:
        return len(self._values) >= 2

    def _model_state(self) -> State:
        shape = (len(self._values), len(self.config.objectives))
        return {
            "objectives": list(self.config.objectives),
            "tokens": pack_tokens(self._values, self.num_choices),
            "values": np.array(list(self._values.values()), dtype=np.float64).reshape(shape),
            "failed": pack_tokens(self._failed, self.num_choices),
            "models": self._models.state(),
        }

    def _load_model_state(self, state: State) -> None:
        if tuple(state["objectives"]) != self.config.objectives:
            raise ValueError(
                f"state must be of the objectives {list(self.config.objectives)}, but it is of"
                f" {state['objectives']}"
            )
        rows = unpack_tokens(state["tokens"])
        self._values = dict(zip(rows, state["values"].tolist(), strict=True))
        self._failed = dict.fromkeys(unpack_tokens(state["failed"]))
        self._models.load_state(state["models"])

    def _learn(self, results: Sequence[Result]) -> None:
        for result in results:
            tokens = result.proposal.tokens
            if tokens in self._values:
                continue
            if result.reward is None:
                self._failed[tokens] = None
                continue
            given = {**result.metrics, ACCURACY: result.accuracy}
            values = [given.get(name) for name in self.config.objectives]
            known = [float(value) for value in values if value is not None and np.isfinite(value)]
            if len(known) == len(values):
                self._values[tokens] = known
                self._failed.pop(tokens, None)
        if self._has_learned():
            with one_blas_thread():
                self._models.fit(self._values, self._failed)

    def _points(self) -> Array:
        """The complete results as points of `controller.front`."""
        return oriented(self._values, self.config.objectives)

    def _choose(self, n: int) -> list[Tokens]:
        """The best new tokens of `n` directions."""
        points = self._points()
        on_front = non_dominated(points)
        rows = np.array(list(self._values))[on_front]
        reference, spread = reference_of(points)
        self._models.condition(self._values, self._failed)
        draws = self._models.samples(math.ceil(n / PROPOSALS_PER_DRAW), self._rng)
        one_hot = self._layout.one_hot(rows)
        chosen: list[Tokens] = []
        for k in range(n):  # the draws take turns
            functions = draws[:, k % draws.constant.shape[1]]
            direction = np.abs(self._rng.standard_normal(len(spread)))
            value = self._models.scalarization(reference, spread * direction)
            order = np.argsort(-value(functions(one_hot)), kind="stable")
            candidates = best_first(
                self._layout, functions, value, rows[order[: self.config.starts]]
            )
            best = next(candidates)
            if best in self._seen:
                best = next((tokens for tokens in candidates if tokens not in self._seen), best)
            chosen.append(self._seen.fresh(best, self._rng))
        return chosen

    def _figures(self) -> dict[str, float]:
        figures = {"complete": float(len(self._values)), "failed": float(len(self._failed))}
        if self._values:
            points = self._points()
            front = points[non_dominated(points)]
            figures["front"] = float(len(front))
            if front.shape[1] <= 3:
                worst, spread = reference_of(points)
                figures["hypervolume"] = hypervolume(front, worst) / float(spread.prod())
        return figures


class Models:
    """A Gaussian process per objective, and one of where networks complete once one did not.

    They learn from the best `max_trials` results and from as many of the latest failures. Metrics
    are modelled by their logarithms, if all have one.

    Args:
        layout: Of the space.
        config: The objectives, and how much the models remember.
    """

    def __init__(self, layout: Layout, config: ParetoConfig) -> None:
        self._layout = layout
        self._config = config
        self._count = len(config.objectives)
        self._signs = signs_of(config.objectives)[:, None]
        self._processes = [PairwiseProcess(layout) for _ in range(self._count + 1)]
        self._known: list[PairwiseProcess] = []  # those that were conditioned
        self._in_logs = np.zeros(self._count, dtype=np.bool_)
        self._fitted = 0  # trials, at the last fit

    def fit(self, values: Mapping[Tokens, list[float]], failed: Collection[Tokens]) -> None:
        """Fit the models' scales if there is enough more data than last time."""
        total = len(values) + len(failed)
        if total < FIT_GROWTH * self._fitted:
            return
        for process, (one_hot, y) in zip(
            self._processes, self._data(values, failed), strict=False
        ):
            some = np.linspace(0, len(y) - 1, min(len(y), FIT_TRIALS)).astype(np.int64)
            process.fit(one_hot[some], y[some], FIT_STEPS)
        self._fitted = total

    def condition(self, values: Mapping[Tokens, list[float]], failed: Collection[Tokens]) -> None:
        """Make the models know all data."""
        data = self._data(values, failed)
        self._known = self._processes[: len(data)]
        for process, (one_hot, y) in zip(self._known, data, strict=True):
            process.condition(one_hot, y)

    def samples(self, count: int, rng: np.random.Generator) -> Tables:
        """Return functions drawn from the models, (outputs, count)."""
        scales = self._config.exploration / (1.0 + np.arange(count) % 2)
        return stack([process.samples(scales, rng) for process in self._known])

    def means(
        self, values: Mapping[Tokens, list[float]], failed: Collection[Tokens]
    ) -> tuple[list[Tokens], Array]:
        """Return the tokens of the results learned from and the models' means there, as points."""
        self.condition(values, failed)
        functions = stack([process.mean() for process in self._known[: self._count]])
        tokens = self._kept(values)
        one_hot = self._layout.one_hot(pack_tokens(tokens, self._layout.num_choices))
        return tokens, self._points(functions(one_hot)).T

    def scalarization(self, reference: Array, widths: Array) -> Value:
        """Return what outputs are worth in a direction: the module's formula, without the max."""

        def value(outputs: Array) -> Array:
            flat = outputs.reshape(len(outputs), -1)
            points = self._points(flat[: self._count])
            worth = ((points - reference[:, None]) / widths[:, None]).min(axis=0)
            if len(flat) > self._count:
                worth = worth - INFEASIBLE * (flat[self._count] < 0.5)
            made: Array = worth.reshape(outputs.shape[1:])
            return made

        return value

    def state(self) -> State:
        """Return the models' scales; the data are the controller's."""
        theta = np.array([process.theta for process in self._processes])
        return {"theta": theta, "fitted": self._fitted}

    def load_state(self, state: State) -> None:
        """Become what `state` gave."""
        for process, theta in zip(self._processes, state["theta"], strict=True):
            process.theta = np.array(theta)
        self._fitted = int(state["fitted"])

    def _kept(self, values: Mapping[Tokens, list[float]]) -> list[Tokens]:
        tokens = list(values)
        best = best_layers(oriented(values, self._config.objectives), self._config.max_trials)
        return [tokens[k] for k in best]

    def _data(
        self, values: Mapping[Tokens, list[float]], failed: Collection[Tokens]
    ) -> list[tuple[Array, Array]]:
        """One-hot rows (n, width) and values (n,) that each model learns from."""
        kept = self._kept(values)
        columns = np.array([values[tokens] for tokens in kept]).T
        self._in_logs = (self._signs[:, 0] < 0) & (columns.min(axis=1) > 0)
        one_hot = self._layout.one_hot(pack_tokens(kept, self._layout.num_choices))
        logs = zip(columns, self._in_logs, strict=True)
        data = [(one_hot, np.log(column) if in_log else column) for column, in_log in logs]
        if failed:
            latest = list(failed)[-self._config.max_trials :]
            rows = self._layout.one_hot(pack_tokens(latest, self._layout.num_choices))
            labels = np.repeat([1.0, 0.0], [len(kept), len(latest)])
            data.append((np.concatenate([one_hot, rows]), labels))
        return data

    def _points(self, outputs: Array) -> Array:
        """Outputs (objectives, n), some of them logarithms, as points in columns."""
        values = outputs.copy()
        values[self._in_logs] = np.exp(values[self._in_logs])
        points: Array = self._signs * values
        return points


def oriented(values: Mapping[Tokens, list[float]], objectives: Sequence[str]) -> Array:
    """Return values as points (n, objectives) of `controller.front`."""
    rows = np.array(list(values.values()), dtype=np.float64).reshape(-1, len(objectives))
    points: Array = rows * signs_of(objectives)
    return points


def reference_of(points: Array) -> tuple[Array, Array]:
    """Return the worst values of points (n, objectives), and how far the best ones are from them.

    That is 1 where all values are equal.
    """
    worst = points.min(axis=0)
    spread = points.max(axis=0) - worst
    return worst, np.where(spread > 0, spread, 1.0)
