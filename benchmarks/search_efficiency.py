"""How fast the controllers search: regret on Accel-NASBench's surrogates, beside recorded runs.

    export MNAS_ACCEL_NASBENCH=FOLDER     # with bench.py, surr/ and baseline_runs.csv
    python benchmarks/search_efficiency.py
    python benchmarks/search_efficiency.py --devices a100 zcu102 --objectives soft50 --processes 2
    python benchmarks/search_efficiency.py --controllers evolution:population=50,sample_size=10
    python benchmarks/search_efficiency.py --controllers guided:latencies_per_trial=4 --costs
    python benchmarks/search_efficiency.py --budgets 100 250 500 1000 --plot regret.svg

A run is one controller on one device and objective with one seed: batches of proposals get the
surrogates' accuracy and latency with measured noise, and the regret after each budget is the best
known reward less the best noise-free reward found. The pick's is that of the network that the
controller would hand over, `recommend`, after the last batch that the budget holds. Objectives:
soft50 is the soft reward with the median latency as target, hard25 the hard one with the lower
quartile. A controller that asks for latencies before it proposes (`probe`) gets them, with noise;
its column is marked.

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
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import regret_plot

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
from space.tokens import Tokens

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
#: Regrets are fractions; the pick's is empty where the controller has no opinion. The extra
#: latencies and the process's CPU time are per trial up to the budget.
FIGURES = ("regret", "regret_inc", "pick", "distinct", "latencies", "cpu_ms", "rss_mb")

#: Where the harness has a block's expansion, kernel, layers and squeeze-and-excitation, the space
#: has operation, kernel, squeeze-and-excitation and layers.
SPACE_TO_HARNESS = [4 * block + k for block in range(7) for k in (0, 1, 3, 2)]

#: A device, an objective and a budget.
Cell = tuple[str, str, int]

#: The values whose median a table's column shows in a cell's line.
Column = Callable[[Cell], Sequence[float]]


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
    """A controller as the harness calls it; takes notes at the budgets."""

    def __init__(self, run: Run, problem: Any) -> None:
        space = load_space("accel_nasbench")

        def score(accuracy: Any, metrics: Mapping[str, Any]) -> Any:
            return problem.reward(100 * np.asarray(accuracy), metrics["latency_ms"])

        def metrics_of(tokens: Tokens) -> dict[str, float]:
            cost = count(space.decode(tokens))
            return {"macs": float(cost.macs), "parameters": float(cost.parameters)}

        rng = np.random.default_rng(run.seed)
        self._controller = make_controller(
            run.config, space.num_choices, rng, score=score, metrics_of=metrics_of
        )
        self._problem = problem
        self._budgets = run.budgets
        self._proposals: list[Proposal] = []
        self._trials = self._latencies = 0
        self._cpu_s = 0.0
        self.notes: dict[int, dict[str, object]] = {}

    def ask(self, n: int) -> list[list[int]]:
        for budget in self._budgets:
            if self._trials < budget < self._trials + n:
                self._take_note(budget)
        start = time.process_time()
        probed = self._controller.probe(n)
        if probed:
            _, latencies_ms, _, _ = self._problem.observe([harness_vector(t) for t in probed])
            metrics = [{"latency_ms": float(latency_ms)} for latency_ms in latencies_ms]
            self._controller.observe_metrics(list(zip(probed, metrics, strict=True)))
            self._latencies += len(probed)
        self._proposals = self._controller.propose(n)
        self._cpu_s += time.process_time() - start
        return [harness_vector(p.tokens) for p in self._proposals]

    def tell(self, results: Sequence[tuple[Any, float, float, float]]) -> None:
        made = [
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
        start = time.process_time()
        self._controller.update(made)
        self._cpu_s += time.process_time() - start
        self._trials += len(made)
        if self._trials in self._budgets:
            self._take_note(self._trials)

    def _take_note(self, budget: int) -> None:
        picks = self._controller.recommend(1)
        regret: object = ""
        if picks:
            accuracy, latency_ms = self._problem.true([harness_vector(picks[0])])
            regret = self._problem.best - float(self._problem.reward(accuracy, latency_ms)[0])
        self.notes[budget] = {
            "pick": regret,
            "latencies": self._latencies / self._trials,
            "cpu_ms": 1000 * self._cpu_s / self._trials,
            "rss_mb": psutil.Process().memory_info().rss / 2**20,
        }


def harness_vector(tokens: Tokens) -> list[int]:
    """Return tokens in the harness's order of decisions."""
    return [tokens[k] for k in SPACE_TO_HARNESS]


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
    optimizer = _Optimizer(run, problem)
    found = harness.run(optimizer, problem, budgets=run.budgets, batch=run.batch)
    figures = [found["metrics"][budget] | optimizer.notes[budget] for budget in run.budgets]
    return run, [[row[name] for name in FIGURES] for row in figures]


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of earlier calls by their FIELDS.

    Raises:
        ConfigError: The file has other columns.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS + FIGURES:
            raise ConfigError(
                f"{path} must have the columns {', '.join(FIELDS + FIGURES)}, but got"
                f" {', '.join(reader.fieldnames or ())}; name another --cache."
            )
        return {tuple(row[name] for name in FIELDS): row for row in reader}


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


@dataclass(frozen=True)
class Found:
    """What was asked for on the command line, and the rows and recorded runs that answer it."""

    arguments: argparse.Namespace
    rows: Mapping[tuple[str, ...], Mapping[str, str]]
    recorded: Mapping[tuple[str, str, str, int], Sequence[float]]

    def cells(self) -> list[Cell]:
        """Return the device, objective and budget of each line, in order."""
        given = self.arguments
        return list(itertools.product(given.devices, given.objectives, sorted(given.budgets)))

    def figures(self, text: str, cell: Cell, name: str) -> list[float]:
        """Return a controller's figures, one for each seed that has one."""
        device, objective, budget = cell
        settings, batch = settings_text(controller_config(text)), str(self.arguments.batch)
        keys = (
            (settings, device, objective, str(seed), batch, str(budget))
            for seed in seeds(self.arguments)
        )
        values = (self.rows[key][name] for key in keys)
        return [float(value) for value in values if value]

    def regrets(self, text: str, cell: Cell) -> list[float]:
        """Return a controller's regrets in points."""
        return [100 * regret for regret in self.figures(text, cell, "regret")]

    def picks(self, text: str, cell: Cell) -> list[float]:
        """Return the regrets of a controller's picks in points."""
        return [100 * regret for regret in self.figures(text, cell, "pick")]

    def of_method(self, method: str, cell: Cell) -> Sequence[float]:
        """Return a recorded method's regrets in points."""
        return self.recorded.get((method, *cell), [])


def seeds(arguments: argparse.Namespace) -> range:
    """Return the seeds that were asked for."""
    return range(arguments.first_seed, arguments.first_seed + arguments.seeds)


def print_regrets(found: Found) -> None:
    """Print the medians of regrets and picks, and what the marked controllers asked for."""
    texts, methods = found.arguments.controllers, found.arguments.against
    columns: list[tuple[str, Column]] = []
    notes = []
    for text in texts:
        extra = [x for cell in found.cells() for x in found.figures(text, cell, "latencies")]
        mark = "*" if any(extra) else ""
        if mark:
            notes.append(f"* {text} asked for {max(extra):.1f} extra latencies per trial")
        columns.append((text + mark, partial(found.regrets, text)))
        columns.append((f"pick{mark}", partial(found.picks, text)))
    columns += [(f"[{method}]", partial(found.of_method, method)) for method in methods]
    given = seeds(found.arguments)
    print(
        f"median regret in points, seeds {given[0]} to {given[-1]}, batch {found.arguments.batch};"
        " evaluator: the prepared harness surrogates; [recorded runs]"
    )
    print_medians(found, columns, "{:.3f}")
    print("\n".join([*notes, *_beside_recorded(found)]))


def draw(found: Found, path: Path) -> None:
    """Draw the controllers' regrets against trials, and the recorded methods' as far as those."""
    given = found.arguments
    panels: dict[tuple[str, str], dict[str, dict[int, Sequence[float]]]] = {}
    for problem in itertools.product(given.devices, given.objectives):
        curves = panels[problem] = {
            text: {budget: found.regrets(text, (*problem, budget)) for budget in given.budgets}
            for text in given.controllers
        }
        for (method, *where, budget), regrets in found.recorded.items():
            if method in given.against and where == [*problem] and budget <= max(given.budgets):
                curves.setdefault(f"recorded {method}", {})[budget] = regrets
    leaders = {
        COUNTERPARTS[name]: text
        for text in reversed(given.controllers)
        if (name := text.partition(":")[0]) in COUNTERPARTS
    }
    recorded = {f"recorded {m}": leaders.get(m, f"recorded {m}") for m in given.against}
    regret_plot.draw(path, panels, recorded)


def print_costs(found: Found) -> None:
    """Print what the controllers themselves took."""
    print("median CPU time in ms per trial up to the budget, and the process's memory in MB then")
    columns: list[tuple[str, Column]] = []
    for text in found.arguments.controllers:
        columns.append((f"{text} ms", partial(found.figures, text, name="cpu_ms")))
        columns.append(("MB", partial(found.figures, text, name="rss_mb")))
    print_medians(found, columns, "{:.1f}")


def print_medians(found: Found, columns: Sequence[tuple[str, Column]], form: str) -> None:
    """Print a line per device, objective and budget with the median in each column."""
    widths = [max(len(heading) + 2, 9) for heading, _ in columns]
    headings = zip(columns, widths, strict=True)
    print(f"{'':22}" + "".join(f"{heading:>{width}}" for (heading, _), width in headings))
    for cell in found.cells():
        device, objective, budget = cell
        line = f"{device:8}{objective:8}{budget:>6}"
        for (_, values_at), width in zip(columns, widths, strict=True):
            values = values_at(cell)
            shown = form.format(statistics.median(values)) if values else "-"
            line += f"{shown:>{width}}"
        print(line)


def _beside_recorded(found: Found) -> list[str]:
    """How often each controller is as good as the recorded method that it should come up to."""
    lines = []
    for text in found.arguments.controllers:
        counterpart = COUNTERPARTS.get(text.partition(":")[0], "")
        good = [
            statistics.median(found.regrets(text, cell)) <= statistics.quantiles(theirs, n=4)[2]
            for cell in found.cells()
            if len(theirs := found.of_method(counterpart, cell)) > 1
        ]
        if good:
            lines.append(
                f"{text}: at or below the upper quartile of the recorded {counterpart} in"
                f" {sum(good)} of {len(good)} cells"
            )
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--controllers", nargs="+", default=list(CONTROLLERS))
    add("--devices", nargs="+", default=["a100"])
    add("--objectives", nargs="+", default=["soft50", "hard50"])
    add("--seeds", type=int, default=10, help="how many")
    add("--first-seed", type=int, default=0)
    add("--budgets", nargs="+", type=int, default=[250, 1000], help="trials")
    add("--batch", type=int, default=16)
    add("--processes", type=int, default=1)
    add("--cache", type=Path, default=Path("runs/search_efficiency"), help="folder of runs.csv")
    add("--against", nargs="+", default=list(COUNTERPARTS.values()))
    add("--costs", action="store_true", help="print the controllers' CPU time and memory too")
    add("--plot", type=Path, help="draw medians and quartiles into this SVG or PNG")
    return parser.parse_args()


def run_missing(arguments: argparse.Namespace) -> None:
    """Run what is missing, then print the tables and draw.

    Raises:
        ConfigError: There are no data, or a controller's settings are wrong.
    """
    folder()  # before any process is started
    os.environ.setdefault("NUMBA_CACHE_DIR", str(arguments.cache.resolve() / "numba"))
    path = arguments.cache / "runs.csv"
    done = read_rows(path)
    problems = itertools.product(arguments.devices, arguments.objectives, seeds(arguments))
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
    found = Found(arguments, read_rows(path), recorded_regrets(arguments.batch))
    print_regrets(found)
    if arguments.costs:
        print_costs(found)
    if arguments.plot:
        draw(found, arguments.plot)


def main() -> None:
    """Run from the command line."""
    try:
        run_missing(_arguments())
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
