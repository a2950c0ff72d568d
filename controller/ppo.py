"""PPO on the paper's policy: the controller that MnasNet uses.

Proximal policy optimization (Schulman et al., 2017, eq. 7) on the expected reward. A batch's
results become advantages `(reward - baseline) / scale`; several epochs of Adam then ascend

    mean over trials of
        min(ratio * advantage, clip(ratio, 1 - clip_range, 1 + clip_range) * advantage)
        + entropy_weight * (sum of the decisions' entropies)

where `ratio` is the probability of a trial's tokens now over that when they were drawn. A trial is
one action: it has one reward, and a proposal carries one log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from controller.policy import Adam, Evaluation, Floats, LSTMPolicy, PolicyConfig
from controller.reward_scale import RewardScale
from controller.state import (
    check_identity,
    check_num_choices,
    check_results,
    identity,
    one_blas_thread,
)
from space.records import record

#: The policy's numbers. Half the memory traffic of float64, which is most of an update's time.
DTYPE = np.float32

#: Weight of the entropy bonus while the policy is collapsed: as much as one spread of the rewards.
COLLAPSED_ENTROPY_WEIGHT = 1.0

#: Bounds exp() of a late result's log-ratio; far outside any clip range.
MAX_LOG_RATIO = 20.0


@record
class PPOConfig:
    """How the policy learns.

    Attributes:
        learning_rate: Of Adam.
        clip_range: How far the probability ratio of a trial's tokens may move from 1, its value
            under the policy that drew them, before the trial stops pushing. Wider than the usual
            0.2, since the ratio is a product over all decisions. A late result starts away from
            1, by what was learned meanwhile.
        epochs: Passes over a batch's results.
        minibatch_size: Trials per step of Adam; None takes the whole batch.
        entropy_weight: Weight of the entropy bonus relative to an advantage of one spread of the
            rewards. It decides: too small, and the policy soon repeats itself; too large, and
            it stays near random search. The default is for some 30 decisions; for ten, 0.1 is
            as good.
        entropy_weight_final: If given, the weight falls linearly to it over `entropy_trials`.
        entropy_trials: Trials learned from until the final weight is reached.
        min_entropy_share: Below this share of the largest possible entropy the policy counts as
            collapsed: the diagnostics say so, and the entropy weight is at least 1 until it has
            recovered. `policy.exploration` alone keeps spaces of up to 30 decisions or so above
            the default. 0 leaves a collapsed policy alone.
        baseline_decay: Advantages are rewards normalised by exponential moving averages of their
            mean and spread; this share of the old is kept at each *trial*: 0.75 makes batches of
            16 their own baseline and compares single trials with the last few.
        failure_advantage: Advantage of an outcome without a reward, in spreads of rewards; < 0.
        max_gradient_norm: Longer gradients are cut to this.
        max_staleness: Results of proposals made more than this many updates ago are dropped.
        policy: The network that draws tokens; its `exploration` keeps it from collapsing.
    """

    name: Literal["ppo"] = "ppo"
    learning_rate: float = 4e-3
    clip_range: float = 0.5
    epochs: int = 4
    minibatch_size: int | None = None
    entropy_weight: float = 0.05
    entropy_weight_final: float | None = None
    entropy_trials: int = 1000
    min_entropy_share: float = 0.1
    baseline_decay: float = 0.75
    failure_advantage: float = -1.0
    max_gradient_norm: float = 1.0
    max_staleness: int = 8
    policy: PolicyConfig = PolicyConfig()

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate, "> 0 and <= 1", 0 < self.learning_rate <= 1)
        _check("clip_range", self.clip_range, "in (0, 1)", 0 < self.clip_range < 1)
        _check("epochs", self.epochs, "in [1, 100]", 1 <= self.epochs <= 100)
        size = self.minibatch_size
        _check("minibatch_size", size, ">= 1, or null", size is None or size >= 1)
        _check(
            "entropy_weight", self.entropy_weight, "in [0, 100]", 0 <= self.entropy_weight <= 100
        )
        final = self.entropy_weight_final
        _check(
            "entropy_weight_final", final, "in [0, 100], or null",
            final is None or 0 <= final <= 100,
        )  # fmt: skip
        _check("entropy_trials", self.entropy_trials, ">= 1", self.entropy_trials >= 1)
        floor = self.min_entropy_share
        _check("min_entropy_share", floor, "in [0, 1)", 0 <= floor < 1)
        _check("baseline_decay", self.baseline_decay, "in [0, 1)", 0 <= self.baseline_decay < 1)
        failed = self.failure_advantage
        _check("failure_advantage", failed, "in [-100, 0)", -100 <= failed < 0)
        norm = self.max_gradient_norm
        _check("max_gradient_norm", norm, "> 0 and finite", 0 < norm < math.inf)
        _check(
            "max_staleness", self.max_staleness, "in [0, 10000]", 0 <= self.max_staleness <= 10_000
        )


def _check(name: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, but got {value!r}")


class Surrogate:
    """The loss that is minimised, its derivatives, and how far the policy has moved.

    Attributes:
        loss: Negative of the objective in the module's docstring.
        d_log_probs: (n, decisions), derivative of the loss by each decision's log-probability.
        d_entropies: (n, decisions), derivative of the loss by each decision's entropy.
        approx_kl: Estimate of the KL divergence from the old policy, nats per trial.
        clip_fraction: Share of the trials whose gradient the clipping removed.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        *,
        old_log_prob: NDArray[np.float64],
        advantages: NDArray[np.float64],
        clip_range: float,
        entropy_weight: float,
    ) -> None:
        """Compare `evaluation` with the log-probabilities, (n,), under the policies that drew."""
        n = len(advantages)
        log_ratio = np.clip(evaluation.log_prob - old_log_prob, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = np.exp(log_ratio)
        clipped = np.clip(ratio, 1 - clip_range, 1 + clip_range)
        gain = np.minimum(ratio * advantages, clipped * advantages)
        # The minimum takes the clipped branch, which is flat, on the far side of the range only.
        flat = np.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
        slope = np.where(flat, 0.0, ratio * advantages)
        entropy = evaluation.entropies.sum(axis=1, dtype=np.float64)
        self.loss = -float(np.mean(gain) + entropy_weight * np.mean(entropy))
        shape, dtype = evaluation.log_probs.shape, evaluation.log_probs.dtype
        self.d_log_probs: Floats = np.broadcast_to((-slope / n)[:, None], shape).astype(dtype)
        self.d_entropies: Floats = np.full(shape, -entropy_weight / n, dtype)
        self.approx_kl = float(np.mean(ratio - 1 - log_ratio))  # Schulman's k3: never negative
        self.clip_fraction = float(np.mean(flat))


class PPO(Controller):
    """The LSTM policy, taught by PPO.

    Outcomes without a reward (stopped, rejected, failed) count neither in the baseline nor in the
    spread of the rewards; their advantage is `failure_advantage`. A reused result is learned from
    like a completed one: the policy did propose it again. Results may come late: the ratio is
    taken to the log-probability under the policy that drew the tokens. What is older than
    `max_staleness` updates is dropped, and so is a proposal's second result.
    """

    def __init__(
        self,
        config: PPOConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        score: Score | None = None,
        metrics_of: MetricsOf | None = None,
    ) -> None:
        """Draw the policy's weights from `rng` and take it over; the callables are not used."""
        self.config = config
        self.num_choices = check_num_choices(num_choices)
        self.policy = LSTMPolicy(config.policy, self.num_choices, rng, dtype=DTYPE)
        self._rng = rng
        self._last: Evaluation | None = None  # the latest, for its memory
        self._last_holds = False  # whether it is of the present parameters
        self._adam = Adam(self.policy.parameters)
        self._scale = RewardScale(config.baseline_decay)
        self._next_id = 0
        self._updates = 0
        self._learned = 0  # trials
        self._made_at: dict[int, int] = {}  # proposal without a result -> updates before it
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Draw `n` proposals from the policy as it is; networks may repeat."""
        if n < 1:
            raise ValueError(f"n must be >= 1, but got {n!r}")
        with one_blas_thread():
            drawn = self.policy.sample(n, self._rng, reuse=self._last)
        self._last, self._last_holds = drawn, True
        rows = zip(drawn.tokens.tolist(), drawn.log_prob.tolist(), strict=True)
        proposals = [
            Proposal(self._next_id + k, tuple(tokens), log_prob)
            for k, (tokens, log_prob) in enumerate(rows)
        ]
        self._made_at.update((proposal.id, self._updates) for proposal in proposals)
        self._next_id += n
        return proposals

    def update(self, results: Sequence[Result]) -> None:
        """Learn from the results of own proposals; the class says what becomes of each outcome.

        Raises:
            ValueError: A proposal was never made, or its tokens do not fit the space.
        """
        check_results(results, self.num_choices, self._next_id)
        fresh = self._take_fresh(results)
        if fresh:
            with one_blas_thread():
                self._learn(fresh)
            self._updates += 1
            self._learned += len(fresh)
        self._diagnostics["dropped"] = float(len(results) - len(fresh))

    def observe(self, results: Sequence[Result]) -> None:
        """Ignore trials that the policy did not draw: they have no ratio to learn by."""

    def diagnostics(self) -> dict[str, float]:
        """Return figures of the last update.

        Keys: entropy (nats, mean per decision, of the learned trials' distributions),
        entropy_share (of the largest possible), collapsed (1 or 0), entropy_weight, approx_kl
        (nats per trial), clip_fraction and gradient_norm (all of these are the last epoch's
        means), dropped (results), and those of `RewardScale.diagnostics`.
        """
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return weights, Adam's moments, baseline, counters, open proposals and the RNG."""
        return {
            **identity("ppo", self.num_choices),
            "parameters": self.policy.parameters.copy(),
            "adam": self._adam.state(),
            "rewards": self._scale.state(),
            "next_id": self._next_id,
            "updates": self._updates,
            "learned": self._learned,
            "open_ids": np.array(list(self._made_at), dtype=np.int64),
            "open_made_at": np.array(list(self._made_at.values()), dtype=np.int64),
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of PPO in the same space, with a policy of the same size.

        Raises:
            ValueError: The state is another controller's, space's or policy's.
        """
        check_identity(state, "ppo", self.num_choices)
        own, given = self.policy.parameters, state["parameters"]
        if own.shape != given.shape or own.dtype != given.dtype:
            raise ValueError(
                f"state must hold {own.size} parameters of {own.dtype}, as this policy has, but it"
                f" holds {given.size} of {given.dtype}"
            )
        set_rng_state(self._rng, state["rng"])
        own[...] = given
        self._last_holds = False
        self._adam.load_state(state["adam"])
        self._scale.load_state(state["rewards"])
        self._next_id = int(state["next_id"])
        self._updates = int(state["updates"])
        self._learned = int(state["learned"])
        ids, made_at = state["open_ids"].tolist(), state["open_made_at"].tolist()
        self._made_at = dict(zip(ids, made_at, strict=True))
        self._diagnostics = dict(state["diagnostics"])

    # ------------------------------------------------------------------ learning

    def _take_fresh(self, results: Sequence[Result]) -> list[Result]:
        """The results that are neither too old nor a second one; they are open no longer."""
        oldest = self._updates - self.config.max_staleness
        self._made_at = {k: made_at for k, made_at in self._made_at.items() if made_at >= oldest}
        return [r for r in results if self._made_at.pop(r.proposal.id, None) is not None]

    def _learn(self, results: Sequence[Result]) -> None:
        tokens = np.array([result.proposal.tokens for result in results], dtype=np.int64)
        old_log_prob = np.array([result.proposal.log_prob for result in results])
        advantages = self._scale.advantages_of(results, self.config.failure_advantage)
        figures: dict[str, float] = {}
        for _ in range(self.config.epochs):
            steps = [
                self._step(tokens[part], old_log_prob[part], advantages[part])
                for part in self._minibatches(len(results))
            ]
            figures = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
        self._diagnostics = {**figures, **self._scale.diagnostics(results)}

    def _minibatches(self, n: int) -> list[NDArray[np.int64]]:
        size = self.config.minibatch_size
        if size is None or size >= n:
            return [np.arange(n)]
        order = self._rng.permutation(n)
        return [order[start : start + size] for start in range(0, n, size)]

    def _step(
        self,
        tokens: NDArray[np.int64],
        old_log_prob: NDArray[np.float64],
        advantages: NDArray[np.float64],
    ) -> Mapping[str, float]:
        """One step of Adam; return figures of the policy before it."""
        evaluation = self._evaluate(tokens)
        entropy = float(evaluation.entropies.mean())
        share = entropy / self.policy.max_entropy if self.policy.max_entropy else 1.0
        collapsed = share < self.config.min_entropy_share
        entropy_weight = self._entropy_weight(collapsed=collapsed)
        surrogate = Surrogate(
            evaluation,
            old_log_prob=old_log_prob,
            advantages=advantages,
            clip_range=self.config.clip_range,
            entropy_weight=entropy_weight,
        )
        gradient = self.policy.backward(evaluation, surrogate.d_log_probs, surrogate.d_entropies)
        norm = self._adam.step(
            self.policy.parameters,
            gradient,
            learning_rate=self.config.learning_rate,
            max_norm=self.config.max_gradient_norm,
        )
        return {
            "entropy": entropy,
            "entropy_share": share,
            "collapsed": float(collapsed),
            "entropy_weight": entropy_weight,
            "approx_kl": surrogate.approx_kl,
            "clip_fraction": surrogate.clip_fraction,
            "gradient_norm": norm,
        }

    def _evaluate(self, tokens: NDArray[np.int64]) -> Evaluation:
        """What the policy says of tokens before a step that changes it.

        What it said when it drew them serves, if nothing has changed since. A new evaluation is
        the same to the last bit, so that a resumed search goes on identically.
        """
        last = self._last
        if last is None or not self._last_holds or not np.array_equal(last.tokens, tokens):
            last = self.policy.evaluate(tokens, reuse=last)
        self._last, self._last_holds = last, False
        return last

    def _entropy_weight(self, *, collapsed: bool) -> float:
        config = self.config
        weight = config.entropy_weight
        if config.entropy_weight_final is not None:
            progress = min(1.0, self._learned / config.entropy_trials)
            weight += progress * (config.entropy_weight_final - weight)
        return max(weight, COLLAPSED_ENTROPY_WEIGHT) if collapsed else weight
