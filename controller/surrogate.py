"""Surrogate: what the results so far say of the rewards of all tokens, and how surely.

A Gaussian process each (`controller.gaussian_process`) models the accuracy and the logarithm of
every metric that the reward depends on; the objective's own formula joins them. So a target's edge
is where it is, and a metric that is measured precisely is known precisely, which a model of the
reward would have to find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.base import Result, Score, State
from controller.gaussian_process import PairwiseProcess
from controller.state import pack_tokens, unpack_tokens
from controller.tables import Array, Layout, Tables, stack
from space.tokens import Tokens

#: The scales are fitted to at most so many trials, evenly spaced in time: they hardly change
#: beyond, while the time would grow with the cube.
FIT_TRIALS = 400

#: The scales are fitted anew when there are so many times the trials of the last fit.
FIT_GROWTH = 1.15

#: Steps of L-BFGS of a model's first fit and of the later ones, which start where that ended.
FIRST_STEPS, LATER_STEPS = 40, 20

#: A metric matters if the reward changes when it is multiplied by one of these.
PROBES = (0.01, 0.5, 2.0, 100.0)

REWARD, ACCURACY, METRIC, COMPLETES = "reward", "accuracy", "metric:", "completes"


class Surrogate:
    """Models of all results, which `add` takes and `fit` learns from.

    Trials without a reward are labels of one more model, of where networks complete: where a
    function of it is below one half, the reward is less than any observed. Of several results of
    the same tokens the first counts.

    Args:
        layout: Of the space.
        score: The objective's formula. Without it, or where a result lacks what it needs, the
            reward itself is modelled.
        max_trials: Beyond so many completed trials, every other one of the worse half is
            forgotten; of the others as many of the latest are kept.
    """

    def __init__(self, layout: Layout, score: Score | None, max_trials: int) -> None:
        self._layout = layout
        self._score = score
        self._max_trials = max_trials
        self._names: list[str] = []  # of what every completed trial has
        self._completed: dict[Tokens, list[float]] = {}
        self._failed: dict[Tokens, None] = {}
        self._untrained: dict[Tokens, dict[str, float]] = {}  # metrics by name, or {} if asked for
        self._models: dict[str, PairwiseProcess] = {}
        self._fitted = 0  # trials, at the last fit
        self._one_hot: Array | None = None  # of the completed trials, once the models hold them
        self._columns: dict[str, Array] = {}  # like the next, kept as long as the data are
        self._logs: dict[str, bool] = {}

    def __len__(self) -> int:
        """Number of completed trials that it holds."""
        return len(self._completed)

    @property
    def failed(self) -> int:
        """Number of trials without a reward that it holds."""
        return len(self._failed)

    @property
    def tokens(self) -> list[Tokens]:
        """The completed trials' tokens, in the order of `one_hot`."""
        return list(self._completed)

    @property
    def modelled(self) -> list[str]:
        """Names of the outputs, in order, once `fit` was called."""
        return list(self._models)

    @property
    def models_metrics(self) -> bool:
        """Whether metrics without accuracies teach it anything."""
        return any(name.startswith(METRIC) for name in self._models)

    def knows_metrics(self, tokens: Tokens) -> bool:
        """Return whether the tokens' metrics are known, were asked for, perhaps in vain since the
        measurement failed, or are of no use since no such network completes.
        """
        return tokens in self._completed or tokens in self._failed or tokens in self._untrained

    def ask_for_metrics(self, tokens: Tokens) -> None:
        """Take note that the tokens' metrics are asked for."""
        self._untrained[tokens] = {}

    def add(self, results: Sequence[Result]) -> None:
        """Take results as data; `fit` makes the models know them."""
        for result in results:
            tokens = result.proposal.tokens
            if tokens in self._completed or tokens in self._failed:
                continue
            if result.reward is None:
                self._failed[tokens] = None
            else:
                self._complete(tokens, _quantities(result))
                self._untrained.pop(tokens, None)
        self._data_changed()

    def add_metrics(self, metrics: Sequence[tuple[Tokens, Mapping[str, float]]]) -> None:
        """Take metrics of tokens that were not trained as data, of which the latest are kept."""
        for tokens, values in metrics:
            if tokens not in self._completed:
                self._untrained[tokens] = _metrics(values)
        self._data_changed()

    def fit(self) -> None:
        """Fit the models' scales if there is enough more data than last time.

        Needs two completed trials.
        """
        names = self._modelled()
        total = len(self._completed) + len(self._failed) + len(self._untrained)
        if names == list(self._models) and self._fitted <= total < FIT_GROWTH * self._fitted:
            return
        models = {}
        for name in names:
            new = PairwiseProcess(self._layout)
            models[name] = self._models.get(name, new)
            steps = FIRST_STEPS if models[name] is new else LATER_STEPS
            one_hot, values = self._data(name)
            some = _evenly(len(values), FIT_TRIALS)
            models[name].fit(one_hot[some], values[some], steps)
        self._models, self._fitted = models, total
        self._one_hot = None

    def one_hot(self) -> Array:
        """Return the completed trials as one-hot rows, and make the models know all data."""
        if self._one_hot is None:
            for name, model in self._models.items():
                model.condition(*self._data(name))
            self._one_hot = self._rows(self._completed)
        return self._one_hot

    def mean(self) -> Tables:
        """Return the models' means: one function per output, (outputs,)."""
        self.one_hot()
        return stack([model.mean() for model in self._models.values()])

    def samples(self, scales: Array, rng: np.random.Generator) -> Tables:
        """Return functions drawn from the models, (outputs, len(scales)); scales as there."""
        self.one_hot()
        return stack([model.samples(scales, rng) for model in self._models.values()])

    def value(self, outputs: Array) -> Array:
        """Return the rewards (...) that the models' outputs (outputs, ...) stand for."""
        by_name = dict(zip(self._models, outputs, strict=True))
        rewards = by_name.get(REWARD)
        if rewards is None:
            parts = {
                name: (np.exp(values) if self._in_logs(name) else values).ravel()
                for name, values in by_name.items()
                if name != COMPLETES
            }
            # The formula may ask for a metric without depending on it.
            rest = {n: np.full(outputs[0].size, self._column(n)[0]) for n in self._names}
            rewards = self._joined({**rest, **parts})
            rewards = rewards.reshape(outputs.shape[1:])
        if COMPLETES in by_name:
            rewards = np.where(by_name[COMPLETES] < 0.5, self._column(REWARD).min() - 1, rewards)
        return rewards

    def state(self) -> State:
        """Return all data and the models' scales."""
        shape = (len(self._completed), len(self._names))
        return {
            "names": list(self._names),
            "completed": pack_tokens(self._completed, self._layout.num_choices),
            "values": np.array(list(self._completed.values()), dtype=np.float64).reshape(shape),
            "failed": pack_tokens(self._failed, self._layout.num_choices),
            "untrained": pack_tokens(self._untrained, self._layout.num_choices),
            "metrics": [dict(metrics) for metrics in self._untrained.values()],
            "theta": {name: model.theta.copy() for name, model in self._models.items()},
            "fitted": self._fitted,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave."""
        self._names = list(state["names"])
        rows, values = unpack_tokens(state["completed"]), state["values"].tolist()
        self._completed = dict(zip(rows, values, strict=True))
        self._failed = dict.fromkeys(unpack_tokens(state["failed"]))
        untrained = unpack_tokens(state["untrained"])
        self._untrained = dict(zip(untrained, map(dict, state["metrics"]), strict=True))
        self._models = {}
        for name, theta in state["theta"].items():
            self._models[name] = PairwiseProcess(self._layout)
            self._models[name].theta = np.array(theta)
        self._fitted = int(state["fitted"])
        self._data_changed()

    def _complete(self, tokens: Tokens, quantities: Mapping[str, float]) -> None:
        """Add a completed trial; keep of all trials what every one has."""
        if not self._completed:
            self._names = list(quantities)
        common = [k for k, name in enumerate(self._names) if name in quantities]
        if len(common) < len(self._names):
            self._names = [self._names[k] for k in common]
            self._completed = {t: [v[k] for k in common] for t, v in self._completed.items()}
        self._completed[tokens] = [quantities[name] for name in self._names]

    def _data_changed(self) -> None:
        self._forget()
        self._columns, self._logs = {}, {}
        self._one_hot = None

    def _forget(self) -> None:
        while len(self._completed) > self._max_trials:
            reward = self._names.index(REWARD)
            rewards = np.array([values[reward] for values in self._completed.values()])
            order = np.argsort(rewards, kind="stable")
            dropped = set(order[: len(order) // 2 : 2].tolist())
            kept = [(t, v) for k, (t, v) in enumerate(self._completed.items()) if k not in dropped]
            self._completed = dict(kept)
        for kept_to_limit in (self._failed, self._untrained):
            for tokens in list(kept_to_limit)[: -self._max_trials]:
                del kept_to_limit[tokens]

    def _column(self, name: str) -> Array:
        """What the completed trials have of a quantity, as it was reported."""
        if name not in self._columns:
            k = self._names.index(name)
            self._columns[name] = np.array([values[k] for values in self._completed.values()])
        return self._columns[name]

    def _rows(self, tokens: Sequence[Tokens] | Mapping[Tokens, Any]) -> Array:
        return self._layout.one_hot(pack_tokens(tokens, self._layout.num_choices))

    def _data(self, name: str) -> tuple[Array, Array]:
        """One-hot rows (n, width) and values (n,) that a model learns from."""
        if name == COMPLETES:
            labels = [1.0] * len(self._completed) + [0.0] * len(self._failed)
            return self._rows([*self._completed, *self._failed]), np.array(labels)
        more = {t: metrics[name] for t, metrics in self._untrained.items() if name in metrics}
        values = np.concatenate([self._column(name), np.array(list(more.values()))])
        rows = self._rows([*self._completed, *more])
        return rows, np.log(values) if self._in_logs(name) else values

    def _in_logs(self, name: str) -> bool:
        """Whether it is a metric all of whose values have logarithms."""
        if name not in self._logs:
            more = (metrics.get(name, 1.0) for metrics in self._untrained.values())
            positive = self._column(name).min() > 0 and all(value > 0 for value in more)
            self._logs[name] = name.startswith(METRIC) and bool(positive)
        return self._logs[name]

    def _modelled(self) -> list[str]:
        """The quantities that are to be modelled, given the data."""
        return [*(self._parts() or [REWARD]), *([COMPLETES] if self._failed else [])]

    def _parts(self) -> list[str]:
        """Accuracy and the metrics on which the reward depends; none if that is not known."""
        if self._score is None or ACCURACY not in self._names:
            return []
        metrics = [name for name in self._names if name.startswith(METRIC)]
        parts = {name: self._column(name) for name in (ACCURACY, *metrics)}
        try:
            rewards = self._joined(parts)
            return [ACCURACY] + [
                name
                for name in metrics
                if any(
                    not np.array_equal(self._joined({**parts, name: parts[name] * by}), rewards)
                    for by in PROBES
                )
            ]
        except KeyError:  # the formula needs a metric that some result lacks
            return []

    def _joined(self, parts: Mapping[str, Array]) -> Array:
        """The formula's rewards (n,), from quantities as they are reported."""
        assert self._score is not None
        metrics = {n.removeprefix(METRIC): v for n, v in parts.items() if n.startswith(METRIC)}
        return self._score(parts[ACCURACY], metrics)


def _quantities(result: Result) -> dict[str, float]:
    """The reward, the accuracy if there is one, and the metrics, by unmistakable names."""
    assert result.reward is not None
    made = {REWARD: result.reward}
    if result.accuracy is not None:
        made[ACCURACY] = result.accuracy
    return made | _metrics(result.metrics)


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {METRIC + name: float(value) for name, value in metrics.items()}


def _evenly(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` indices below `count`, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
