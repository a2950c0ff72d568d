"""How fast the controllers search: regret on Accel-NASBench's surrogates, beside recorded runs.

    export MNAS_ACCEL_NASBENCH=FOLDER     # with bench.py, surr/ and baseline_runs.csv
    python benchmarks/search_efficiency.py
    python benchmarks/search_efficiency.py --devices a100 zcu102 --objectives soft50 --processes 2
    python benchmarks/search_efficiency.py --controllers evolution:population=50,sample_size=10

A run is one controller on one device and objective with one seed: batches of proposals get the
surrogates' accuracy and latency with measured noise, and the regret after each budget is the best
known reward less the best noise-free reward found. Objectives: soft50 is the soft reward with the
median latency as target, hard25 the hard one with the lower quartile.

Runs are appended to runs.csv in the cache folder as they end, and never repeated: kill the program
and call it again. A row is known by the controller's resolved settings; where a controller's code
has changed, delete its rows. The table shows medians over seeds in points (100 x regret), then the
recorded methods' medians. Differences below 0.05 points mean nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from controller.base import Proposal, Result
from controller.registry import (
    CONTROLLERS,
    BuiltInControllerConfig,
    ControllerConfig,
    make_controller,
)
from space.cost import count
from space.errors import ConfigError
from space.records import apply_overrides, build, record, to_plain
from space.search_space import load_space

FOLDER_VARIABLE = "MNAS_ACCEL_NASBENCH"

#: The recorded method that a controller should come up to: its median regret is held against the
#: upper quartile of the recorded runs.
COUNTERPARTS = {
    "random": "random",
    "ppo": "ppo_lstm",
    "reinforce": "reinforce_fact",
    "evolution": "re100_25",
    "local": "local",
    "guided": "gp2_ts",
}

FIELDS = ("settings", "device", "objective", "seed", "batch", "budget")
FIGURES = ("regret", "regret_inc", "distinct", "ms_per_eval")

#: Where the harness has a block's expansion, kernel, layers and squeeze-and-excitation, the space
#: has operation, kernel, squeeze-and-excitation and layers.
SPACE_TO_HARNESS = [4 * block + k for block in range(7) for k in (0, 1, 3, 2)]


@record
class _Holder:
    controller: ControllerConfig


def controller_config(text: str) -> BuiltInControllerConfig:
    """Return what `evolution` or `evolution:population=50,sample_size=10` stands for."""
    name, _, settings = text.partition(":")
    overrides = settings.split(",") if settings else []
    values = apply_overrides({"name": name}, overrides, where=text)
    return build(_Holder, {"controller": values}, where=text).controller


def settings_text(config: BuiltInControllerConfig) -> str:
    """Return the settings by which a controller's rows are known."""
    return json.dumps(to_plain(config), sort_keys=True)


@dataclass(frozen=True)
class Run:
    """One controller on one problem with one seed."""

    config: BuiltInControllerConfig
    device: str
    objective: str
    seed: int
    batch: int
    budgets: tuple[int, ...]

    def keys(self) -> list[tuple[str, ...]]:
        """Return the FIELDS of its rows, one for each budget."""
        problem = (self.device, self.objective, str(self.seed), str(self.batch))
        return [(settings_text(self.config), *problem, str(budget)) for budget in self.budgets]


class _Optimizer:
    """A controller as the harness calls it."""

    def __init__(self, config: BuiltInControllerConfig, problem: Any, seed: int) -> None:
        space = load_space("accel_nasbench")

        def score(accuracy: Any, metrics: Mapping[str, Any]) -> Any:
            return problem.reward(100 * np.asarray(accuracy), metrics["latency_ms"])

        def metrics_of(tokens: tuple[int, ...]) -> dict[str, float]:
            cost = count(space.decode(tokens))
            return {"macs": float(cost.macs), "parameters": float(cost.parameters)}

        rng = np.random.default_rng(seed)
        self._controller = make_controller(
            config, space.num_choices, rng, score=score, metrics_of=metrics_of
        )
        self._proposals: list[Proposal] = []

    def ask(self, n: int) -> list[list[int]]:
        self._proposals = self._controller.propose(n)
        return [[p.tokens[k] for k in SPACE_TO_HARNESS] for p in self._proposals]

    def tell(self, results: Sequence[tuple[Any, float, float, float]]) -> None:
        self._controller.update(
            [
                Result(
                    proposal,
                    "completed",
                    reward=reward,
                    accuracy=percent / 100,
                    metrics={"latency_ms": latency_ms},
                    fidelity=1.0,
                )
                for proposal, (_, reward, percent, latency_ms) in zip(
                    self._proposals, results, strict=True
                )
            ]
        )


def folder() -> Path:
    """Return the folder of the data.

    Raises:
        ConfigError: The environment names none.
    """
    path = os.environ.get(FOLDER_VARIABLE)
    if not path or not (Path(path) / "bench.py").exists():
        raise ConfigError(f"{FOLDER_VARIABLE} must name the folder of bench.py, but got {path!r}.")
    return Path(path)


def load_harness() -> ModuleType:
    """Return bench.py as a module."""
    spec = importlib.util.spec_from_file_location("accel_nasbench_bench", folder() / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    if spec.name not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules[spec.name]


def evaluate(run: Run) -> tuple[Run, list[list[object]]]:
    """Return a run and the FIGURES of its rows."""
    harness = load_harness()
    problem = harness.Problem(run.device, run.objective[:4], int(run.objective[4:]), seed=run.seed)
    optimizer = _Optimizer(run.config, problem, run.seed)
    found = harness.run(optimizer, problem, budgets=run.budgets, batch=run.batch)
    return run, [
        [*(found["metrics"][budget][name] for name in FIGURES[:3]), found["ms_per_eval"]]
        for budget in run.budgets
    ]


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of earlier calls by their FIELDS."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[name] for name in FIELDS): row for row in csv.DictReader(file)}


def evaluate_all(runs: Sequence[Run], path: Path, processes: int) -> None:
    """Append the rows of all runs to the file, each run's at once when it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(FIELDS + FIGURES)
        for index, (run, figures) in enumerate(_results(runs, processes), start=1):
            writer.writerows([*key, *row] for key, row in zip(run.keys(), figures, strict=True))
            file.flush()
            print(f"\r{index} of {len(runs)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _results(runs: Sequence[Run], processes: int) -> Iterator[tuple[Run, list[list[object]]]]:
    if processes == 1:
        yield from map(evaluate, runs)
        return
    # Unlike multiprocessing's Pool, it raises when a process dies, instead of waiting for it.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(evaluate, r) for r in runs]):
            yield future.result()


def recorded_regrets(batch: int) -> dict[tuple[str, str, str, int], list[float]]:
    """Return (method, device, objective, budget) -> the recorded runs' regrets in points."""
    found = defaultdict(list)
    with (folder() / "baseline_runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["batch"]) == batch:
                key = (row["method"], row["device"], row["scen"], int(row["budget"]))
                found[key].append(100 * float(row["regret"]))
    return dict(found)


def print_table(arguments: argparse.Namespace, rows: Mapping[tuple[str, ...], Any]) -> None:
    """Print a line per device, objective and budget; a column per controller and method."""
    recorded = recorded_regrets(arguments.batch)
    columns = [*arguments.controllers, *(f"[{method}]" for method in arguments.against)]
    print("median regret in points; [recorded runs]")
    widths = [max(len(column) + 2, 9) for column in columns]
    print(f"{'':22}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    good: dict[str, list[bool]] = defaultdict(list)
    cells = itertools.product(arguments.devices, arguments.objectives, sorted(arguments.budgets))
    for device, objective, budget in cells:
        values: list[float | None] = []
        for text in arguments.controllers:
            regrets = _regrets(rows, arguments, text, device, objective, budget)
            values.append(statistics.median(regrets))
            counterpart = COUNTERPARTS.get(text.partition(":")[0], "")
            theirs = recorded.get((counterpart, device, objective, budget), [])
            if len(theirs) > 1:
                upper = statistics.quantiles(theirs, n=4)[2]
                good[text].append(statistics.median(regrets) <= upper)
        for method in arguments.against:
            theirs = recorded.get((method, device, objective, budget), [])
            values.append(statistics.median(theirs) if theirs else None)
        shown = (
            f"{'-' if value is None else format(value, '.3f'):>{width}}"
            for value, width in zip(values, widths, strict=True)
        )
        print(f"{device:8}{objective:8}{budget:>6}  " + "".join(shown))
    for text, cell_is_good in good.items():
        print(
            f"{text}: at or below the upper quartile of the recorded"
            f" {COUNTERPARTS[text.partition(':')[0]]} in {sum(cell_is_good)} of"
            f" {len(cell_is_good)} cells"
        )


def _regrets(
    rows: Mapping[tuple[str, ...], Any],
    arguments: argparse.Namespace,
    text: str,
    device: str,
    objective: str,
    budget: int,
) -> list[float]:
    """A controller's regrets in points, one for each seed."""
    settings = settings_text(controller_config(text))
    return [
        100
        * float(
            rows[(settings, device, objective, str(seed), str(arguments.batch), str(budget))][
                "regret"
            ]
        )
        for seed in range(arguments.seeds)
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--controllers", nargs="+", default=list(CONTROLLERS))
    add("--devices", nargs="+", default=["a100"])
    add("--objectives", nargs="+", default=["soft50", "hard50"])
    add("--seeds", type=int, default=10, help="seeds 0 to SEEDS - 1")
    add("--budgets", nargs="+", type=int, default=[250, 1000], help="trials")
    add("--batch", type=int, default=16)
    add("--processes", type=int, default=1)
    add("--cache", type=Path, default=Path("runs/search_efficiency"), help="folder of runs.csv")
    add("--against", nargs="+", default=list(COUNTERPARTS.values()))
    return parser.parse_args()


def run_missing(arguments: argparse.Namespace) -> None:
    """Run what is missing, then print the table.

    Raises:
        ConfigError: There are no data, or a controller's settings are wrong.
    """
    folder()  # before any process is started
    os.environ.setdefault("NUMBA_CACHE_DIR", str(arguments.cache.resolve() / "numba"))
    path = arguments.cache / "runs.csv"
    done = read_rows(path)
    problems = itertools.product(arguments.devices, arguments.objectives, range(arguments.seeds))
    wanted = [
        Run(
            controller_config(text), device, objective, seed, arguments.batch,
            tuple(sorted(arguments.budgets)),
        )
        for (device, objective, seed), text in itertools.product(problems, arguments.controllers)
    ]  # fmt: skip
    missing = [run for run in wanted if not all(key in done for key in run.keys())]
    if missing:
        evaluate_all(missing, path, arguments.processes)
    print_table(arguments, read_rows(path))


def main() -> None:
    """Run from the command line."""
    try:
        run_missing(_arguments())
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
