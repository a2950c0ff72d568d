"""The report's part on full trainings: what became of the networks that were handed over."""

from __future__ import annotations

from typing import Any

from search.measuring import INT8_ACCURACY
from search.page import html_table
from search.progress import format_duration
from search.report_data import REASON_LETTERS, Facts, cut, finite
from search.store import FULL_TRAININGS
from search.trial import Trial

_HEADS = (
    "trial", "in the search", "fully trained", "latency ms", "reward", "epochs", "time",
    "images/s", "workers x batch", "outcome",
)  # fmt: skip


def trainings_html(facts: Facts) -> str:
    """Return the section: a table and a place for the curves, or why there is none."""
    finalists = _finalists(facts)
    if not finalists:
        if facts.config.retrain is None:
            return (
                '<p class="soft">None was asked for;'
                " <code>mnas retrain --campaign DIR --config RECIPE</code> begins them.</p>"
            )
        return '<p class="soft">None has begun yet.</p>'
    figures = _figures(facts)
    in_int8 = any(INT8_ACCURACY in (trial.metrics or {}) for trial in finalists)
    accuracy = "Accuracy is on images held out from the training set" + (
        ", after a full training in float32; rewards are of the accuracy in int8."
        if in_int8
        else "."
    )
    rows = [_row(trial, figures.get(str(trial.id), {}), facts) for trial in finalists]
    table = html_table(_HEADS, rows, numbers=tuple(range(9)))
    chart = '<div class="chart" id="trainings-chart"></div>' if curves(facts) else ""
    return (
        f"<p>The networks that were handed over, each measured anew and trained with a new seed,"
        f" because the best observed one is often lucky. {accuracy}</p>{table}{chart}"
    )


def curves(facts: Facts) -> list[dict[str, Any]]:
    """Return the validation accuracy after each epoch of each full training, for the script."""
    figures = _figures(facts)
    return [
        {"name": f"trial {trial.finalist_of}", "accuracies": known["accuracies"]}
        for trial in _finalists(facts)
        if len((known := figures.get(str(trial.id), {})).get("accuracies", ())) > 1
    ]


def _finalists(facts: Facts) -> list[Trial]:
    trials = facts.store.trials(role="finalist")
    return sorted(trials, key=lambda trial: (-(finite(trial.reward) or -1.0), -trial.id))


def _figures(facts: Facts) -> dict[str, Any]:
    return dict(facts.store.meta(FULL_TRAININGS, {}))


def _row(finalist: Trial, known: dict[str, Any], facts: Facts) -> tuple[str, ...]:
    origin = facts.store.trial(finalist.finalist_of) if finalist.finalist_of is not None else None
    if finalist.failure is not None:
        outcome = f"failed: {cut(finalist.failure.reason, REASON_LETTERS)}"
    elif finalist.outcome is None:
        outcome = "under way, or stopped"
    elif facts.winner.get("trial") == finalist.finalist_of:
        outcome = "the winner"
    else:
        outcome = "trained"
    took = ""
    if "seconds" in known:
        # Those of the process that ended it.
        took = format_duration(float(known["seconds"]))
        took += ", resumed" if known["resumed_at_epoch"] else ""
    return (
        str(finalist.finalist_of),
        _text(origin.accuracy if origin else None, ".4f"),
        _text(finalist.accuracy, ".4f"),
        _text(finalist.latency_ms, ".4g"),
        _text(finalist.reward, ".4f"),
        f"{finalist.epochs:g}",
        took,
        _text(finite(known.get("images_per_s")), ",.0f"),
        f"{known['workers']} x {known['global_batch'] // known['workers']}" if known else "",
        outcome,
    )


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
