"""A1's campaign at scale: what its file holds, and the file itself run as a miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from campaigns import mnas
from image_folders import make_image_folder

from retrain.config import NetworkConfig, load_recipe
from search.config import RayConfig, TrainEvaluatorConfig, load_campaign_config
from search.store import Store
from space.architecture import parse_architecture
from space.mnasnet import published
from space.search_space import load_space

#: 10 steps in place of 24,000, at 32 pixels, on this host's CPU.
MINIATURE = (
    "space.resolution=32",
    "space.classes=20",
    "evaluator.recipe.data.validation_images=40",
    "evaluator.recipe.epochs=1",
    "evaluator.recipe.batch_size=16",
    "evaluator.recipe.style.batch_norm_momentum=0.8",
    "device=host_quick",
    # This host trains and measures on the same cores: in turn.
    "mode=sync",
    "batch_size=4",
    "executor.npus=0",
    "executor.workers=1",
    "executor.threads=1",
    "executor.time_limit_s=300",
    "stop.trials=12",
    "retrain.top=1",
    "retrain.threads=1",
    "retrain.recipe.data.validation_images=40",
    "retrain.recipe.epochs=1",
    "retrain.recipe.batch_size=16",
    "retrain.recipe.accumulate=1",
    "retrain.recipe.global_batch=16",
    "retrain.recipe.style.batch_norm_momentum=0.8",
)


def test_the_campaign_is_the_papers_and_its_space_holds_a1_and_b1() -> None:
    config = load_campaign_config("mnasnet_a1")
    assert config.stop.trials == 8000
    assert (config.objective.target_ms, config.objective.name) == (75.0, "soft")
    assert (config.objective.alpha, config.objective.beta) == (-0.07, -0.07)
    assert config.controller.name == "ppo"
    assert isinstance(config.executor, RayConfig)
    assert (config.executor.npus, config.executor.workers) == (1, None)
    space = load_space(config.space.name)
    assert published("mnasnet-a1") in space
    assert published("mnasnet-b1") in space


def test_children_have_the_papers_training_with_every_stage_shortened_alike() -> None:
    config = load_campaign_config("mnasnet_a1")
    assert isinstance(config.evaluator, TrainEvaluatorConfig)
    child, full = config.evaluator.recipe, load_recipe("mnasnet_a1_paper")
    share = 5 / 350
    assert (child.epochs, full.epochs) == (5, 350)
    assert child.schedule.warmup_epochs == pytest.approx(share * full.schedule.warmup_epochs)
    assert child.schedule.decay_epochs == pytest.approx(share * full.schedule.decay_epochs)
    assert child.schedule.decay_rate == full.schedule.decay_rate
    per_image = full.schedule.learning_rate / 4096
    assert child.schedule.learning_rate / child.batch_size == pytest.approx(per_image)
    assert child.data.validation_images == 50_000
    unlike = {"epochs": 350, "batch_size": 512, "global_batch": 4096, "ema_decay": 0.9999}
    assert replace(child, schedule=full.schedule, network=full.network, **unlike) == full


def test_the_hand_over_is_the_papers_recipe_on_one_worker() -> None:
    retrain = load_campaign_config("mnasnet_a1").retrain
    assert retrain is not None
    assert retrain.top == 15
    paper = load_recipe("mnasnet_a1_paper")
    assert retrain.recipe.batch_size * retrain.recipe.accumulate == paper.global_batch == 4096
    network = NetworkConfig("mnasnet-a1", resolution=224)
    alike = replace(retrain.recipe, batch_size=512, accumulate=1, network=network)
    assert alike == paper


@pytest.mark.slow
@pytest.mark.timeout(900)  # 4 to 5 minutes on one core, most of them for compiling 12 graphs
def test_the_campaign_runs_as_a_miniature_from_folder_to_report(tmp_path: Path) -> None:
    data = make_image_folder(tmp_path / "photographs", classes=20, train=10, val=2)
    paths = [f"{part}.recipe.data.path={data}" for part in ("evaluator", "retrain")]
    folder = tmp_path / "run"
    done = mnas(
        "search", "mnasnet_a1", *paths, *MINIATURE, "--out", str(folder), "--json", timeout_s=840
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["trials"] == 12

    store = Store(folder / "campaign.db", read_only=True)
    trials = store.trials(role="search")
    assert [trial.id for trial in trials] == list(range(12))
    rewarded = [trial for trial in trials if trial.reward is not None]
    assert rewarded
    for trial in rewarded:
        measurement = store.measurement(trial.measurement_ids[0])
        assert trial.latency_ms == measurement.median_ms
        assert len(measurement.samples_ms) >= 15
    (finalist,) = store.trials(role="finalist")
    assert finalist.outcome == "completed"
    store.close()

    winner = outcome["winner"]
    assert winner["trial"] == finalist.finalist_of
    assert winner["test_images"] == 40
    assert winner["onnx"] == "export/model.onnx"
    assert (folder / winner["weights"]).exists()
    graph = onnx.load(folder / winner["onnx"])
    described = {entry.key: entry.value for entry in graph.metadata_props}
    network = parse_architecture(described["architecture"])
    assert (network.resolution, network.classes) == (32, 20)
    assert network in load_space("mnasnet_derivation", resolution=32, classes=20)
    assert (folder / "report.html").stat().st_size > 1000
