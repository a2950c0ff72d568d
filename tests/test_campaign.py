"""Campaigns in this process with the deterministic evaluator: results, reuse, faults, refusal."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import TESTS, comparable, controller_states, mnas, rows, write_synthetic
from rich.console import Console

from search.campaign import open_to_read, open_to_write, read_config
from search.config import (
    CampaignConfig,
    campaign_config,
    config_to_plain,
    load_campaign_config,
)
from search.engine import Silent, resume, start
from search.history import read_history
from search.parts import campaign_space
from search.progress import Progress
from search.report_data import read_facts
from search.stop import Tally
from search.store import Store
from search.tables import campaign_summary
from search.trial import Failure, Trial
from space.architecture import parse_architecture
from space.cost import count
from space.errors import ConfigError, MeasurementError
from space.records import shipped_names


def run_synthetic(folder: Path, **settings: object) -> Path:
    folder.mkdir()
    config = load_campaign_config(str(write_synthetic(folder, **settings)))  # type: ignore[arg-type]
    start(config, folder / "run")
    return folder / "run"


def plugin_config(folder: Path, **changes: object) -> CampaignConfig:
    values = {
        "name": "faults",
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"class": "plugin_parts:FaultyEvaluator", "options": {}},
        "objective": {"name": "hard", "target_ms": 2.0},
        "executor": {"name": "serial"},
        "batch_size": 8,
        "stop": {"trials": 32},
        **changes,
    }
    return campaign_config(values, where="test", folder=folder)


def test_a_campaign_records_every_trial_and_ends_with_its_stop_rule(tmp_path: Path) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=40)))
    outcome = start(config, tmp_path / "run")
    assert outcome.trials == 40
    assert "40 trials" in outcome.stop_reason
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    trials = store.trials()
    assert [trial.id for trial in trials] == list(range(40))
    assert all(trial.outcome is not None for trial in trials)
    completed = [trial for trial in trials if trial.outcome == "completed"]
    assert outcome.completed == len(completed)
    for trial in completed:
        assert trial.reward is not None
        assert trial.parts is not None
        assert trial.reward == pytest.approx(trial.parts.accuracy * trial.parts.factor)
        assert trial.network().hash == trial.architecture_hash
    failed = [trial for trial in trials if trial.outcome == "failed"]
    assert all(t.reward is None and t.failure is not None for t in failed)
    assert outcome.best is not None
    assert outcome.best.reward == max(t.reward or 0.0 for t in completed)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_the_same_seed_gives_the_same_campaign_and_another_seed_another(tmp_path: Path) -> None:
    first = rows(run_synthetic(tmp_path / "a", seed=3))
    assert first == rows(run_synthetic(tmp_path / "b", seed=3))
    assert first != rows(run_synthetic(tmp_path / "c", seed=4))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_network_that_comes_back_is_trained_again_and_its_mean_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    config = plugin_config(
        tmp_path,
        mode=mode,
        controller={"class": "plugin_parts:OneNetwork", "options": {}},
        evaluator={"class": "plugin_parts:LuckyFirst", "options": {}},
        objective={"name": "soft", "target_ms": 1.0},
        trainings_per_network=3,
        batch_size=2,
        stop={"trials": 5},
    )
    outcome = start(config, tmp_path / "run")
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    assert len({trial.seed for trial in trials[:3]}) == 3
    assert [t.outcome for t in trials] == ["completed"] * 3 + ["reused"] * 2
    assert [t.reused_from for t in trials[3:]] == [2, 2]
    # The trainings give .9, .6, .3: what is recorded is the mean so far.
    assert [t.accuracy for t in trials] == pytest.approx([0.9, 0.75, 0.6, 0.6, 0.6])
    own = [(t.metrics or {}).get("own_accuracy", t.accuracy) for t in trials[:3]]
    assert own == pytest.approx([0.9, 0.6, 0.3])
    # The first training's luck makes it nobody's best.
    assert outcome.best is not None
    assert outcome.best.id == 2
    with closing(Store(tmp_path / "run" / "campaign.db", read_only=True)) as store:
        history, facts = read_history(store), read_facts(store, config)
        tally = Tally(config.stop, store)
    assert history.best(5) == 2
    assert history.front().tolist() == [2]
    assert [trial.id for trial in facts.shown.best] == [2]
    assert facts.shown.front == [2]
    front = json.loads(mnas("top", str(tmp_path / "run"), "--front", "--json").stdout)
    assert [trial["trial"] for trial in front["trials"]] == [2]
    assert tally.reason() == "all 5 trials are done"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_device_that_is_gone_stops_the_search_and_its_networks_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    options = {"log": str(tmp_path / "log")}
    config = plugin_config(
        tmp_path,
        mode=mode,
        device={"class": "plugin_parts:UnpluggedDevice", "options": options},
        objective={"name": "soft", "target_ms": 1.0},
    )
    (tmp_path / "unplugged").touch()
    with pytest.raises(MeasurementError, match="no figure for 10 networks in a row, so the sea"):
        start(config, tmp_path / "run")
    (tmp_path / "unplugged").unlink()
    resume(tmp_path / "run")
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    outcomes = [trial.outcome for trial in trials]
    assert outcomes == ["failed"] * 9 + ["completed"] * 23


def test_what_a_failed_trial_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    log = tmp_path / "forgotten"
    options = {"faults": ["diverge", "raise", "diverge"], "log": str(log)}
    config = plugin_config(
        tmp_path, evaluator={"class": "plugin_parts:Forgetting", "options": options}
    )
    start(config, tmp_path / "run")
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    failed = [f"{t.architecture_hash} {t.seed}" for t in trials if t.outcome == "failed"]
    assert failed
    assert log.read_text().splitlines() == failed


def test_identical_networks_take_the_first_ones_result_and_say_so(tmp_path: Path) -> None:
    # The fixed tail of a tiny space repeats itself soon.
    space = tmp_path / "tiny.yaml"
    space.write_text(
        "name: tiny\nstem: 8\nstem_stride: 1\nhead: 16\nresolution: 8\nclasses: 4\n"
        "choices: {op: [dconv, mbconv3], kernel_size: [3, 5], skip: [identity]}\n"
        "blocks: [{filters: 8, layers: 1, stride: 1}]\n"
    )
    config = load_campaign_config(
        str(write_synthetic(tmp_path, controller="random", trials=32)), [f"space.name={space}"]
    )
    start(config, tmp_path / "run")
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    by_id = {trial.id: trial for trial in trials}
    originals = [trial for trial in trials if trial.reused_from is None]
    assert len(originals) == len({trial.architecture_hash for trial in trials}) <= 4
    for trial in trials:
        if trial.reused_from is not None:
            original = by_id[trial.reused_from]
            assert original.id < trial.id
            assert original.architecture_hash == trial.architecture_hash
            assert (trial.reward, trial.accuracy) == (original.reward, original.accuracy)
            assert trial.outcome in ("reused", "failed")


def test_a_policy_that_only_repeats_itself_is_stopped_with_a_sentence(tmp_path: Path) -> None:
    space = tmp_path / "two.yaml"
    space.write_text(
        "name: two\nstem: 8\nstem_stride: 1\nhead: 16\nresolution: 8\nclasses: 4\n"
        "choices: {op: [dconv, mbconv3]}\nblocks: [{filters: 8, layers: 1, stride: 1}]\n"
    )
    config = load_campaign_config(
        str(write_synthetic(tmp_path, controller="random", trials=400)), [f"space.name={space}"]
    )
    outcome = start(config, tmp_path / "run")
    assert "only repeated earlier networks" in outcome.stop_reason
    assert outcome.trials < 100


@pytest.mark.parametrize(
    ("override", "fail_share", "sentence"),
    [
        ("stop.trained=10", 0.0, "networks are trained"),
        ("stop.training_hours=1e-4", 0.0, "0.0001 hours of training are spent"),
        ("stop.no_improvement=16", 0.0, "was better than trial"),
        ("stop.failed_in_a_row=16", 1.0, "trials all failed: diverged"),
    ],
)
def test_a_stop_rule_ends_the_search_and_says_which(
    tmp_path: Path, override: str, fail_share: float, sentence: str
) -> None:
    path = write_synthetic(
        tmp_path, controller="random", trials=400, seconds=0.002, fail_share=fail_share
    )
    outcome = start(load_campaign_config(str(path), [override]), tmp_path / "run")
    assert sentence in outcome.stop_reason
    assert 10 <= outcome.trials < 400
    # A higher limit goes on; the stopped search has the same rule when it is looked at again.
    again = resume(tmp_path / "run")
    assert (again.stop_reason, again.trials) == (outcome.stop_reason, outcome.trials)


def test_extending_a_finished_campaign_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = run_synthetic(tmp_path / "whole", trials=64)
    parts = run_synthetic(tmp_path / "parts", trials=24)
    resume(parts, ["stop.trials=64"])
    assert rows(parts) == rows(whole)
    assert controller_states(parts) == controller_states(whole)


@pytest.mark.parametrize(
    ("target_ms", "sentence"),
    [
        (1e-6, "none of the first 8 networks meets the target"),
        (3.0, "of the first 8 networks meet"),
    ],
)
def test_after_the_first_batch_it_says_whether_the_target_is_within_reach(
    tmp_path: Path, target_ms: float, sentence: str
) -> None:
    path = write_synthetic(tmp_path, trials=24, controller="random")
    told = mnas(
        "search", str(path), f"objective.target_ms={target_ms}", "--out", str(tmp_path / "r")
    )
    assert told.stdout.count(sentence) == 1
    assert sentence in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.slow
def test_a_class_that_refuses_its_options_in_a_worker_says_why_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    config = plugin_config(
        tmp_path,
        evaluator={"class": "plugin_parts:RefusesInWorkers", "options": {}},
        executor={"name": "ray", "workers": 1},
    )
    with pytest.raises(ConfigError, match=r"^options: no data are here$"):
        start(config, tmp_path / "run")


def test_a_changed_setting_is_logged_and_a_forbidden_one_refused(tmp_path: Path) -> None:
    folder = run_synthetic(tmp_path / "a", trials=8)
    with pytest.raises(ConfigError) as caught:
        open_to_write(folder, ["seed=7", "objective.target_ms=9.0"])
    for part in ("seed is 0, given 7", "objective.target_ms is 3.0, given 9.0", "stop"):
        assert part in str(caught.value)
    with open_to_write(folder, ["stop.trials=16"]) as campaign:
        events = campaign.store.events()
    assert any("stop.trials: 8 -> 16" in message for _, _, message in events)


def test_a_folder_that_holds_a_campaign_or_anything_else_is_never_overwritten(
    tmp_path: Path,
) -> None:
    folder = run_synthetic(tmp_path / "a", trials=8)
    config = load_campaign_config(str(tmp_path / "a" / "synthetic.yaml"))
    before = rows(folder)
    with pytest.raises(ConfigError, match="holds a campaign already"):
        start(config, folder)
    assert rows(folder) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        start(config, other)
    assert (other / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="must be a folder"):
        start(config, tmp_path / "file")


def test_a_campaign_that_was_killed_as_it_began_begins_again(tmp_path: Path) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=8)))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine: 1")
    with pytest.raises(ConfigError, match="holds other files"):
        start(config, folder)
    assert (folder / "config.yaml").read_text() == "mine: 1"
    # What is written before the database.
    (folder / "campaign.lock").touch()
    (folder / "campaign.owner.json").write_text("{}")
    (folder / ".config.yaml.4711.tmp").write_text("name: ha")
    assert start(config, folder).trials == 8


def test_a_second_writer_is_refused_and_told_who_holds_the_campaign(tmp_path: Path) -> None:
    folder = run_synthetic(tmp_path / "a", trials=8)
    with (
        open_to_write(folder, ["stop.trials=16"]),
        pytest.raises(ConfigError, match=r"in use by process \d+ on .* since"),
    ):
        open_to_write(folder)
    with open_to_write(folder):
        pass


def test_failures_are_recorded_with_their_reason_and_the_campaign_goes_on(tmp_path: Path) -> None:
    faults = ["diverge", "raise"]
    config = plugin_config(
        tmp_path,
        evaluator={"class": "plugin_parts:FaultyEvaluator", "options": {"faults": faults}},
    )
    outcome = start(config, tmp_path / "run")
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    assert outcome.trials == 32
    reasons = {t.failure.reason for t in trials if t.failure is not None}
    assert reasons == {
        "diverged: loss was nan at step 3",
        "RuntimeError: kernel launch failed",
    }
    raised = next(t for t in trials if t.failure and t.failure.reason.startswith("Runtime"))
    assert raised.failure is not None
    assert "Traceback" in raised.failure.detail
    assert "with a second line" in (tmp_path / "run" / "campaign.log").read_text()


def test_a_failed_measurement_is_a_failed_trial_and_a_good_one_is_taken_once(
    tmp_path: Path,
) -> None:
    log = tmp_path / "measured"
    device = {"class": "plugin_parts:FaultyDevice", "options": {"log": str(log)}}
    start(plugin_config(tmp_path, device=device, stop={"trials": 64}), tmp_path / "run")
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    trials = store.trials()
    failed = [t for t in trials if t.outcome == "failed"]
    assert failed
    assert all("the device went away" in t.failure.reason for t in failed if t.failure)
    assert all(int(t.architecture_hash, 16) % 4 == 0 for t in failed)
    good = [t for t in trials if t.outcome == "completed"]
    for trial in good:
        measurement = store.measurement(trial.measurement_ids[0])
        assert trial.latency_ms == measurement.median_ms
        # The evaluator's own 1.0 ms is not taken where a device measures.
        assert trial.parts is not None
        assert trial.parts.latency_ms == measurement.median_ms
    measured = [h for h in log.read_text().split() if int(h, 16) % 4]
    assert len(measured) == len(set(measured))


def test_a_network_too_slow_is_rejected_before_training_only_if_asked(tmp_path: Path) -> None:
    log = tmp_path / "measured"
    config = plugin_config(
        tmp_path,
        device={"class": "plugin_parts:FaultyDevice", "options": {"log": str(log)}},
        objective={"name": "hard", "target_ms": 2.0, "reject_above": 1.5},
        stop={"trials": 64},
    )
    start(config, tmp_path / "run")
    trials = Store(tmp_path / "run" / "campaign.db", read_only=True).trials()
    rejected = [t for t in trials if t.outcome == "rejected"]
    assert rejected
    assert all((t.latency_ms or 0) > 3.0 and t.accuracy is None for t in rejected)
    assert all((t.latency_ms or 9) <= 3.0 for t in trials if t.outcome == "completed")


def test_a_target_by_reference_is_measured_once_and_kept(tmp_path: Path) -> None:
    log = tmp_path / "measured"
    reference = "stem8_s11 | r1_k3_s22_e3_i8_o16_noskip | head38 | r28 | c10"
    config = plugin_config(
        tmp_path,
        device={"class": "plugin_parts:FaultyDevice", "options": {"log": str(log)}},
        objective={"name": "soft", "target": {"reference": reference, "times": 2.0}},
        stop={"trials": 8},
    )
    outcome = start(config, tmp_path / "run")
    resumed = resume(tmp_path / "run", ["stop.trials=16"])
    assert resumed.target_ms == outcome.target_ms > 0
    hashes = log.read_text().split()
    assert hashes.count(hashes[0]) == 1


@pytest.mark.parametrize(("noisy", "measured", "warns"), [(3, 4, False), (9, 5, True)])
def test_a_target_does_not_rest_on_a_noisy_measurement_if_a_good_one_can_be_had(
    tmp_path: Path, noisy: int, measured: int, warns: bool
) -> None:
    log = tmp_path / "measured"
    reference = "stem8_s11 | r1_k3_s22_e3_i8_o16_noskip | head38 | r28 | c10"
    config = plugin_config(
        tmp_path,
        device={
            "class": "plugin_parts:NoisyAtFirst", "options": {"log": str(log), "noisy": noisy},
        },
        objective={"name": "soft", "target": {"reference": reference}},
        stop={"trials": 1},
    )  # fmt: skip
    outcome = start(config, tmp_path / "run")
    hashes = log.read_text().split()
    assert hashes.count(hashes[0]) == measured
    quiet_ms = count(parse_architecture(reference)).macs / 1e6 + 0.01
    assert outcome.target_ms == pytest.approx((1.5 if warns else 1.0) * quiet_ms)
    store = Store(tmp_path / "run" / "campaign.db", read_only=True)
    said = [message for _, kind, message in store.events() if kind == "target"]
    assert any("none of 5 of the reference network" in text for text in said) is warns


@pytest.mark.parametrize("name", shipped_names("search"))
def test_every_shipped_campaign_loads_and_its_resolved_form_is_the_same(
    name: str, tmp_path: Path
) -> None:
    config = load_campaign_config(name)
    plain = config_to_plain(config)
    assert campaign_config(plain, where="resolved", folder=tmp_path) == config


@pytest.mark.parametrize("name", shipped_names("search"))
def test_a_shipped_campaign_takes_any_controller_by_its_name(name: str) -> None:
    for controller in ("ppo", "reinforce", "guided", "evolution", "pareto", "local", "random"):
        config = load_campaign_config(name, [f"controller.name={controller}"])
        assert config.controller.name == controller


def test_a_campaign_keeps_the_space_that_it_began_with(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "{name: own, stem: 8, head: 16, resolution: 16, classes: 10,"
        " choices: {kernel_size: [3, 5]}, blocks: [{filters: [8, 16], layers: 1, stride: 1}]}"
    )
    settings = ["space={name: own.yaml, classes: 3}", "stop.trials=8"]
    # The name is looked up beside the campaign's file.
    config = load_campaign_config(str(write_synthetic(tmp_path)), settings)
    start(config, tmp_path / "run")
    own.write_text("{name: own, stem: 8, head: 16}")
    with pytest.raises(ConfigError, match="resolution is missing"):
        load_campaign_config(str(write_synthetic(tmp_path)), settings)
    own.unlink()
    space = campaign_space(read_config(tmp_path / "run"))
    assert (space.size, space.config.classes, space.config.stem) == (4, 3, 8)
    assert resume(tmp_path / "run", ["stop.trials=16"]).trials == 16


def test_a_users_own_part_is_written_into_the_resolved_configuration(tmp_path: Path) -> None:
    config = plugin_config(tmp_path)
    plain = config_to_plain(config)
    assert plain["evaluator"] == {"class": "plugin_parts:FaultyEvaluator", "options": {}}
    assert campaign_config(plain, where="resolved", folder=tmp_path) == config


def test_comparable_rows_leave_out_only_what_clocks_write(tmp_path: Path) -> None:
    folder = run_synthetic(tmp_path / "a", trials=8)
    trial = Store(folder / "campaign.db", read_only=True).trials()[0]
    assert {"tokens", "seed", "reward", "outcome", "log_prob"} <= set(comparable(trial))


@pytest.mark.parametrize(
    ("workers", "global_batch", "sentence"),
    [
        (1, None, "retrain.workers must be >= 2, or left out for one, but got 1"),
        (4, 64, "recipe's global_batch, 64, but got 4, which make it 256"),
    ],
)
def test_workers_of_a_full_training_must_fit_its_batch(
    tmp_path: Path, workers: int, global_batch: int | None, sentence: str
) -> None:
    path = write_synthetic(tmp_path)
    recipe = "data: {name: digits}, epochs: 1, schedule: {name: cosine, learning_rate: 0.1}"
    settings = [
        f"retrain={{recipe: {{{recipe}, batch_size: 64}}, workers: {workers}}}",
        f"retrain.recipe.global_batch={'null' if global_batch is None else global_batch}",
    ]
    with pytest.raises(ConfigError) as caught:
        load_campaign_config(str(path), settings)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("reason", ["no images in [/data/train]", "[conv2d] [/b] failed"])
def test_a_failures_words_are_printed_as_they_are(
    tmp_path: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_synthetic(tmp_path / "a", trials=8)
    trial = Store(folder / "campaign.db", read_only=True).trials()[0]
    failed = replace(trial, reward=None, outcome="failed", failure=Failure(reason, "architecture"))
    with Progress(Console(), 8, 0, None) as progress:
        progress.trial(failed)
    assert f"[1/8] trial 0: failed, {reason}, " in capsys.readouterr().out


def test_an_extended_campaign_is_not_finished_until_it_is(tmp_path: Path) -> None:
    folder, said = tmp_path / "run", []

    def summary() -> dict[str, Any]:
        with closing(open_to_read(folder)) as store:
            return campaign_summary(folder, store, read_config(folder))

    class Looking(Silent):
        def trial(self, trial: Trial) -> None:
            said.append(summary()["stop_reason"])

    config = load_campaign_config(str(write_synthetic(tmp_path, trials=64)), ["stop.trained=8"])
    assert start(config, folder).trials < 64
    assert summary()["state"] == "finished"
    resume(folder, ["stop.trained=16"], Looking())
    assert set(said) == {None}
    assert summary()["stop_reason"].endswith("networks are trained")


def test_whose_fault_an_unknown_error_is_a_second_attempt_tells(tmp_path: Path) -> None:
    options = {"faults": ["raise"] * 4 + ["raise_once"] * 4, "folder": str(tmp_path)}
    evaluator = {"class": "plugin_parts:FaultyEvaluator", "options": options}
    start(plugin_config(tmp_path, evaluator=evaluator), tmp_path / "run")
    trials = [t for t in Store(tmp_path / "run" / "campaign.db", read_only=True).trials()]
    once = [t for t in trials if int(t.architecture_hash, 16) % 8 >= 4]
    assert {trial.outcome for trial in once} == {"completed"}
    assert {trial.outcome for trial in trials if trial not in once} == {"failed"}
