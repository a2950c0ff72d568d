"""Campaigns on several devices at once, and caps on what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from campaigns import mnas_here, write_synthetic

from search.config import load_campaign_config
from search.engine import start
from search.store import Store
from search.trial import Trial
from space.errors import ConfigError

ONE, TWO = (
    f"{{name: {name}, kind: onnxruntime, threads: {threads}, effort: quick, attempts: 1}}"
    for name, threads in (("one", 1), ("two", 2))
)
BOTH = [f"device={ONE}", f"other_devices=[{TWO}]", "controller={name: random}"]


def run(folder: Path, *overrides: str, trials: int = 3) -> list[Trial]:
    config = load_campaign_config(
        str(write_synthetic(folder, trials=trials, fail_share=0.0)), overrides
    )
    start(config, folder / "run")
    return Store(folder / "run" / "campaign.db", read_only=True).trials()


def both_ratios(trial: Trial, targets: dict[str, float]) -> list[float]:
    assert trial.metrics is not None
    return [trial.metrics[f"latency_ms:{name}"] / target for name, target in targets.items()]


def test_the_worst_devices_ratio_to_its_target_counts(tmp_path: Path) -> None:
    targets = {"one": 3.0, "two": 0.5}
    trials = run(tmp_path, *BOTH, "objective.other_targets_ms={two: 0.5}")
    for trial in trials:
        assert len(trial.measurement_ids) == 2
        assert trial.latency_ms == pytest.approx(3.0 * max(both_ratios(trial, targets)))
        assert trial.parts is not None
        assert trial.parts.ratio == pytest.approx(max(both_ratios(trial, targets)))


def test_weights_let_the_mean_ratio_count(tmp_path: Path) -> None:
    targets = {"one": 3.0, "two": 0.5}
    weights = "objective.device_weights={one: 3.0, two: 1.0}"
    trials = run(tmp_path, *BOTH, "objective.other_targets_ms={two: 0.5}", weights)
    for trial in trials:
        one, two = both_ratios(trial, targets)
        assert trial.latency_ms == pytest.approx(3.0 * (3 * one + two) / 4)


def test_a_reference_network_gives_each_device_its_target(tmp_path: Path) -> None:
    reference = "objective={name: soft, target: {reference: mnasnet-small, times: 0.5}}"
    (trial,) = run(tmp_path, *BOTH, reference, trials=1)
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    targets = store.meta("targets")
    assert list(targets) == ["one", "two"]
    # What the report shows of the target's origin.
    assert store.measurement(store.meta("target_measurement")).median_ms == targets["one"] * 2
    assert trial.latency_ms == pytest.approx(targets["one"] * max(both_ratios(trial, targets)))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "other_targets_ms must be given for ['two']"),
        (["objective.other_targets_ms={three: 1.0}"], "must be for ['two'], but got ['three']"),
        (
            ["objective.other_targets_ms={two: 1.0}", "objective.device_weights={two: 1.0}"],
            "must be for ['one', 'two'], but got ['two']",
        ),
        ([f"other_devices=[{ONE}]"], "names of their own, but got ['one', 'one']"),
        (["device=null"], "other_devices must be left out without device"),
    ],
)
def test_what_several_devices_lack_is_one_sentence(
    tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_campaign_config(str(write_synthetic(tmp_path)), [*BOTH, *overrides])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("name", "limit"), [("macs", 1e7), ("parameters", 2e5)])
def test_networks_above_a_cap_are_rejected_before_they_are_trained(
    tmp_path: Path, name: str, limit: float
) -> None:
    trials = run(
        tmp_path, "controller={name: random}", f"objective.caps.{name}={limit}", trials=40
    )
    assert {trial.outcome for trial in trials} == {"completed", "rejected"}
    for trial in trials:
        assert trial.metrics is not None
        assert (trial.outcome == "rejected") == (trial.metrics[name] > limit)
        if trial.failure is not None:
            assert f"rejected before training: {name} is" in trial.failure.reason


def test_the_size_of_the_model_file_can_be_capped(tmp_path: Path) -> None:
    trials = run(tmp_path, *BOTH[::2], "objective.caps.model_mb=0.25", trials=12)
    assert {trial.outcome for trial in trials} == {"completed", "rejected"}
    for trial in trials:
        metrics: dict[str, Any] = trial.metrics or {}
        assert (trial.outcome == "rejected") == (metrics["model_mb"] > 0.25)


def test_a_cap_that_needs_a_device_is_refused_without_one(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path)
    done = mnas_here(
        "search", str(config), "objective.caps.model_mb=1.0", "--out", str(tmp_path / "x")
    )
    assert done.returncode == 2
    assert "must be measured: give a device" in done.stderr
    assert not (tmp_path / "x").exists()
