"""The report: what it says in every state of a campaign, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latency.measurement import Measurement
from search.config import CampaignConfig, campaign_config
from search.objective import Objective, ObjectiveConfig
from search.pareto import pareto_front
from search.report import write_report
from search.report_data import SAMPLE, TOP, WHOLE_CAMPAIGN
from search.store import FULL_TRAININGS, Store
from search.trial import Failure, Trial
from space.cost import count
from space.errors import ConfigError
from space.search_space import load_space

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
).split()
TARGET_MS = 0.25
EVIL = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'> & </script><!--"
DEVICE = {"name": "test-bench", "kind": "onnxruntime", "effort": "quick"}


def make_config(*, measured: bool = True, trials: int = 400, **changes: Any) -> CampaignConfig:
    values: dict[str, Any] = {
        "name": "orchid",
        "seed": 3,
        "space": {"name": "small_image"},
        "controller": {"name": "random"},
        "evaluator": {"name": "synthetic"},
        "objective": {"name": "soft", "target_ms": TARGET_MS},
        "executor": {"name": "serial"},
        "stop": {"trials": trials},
        "batch_size": 8,
        **changes,
    }
    if measured:
        values["device"] = {"name": "test-bench", "kind": "onnxruntime"}
    return campaign_config(values, where="test", folder=Path())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "campaign.db", read_only=False)
    made.set_meta("target_ms", TARGET_MS)
    made.set_meta("versions", {"mnas": "0.1.0", "python": "3.11.7"})
    yield made
    made.close()


def measure(store: Store, rng: np.random.Generator, median_ms: float, *, noisy: bool) -> int:
    spread = 0.15 if noisy else 0.01
    samples = tuple((median_ms * (1 + spread * rng.uniform(-1, 1, 11))).tolist())
    environment = {"load": 0.2, "frequency": {"governor": "performance"}}
    return store.add_measurement(Measurement(samples, 4, 10, 1, "graph", DEVICE, environment, {}))


def fill(store: Store, trials: int, *, measured: bool = True, fail_share: float = 0.1) -> None:
    """Write a search that improves, with repeats and failures, in batches of 8."""
    rng = np.random.default_rng(0)
    space = load_space("small_image")
    objective = Objective(ObjectiveConfig(target_ms=TARGET_MS), TARGET_MS)
    known: dict[str, Trial] = {}
    for trial_id in range(trials):
        tokens = tuple(int(rng.integers(n)) for n in space.num_choices)
        if known and rng.random() < 0.1:
            tokens = list(known.values())[int(rng.integers(len(known)))].tokens
        network = space.decode(tokens)
        trial = Trial(
            id=trial_id, batch=trial_id // 8, role="search", proposal_id=trial_id, tokens=tokens,
            log_prob=-9.5, architecture=network.text, architecture_hash=network.hash,
            seed=trial_id, epochs=3.0, created_at=1.7e9 + trial_id,
        )  # fmt: skip
        original = known.get(network.hash)
        if original is not None:
            trial = dataclasses.replace(
                trial, outcome="reused", reused_from=original.id, accuracy=original.accuracy,
                metrics=original.metrics, reward=original.reward, parts=original.parts,
                measurement_ids=original.measurement_ids,
            )  # fmt: skip
        elif rng.random() < fail_share:
            reason = (
                f"diverged: loss is nan after step {trial_id}",
                f"time limit of 120 s {EVIL}",
            )
            kind = int(rng.integers(2))
            failure = Failure(
                reason[kind], ("architecture", "infrastructure")[kind], f"log {EVIL}"
            )
            trial = dataclasses.replace(trial, outcome="failed", failure=failure)
        else:
            cost = count(network)
            latency_ms = cost.macs / 1.2e7 * float(rng.uniform(0.8, 1.2)) + 0.03
            accuracy = float(
                0.97 * cost.macs / (cost.macs + 3e5) - 0.25 * np.exp(-trial_id / (trials / 3))
                + rng.normal(0, 0.01)
            )  # fmt: skip
            accuracy = min(0.999, max(0.05, accuracy))
            ids: tuple[int, ...] = ()
            if measured:
                ids = (measure(store, rng, latency_ms, noisy=rng.random() < 0.1),)
                latency_ms = store.measurement(ids[0]).median_ms
            metrics = {"latency_ms": latency_ms, "parameters": float(cost.parameters),
                       "macs": float(cost.macs)}  # fmt: skip
            reward, parts = objective.reward(accuracy, metrics)
            trial = dataclasses.replace(
                trial, outcome="completed", accuracy=accuracy, metrics=metrics, reward=reward,
                parts=parts, measurement_ids=ids, timings={"train_s": 4.2, "measure_s": 0.3},
            )  # fmt: skip
            known[network.hash] = trial
        store.add_trials([trial])
    for batch in range(trials // 8):
        entropy = float(np.exp(-batch / 20) + rng.normal(0, 0.01))
        figures = {"entropy": entropy, "loss": float(rng.normal()), "clip_fraction": 0.1}
        store.commit_update(batch, list(range(8 * batch, 8 * batch + 8)), figures)


def crown(store: Store, trial: Trial) -> None:
    """Write a full training of a trial's network, and make it the winner."""
    store.add_trials(
        [
            dataclasses.replace(
                trial,
                id=-1,
                batch=-1,
                role="finalist",
                proposal_id=None,
                finalist_of=trial.id,
                epochs=60.0,
                accuracy=0.985,
                reward=0.99,
                reused_from=None,
            )
        ]
    )
    figures = {
        "accuracies": [0.9, 0.97, 0.985], "losses": [1.0, 0.6, 0.5], "epochs": 60,
        "seconds": 840.0, "images_per_s": 512.4, "workers": 2, "global_batch": 128,
        "resumed_at_epoch": 12,
    }  # fmt: skip
    store.set_meta(FULL_TRAININGS, {"-1": figures})
    store.set_meta("stop_reason", "all 400 trials are done")
    store.set_meta(
        "winner",
        {
            "trial": trial.id, "architecture": trial.architecture, "latency_ms": trial.latency_ms,
            "architecture_hash": trial.architecture_hash, "validation_accuracy": 0.985,
            "test_accuracy": 0.9778, "test_images": 360, "onnx": "export/model.onnx",
        },
    )  # fmt: skip


def report(store: Store, config: CampaignConfig) -> str:
    path = store.path.parent / "report.html"
    write_report(store, config, path)
    return path.read_text(encoding="utf-8")


def script_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


# ---------------------------------------------------------------------------- what it says


def test_the_headline_names_the_winner_its_test_accuracy_and_where_its_latency_is_from(
    store: Store,
) -> None:
    fill(store, 80)
    best = store.best(1)[0]
    crown(store, best)
    page = report(store, make_config(trials=80))
    head = page[page.index("<header") : page.index("<nav")]
    assert f"orchid: the winner is trial {best.id}" in head
    assert "0.9778 accuracy on the test set of 360 images" in head
    assert f"{best.latency_ms:.4g} ms, measured on test-bench" in head
    assert "the target of 0.25 ms" in head
    assert f"{count(best.network()).macs:,}" in head
    assert "finished: all 400 trials are done" in head


def test_the_front_of_the_page_is_the_pareto_front(store: Store) -> None:
    fill(store, 120)
    data = script_data(report(store, make_config()))
    assert data["front"] == [trial.id for trial in pareto_front(store.trials(role="search"))]


def test_every_trial_has_a_row_with_its_figures_and_its_measurements_verdict(store: Store) -> None:
    fill(store, 120)
    data = script_data(report(store, make_config()))
    rows = {row[0]: dict(zip(data["columns"], row, strict=True)) for row in data["rows"]}
    trials = store.trials()
    assert sorted(rows) == [trial.id for trial in trials]
    for trial in trials:
        row = rows[trial.id]
        assert row["reward"] == trial.reward
        assert row["outcome"] == trial.outcome
        assert data["architectures"][row["architecture"]] == trial.architecture
    verdicts = store.measurement_verdicts(range(1, 1000))
    done = [trial for trial in trials if trial.measurement_ids]
    assert {rows[t.id]["verdict"] for t in done} == {"ok", "noisy"}
    for trial in done:
        verdict, _, iqr_ms = verdicts[trial.measurement_ids[0]]
        assert (rows[trial.id]["verdict"], rows[trial.id]["iqr_ms"]) == (verdict, iqr_ms)


def test_the_lines_over_trials_are_the_running_best_and_the_running_mean(store: Store) -> None:
    fill(store, 120)
    data = script_data(report(store, make_config()))
    rewarded = [trial for trial in store.trials() if trial.reward is not None]
    best = 0.0
    stairs = [
        (trial.id, best := trial.reward)
        for trial in rewarded
        if trial.reward is not None and trial.reward > best
    ]
    assert [tuple(point) for point in data["best_so_far"][:-1]] == stairs[: len(stairs)]
    assert data["best_so_far"][-1] == [rewarded[-1].id, best]
    window = data["mean_of"]
    last = [trial.reward or 0.0 for trial in rewarded[-window:]]
    assert data["running_mean"][-1] == [rewarded[-1].id, pytest.approx(sum(last) / window)]
    assert len(data["running_mean"]) == len(rewarded) - window + 1


def test_the_line_of_equal_reward_goes_through_the_best_trial(store: Store) -> None:
    fill(store, 120)
    data = script_data(report(store, make_config()))
    best = store.best(1)[0]
    objective = Objective(ObjectiveConfig(target_ms=TARGET_MS), TARGET_MS)
    points = data["equal_reward"]
    assert [best.latency_ms, pytest.approx(best.accuracy)] in points
    for latency_ms, accuracy in points:
        reward, _ = objective.reward(accuracy, {"latency_ms": latency_ms})
        assert reward == pytest.approx(best.reward)


def test_a_latency_that_the_evaluator_gave_is_never_called_measured(store: Store) -> None:
    fill(store, 80, measured=False)
    page = report(store, make_config(measured=False))
    assert "from the evaluator" in page
    without_plotly = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert "measured" not in without_plotly


def test_failures_are_grouped_by_reason_whatever_numbers_it_holds(store: Store) -> None:
    fill(store, 240, fail_share=0.3)
    failed = [trial for trial in store.trials() if trial.outcome == "failed"]
    diverged = [t for t in failed if t.failure and t.failure.cause == "architecture"]
    page = report(store, make_config())
    section = page[page.index('<section id="failures">') : page.index('<section id="config')]
    rows = re.findall(r"<tr><td class=number>([\d,]+)</td><td>failed</td><td>(\w+)</td>", section)
    assert {cause: int(number) for number, cause in rows} == {
        "architecture": len(diverged),
        "infrastructure": len(failed) - len(diverged),
    }


def test_a_campaign_without_trials_still_gives_a_page(store: Store) -> None:
    page = report(store, make_config())
    assert "orchid: no trial yet" in page
    assert script_data(page)["rows"] == []
    assert page.count('class="soft">') >= 6  # a sentence in place of each figure


def test_a_campaign_with_nothing_but_failures_says_why_they_failed(store: Store) -> None:
    fill(store, 40, fail_share=1.0)
    page = report(store, make_config())
    assert "orchid: no network has a reward" in page
    assert "diverged: loss is nan after step" in page
    assert "failed by the machine&#x27;s fault" in page.replace("machine's", "machine&#x27;s")


def test_a_missed_target_is_said_out_loud(store: Store) -> None:
    fill(store, 40)
    store.set_meta("target_ms", 1e-3)
    page = report(store, make_config())
    assert "No network meets the target of 0.001 ms" in page


def test_texts_that_are_no_architecture_do_no_harm(store: Store) -> None:
    trial = Trial(
        id=0, batch=0, role="search", proposal_id=0, tokens=(1,), log_prob=0.0,
        architecture=EVIL, architecture_hash="ab", seed=1, epochs=1.0, outcome="completed",
        accuracy=0.5, reward=0.5, metrics={"latency_ms": 0.5},
    )  # fmt: skip
    store.add_trials([trial])
    page = report(store, make_config(measured=False))
    assert "cannot be drawn" in page
    assert "<script>window.hacked" not in page
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_a_place_that_cannot_be_written_is_one_sentence(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/report\.html: cannot be written"):
        write_report(store, make_config(), tmp_path / "nowhere" / "report.html")


def insert_many(store: Store, number: int) -> None:
    """Write many rows the fast way, one in nine of them failed."""
    space, rng = load_space("small_image"), np.random.default_rng(1)
    networks = [space.decode(space.sample(rng)) for _ in range(200)]
    sample = Trial(
        id=0, batch=0, role="search", proposal_id=0, tokens=space.encode(networks[0]),
        log_prob=-9.5, architecture=networks[0].text, architecture_hash=networks[0].hash,
        seed=1, epochs=3.0,
    )  # fmt: skip
    store.add_trials([sample])
    accuracy, latency_ms = rng.uniform(0.1, 0.9, number), rng.uniform(0.1, 2.0, number)
    rows = (
        (
            i,
            networks[i % 200].text,
            networks[i % 200].hash,
            "completed" if i % 9 else "failed",
            float(accuracy[i]) if i % 9 else None,
            json.dumps({"latency_ms": float(latency_ms[i]), "macs": 1e6, "parameters": 1e4}),
            float(accuracy[i] * (latency_ms[i] / TARGET_MS) ** -0.07) if i % 9 else None,
            None if i % 9 else json.dumps({"reason": f"step {i}", "cause": "architecture"}),
        )
        for i in range(1, number)
    )
    copied = "batch, role, tokens, log_prob, seed, epochs, attempt, measurement_ids, created_at"
    store._db.execute("BEGIN")
    store._db.executemany(
        f"INSERT INTO trial (id, architecture, architecture_hash, outcome, accuracy, metrics,"
        f" reward, failure, {copied}) SELECT ?, ?, ?, ?, ?, ?, ?, ?, {copied} FROM trial"
        " WHERE id = 0",
        rows,
    )
    store._db.execute("COMMIT")


def test_a_large_campaign_is_shown_in_part_and_says_so(store: Store) -> None:
    insert_many(store, WHOLE_CAMPAIGN + 12_000)
    page = report(store, make_config(measured=False))
    data = script_data(page)
    ids = [row[0] for row in data["rows"]]
    assert SAMPLE < len(ids) < SAMPLE + 2 * TOP + 500
    assert set(data["front"]) <= set(ids)
    rewarded = [trial for trial in store.trials() if trial.reward is not None]
    best = sorted(rewarded, key=lambda trial: (-(trial.reward or 0.0), trial.id))[:TOP]
    assert {trial.id for trial in best} <= set(ids)
    assert "The campaign has 20,000 trials." in page
    assert "a random sample of 5,000 (seed 3)" in page
    assert len(page) < 20e6
    again = script_data(report(store, make_config(measured=False)))
    assert [row[0] for row in again["rows"]] == ids


# ---------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(
            executable_path=str(CHROMIUM), args=FLAGS, timeout=120_000
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = Store(folder / "campaign.db", read_only=False)
    made.set_meta("target_ms", TARGET_MS)
    made.add_event("changed", EVIL)
    fill(made, 160)
    crown(made, made.best(1)[0])
    write_report(made, make_config(name="<b>orchid<b>"), folder / "report.html")
    made.close()
    return folder / "report.html"


class Visit:
    """A page opened in a browser, and everything that went wrong or left the machine."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(120_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#trial-table tbody tr")
        self.page.wait_for_function("document.querySelectorAll('.main-svg').length >= 2")

    def column(self, index: int) -> list[str]:
        cells = f"#trial-table tbody tr td:nth-child({index + 1})"
        texts: list[str] = self.page.locator(cells).all_text_contents()
        return texts

    def sort_by(self, heading: str) -> None:
        self.page.locator("#trial-table thead").get_by_text(heading, exact=True).click()

    def clear_filters(self) -> None:
        self.page.fill("#filter", "")
        self.page.select_option("#filter-outcome", "")
        self.page.uncheck("#filter-front")


@pytest.fixture(scope="module")
def opened(browser: Any, page_file: Path) -> Visit:
    return Visit(browser, page_file)


@pytest.fixture
def visit(opened: Visit) -> Visit:
    opened.clear_filters()
    return opened


def test_the_page_runs_without_complaint_and_without_the_network(visit: Visit) -> None:
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
    headings = visit.page.locator("h2").all_text_contents()
    assert headings == [
        "Accuracy and latency", "Reward over trials", "What the controller learned",
        "The best networks", "Full trainings", "Trials", "Trials without a reward",
        "Configuration",
        "Device, versions and environment", "Events",
    ]  # fmt: skip
    assert visit.page.locator(".js-plotly-plot").count() == 6
    assert visit.page.locator(".network svg.mnas-net").count() == 5


def test_the_page_tells_of_every_full_training(visit: Visit) -> None:
    section = visit.page.locator("#trainings")
    cells = section.locator("tbody tr td").all_text_contents()
    assert cells[2] == "0.9850"
    assert cells[5:] == ["60", "14 min 0 s, resumed", "512", "2 x 64", "the winner"]
    assert section.locator(".js-plotly-plot").count() == 1


def test_what_comes_from_outside_stays_text(visit: Visit) -> None:
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator("img").count() == 0
    assert visit.page.title() == "<b>orchid<b>: architecture search"
    visit.page.fill("#filter", "time limit")
    assert any("<script>window.hacked=1</script>" in text for text in visit.column(12))
    assert "<img src=x" in visit.page.locator("#events").inner_text()


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_it_round(visit: Visit) -> None:
    visit.sort_by("latency ms")
    values = [float(text) for text in visit.column(5)]
    assert values == sorted(values)
    visit.sort_by("latency ms")
    turned = [float(text) for text in visit.column(5)]
    assert turned == sorted(turned, reverse=True)
    assert turned != values
    visit.sort_by("trial")
    assert [int(text) for text in visit.column(0)][:3] == [-1, 0, 1]


def test_filters_and_pages_narrow_the_table(visit: Visit) -> None:
    visit.page.select_option("#filter-outcome", "failed")
    assert set(visit.column(2)) == {"failed"}
    visit.page.select_option("#filter-outcome", "")
    first = visit.column(0)
    assert len(first) == 50
    visit.page.click("#next")
    assert not set(first) & set(visit.column(0))
    visit.page.fill("#filter", "17")
    assert "17" in visit.column(0)
    visit.page.fill("#filter", "no such text")
    assert visit.column(0) == []


def test_a_trials_number_opens_everything_about_it(visit: Visit) -> None:
    visit.page.fill("#filter", "-1")
    visit.page.locator("#trial-table tbody button").first.click()
    detail = visit.page.locator("tr.detail").inner_text()
    assert "head192 | r28 | c10" in detail
    assert "measured" in detail


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_the_page_is_no_wider_than_the_screen(
    browser: Any, page_file: Path, width: int, scheme: str
) -> None:
    visit = Visit(
        browser, page_file, viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.complaints == []
    visit.page.close()


@pytest.mark.parametrize("state", ["empty", "failed", "unmeasured"])
def test_unfinished_campaigns_give_a_page_without_script_errors(
    browser: Any, store: Store, state: str
) -> None:
    fill(
        store,
        {"empty": 0, "failed": 24, "unmeasured": 24}[state],
        measured=False,
        fail_share=1.0 if state == "failed" else 0.0,
    )
    path = store.path.parent / "report.html"
    write_report(store, make_config(measured=False), path)
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(path.as_uri())
    assert page.locator("h2").count() == 10
    assert "None was asked for" in page.locator("#trainings").inner_text()
    assert complaints == []
    page.close()
