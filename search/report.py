"""The report: a campaign as one HTML file that works offline, made from its database alone.

Python chooses what is shown and writes it, escaped, into search/report.html; the script there
draws the figures with plotly.js, which is part of the file, and fills the table of trials. A large
campaign is read once, row by row, and shown in part: the page says which part.
"""

from __future__ import annotations

import datetime
import html
import importlib.resources
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from search.campaign import running_on, running_text
from search.config import CampaignConfig, config_to_plain
from search.objective import Objective
from search.page import html_table, script_text, write_named
from search.progress import format_duration
from search.report_data import (
    ARCHITECTURE_LETTERS,
    KINDS_SHOWN,
    REASON_LETTERS,
    Facts,
    Kind,
    cut,
    finite,
    read_facts,
    script_values,
)
from search.report_finalists import curves, trainings_html
from search.store import Store
from search.trial import Trial
from space.architecture import Architecture
from space.cost import Cost, count, stage_table
from space.drawing import architecture_svg
from space.errors import ConfigError
from space.records import dump_yaml

_DETAIL_LETTERS, _EVENTS = 4_000, 500


def write_report(store: Store, config: CampaignConfig, path: Path) -> None:
    """Write a campaign's report, whatever its state, so that no reader sees a part of it.

    Args:
        store: The campaign's database; reading is enough.
        config: Its resolved configuration.
        path: The HTML file: under 20 MB, of which plotly.js is 5.

    Raises:
        ConfigError: The file cannot be written there.
    """
    write_named(path, _page(store, config).encode())


def _page(store: Store, config: CampaignConfig) -> str:
    facts = read_facts(store, config)
    template = importlib.resources.files("search") / "report.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=_escape(f"{config.name}: architecture search"),
        headline=_headline(facts),
        trade_off=_trade_off(facts),
        rewards=_rewards(facts),
        learning=_learning(facts.diagnostics),
        networks=_networks(facts),
        trainings=trainings_html(facts),
        trials=_trials(facts),
        failures=_failures(facts),
        configuration=_configuration(config),
        environment=_environment(facts),
        events=_events(store),
        footer=f"<p>Written {_time(time.time())}. {_escape(facts.shown.note)}</p>",
        data=script_text({**script_values(facts), "trainings": curves(facts)}),
        plotly=get_plotlyjs(),
    )


# ---------------------------------------------------------------------------- the page's parts


def _headline(facts: Facts) -> str:
    config, best = facts.config, facts.best
    parts = [f'<p class="kicker">Architecture search, {_escape(_state(facts))}</p>']
    if best is None:
        what = "no network has a reward" if facts.scan.outcomes.total() else "no trial yet"
        parts.append(f"<h1>{_escape(config.name)}: {what}</h1>")
    else:
        role = "the winner is" if facts.winner else "the best so far is"
        parts.append(f"<h1>{_escape(config.name)}: {role} trial {best.id}</h1>")
    parts.append(f'<p class="lead">{_escape(_finding(facts))}</p>')
    parts.extend(f'<p class="warn">{_escape(warning)}</p>' for warning in _warnings(facts))
    tiles = [*(_best_tiles(best, facts) if best else ()), *_campaign_tiles(facts)]
    cells = "".join(
        f'<div class="tile"><span>{_escape(label)}</span><b>{_escape(value)}</b>'
        f"<span>{_escape(note)}</span></div>"
        for label, value, note in tiles
    )
    parts.append(f'<div class="tiles">{cells}</div>')
    return "\n".join(parts)


def _state(facts: Facts) -> str:
    store = facts.store
    reason, pending = store.meta("stop_reason"), facts.scan.outcomes["pending"]
    host = running_on(store.path.parent)
    if reason and not pending:
        return f"finished: {reason}"
    return running_text(host) if host else "stopped before its end; `mnas resume` goes on"


def _finding(facts: Facts) -> str:
    best, winner = facts.best, facts.winner
    if best is None:
        if not facts.scan.outcomes.total():
            return "The campaign has not proposed a network yet."
        return "What became of the trials is listed below under “Trials without a reward”."
    sentences = []
    tested = finite(winner.get("test_accuracy"))
    in_int8 = finite(winner.get("int8_test_accuracy"))
    if tested is not None:
        reached, choice = f"{tested:.4f} accuracy", "choice"
        if in_int8 is not None:
            reached = f"{in_int8:.4f} accuracy in int8 and {tested:.4f} in float32"
            choice = "choice by accuracy in int8 on held-out images"
        sentences.append(
            f"Fully trained, it reaches {reached} on the test set of"
            f" {int(winner.get('test_images') or 0):,} images, which was used once, after the"
            f" {choice}."
        )
    fidelity = f"{best.epochs:g} epoch{'' if best.epochs == 1 else 's'}"
    sentences.append(
        f"In the search it reached {_figure(best.accuracy, '.4f')} accuracy on held-out images"
        f" after {fidelity}, at {_latency(best, facts)}"
        + (f"; {_against_target(best, facts)}." if _against_target(best, facts) else ".")
    )
    if winner.get("onnx"):
        sentences.append(f"It is exported to {winner['onnx']} in the campaign's folder.")
    return " ".join(sentences)


def _latency(trial: Trial, facts: Facts) -> str:
    if trial.latency_ms is None:
        return "unknown latency"
    source = facts.latency_is(trial)
    if source.startswith("measured"):
        source = source.replace("measured", facts.source, 1)
    return f"{trial.latency_ms:.4g} ms, {source}"


def _against_target(trial: Trial, facts: Facts) -> str:
    if facts.target_ms is None or trial.latency_ms is None:
        return ""
    ratio = trial.latency_ms / facts.target_ms
    return (
        f"{100 * abs(ratio - 1):.1f} % {'under' if ratio <= 1 else 'over'} the target of"
        f" {facts.target_ms:.4g} ms"
    )


def _warnings(facts: Facts) -> list[str]:
    scan = facts.scan
    found = [
        f"The trials' figures come from more than one environment: {note}."
        for note in facts.environments.notes()
    ]
    fastest = np.nanmin(scan.latency_ms) if np.isfinite(scan.latency_ms).any() else None
    if facts.target_ms is not None and fastest is not None and fastest > facts.target_ms:
        found.append(
            f"No network meets the target of {facts.target_ms:.4g} ms: the fastest takes"
            f" {fastest:.4g} ms. Widen the space towards smaller networks or raise the target."
        )
    verdicts = Counter(verdict for verdict, _, _ in facts.shown.verdicts.values())
    for verdict, why in (
        ("noisy", "their interquartile range exceeds 10 % of the median"),
        ("drifted", "the device had become slower or faster meanwhile"),
    ):
        if verdicts[verdict]:
            found.append(
                f"{verdicts[verdict]:,} of {verdicts.total():,} measurements shown are {verdict}:"
                f" {why}."
            )
    ended = scan.outcomes.total() - scan.outcomes["pending"]
    machine = sum(kind.count for kind in scan.kinds if kind.cause == "infrastructure")
    if machine and machine > 0.05 * ended:
        found.append(
            f"{machine:,} of {ended:,} trials failed by the machine's fault, not the networks'."
        )
    return found


def _best_tiles(best: Trial, facts: Facts) -> list[tuple[str, str, str]]:
    tested = finite(facts.winner.get("test_accuracy"))
    cost = _cost(best)
    measurement = facts.shown.measurement(best)
    spread = f"IQR {measurement[2]:.2g} ms, " if measurement else ""
    tiles = []
    in_int8 = finite(facts.winner.get("int8_test_accuracy"))
    if in_int8 is not None:
        validated = finite(facts.winner.get("int8_validation_accuracy"))
        tiles.append(("test accuracy in int8", f"{in_int8:.4f}", _held_out(validated)))
    if tested is not None:
        validated = finite(facts.winner.get("validation_accuracy"))
        label = "test accuracy" if in_int8 is None else "test accuracy in float32"
        tiles.append((label, f"{tested:.4f}", _held_out(validated)))
    else:
        tiles.append(("accuracy", _figure(best.accuracy, ".4f"), "held-out images, in the search"))
    tiles.append(
        ("latency", f"{_figure(best.latency_ms, '.4g')} ms", spread + facts.latency_is(best))
    )
    parts = best.parts
    why = ""
    if parts is not None:
        times, less = f"× {parts.factor:.4f}", f"− {parts.penalty:.4f}"
        why = f"{parts.accuracy:.4f} {less if parts.penalty else times} for its latency"
    tiles.append(("reward", _figure(best.reward, ".4f"), why))
    if cost is not None:
        tiles.append(("parameters", f"{cost.parameters:,}", "trainable numbers"))
        tiles.append(("multiply-adds", f"{cost.macs:,}", "for one image"))
    return tiles


def _held_out(accuracy: float | None) -> str:
    return "" if accuracy is None else f"held-out images: {accuracy:.4f}"


def _campaign_tiles(facts: Facts) -> list[tuple[str, str, str]]:
    target, outcomes = facts.config.objective.target, facts.scan.outcomes
    of = "latency" if target is None else f"{target.times:g} × the reference network's latency"
    listed = ", ".join(f"{number:,} {name}" for name, number in outcomes.most_common())
    spent = format_duration(float(facts.store.meta("spent_s") or 0.0))
    tiles = [] if facts.target_ms is None else [("target", f"{facts.target_ms:.4g} ms", of)]
    return [
        *tiles,
        ("trials", f"{outcomes.total():,} of {facts.config.stop.trials:,}", listed),
        ("time of the search", spent, f"in batches of {facts.config.batch_size:,}"),
    ]


def _trade_off(facts: Facts) -> str:
    if not len(facts.scan.scored):
        return _nothing("No trial has both an accuracy and a latency yet.")
    whole = len(facts.scan.front())
    in_float32 = ", in float32" if facts.int8 else ""
    on_front = "One network is" if whole == 1 else f"{whole:,} networks are"
    return (
        f"<p>{on_front} on the Pareto front: no other is as accurate and as fast. Accuracy is on"
        f" images held out from the training set{in_float32}; latency is"
        f" {_escape(facts.source)}. Pick a point to find it in the table.</p>"
        '<label class="no-print"><input type="checkbox" id="logarithmic">logarithmic latency'
        '</label><div class="chart" id="trade-off-chart"></div>'
    )


def _rewards(facts: Facts) -> str:
    if not len(facts.scan.scored):
        return _nothing("No trial has a reward yet.")
    rule = "accuracy × (latency / target)<sup>w</sup>"
    if facts.target_ms is not None:
        objective = Objective(facts.config.objective, facts.target_ms)
        below, above = _signed(objective.alpha), _signed(objective.beta)
        met = "" if below == above else f" where the target is met, {above} elsewhere"
        rule += f", w = {below}{met}"
        if objective.absolute:
            rule = f"accuracy {above} × |latency / target − 1|"
    return (
        f"<p>Reward = {rule}. Ticks at the bottom are trials without a reward."
        f"{_gain(facts)}</p>"
        '<div class="chart" id="rewards-chart"></div>'
    )


def _gain(facts: Facts) -> str:
    """What the controller gained over the random baseline, if there is one."""
    rewards = facts.store.rewards()
    if not {"baseline", "search"} <= set(rewards):
        return ""
    (count, best, mean), (own_count, own_best, own_mean) = rewards["baseline"], rewards["search"]
    return (
        f" {count:,} trials were drawn at random: their highest reward is {best:.4f}, their mean"
        f" {mean:.4f}; the controller's {own_count:,} have {own_best:.4f} and {own_mean:.4f}."
    )


def _learning(diagnostics: Mapping[str, Sequence[object]]) -> str:
    if not diagnostics:
        return _nothing("The controller has reported no figures yet, or has none to report.")
    notes = {"entropy": "nats, mean per decision; it falls as the policy settles"}
    charts = [
        f"<div><h3>{_escape(name)} <span class='soft'>{notes.get(name, '')}</span></h3>"
        f'<div class="chart" id="diagnostic-{index}"></div></div>'
        for index, name in enumerate(diagnostics)
    ]
    return (
        "<p>What the controller reported after each batch.</p>"
        f'<div class="small-charts">{"".join(charts)}</div>'
    )


def _networks(facts: Facts) -> str:
    chosen = {trial.architecture_hash: trial for trial in facts.shown.best}
    if facts.best is not None:
        # The winner leads, wherever the search had ranked it.
        first = facts.best
        rest = [trial for key, trial in chosen.items() if key != first.architecture_hash]
        chosen = {trial.architecture_hash: trial for trial in (first, *rest)}
    if not chosen:
        return _nothing("No network has a reward yet.")
    return (
        "<p>The different networks with the highest reward in the search.</p>"
        + "".join(_network(trial, facts) for trial in chosen.values())
    )  # fmt: skip


def _network(trial: Trial, facts: Facts) -> str:
    title = f"Trial {trial.id}"
    if facts.winner.get("trial") == trial.id:
        title += ", the winner"
    figures = (
        f"reward {_figure(trial.reward, '.4f')}, accuracy {_figure(trial.accuracy, '.4f')},"
        f" {_latency(trial, facts)}"
    )
    head = f'<h3>{_escape(title)} <span class="soft">{_escape(figures)}</span></h3>'
    network = _architecture(trial)
    if network is None:
        drawing = _nothing("It cannot be drawn: the text is not an architecture of this engine.")
    else:
        drawing = f'<div class="scroll">{architecture_svg(network)}</div>{_stage_table(network)}'
    text = _escape(cut(trial.architecture, 4 * ARCHITECTURE_LETTERS))
    return f'<article class="network">{head}{drawing}<p><code>{text}</code></p></article>'


def _stage_table(network: Architecture) -> str:
    rows = [
        (stage.name, stage.text, _shape(stage.input_shape), _shape(stage.output_shape),
         f"{stage.parameters:,}", f"{stage.macs:,}")
        for stage in stage_table(network)
    ]  # fmt: skip
    heads = ("stage", "notation", "input", "output", "parameters", "multiply-adds")
    table = html_table(heads, rows, numbers=(4, 5))
    return f"<details><summary>Every stage in numbers</summary>{table}</details>"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _trials(facts: Facts) -> str:
    if not facts.shown.trials:
        return _nothing("There are none yet.")
    outcomes = {str(trial.outcome or "pending") for trial in facts.shown.trials}
    roles = {str(trial.role) for trial in facts.shown.trials} - {"search"}
    options = "".join(f"<option>{name}</option>" for name in (*sorted(outcomes), *sorted(roles)))
    return f"""<p>{_escape(facts.shown.note)}
Pick a heading to sort, a trial's number for everything about it.</p>
<div class="tools">
<input type="search" id="filter" aria-label="Filter trials"
placeholder="a trial's number, or words: k5, noisy, diverged">
<label>outcome <select id="filter-outcome"><option value="">all</option>{options}</select></label>
<label><input type="checkbox" id="filter-front">Pareto front only</label>
<span class="soft" id="found" aria-live="polite"></span>
<span><button id="previous">previous</button> <button id="next">next</button></span>
</div>
<div class="scroll"><table id="trial-table"><thead></thead><tbody></tbody></table></div>"""


def _failures(facts: Facts) -> str:
    kinds = facts.scan.kinds
    if not kinds:
        return _nothing("There are none.")
    shown = kinds[:KINDS_SHOWN]
    rows = [
        (f"{kind.count:,}", kind.outcome, kind.cause, cut(kind.reason, REASON_LETTERS),
         str(kind.example))
        for kind in shown
    ]  # fmt: skip
    heads = ("trials", "outcome", "whose fault", "reason (as one of them says it)", "example")
    rest = sum(kind.count for kind in kinds[KINDS_SHOWN:])
    more = f"<p>{len(kinds) - len(shown):,} rarer kinds with {rest:,} trials.</p>" if rest else ""
    return (
        "<p>Grouped by reason; numbers in a reason don't count. Failures by the machine's fault"
        " (infrastructure) are withheld from the controller.</p>"
        + html_table(heads, rows, numbers=(0, 4))
        + more
        + "".join(_detail(kind, facts.store) for kind in shown)
    )


def _detail(kind: Kind, store: Store) -> str:
    trial = store.trial(kind.example)
    if trial is None or trial.failure is None or not trial.failure.detail:
        return ""
    # The end says what went wrong.
    text = _escape(trial.failure.detail[-_DETAIL_LETTERS:])
    return f"<details><summary>Log of trial {trial.id}</summary><pre>{text}</pre></details>"


def _configuration(config: CampaignConfig) -> str:
    text = _escape(dump_yaml(config_to_plain(config)))
    return (
        "<p>With every default and every name resolved.</p>"
        f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"
    )


def _environment(facts: Facts) -> str:
    store, best = facts.store, facts.best
    command = store.meta("command")
    campaign = {
        "host": store.meta("host"),
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        **(store.meta("versions") or {}),
    }
    parts = ["<h3>Campaign</h3>", _definitions(campaign)]
    parts.extend(f"<p>{_escape(note)}</p>" for note in facts.environments.notes())
    if facts.config.device is None:
        parts.append(f"<h3>Device</h3><p>None: the latencies are {facts.given}.</p>")
    ids = best.measurement_ids if best is not None else ()
    target = store.meta("target_measurement")
    for what, key in [
        *((f"Device, as it measured trial {best.id if best else ''}", key) for key in ids),
        *([("Device, as it measured the target's reference network", target)] if target else []),
    ]:
        measurement = store.measurement(int(key))
        low_ms, high_ms = measurement.median_interval_ms
        figures = {
            "median": f"{measurement.median_ms:.4g} ms",
            "95 % interval": f"{low_ms:.4g} to {high_ms:.4g} ms",
            "IQR": f"{measurement.iqr_ms:.3g} ms, {100 * measurement.spread:.1f} % of the median:"
            f" {measurement.verdict}",
            "samples": f"{len(measurement.samples_ms):,} ({len(measurement.disturbed):,}"
            " disturbed, not counted), each the mean of"
            f" {measurement.inner_iterations:,} inferences",
            "before them": f"{measurement.warmup_runs:,} inferences to warm up",
            "attempts": measurement.attempts,
            **{f"device.{name}": value for name, value in _flat(measurement.device)},
            **{f"environment.{name}": value for name, value in _flat(measurement.environment)},
        }
        parts.append(f"<h3>{_escape(what)}</h3>{_definitions(figures)}")
    return "".join(parts)


def _events(store: Store) -> str:
    events = store.events()
    if not events:
        return _nothing("None are recorded.")
    shown = events[-_EVENTS:]
    rows = [(_time(at), kind, cut(message, 2000)) for at, kind, message in shown]
    older = (
        f"<p>The last {len(shown):,} of {len(events):,}.</p>" if len(shown) < len(events) else ""
    )
    return older + html_table(("when", "what", "message"), rows)


# ---------------------------------------------------------------------------- small things


def _escape(text: object) -> str:
    return html.escape(str(text))


def _nothing(text: str) -> str:
    return f'<p class="soft">{_escape(text)}</p>'


def _definitions(values: Mapping[str, object]) -> str:
    items = "".join(
        f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>"
        for name, value in values.items()
        if value is not None
    )
    return f"<dl>{items}</dl>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) of nested mappings."""
    found: list[tuple[str, object]] = []
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found += _flat(value, name) if isinstance(value, Mapping) else [(name, value)]
    return found


def _architecture(trial: Trial) -> Architecture | None:
    try:
        return trial.network()
    except ConfigError:
        return None


def _cost(trial: Trial) -> Cost | None:
    network = _architecture(trial)
    return None if network is None else count(network)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
