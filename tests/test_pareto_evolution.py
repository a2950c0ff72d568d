"""Pareto search: fronts against brute force, what joins them, resume, noise, and the bar."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pareto_front as benchmark
import pytest
from campaigns import mnas, mnas_here, write_synthetic
from toy_spaces import toy_space

from controller.base import Outcome, Proposal, Result, state_from_bytes, state_to_bytes
from controller.front import best_layers, hypervolume, non_dominated, spread_out
from controller.pareto_evolution import Pareto, ParetoConfig
from controller.random_search import RandomConfig
from controller.registry import ControllerConfig, make_controller
from search.campaign import open_to_read
from search.pareto import pareto_front
from space.errors import ConfigError
from space.records import build, record
from space.tokens import Tokens

THREE = ("accuracy", "latency_ms", "parameters")


class Problem:
    """Accuracy, latency and size over a toy space, each known for every point."""

    def __init__(self, seed: int, *, noise: float = 0.0) -> None:
        spaces = [toy_space(seed + 100 * k, num_choices=(3, 4, 5, 3, 4, 5, 3)) for k in range(3)]
        self.num_choices = spaces[0].num_choices
        values = np.stack([space.values for space in spaces], axis=1)
        self.values = values * [0.3, 20, 900] + [0.5, 5, 100]
        self.noise = noise
        self.rng = np.random.default_rng(seed)

    def true(self, tokens: Tokens) -> np.ndarray:
        row: np.ndarray = self.values[np.ravel_multi_index(tokens, self.num_choices)]
        return row

    def result(self, proposal: Proposal) -> Result:
        accuracy, latency_ms, parameters = self.true(proposal.tokens).tolist()
        accuracy += self.noise * self.rng.normal()
        metrics = {"latency_ms": latency_ms, "parameters": parameters}
        return Result(proposal, "completed", accuracy, accuracy, metrics)

    def ratio(self, tokens: Sequence[Tokens], count: int) -> float:
        """The hypervolume in the first `count` objectives over that of the whole space."""
        signs = np.array([1, -1, -1])
        points = (self.values * signs)[:, :count]
        reference = points.min(axis=0) - 1e-9
        found = np.array([self.true(t) for t in tokens]) * signs
        return hypervolume(found[:, :count], reference) / hypervolume(points, reference)


def make(objectives: tuple[str, ...] = ("accuracy", "latency_ms"), seed: int = 0) -> Pareto:
    config = ParetoConfig(objectives=objectives, initial=16)
    return Pareto(config, Problem(0).num_choices, np.random.default_rng(seed))


def run(controller: Pareto, problem: Problem, trials: int) -> list[Tokens]:
    """Propose and update in batches of 8; return the tokens."""
    made: list[Tokens] = []
    while len(made) < trials:
        proposals = controller.propose(8)
        controller.update([problem.result(p) for p in proposals])
        made.extend(p.tokens for p in proposals)
    return made


def result(tokens: Tokens, accuracy: float, latency_ms: float, **metrics: float) -> Result:
    made = {"latency_ms": latency_ms, **metrics}
    return Result(Proposal(0, tokens, 0.0), "completed", accuracy, accuracy, made)


# ---------------------------------------------------------------- fronts of points


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_front_is_what_comparing_all_pairs_finds(objectives: int) -> None:
    points = np.random.default_rng(objectives).integers(0, 6, (150, objectives)).astype(float)
    expected = [
        not any(
            ((q >= p).all() and (q > p).any()) or ((q == p).all() and j < i)
            for j, q in enumerate(points)
        )
        for i, p in enumerate(points)
    ]
    assert non_dominated(points).tolist() == expected
    assert not non_dominated(points[:0]).any()


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_hypervolume_counts_the_cells_that_are_dominated(objectives: int) -> None:
    points = np.random.default_rng(objectives).integers(-1, 6, (12, objectives)).astype(float)
    cells = np.array(list(itertools.product(range(6), repeat=objectives))) + 0.5
    dominated = (points[:, None] > cells[None]).all(axis=-1).any(axis=0)
    assert hypervolume(points, np.zeros(objectives)) == pytest.approx(dominated.sum())
    assert hypervolume(points[:0], np.zeros(objectives)) == 0


def test_layers_are_peeled_and_the_latest_of_the_last_one_stay() -> None:
    points = np.array([[0, 0], [1, 3], [3, 1], [0, 2], [1, 1], [2, 0], [2, 2.0]])
    assert best_layers(points, 3).tolist() == [1, 2, 6]
    assert best_layers(points, 5).tolist() == [1, 2, 4, 5, 6]
    assert best_layers(points, 99).tolist() == list(range(7))


def test_each_chosen_point_adds_most_and_none_adds_nothing() -> None:
    points = np.array([[1, 4], [3, 3], [4, 1], [0, 5.0]])
    assert spread_out(points, 3, np.zeros(2)) == [1, 0, 2]
    assert spread_out(points, 9, np.zeros(2)) == [1, 0, 2]  # the last lies on the reference


# ---------------------------------------------------------------- what joins the front


def test_the_front_holds_what_no_others_dominate_with_its_values() -> None:
    pareto = Pareto(ParetoConfig(), (9,), np.random.default_rng(0))
    pareto.observe(
        [
            result((0,), 0.70, 10.0),
            result((1,), 0.60, 12.0),  # beaten by 0
            result((2,), 0.80, 20.0),
            result((3,), 0.80, 20.0),  # equal to 2: the earlier one stands
            result((4,), 0.65, 5.0),
            result((2,), 0.99, 1.0),  # the same tokens again: the first result counts
        ]
    )
    assert pareto.front() == [
        ((2,), {"accuracy": 0.80, "latency_ms": 20.0}),
        ((0,), {"accuracy": 0.70, "latency_ms": 10.0}),
        ((4,), {"accuracy": 0.65, "latency_ms": 5.0}),
    ]


def test_a_third_objective_keeps_what_is_best_in_it() -> None:
    pareto = Pareto(ParetoConfig(objectives=THREE), (9,), np.random.default_rng(0))
    pareto.observe(
        [result((0,), 0.7, 10.0, parameters=9.0), result((1,), 0.6, 12.0, parameters=8.0)]
    )
    assert [tokens for tokens, _ in pareto.front()] == [(0,), (1,)]


@pytest.mark.parametrize("outcome", ["failed", "rejected", "stopped"])
def test_what_has_no_reward_is_not_on_the_front_and_not_proposed_again(outcome: Outcome) -> None:
    pareto = Pareto(ParetoConfig(initial=2), (2, 3), np.random.default_rng(0))
    first = pareto.propose(2)
    pareto.update([Result(p, outcome, None, None, {"latency_ms": 0.1}) for p in first])
    assert pareto.front() == []
    rest = pareto.propose(4)
    pareto.update([result_of(p) for p in rest])
    assert len({p.tokens for p in first + rest}) == 6
    assert {tokens for tokens, _ in pareto.front()} <= {p.tokens for p in rest}
    assert set(pareto.recommend(9)) <= {p.tokens for p in rest}


def result_of(proposal: Proposal) -> Result:
    latency_ms = 1.0 + sum(proposal.tokens)
    return Result(proposal, "completed", 0.5, latency_ms / 10, {"latency_ms": latency_ms})


def test_a_result_that_lacks_an_objective_is_left_out() -> None:
    pareto = make(THREE)
    first, second, third = pareto.propose(3)
    whole = Problem(0).result(second)
    lacking = Result(first, "completed", 0.9, 0.9, {"latency_ms": 0.1})
    no_accuracy = Result(third, "completed", 0.9, None, {"latency_ms": 0.1, "parameters": 1.0})
    pareto.update([lacking, whole, no_accuracy])
    assert [tokens for tokens, _ in pareto.front()] == [second.tokens]
    assert pareto.diagnostics()["complete"] == 1


def test_an_objective_that_no_result_has_is_named_at_once() -> None:
    pareto = make(("accuracy", "latency"))
    with pytest.raises(
        ConfigError, match="have accuracy, latency, but their metrics are latency_"
    ):
        pareto.update([Problem(0).result(p) for p in pareto.propose(4)])


def test_diagnostics_say_how_large_the_front_is() -> None:
    pareto = Pareto(ParetoConfig(), (9,), np.random.default_rng(0))
    pareto.observe([result((k,), a, b) for k, (a, b) in enumerate([(0, 2), (1, 4), (0.5, 3)])])
    pareto.update([])
    # In the box from (0, 4 ms) to (1, 2 ms) only (0.5, 3 ms) dominates anything: a quarter.
    assert pareto.diagnostics() == {"complete": 3, "failed": 0, "front": 3, "hypervolume": 0.25}


# ---------------------------------------------------------------- the search


def test_it_learns_where_networks_do_not_complete() -> None:
    problem, pareto = Problem(0), make()
    failures: list[int] = []
    for _ in range(14):
        proposals = pareto.propose(8)
        failed = [p.tokens[1] == 3 for p in proposals]
        pareto.update(
            [
                Result(p, "failed", None, None, {}) if fails else problem.result(p)
                for p, fails in zip(proposals, failed, strict=True)
            ]
        )
        failures.append(sum(failed))
    assert sum(failures[:2]) == 4  # a quarter of the initial tokens
    assert sum(failures[-6:]) <= 4


def test_a_saved_state_goes_on_identically_with_failures_and_beyond_max_trials() -> None:
    problem = Problem(0)

    def controller(seed: int) -> Pareto:
        config = ParetoConfig(objectives=THREE, initial=16, max_trials=100)
        return Pareto(config, problem.num_choices, np.random.default_rng(seed))

    def play(pareto: Pareto, rounds: int) -> list[Proposal]:
        made: list[Proposal] = []
        for _ in range(rounds):
            proposals = pareto.propose(12)
            results = [problem.result(p) for p in proposals]
            results[3] = Result(proposals[3], "rejected", None, None, {})
            pareto.update(results)
            made.extend(proposals)
        return made

    first, second = controller(0), controller(1)
    play(first, 10)
    second.load_state_dict(state_from_bytes(state_to_bytes(first.state_dict())))
    assert second.front() == first.front()
    assert second.recommend(5) == first.recommend(5)
    assert play(second, 3) == play(first, 3)
    assert state_to_bytes(first.state_dict()) == state_to_bytes(second.state_dict())


def test_a_state_of_other_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'parameters'\], but it is of \['accuracy', 'latency_"):
        make(THREE).load_state_dict(make().state_dict())


def test_a_metric_that_may_be_zero_or_constant_is_an_objective_too() -> None:
    pareto = make(THREE)
    for _ in range(4):
        pareto.update([result_with(p, float(sum(p.tokens[:2]))) for p in pareto.propose(8)])
    best = pareto.front()[0][1]
    assert best["latency_ms"] == 0
    assert len({p.tokens for p in pareto.propose(8)}) == 8


def result_with(proposal: Proposal, latency_ms: float) -> Result:
    metrics = {"latency_ms": latency_ms, "parameters": 7.0}
    return Result(proposal, "completed", 0.5, 1 / (1 + sum(proposal.tokens)), metrics)


@pytest.mark.parametrize("objectives", [2, 3])
def test_it_comes_near_the_whole_spaces_front_where_random_search_does_not(
    objectives: int,
) -> None:
    for seed in range(2):
        problem = Problem(seed)
        found = problem.ratio(run(make(THREE[:objectives], seed), problem, 160), objectives)
        random = make_controller(RandomConfig(), problem.num_choices, np.random.default_rng(seed))
        drawn = problem.ratio([p.tokens for p in random.propose(160)], objectives)
        assert found > 0.985
        assert drawn < 0.85


def test_under_noise_it_recommends_a_better_front_than_the_observed_one() -> None:
    def spread(pareto: Pareto) -> list[Tokens]:
        front = pareto.front()
        points = np.array([list(values.values()) for _, values in front]) * [1, -1]
        return [front[k][0] for k in spread_out(points, 8, points.min(axis=0) - 0.1)]

    ratios: dict[str, list[float]] = {"observed": [], "recommended": []}
    for seed in range(4):
        problem = Problem(seed, noise=0.03)
        pareto = make(seed=seed)
        run(pareto, problem, 96)
        ratios["observed"].append(problem.ratio(spread(pareto), 2))
        ratios["recommended"].append(problem.ratio(pareto.recommend(8), 2))
    assert np.mean(ratios["recommended"]) > np.mean(ratios["observed"]) + 0.01


@pytest.mark.skipif(
    "MNAS_ACCEL_NASBENCH" not in os.environ, reason="MNAS_ACCEL_NASBENCH names no folder of data"
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of bench.py
def test_on_accel_nasbench_it_does_with_250_trials_what_nsga2_does_with_1000() -> None:
    rows = benchmark.evaluate(benchmark.Run(ParetoConfig(), "a100", 0, 16, (100, 250)))
    assert [row["budget"] for row in rows] == [100, 250]
    nsga2 = np.median(benchmark.recorded_ratios("a100", 16, 1000))
    assert rows[1]["claimed"] > rows[1]["found"] > nsga2 > rows[0]["found"]


# ---------------------------------------------------------------- campaigns


def test_a_campaign_finds_a_front_of_three_objectives(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, controller="pareto", trials=48)
    settings = "[accuracy, latency_ms, parameters]"
    done = mnas(
        "search", str(config), "--out", str(tmp_path / "run"), f"controller.objectives={settings}"
    )
    assert done.returncode == 0, done.stderr
    with closing(open_to_read(tmp_path / "run")) as store:
        trials = list(store.trials(role="search"))
        recommended = store.trials_by_id(store.meta("recommended"))
    assert len({trial.tokens for trial in trials}) == 48
    assert len(pareto_front(trials, THREE)) > len(pareto_front(trials))
    assert len(recommended) > 1
    assert all(trial.outcome == "completed" for trial in recommended)


def test_a_campaign_with_an_objective_that_no_result_has_ends_with_a_sentence(
    tmp_path: Path,
) -> None:
    config = write_synthetic(tmp_path, controller="pareto", trials=48)
    settings = "controller.objectives=[accuracy, latency]"
    done = mnas("search", str(config), "--out", str(tmp_path / "run"), settings)
    assert done.returncode == 2
    assert "controller.objectives: results must have accuracy, latency, but" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- settings


@record
class Holder:
    controller: ControllerConfig


def test_the_configuration_is_read_as_yaml_gives_it() -> None:
    values = {"controller": {"name": "pareto", "objectives": list(THREE), "initial": 8}}
    assert build(Holder, values, where="x").controller == ParetoConfig(objectives=THREE, initial=8)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"objectives": ["accuracy"]}, "accuracy and 1 to 3 metrics"),
        ({"objectives": ["latency_ms", "macs"]}, "accuracy and 1 to 3 metrics"),
        ({"objectives": ["accuracy", "macs", "macs"]}, "objectives must differ"),
        ({"initial": 1}, "initial must be in"),
        ({"exploration": -1.0}, "exploration must be in"),
        ({"starts": 0}, "starts must be in"),
        ({"max_trials": 99}, "max_trials must be in"),
        ({"population": 100}, "population"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_by_name(values: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        build(ParetoConfig, values, where="test")


def test_top_shows_the_front_in_the_controllers_objectives(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=40)
    controller = "controller={name: pareto, objectives: [accuracy, parameters]}"
    folder = tmp_path / "run"
    assert mnas("search", str(config), controller, "--out", str(folder)).returncode == 0
    shown = json.loads(mnas_here("top", str(folder), "--front", "--json").stdout)["trials"]
    assert len(shown) > 1
    for trial in shown:
        others = [t for t in shown if t["trial"] != trial["trial"]]
        assert not any(
            t["accuracy"] >= trial["accuracy"] and t["parameters"] <= trial["parameters"]
            for t in others
        )
    sizes = [trial["parameters"] for trial in shown]
    assert sizes == sorted(sizes)
