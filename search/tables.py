"""What the command line says of trials and campaigns: plain JSON objects, tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from search.campaign import running_on, running_text
from search.config import CampaignConfig
from search.environment import Environments, change_note
from search.progress import format_duration
from search.store import Store
from search.trial import Trial
from space.records import to_plain


def trial_summary(trial: Trial) -> dict[str, Any]:
    """Return a trial as plain JSON values: field names with units.

    Keys: trial, role, outcome, reward, accuracy, latency_ms, parameters, macs, epochs, seed,
    reused_from, finalist_of, failure (a sentence or null), architecture, architecture_hash,
    tokens, parts, metrics.
    """
    metrics = trial.metrics or {}
    return {
        "trial": trial.id,
        "role": trial.role,
        "outcome": trial.outcome,
        "reward": trial.reward,
        "accuracy": trial.accuracy,
        "latency_ms": trial.latency_ms,
        "parameters": _whole(metrics.get("parameters")),
        "macs": _whole(metrics.get("macs")),
        "epochs": trial.epochs,
        "seed": trial.seed,
        "reused_from": trial.reused_from,
        "finalist_of": trial.finalist_of,
        "failure": trial.failure.reason if trial.failure else None,
        "architecture": trial.architecture,
        "architecture_hash": trial.architecture_hash,
        "tokens": list(trial.tokens),
        "parts": to_plain(trial.parts),
        "metrics": metrics,
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def campaign_summary(folder: Path, store: Store, config: CampaignConfig) -> dict[str, Any]:
    """Return a campaign's state as plain JSON values.

    Keys: folder, name, state (`running`, `stopped` or `finished`), running_on (a host or null),
    trials, trials_total, pending and one count per outcome, target_ms, best (see `trial_summary`,
    with environment) or null, recommended (ids of the trials that the controller would hand over,
    best first), rewards (role -> number, highest, mean), entropy (nats) or null, spent_s,
    stop_reason, winner or null, environments (each with since, first_trial, versions, devices,
    changes: see search.environment).
    """
    counts = store.counts()
    environments, best = Environments(store), store.best(1)
    chosen = trial_summary(best[0]) | {"environment": environments.of(best[0])} if best else None
    updates = store.updates(last=1)
    reason = store.meta("stop_reason")
    proposed = sum(counts.values())
    finished = reason is not None and not counts.get("pending", 0)
    host = running_on(folder)
    state = "running" if host else "finished" if finished else "stopped"
    outcomes = ("completed", "reused", "stopped", "rejected", "failed", "pending")
    return {
        "folder": str(folder),
        "name": config.name,
        "state": state,
        "running_on": host,
        "trials": proposed,
        "trials_total": config.stop.trials,
        **{f"trials_{outcome}": counts.get(outcome, 0) for outcome in outcomes},
        "target_ms": store.meta("target_ms"),
        "best": chosen,
        "recommended": store.meta("recommended", []),
        "rewards": {
            role: dict(zip(("number", "highest", "mean"), figures, strict=True))
            for role, figures in store.rewards().items()
        },
        "entropy": updates[-1][2].get("entropy") if updates else None,
        "spent_s": store.meta("spent_s", 0.0),
        "stop_reason": reason,
        "winner": store.meta("winner"),
        "environments": to_plain(environments.known),
    }


def winner_text(winner: dict[str, Any]) -> str:
    """Return a sentence on a campaign's winner: its accuracy, and in int8 if that chose it."""
    accuracy = f"test accuracy {winner['test_accuracy']:.4f}"
    in_int8 = winner.get("int8_test_accuracy")
    if in_int8 is not None:
        accuracy = (
            f"chosen by its accuracy in int8; test accuracy {in_int8:.4f} in int8,"
            f" {winner['test_accuracy']:.4f} in float32"
        )
    return f"trial {winner['trial']}: {accuracy}"


#: Column of a table of trials -> how its figures are printed; counts in full.
_FIGURES = {
    "reward": ".4f", "accuracy": ".4f", "latency_ms": ".3f", "parameters": ",", "macs": ",",
}  # fmt: skip
_HEADS = {"latency_ms": "latency ms", "macs": "multiply-adds"}


def trial_table(
    trials: Sequence[Trial],
    title: str,
    columns: Sequence[str] = (),
    environments: Sequence[int | None] = (),
) -> Table:
    """Return trials as a table.

    Args:
        trials: One row each.
        title: Above it.
        columns: Names of figures or metrics; the five of every trial if none.
        environments: Each trial's, for a last column, where there are several.
    """
    names = columns or list(_FIGURES)
    heads = ["trial", *(_HEADS.get(name, name) for name in names)]
    table = plain_table(title, [*heads, "env"] if environments else heads)
    for index, trial in enumerate(trials):
        row = trial_summary(trial)
        values = {**row["metrics"], **{name: row[name] for name in _FIGURES}}
        figures = (_figure(values.get(name), _FIGURES.get(name, ".4g")) for name in names)
        marks = [str(environments[index] or "-")] if environments else []
        table.add_row(str(trial.id), *figures, *marks)
    return table


def plain_table(
    title: str, figures: Sequence[str], labels: Sequence[str] = (), texts: Sequence[str] = ()
) -> Table:
    """Return an empty table: labels, figures to the right, texts; figures are never cut."""
    # A folder's name may hold what rich takes for markup.
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    for name in labels:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for name in texts:
        table.add_column(name, overflow="fold")
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def campaign_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) lines of a `campaign_summary`."""
    host = summary["running_on"]
    state = running_text(host) if host else summary["state"]
    lines = [
        ("campaign", f"{summary['name']} in {summary['folder']}: {state}"),
        ("trials", f"{summary['trials']:,} of {summary['trials_total']:,}"),
        (
            "outcomes",
            ", ".join(
                f"{summary[key]:,} {key.removeprefix('trials_')}"
                for key in summary
                if key.startswith("trials_") and key != "trials_total" and summary[key]
            )
            or "none yet",
        ),
        ("time", format_duration(summary["spent_s"])),
    ]
    if summary["target_ms"] is not None:
        lines.append(("target", f"{summary['target_ms']:.4g} ms"))
    best = summary["best"]
    if best is not None:
        lines.append(
            (
                "best",
                f"trial {best['trial']}: reward {best['reward']:.4f}, accuracy"
                f" {best['accuracy']:.4f}, {best['latency_ms']:.3f} ms",
            )
        )
    baseline = summary["rewards"].get("baseline")
    if baseline is not None and "search" in summary["rewards"]:
        own = summary["rewards"]["search"]
        lines.append(
            (
                "baseline",
                f"{baseline['number']:,} random trials: highest reward {baseline['highest']:.4f},"
                f" mean {baseline['mean']:.4f}; the controller's {own['number']:,}:"
                f" {own['highest']:.4f}, {own['mean']:.4f}",
            )
        )
    if summary["recommended"]:
        first = ", ".join(str(trial_id) for trial_id in summary["recommended"][:3])
        lines.append(("recommends", f"trial {first}: what the controller would hand over"))
    lines.extend(
        ("changed", change_note(number, values["first_trial"], values["changes"]))
        for number, values in enumerate(summary["environments"][1:], 2)
    )
    if summary["stop_reason"]:
        lines.append(("ended", summary["stop_reason"]))
    winner = summary["winner"]
    if winner is not None:
        lines.append(
            (
                "winner",
                f"{winner_text(winner)} on {winner['test_images']:,} images,"
                f" {winner['latency_ms']:.3f} ms",
            )
        )
    return lines
