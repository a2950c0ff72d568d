"""Guided search: its Gaussian process against closed forms, its climbs, what it makes of noise."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from toy_spaces import best_reward, completed, toy_space

from controller.base import Proposal, Result, state_from_bytes, state_to_bytes
from controller.contract import check_controller
from controller.gaussian_process import CONSTANT, PairwiseProcess
from controller.guided import Guided, GuidedConfig
from controller.model_based import balanced_tokens
from controller.surrogate import Surrogate
from controller.tables import Layout, Tables, best_first
from space.errors import ConfigError
from space.records import build
from space.tokens import Tokens

CHOICES = (3, 2, 1, 4)


def all_rows(num_choices: tuple[int, ...]) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, num_choices))))


def some_data(seed: int, n: int = 15) -> tuple[Layout, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    layout = Layout(CHOICES)
    return layout, layout.one_hot(balanced_tokens(CHOICES, n, rng)), rng.normal(size=n)


def trained(seed: int) -> tuple[PairwiseProcess, np.ndarray, np.ndarray]:
    """A process with random scales that knows some data."""
    layout, one_hot, values = some_data(seed)
    process = PairwiseProcess(layout)
    process.theta = process.theta + np.random.default_rng(seed).normal(size=len(process.theta))
    process.condition(one_hot, values)
    return process, one_hot, values


def kernel(theta: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The module's prior, decision by decision and pair by pair."""
    scale = np.exp(theta)
    count = len(CHOICES)
    parts = []
    for d, (start, n) in enumerate(zip(Layout(CHOICES).starts, CHOICES, strict=True)):
        ranks = np.arange(n) - np.arange(n).mean()
        ranks = ranks / (ranks.std() or 1)
        centring = (np.eye(n) - 1 / n) * n / max(n - 1, 1)
        base = scale[d] * np.outer(ranks, ranks) + scale[count + d] * centring
        parts.append(a[:, start : start + n] @ base @ b[:, start : start + n].T)
    pairs = sum(x * y for x, y in itertools.combinations(parts, 2))
    return np.asarray(CONSTANT + sum(parts) + scale[-2] * count * pairs)


def closed_form(
    process: PairwiseProcess, one_hot: np.ndarray, values: np.ndarray, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the posterior at `at` (Rasmussen & Williams, 2006, eq. 2.23)."""
    k = kernel(process.theta, one_hot, one_hot) + np.exp(process.theta[-1]) * np.eye(len(values))
    cross = kernel(process.theta, at, one_hot)
    y = (values - values.mean()) / values.std()
    mean = values.mean() + values.std() * cross @ np.linalg.solve(k, y)
    prior = kernel(process.theta, at, at)
    return mean, values.var() * (prior - cross @ np.linalg.solve(k, cross.T))


def test_the_posteriors_mean_is_the_closed_form_everywhere() -> None:
    process, one_hot, values = trained(0)
    at = Layout(CHOICES).one_hot(all_rows(CHOICES))
    mean, _ = closed_form(process, one_hot, values, at)
    np.testing.assert_allclose(process.mean()(at), mean, rtol=0, atol=1e-9)


def test_samples_have_the_posteriors_mean_and_covariance() -> None:
    process, one_hot, values = trained(1)
    at = Layout(CHOICES).one_hot(all_rows(CHOICES))
    drawn = process.samples(np.ones(2000), np.random.default_rng(0))(at)
    mean, covariance = closed_form(process, one_hot, values, at)
    spread = np.sqrt(covariance.diagonal().max())
    assert np.abs(drawn.mean(axis=0) - mean).max() < 5 * spread / np.sqrt(2000)
    assert np.abs(np.cov(drawn.T) - covariance).max() < 8 * spread**2 / np.sqrt(2000)


def test_scaled_samples_lie_between_the_mean_and_a_sample() -> None:
    process, _, _ = trained(1)
    at = Layout(CHOICES).one_hot(all_rows(CHOICES))
    mean = process.mean()(at)
    none, half, full = (
        process.samples(np.array([scale]), np.random.default_rng(0))(at)[0]
        for scale in (0.0, 0.5, 1.0)
    )
    np.testing.assert_allclose(none, mean, atol=1e-9)
    np.testing.assert_allclose(half, (mean + full) / 2, atol=1e-9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    layout, one_hot, values = some_data(2)
    process = PairwiseProcess(layout)
    rng = np.random.default_rng(0)
    for _ in range(3):
        theta = process.theta + rng.normal(size=len(process.theta))
        steps = 1e-5 * np.eye(len(theta))
        numeric = [
            (process.loss(theta + step, one_hot, values)[0]
             - process.loss(theta - step, one_hot, values)[0]) / 2e-5
            for step in steps
        ]  # fmt: skip
        np.testing.assert_allclose(
            process.loss(theta, one_hot, values)[1], numeric, rtol=1e-5, atol=1e-6
        )


def test_the_loss_is_the_closed_form_up_to_a_constant() -> None:
    layout, one_hot, values = some_data(2)
    process = PairwiseProcess(layout)
    start = process.theta

    def expected(theta: np.ndarray) -> float:
        k = kernel(theta, one_hot, one_hot) + np.exp(theta[-1]) * np.eye(len(values))
        spreads = [2.0] * (2 * len(CHOICES)) + [1.5, 2.0]
        prior = 0.5 * (((theta - start) / spreads) ** 2).sum()
        return float(
            0.5 * values @ np.linalg.solve(k, values) + 0.5 * np.linalg.slogdet(k)[1] + prior
        )

    moved = start + np.random.default_rng(0).normal(size=len(start))
    change = process.loss(moved, one_hot, values)[0] - process.loss(start, one_hot, values)[0]
    assert change == pytest.approx(expected(moved) - expected(start), rel=1e-9)


def test_fitting_finds_the_decisions_that_matter_and_the_noise() -> None:
    rng = np.random.default_rng(0)
    layout = Layout((3,) * 8)
    rows = balanced_tokens((3,) * 8, 200, rng)
    clean = rows[:, 0] + 0.5 * (rows[:, 1] == 1) + 0.7 * (rows[:, 2] - 1) * (rows[:, 3] - 1)
    process = PairwiseProcess(layout)
    one_hot = layout.one_hot(rows)
    values = clean + 0.1 * rng.normal(size=200)
    process.fit(one_hot, values, 100)
    assert values.std() * np.exp(process.theta[-1] / 2) == pytest.approx(0.1, rel=0.3)
    ordinal, nominal = process.theta[:8], process.theta[8:16]
    weight = np.logaddexp(ordinal, nominal)
    assert weight[:4].min() > weight[4:].max()
    assert ordinal[0] > nominal[0]
    assert ordinal[1] < nominal[1]


def test_the_best_of_a_function_come_first_and_pairs_lead_out_of_local_maxima() -> None:
    rng = np.random.default_rng(0)
    layout = Layout(CHOICES)
    pair = rng.normal(size=(layout.width, layout.width))
    pair = np.where(layout.same, 0.0, pair + pair.T)
    tables = Tables(np.zeros(1), rng.normal(size=(1, layout.width)), pair[None])
    rows = all_rows(CHOICES)
    values = tables(layout.one_hot(rows))[0]
    starts = balanced_tokens(CHOICES, 8, rng)
    made = list(best_first(layout, tables, lambda outputs: outputs[0], starts))
    of = {tuple(row): value for row, value in zip(rows.tolist(), values, strict=True)}
    given = [of[tokens] for tokens in made]
    assert given[0] == values.max()
    np.testing.assert_allclose(given, sorted(given, reverse=True))
    # Two decisions must change together.
    pair = np.zeros((4, 4))
    pair[1, 3] = pair[3, 1] = 3.0
    trap = Tables(np.zeros(1), np.array([[1.0, 0.0, 1.0, 0.0]]), pair[None])
    made = list(best_first(Layout((2, 2)), trap, lambda o: o[0], np.array([[0, 0]])))
    assert made[0] == (1, 1)


def test_initial_tokens_have_every_choice_equally_often() -> None:
    rows = balanced_tokens((2, 3, 5), 30, np.random.default_rng(0))
    for d, n in enumerate((2, 3, 5)):
        assert np.bincount(rows[:, d]).tolist() == [30 // n] * n


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_a_toy_spaces_optimum_without_a_score(seed: int) -> None:
    space = toy_space(seed)
    guided = Guided(GuidedConfig(), space.num_choices, np.random.default_rng(seed))
    assert best_reward(guided, space, trials=160, batch=16) > 0.999


# ---------------------------------------------------------------- with an objective's formula


def soft(accuracy: np.ndarray, metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    return accuracy * (metrics["latency_ms"] / 10.0) ** -0.2


def hard(accuracy: np.ndarray, metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    late = metrics["latency_ms"] > 10.0
    return accuracy * np.where(late, (10.0 / metrics["latency_ms"]) ** 2, 1.0)


class Problem:
    """Accuracy in [0.5, 0.8] and a latency around 10 ms, with noise on the accuracy."""

    def __init__(self, seed: int, score: object = soft, noise: float = 0.0) -> None:
        self.accuracy, self.latency = toy_space(seed), toy_space(seed + 100)
        self.num_choices = self.accuracy.num_choices
        self.score = score
        self.noise = noise
        self.rng = np.random.default_rng(seed)

    def parts(self, tokens: Tokens) -> tuple[float, dict[str, float]]:
        latency = float(np.exp(1.5 + 2 * self.latency.reward(tokens)))
        return 0.5 + 0.3 * self.accuracy.reward(tokens), {"latency_ms": latency, "idle": 1.0}

    def reward(self, tokens: Tokens) -> float:
        accuracy, metrics = self.parts(tokens)
        arrays = {name: np.array([value]) for name, value in metrics.items()}
        return float(self.score(np.array([accuracy]), arrays)[0])  # type: ignore[operator]

    def best(self) -> float:
        accuracy = 0.5 + 0.3 * self.accuracy.values
        metrics = {"latency_ms": np.exp(1.5 + 2 * self.latency.values)}
        return float(self.score(accuracy, metrics).max())  # type: ignore[operator]

    def result(self, proposal: Proposal) -> Result:
        accuracy, metrics = self.parts(proposal.tokens)
        seen = float(np.clip(accuracy + self.noise * self.rng.normal(), 0, 1))
        reward = self.reward(proposal.tokens) * seen / accuracy
        return Result(proposal, "completed", reward, seen, metrics)


def run(problem: Problem, *, trials: int) -> tuple[Guided, list[Result]]:
    guided = Guided(
        GuidedConfig(),
        problem.num_choices,
        np.random.default_rng(5),
        score=problem.score,  # type: ignore[arg-type]
    )
    results: list[Result] = []
    while len(results) < trials:
        made = [problem.result(p) for p in guided.propose(16)]
        guided.update(made)
        results.extend(made)
    return guided, results


@pytest.mark.parametrize("score", [soft, hard], ids=["soft", "hard"])
def test_it_finds_the_best_compromise(score: object) -> None:
    problem = Problem(0, score)
    _, results = run(problem, trials=128)
    assert max(problem.reward(r.proposal.tokens) for r in results) > problem.best() - 0.002


def test_under_noise_it_recommends_better_than_the_best_observed() -> None:
    recommended, luckiest = [], []
    for seed in range(6):
        problem = Problem(seed, noise=0.05)
        guided, results = run(problem, trials=96)
        recommended.append(problem.best() - problem.reward(guided.recommend(1)[0]))
        lucky = max(results, key=lambda r: r.reward or 0.0)
        luckiest.append(problem.best() - problem.reward(lucky.proposal.tokens))
    assert np.mean(recommended) < 0.8 * np.mean(luckiest)


def test_recommendations_are_evaluated_tokens_and_none_before_there_is_a_choice() -> None:
    problem = Problem(0, noise=0.05)
    assert Guided(GuidedConfig(), (2, 2), np.random.default_rng(0)).recommend(3) == []
    guided, results = run(problem, trials=48)
    made = guided.recommend(48)
    assert sorted(made) == sorted(r.proposal.tokens for r in results)
    assert guided.recommend(3) == made[:3]


def test_a_saved_state_goes_on_identically_with_a_score_and_failures() -> None:
    problem = Problem(0, noise=0.01)
    config = GuidedConfig(initial=16, max_trials=100)

    def make(seed: int) -> Guided:
        rng = np.random.default_rng(seed)
        return Guided(config, problem.num_choices, rng, score=soft)

    def play(guided: Guided, rounds: int) -> list[Proposal]:
        made: list[Proposal] = []
        for _ in range(rounds):
            proposals = guided.propose(12)
            results = [problem.result(p) for p in proposals]
            results[3] = Result(proposals[3], "rejected", None, None, {})
            guided.update(results)
            made.extend(proposals)
        return made

    first, second = make(0), make(1)
    play(first, 10)  # beyond max_trials
    second.load_state_dict(state_from_bytes(state_to_bytes(first.state_dict())))
    assert first.recommend(3) == second.recommend(3)
    problem.rng = np.random.default_rng(3)
    expected = play(first, 3)
    problem.rng = np.random.default_rng(3)
    assert play(second, 3) == expected
    assert state_to_bytes(first.state_dict()) == state_to_bytes(second.state_dict())


def test_it_learns_where_networks_do_not_complete() -> None:
    space = toy_space(1)
    guided = Guided(GuidedConfig(), space.num_choices, np.random.default_rng(0))
    failures: list[int] = []
    for _ in range(8):
        proposals = guided.propose(16)
        # The better half of the first decision's choices never completes.
        bad = [p.tokens[0] != 0 for p in proposals]
        guided.update(
            [
                Result(p, "failed", None, None, {}, cause="architecture")
                if failed
                else completed(p, space.reward(p.tokens))
                for p, failed in zip(proposals, bad, strict=True)
            ]
        )
        failures.append(sum(bad))
    assert sum(failures[:2]) > 15
    assert sum(failures[4:]) < 8


# ---------------------------------------------------------------- latencies without a training


def curious(problem: Problem, *, trials: int, each: int = 3) -> tuple[Guided, list[Tokens]]:
    """A search that gets the latencies that it asks for, and what it asked for."""
    config = GuidedConfig(initial=16, latencies_per_trial=each)
    rng = np.random.default_rng(5)
    guided = Guided(config, problem.num_choices, rng, score=problem.score)  # type: ignore[arg-type]
    asked: list[Tokens] = []
    for _ in range(trials // 8):
        tokens = guided.probe(8)
        asked.extend(tokens)
        guided.observe_metrics([(t, problem.parts(t)[1]) for t in tokens])
        guided.update([problem.result(p) for p in guided.propose(8)])
    return guided, asked


def test_it_asks_for_so_many_new_latencies_per_trial_once_the_models_choose() -> None:
    _, asked = curious(Problem(0, hard), trials=48)
    assert len(asked) == 3 * (48 - 16)
    assert len(set(asked)) == len(asked)


def test_latencies_without_a_training_teach_the_latency_near_the_best_networks() -> None:
    problem = Problem(0, hard)
    latency_ms = np.exp(1.5 + 2 * problem.latency.values)
    rewards = hard(0.5 + 0.3 * problem.accuracy.values, {"latency_ms": latency_ms})
    best = np.argsort(-rewards)[:100]
    rows = np.stack(np.unravel_index(best, problem.num_choices), axis=1)
    true = np.log([problem.parts(tuple(row))[1]["latency_ms"] for row in rows.tolist()])
    errors = []
    for each in (3, 0):
        guided, _ = curious(problem, trials=48, each=each)
        latency = guided._surrogate.mean()[1](Layout(problem.num_choices).one_hot(rows))
        errors.append(np.abs(latency - true).mean())
    assert errors[0] < errors[1]


def test_what_could_not_be_measured_is_not_asked_for_again_even_after_a_resume() -> None:
    problem = Problem(0)
    guided, asked = curious(problem, trials=24)
    asked += guided.probe(8)  # all of these fail
    config = GuidedConfig(initial=16, latencies_per_trial=3)
    other = Guided(config, problem.num_choices, np.random.default_rng(1), score=soft)
    other.load_state_dict(state_from_bytes(state_to_bytes(guided.state_dict())))
    more = guided.probe(8)
    assert other.probe(8) == more
    assert len(more) == 24
    assert not set(more) & set(asked)


def test_a_search_that_asks_for_latencies_keeps_the_contract() -> None:
    config = GuidedConfig(initial=8, starts=4, latencies_per_trial=2)
    choices = (2, 3, 4, 1, 6)
    results = check_controller(lambda rng: Guided(config, choices, rng, score=soft), choices)
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize("score", [None, lambda accuracy, metrics: accuracy])
def test_nothing_is_asked_for_where_the_reward_depends_on_no_metric(score: object) -> None:
    problem = Problem(0)
    config = GuidedConfig(initial=8, latencies_per_trial=3)
    rng = np.random.default_rng(0)
    guided = Guided(config, problem.num_choices, rng, score=score)  # type: ignore[arg-type]
    guided.update([problem.result(p) for p in guided.propose(8)])
    assert guided.probe(8) == []


# ---------------------------------------------------------------- what is modelled


def surrogate_of(results: list[Result], score: object = soft, limit: int = 1000) -> Surrogate:
    surrogate = Surrogate(Layout((4, 4)), score, limit)  # type: ignore[arg-type]
    surrogate.add(results)
    return surrogate


def made_results(metrics: dict[str, float], n: int = 16) -> list[Result]:
    rows = all_rows((4, 4))[:n].tolist()
    return [
        Result(Proposal(k, tuple(row), 0.0), "completed", 0.1 + k, 0.01 * k + 0.1, metrics)
        for k, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("metrics", "score", "names"),
    [
        ({"latency_ms": 2.0, "macs": 1.0}, soft, ["accuracy", "metric:latency_ms"]),
        ({"latency_ms": 2.0}, hard, ["accuracy", "metric:latency_ms"]),
        ({"latency_ms": 2.0}, None, ["reward"]),
        ({"macs": 1.0}, soft, ["reward"]),
    ],
)
def test_what_the_reward_depends_on_is_modelled(
    metrics: dict[str, float], score: object, names: list[str]
) -> None:
    surrogate = surrogate_of(made_results(metrics), score)
    surrogate.fit()
    assert surrogate.modelled == names


def test_one_result_without_a_metric_leaves_the_reward_to_be_modelled() -> None:
    results = made_results({"latency_ms": 2.0})
    results[7] = made_results({})[7]
    surrogate = surrogate_of(results)
    surrogate.fit()
    assert surrogate.modelled == ["reward"]


def test_beyond_its_limit_it_forgets_half_of_the_worse_half() -> None:
    surrogate = surrogate_of(made_results({}), limit=15)
    kept = {divmod(k, 4) for k in (1, 3, 5, 7, *range(8, 16))}
    assert set(surrogate.tokens) == kept


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"initial": 1}, "initial"),
        ({"exploration": -0.1}, "exploration"),
        ({"starts": 1}, "starts"),
        ({"max_trials": 99}, "max_trials"),
        ({"latencies_per_trial": 21}, "latencies_per_trial"),
    ],
)
def test_a_setting_out_of_range_is_refused(values: dict[str, float], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        build(GuidedConfig, values, where="test")
