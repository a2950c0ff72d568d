"""Local search: climb from the best tokens found, one changed decision at a time.

White, Nolen & Savani, "Exploring the Loss Landscape in Neural Architecture Search", UAI 2021. From
the best of some random tokens, neighbours (one decision changed) are proposed in random order. As
soon as a batch shows something better, the climb goes on from there (first improvement, at the
granularity of a batch).
"""

from __future__ import annotations

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
from space.tokens import Tokens, neighbours_of, uniform_tokens


@record
class LocalSearchConfig:
    """Where climbs begin and when they are given up.

    Attributes:
        starts: Random tokens from the best of which a climb begins.
        patience: A climb ends when the neighbours of so many of its tokens, the best and then the
            next best, were all proposed without giving a better reward. 1 ends at the first local
            optimum; null never restarts.
    """

    name: Literal["local"] = "local"
    starts: int = 16
    patience: int | None = 4

    def __post_init__(self) -> None:
        if not 1 <= self.starts <= 100_000:
            raise ValueError(f"starts must be in [1, 100000], but got {self.starts!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be >= 1, or null, but got {self.patience!r}")


class LocalSearch(Controller):
    """Proposes the neighbours of the best tokens found, in climbs that restart.

    Outcomes without a reward (stopped, rejected, failed) are never climbed from, and neither is a
    reused result: its network has had its turn already. Observed trials with a reward are climbed
    from like its own.

    Noise: a network that was lucky looks like a local optimum. It cannot be evaluated again (the
    engine would reuse its result), so the climb does not stop at it: once its neighbours are
    spent it goes on from the next best tokens, `patience` times in all.

    No tokens are proposed twice before the whole space was, not even where a result never came.
    Different tokens may still stand for one network, which the controller cannot know.
    """

    def __init__(
        self,
        config: LocalSearchConfig,
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
        self._seen = Seen(self.num_choices)
        # The present climb: tokens with neighbours left, the best reward, and how many tokens
        # have lost their last neighbour since it was found.
        self._open: dict[Tokens, float] = {}
        self._best: float | None = None
        self._spent = 0
        self._starts_left = config.starts
        self._restarts = 0
        self._diagnostics: dict[str, float] = {}

    def propose(self, n: int) -> list[Proposal]:
        """Return random tokens or `n` neighbours; log_prob is 0, there is no policy.

        A batch with more places than the best tokens have neighbours left goes on with the next
        best ones.
        """
        if n < 1:
            raise ValueError(f"n must be >= 1, but got {n!r}")
        if self.config.patience is not None and self._spent >= self.config.patience:
            self._restart()
        made: list[Tokens] = []
        while len(made) < n:
            if self._open and not self._starts_left:
                made.extend(self._neighbours(n - len(made)))
            else:
                start = uniform_tokens(self.num_choices, self._rng)
                made.append(self._seen.fresh(start, self._rng))
                self._starts_left = max(0, self._starts_left - 1)
        first = self._next_id
        self._next_id += n
        return [Proposal(first + k, tokens, 0.0) for k, tokens in enumerate(made)]

    def update(self, results: Sequence[Result]) -> None:
        """Add results with a reward to the climb; a better one will be climbed from next.

        Raises:
            ValueError: A proposal was never made, or its tokens do not fit the space.
        """
        check_results(results, self.num_choices, self._next_id)
        self._note(results)
        self._diagnostics = {"restarts": float(self._restarts), "open": float(len(self._open))}
        rewards = [result.reward for result in results if result.reward is not None]
        if rewards:
            self._diagnostics["mean_reward"] = float(np.mean(rewards))
        if self._best is not None:
            self._diagnostics["climb_reward"] = self._best

    def observe(self, results: Sequence[Result]) -> None:
        """Add trials that it did not propose to the climb like its own.

        Raises:
            ValueError: Tokens do not fit the space.
        """
        for result in results:
            check_tokens(result.proposal.tokens, self.num_choices)
        self._seen.add(result.proposal.tokens for result in results)
        self._note(results)

    def diagnostics(self) -> dict[str, float]:
        """Return figures after the last update.

        Keys: restarts (so far), open (tokens that may be climbed from), mean_reward (of the
        update) and climb_reward (the present climb's best), if there were rewards.
        """
        return dict(self._diagnostics)

    def state_dict(self) -> State:
        """Return the climb, all tokens proposed, counters and the RNG."""
        return {
            **identity("local", self.num_choices),
            "open": pack_tokens(self._open, self.num_choices),
            "rewards": np.array(list(self._open.values()), dtype=np.float64),
            "best": self._best,
            "spent": self._spent,
            "starts_left": self._starts_left,
            "restarts": self._restarts,
            "seen": self._seen.to_array(),
            "next_id": self._next_id,
            "diagnostics": dict(self._diagnostics),
            "rng": rng_state(self._rng),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state of local search in the same space.

        Raises:
            ValueError: The state is another controller's or another space's.
        """
        check_identity(state, "local", self.num_choices)
        set_rng_state(self._rng, state["rng"])
        rewards = state["rewards"].tolist()
        self._open = dict(zip(unpack_tokens(state["open"]), rewards, strict=True))
        self._best = None if state["best"] is None else float(state["best"])
        self._spent = int(state["spent"])
        self._starts_left = int(state["starts_left"])
        self._restarts = int(state["restarts"])
        self._seen.load_array(state["seen"])
        self._next_id = int(state["next_id"])
        self._diagnostics = dict(state["diagnostics"])

    def _restart(self) -> None:
        self._open = {}
        self._best = None
        self._spent = 0
        self._starts_left = self.config.starts
        self._restarts += 1

    def _note(self, results: Sequence[Result]) -> None:
        for result in results:
            if result.reward is None or result.outcome == "reused":
                continue
            self._open[result.proposal.tokens] = result.reward
            if self._best is None or result.reward > self._best:
                self._best, self._spent = result.reward, 0

    def _neighbours(self, n: int) -> list[Tokens]:
        """Up to `n` neighbours of the best tokens; without any left, these are open no longer."""
        base = max(self._open, key=self._open.__getitem__)
        left = [t for t in neighbours_of(base, self.num_choices) if t not in self._seen]
        picked = [left[k] for k in self._rng.permutation(len(left))[:n].tolist()]
        self._seen.add(picked)
        if len(picked) == len(left):
            del self._open[base]
            self._spent += 1
        return picked
