"""Campaigns side by side, and one that is watched while it runs."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import mnas, mnas_here, start_mnas, wait_for_results, write_synthetic
from test_json_page import documented

from search import cli
from search.async_loop import make_search
from search.campaign import create, open_to_read
from search.compare import compare, pair_tables
from search.compare_plot import series_of, write_plot
from search.config import campaign_config, load_campaign_config
from search.engine import Silent, start
from search.history import History
from search.pareto import pareto_front
from search.parts import Parts
from search.report_data import LINE_POINTS
from search.store import Store
from search.trial import Trial
from space.errors import ConfigError

#: (accuracy, latency in ms) of a trial, whose reward is its accuracy; None for a failed one.
Outcomes = Sequence[tuple[float, float] | None]


def run(folder: Path, *overrides: str, trials: int, controller: str = "random") -> Path:
    folder.mkdir()
    path = write_synthetic(folder, controller=controller, trials=trials)
    start(load_campaign_config(str(path), overrides), folder / "run")
    return folder / "run"


def write_campaign(folder: Path, outcomes: Outcomes, **settings: Any) -> Path:
    """Write a campaign of given results, one of them each hour."""
    values = {
        "name": "written",
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"name": "synthetic"},
        "objective": {"name": "soft", "target_ms": 3.0},
        "executor": {"name": "serial"},
        "stop": {"trials": 1000},
        **settings,
    }
    trials = []
    for trial_id, outcome in enumerate(outcomes):
        accuracy, latency_ms = outcome or (None, None)
        metrics = None if latency_ms is None else {"latency_ms": latency_ms}
        trials.append(
            Trial(
                id=trial_id, batch=0, role="search", proposal_id=trial_id, tokens=(0,),
                log_prob=0.0, architecture="", architecture_hash=str(trial_id), seed=0, epochs=1.0,
                outcome="completed" if outcome else "failed", accuracy=accuracy, metrics=metrics,
                reward=accuracy, created_at=1.7e9, finished_at=1.7e9 + 3600 * (trial_id + 1),
            )
        )  # fmt: skip
    config = campaign_config(values, where="test", folder=folder)
    with create(folder, config) as campaign:
        campaign.store.add_trials(trials)
    return folder


def pairs_of(folder: Path, gains: Sequence[float]) -> list[Path]:
    """Write a random and an evolution campaign for each seed, the latter better by a gain."""
    found = []
    for seed, gain in enumerate(gains):
        for name, accuracy in (("random", 0.5), ("evolution", 0.5 + gain)):
            outcomes = [(0.25, 4.0), (accuracy, 2.0)]
            path = folder / f"{name}-{seed}"
            found.append(write_campaign(path, outcomes, controller={"name": name}, seed=seed))
    return found


def test_campaigns_are_compared_at_the_trials_that_all_of_them_have(tmp_path: Path) -> None:
    long = run(tmp_path / "long", trials=32)
    short = run(tmp_path / "short", "seed=1", trials=16, controller="ppo")
    longer, shorter = compare([long, short]).campaigns
    assert [row["controller"] for row in (longer, shorter)] == ["random", "ppo"]
    assert list(longer["reward_at"]) == list(shorter["reward_at"]) == ["4", "8", "16"]
    assert shorter["reward_at"]["16"] == shorter["reward"]
    values = list(longer["reward_at"].values())
    assert values == sorted(values)
    assert longer["reward"] >= values[-1]


def test_the_command_prints_a_row_for_each(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", trials=8)
    done = mnas_here("compare", str(folder), str(folder), "--json")
    rows = json.loads(done.stdout)["campaigns"]
    assert [row["trials"] for row in rows] == [8, 8]
    table = mnas_here("compare", str(folder), str(folder))
    assert table.returncode == 0, table.stderr
    assert "reward at 8" in " ".join(table.stdout.split())


def test_rewards_of_different_objectives_are_not_compared(tmp_path: Path) -> None:
    soft = run(tmp_path / "a", trials=8)
    hard = run(tmp_path / "b", "objective.name=hard", trials=8)
    with pytest.raises(ConfigError, match="their rewards cannot be compared"):
        compare([soft, hard])
    done = mnas_here("compare", str(soft), str(tmp_path / "none"))
    assert done.returncode == 2
    assert "holds no campaign" in done.stderr


def test_a_watched_campaign_is_shown_until_it_ends(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=60, seconds=0.05)
    process = start_mnas("search", str(config), "--out", str(tmp_path / "run"))
    try:
        wait_for_results(tmp_path / "run", 4)
        done = mnas("status", str(tmp_path / "run"), "--watch", timeout_s=60)
    finally:
        process.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    assert "60 of 60" in done.stdout


def test_campaigns_that_share_seeds_are_paired_at_equal_trials(tmp_path: Path) -> None:
    folders = pairs_of(tmp_path, [0.25, -0.125, 0.0625])
    longer = [(0.25, 4.0), (0.75, 2.0), (0.95, 2.0)]
    folders[1] = write_campaign(tmp_path / "longer", longer, controller={"name": "evolution"})
    (pairing,) = compare(folders).pairings
    assert (pairing.differ_in, pairing.first, pairing.second) == (
        "controller", "random", "evolution",
    )  # fmt: skip
    found = [(pair.seed, pair.first, pair.second, pair.trials) for pair in pairing.pairs]
    assert found == [(0, 0, 1, 2), (1, 2, 3, 2), (2, 4, 5, 2)]
    gains = [pair.differences["reward"] for pair in pairing.pairs]
    assert gains == [pair.differences["accuracy"] for pair in pairing.pairs]
    assert gains == [0.25, -0.125, 0.0625]
    # The box is 0.25 to 0.95 high; the front of two trials dominates all below the better one.
    for pair, gain in zip(pairing.pairs, gains, strict=True):
        assert pair.differences["hypervolume"] == pytest.approx((gain or 0.0) / 0.7)
    assert pairing.summary("reward") == {
        "pairs": 3, "median": 0.0625, "positive": 2, "sign_p": None,
    }  # fmt: skip


def test_six_pairs_are_enough_for_a_sign_test_in_which_equal_ones_have_no_say(
    tmp_path: Path,
) -> None:
    comparison = compare(pairs_of(tmp_path, [0.1, 0.0, 0.2, 0.3, 0.1, 0.2, 0.1]))
    (pairing,) = comparison.pairings
    found = pairing.summary("reward")
    assert (found["pairs"], found["positive"]) == (7, 6)
    assert found["sign_p"] == pytest.approx(2 * 0.5**6)
    (table,) = pair_tables(comparison)
    assert table.title == "controller: evolution - random"
    assert [line[0] for line in table.lines] == [
        "2 - 1", "4 - 3", "6 - 5", "8 - 7", "10 - 9", "12 - 11", "14 - 13",
        "median", "above 0", "p, sign test",
    ]  # fmt: skip
    assert table.lines[-2][3] == "6 of 7"


def test_figures_of_many_campaigns_are_not_cut(tmp_path: Path) -> None:
    folders = [str(folder) for folder in pairs_of(tmp_path, [0.1234, 0.2345, 0.3456, 0.4567])]
    done = mnas_here("compare", *folders)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    for figure in ("0.6234", "0.7345", "0.8456", "0.9567", "+0.1234", "4 of 4"):
        assert figure in done.stdout


def test_one_pair_has_no_median(tmp_path: Path) -> None:
    comparison = compare(pairs_of(tmp_path, [0.1]))
    (pairing,) = comparison.pairings
    assert pairing.summary("reward") == {
        "pairs": 1, "median": None, "positive": None, "sign_p": None,
    }  # fmt: skip
    (table,) = pair_tables(comparison)
    assert table.lines == [("2 - 1", "0", "2", "+0.1000", "+0.1000", "+0.2857")]


def test_two_campaigns_with_other_seeds_are_shown_unpaired(tmp_path: Path) -> None:
    first = write_campaign(tmp_path / "a", [(0.5, 2.0), (0.7, 3.0)], seed=4)
    second = write_campaign(tmp_path / "b", [(0.6, 2.0)], seed=5, batch_size=4)
    found = compare([first, second])
    assert found.pairings == []
    assert found.unpaired is not None
    assert found.unpaired["trials"] == 1
    assert found.unpaired["reward"] == pytest.approx(0.1)
    assert found.not_paired == (
        "Not paired: the seeds differ (4 and 5), so the differences are of luck and of batch_size."
    )


def test_what_differs_in_two_settings_or_in_none_is_not_paired(tmp_path: Path) -> None:
    plain = write_campaign(tmp_path / "a", [(0.5, 2.0)])
    other = write_campaign(tmp_path / "b", [(0.5, 2.0)], mode="async", batch_size=4)
    assert "more than one setting (batch_size and mode)" in str(compare([plain, other]).not_paired)
    assert "the same settings" in str(compare([plain, plain]).not_paired)
    three = compare([plain, plain, other])
    assert "no two of the campaigns" in str(three.not_paired)
    assert three.unpaired is None


def test_what_has_no_part_in_the_search_does_not_keep_campaigns_from_being_paired(
    tmp_path: Path,
) -> None:
    first = write_campaign(tmp_path / "a", [(0.5, 2.0)], mode="sync")
    second = write_campaign(
        tmp_path / "b", [(0.5, 2.0)], mode="async", name="other", stop={"trials": 9}
    )
    (pairing,) = compare([first, second]).pairings
    assert (pairing.differ_in, pairing.first, pairing.second) == ("mode", "sync", "async")


def test_what_makes_figures_hard_to_compare_is_said(tmp_path: Path) -> None:
    first = write_campaign(tmp_path / "a", [(0.5, 2.0)], evaluator={"name": "synthetic"})
    longer = {"name": "synthetic", "epochs": 2}
    second = write_campaign(tmp_path / "b", [(0.5, 2.0)], evaluator=longer)
    write_target(first, 3.0)
    write_target(second, 3.3)
    assert compare([first, second]).notes == [
        "The campaigns differ in evaluator, so their figures may not be of one kind.",
        "The targets lie between 3 and 3.3 ms, and every reward is by its campaign's own.",
    ]
    write_target(second, 3.0)
    assert compare([first, first, second]).notes[1:] == []


def write_target(folder: Path, target_ms: float) -> None:
    store = Store(folder / "campaign.db", read_only=False)
    store.set_meta("target_ms", target_ms)
    store.close()


def test_the_settings_of_one_controller_are_named(tmp_path: Path) -> None:
    first = write_campaign(tmp_path / "a", [(0.5, 2.0)], controller={"name": "evolution"})
    changed = {"name": "evolution", "population": 117}
    second = write_campaign(tmp_path / "b", [(0.5, 2.0)], controller=changed)
    (pairing,) = compare([first, second]).pairings
    assert pairing.second == "population=117"


def test_each_campaign_supplies_its_points_of_the_common_front(tmp_path: Path) -> None:
    shared = (0.8, 4.0)
    first = write_campaign(tmp_path / "a", [(0.5, 1.0), None, (0.6, 3.0), shared])
    second = write_campaign(tmp_path / "b", [shared, (0.7, 2.0), (0.4, 2.5), (0.4, 1.5)])
    found = compare([first, second])
    one, other = found.campaigns
    assert [point["trial"] for point in one["front"]] == [0, 2, 3]
    assert [point["on_union_front"] for point in one["front"]] == [True, False, True]
    assert [point["trial"] for point in other["front"]] == [3, 1, 0]
    assert (found.union_front, one["on_union_front"], other["on_union_front"]) == (3, 2, 2)


def test_the_front_is_that_of_the_report(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", trials=64)
    found = compare([folder, folder])
    store = open_to_read(folder)
    front = pareto_front(store.trials())
    store.close()
    assert [point["trial"] for point in found.campaigns[0]["front"]] == [t.id for t in front]
    assert found.campaigns[0]["on_union_front"] == found.union_front == len(front)


def test_campaigns_without_a_reward_are_compared_too(tmp_path: Path) -> None:
    none = write_campaign(tmp_path / "a", [None, None])
    some = write_campaign(tmp_path / "b", [(0.5, 2.0), (0.7, 3.0)], seed=1)
    found = compare([none, some])
    assert [row["reward"] for row in found.campaigns] == [None, 0.7]
    assert found.unpaired is not None
    assert found.unpaired["reward"] is None
    write_plot(found, tmp_path / "plot.svg")
    both = compare([none, none])
    assert both.union_front == 0
    assert both.campaigns[0]["hypervolume"] is None
    write_plot(both, tmp_path / "plot.html")


def test_curves_of_a_long_campaign_have_a_point_where_they_rise_and_not_many() -> None:
    trials = 100_000
    rising = np.arange(trials) / trials
    rising[0] = np.nan
    hours = np.arange(trials)[::-1] / 10
    history = History(np.arange(trials), rising, rising, rising, hours)
    by_trials = history.by_trials()
    assert len(by_trials) == LINE_POINTS + 1
    assert by_trials[0] == (2.0, 1e-5)
    assert by_trials[-1] == (100_000.0, rising[-1])
    # By the clock the best result came first.
    assert history.by_hours() == [(0.0, rising[-1]), (hours[0], rising[-1])]


def test_a_picture_shows_every_campaign_in_every_panel(tmp_path: Path) -> None:
    folders = pairs_of(tmp_path, [0.25])
    for ending in ("svg", "png", "html"):
        (tmp_path / f"plot.{ending}").write_text("an earlier one")
        done = mnas_here("compare", *map(str, folders), "--plot", str(tmp_path / f"plot.{ending}"))
        assert done.returncode == 0, done.stderr
        assert f"plot.{ending}" in done.stdout
    lines = re.findall(
        r'<g id="((?:trials|hours|fronts)-\d)"', (tmp_path / "plot.svg").read_text()
    )
    assert lines == ["trials-1", "trials-2", "hours-1", "hours-2", "fronts-1", "fronts-2"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    charts = script_data((tmp_path / "plot.html").read_text())
    assert [chart["id"] for chart in charts] == ["trials", "hours", "fronts"]
    trials, hours, fronts = (chart["traces"] for chart in charts)
    assert [trace["y"] for trace in trials] == [[0.25, 0.5, 0.5], [0.25, 0.75, 0.75]]
    assert trials[0]["x"] == hours[0]["x"] == [1.0, 2.0, 2.0]
    assert [(trace["x"], trace["y"]) for trace in fronts] == [([2.0], [0.5]), ([2.0], [0.75])]


def script_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_campaigns_that_differ_in_the_seed_share_a_colour(tmp_path: Path) -> None:
    series = series_of(compare(pairs_of(tmp_path, [0.1, 0.1])))
    assert series[0].colour == series[2].colour != series[1].colour
    assert series[0].dash != series[2].dash


def test_a_folders_name_is_text_in_the_page_and_the_picture(tmp_path: Path) -> None:
    evil = write_campaign(tmp_path / "$x<b>&$", [(0.5, 2.0)])
    found = compare([evil, evil])
    write_plot(found, tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text()
    assert "$x&lt;b&gt;&amp;$" in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert "<b>&" not in page
    write_plot(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").exists()


@pytest.mark.parametrize(
    ("plot", "sentence"),
    [
        ("plot.pdf", "plot.pdf: a picture's name must end in .html or .png or .svg."),
        ("nowhere/plot.svg", "nowhere/plot.svg: there is no folder 'nowhere'; make it first."),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_first(
    tmp_path: Path, plot: str, sentence: str
) -> None:
    done = mnas_here("compare", "a", "b", "--plot", plot, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"mnas: {sentence}\n"


def test_one_campaign_is_nothing_to_compare(tmp_path: Path) -> None:
    done = mnas_here("compare", str(write_campaign(tmp_path / "a", [(0.5, 2.0)])))
    assert done.returncode == 2
    assert done.stderr == (
        "mnas: DIR...: must be two campaigns or more, but got 1; `mnas report DIR` shows one.\n"
    )


def test_the_keys_are_documented(tmp_path: Path) -> None:
    folders = pairs_of(tmp_path, [0.25])
    done = mnas_here("compare", *map(str, folders), "--json")
    found = json.loads(done.stdout)
    (pairing,) = found["pairings"]
    assert pairing["pairs"][0]["second_folder"] == str(folders[1])
    keys = {*found, *found["campaigns"][0], *found["campaigns"][0]["front"][0]}
    keys |= {*pairing, *pairing["pairs"][0], *pairing["summary"]["reward"]}
    assert keys <= documented("**`mnas compare")


class LooksAgain(Exception):
    """Ends a watch where it would wait for its next look."""


def test_a_watch_holds_nothing_that_lets_the_write_ahead_file_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, trials=16)))
    log = tmp_path / "run" / "campaign.db-wal"
    found = []

    def fold_in(seconds: float) -> None:
        campaign.store.add_event("test", "something to fold in")
        with closing(sqlite3.connect(tmp_path / "run" / "campaign.db")) as other:
            # A reader in a transaction makes it busy, and the file stays as long as it is.
            (busy, _, _) = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        found.append((busy, log.stat().st_size))
        raise LooksAgain

    monkeypatch.setattr(time, "sleep", fold_in)
    with create(tmp_path / "run", config) as campaign:
        make_search(campaign, Parts(config), Silent()).run()
        before = log.stat().st_size
        with pytest.raises(LooksAgain):
            cli.status_command(tmp_path / "run", watch=True)
    assert before > 0
    assert found == [(0, 0)]
