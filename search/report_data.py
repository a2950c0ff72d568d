"""What a report shows of a campaign: all of a small one, a fair part of a large one.

The database is read once, row by row; figures over all trials are numpy arrays, and only the
trials that are shown one by one become Trial objects.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.accel_nasbench import AccelNasBenchConfig
from search.config import CampaignConfig
from search.environment import Environments
from search.measuring import INT8_ACCURACY, in_int8
from search.objective import LATENCY, Objective
from search.pareto import best_networks
from search.store import Store, TrialFigures
from search.trial import Trial

#: Campaigns of up to so many trials are shown whole; the paper's has 8,000.
WHOLE_CAMPAIGN = 8_000
#: What is shown of larger ones, beside an example of each kind of failure.
TOP, SAMPLE, FRONT = 1_000, 5_000, 2_000

_DRAWN = 5
#: A line has no more points.
LINE_POINTS = 1_500
_KINDS, KINDS_SHOWN = 5_000, 50
REASON_LETTERS, ARCHITECTURE_LETTERS = 300, 1_000

_COLUMNS = (
    "trial", "role", "outcome", "reward", "accuracy", "latency_ms", "iqr_ms", "verdict",
    "latency_is", "parameters", "macs", "epochs", "from", "failure", "architecture", "tokens",
    "seed", "parts", "timings", "environment",
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class Kind:
    """Trials without a reward for one reason."""

    outcome: str
    cause: str
    reason: str
    example: int
    count: int = 0


@dataclasses.dataclass(slots=True)
class Scan:
    """All trials of a campaign in short.

    Attributes:
        search: int64, (n,): ids of the search's trials.
        scored: int64, (m,): ids of those that have a reward; the next three go with it. Of a
            network that was trained several times the last training, whose accuracy is their mean.
        reward, accuracy, latency_ms: float64, (m,); nan where one is missing.
        completed: bool, (m,): trained, not reused.
        others: Ids of finalists and the like.
        outcomes: Outcome -> number of the search's trials; `pending` without one.
        kinds: Why trials have no reward, the most frequent first.
    """

    search: NDArray[np.int64]
    scored: NDArray[np.int64]
    reward: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    completed: NDArray[np.bool_]
    others: list[int]
    outcomes: Counter[str]
    kinds: list[Kind]

    def front(self) -> NDArray[np.int64]:
        """Ids of the Pareto front, fastest first: what search.pareto.pareto_front finds."""
        valid = np.isfinite(self.accuracy) & np.isfinite(self.latency_ms)
        ids, accuracy = self.scored[valid], self.accuracy[valid]
        order = np.lexsort((ids, -accuracy, self.latency_ms[valid]))
        before = np.concatenate(([-1.0], np.maximum.accumulate(accuracy[order])[:-1]))
        front: NDArray[np.int64] = ids[order][accuracy[order] > before]
        return front

    def best(self, number: int, *, of: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Ids of the trials with the highest reward, best first; the earlier of equals."""
        chosen = np.ones(len(self.scored), np.bool_) if of is None else of
        ids, reward = self.scored[chosen], self.reward[chosen]
        best: NDArray[np.int64] = ids[np.lexsort((ids, -reward))][:number]
        return best


@dataclasses.dataclass(slots=True)
class Shown:
    """The trials that the page shows one by one.

    Attributes:
        trials: In order of id.
        front: Ids of the Pareto front, fastest first.
        best: The different networks with the highest reward, best first.
        verdicts: Measurement id -> (verdict, median_ms, iqr_ms).
        note: What part of the campaign this is.
    """

    trials: list[Trial]
    front: list[int]
    best: list[Trial]
    verdicts: dict[int, tuple[str, float, float]]
    note: str

    def measurement(self, trial: Trial) -> tuple[str, float, float] | None:
        """(verdict, median_ms, iqr_ms) behind a trial's latency, if it was measured.

        Of several devices, the one that counted.
        """
        found = [self.verdicts[key] for key in trial.measurement_ids if key in self.verdicts]
        same = [measurement for measurement in found if measurement[1] == trial.latency_ms]
        return next(iter(same or found), None)


@dataclasses.dataclass(slots=True)
class Facts:
    """Everything the page is made of.

    Attributes:
        store: The database.
        config: The resolved configuration.
        scan: All trials in short.
        shown: Those shown one by one.
        target_ms: T, once it is known.
        winner: What the campaign recorded of its winner; empty without one.
        device: Its name, with its precision if that is int8; empty without one.
        int8: Whether a device computes in int8.
        diagnostics: Name -> points (batch, value), entropy first.
        environments: Under which the trials came about.
    """

    store: Store
    config: CampaignConfig
    scan: Scan
    shown: Shown
    target_ms: float | None
    winner: dict[str, Any]
    device: str
    int8: bool
    diagnostics: dict[str, list[tuple[int, float]]]
    environments: Environments

    @property
    def best(self) -> Trial | None:
        """The network that the page is about: the winner's trial, else the best."""
        chosen = self.winner.get("trial")
        known = None if chosen is None else self.store.trial(int(chosen))
        return known or (self.shown.best[0] if self.shown.best else None)

    def latency_is(self, trial: Trial) -> str:
        """Where a trial's latency comes from; a given one is never called measured."""
        if trial.latency_ms is None:
            return ""
        measurement = self.shown.measurement(trial)
        if measurement is not None:
            return "measured" if measurement[0] == "ok" else f"measured, {measurement[0]}"
        return self.given if self.config.device is None else "given, not measured"

    @property
    def given(self) -> str:
        """Where the latencies come from that no device gave."""
        evaluator = self.config.evaluator
        if isinstance(evaluator, AccelNasBenchConfig):
            return f"predicted, as is the accuracy, by a surrogate ({evaluator.backend})"
        return "from the evaluator"

    @property
    def source(self) -> str:
        """Where the campaign's latencies come from."""
        if self.config.device is None:
            return self.given
        return f"measured on {self.device}"


def read_facts(store: Store, config: CampaignConfig) -> Facts:
    """Read a campaign once; a million trials take half a minute and 400 MB."""
    scan = _scan(store)
    shown = _choose(store, scan, config.seed)
    measured = next((t.measurement_ids[0] for t in shown.trials if t.measurement_ids), None)
    device = getattr(config.device, "name", "")
    if measured is not None:
        identity = store.measurement(measured).device
        device = str(identity.get("name") or device)
        device += " in int8" if identity.get("precision") == "int8" else ""
    return Facts(
        store=store,
        config=config,
        scan=scan,
        shown=shown,
        target_ms=finite(store.meta("target_ms")),
        winner=store.meta("winner") or {},
        device=device,
        int8=in_int8(store, shown.trials),
        diagnostics=_diagnostics(store),
        environments=Environments(store),
    )


def script_values(facts: Facts) -> dict[str, Any]:
    """Return what the page's script draws and lists, as JSON values without nan or infinity."""
    scan = facts.scan
    architectures: dict[str, int] = {}
    rows = [_row(trial, facts, architectures) for trial in facts.shown.trials]
    window = min(len(scan.reward), max(10, facts.config.batch_size, len(scan.search) // 25))
    return {
        "columns": _COLUMNS,
        "rows": rows,
        "architectures": list(architectures),
        "front": facts.shown.front,
        "target_ms": facts.target_ms,
        "latency_is": facts.source,
        "best_so_far": _best_so_far(scan),
        "running_mean": _running_mean(scan, window),
        "mean_of": window,
        "equal_reward": _equal_reward(facts),
        "diagnostics": facts.diagnostics,
        "environments": len(facts.environments.known),
    }


# ---------------------------------------------------------------------------- reading


def _scan(store: Store) -> Scan:
    search: list[int] = []
    scored: list[tuple[int, float, float, float, bool]] = []
    others: list[int] = []
    outcomes: Counter[str] = Counter()
    kinds: dict[tuple[str, str, str], Kind] = {}
    superseded = store.superseded()
    for row in store.figures():
        if row.id < 0:
            others.append(row.id)
        else:
            search.append(row.id)
            outcomes[row.outcome or "pending"] += 1
            if row.reward is not None and row.id not in superseded:
                accuracy, latency_ms = _nan(row.accuracy), _nan(row.latency_ms)
                completed = row.outcome == "completed"
                scored.append((row.id, row.reward, accuracy, latency_ms, completed))
        if row.outcome is not None and row.reward is None:
            _note_kind(row, kinds)
    columns = list(zip(*scored, strict=True)) or [(), (), (), (), ()]
    return Scan(
        search=np.array(search, np.int64),
        scored=np.array(columns[0], np.int64),
        reward=np.array(columns[1], np.float64),
        accuracy=np.array(columns[2], np.float64),
        latency_ms=np.array(columns[3], np.float64),
        completed=np.array(columns[4], np.bool_),
        others=others,
        outcomes=outcomes,
        kinds=sorted(kinds.values(), key=lambda kind: (-kind.count, kind.example)),
    )


def _note_kind(row: TrialFigures, kinds: dict[tuple[str, str, str], Kind]) -> None:
    failure = json.loads(row.failure) if row.failure else {}
    reason = str(failure.get("reason") or "no reason recorded")
    outcome, cause = row.outcome or "", str(failure.get("cause") or "")
    # Two reasons that differ in their numbers only are of one kind.
    key = outcome, cause, re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?([eE][-+]?\d+)?", "#", reason)
    if key not in kinds and len(kinds) >= _KINDS:
        key, reason = (outcome, cause, ""), "other reasons"
    kind = kinds.setdefault(key, Kind(outcome, cause, reason, row.id))
    kind.count += 1


def _choose(store: Store, scan: Scan, seed: int) -> Shown:
    front = scan.front()
    if len(scan.search) <= WHOLE_CAMPAIGN:
        ids = {*scan.search.tolist(), *scan.others}
        note = "All trials of the campaign are shown."
    else:
        whole_front, front = front, thin(front, FRONT)
        sample = np.random.default_rng(seed).choice(scan.search, SAMPLE, replace=False)
        examples = [kind.example for kind in scan.kinds[:KINDS_SHOWN]]
        ids = {*front.tolist(), *scan.best(TOP).tolist(), *sample.tolist(), *examples}
        ids.update(scan.others[-TOP:])
        ids.update(scan.best(TOP, of=scan.completed).tolist())
        part = "" if len(front) == len(whole_front) else f" ({len(front):,} points of it)"
        note = (
            f"The campaign has {len(scan.search):,} trials. The table and the dots of the figures"
            f" show {len(ids):,}: the Pareto front of {len(whole_front):,}{part}, the {TOP:,} with"
            f" the highest reward, the {TOP:,} best that were trained, an example of each kind"
            f" of failure, and a random sample of {SAMPLE:,} (seed {seed}). Lines and counts"
            " are of all trials."
        )
    trials = store.trials_by_id(list(ids))
    measured = {key for trial in trials for key in trial.measurement_ids}
    superseded = store.superseded()
    searched = [trial for trial in trials if trial.id >= 0 and trial.id not in superseded]
    return Shown(
        trials=trials,
        front=front.tolist(),
        best=best_networks(searched, _DRAWN),
        verdicts=store.measurement_verdicts(sorted(measured)),
        note=note,
    )


# ---------------------------------------------------------------------------- for the script


def _row(trial: Trial, facts: Facts, architectures: dict[str, int]) -> list[Any]:
    metrics = trial.metrics or {}
    measurement = facts.shown.measurement(trial)
    text = cut(trial.architecture, ARCHITECTURE_LETTERS)
    values = {
        "trial": trial.id,
        "role": trial.role,
        "outcome": trial.outcome or "pending",
        "reward": finite(trial.reward),
        "accuracy": finite(trial.accuracy),
        "latency_ms": finite(trial.latency_ms),
        "iqr_ms": finite(measurement[2]) if measurement else None,
        "verdict": measurement[0] if measurement else "",
        "latency_is": facts.latency_is(trial),
        "parameters": _whole(metrics.get("parameters")),
        "macs": _whole(metrics.get("macs")),
        "epochs": trial.epochs,
        "from": trial.finalist_of if trial.reused_from is None else trial.reused_from,
        "failure": cut(trial.failure.reason, REASON_LETTERS) if trial.failure else "",
        "architecture": architectures.setdefault(text, len(architectures)),
        "tokens": " ".join(map(str, trial.tokens[:100])),
        "seed": trial.seed,
        "parts": _parts(trial),
        "timings": _timings(trial),
        "environment": facts.environments.of(trial),
    }
    return [values[name] for name in _COLUMNS]


def _parts(trial: Trial) -> str:
    parts = trial.parts
    if parts is None:
        return ""
    note = ", accuracy in int8" if INT8_ACCURACY in (trial.metrics or {}) else ""
    if parts.penalty:
        return (
            f"{parts.accuracy:.4f} − {parts.penalty:.4f} for {parts.latency_ms:.4g} in place of"
            f" {parts.target_ms:.4g} ms{note}"
        )
    ratio = f"({parts.latency_ms:.4g} / {parts.target_ms:.4g})^{parts.exponent:g}"
    return f"{parts.accuracy:.4f} × {ratio} = {parts.accuracy:.4f} × {parts.factor:.4f}{note}"


def _timings(trial: Trial) -> str:
    timings = list((trial.timings or {}).items())[:8]
    return ", ".join(f"{name.removesuffix('_s')} {value:.3g} s" for name, value in timings)


def _best_so_far(scan: Scan) -> list[tuple[int, float]]:
    """Points (trial, reward) of the staircase, its end included."""
    if not len(scan.reward):
        return []
    best = np.maximum.accumulate(scan.reward)
    rises = np.flatnonzero(np.concatenate(([True], best[1:] > best[:-1])))
    chosen = np.unique(np.append(thin(rises, LINE_POINTS), len(best) - 1))
    return list(zip(scan.scored[chosen].tolist(), best[chosen].tolist(), strict=True))


def _running_mean(scan: Scan, window: int) -> list[tuple[int, float]]:
    """Points (trial, mean reward of the `window` rewarded trials that end there)."""
    if window < 2:
        return []
    sums = np.cumsum(np.concatenate(([0.0], scan.reward)))
    means = (sums[window:] - sums[:-window]) / window
    chosen = thin(np.arange(len(means)), LINE_POINTS)
    ids = scan.scored[window - 1 :][chosen]
    return list(zip(ids.tolist(), means[chosen].tolist(), strict=True))


def _equal_reward(facts: Facts) -> list[tuple[float, float]]:
    """Points (latency, accuracy) that earn the best trial's reward, across the range shown."""
    scan, best = facts.scan, facts.shown.best[:1]
    if facts.target_ms is None or not best or best[0].latency_ms is None:
        return []
    objective = Objective(facts.config.objective, facts.target_ms)
    latency_ms = scan.latency_ms[np.isfinite(scan.latency_ms) & (scan.latency_ms > 0)]
    x = np.geomspace(latency_ms.min(), latency_ms.max(), 60)
    x = np.sort(np.append(x, [best[0].latency_ms, facts.target_ms]))
    x = x[(x >= latency_ms.min()) & (x <= latency_ms.max())]
    y = (best[0].reward or 0.0) / objective.score(np.ones_like(x), {LATENCY: x})
    if not math.isclose(
        np.interp(best[0].latency_ms, x, y), best[0].accuracy or 0.0, rel_tol=1e-6
    ):
        return []  # the reward is no product of accuracy and a factor
    inside = y <= 1
    return list(zip(x[inside].tolist(), y[inside].tolist(), strict=True))


def _diagnostics(store: Store) -> dict[str, list[tuple[int, float]]]:
    """Name -> points (batch, value), entropy first, then in the controller's order."""
    found: dict[str, list[tuple[int, float]]] = {"entropy": []}
    for batch, values in store.diagnostics(limit=LINE_POINTS):
        for name, value in values.items():
            if finite(value) is not None:
                found.setdefault(name, []).append((batch, value))
    return {name: points for name, points in found.items() if points}


# ---------------------------------------------------------------------------- small things


def thin(values: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Return at most `limit` of the values, evenly spaced, both ends among them."""
    if len(values) <= limit:
        return values
    return values[np.linspace(0, len(values) - 1, limit).round().astype(np.int64)]


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _whole(value: float | None) -> int | None:
    return round(value) if value is not None and math.isfinite(value) else None


def cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
