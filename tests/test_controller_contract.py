"""Every controller keeps the contract of controller.base; a new one is one line in CONFIGS."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from controller.base import Controller, Outcome, Proposal, Result, State
from controller.contract import check_controller, play
from controller.evolution import EvolutionConfig
from controller.guided import GuidedConfig
from controller.local_search import LocalSearchConfig
from controller.pareto_evolution import ParetoConfig
from controller.policy import PolicyConfig
from controller.ppo import PPOConfig
from controller.random_search import RandomConfig, RandomSearch
from controller.registry import CONTROLLERS, BuiltInControllerConfig, make_controller
from controller.reinforce import ReinforceConfig

CONFIGS: dict[str, BuiltInControllerConfig] = {
    "random": RandomConfig(),
    "ppo": PPOConfig(policy=PolicyConfig(hidden_size=16, embedding_size=8)),
    "reinforce": ReinforceConfig(),
    # Small enough for the suite to reach ageing, and restarts.
    "evolution": EvolutionConfig(population=6, sample_size=3),
    "local": LocalSearchConfig(starts=3, patience=1),
    "guided": GuidedConfig(initial=8, starts=4),
    "pareto": ParetoConfig(initial=8),
}
SPACES = [(5,), (1,), (2, 3, 4, 1, 6), (3,) * 28]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> BuiltInControllerConfig:
    return CONFIGS[request.param]


def test_every_controller_that_ships_is_in_this_suite() -> None:
    assert set(CONFIGS) == set(CONTROLLERS)


@pytest.mark.parametrize("num_choices", SPACES, ids=str)
def test_the_contract_holds(config: BuiltInControllerConfig, num_choices: tuple[int, ...]) -> None:
    results = check_controller(lambda rng: make_controller(config, num_choices, rng), num_choices)
    assert len(results) >= 15
    assert [result for result in results if not result.passed] == []


PROGRAM = """
import json
import numpy as np
from controller.contract import play
from controller.registry import CONTROLLERS, ControllerConfig, make_controller
from space.records import build, record

@record
class Holder:
    controller: ControllerConfig

config = build(Holder, {{"controller": {values}}}, where="test").controller
made = play(make_controller(config, (2, 3, 4), np.random.default_rng(7)), (2, 3, 4))
print(json.dumps([[p.id, p.tokens, p.log_prob.hex()] for p in made]))
"""


def test_the_same_seed_gives_the_same_sequence_in_another_process(
    config: BuiltInControllerConfig,
) -> None:
    values = {"name": config.name}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(values=values)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    default = type(config)()
    made = play(make_controller(default, (2, 3, 4), np.random.default_rng(7)), (2, 3, 4))
    assert json.loads(done.stdout) == [[p.id, list(p.tokens), p.log_prob.hex()] for p in made]


THREADS = """
import threadpoolctl
from controller.state import one_blas_thread
with one_blas_thread():
    import scipy.linalg
    found = threadpoolctl.threadpool_info()
    print(*(library["num_threads"] for library in found if library["user_api"] == "blas"))
"""


def test_a_blas_that_is_loaded_late_keeps_to_one_thread_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
    )
    assert set(done.stdout.split()) == {"1"}


@pytest.mark.parametrize("num_choices", [(), (0,), (2, -1), (2.5,), (True,)], ids=str)
def test_a_space_that_is_none_is_refused(
    config: BuiltInControllerConfig, num_choices: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="num_choices"):
        make_controller(config, num_choices, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["evolution", "local", "guided", "pareto"])
@pytest.mark.parametrize("outcomes", [["completed"], ["failed"], ["completed", "failed"]], ids=str)
def test_no_tokens_are_proposed_twice_before_the_whole_space_was(
    name: str, outcomes: list[Outcome]
) -> None:
    num_choices = (2, 3, 1, 4)
    controller = make_controller(CONFIGS[name], num_choices, np.random.default_rng(0))
    made = play(controller, num_choices, rounds=6, batch=4, outcomes=outcomes)
    assert len({p.tokens for p in made}) == 24
    assert len(play(controller, num_choices, rounds=2, batch=4, outcomes=outcomes)) == 8


def test_random_search_is_uniform_and_says_so() -> None:
    random = RandomSearch(RandomConfig(), (2, 5), np.random.default_rng(0))
    proposals = random.propose(20_000)
    assert {p.log_prob for p in proposals} == {-float(np.log(2) + np.log(5))}
    counts = np.bincount([p.tokens[0] * 5 + p.tokens[1] for p in proposals], minlength=10)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    # 9 degrees of freedom: larger with a probability below 1e-6. The seed is fixed besides.
    assert chi_square < 45


# ---------------------------------------------------------------- the checks find what is wrong


class _SkipsAnId(RandomSearch):
    def propose(self, n: int) -> list[Proposal]:
        self._next_id += 1
        return super().propose(n)


class _OutOfRange(RandomSearch):
    def propose(self, n: int) -> list[Proposal]:
        return [Proposal(p.id, (9, *p.tokens[1:]), p.log_prob) for p in super().propose(n)]


class _NumpyTokens(RandomSearch):
    def propose(self, n: int) -> list[Proposal]:
        made = super().propose(n)
        return [Proposal(p.id, tuple(np.array(p.tokens)), p.log_prob) for p in made]


class _OwnSeed(RandomSearch):
    def propose(self, n: int) -> list[Proposal]:
        self._rng = np.random.default_rng(123)
        return super().propose(n)


class _NoSeed(RandomSearch):
    def propose(self, n: int) -> list[Proposal]:
        self._rng = np.random.default_rng()
        return super().propose(n)


class _TripsOnFailures(RandomSearch):
    def update(self, results: list[Result]) -> None:  # type: ignore[override]
        self._diagnostics = {"sum": sum(r.reward for r in results)}  # type: ignore[misc]


class _NanDiagnostics(RandomSearch):
    def diagnostics(self) -> dict[str, float]:
        return {"entropy": float("nan")}


class _ForgetsItsGenerator(RandomSearch):
    def load_state_dict(self, state: State) -> None:
        self._next_id = state["next_id"]


class _AcceptsAnything(RandomSearch):
    def load_state_dict(self, state: State) -> None:
        if "rng" in state:
            super().load_state_dict(state)


class _LendsItsState(RandomSearch):
    def __init__(self, config: RandomConfig, n: tuple[int, ...], rng: np.random.Generator) -> None:
        super().__init__(config, n, rng)
        self._counts = np.zeros(3)

    def update(self, results: list[Result]) -> None:  # type: ignore[override]
        self._counts += 1

    def state_dict(self) -> State:
        return {**super().state_dict(), "counts": self._counts}


class _ProbesOutOfRange(RandomSearch):
    def probe(self, count: int) -> list[tuple[int, ...]]:
        return [(9, 0, 0)] * count


class _ForgetsWhatItAskedFor(RandomSearch):
    def __init__(self, config: RandomConfig, n: tuple[int, ...], rng: np.random.Generator) -> None:
        super().__init__(config, n, rng)
        self._asked = 0

    def probe(self, count: int) -> list[tuple[int, ...]]:
        self._asked += 1
        return [(self._asked % 3, 0, 0)]


@pytest.mark.parametrize(
    ("cls", "rule"),
    [
        (_SkipsAnId, "consecutive ids"),
        (_OutOfRange, "index in range"),
        (_NumpyTokens, "index in range"),
        (_OwnSeed, "another seed"),
        (_NoSeed, "the same seed"),
        (_TripsOnFailures, "every outcome"),
        (_NanDiagnostics, "diagnostics"),
        (_ForgetsItsGenerator, "a saved state continues"),
        (_AcceptsAnything, "another controller's state"),
        (_LendsItsState, "does not change afterwards"),
        (_ProbesOutOfRange, "probe names tokens"),
        (_ForgetsWhatItAskedFor, "a state saved after observe_metrics"),
    ],
)
def test_a_broken_rule_is_found_and_named(cls: type[Controller], rule: str) -> None:
    results = check_controller(
        lambda rng: cls(RandomConfig(), (3, 3, 3), rng),  # type: ignore[call-arg]
        (3, 3, 3),
    )
    broken = [result for result in results if not result.passed]
    assert any(rule in result.name and result.message for result in broken)
