"""Checks a Controller, a user's own included, against the contract of controller.base."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from controller.base import (
    Controller,
    Outcome,
    Proposal,
    Result,
    State,
    state_from_bytes,
    state_to_bytes,
)
from space.checks import CheckResult
from space.tokens import Tokens

Make = Callable[[np.random.Generator], Controller]

#: Two seeds may agree by chance; enough proposals are compared to make that as rare as this.
FALSE_ALARM = 1e-6


def check_controller(make: Make, num_choices: Sequence[int]) -> list[CheckResult]:
    """Return what a controller does right and wrong; takes a few hundred proposals.

    Args:
        make: Returns a new controller that draws from the generator given, and from nothing else.
        num_choices: Number of choices of each decision of its space.
    """
    choices = tuple(int(n) for n in num_choices)
    checks: list[tuple[str, Callable[[Make, tuple[int, ...]], str]]] = [
        ("propose gives the number asked for, with consecutive ids from 0", _ids),
        ("tokens are one index in range per decision", _tokens),
        ("log_prob is a number <= 0", _log_probs),
        ("the same seed gives the same sequence", _same_seed),
        ("another seed gives another sequence", _other_seed),
        ("update takes every outcome, and what follows is finite", _outcomes),
        ("update takes a batch without any reward", _no_rewards),
        ("update takes one result, and none", _small_batches),
        ("update takes results in any order while others are open", _any_order),
        ("update takes equal rewards", _equal_rewards),
        ("observe takes trials that it did not propose", _observe),
        ("probe names tokens of the space, and their metrics are taken", _probe),
        ("a state saved after observe_metrics continues identically", _continues_after_metrics),
        ("diagnostics are finite numbers", _diagnostics),
        ("a saved state continues identically", _continues),
        ("a state saved between propose and update continues identically", _continues_inside),
        ("a saved state does not change afterwards", _snapshot),
        ("another controller's state raises ValueError", _foreign_state),
    ]
    return [_run(name, check, make, choices) for name, check in checks]


def synthetic_reward(tokens: Sequence[int], num_choices: Sequence[int]) -> float:
    """A reward in [0, 1]: higher choices are better, and neighbours should be equal."""
    pairs = list(zip(tokens, num_choices, strict=True))
    level = np.mean([(token + 1) / n for token, n in pairs])
    agree = np.mean([a == b for a, b in itertools.pairwise(tokens)] or [True])
    return float(0.7 * level + 0.3 * agree)


def synthetic_metrics(tokens: Sequence[int]) -> dict[str, float]:
    """Metrics that grow with the tokens."""
    return {"latency_ms": 1.0 + sum(tokens)}


def synthetic_result(
    proposal: Proposal, num_choices: Sequence[int], outcome: Outcome = "completed"
) -> Result:
    """A result with that outcome; with `synthetic_reward` if the outcome has a reward."""
    done = outcome in ("completed", "reused")
    reward = synthetic_reward(proposal.tokens, num_choices) if done else None
    return Result(
        proposal,
        outcome,
        reward=reward,
        accuracy=reward,
        metrics=synthetic_metrics(proposal.tokens) if done else {},
        fidelity=1.0 if done else 0.0,
        reused=outcome == "reused",
        cause="architecture" if outcome == "failed" else None,
    )


def play(
    controller: Controller,
    num_choices: Sequence[int],
    *,
    rounds: int = 4,
    batch: int = 4,
    outcomes: Sequence[Outcome] = ("completed",),
) -> list[Proposal]:
    """Propose and update `rounds` times and return all proposals; outcomes take turns."""
    proposals: list[Proposal] = []
    for _ in range(rounds):
        made = controller.propose(batch)
        proposals.extend(made)
        controller.update(
            [
                synthetic_result(p, num_choices, outcomes[k % len(outcomes)])
                for k, p in enumerate(made)
            ]
        )
    return proposals


def _run(
    name: str,
    check: Callable[[Make, tuple[int, ...]], str],
    make: Make,
    num_choices: tuple[int, ...],
) -> CheckResult:
    try:
        fault = check(make, num_choices)
    except Exception as error:  # a user's class may raise anything; that is the finding
        fault = f"{type(error).__name__}: {error}"
    return CheckResult(name, not fault, fault)


# Every check returns what is wrong, or an empty string.


def _ids(make: Make, num_choices: tuple[int, ...]) -> str:
    controller, expected = make(np.random.default_rng(0)), 0
    for n in (1, 17, 4):
        proposals = controller.propose(n)
        if len(proposals) != n:
            return f"propose({n}) gave {len(proposals)}"
        wrong = [p for p in proposals if not isinstance(p, Proposal)]
        if wrong:
            return f"propose({n}) gave a {type(wrong[0]).__name__}"
        ids = [p.id for p in proposals]
        if ids != list(range(expected, expected + n)):
            return f"propose({n}) gave the ids {ids} where {expected} is next"
        controller.update([synthetic_result(p, num_choices) for p in proposals])
        expected += n
    return ""


def _tokens(make: Make, num_choices: tuple[int, ...]) -> str:
    for proposal in _long_play(make, num_choices):
        fault = _token_fault(proposal.tokens, num_choices)
        if fault:
            return fault
    return ""


def _token_fault(tokens: Tokens, num_choices: tuple[int, ...]) -> str:
    if not isinstance(tokens, tuple) or any(type(token) is not int for token in tokens):
        return f"tokens must be a tuple of int, but got {tokens!r}"
    if len(tokens) != len(num_choices):
        return f"{len(tokens)} tokens for {len(num_choices)} decisions"
    if not all(0 <= token < n for token, n in zip(tokens, num_choices, strict=True)):
        return f"tokens {tokens} are not all below {num_choices}"
    return ""


def _log_probs(make: Make, num_choices: tuple[int, ...]) -> str:
    for proposal in _long_play(make, num_choices):
        value = proposal.log_prob
        # A rounding error above log(1) is allowed.
        if not isinstance(value, float) or not -math.inf < value <= 1e-6:
            return f"proposal {proposal.id} has {value!r}"
    return ""


def _long_play(make: Make, num_choices: tuple[int, ...]) -> list[Proposal]:
    return play(make(np.random.default_rng(0)), num_choices, rounds=12)


def _same_seed(make: Make, num_choices: tuple[int, ...]) -> str:
    first, second = (play(make(np.random.default_rng(7)), num_choices) for _ in range(2))
    return _difference(first, second)


def _other_seed(make: Make, num_choices: tuple[int, ...]) -> str:
    points = math.prod(num_choices)
    if points == 1:
        return ""
    batch = math.ceil(math.log(1 / FALSE_ALARM) / math.log(points))
    first, second = (make(np.random.default_rng(seed)).propose(batch) for seed in (1, 2))
    same = [p.tokens for p in first] == [p.tokens for p in second]
    return f"seeds 1 and 2 gave the same {batch} proposals" if same else ""


def _outcomes(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    outcomes: list[Outcome] = ["completed", "failed", "rejected", "stopped", "reused"]
    play(controller, num_choices, rounds=4, batch=7, outcomes=outcomes)
    return _health(controller, num_choices)


def _no_rewards(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    play(controller, num_choices, rounds=3, outcomes=["failed", "rejected", "stopped"])
    play(controller, num_choices, rounds=1)
    return _health(controller, num_choices)


def _small_batches(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    play(controller, num_choices, rounds=3, batch=1)
    controller.propose(1)
    controller.update([])  # the infrastructure failed it, so that nothing is to be learned
    play(controller, num_choices, rounds=1)
    return _health(controller, num_choices)


def _any_order(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    open_proposals = [controller.propose(1)[0] for _ in range(8)]
    for _ in range(6):
        # The latest proposals end first; the oldest stay open.
        ended = [open_proposals.pop(), open_proposals.pop(3)]
        controller.update([synthetic_result(p, num_choices) for p in ended])
        open_proposals += [controller.propose(1)[0] for _ in ended]
    return _health(controller, num_choices)


def _equal_rewards(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    for reward in (0.5, 0.0, -1.0, 0.0):
        controller.update([_with_reward(p, reward) for p in controller.propose(4)])
    return _health(controller, num_choices)


def _with_reward(proposal: Proposal, reward: float) -> Result:
    return Result(proposal, "completed", reward, 0.5, {"latency_ms": 1.0}, fidelity=1.0)


def _observe(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    baseline = Proposal(0, tuple(n - 1 for n in num_choices), 0.0)
    controller.observe([synthetic_result(baseline, num_choices)])
    play(controller, num_choices, rounds=1)
    controller.observe([synthetic_result(baseline, num_choices, "failed")])
    return _health(controller, num_choices)


def _probe(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    for _ in range(6):
        for tokens in _probe_and_tell(controller):
            fault = _token_fault(tokens, num_choices)
            if fault:
                return f"probe: {fault}"
        play(controller, num_choices, rounds=1)
    controller.observe_metrics([])  # every measurement failed
    return _health(controller, num_choices)


def _probe_and_tell(controller: Controller) -> list[Tokens]:
    """What it would like to know; it is told but for the last, whose measurement failed."""
    wanted = controller.probe(4)
    measured = [(tokens, synthetic_metrics(tokens)) for tokens in wanted[:-1]]
    controller.observe_metrics(measured)
    return wanted


def _continues_after_metrics(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(5))
    play(controller, num_choices)
    _probe_and_tell(controller)
    restored = _restored(make, controller.state_dict())
    if _probe_and_tell(controller) != _probe_and_tell(restored):
        return "the restored controller would like to know others"
    return _difference(play(controller, num_choices), play(restored, num_choices)) or (
        _state_difference(controller, restored)
    )


def _diagnostics(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(3))
    fault = _diagnostics_fault(controller)
    play(controller, num_choices)
    return fault or _diagnostics_fault(controller)


def _diagnostics_fault(controller: Controller) -> str:
    for name, value in controller.diagnostics().items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(name, str) or not number or not math.isfinite(value):
            return f"{name!r} is {value!r}"
    return ""


def _health(controller: Controller, num_choices: tuple[int, ...]) -> str:
    """Faults of the next proposals, the diagnostics and the state."""
    for proposal in controller.propose(3):
        fault = _token_fault(proposal.tokens, num_choices)
        if fault or not math.isfinite(proposal.log_prob):
            return fault or f"log_prob became {proposal.log_prob!r}"
    fault = _diagnostics_fault(controller)
    return fault or _not_finite(controller.state_dict(), "state")


def _not_finite(value: object, path: str) -> str:
    if isinstance(value, dict):
        faults = (_not_finite(item, f"{path}.{key}") for key, item in value.items())
        return next((fault for fault in faults if fault), "")
    if not isinstance(value, (float, np.ndarray)) or np.isfinite(value).all():
        return ""
    return f"{path} holds a value that is not finite"


def _continues(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(5))
    play(controller, num_choices)
    restored = _restored(make, controller.state_dict())
    return _difference(play(controller, num_choices), play(restored, num_choices)) or (
        _state_difference(controller, restored)
    )


def _continues_inside(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(5))
    play(controller, num_choices)
    results = [synthetic_result(p, num_choices) for p in controller.propose(4)]
    restored = _restored(make, controller.state_dict())
    controller.update(results)
    restored.update(results)
    return _difference(play(controller, num_choices), play(restored, num_choices)) or (
        _state_difference(controller, restored)
    )


def _snapshot(make: Make, num_choices: tuple[int, ...]) -> str:
    controller = make(np.random.default_rng(5))
    play(controller, num_choices)
    state = controller.state_dict()
    before = state_to_bytes(state)
    play(controller, num_choices)
    return "" if state_to_bytes(state) == before else "later calls wrote into it"


def _foreign_state(make: Make, num_choices: tuple[int, ...]) -> str:
    for state in ({}, {"controller": "of another kind", "num_choices": [2, 2]}):
        try:
            make(np.random.default_rng(0)).load_state_dict(state)
        except ValueError:
            continue
        return f"the state {state} was accepted"
    return ""


def _restored(make: Make, state: State) -> Controller:
    """A new controller with a state that went through bytes, as it does in a campaign."""
    restored = make(np.random.default_rng(99))
    restored.load_state_dict(state_from_bytes(state_to_bytes(state)))
    return restored


def _difference(first: Sequence[Proposal], second: Sequence[Proposal]) -> str:
    for a, b in zip(first, second, strict=True):
        if a != b:
            return f"proposal {a.id} is {a} in one and {b} in the other"
    return ""


def _state_difference(first: Controller, second: Controller) -> str:
    same = state_to_bytes(first.state_dict()) == state_to_bytes(second.state_dict())
    return "" if same else "the proposals agree, but the states afterwards differ"
