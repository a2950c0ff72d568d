"""A controller, an evaluator and a device of one's own: one small, complete example each.

Check them against the engine's contract, from this file's folder:

    mnas check-plugin controller own_parts:HillClimber
    mnas check-plugin evaluator own_parts:DepthEvaluator --options '{bonus: 0.1}'
    mnas check-plugin device own_parts:MacsDevice

and use them in a campaign, `mnas search own_parts.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controller.base import Controller, Proposal, Result, State, rng_state, set_rng_state
from latency.device import LatencyMeter
from latency.measurement import Measurement
from search.evaluation import Evaluation, Evaluator
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, graph_hash
from space.cost import count


class HillClimber(Controller):
    """Changes one decision of the best tokens so far; draws at random until there are any."""

    def __init__(
        self, options: Mapping[str, Any], num_choices: tuple[int, ...], rng: np.random.Generator
    ) -> None:
        self._num_choices = num_choices
        self._rng = rng
        self._next_id = 0
        self._best: tuple[int, ...] | None = None
        self._best_reward = float("-inf")

    def propose(self, n: int) -> list[Proposal]:
        proposals = []
        for _ in range(n):
            tokens = [int(self._rng.integers(count)) for count in self._num_choices]
            if self._best is not None:
                position = int(self._rng.integers(len(tokens)))
                changed = tokens[position]
                tokens = list(self._best)
                tokens[position] = changed
            # Without a policy there is no probability to speak of: 0 stands for "certain".
            proposals.append(Proposal(self._next_id, tuple(tokens), 0.0))
            self._next_id += 1
        return proposals

    def update(self, results: Sequence[Result]) -> None:
        # Outcomes without a reward (failed, rejected, stopped) are not learned from.
        for result in results:
            if result.reward is not None and result.reward > self._best_reward:
                self._best, self._best_reward = result.proposal.tokens, result.reward

    def observe(self, results: Sequence[Result]) -> None:
        self.update(results)

    def diagnostics(self) -> dict[str, float]:
        return {"best_reward": self._best_reward} if self._best is not None else {}

    def state_dict(self) -> State:
        known = self._best is not None
        return {
            "next_id": self._next_id,
            "best": list(self._best) if self._best is not None else None,
            "best_reward": self._best_reward if known else None,
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        if set(state) != {"next_id", "best", "best_reward", "rng"}:
            raise ValueError(f"state must be a HillClimber's, but has the keys {sorted(state)}")
        self._next_id = state["next_id"]
        self._best = None if state["best"] is None else tuple(state["best"])
        self._best_reward = float("-inf") if self._best is None else state["best_reward"]
        set_rng_state(self._rng, state["rng"])


class DepthEvaluator(Evaluator):
    """Pretends that deeper networks are more accurate; stands where a training would."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._bonus = float(options.get("bonus", 0.0))

    @property
    def epochs(self) -> float:
        return 1.0

    def warm_up(self) -> None:
        pass

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        layers = len(architecture.layers())
        noise = float(np.random.default_rng(seed).normal(0.0, 0.01))
        accuracy = min(1.0, max(0.0, 0.5 + 0.03 * layers + self._bonus + noise))
        return Evaluation(accuracy, {}, self.epochs)


class MacsDevice(LatencyMeter):
    """Stands for a device of one's own: replace the body of `measure` by a real measurement.

    A million multiply-adds take 0.5 ms on it, always: what it gives is made up.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._ms_per_million = float(options.get("ms_per_million", 0.5))

    def identity(self) -> dict[str, Any]:
        return {"name": "macs", "kind": "made up", "ms_per_million": self._ms_per_million}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        median = count(architecture).macs / 1e6 * self._ms_per_million
        return Measurement(
            samples_ms=(median, median, median),
            inner_iterations=1,
            warmup_runs=0,
            attempts=1,
            graph_hash=graph_hash(architecture, style),
            device=self.identity(),
            environment={},
            metrics={},
        )
