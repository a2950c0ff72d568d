"""Campaigns side by side: how good at the same number of trials, their fronts, and pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from search.campaign import open_to_read, read_config
from search.history import Box, History, box_of, on_union_front, read_history
from search.pairing import (
    FIGURES,
    Entry,
    Pairing,
    difference,
    pair_up,
    things_that_differ,
    variants_of,
    why_not_paired,
)
from search.progress import format_duration
from search.store import Store
from search.tables import plain_table
from space.errors import ConfigError

#: Targets that differ by more are not the same.
_SAME_TARGET = 1e-3

#: Of the table of campaigns, the gaps included.
_LABEL_WIDTH, _COLUMN_WIDTH = 22, 13


@dataclasses.dataclass(slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        campaigns: One dict of plain values each. Keys: folder, controller, mode, seed, trials,
            completed, spent_s, target_ms; reward, accuracy, latency_ms of the best network;
            `reward_at`: number of trials -> best reward so far, at a quarter, half and all of the
            trials that every campaign has; `front`: dicts of trial, accuracy, latency_ms, reward
            and on_union_front, fastest first; `on_union_front`: how many of them are; hypervolume.
        histories: Of each.
        variants: Of each the first campaign that differs in the seed alone, if at all.
        union_front: How many points the front of all together has.
        notes: Sentences on what cannot be compared well.
        pairings: See `search.pairing`.
        not_paired: A sentence where there are none.
        unpaired: Of two campaigns that are no pair: trials, and the second's figures less the
            first's.
    """

    campaigns: list[dict[str, Any]]
    histories: list[History]
    variants: list[int]
    union_front: int
    notes: list[str]
    pairings: list[Pairing]
    not_paired: str | None
    unpaired: dict[str, Any] | None

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON values, without the histories; campaigns by their folders."""
        return {
            "campaigns": self.campaigns,
            "union_front": self.union_front,
            "notes": self.notes,
            "pairings": [self._pairing(pairing) for pairing in self.pairings],
            "not_paired": self.not_paired,
            "unpaired": self.unpaired,
        }

    def _pairing(self, pairing: Pairing) -> dict[str, Any]:
        pairs = [
            {
                "seed": pair.seed,
                "first_folder": self.campaigns[pair.first]["folder"],
                "second_folder": self.campaigns[pair.second]["folder"],
                "trials": pair.trials,
                **pair.differences,
            }
            for pair in pairing.pairs
        ]
        return {
            "differ_in": pairing.differ_in,
            "first": pairing.first,
            "second": pairing.second,
            "pairs": pairs,
            "summary": {figure: pairing.summary(figure) for figure in FIGURES},
        }


def compare(folders: Sequence[Path]) -> Comparison:
    """Return how campaigns compare: a million trials take some seconds each.

    Raises:
        ConfigError: There are not two folders, one holds no campaign, or rewards mean different
            things in them.
    """
    if len(folders) < 2:
        raise ConfigError(
            f"DIR...: must be two campaigns or more, but got {len(folders)}; `mnas report DIR`"
            " shows one."
        )
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.objective != configs[0].objective:
            raise ConfigError(
                f"{folder}: the objective is {config.objective}, but {folders[0]}'s is"
                f" {configs[0].objective}: their rewards cannot be compared."
            )
    entries, rows = [], []
    for folder, config in zip(folders, configs, strict=True):
        with closing(open_to_read(folder)) as store:
            entries.append(Entry(str(folder), config, read_history(store)))
            rows.append(_row(entries[-1], store))
    histories = [entry.history for entry in entries]
    box = box_of(histories)
    fronts = [history.front() for history in histories]
    on_union, union_front = on_union_front(histories, fronts)
    common = min(len(history) for history in histories)
    at = sorted({common // 4, common // 2, common} - {0})
    for row, history, front, shared in zip(rows, histories, fronts, on_union, strict=True):
        best = history.best_so_far()
        row["reward_at"] = {str(n): _finite(best[n - 1]) for n in at}
        row["front"] = _front(history, front, shared)
        row["on_union_front"] = len(shared)
        row["hypervolume"] = None if box is None else box.share(history.points(front))
    variants = variants_of(entries)
    pairings = pair_up(entries, variants, box)
    return Comparison(
        campaigns=rows,
        histories=histories,
        variants=variants,
        union_front=union_front,
        notes=_notes(entries, rows),
        pairings=pairings,
        not_paired=None if pairings else why_not_paired(entries),
        unpaired=None if pairings or len(entries) > 2 else _unpaired(entries, common, box),
    )


def _row(entry: Entry, store: Store) -> dict[str, Any]:
    """What a campaign's row says of it alone."""
    config, history, counts = entry.config, entry.history, store.counts()
    best = history.best(len(history))
    return {
        "folder": entry.folder,
        "controller": config.controller.name,
        "mode": config.mode,
        "seed": config.seed,
        "trials": sum(counts.values()),
        "completed": counts.get("completed", 0),
        "spent_s": store.meta("spent_s", 0.0),
        "target_ms": store.meta("target_ms"),
        "reward": None if best is None else _finite(history.reward[best]),
        "accuracy": None if best is None else _finite(history.accuracy[best]),
        "latency_ms": None if best is None else _finite(history.latency_ms[best]),
    }


def _front(
    history: History, front: NDArray[np.int64], shared: NDArray[np.int64]
) -> list[dict[str, Any]]:
    on_union = set(shared.tolist())
    return [
        {
            "trial": int(history.ids[k]),
            "accuracy": float(history.accuracy[k]),
            "latency_ms": float(history.latency_ms[k]),
            "reward": float(history.reward[k]),
            "on_union_front": k in on_union,
        }
        for k in front.tolist()
    ]


def _notes(entries: Sequence[Entry], rows: Sequence[dict[str, Any]]) -> list[str]:
    first, *rest = (entry.config for entry in entries)
    things = {thing for config in rest for thing in things_that_differ(first, config)}
    notes = [
        f"The campaigns differ in {thing}, so their figures may not be of one kind."
        for thing in ("evaluator", "device", "other_devices")
        if thing in things
    ]
    targets = [row["target_ms"] for row in rows if row["target_ms"] is not None]
    if targets and max(targets) > min(targets) * (1 + _SAME_TARGET):
        notes.append(
            f"The targets lie between {min(targets):.4g} and {max(targets):.4g} ms, and every"
            " reward is by its campaign's own."
        )
    return notes


def _unpaired(entries: Sequence[Entry], trials: int, box: Box | None) -> dict[str, Any]:
    first, second = (entry.figures(trials, box) for entry in entries)
    return {"trials": trials, **difference(first, second)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# ---------------------------------------------------------------------------- for people


def compare_tables(comparison: Comparison, width: int) -> list[Table]:
    """Return the campaigns as tables with a column for each: 1, 2, ..., as many as have room.

    Args:
        comparison: What was found.
        width: Of the terminal, in letters.
    """
    lines, number = campaign_lines(comparison), len(comparison.campaigns)
    each = max(1, (width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    tables = []
    for start in range(0, number, each):
        chosen = slice(start, start + each)
        names = [str(k + 1) for k in range(number)[chosen]]
        tables.append(plain_table("" if start else "campaigns", names, labels=[""]))
        for label, texts in lines:
            tables[-1].add_row(label, *texts[chosen])
    return tables


def campaign_lines(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return (label, a text for each campaign)."""
    rows = comparison.campaigns
    return [
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
        ("front", [f"{len(row['front']):,}" for row in rows]),
        (
            f"of the union's {comparison.union_front:,}",
            [f"{row['on_union_front']:,}" for row in rows],
        ),
        ("hypervolume", [_figure(row["hypervolume"]) for row in rows]),
    ]


@dataclasses.dataclass(slots=True)
class PairTable:
    """Differences, for people: a line of texts for each pair, and under several their summary."""

    title: str
    lines: list[tuple[str, ...]]

    @property
    def table(self) -> Table:
        """For the terminal."""
        table = plain_table(self.title, PAIR_HEADS[1:], labels=PAIR_HEADS[:1])
        for line in self.lines:
            table.add_row(*line)
        return table


#: Of a PairTable's columns.
PAIR_HEADS = ("campaigns", "seed", "trials", *FIGURES)


def pair_tables(comparison: Comparison) -> list[PairTable]:
    """Return a table for each pairing, or one of two campaigns that are no pair."""
    unpaired = comparison.unpaired
    if unpaired is not None:
        line = ("2 - 1", "", f"{unpaired['trials']:,}", *_differences(unpaired))
        return [PairTable("2 - 1, not paired", [line])]
    return [
        PairTable(f"{p.differ_in}: {p.second} - {p.first}", [*_pair_lines(p), *_summary_lines(p)])
        for p in comparison.pairings
    ]


def _pair_lines(pairing: Pairing) -> Iterator[tuple[str, ...]]:
    for pair in pairing.pairs:
        names = f"{pair.second + 1} - {pair.first + 1}"
        yield names, str(pair.seed), f"{pair.trials:,}", *_differences(pair.differences)


def _summary_lines(pairing: Pairing) -> Iterator[tuple[str, ...]]:
    if len(pairing.pairs) < 2:
        return
    found = [pairing.summary(figure) for figure in FIGURES]
    yield "median", "", "", *(_signed(summary["median"]) for summary in found)
    yield (
        "above 0", "", "",
        *(
            "-" if summary["positive"] is None
            else f"{summary['positive']} of {summary['pairs']}"
            for summary in found
        ),
    )  # fmt: skip
    if any(summary["sign_p"] is not None for summary in found):
        yield "p, sign test", "", "", *(_p(summary["sign_p"]) for summary in found)


def _differences(differences: Mapping[str, Any]) -> list[str]:
    return [_signed(differences[name]) for name in FIGURES]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
