"""MnasNet-A1's derivation on one machine: campaigns, their finalists measured again, a table.

    export MNAS_ACCEL_NASBENCH=FOLDER     # docs/accel-nasbench.md says where to get the data
    python benchmarks/derivation/laptop.py --plot derivation-laptop.png
    python benchmarks/derivation/laptop.py --controllers guided:250:5     # name:trials:seeds
    python benchmarks/derivation/laptop.py --controllers guided:250:1:soft

Every campaign is configs/search/mnasnet_a1_laptop.yaml with another controller, seed and number of
trials. They run one at a time: they share the core on which latencies are measured. They share
their measurements, too: a network that one of them has timed is not timed again. Everything is
kept in the folder of --runs. Kill the program and call it again: a finished campaign is not
repeated, a stopped one goes on.

The target is the latency of A1's projection: the median of nine measurements at full precision,
taken once, before the first campaign.

Then 15 networks of each campaign are judged anew, as a campaign's finalists are: timed against
A1's projection, inference by inference in turn; and "trained" with three new seeds (the
surrogate's noise is drawn anew), since the highest of many noisy accuracies is a lucky one.

1. Which take about the target? One quick measurement is a noisy one, so a latency table is fitted
   to all of the campaign's and asked. The 15 are the most accurate ones there, those first that
   the controller's own models recommend. Each shows by how much the table is off, and the next one
   is taken where all of them so far put the target.
2. The one with the highest new accuracy of those within 1.5 % of the projection's latency is the
   campaign's network; where there is none, the one with the best reward.
3. It is timed anew, in turn with the projection: that is the latency in the table, and the
   accuracy there is the surrogate's mean. Neither the search nor the choice saw these two.

With another objective than `absolute`, as a fourth word, the 15 are those with the highest
rewards, wherever they lie, and the best of them is the campaign's: `soft` and `hard` land on no
target. What ppo's and guided's campaigns found is held against the bars that are printed; the exit
status is 1 where one was missed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latency.compare import Comparison, compare
from latency.device import load_device, make_meter
from latency.lookup_table import LatencyPredictor, fit_table
from retrain.launch import die_with_parent
from search.accel_nasbench import AccelNasBenchConfig, AccelNasBenchEvaluator
from search.campaign import open_to_read, read_config
from search.config import load_campaign_config
from search.finalists import candidates
from search.objective import Objective
from search.store import Store
from search.trial import Trial
from space.architecture import Architecture
from space.cost import count
from space.errors import ConfigError, MnasError
from space.files import versions, write_atomically
from space.mnasnet import find_architecture
from space.records import find_config, load_yaml
from space.search_space import load_space

CONFIG = "mnasnet_a1_laptop"
#: Of these rules; a result of others is made anew.
PROTOCOL = 8
#: How many networks are judged.
FINALISTS = 15
#: How near the target they are by the table, as a fraction of it; more, if there are few.
WINDOW = 0.03
#: Rounds of about a second, each in new sessions, in which inferences of a finalist and of the
#: projection are taken in turn, and those of the chosen one, anew.
ROUNDS, FRESH_ROUNDS = 8, 20
#: How many new seeds a finalist is "trained" with.
NEW_SEEDS = 3
#: How often the projection is measured for the target.
TARGET_ROUNDS = 9
#: How near the target the chosen network must be, so that new measurements are within LANDING.
CHOSEN = 0.015
#: The objective whose campaigns land on the target and are held against the bars.
LANDS = "absolute"
#: Bars: how far the median campaign's network may be from the target, its least gain, and the
#: share of found networks that must differ from block to block.
LANDING, GAIN_POINTS, DIVERSE_SHARE = 0.02, 0.6, 0.8
DEFAULT_RUNS = ("guided:250:5", "random:250:3", "evolution:250:3", "ppo:2000:5")
#: Of the campaigns in a plot: told apart by colour-blind readers, too (Okabe, Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
#: Random networks that a statistic of the found ones is held against.
RANDOM_NETWORKS = 1000


@dataclass(frozen=True)
class Run:
    """A campaign of one controller, with so many trials, a seed, and an objective."""

    controller: str
    trials: int
    seed: int
    objective: str = LANDS

    def settings(self, runs: Path) -> list[str]:
        """What is changed about the configuration, but for the target."""
        return [
            f"controller.name={self.controller}", f"seed={self.seed}",
            f"stop.trials={self.trials}", f"objective.name={self.objective}",
            f"measurement_cache={runs / 'measurements.db'}",
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.group[0]}-{self.trials}-{self.seed}"

    @property
    def group(self) -> tuple[str, int]:
        """What the campaigns that differ in their seed alone have in common."""
        name = self.controller
        return (name if self.objective == LANDS else f"{name}-{self.objective}"), self.trials

    def identity(self) -> dict[str, Any]:
        """What a result says about which campaign it is of, and by which rules."""
        controller, trials = self.group
        return {
            "protocol": PROTOCOL, "controller": controller, "trials": trials, "seed": self.seed
        }  # fmt: skip

    def folder(self, runs: Path) -> Path:
        """Where it is kept."""
        return runs / str(self)


def measured_target(runs: Path, reference: Architecture) -> float:
    """Return the projection's latency in milliseconds, from the folder or measured now."""
    file, meter = runs / "target.json", make_meter(load_device("host"))
    if not file.exists():
        runs.mkdir(parents=True, exist_ok=True)
        taken_ms = [meter.measure(reference).median_ms for _ in range(TARGET_ROUNDS)]
        kept = {"taken_ms": taken_ms, "device": meter.identity()}
        write_atomically(file, json.dumps(kept).encode())
    known = json.loads(file.read_text(encoding="utf-8"))
    if known["device"] != meter.identity():
        raise ConfigError(
            f"{file}: must be of this machine and its versions, but is of {known['device']}; give"
            " another --runs."
        )
    return statistics.median(known["taken_ms"])


def search(run: Run, runs: Path, target_ms: float) -> None:
    """Run a campaign to its end, or go on with it."""
    folder = run.folder(runs)
    command = [sys.executable, "-m", "search"]
    if (folder / "campaign.db").exists():
        command += ["resume", str(folder)]
    else:
        command += [
            "search", CONFIG, *run.settings(runs), "objective.target=null",
            f"objective.target_ms={target_ms}", "--out", str(folder),
        ]  # fmt: skip
    # Whatever ends this program ends the search, or a second call would find it running.
    done = subprocess.run(command, preexec_fn=functools.partial(die_with_parent, os.getpid()))
    if done.returncode == ConfigError.exit_status:
        raise ConfigError(f"{folder}: was refused, for the reason above.")
    if done.returncode:
        raise MnasError(
            f"{folder}: the search ended with status {done.returncode}; call this program again"
            " and it goes on."
        )


def known_result(run: Run, runs: Path) -> dict[str, Any] | None:
    """Return a campaign's result if it has one by these rules."""
    file = run.folder(runs) / "derivation.json"
    if not file.exists():
        return None
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # A folder that was copied to go on with has the result of the first one.
    return known if known.items() >= run.identity().items() else None


def finish(run: Run, runs: Path, reference: Architecture) -> dict[str, Any]:
    """Judge a campaign's networks, keep its result in its folder, and return it."""
    config, store = read_config(run.folder(runs)), open_to_read(run.folder(runs))
    target_ms = store.meta("target_ms")
    proposed, stop_reason = store.trials(), store.meta("stop_reason")
    ranked = by_accuracy(store) if run.objective == LANDS else candidates(store, FINALISTS)
    store.close()
    if not ranked:
        raise MnasError(f"{run.folder(runs)}: no network has a reward.")
    predicted = table_ratios(ranked, reference) if run.objective == LANDS else {}
    assert isinstance(config.evaluator, AccelNasBenchConfig)
    judge = Judge(
        run, reference, Objective(config.objective, target_ms), target_ms, config.evaluator
    )
    if run.objective == LANDS:
        rows = finalists(ranked, predicted, judge.row)
        found = dict(chosen(rows))
    else:
        rows = [judge.row(trial) for trial in ranked]
        found = dict(max(rows, key=lambda row: row["reward"]))
    fresh = judge.in_turn(find_architecture(found["architecture"]), FRESH_ROUNDS)
    found |= {"ratio": fresh.ratio, "ratio_interval": [fresh.ratio_low, fresh.ratio_high]}
    result = {
        **run.identity(), "target_ms": target_ms,
        "proposed": len(proposed), "failed": sum(trial.reward is None for trial in proposed),
        "stop_reason": stop_reason, "reference_accuracy": judge.mean(reference),
        "finalists": rows, "found": found,
        "device": judge.meter.identity(), "versions": versions(),
        "data_sha256": config.evaluator.sha256,
    }  # fmt: skip
    write_atomically(run.folder(runs) / "derivation.json", json.dumps(result, indent=1).encode())
    return result


def by_accuracy(store: Store) -> list[Trial]:
    """Return the campaign's different networks, the most accurate ones by its own figures first.

    A controller that models the noise recommends, and its recommendations come first.
    """
    recommended = store.meta("recommended", [])
    measured = [trial for trial in store.trials() if trial.reward is not None]
    order = {trial_id: place for place, trial_id in enumerate(recommended)}
    measured.sort(key=lambda t: (order.get(t.id, len(order)), -(t.accuracy or 0.0), t.id))
    chosen: dict[str, Trial] = {}
    for trial in measured:
        chosen.setdefault(trial.architecture_hash, trial)
    return list(chosen.values())


def table_ratios(trials: list[Trial], reference: Architecture) -> dict[int, float]:
    """Return trial -> its latency as a multiple of the reference's, by a table fitted to all.

    What disturbed single measurements is not in it, nor what slowed the whole campaign.
    """
    networks = [find_architecture(trial.architecture) for trial in trials]
    times_ms = np.asarray([trial.latency_ms for trial in trials], dtype=np.float64)
    space = load_space("accel_nasbench").config
    predictor = LatencyPredictor(fit_table(space, {"name": CONFIG}, networks, times_ms))
    (reference_ms,) = predictor.predict([reference])
    ratios = predictor.predict(networks) / reference_ms
    return {trial.id: float(ratio) for trial, ratio in zip(trials, ratios, strict=True)}


def finalists(
    ranked: list[Trial],
    predicted: dict[int, float],
    judged: Callable[[Trial], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Judge the most accurate networks that take about the target, and return their rows.

    The table may be off by a factor, of the reference beside these networks: each row tells, and
    the next network is the most accurate one where all rows so far put the target.
    """
    rows: list[dict[str, Any]] = []
    left, off = list(ranked), 1.0
    while left and len(rows) < FINALISTS:
        trial = near_target(left, predicted, 1 / off)
        left.remove(trial)
        rows.append(judged(trial))
        off = statistics.median(row["ratio"] / predicted[row["trial"]] for row in rows)
    return rows


def near_target(ranked: list[Trial], ratios: dict[int, float], target: float) -> Trial:
    """Return the first one whose ratio is near `target`, or as near as there is one."""
    nearest = min(abs(ratios[trial.id] / target - 1) for trial in ranked)
    window = max(WINDOW, nearest)
    return next(trial for trial in ranked if abs(ratios[trial.id] / target - 1) <= window)


class Judge:
    """Measures and evaluates a campaign's networks anew.

    Attributes:
        meter: The host.
    """

    def __init__(
        self,
        run: Run,
        reference: Architecture,
        objective: Objective,
        target_ms: float,
        evaluator: AccelNasBenchConfig,
    ) -> None:
        self.meter = make_meter(load_device("host"))
        self._run = run
        self._reference = reference
        self._objective = objective
        self._target_ms = target_ms
        self._mean = AccelNasBenchEvaluator(replace(evaluator, noise=False))
        self._noisy = AccelNasBenchEvaluator(replace(evaluator, noise=True))

    def mean(self, network: Architecture) -> float:
        """Return the surrogate's accuracy without noise, a fraction."""
        return self._mean.evaluate(network, seed=0, time_limit_s=60).accuracy

    def in_turn(self, network: Architecture, rounds: int) -> Comparison:
        """Compare the projection and a network, inference by inference in turn.

        Neighbours on the host come and go within seconds: ratios of whole measurements scatter by
        some 3 % there, those of eight rounds of these by half a percent.
        """
        return compare(self.meter, self._reference, network, rounds)

    def row(self, trial: Trial) -> dict[str, Any]:
        """Return everything about one network."""
        network = find_architecture(trial.architecture)
        # The noise depends on the seed alone: each finalist of each campaign needs its own.
        entropy = (*self._run.group[0].encode(), self._run.trials, self._run.seed, trial.id)
        seeds = np.random.SeedSequence(entropy).generate_state(NEW_SEEDS)
        accuracy = statistics.fmean(
            self._noisy.evaluate(network, seed=int(seed), time_limit_s=60).accuracy
            for seed in seeds
        )
        taken = self.in_turn(network, ROUNDS)
        latency = {"latency_ms": taken.ratio * self._target_ms}
        reward, _ = self._objective.reward(accuracy, latency)
        print(
            f"{self._run}: judged trial {trial.id}: {taken.ratio:.3f} of the projection's latency,"
            f" accuracy {accuracy:.4f}",
            flush=True,
        )
        return {
            "trial": trial.id, "architecture": network.text, "searched_accuracy": trial.accuracy,
            "observed_accuracy": accuracy, "accuracy": self.mean(network),
            "searched_ms": trial.latency_ms, "latency_ms": statistics.median(taken.second_ms),
            "ratio": taken.ratio, "ratio_interval": [taken.ratio_low, taken.ratio_high],
            "reward": reward,
        }  # fmt: skip


def chosen(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the finalist to hand over; the target comes first, as who gives one wants it met."""
    landed = [row for row in rows if abs(row["ratio"] - 1) <= CHOSEN]
    if landed:
        return max(landed, key=lambda row: row["observed_accuracy"])
    return max(rows, key=lambda row: row["reward"])


def is_diverse(network: Architecture) -> bool:
    """Whether a network's blocks differ in kernel size, and in expansion or in SE."""
    blocks = network.blocks
    kernels, expansions, ratios = (
        {getattr(block, name) for block in blocks}
        for name in ("kernel_size", "expand_ratio", "se_ratio")
    )
    return len(kernels) > 1 and (len(expansions) > 1 or len(ratios) > 1)


def random_diversity(reference: Architecture) -> tuple[int, int]:
    """How many of RANDOM_NETWORKS are diverse: of all, of those with the reference's cost.

    The cost is multiply-adds within a tenth of the reference's, not a latency.
    """
    space, rng = load_space("accel_nasbench"), np.random.default_rng(0)
    macs = count(reference).macs
    everywhere = [space.decode(space.sample(rng)) for _ in range(RANDOM_NETWORKS)]
    at_target: list[Architecture] = []
    while len(at_target) < RANDOM_NETWORKS:
        network = space.decode(space.sample(rng))
        if abs(count(network).macs / macs - 1) <= 0.1:
            at_target.append(network)
    return sum(map(is_diverse, everywhere)), sum(map(is_diverse, at_target))


def show(results: list[dict[str, Any]], reference: Architecture) -> bool:
    """Print the tables; return whether every bar was met."""
    cost, first = count(reference), results[0]
    print(
        f"A1's projection: {first['target_ms']:.2f} ms, accuracy"
        f" {first['reference_accuracy']:.4f}, {cost.macs:,} multiply-adds, {cost.parameters:,}"
        f" parameters\n  {reference.text}"
    )
    print(
        f"{'controller':>12}{'trials':>8}{'failed':>8}{'seed':>6}"
        f"{'latency / target (95 %)':>28}{'accuracy':>10}{'points':>8}"
    )
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        found, (low, high) = result["found"], result["found"]["ratio_interval"]
        ratio = f"{found['ratio']:.3f} ({low:.3f}-{high:.3f})"
        print(
            f"{result['controller']:>12}{result['proposed']:>8,}{result['failed']:>8}"
            f"{result['seed']:>6}{ratio:>28}{found['accuracy']:>10.4f}{gain_points(result):>+8.2f}"
        )
        groups.setdefault((result["controller"], result["trials"]), []).append(result)
    met = all([show_group(name, trials, group) for (name, trials), group in groups.items()])
    everywhere, at_target = random_diversity(reference)
    print(
        f"diverse among {RANDOM_NETWORKS} random networks: {everywhere}; among as many with the"
        f" projection's multiply-adds within 10 %: {at_target}"
    )
    print("the networks found:")
    for result in results:
        run = f"{result['controller']}, {result['trials']:,} trials, seed {result['seed']}"
        print(f"  {run}: {result['found']['architecture']}")
        if result["proposed"] < result["trials"]:
            print(f"    after {result['proposed']:,} trials: {result['stop_reason']}")
    return met


def show_group(controller: str, trials: int, group: list[dict[str, Any]]) -> bool:
    """Print what campaigns that differ in their seed found; return whether no bar was missed."""
    # Without signs: one too fast and one too slow do not make one that lands.
    miss = statistics.median(abs(r["found"]["ratio"] - 1) for r in group)
    gain = statistics.median(map(gain_points, group))
    both = sum(
        abs(r["found"]["ratio"] - 1) <= LANDING and gain_points(r) >= GAIN_POINTS for r in group
    )
    diverse = sum(is_diverse(find_architecture(r["found"]["architecture"])) for r in group)
    holds = miss <= LANDING and gain >= GAIN_POINTS and diverse >= DIVERSE_SHARE * len(group)
    held = controller in ("ppo", "guided")
    print(
        f"{controller} at {trials:,}, median of {len(group)}: latency {miss:.2%} off the target"
        f" (bar {LANDING:.0%}), accuracy {gain:+.2f} points (bar {GAIN_POINTS:+.1f}); {both} meet"
        f" both, {diverse} diverse (bar {DIVERSE_SHARE:.0%})"
        + ("" if not held else ", met" if holds else ", MISSED")
    )
    return holds or not held


def gain_points(result: dict[str, Any]) -> float:
    """How much more accurate the found network is than the projection, in percent points."""
    gain: float = 100 * (result["found"]["accuracy"] - result["reference_accuracy"])
    return gain


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the finalists' and the found networks' accuracy over their latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")
    reference = 100 * results[0]["reference_accuracy"]
    axes.axvspan(
        1 - LANDING, 1 + LANDING, color="gray", alpha=0.15, linewidth=0,
        label=f"within {LANDING:.0%} of the target",
    )  # fmt: skip
    axes.axhline(
        reference + GAIN_POINTS, color="gray", linewidth=0.8, linestyle="--",
        label=f"{GAIN_POINTS:+.1f} points",
    )  # fmt: skip
    axes.plot(1.0, reference, "k*", markersize=13, label="A1's projection")
    names = list(dict.fromkeys((r["controller"], r["trials"]) for r in results))
    for k, (name, trials) in enumerate(names):
        colour, marker = COLOURS[k % len(COLOURS)], "osD^vPX"[k % 7]
        group = [r for r in results if (r["controller"], r["trials"]) == (name, trials)]
        rows = [row for r in group for row in r["finalists"]]
        axes.plot(
            [r["ratio"] for r in rows], [100 * r["accuracy"] for r in rows], ".",
            color=colour, alpha=0.35, markersize=4,
        )  # fmt: skip
        found = [r["found"] for r in group]
        ends = np.asarray([f["ratio_interval"] for f in found]).T
        ratios = np.asarray([f["ratio"] for f in found])
        axes.errorbar(
            ratios, [100 * f["accuracy"] for f in found], xerr=np.abs(ends - ratios),
            fmt=marker, color=colour, markeredgecolor="black", markersize=7, elinewidth=0.9,
            label=f"{name}, {trials:,} trials, {len(group)} seed{'s' * (len(group) > 1)}",
        )  # fmt: skip
    found_at = [100 * r["found"]["accuracy"] for r in results]
    axes.set_ylim(min(*found_at, reference) - 0.5, max(found_at) + 0.6)
    axes.set_xlabel("latency on this host / that of A1's projection, inferences in turn")
    axes.set_ylabel("ImageNet top-1 % (surrogate's mean)")
    axes.set_title(
        "MnasNet-A1's derivation on one machine; large: networks found, with 95 % intervals,"
        " small: finalists", fontsize=8,
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=7.5)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    """Return an argument that must be a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, but got {text!r}")
    return int(text)


def picture(text: str) -> Path:
    """Return an argument that must name a picture; its folder is made."""
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png or .svg, but got {text!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def parsed_runs(text: str) -> list[Run]:
    """Return the campaigns that NAME:TRIALS:SEEDS[:OBJECTIVE] stands for."""
    name, *rest = text.split(":")
    if not 2 <= len(rest) <= 3:
        raise argparse.ArgumentTypeError(
            f"must read NAME:TRIALS:SEEDS[:OBJECTIVE], but got {text!r}"
        )
    trials, seeds = map(positive, rest[:2])
    return [Run(name, trials, seed, *rest[2:]) for seed in range(seeds)]


def main() -> None:
    """Run what is missing, print, draw; exit with 1 where a bar was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--controllers", nargs="+", type=parsed_runs, metavar="NAME:TRIALS:SEEDS[:OBJECTIVE]",
        default=[parsed_runs(text) for text in DEFAULT_RUNS],
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/derivation"))
    parser.add_argument("--plot", type=picture, help="a .png or .svg file")
    parser.add_argument(
        "--only_finished", action="store_true", help="neither search nor measure anything"
    )
    arguments = parser.parse_args()
    target = load_yaml(find_config(CONFIG, "search"))["objective"]["target"]
    reference = find_architecture(target["reference"])
    runs = list(itertools.chain.from_iterable(arguments.controllers))
    results = []
    try:
        # A wrong name, or no data, is refused before anything is measured, not hours later.
        configs = [load_campaign_config(CONFIG, run.settings(arguments.runs)) for run in runs]
        if not arguments.only_finished:
            AccelNasBenchEvaluator(configs[0].evaluator)
        for run in runs:
            result = known_result(run, arguments.runs)
            if result is None and not arguments.only_finished:
                search(run, arguments.runs, measured_target(arguments.runs, reference))
                result = finish(run, arguments.runs, reference)
            if result is not None:
                results.append(result)
        if not results:
            raise ConfigError(f"{arguments.runs}: no campaign is finished there.")
    except MnasError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    met = show(results, reference)
    if arguments.plot is not None:
        draw(results, arguments.plot)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
