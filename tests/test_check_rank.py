"""`mnas check --rank`: whether short trainings rank networks as full ones do."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import mnas, mnas_here, start_mnas, write_synthetic
from filelock import FileLock
from scipy.stats import kendalltau
from test_json_page import documented

from search import check_brief, check_rank
from search.check_brief import Brief
from search.check_rank import RankedNetwork, RankReport, open_ranking, spread
from search.check_tau import accuracy_noise, interval, kendall_tau, tau_of_noise
from search.check_text import rank_lines, time_left
from search.cli import app
from search.config import CampaignConfig, load_campaign_config
from search.executor import Job
from space.architecture import Architecture
from space.cost import count
from space.errors import ConfigError
from space.search_space import load_space

TINY_SPACE = """
name: tiny
stem: 8
stem_stride: 2
head: 32
resolution: 16
classes: 10
input_channels: 1
choices:
  op: [conv, mbconv3]
  kernel_size: [3]
  se_ratio: [0]
  skip: [none]
  filters_scale: [0.5, 1.0]
  layers_offset: [0, 1]
blocks:
  - {filters: 16, layers: 1, stride: 2}
  - {filters: 32, layers: 1, stride: 2}
"""


def failed(reason: str, cause: Any = "architecture") -> Brief:
    return Brief(reason, None, None, None, {}, None, cause=cause)


class Trainings:
    """Takes the place of trainings: accuracies by the networks' places in the order of size."""

    def __init__(self, proxies: dict[int, float | Brief], fulls: dict[int, float | Brief]) -> None:
        self.proxies, self.fulls = proxies, fulls
        #: (kind, macs) of each whole training; (kind, None) of a few steps.
        self.calls: list[tuple[str, int | None]] = []
        self.stop_after: int | None = None
        self.order: list[int] = []

    def of(self, networks: list[Architecture]) -> Trainings:
        self.order = sorted(count(network).macs for network in networks)
        return self

    def evaluate(
        self, config: CampaignConfig, network: Architecture, seed: int, steps: int | None
    ) -> Brief:
        return self._train("proxy", self.proxies, network, seed, steps)

    def fully(
        self, config: Any, network: Architecture, seed: int, steps: int | None, states: Any
    ) -> Brief:
        return self._train("full", self.fulls, network, seed, steps)

    def _train(
        self,
        kind: str,
        table: dict[int, float | Brief],
        network: Architecture,
        seed: int,
        steps: int | None,
    ) -> Brief:
        if steps is not None:
            self.calls.append((kind, None))
            return Brief(None, {"proxy": 10.0, "full": 100.0}[kind], 0.1, None, {}, None)
        if self.stop_after == len([call for call in self.calls if call[1] is not None]):
            raise KeyboardInterrupt
        macs = count(network).macs
        self.calls.append((kind, macs))
        outcome = table[self.order.index(macs)]
        if isinstance(outcome, Brief):
            return outcome
        images = {"proxy": 100, "full": 400}[kind]
        return Brief(None, 1.0, None, outcome, {}, None, images)


@pytest.fixture
def digits() -> CampaignConfig:
    return load_campaign_config("digits")


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, digits: CampaignConfig) -> Callable[..., Trainings]:
    """Replaces trainings of so many networks by tables of accuracies."""

    def replaced(
        proxies: list[float | Brief], fulls: list[float | Brief], number: int | None = None
    ) -> Trainings:
        made = Trainings(dict(enumerate(proxies)), dict(enumerate(fulls)))
        made.of(spread(digits_space(), digits.seed, number or len(proxies)))
        monkeypatch.setattr(check_rank, "evaluate_brief", made.evaluate)
        monkeypatch.setattr(check_rank, "train_fully", made.fully)
        return made

    return replaced


def digits_space() -> Any:
    return load_space("small_image", resolution=16, classes=10, input_channels=1)


def ranked(config: CampaignConfig, number: int, path: Path, *, repeats: int = 0) -> RankReport:
    with open_ranking(config, number, path, repeats=repeats) as ranking:
        ranking.try_out(4)
        while left := ranking.left():
            ranking.train(left[0])
        return ranking.report()


FULL = [0.80, 0.85, 0.90, 0.95]


# ---------------------------------------------------------------------------- networks


def test_the_networks_are_spread_from_the_smallest_to_the_largest() -> None:
    space = digits_space()
    macs = [count(network).macs for network in spread(space, 0, 17)]
    assert macs[:2] == [min(macs), max(macs)]
    drawn = [count(space.decode(space.sample(np.random.default_rng(n)))).macs for n in range(200)]
    # Between two neighbours lies a sixteenth of what is drawn.
    shares = np.histogram(drawn, bins=sorted(macs))[0] / len(drawn)
    assert shares.sum() == pytest.approx(1)
    assert shares.max() < 3 / 16


def test_fewer_networks_are_the_first_of_more_and_the_seed_decides() -> None:
    space = digits_space()
    many = spread(space, 0, 12)
    assert len({network.hash for network in many}) == 12
    assert spread(space, 0, 5) == many[:5]
    assert spread(space, 1, 12)[2:] != many[2:]


def test_a_small_space_has_only_so_many_networks(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY_SPACE)
    space = load_space(str(tmp_path / "tiny.yaml"))
    assert len(spread(space, 0, space.distinct_size)) == space.distinct_size
    with pytest.raises(ConfigError, match=f"at most {space.distinct_size}"):
        spread(space, 0, space.distinct_size + 1)


# ---------------------------------------------------------------------------- figures


def test_tau_is_kendalls_with_ties() -> None:
    # 10 pairs: one tied in a; of the other nine, eight agree. tau-b = (8 - 1) / sqrt(9 * 10).
    a = np.array([1.0, 2.0, 2.0, 3.0, 4.0])
    b = np.array([1.0, 2.0, 3.0, 5.0, 4.0])
    assert kendall_tau(a, b) == pytest.approx(7 / math.sqrt(90))
    assert kendall_tau(a, np.ones(5)) is None
    assert kendall_tau(a[:0], b[:0]) is None
    rng = np.random.default_rng(0)
    for number in (2, 5, 30):
        a, b = rng.integers(6, size=(2, number)) / 6
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)


def test_the_interval_of_an_exact_order_is_a_point_and_of_chance_is_wide() -> None:
    rng = np.random.default_rng(0)
    rising = np.arange(8.0)
    assert interval(rising, 2 * rising, rng) == (1.0, 1.0)
    low, high = interval(rising, rng.permutation(rising), rng)
    assert low is not None
    assert high is not None
    assert low < 0 < high


def test_noise_takes_nothing_from_distant_accuracies_and_all_from_near_ones() -> None:
    rng = np.random.default_rng(0)
    proxies, fulls = np.array([0.5, 0.4, 0.7, 0.6]), np.array([0.8, 0.82, 0.84, 0.86])
    none = np.zeros(4)
    # However badly this proxy ranks: it is asked of a faultless one.
    assert tau_of_noise(proxies, fulls, none, none, rng) == pytest.approx(1.0)
    much = tau_of_noise(proxies, fulls, none + 10, none, rng)
    assert much == pytest.approx(0.0, abs=0.05)
    assert tau_of_noise(proxies, fulls, None, none, rng) is None


def test_an_accuracys_noise_is_the_binomials_and_the_seeds() -> None:
    sd = accuracy_noise(np.array([0.9, 0.5]), [900, 100], 0.02)
    assert sd == pytest.approx([math.hypot(0.01, 0.02), math.hypot(0.05, 0.02)])
    assert accuracy_noise(np.array([0.9]), [None], 0.0) is None


def test_one_swapped_pair_of_four_gives_two_thirds(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    trainings([0.3, 0.5, 0.4, 0.6], FULL)
    report = ranked(digits, 4, tmp_path / "rank.json")
    assert report.tau == pytest.approx(4 / 6)
    assert report.tau_macs == pytest.approx(1.0)
    assert report.tau_low is not None
    assert report.tau_high is not None
    assert -1 <= report.tau_low < report.tau < report.tau_high <= 1
    assert report.tau_noise is not None
    assert 0.7 < report.tau_noise < 1
    macs = [row.macs for row in report.networks]
    assert macs == sorted(macs)
    assert [row.proxy_accuracy for row in report.networks] == [0.3, 0.5, 0.4, 0.6]
    assert [row.full_accuracy for row in report.networks] == FULL
    # The same seed draws the same interval.
    assert ranked(digits, 4, tmp_path / "rank.json") == report


def test_a_poor_proxy_is_warned_of_with_the_keys_to_change(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    trainings([0.4, 0.6, 0.1, 0.3], [0.5, 0.7, 0.8, 0.9])
    report = ranked(digits, 4, tmp_path / "rank.json")
    assert report.tau == pytest.approx(-2 / 6)
    lines = dict(rank_lines(digits, report))
    assert "below 0.65" in lines["WARNING"]
    for key in ("epochs", "data.train_images", "data.validation_images", "ema_decay"):
        load_campaign_config(
            "digits", [f"evaluator.recipe.{key}=" + {"ema_decay": "0.9"}.get(key, "9")]
        )
        assert f"evaluator.recipe.{key}" in lines["WARNING"]


def test_accuracies_that_noise_cannot_tell_apart_are_not_the_proxys_fault(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    trainings([0.5, 0.6, 0.3, 0.4], [0.90, 0.901, 0.902, 0.903])
    report = ranked(digits, 4, tmp_path / "rank.json")
    assert report.tau_noise is not None
    assert report.tau_noise < 0.3
    warning = dict(rank_lines(digits, report))["WARNING"]
    assert "retrain.recipe.data.validation_images" in warning
    assert "epochs" not in warning


def test_a_good_proxy_is_not_warned_of_but_a_wide_interval_is_said(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    trainings([0.3, 0.5, 0.4, 0.6], FULL)
    lines = dict(rank_lines(digits, ranked(digits, 4, tmp_path / "unsure.json")))
    assert "WARNING" not in lines
    assert "--rank 8" in lines["UNSURE"]
    trainings([0.3, 0.4, 0.5, 0.6], FULL)
    sure = rank_lines(digits, ranked(digits, 4, tmp_path / "sure.json"))
    assert {"WARNING", "UNSURE", "FAILED"}.isdisjoint(dict(sure))


def test_seeds_of_one_network_are_part_of_the_noise(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    made = trainings([0.3, 0.4, 0.5, 0.6], FULL)
    without = ranked(digits, 4, tmp_path / "rank.json")
    assert without.seed_sd is None
    middle = spread(digits_space(), digits.seed, 4)[2]
    place = made.order.index(count(middle).macs)
    made.proxies[place] = without.networks[place].proxy_accuracy + 0.2  # type: ignore[operator]
    report = ranked(digits, 4, tmp_path / "rank.json", repeats=3)
    assert len(report.seed_accuracies) == 3
    assert report.seed_sd == pytest.approx(np.std([0.0, 0.2, 0.2], ddof=1))
    assert report.tau_noise is not None
    assert without.tau_noise is not None
    assert report.tau_noise < without.tau_noise
    assert "3 seeds" in dict(rank_lines(digits, report))["noise"]


# ---------------------------------------------------------------------------- failures, resume


def test_a_failed_training_is_said_and_left_out_of_tau(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    made = trainings(
        [0.3, failed("diverged: loss was nan at step 3"), 0.4, 0.5, 0.6, 0.7],
        [0.8, 0.82, failed("diverged: loss was inf at step 9"), 0.86, 0.88, 0.9],
    )
    report = ranked(digits, 6, tmp_path / "rank.json")
    assert (report.ranked, report.tau) == (4, pytest.approx(1.0))
    assert report.networks[1].failure == "as a child: diverged: loss was nan at step 3"
    assert report.networks[2].failure == "in full: diverged: loss was inf at step 9"
    # What cannot be ranked any more is not trained in full.
    assert ("full", made.order[1]) not in made.calls
    said = [text for label, text in rank_lines(digits, report) if label == "FAILED"]
    assert len(said) == 2
    assert all("left out of tau" in text for text in said)
    # A divergence is an outcome: it is not tried again.
    made.calls.clear()
    assert ranked(digits, 6, tmp_path / "rank.json") == report
    assert made.calls == []


def test_fewer_than_four_ranked_networks_have_no_tau(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    trainings([0.3, failed("diverged"), 0.4, 0.5], FULL)
    report = ranked(digits, 4, tmp_path / "rank.json")
    assert (report.ranked, report.tau, report.tau_low, report.tau_noise) == (3, None, None, None)
    assert "3 networks" in dict(rank_lines(digits, report))["tau"]


def test_a_process_that_died_is_tried_again_by_the_next_run(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    died = failed("its process ended by itself, with status -9", "infrastructure")
    made = trainings([0.3, 0.4, died, 0.6], FULL)
    assert ranked(digits, 4, tmp_path / "rank.json").ranked == 3
    made.proxies[2] = 0.5
    made.calls.clear()
    assert ranked(digits, 4, tmp_path / "rank.json").ranked == 4
    assert made.calls == [("proxy", made.order[2]), ("full", made.order[2])]


def test_a_stopped_ranking_goes_on_with_what_is_left(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    proxies = [0.3, 0.5, 0.4, 0.6]
    trainings(proxies, FULL)
    unbroken = ranked(digits, 4, tmp_path / "unbroken.json")
    made = trainings(proxies, FULL)
    made.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        ranked(digits, 4, tmp_path / "rank.json")
    before = [call for call in made.calls if call[1] is not None]
    assert len(before) == 3
    made.stop_after = None
    made.calls.clear()
    report = ranked(digits, 4, tmp_path / "rank.json")
    # Both kinds have been timed: no steps are tried, nothing is trained twice.
    assert len(made.calls) == 5
    assert set(made.calls).isdisjoint(before)
    unlike = {"file": "", "seconds": 0.0, "networks": ()}
    assert dataclasses.replace(report, **unlike) == dataclasses.replace(unbroken, **unlike)


def test_more_networks_are_added_to_those_that_are_trained(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    accuracies = [0.1 * place for place in range(1, 7)]
    made = trainings(accuracies, accuracies)
    ranked(digits, 4, tmp_path / "rank.json")
    made.calls.clear()
    assert ranked(digits, 6, tmp_path / "rank.json").ranked == 6
    assert len(made.calls) == 4


def test_the_time_left_is_known_from_a_few_steps_then_from_the_trainings(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = trainings([0.3, 0.4, 0.5, 0.6], FULL)
    with open_ranking(digits, 4, tmp_path / "rank.json") as ranking:
        assert time_left(ranking) == "time left is known after the first trainings"
        ranking.try_out(4)
        assert sorted(made.calls) == [("full", None), ("proxy", None)]
        assert ranking.seconds_left() == pytest.approx(4 * 10 + 4 * 100)
        assert time_left(ranking) == "about 7 min 20 s left"
        clock = iter([0.0, 10.0, 10.0, 40.0])
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        ranking.train(ranking.left()[0])
        ranking.train(ranking.left()[0])
        monkeypatch.undo()
        # The smallest took 10 and 30 s; the largest, the middle and the quarter are left.
        left = ranking.seconds_left()
        assert left is not None
        assert 3 * 10 + 100 + 100 + 30 < left < 3 * 10 + 100 + 100 + 100


# ---------------------------------------------------------------------------- refusals


def test_a_file_of_another_configuration_is_refused(
    tmp_path: Path, digits: CampaignConfig, trainings: Callable[..., Trainings]
) -> None:
    trainings([0.3, 0.4, 0.5, 0.6], FULL)
    path = tmp_path / "rank.json"
    ranked(digits, 4, path)
    for change in ("evaluator.recipe.epochs=3", "retrain.recipe.epochs=3", "seed=1"):
        other = load_campaign_config("digits", [change])
        key, _, value = change.partition("=")
        with pytest.raises(ConfigError, match=f"{key} was .*, now {value}.*--out"):
            ranked(other, 4, path)
    # What changes no accuracy may change.
    ranked(load_campaign_config("digits", ["retrain.threads=1", "stop.trials=99"]), 4, path)


@pytest.mark.parametrize("content", ["[]", "not JSON", '{"settings": {}}'])
def test_another_file_is_refused_and_left_alone(
    tmp_path: Path, digits: CampaignConfig, content: str
) -> None:
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="holds something else"):
        ranked(digits, 4, path)
    assert path.read_text() == content


def test_two_processes_do_not_write_one_file(tmp_path: Path, digits: CampaignConfig) -> None:
    with (
        FileLock(tmp_path / ".rank.json.lock"),
        pytest.raises(ConfigError, match="another process"),
    ):
        ranked(digits, 4, tmp_path / "rank.json")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("digits", "--rank", "3"), "--rank: must be >= 4 networks, but got 3."),
        (("accel_nasbench", "--rank", "4"), "an evaluator that trains, but accel_nasbench"),
        (("digits", "retrain=null", "--rank", "4"), "no retrain section; give retrain.recipe."),
        (("digits", "--rank", "4", "--plan"), "not with --plan"),
        (("digits", "--rank", "303"), "--rank: must be at most"),
        (
            ("mnasnet_a1", "retrain.recipe.data.path=none", "--rank", "4"),
            "--rank: evaluator lacks what it trains on here",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = mnas_here("check", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_stand_in_has_no_full_training(tmp_path: Path) -> None:
    done = mnas_here("check", str(write_synthetic(tmp_path)), "--rank", "4", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "an evaluator that trains, but synthetic" in done.stderr


# ---------------------------------------------------------------------------- command


def test_the_command_tells_how_far_it_is_and_prints_the_table(
    tmp_path: Path, trainings: Callable[..., Trainings], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    made = trainings([0.3, failed("diverged"), 0.4, 0.5, 0.2], [*FULL, 0.99])
    made.stop_after = 2
    assert app(["check", "digits", "--rank", "5"], standalone_mode=False) == 130
    said = capsys.readouterr().out
    assert "10, of which 10 are left" in said
    assert "about 9 min 10 s left" in said
    assert "[2/10] " in said
    assert "runs/digits-rank.json; the same command goes on" in said
    made.stop_after = None
    app(["check", "digits", "--rank", "5"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "10, of which 8 are left" in said
    assert "FAILED: diverged" in said
    assert "0.9900" in said
    assert "WARNING    tau 0.00 is below 0.65" in said


def test_the_json_is_one_object_whose_keys_are_documented(
    tmp_path: Path, trainings: Callable[..., Trainings], capsys: pytest.CaptureFixture[str]
) -> None:
    trainings([0.3, 0.4, 0.5, 0.6], FULL)
    path = tmp_path / "rank.json"
    app(["check", "digits", "--rank", "4", "--out", str(path), "--json"], standalone_mode=False)
    (line,) = capsys.readouterr().out.strip().splitlines()
    report = json.loads(line)
    assert set(report) == {field.name for field in dataclasses.fields(RankReport)}
    assert report["tau"] == pytest.approx(1.0)
    words = documented("**`mnas check CONFIG --rank N`**")
    for record in (RankReport, RankedNetwork):
        assert {field.name for field in dataclasses.fields(record)} <= words


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_trainings_killed_and_gone_on_with_give_a_tau(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY_SPACE)
    arguments = (
        "check", "digits", "space={name: tiny.yaml}", "evaluator.recipe.data.train_images=256",
        "evaluator.recipe.epochs=1", "retrain.recipe.epochs=12", "retrain.threads=1",
        "--rank", "4", "--steps", "2", "--out", "rank.json",
    )  # fmt: skip
    process = start_mnas(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("rank.states/*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = json.loads((tmp_path / "rank.json").read_text())["trainings"]
    assert [training["kind"] for training in before] == ["proxy"]

    done = mnas(*arguments, "--json", cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stderr
    assert "8, of which 7 are left" in done.stderr
    report = json.loads(done.stdout)
    assert report["ranked"] == 4
    assert -1 <= report["tau_low"] <= report["tau"] <= report["tau_high"] <= 1
    assert 0 < report["tau_noise"] <= 1
    after = json.loads((tmp_path / "rank.json").read_text())["trainings"]
    assert after[:1] == before
    # digits: a fifth of 1,437 training images is held out for children, a tenth for the best.
    held_out = {(training["kind"], training["validation_images"]) for training in after}
    assert {kind for kind, _ in held_out} == {"proxy", "full"}
    assert len(held_out) == 2
    for row in report["networks"]:
        assert row["failure"] is None
        # Twelve epochs teach more than one on a part of the images.
        assert row["full_accuracy"] > row["proxy_accuracy"]
    assert not (tmp_path / "rank.states").exists()

    again = mnas(*arguments, "--json", cwd=tmp_path, timeout_s=120)
    assert json.loads(again.stdout) == report


def test_a_full_disk_is_not_the_network_s_fault(
    monkeypatch: pytest.MonkeyPatch, digits: CampaignConfig
) -> None:
    class Evaluator:
        def warm_up(self) -> None: ...

        def begin(self, bars: object) -> None: ...

        def evaluate(self, network: object, **options: object) -> object:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(check_brief, "make_evaluator", lambda *_, **__: Evaluator())
    job = Job(0, spread(digits_space(), 0, 1)[0], 0)
    brief = check_brief._evaluate(digits.evaluator, job, 1, 60.0, None)
    assert brief.cause == "infrastructure"
    assert brief.failure is not None
    assert "No space left on device" in brief.failure
