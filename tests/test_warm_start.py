"""Warm start, baseline, probes, recommendations: what the engine tells a controller, and asks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from campaigns import mnas, rows, write_synthetic

from controller.base import Result
from controller.random_search import RandomSearch
from search import finalists
from search.campaign import create
from search.config import CampaignConfig, load_campaign_config
from search.engine import Silent, resume, start
from search.finalists import candidates, hand_over
from search.loop import FULL_TRAINING, Search, is_baseline, trial_seed
from search.parts import Parts
from search.store import Store
from search.trial import Trial
from search.warm_start import _members
from space.errors import ConfigError, TrialFailed
from space.search_space import load_space
from space.tokens import Tokens

#: A space of two networks.
TINY = "space={name: tiny.yaml}"
PLUGIN = "controller={class: test_warm_start:Curious, options: {}}"


class Curious(RandomSearch):
    """Draws at random; remembers what it is told, asks for metrics, recommends the worst."""

    told: ClassVar[list[Result]] = []
    metrics: ClassVar[list[tuple[Tokens, dict[str, float]]]] = []

    def __init__(self, options: dict[str, Any], num_choices: Any, rng: Any) -> None:
        super().__init__(None, num_choices, rng)  # type: ignore[arg-type]
        Curious.told, Curious.metrics = [], []

    def update(self, results: Any) -> None:
        super().update(results)
        self.own = [*getattr(self, "own", []), *(r for r in results if r.reward is not None)]

    def observe(self, results: Any) -> None:
        Curious.told.extend(results)

    def probe(self, count: int) -> list[Tokens]:
        return [tuple(0 for _ in self.num_choices)] * min(count, 1)

    def observe_metrics(self, metrics: Any) -> None:
        Curious.metrics.extend(metrics)

    def recommend(self, count: int) -> list[Tokens]:
        worst = sorted(self.own, key=lambda result: result.reward or 0.0)
        return [result.proposal.tokens for result in worst[:count]]


def load(folder: Path, *overrides: str, **settings: Any) -> CampaignConfig:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(
        "{name: tiny, stem: 8, head: 16, resolution: 28, classes: 10, choices:"
        " {kernel_size: [3, 5]}, blocks: [{filters: 8, layers: 1, stride: 1}]}"
    )
    return load_campaign_config(str(write_synthetic(folder, **settings)), overrides)


def read(folder: Path) -> Store:
    return Store(folder / "campaign.db", read_only=True)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    start(load(tmp_path / "earlier", trials=24, seed=5), tmp_path / "earlier" / "run")
    return tmp_path / "earlier" / "run"


def test_an_earlier_campaigns_networks_are_observed_with_this_ones_rewards(
    tmp_path: Path, earlier: Path
) -> None:
    new = load(tmp_path / "new", PLUGIN, f"warm_start={earlier}", "objective.name=hard", trials=8)
    start(new, tmp_path / "new" / "run")
    known = [trial for trial in read(earlier).trials() if trial.outcome == "completed"]
    store = read(tmp_path / "new" / "run")
    carried = store.trials(role="warm_start")
    assert [t.architecture for t in reversed(carried)] == [t.architecture for t in known]
    assert [r.accuracy for r in Curious.told] == [t.accuracy for t in known]
    space = load_space("small_image")
    for result, trial in zip(Curious.told, known, strict=True):
        assert space.decode(result.proposal.tokens).text == trial.architecture
        assert trial.accuracy is not None
        assert trial.latency_ms is not None
        factor = 1.0 if trial.latency_ms <= 3.0 else 3.0 / trial.latency_ms
        assert result.reward == pytest.approx(trial.accuracy * factor)
    assert [t.id for t in store.trials()] == list(range(8))
    assert any("warm start" in kind for _, kind, _ in store.events())


def test_a_network_of_the_earlier_campaign_is_not_trained_again(tmp_path: Path) -> None:
    # The same random draws propose the same networks.
    first = load(tmp_path / "first", controller="random", trials=16, fail_share=0.0)
    start(first, tmp_path / "first" / "run")
    second = load(
        tmp_path / "second", f"warm_start={tmp_path / 'first' / 'run'}", controller="random",
        trials=16, fail_share=0.0,
    )  # fmt: skip
    start(second, tmp_path / "second" / "run")
    trials = read(tmp_path / "second" / "run").trials()
    assert {trial.outcome for trial in trials} == {"reused"}
    assert all(trial.reused_from is not None and trial.reused_from < 0 for trial in trials)


@pytest.mark.parametrize("controller", ["guided", "evolution", "ppo"])
def test_a_warm_started_search_resumes_exactly(
    tmp_path: Path, earlier: Path, controller: str
) -> None:
    settings = {"controller": controller, "trials": 24, "seed": 1}
    warm = f"warm_start={{campaign: {earlier}, trials: 10}}"
    start(load(tmp_path / "a", warm, "baseline_share=0.25", **settings), tmp_path / "a" / "run")
    part = load(tmp_path / "b", warm, "baseline_share=0.25", "stop.trials=16", **settings)
    start(part, tmp_path / "b" / "run")
    resume(tmp_path / "b" / "run", ["stop.trials=24"])
    whole = read(tmp_path / "a" / "run")
    assert len(whole.trials(role="warm_start")) == 10
    assert len(whole.trials(role="baseline")) == 6
    assert rows(tmp_path / "a" / "run") == rows(tmp_path / "b" / "run")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluator.fail_share=0.5"], "evaluator.fail_share is 0.5 here and 0.1"),
        (["space.resolution=32"], "the space has none of the"),
    ],
)
def test_an_earlier_campaign_that_cannot_be_compared_is_refused_before_anything_is_made(
    tmp_path: Path, earlier: Path, overrides: list[str], sentence: str
) -> None:
    new = load(tmp_path / "new", f"warm_start={earlier}", *overrides)
    with pytest.raises(ConfigError, match=sentence):
        start(new, tmp_path / "new" / "run")
    assert not (tmp_path / "new" / "run").exists()


def test_a_warm_start_from_a_folder_that_is_no_campaign_is_one_sentence(tmp_path: Path) -> None:
    path = write_synthetic(tmp_path)
    done = mnas("search", str(path), f"warm_start={tmp_path}", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "holds no campaign" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_baselines_share_of_trials_is_drawn_at_random_and_only_observed(
    tmp_path: Path,
) -> None:
    config = load(tmp_path / "x", PLUGIN, "baseline_share=0.25", trials=40, fail_share=0.0)
    start(config, tmp_path / "x" / "run")
    store = read(tmp_path / "x" / "run")
    random = store.trials(role="baseline")
    assert [trial.id for trial in random] == list(range(3, 40, 4))
    assert [r.proposal.tokens for r in Curious.told] == [trial.tokens for trial in random]
    own = store.trials(role="search")
    assert [trial.proposal_id for trial in own] == list(range(30))
    choices = load_space("small_image").num_choices
    for trial in random:
        assert trial.log_prob == pytest.approx(-np.log(choices).sum())


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5])
def test_the_baselines_share_is_met_at_every_length(share: float) -> None:
    for count in (1, 10, 99, 8000):
        drawn = sum(is_baseline(trial_id, share) for trial_id in range(count))
        assert abs(drawn - share * count) <= 1


def test_the_controllers_recommendations_are_handed_over_before_the_best_observed(
    tmp_path: Path,
) -> None:
    start(load(tmp_path / "x", PLUGIN, trials=16, fail_share=0.0), tmp_path / "x" / "run")
    store = read(tmp_path / "x" / "run")
    by_reward = sorted(store.trials(), key=lambda trial: trial.reward or 0.0)
    chosen = candidates(store, 12)
    assert [t.id for t in chosen[:10]] == [t.id for t in by_reward[:10]]
    assert [t.id for t in chosen[10:]] == [t.id for t in by_reward[:-3:-1]]


def test_without_a_recommendation_the_highest_observed_rewards_are_handed_over(
    tmp_path: Path,
) -> None:
    start(load(tmp_path / "x", controller="random", trials=16), tmp_path / "x" / "run")
    store = read(tmp_path / "x" / "run")
    assert _ids(candidates(store, 3)) == _ids(store.best(3))


def _ids(trials: list[Trial]) -> list[int]:
    return [trial.id for trial in trials]


def test_an_evaluator_that_knows_no_metrics_leaves_a_probe_without_an_answer(
    tmp_path: Path,
) -> None:
    silent = "evaluator={class: 'plugin_parts:FaultyEvaluator', options: {}}"
    start(load(tmp_path / "x", PLUGIN, silent, trials=8), tmp_path / "x" / "run")
    assert Curious.metrics == []


@pytest.mark.skipif("MNAS_ACCEL_NASBENCH" not in os.environ, reason="no Accel-NASBench data")
def test_accuracies_carry_over_to_another_device_and_latencies_are_its_own(tmp_path: Path) -> None:
    first = load_campaign_config("accel_nasbench", ["stop.trials=16"])
    start(first, tmp_path / "a100")
    second = load_campaign_config(
        "accel_nasbench",
        [
            "evaluator.device=zcu102", "objective.target_ms=5.7", "stop.trials=16",
            f"warm_start={tmp_path / 'a100'}",
        ],
    )  # fmt: skip
    start(second, tmp_path / "zcu102")
    carried = read(tmp_path / "zcu102").trials(role="warm_start")
    known = {t.architecture: t for t in read(tmp_path / "a100").trials()}
    assert len(carried) == 16
    for trial in carried:
        before = known[trial.architecture]
        assert trial.accuracy == before.accuracy
        assert trial.latency_ms is not None
        assert before.latency_ms is not None
        assert trial.latency_ms > 10 * before.latency_ms


def test_an_earlier_campaigns_network_can_be_handed_over(
    tmp_path: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> list[str]:
        raise TrialFailed("no time for that")

    monkeypatch.setattr(finalists, "run_retrain", fail)
    recipe = "retrain={top: 1, recipe: digits}"
    warm = load(tmp_path / "new", f"warm_start={earlier}", recipe, trials=8)
    with create(tmp_path / "new" / "run", warm) as campaign:
        parts, watcher = Parts(warm), Silent()
        Search(campaign, parts, watcher).run()
        best = campaign.store.trials(role="warm_start")[0]
        campaign.store.set_meta("recommended", [best.id])
        assert hand_over(campaign, parts, watcher) is None
        (finalist,) = campaign.store.trials(role="finalist")
    assert finalist.architecture == best.architecture
    assert finalist.finalist_of == best.id < 0
    assert finalist.seed == trial_seed(0, best.id, FULL_TRAINING)
    assert finalist.seed not in (trial_seed(0, -best.id, FULL_TRAINING), best.seed)


def test_of_several_trainings_of_a_network_the_mean_is_carried_over_once(tmp_path: Path) -> None:
    twice = load(tmp_path / "first", "trainings_per_network=2", TINY, trials=16, fail_share=0.0)
    start(twice, tmp_path / "first" / "run")
    first = read(tmp_path / "first" / "run")
    assert first.superseded()
    warm = load(
        tmp_path / "second", TINY, f"warm_start={tmp_path / 'first' / 'run'}", trials=8,
        fail_share=0.0,
    )  # fmt: skip
    start(warm, tmp_path / "second" / "run")
    again = read(tmp_path / "second" / "run").trials(role="warm_start")
    carried = {t.architecture: t for t in again}
    assert len(carried) == len(again)
    last = {t.architecture: t for t in first.trials() if t.outcome == "completed"}
    assert {text: t.accuracy for text, t in carried.items()} == {
        text: t.accuracy for text, t in last.items()
    }


def test_the_earlier_devices_figures_are_not_carried_over(tmp_path: Path, earlier: Path) -> None:
    space, trials = load_space("small_image"), read(earlier).trials()
    for measured, names in ((False, {"latency_ms", "latency_ms:x", "macs"}), (True, {"macs"})):
        known = [
            replace(t, metrics={"latency_ms": 9.0, "latency_ms:x": 9.0, "macs": 1.0})
            for t in trials
        ]
        members = list(_members(known, space, measured=measured))
        assert len(members) == len(known)
        assert all(set(trial.metrics or {}) == names for trial in members)


def test_a_network_too_slow_for_the_earlier_device_is_measured_here(
    tmp_path: Path, earlier: Path
) -> None:
    # All of them were slower than this allows, by the stand-in's figures.
    settings = [
        "device={name: here, kind: onnxruntime, effort: quick, attempts: 1}",
        "objective={name: soft, target_ms: 1.0e-6, reject_above: 1.0}",
        f"warm_start={{campaign: {earlier}, trials: 2}}",
    ]
    start(load(tmp_path / "new", *settings, trials=1, controller="random"), tmp_path / "new" / "r")
    carried = read(tmp_path / "new" / "r").trials(role="warm_start")
    assert len(carried) == 2
    for trial in carried:
        assert trial.outcome == "rejected"
        assert trial.measurement_ids
