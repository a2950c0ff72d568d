"""Campaigns side by side: how good, how fast, at the same number of trials and of hours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.table import Table

from search.campaign import open_to_read, read_config
from search.progress import format_duration
from search.store import Store
from search.tables import plain_table
from space.errors import ConfigError


def compare(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one dict per campaign, comparable ones.

    Keys: folder, controller, mode, seed, trials, completed, spent_s, target_ms; reward, accuracy,
    latency_ms of the best network; `reward_at`: number of trials -> best reward so far, at a
    quarter, half and all of the trials that every campaign has.

    Raises:
        ConfigError: A folder holds no campaign, or rewards mean different things in them.
    """
    opened = [(folder, read_config(folder)) for folder in folders]
    first_folder, first = opened[0]
    for folder, config in opened[1:]:
        if config.objective != first.objective:
            raise ConfigError(
                f"{folder}: the objective is {config.objective}, but {first_folder}'s is"
                f" {first.objective}: their rewards cannot be compared."
            )
    found, curves = [], []
    for folder, config in opened:
        with closing(open_to_read(folder)) as store:
            curves.append(_best_so_far(store))
            counts = store.counts()
            best = store.best(1)
            found.append(
                {
                    "folder": str(folder),
                    "controller": config.controller.name,
                    "mode": config.mode,
                    "seed": config.seed,
                    "trials": sum(counts.values()),
                    "completed": counts.get("completed", 0),
                    "spent_s": store.meta("spent_s", 0.0),
                    "target_ms": store.meta("target_ms"),
                    "reward": best[0].reward if best else None,
                    "accuracy": best[0].accuracy if best else None,
                    "latency_ms": best[0].latency_ms if best else None,
                }
            )
    common = min(len(curve) for curve in curves)
    at = sorted({common // 4, common // 2, common} - {0})
    for row, curve in zip(found, curves, strict=True):
        row["reward_at"] = {str(n): curve[n - 1] for n in at}
    return found


def _best_so_far(store: Store) -> list[float | None]:
    """The best reward of the first n search trials, for every n."""
    curve: list[float | None] = []
    best: float | None = None
    for figures in store.figures():
        if figures.id < 0:
            continue
        if figures.reward is not None and (best is None or figures.reward > best):
            best = figures.reward
        curve.append(best)
    return curve


def compare_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return `compare`'s rows as a table with a column for each campaign: 1, 2, ..."""
    names = [str(number) for number in range(1, len(rows) + 1)]
    table = plain_table("campaigns", names, labels=[""])
    lines = [
        ("controller", [row["controller"] for row in rows]),
        ("mode", [row["mode"] for row in rows]),
        ("seed", [str(row["seed"]) for row in rows]),
        ("trials", [f"{row['trials']:,}" for row in rows]),
        ("trained", [f"{row['completed']:,}" for row in rows]),
        ("time", [format_duration(row["spent_s"]) for row in rows]),
        *(
            (f"reward at {at}", [_figure(row["reward_at"][at]) for row in rows])
            for at in rows[0]["reward_at"]
        ),
        ("reward", [_figure(row["reward"]) for row in rows]),
        ("accuracy", [_figure(row["accuracy"]) for row in rows]),
        ("latency ms", [_figure(row["latency_ms"]) for row in rows]),
    ]
    for label, texts in lines:
        table.add_row(label, *texts)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
