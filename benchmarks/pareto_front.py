"""How good the fronts of the controller `pareto` are: hypervolume on Accel-NASBench's surrogates.

    export MNAS_ACCEL_NASBENCH=FOLDER     # with bench.py, surr/ and baseline_runs.csv
    python benchmarks/pareto_front.py
    python benchmarks/pareto_front.py --devices a100 --seeds 0 1 --settings exploration=0.3
    python benchmarks/pareto_front.py --plot fronts.png

A run is the controller on one device with one seed: batches of proposals get the surrogates'
accuracy and latency with measured noise. All figures are hypervolumes over that of the best known
front, as bench.py computes them, and medians over the seeds:

    found        noise-free values of all networks evaluated; `least` is the worst seed's
    claimed      observed values, as `front()` reports them: optimistic, since noise is luck
    20 observed  noise-free values of 20 networks spread over the observed front
    20 advised   noise-free values of the 20 networks that `recommend` names, after the last batch
                 that the budget ends in
    [nsga2]      what the recorded runs of pymoo's NSGA-II found; `-` where there are none

Runs are appended to runs.jsonl in the cache folder as they end, and never repeated: kill the
program and call it again. A row is known by the controller's resolved settings; where its code has
changed, delete the file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from search_efficiency import SPACE_TO_HARNESS, folder, load_harness

from controller.base import Proposal, Result
from controller.front import non_dominated, spread_out
from controller.pareto_evolution import Pareto, ParetoConfig, reference_of
from space.errors import ConfigError
from space.records import apply_overrides, build, to_plain
from space.search_space import load_space

PEER = "pymoo_nsga2"

#: How many networks are handed over.
HANDED_OVER = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The controller on one device with one seed."""

    config: ParetoConfig
    device: str
    seed: int
    batch: int
    budgets: tuple[int, ...]

    def keys(self) -> list[tuple[object, ...]]:
        """Return what its rows are known by, one for each budget."""
        settings = json.dumps(to_plain(self.config), sort_keys=True)
        return [(settings, self.device, self.seed, self.batch, b) for b in self.budgets]


def key_of(row: Row) -> tuple[object, ...]:
    """Return what a row is known by."""
    return tuple(row[name] for name in ("settings", "device", "seed", "batch", "budget"))


class Trials:
    """What a run evaluated: observed and noise-free (accuracy in percent, latency in ms)."""

    def __init__(self, run: Run) -> None:
        self._harness = load_harness()
        self._problem = self._harness.Problem(run.device, seed=run.seed)
        self.tokens: dict[tuple[int, ...], int] = {}
        self.observed = np.zeros((0, 2))
        self.true = np.zeros((0, 2))

    def evaluate(self, proposals: Sequence[Proposal]) -> list[Result]:
        """Return the results of proposals, and take notes."""
        vectors = np.array([[p.tokens[k] for k in SPACE_TO_HARNESS] for p in proposals])
        observed_and_true = np.stack(self._problem.observe(vectors), axis=1)
        self.tokens.update({p.tokens: len(self.true) + k for k, p in enumerate(proposals)})
        self.observed = np.concatenate([self.observed, observed_and_true[:, :2]])
        self.true = np.concatenate([self.true, observed_and_true[:, 2:]])
        return [
            Result(p, "completed", percent / 100, percent / 100, {"latency_ms": latency_ms})
            for p, (percent, latency_ms) in zip(
                proposals, observed_and_true[:, :2].tolist(), strict=True
            )
        ]

    def ratio(self, values: np.ndarray) -> float:
        """Return the hypervolume of values over that of the best known front."""
        problem = self._problem
        found = self._harness.hypervolume(*values.T, problem.acc_ref, problem.lat_ref)
        return float(found / problem.hv_best)


def evaluate(run: Run) -> list[Row]:
    """Return a run's rows."""
    num_choices = load_space("accel_nasbench").num_choices
    controller = Pareto(run.config, num_choices, np.random.default_rng(run.seed))
    trials = Trials(run)
    rows: list[Row] = []
    cpu_s = 0.0
    for key, budget in zip(run.keys(), run.budgets, strict=True):
        while len(trials.true) < budget:
            started = time.process_time()
            proposals = controller.propose(min(run.batch, run.budgets[-1] - len(trials.true)))
            cpu_s += time.process_time() - started
            results = trials.evaluate(proposals)
            started = time.process_time()
            controller.update(results)
            cpu_s += time.process_time() - started
        names = ("settings", "device", "seed", "batch", "budget")
        rows.append(
            {
                **dict(zip(names, key, strict=True)),
                **figures(controller, trials, budget),
                "cpu_ms": 1000 * cpu_s / len(trials.true),
            }
        )
    return rows


def figures(controller: Pareto, trials: Trials, budget: int) -> Row:
    """Return what a run found within a budget."""
    observed, true = trials.observed[:budget], trials.true[:budget]
    points = observed * [1, -1]
    (front,) = np.nonzero(non_dominated(points))
    spread = spread_out(points[front], HANDED_OVER, reference_of(points)[0])
    advised = [trials.tokens[tokens] for tokens in controller.recommend(HANDED_OVER)]
    return {
        "found": trials.ratio(true),
        "claimed": trials.ratio(observed),
        "observed": trials.ratio(true[front[spread]]),
        "advised": trials.ratio(trials.true[advised]),
        "front": true[non_dominated(true * [1, -1])].tolist(),
    }


def read_rows(path: Path) -> dict[tuple[object, ...], Row]:
    """Return the rows of earlier calls."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {key_of(row): row for row in rows}


def evaluate_all(runs: Sequence[Run], path: Path, processes: int) -> None:
    """Append the rows of all runs to the file, each run's at once when it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for index, rows in enumerate(_results(runs, processes), start=1):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            print(f"\r{index} of {len(runs)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _results(runs: Sequence[Run], processes: int) -> Iterator[list[Row]]:
    if processes == 1:
        yield from map(evaluate, runs)
        return
    # Unlike multiprocessing's Pool, it raises when a process dies, instead of waiting for it.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(evaluate, r) for r in runs]):
            yield future.result()


def recorded_ratios(device: str, batch: int, budget: int) -> list[float]:
    """Return the ratios of the peer's recorded runs."""
    with (folder() / "baseline_runs.csv").open(newline="") as file:
        return [
            float(row["hv_frac"])
            for row in csv.DictReader(file)
            if (row["method"], row["device"]) == (PEER, device)
            and (int(row["batch"]), int(row["budget"])) == (batch, budget)
        ]


def print_table(rows_of: dict[tuple[str, int], list[Row]], batch: int) -> None:
    """Print a line per device and budget."""
    print("hypervolume over that of the best known front, medians")
    print(
        "device  budget    found    least  claimed  20 observed  20 advised  [nsga2]  CPU ms/trial"
    )
    for (device, budget), rows in rows_of.items():
        median = {
            name: statistics.median(row[name] for row in rows)
            for name in ("found", "claimed", "observed", "advised", "cpu_ms")
        }
        theirs = recorded_ratios(device, batch, budget)
        peer = f"{statistics.median(theirs):.4f}" if theirs else "-"
        print(
            f"{device:8}{budget:6}{median['found']:9.4f}{min(row['found'] for row in rows):9.4f}"
            f"{median['claimed']:9.4f}{median['observed']:13.4f}{median['advised']:12.4f}"
            f"{peer:>9}{median['cpu_ms']:14.1f}"
        )


def draw(rows_of: dict[tuple[str, int], list[Row]], path: Path) -> None:
    """Draw the noise-free front of each device's and budget's median run over the best known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    best_known = json.loads((folder() / "surr" / "optima.json").read_text())
    devices = list(dict.fromkeys(device for device, _ in rows_of))
    figure, axes = pyplot.subplots(
        1, len(devices), figsize=(5.5 * len(devices), 4.5), squeeze=False, layout="constrained"
    )
    for axis, device in zip(axes[0], devices, strict=True):
        accuracy, latency_ms = np.array(best_known[f"front:{device}"]).T
        axis.plot(latency_ms, accuracy, color="0.6", linewidth=4, label="best known front")
        budgets = [budget for of, budget in rows_of if of == device]
        for budget, marker in zip(budgets, itertools.cycle("^xo+sd")):
            rows = sorted(rows_of[device, budget], key=lambda row: row["found"])
            row = rows[len(rows) // 2]
            accuracy, latency_ms = np.array(row["front"]).T
            label = f"{budget} trials: {row['found']:.4f}"
            axis.plot(latency_ms, accuracy, marker, markersize=4, linestyle="", label=label)
        axis.set(title=device, xlabel="latency in ms", ylabel="accuracy in %", xscale="log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_ylim(45, None)  # the accuracy from which the hypervolume counts
        axis.legend(title="hypervolume over the best known")
        axis.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", nargs="*", default=[], help="of the controller, e.g. exploration=0.3")
    add("--devices", nargs="+", default=["a100", "zcu102", "tpuv2"])
    add("--seeds", nargs="+", type=int, default=list(range(20, 30)))
    add("--budgets", nargs="+", type=int, default=[250, 1000, 4000], help="trials")
    add("--batch", type=int, default=16)
    add("--processes", type=int, default=1)
    add("--cache", type=Path, default=Path("runs/pareto_front"), help="folder of runs.jsonl")
    add("--plot", type=Path, help="file of the fronts' drawing, e.g. a .png")
    return parser.parse_args()


def run_missing(arguments: argparse.Namespace) -> None:
    """Run what is missing, print the table, and draw the fronts if asked to.

    Raises:
        ConfigError: There are no data, or the controller's settings are wrong.
    """
    folder()  # before any process is started
    os.environ.setdefault("NUMBA_CACHE_DIR", str(arguments.cache.resolve() / "numba"))
    path = arguments.cache / "runs.jsonl"
    values = apply_overrides({}, arguments.settings, where="--settings")
    config = build(ParetoConfig, values, where="--settings")
    budgets = tuple(sorted(set(arguments.budgets)))
    done = read_rows(path)
    wanted = [
        Run(config, device, seed, arguments.batch, budgets)
        for seed, device in itertools.product(arguments.seeds, arguments.devices)
    ]
    missing = [run for run in wanted if not all(key in done for key in run.keys())]
    if missing:
        evaluate_all(missing, path, arguments.processes)
        done = read_rows(path)
    rows_of: dict[tuple[str, int], list[Row]] = {}
    for device, budget in itertools.product(arguments.devices, budgets):
        keys = [key for run in wanted for key in run.keys() if key[1] == device]
        rows_of[device, budget] = [done[key] for key in keys if key[-1] == budget]
    print_table(rows_of, arguments.batch)
    if arguments.plot is not None:
        draw(rows_of, arguments.plot)


def main() -> None:
    """Run from the command line."""
    try:
        run_missing(_arguments())
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
