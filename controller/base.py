"""The contract between a controller and the engine: Proposal, Result, Controller.

A controller knows tokens and numbers, never networks. The engine calls, in this order and from
one thread:

    proposals = controller.propose(n)      # n tokens to evaluate; may advance the controller's RNG
    controller.update(results)             # in the order proposed, all of what was proposed;
                                           # an asynchronous search: as they come, others open
    controller.observe(results)            # trials that it did not propose, e.g. a baseline
    controller.recommend(n)                # at the end: what to hand over

Where metrics can be measured without a training, an engine may ask before it proposes which ones a
controller would like to know:

    tokens = controller.probe(n)           # may advance the controller's RNG
    controller.observe_metrics(metrics)    # (tokens, metrics) pairs; what failed is left out
    proposals = controller.propose(n)

`state_dict` holds everything that the next proposal depends on, the RNG and what was asked for and
observed included: after `load_state_dict` in a new process the same calls give the same values,
bit for bit.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from space.errors import FailureCause
from space.records import record, to_plain

Outcome = Literal["completed", "reused", "stopped", "rejected", "failed"]

#: JSON values, and numpy arrays that are not of dtype object, under string keys; mappings nest.
State = dict[str, Any]

#: `score(accuracy, metrics) -> reward`, vectorised: float64 arrays (n,) and name -> (n,).
Score = Callable[[NDArray[np.float64], Mapping[str, NDArray[np.float64]]], NDArray[np.float64]]

#: `metrics_of(tokens) -> name -> value`: metrics that cost nothing, e.g. multiply-adds.
MetricsOf = Callable[[tuple[int, ...]], Mapping[str, float]]


@record
class Proposal:
    """Tokens to evaluate.

    Attributes:
        id: Counts the controller's proposals from 0.
        tokens: One choice index per decision.
        log_prob: Natural logarithm of the probability under the policy that drew the tokens.
    """

    id: int
    tokens: tuple[int, ...]
    log_prob: float


@record
class Result:
    """What became of a proposal.

    Attributes:
        proposal: As proposed.
        outcome: `completed` and `reused` have a reward; `stopped`, `rejected` and `failed` none.
        reward: The number to maximise, or None.
        accuracy: Fraction in [0, 1], or None.
        metrics: Name -> value, e.g. `latency_ms`.
        fidelity: Epochs trained.
        reused: The result is that of an earlier, identical network.
        cause: Whose fault a failure was; None otherwise. Infrastructure failures never reach a
            controller.
    """

    proposal: Proposal
    outcome: Outcome
    reward: float | None
    accuracy: float | None
    metrics: dict[str, float]
    fidelity: float = 0.0
    reused: bool = False
    cause: FailureCause | None = None

    def __post_init__(self) -> None:
        if (self.reward is not None) != (self.outcome in ("completed", "reused")):
            raise ValueError(f"reward must be given exactly if completed, but got {self!r}")
        if self.reward is not None and not np.isfinite(self.reward):
            raise ValueError(f"reward must be finite, but got {self.reward!r}")


class Controller(ABC):
    """Proposes tokens and learns from their rewards; see the module for the order of calls."""

    @abstractmethod
    def propose(self, n: int) -> list[Proposal]:
        """Return `n` proposals, n >= 1, with consecutive ids."""

    @abstractmethod
    def update(self, results: Sequence[Result]) -> None:
        """Learn from the results of own proposals; see the module for their order.

        Each subclass documents what it does with outcomes that have no reward.
        """

    @abstractmethod
    def observe(self, results: Sequence[Result]) -> None:
        """Take note of trials that it did not propose; a controller may ignore them."""

    def probe(self, count: int) -> list[tuple[int, ...]]:
        """Return tokens whose metrics alone it asks for before it proposes `count`.

        The default asks for none.
        """
        return []

    def observe_metrics(  # noqa: B027  (a controller that asks for none has no use for them)
        self, metrics: Sequence[tuple[tuple[int, ...], Mapping[str, float]]]
    ) -> None:
        """Take note of (tokens, name -> value) pairs; tokens that failed are left out."""

    def recommend(self, count: int) -> list[tuple[int, ...]]:
        """Return up to `count` evaluated tokens to hand over, best first.

        Where accuracies are noisy, the best observed reward is often a lucky one; a controller
        that models the noise knows better. The default is no opinion: the best observed count.
        """
        return []

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Return what the last update showed, e.g. `entropy` (nats, mean per decision)."""

    @abstractmethod
    def state_dict(self) -> State:
        """Return everything that the next proposal depends on, the RNG included."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Continue from a state that `state_dict` of the same class and space gave.

        Raises:
            ValueError: The state is another controller's or another space's.
        """


def state_to_bytes(state: State) -> bytes:
    """Return a state as npz bytes: arrays as arrays, the rest as JSON; no pickle."""
    arrays: dict[str, NDArray[Any]] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray):
            if value.dtype == object:
                raise TypeError(f"state {path!r} must not be an object array")
            arrays[path] = value
            return {"__array__": path}
        if isinstance(value, Mapping):
            return {str(key): strip(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [strip(item, f"{path}.{index}") for index, item in enumerate(value)]
        return to_plain(value)

    text = json.dumps(strip(state, "state"), allow_nan=False)
    buffer = io.BytesIO()
    np.savez(buffer, __json__=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
    return buffer.getvalue()


def state_from_bytes(data: bytes) -> State:
    """Return the state that `state_to_bytes` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:

        def restore(value: Any) -> Any:
            if isinstance(value, dict):
                if set(value) == {"__array__"}:
                    return stored[value["__array__"]]
                return {key: restore(item) for key, item in value.items()}
            return [restore(item) for item in value] if isinstance(value, list) else value

        state: State = restore(json.loads(stored["__json__"].tobytes().decode()))
        return state


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """Return a generator's state as JSON values."""
    state: dict[str, Any] = rng.bit_generator.state  # type: ignore[assignment]
    return state


def set_rng_state(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    """Put a generator into the state that `rng_state` gave."""
    rng.bit_generator.state = dict(state)
