"""`mnas check`: the plan of a campaign, what is lacking, networks tried, and the estimate."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import mnas, mnas_here, write_synthetic
from test_json_page import documented

from retrain.data import load_data
from search import check_networks
from search.check import (
    STATE_COPIES,
    Estimate,
    Plan,
    estimate,
    lacks,
    look,
    num_workers,
    plan,
)
from search.check_brief import EVALUATED, cut_short
from search.check_networks import (
    CheckOptions,
    Member,
    Noise,
    Report,
    check,
    networks,
)
from search.config import CampaignConfig, TrainEvaluatorConfig, load_campaign_config
from search.extremes import extreme_network
from search.parts import campaign_space
from space.cost import count
from space.errors import ConfigError
from space.search_space import load_space


def synthetic(folder: Path, *overrides: str, **settings: Any) -> CampaignConfig:
    return load_campaign_config(str(write_synthetic(folder, **settings)), overrides)


def checked(config: CampaignConfig, folder: Path, **options: Any) -> Report:
    findings = look(config, folder / "run")
    planned = plan(config, folder / "run", findings)
    return check(config, planned, findings, CheckOptions(**options))


def test_a_wrong_setting_gets_one_sentence_and_nothing_is_created(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path)
    done = mnas_here("check", str(config), "stop.trails=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("mnas: ")
    assert "did you mean 'trials'" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [config]


def test_the_command_says_the_plan_tries_networks_and_creates_nothing(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, fail_share=0.0)
    done = mnas("check", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10^13.2 token vectors" in done.stdout
    assert "smallest" in done.stdout
    assert "(measured" in done.stdout
    assert "over 3 seeds of one network" in done.stdout
    assert "money      not known: --price P, of a worker hour, gives it" in done.stdout
    assert list(tmp_path.iterdir()) == [config]


def test_json_is_one_object_whose_keys_are_documented(tmp_path: Path) -> None:
    done = mnas("check", str(write_synthetic(tmp_path)), "--repeats", "2", "--json", cwd=tmp_path)
    (line,) = done.stdout.strip().splitlines()
    report = json.loads(line)
    assert set(report) == {field.name for field in dataclasses.fields(Report)}
    assert len(report["networks"]) == 5
    words = documented("**`mnas check CONFIG`**")
    for record in (Report, Plan, Member, Noise, Estimate):
        assert {field.name for field in dataclasses.fields(record)} <= words


def test_the_plan_of_a_shipped_campaign(tmp_path: Path) -> None:
    config = load_campaign_config("digits")
    findings = look(config, tmp_path / "run")
    planned = plan(config, tmp_path / "run", findings)
    space = load_space("small_image", resolution=16, classes=10, input_channels=1)
    assert planned.size_log10 == pytest.approx(math.log10(space.size))
    assert (planned.workers, planned.cpus, planned.npus) == (2, 1, 0)
    assert (planned.epochs, planned.trials, planned.devices) == (2.0, 24, ("host_quick",))
    assert planned.target.startswith("0.7 x the latency of stem8")
    assert not lacks(findings, "evaluator")


@pytest.mark.parametrize(
    ("settings", "each_epoch", "validations", "done"),
    [((), False, 1, 1), ((), True, 40, 1), (("evaluator.checkpoints=/state",), False, 40, 3)],
)
def test_a_child_that_is_validated_after_each_epoch_takes_that_much_longer(
    settings: tuple[str, ...], each_epoch: bool, validations: int, done: int
) -> None:
    config = load_campaign_config("digits", ["evaluator.recipe.epochs=40", *settings])
    assert isinstance(config.evaluator, TrainEvaluatorConfig)
    network = extreme_network(campaign_space(config), -1)
    recipe = config.evaluator.recipe
    data = load_data(recipe.data, network.resolution, network.input_channels, recipe.augment)
    per_epoch = len(data.train) // recipe.batch_size
    cut = cut_short(config.evaluator, network, 2 * per_epoch + 1, each_epoch=each_epoch)
    assert cut is not None
    training = 37 * per_epoch * recipe.batch_size
    held_out = (validations - done) * len(data.validation)
    assert cut.images_left == training + EVALUATED * held_out


def test_what_a_cluster_has_and_this_machine_has_not_is_a_line_and_no_error(
    tmp_path: Path,
) -> None:
    config = load_campaign_config(
        "mnasnet_a1",
        [f"{key}.recipe.data.path={tmp_path / 'none'}" for key in ("evaluator", "retrain")],
    )
    report = checked(
        config, tmp_path, seconds_per_child=1800.0, seconds_per_measurement=20.0, plan_only=True
    )
    assert lacks(report.findings, "evaluator")
    assert lacks(report.findings, "retrain")
    assert lacks(report.findings, "workers: NPUs")
    assert report.networks == ()
    assert report.estimate.child_hours == 8000 * 1800 / 3600
    assert report.estimate.seconds_per_child_source == "stated"


def test_lacking_data_are_no_excuse_for_a_wrong_controller(tmp_path: Path) -> None:
    config = load_campaign_config("mnasnet_a1", ["controller={class: 'nowhere.at_all:Thing'}"])
    findings = look(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot import"):
        plan(config, tmp_path / "run", findings)


def test_a_folder_that_is_taken_is_said_to_be(tmp_path: Path) -> None:
    config = synthetic(tmp_path)
    assert lacks(look(config, tmp_path), "folder")
    assert not lacks(look(config, tmp_path / "new"), "folder")


def test_the_extremes_are_the_smallest_and_the_largest_of_a_space() -> None:
    space = load_space("small_image", resolution=16, classes=10, input_channels=1)
    tried = networks(space, seed=0)
    assert [role for role, _ in tried] == ["smallest", "largest", "random", "random", "random"]
    smallest, largest, *others = [count(network).macs for _, network in tried]
    assert all(smallest < macs < largest for macs in others)
    tokens = space.encode(tried[1][1])
    assert all(count(space.decode(t)).macs <= largest for t in space.neighbours(tokens))
    assert networks(space, seed=0) == tried
    assert networks(space, seed=1)[2:] != tried[2:]


def test_a_failing_evaluation_is_a_line_with_its_reason(tmp_path: Path) -> None:
    done = mnas(
        "check", str(write_synthetic(tmp_path, fail_share=1.0)), "--repeats", "0", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.count("FAILED     ") == 5
    assert "diverged" in done.stdout
    assert "LACKS      networks: all 5 failed" in done.stdout


def test_a_crash_of_an_evaluators_process_is_a_reason(tmp_path: Path) -> None:
    faults = ", ".join(["crash"] * 8)
    config = synthetic(
        tmp_path,
        f"evaluator={{class: 'plugin_parts:FaultyEvaluator', options: {{faults: [{faults}]}}}}",
    )
    report = checked(config, tmp_path, repeats=0)
    assert [network.failure for network in report.networks] == [
        "its process ended by itself, with status 7"
    ] * 5
    assert report.estimate.child_hours is None


def test_latencies_are_measured_on_the_device_and_a_failure_is_a_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = synthetic(
        tmp_path,
        f"device={{class: 'plugin_parts:FaultyDevice', options: {{log: {log}}}}}",
        fail_share=0.0,
    )
    report = checked(config, tmp_path, repeats=0)
    assert len(log.read_text().splitlines()) == 5
    for network in report.networks:
        fails = int(network.architecture_hash, 16) % 4 == 0
        assert ("the device went away" in (network.failure or "")) == fails
        assert (network.latencies_ms is None) == fails
    assert report.estimate.seconds_per_measurement_source == "measured"


def test_what_is_stated_is_not_tried(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = synthetic(
        tmp_path,
        f"device={{class: 'plugin_parts:FaultyDevice', options: {{log: {log}}}}}",
    )
    report = checked(config, tmp_path, seconds_per_child=2.0, seconds_per_measurement=1.0)
    assert report.networks == ()
    assert not log.exists()
    assert report.estimate.measuring_hours == 64 / 3600


def test_the_noise_is_the_spread_over_seeds_beside_that_over_networks(tmp_path: Path) -> None:
    report = checked(synthetic(tmp_path, fail_share=0.0), tmp_path, repeats=4)
    assert report.noise is not None
    assert len(set(report.noise.accuracies)) == 4
    # The stand-in's noise has a standard deviation of .003; networks differ by several points.
    assert report.noise.seed_sd is not None
    assert report.noise.network_sd is not None
    assert report.noise.seed_sd < 0.02 < report.noise.network_sd


def test_noise_that_would_take_long_is_left_out_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = synthetic(tmp_path, fail_share=0.0)
    report = checked(config, tmp_path)
    assert report.noise is not None
    assert len(report.noise.accuracies) == 3
    monkeypatch.setattr(check_networks, "NOISE_LIMIT_S", 0.0)
    report = checked(config, tmp_path)
    assert report.noise is None
    (finding,) = [finding for finding in report.findings if finding.name == "noise"]
    assert finding.state == "unknown"
    assert "takes 5 whole trainings, about 0 s; --repeats 3 does them" in finding.text
    asked = checked(config, tmp_path, repeats=2)
    assert asked.noise is not None
    assert len(asked.noise.accuracies) == 2


def test_the_finalists_weights_are_in_the_size_on_disk(tmp_path: Path) -> None:
    config = load_campaign_config("digits", ["retrain.top=3"])
    findings = look(config, tmp_path / "run")
    planned = plan(config, tmp_path / "run", findings)
    space = load_space("small_image", resolution=16, classes=10, input_channels=1)
    largest = 4 * count(extreme_network(space, 1)).parameters_with_statistics
    # Three finalists' last and best weights, the state of one, the ONNX file.
    assert planned.finalists_bytes == largest * (3 * 2 + STATE_COPIES + 1)
    (disk,) = [finding for finding in findings if finding.name == "disk"]
    assert disk.text.startswith(f"{planned.database_bytes + planned.finalists_bytes:,} of ")
    search_only = load_campaign_config("digits", ["retrain=null"])
    assert plan(search_only, tmp_path / "run", findings).finalists_bytes == 0


def test_the_estimate_in_sync_is_a_batchs_measuring_and_its_rounds_of_training(
    tmp_path: Path,
) -> None:
    config = synthetic(tmp_path, "executor={name: ray, workers: 3, npus: 1}", "stop.trials=20")
    found = estimate(config, child_s=(360.0, "stated"), measurement_s=None, price=2.0)
    # Batches of 8, 8 and 4 on 3 workers: 3 + 3 + 2 rounds of .1 h; no device, no measuring.
    assert found.search_hours == pytest.approx(0.8)
    assert found.child_hours == pytest.approx(2.0)
    assert found.accelerator_hours == pytest.approx(2.0)
    assert (found.measuring_hours, found.retrain_hours) == (0.0, 0.0)
    assert found.money == pytest.approx(2.0 * 3 * 0.8)


def test_the_estimate_in_async_is_the_slower_of_measuring_and_training(tmp_path: Path) -> None:
    device = "device={class: 'plugin_parts:FaultyDevice', options: {log: none}}"
    workers = "executor={name: ray, workers: 4, address: auto}"
    config = synthetic(tmp_path, workers, device, "mode=async", "stop.trials=20")
    trains = estimate(config, child_s=(720.0, "stated"), measurement_s=(36.0, "stated"))
    assert trains.search_hours == pytest.approx(20 * 0.2 / 4)
    assert trains.measuring_hours == pytest.approx(0.2)
    measures = estimate(config, child_s=(7.2, "stated"), measurement_s=(36.0, "stated"))
    assert measures.search_hours == pytest.approx(0.2)
    unknown = estimate(config, child_s=(7.2, "stated"), measurement_s=None)
    assert unknown.search_hours is None


def test_full_trainings_cost_a_childs_time_per_epoch_on_the_same_images_only() -> None:
    digits = load_campaign_config("digits", ["retrain.top=3", "retrain.recipe.epochs=20"])
    child = (36.0, "stated")
    assert estimate(digits, child_s=child, measurement_s=None).retrain_hours == pytest.approx(
        3 * 0.01 * 20 / 2
    )
    other = load_campaign_config("digits", ["evaluator.recipe.data.train_images=100"])
    assert estimate(other, child_s=child, measurement_s=None).retrain_hours is None


def test_a_cluster_decides_the_number_of_workers_that_is_not_given(tmp_path: Path) -> None:
    config = synthetic(tmp_path, "executor={name: ray, address: auto}")
    assert num_workers(config) is None
    assert estimate(config, child_s=(1.0, "stated"), measurement_s=None).search_hours is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_steps_tell_the_time_of_a_real_training(tmp_path: Path) -> None:
    config = load_campaign_config("digits")
    report = checked(config, tmp_path, seconds_per_measurement=0.1, steps=4, repeats=0)
    assert len(report.networks) == 5
    for network in report.networks:
        assert network.failure is None
        assert network.step_s is not None
        assert network.child_s is not None
        assert network.peak_memory_mb is not None
        # The steps that are left out are in the estimate.
        assert network.child_s > 60 * network.step_s
        assert network.accuracy is None


def test_the_estimate_says_no_sum_where_a_part_is_not_known() -> None:
    # Its full trainings read other images than its children: their time is not known.
    config = load_campaign_config("fashion_mnist", ["executor.npus=1"])
    found = estimate(config, child_s=(30.0, "stated"), measurement_s=(0.5, "stated"), price=1.0)
    assert found.search_hours is not None
    assert (found.retrain_hours, found.money, found.accelerator_hours) == (None, None, None)
    found = estimate(
        replace(config, retrain=None), child_s=(30.0, "stated"), measurement_s=(0.5, "stated"),
        price=1.0,
    )  # fmt: skip
    assert found.money == pytest.approx(2 * (found.search_hours or 0.0))


def test_latencies_that_are_asked_for_alone_are_measurements_too() -> None:
    settings = ["controller={name: guided, latencies_per_trial: 4}", "stop.trials=100"]
    config = load_campaign_config("mnasnet_a1_laptop", settings)
    found = estimate(config, child_s=(0.0, "stated"), measurement_s=(1.0, "stated"))
    assert found.measurements == 500
    assert found.measuring_hours == pytest.approx(500 / 3600)


def test_with_early_stop_children_may_be_as_many_as_trials() -> None:
    early = ["early_stop={quantile: 0.5}", "evaluator.recipe.epochs=4"]
    for settings, most in (([], 103), (early, 1000)):
        config = load_campaign_config(
            "digits", ["stop.trials=1000", "stop.trained=100", *settings]
        )
        assert estimate(config, child_s=None, measurement_s=None).children == most
