"""Children that are stopped early: by what rule, what is recorded, what a resume makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import TESTS, controller_states, mnas_here, rows, write_synthetic
from retrain_parts import TINY, TINY_RECIPE

from retrain.config import Recipe
from retrain.train import Trainer
from search.config import TrainEvaluatorConfig, campaign_config, load_campaign_config
from search.early_stop import EarlyStop, EarlyStopConfig
from search.engine import resume, start
from search.evaluation import Evaluation, TrainEvaluator, curve_of
from search.executor import Job, Stopped, run_job
from search.objective import Objective, ObjectiveConfig
from search.store import Store
from search.trial import Trial
from space.errors import ConfigError
from space.records import build, parse_yaml

RULE = ["evaluator.epochs=4", "early_stop={quantile: 0.5, min_trials: 8}"]


def run(folder: Path, overrides: Sequence[str], **settings: Any) -> Path:
    folder.mkdir()
    path = write_synthetic(folder, **settings)
    start(load_campaign_config(str(path), overrides), folder / "run")
    return folder / "run"


def trials_of(folder: Path) -> list[Trial]:
    store = Store(folder / "campaign.db", read_only=True)
    trials = store.trials()
    store.close()
    return trials


def trial(trial_id: int, accuracy: float, latency_ms: float) -> Trial:
    """One that was as accurate as this after its first epoch."""
    metrics = {"accuracy@epoch1": accuracy, "latency_ms": latency_ms}
    return Trial(trial_id, 0, "search", trial_id, (0,), 0.0, "", "", 0, 2.0, metrics=metrics)


@pytest.mark.parametrize("name", ["soft", "hard", "absolute"])
@pytest.mark.parametrize("latency_ms", [5.0, 10.0, 30.0])
def test_the_bar_is_the_accuracy_that_gives_the_quantile_of_earlier_rewards(
    name: str, latency_ms: float
) -> None:
    objective = Objective(ObjectiveConfig(name=name, target_ms=10.0), 10.0)  # type: ignore[arg-type]
    rule = EarlyStop(EarlyStopConfig(quantile=0.5, min_trials=5), objective, 2.0)
    earlier = [trial(i, 0.1 * (i + 1), 8.0 + i) for i in range(5)]
    rule.note(earlier[:4])
    assert rule.bars({"latency_ms": latency_ms}) == {1: 0.0}  # too few to compare with
    rule.note(earlier[4:])
    rewards = sorted(objective.reward(t.metrics["accuracy@epoch1"], t.metrics)[0] for t in earlier)
    bar = rule.bars({"latency_ms": latency_ms})[1]
    # The reward's formula is linear in the accuracy, so it may be inverted outside [0, 1], too.
    low, _ = objective.reward(0.0, {"latency_ms": latency_ms})
    high, _ = objective.reward(1.0, {"latency_ms": latency_ms})
    assert low + bar * (high - low) == pytest.approx(rewards[2])


def test_a_result_taken_over_does_not_count_again() -> None:
    objective = Objective(ObjectiveConfig(target_ms=10.0), 10.0)
    rule = EarlyStop(EarlyStopConfig(min_trials=2), objective, 2.0)
    first = trial(0, 0.5, 10.0)
    rule.note([first, replace(first, id=1, reused_from=0)])
    assert rule.bars({"latency_ms": 10.0}) == {1: 0.0}


def test_who_was_stopped_was_below_the_median_of_earlier_batches(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", RULE, trials=96, fail_share=0.0, controller="random")
    trials = trials_of(folder)
    stopped = [t for t in trials if t.outcome == "stopped"]
    assert 20 <= len(stopped) <= 80
    assert any(max(curve_of(t.metrics or {})) > 1 for t in stopped)  # not all at the first look
    objective = Objective(ObjectiveConfig(name="soft", target_ms=3.0), 3.0)

    def reward(t: Trial, epoch: int) -> float:
        assert t.metrics is not None
        return objective.reward(curve_of(t.metrics)[epoch], t.metrics)[0]

    for t in trials:
        curve = curve_of(t.metrics or {})
        assert list(curve) == list(range(1, len(curve) + 1))
        for epoch in curve:
            earlier = sorted(
                reward(o, epoch) for o in trials
                if o.batch < t.batch and epoch in curve_of(o.metrics or {})
                and o.reused_from is None
            )  # fmt: skip
            passes = len(earlier) < 8 or reward(t, epoch) >= earlier[len(earlier) // 2] - 1e-12
            assert passes == (epoch < len(curve) or t.outcome == "completed")
        if t.outcome == "stopped":
            assert t.reward is None
            assert t.accuracy is None
            assert t.failure is not None
            assert f"after epoch {len(curve)} of 4" in t.failure.reason
    report = (folder / "report.html").read_text()
    assert "stopped early after epoch" in report


def test_a_campaign_with_the_rule_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", RULE, trials=64)
    parts = run(tmp_path / "parts", RULE, trials=24)
    resume(parts, ["stop.trials=64"])
    assert any(row["outcome"] == "stopped" for row in rows(whole))
    assert rows(parts) == rows(whole)
    assert controller_states(parts) == controller_states(whole)


def test_workers_that_do_not_wait_for_one_another_stop_children_too(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", [*RULE, "mode=async"], trials=64, fail_share=0.0)
    outcomes = [t.outcome for t in trials_of(folder)]
    assert outcomes.count("stopped") >= 8
    resume(folder, ["stop.trials=96"])
    assert [t.outcome for t in trials_of(folder)][:64] == outcomes
    status = json.loads(mnas_here("status", str(folder), "--json").stdout)
    stopped = [t for t in trials_of(folder) if t.outcome == "stopped"]
    assert status["trials_stopped"] == len(stopped) > outcomes.count("stopped")


def test_a_quantile_of_0_stops_nobody_and_records_the_curves(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", ["evaluator.epochs=4"], trials=32)
    rule = ["evaluator.epochs=4", "early_stop={quantile: 0, min_trials: 1}"]
    curves = run(tmp_path / "curves", rule, trials=32)
    for a, b in zip(trials_of(plain), trials_of(curves), strict=True):
        assert (a.outcome, a.accuracy, a.reward) == (b.outcome, b.accuracy, b.reward)
        assert not curve_of(a.metrics or {})
        assert b.outcome == "failed" or list(curve_of(b.metrics or {})) == [1, 2, 3]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("early_stop={after_epochs: 1}", "after_epochs must be below the evaluator's 1 epochs"),
        ("early_stop={quantile: 1.5}", "quantile must be in"),
        ("early_stop={evry: 1}", "evry"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_with_a_sentence(
    tmp_path: Path, override: str, sentence: str
) -> None:
    path = write_synthetic(tmp_path, trials=8)
    done = mnas_here("search", str(path), override, "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_evaluator_that_gives_the_latency_too_late_is_refused(tmp_path: Path) -> None:
    values = {
        "name": "late",
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"class": "plugin_parts:TwoEpochs", "options": {}},
        "objective": {"target_ms": 2.0},
        "executor": {"name": "serial"},
        "early_stop": {},
        "stop": {"trials": 8},
    }
    with pytest.raises(ConfigError, match="latency must be known before"):
        start(campaign_config(values, where="test", folder=tmp_path), tmp_path / "run")


@pytest.mark.slow
def test_a_real_training_tells_its_epochs_and_ends_where_it_is_told_to() -> None:
    recipe = build(Recipe, {**parse_yaml(TINY_RECIPE, where="tiny"), "epochs": 2}, where="tiny")
    evaluator = TrainEvaluator(TrainEvaluatorConfig("train", recipe), threads=1)
    whole = run_job(evaluator, Job(0, TINY, 1, {1: 0.0}), 600.0)
    assert isinstance(whole, Evaluation)
    stopped = run_job(evaluator, Job(0, TINY, 1, {1: 1.1}), 600.0)
    assert isinstance(stopped, Stopped)
    assert "after epoch 1 of 2" in stopped.reason
    assert set(curve_of(stopped.metrics)) == set(curve_of(whole.metrics)) == {1}


DYING = """
import os, sys
from retrain_parts import TINY, TINY_RECIPE
from search.evaluation import TrainEvaluator
from test_early_stop import evaluator_with_checkpoints
from pathlib import Path

class Dying(TrainEvaluator):
    def report(self, epoch, accuracy):
        super().report(epoch, accuracy)
        if epoch == 2:
            os._exit(9)

evaluator = evaluator_with_checkpoints(Path(sys.argv[1]), Dying)
evaluator.begin({1: 0.0, 2: 0.0})
evaluator.evaluate(TINY, seed=1, time_limit_s=600)
"""


def evaluator_with_checkpoints(
    folder: Path, kind: type[TrainEvaluator] = TrainEvaluator
) -> TrainEvaluator:
    values = {
        **parse_yaml(TINY_RECIPE, where="tiny"), "epochs": 3, "optimizer": {"name": "sgd"},
    }  # fmt: skip
    recipe = build(Recipe, values, where="tiny")
    return kind(TrainEvaluatorConfig("train", recipe, str(folder)), threads=1)


@pytest.mark.slow
def test_a_child_whose_worker_died_goes_on_from_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "children"
    died = subprocess.run(
        [sys.executable, "-c", DYING, str(folder)], cwd=TESTS, timeout=300, check=False
    )
    assert died.returncode == 9
    assert len(list(folder.iterdir())) == 1
    # A trial that is given up for good leaves nothing either.
    given_up = shutil.copytree(folder, tmp_path / "given_up")
    evaluator_with_checkpoints(given_up).forget(TINY, seed=2)
    assert len(list(given_up.iterdir())) == 1
    evaluator_with_checkpoints(given_up).forget(TINY, seed=1)
    assert list(given_up.iterdir()) == []
    steps = []
    take_step = Trainer.take_step
    monkeypatch.setattr(
        Trainer, "take_step", lambda self: (steps.append(self.step), take_step(self))[1]
    )
    went_on = run_job(evaluator_with_checkpoints(folder), Job(0, TINY, 1, {1: 0.0, 2: 0.0}), 600.0)
    assert isinstance(went_on, Evaluation)
    first, steps[:] = steps[0], []
    whole = run_job(evaluator_with_checkpoints(folder), Job(0, TINY, 1, {1: 0.0, 2: 0.0}), 600.0)
    assert isinstance(whole, Evaluation)
    # It died on telling of its second epoch, whose state was not written yet.
    assert (steps[0], first) == (0, len(steps) // 3)
    assert went_on.accuracy == whole.accuracy
    assert curve_of(went_on.metrics) == curve_of(whole.metrics)
    # A child that has ended leaves nothing behind.
    assert list(folder.iterdir()) == []
