"""REINFORCE on independent softmaxes, one per decision: the simplest policy that learns.

A policy holds a logit for every choice of every decision. After each batch one step of Adam
ascends (Williams, 1992, with a baseline)

    mean over trials of (advantage * log probability) + entropy_weight * (sum of the entropies)

where an advantage is a reward's distance from the moving mean of the rewards, in moving spreads.
The same update of the paper's LSTM policy is `ppo` with `epochs: 1`: at a probability ratio of 1
its clipped objective has this gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from controller.policy import TINY, Adam
from controller.reward_scale import RewardScale
from controller.state import check_identity, check_num_choices, check_results, identity
from space.records import record


@record
class ReinforceConfig:
    """How the policy learns.

    The defaults are for batches of 16; smaller batches are noisier and come more often, so that
    they need a smaller learning rate.

    Attributes:
        learning_rate: Of Adam: about the largest change of a logit per update.
        entropy_weight: Weight of the entropy bonus relative to an advantage of one spread of the
            rewards. Too small, and the policy soon repeats itself.
        baseline_decay: Share of the old mean and spread of the rewards kept at each *trial*; 0.9
            looks back over about 10 trials.
        failure_advantage: Advantage of an outcome without a reward, in spreads of rewards; < 0.
    """

    name: Literal["reinforce"] = "reinforce"
    learning_rate: float = 0.5
    entropy_weight: float = 0.2
    baseline_decay: float = 0.9
    failure_advantage: float = -1.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 10:
            raise ValueError(f"learning_rate must be in (0, 10], but got {self.learning_rate!r}")
        if not 0 <= self.entropy_weight <= 100:
            raise ValueError(
                f"entropy_weight must be in [0, 100], but got {self.entropy_weight!r}"
            )
        if not 0 <= self.baseline_decay < 1:
            raise ValueError(f"baseline_decay must be in [0, 1), but got {self.baseline_decay!r}")
        if not -100 <= self.failure_advantage < 0:
            raise ValueError(
                f"failure_advantage must be in [-100, 0), but got {self.failure_advantage!r}"
            )


class Softmaxes:
    """Independent distributions over the choices of each decision.

    Attributes:
        logits: float64, (decisions, choices); decisions with fewer choices than the most are
            padded, and padding has probability 0 and gradient 0.
    """

    def __init__(self, num_choices: tuple[int, ...]) -> None:
        """Start with uniform distributions."""
        self._valid = np.arange(max(num_choices)) < np.array(num_choices)[:, None]
        self.logits = np.zeros(self._valid.shape)

    def probabilities(self) -> NDArray[np.float64]:
        """Return each choice's probability, (decisions, choices)."""
        valid = np.where(self._valid, self.logits, -np.inf)
        raised = np.exp(valid - valid.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True))

    def entropies(self) -> NDArray[np.float64]:
        """Return each decision's entropy in nats, (decisions,)."""
        p = self.probabilities()
        return np.asarray(-(p * np.log(np.maximum(p, TINY))).sum(axis=1))

    def sample(
        self, n: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draw tokens, int64 (n, decisions), and return their log-probabilities, (n,), too."""
        p = self.probabilities()
        cumulative = p.cumsum(axis=1)
        uniform = rng.random((n, len(p), 1))
        # The last sum is left out of the comparison: no draw can fall beyond the last choice.
        tokens = (uniform * cumulative[:, -1:] >= cumulative[:, :-1]).sum(axis=2)
        drawn = p[np.arange(len(p)), tokens]
        return tokens, np.log(np.maximum(drawn, TINY)).sum(axis=1)

    def gradient(
        self, tokens: NDArray[np.int64], advantages: NDArray[np.float64], entropy_weight: float
    ) -> NDArray[np.float64]:
        """Return the slope of the module's objective by the logits, (decisions, choices).

        Args:
            tokens: int64, (n, decisions).
            advantages: float64, (n,).
            entropy_weight: Of the sum of the decisions' entropies.
        """
        p = self.probabilities()
        chosen = tokens[:, :, None] == np.arange(p.shape[1])
        slope = (advantages[:, None, None] * (chosen - p)).mean(axis=0)  # of log p: 1[chosen] - p
        surprise = np.log(np.maximum(p, TINY)) + self.entropies()[:, None]
        return np.asarray(slope - entropy_weight * p * surprise)


class Reinforce(Controller):
    """Independent softmaxes, taught by REINFORCE.

    Outcomes without a reward (stopped, rejected, failed) count neither in the baseline nor in the
    spread of the rewards; their advantage is `failure_advantage`. A reused result is learned from
    like a completed one: the policy did propose it again, and repeats itself the more the surer
    it is. A result is learned from as if the present policy had drawn it, however late it comes.
    """

    def __init__(
        self,
        config: ReinforceConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        score: Score | None = None,
        metrics_of: MetricsOf | None = None,
    ) -> None:
        """Take over `rng`; `score` and `metrics_of` are not used."""
        self.config = config
        self.num_choices = check_num_choices(num_choices)
        self.policy = Softmaxes(self.num_choices)
        self._rng = rng
        self._adam = Adam(self.policy.logits)
        self._scale = RewardScale(config.baseline_decay)
        self._next_id = 0
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Draw `n` proposals from the policy as it is; networks may repeat."""
        if n < 1:
            raise ValueError(f"n must be >= 1, but got {n!r}")
        tokens, log_prob = self.policy.sample(n, self._rng)
        first = self._next_id
        self._next_id += n
        return [
            Proposal(first + k, tuple(row), value)
            for k, (row, value) in enumerate(zip(tokens.tolist(), log_prob.tolist(), strict=True))
        ]

    def update(self, results: Sequence[Result]) -> None:
        """Make one step by all results; the class says what becomes of each outcome.

        Raises:
            ValueError: A proposal was never made, or its tokens do not fit the space.
        """
        check_results(results, self.num_choices, self._next_id)
        if not results:
            return
        tokens = np.array([result.proposal.tokens for result in results], dtype=np.int64)
        advantages = self._scale.advantages_of(results, self.config.failure_advantage)
        entropies = self.policy.entropies()
        gradient = self.policy.gradient(tokens, advantages, self.config.entropy_weight)
        norm = self._adam.step(
            self.policy.logits,
            -gradient,
            learning_rate=self.config.learning_rate,
            max_norm=math.inf,
        )
        self._diagnostics = {
            "entropy": float(entropies.mean()),
            "gradient_norm": norm,
            **self._scale.diagnostics(results),
        }

    def observe(self, results: Sequence[Result]) -> None:
        """Ignore trials that the policy did not draw: the gradient is of its own draws only."""

    def diagnostics(self) -> dict[str, float]:
        """Return figures of the last update.

        Keys: entropy (nats, mean per decision, before it), gradient_norm, and those of
        `RewardScale.diagnostics`.
        """
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return logits, Adam's moments, baseline, counter and the RNG."""
        return {
            **identity("reinforce", self.num_choices),
            "logits": self.policy.logits.copy(),
            "adam": self._adam.state(),
            "rewards": self._scale.state(),
            "next_id": self._next_id,
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of REINFORCE in the same space.

        Raises:
            ValueError: The state is another controller's or another space's.
        """
        check_identity(state, "reinforce", self.num_choices)
        set_rng_state(self._rng, state["rng"])
        self.policy.logits[...] = state["logits"]
        self._adam.load_state(state["adam"])
        self._scale.load_state(state["rewards"])
        self._next_id = int(state["next_id"])
        self._diagnostics = dict(state["diagnostics"])
