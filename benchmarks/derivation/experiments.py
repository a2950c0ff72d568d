"""The paper's experiments on real ImageNet accuracies: what the reward's form and the space do.

    export MNAS_ACCEL_NASBENCH=FOLDER     # docs/accel-nasbench.md says where to get the data
    python benchmarks/derivation/experiments.py
    python benchmarks/derivation/experiments.py --only rewards budgets --seeds 5 --plots docs

    rewards    PPO under soft, hard and absolute rewards, and for accuracy alone: where the
               latencies of its samples lie (the paper's histograms) and what it finds
    diversity  guided search where all blocks must have the same operation and kernel (the paper's
               table 6), beside the whole space
    budgets    what each controller has found after 250, 1,000 and 8,000 trials, or when it
               settled: proposed networks again and again that it had proposed before
    best       whether the best networks near the target have different layers, and random ones

Accuracy and latency are a surrogate's of Accel-NASBench (backend `fitted`, device a100), with
noise; the figures in the tables are its means, which no search saw. Campaigns are kept in the
folder of --runs: a finished one is not repeated, a stopped one goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from laptop import COLOURS, is_diverse, positive
from numpy.typing import NDArray

from search.accel_nasbench import AccelNasBenchConfig, AccelNasBenchEvaluator
from search.campaign import open_to_read
from search.config import load_campaign_config
from search.engine import resume, start
from search.finalists import candidates
from search.trial import Trial
from space.architecture import Architecture
from space.errors import MnasError
from space.mnasnet import find_architecture
from space.records import dump_yaml, find_config, load_yaml
from space.search_space import load_space

#: What the reward is -> settings of the objective.
REWARDS: dict[str, tuple[str, ...]] = {
    "accuracy alone": ("objective.alpha=0.0", "objective.beta=0.0"),
    "soft, -0.03": ("objective.alpha=-0.03", "objective.beta=-0.03"),
    "soft, -0.07": (),
    "soft, -0.15": ("objective.alpha=-0.15", "objective.beta=-0.15"),
    "soft, -0.03 below, -0.15 above": ("objective.alpha=-0.03", "objective.beta=-0.15"),
    "hard, -1": ("objective.name=hard",),
    "hard, -0.2": ("objective.name=hard", "objective.beta=-0.2"),
    "absolute, -0.07": ("objective.name=absolute",),
    "absolute, -0.5": ("objective.name=absolute", "objective.beta=-0.5"),
}
#: What every block's operation and kernel may be -> the choices that are left of the space's.
VARIANTS: dict[str, dict[str, list[Any]]] = {
    "all": {},
    "MBConv4 3x3 only": {"op": ["mbconv4"], "kernel_size": [3]},
    "MBConv4 5x5 only": {"op": ["mbconv4"], "kernel_size": [5]},
    "MBConv6 3x3 only": {"op": ["mbconv6"], "kernel_size": [3]},
    "MBConv6 5x5 only": {"op": ["mbconv6"], "kernel_size": [5]},
}
SPACE = "accel_nasbench"
BUDGETS = (250, 1000, 8000)
#: Of these, guided models its last 1,200 trials (`max_trials`) only.
CONTROLLERS = ("random", "evolution", "ppo", "guided")
#: Trials after which the plot of the budgets looks at what has been found.
PLOTTED = (50, 100, 250, 500, 1000, 2000, 4000, 8000)
#: How many of the best networks, and of random ones, are looked at.
BEST, RANDOM_NETWORKS = 100, 1000


class Truth:
    """The surrogate's means: accuracy, and latency as a multiple of a target."""

    def __init__(self) -> None:
        self._evaluator = AccelNasBenchEvaluator(AccelNasBenchConfig(name="accel_nasbench"))

    def __call__(self, network: Architecture, target_ms: float) -> tuple[float, float]:
        """Return (accuracy, LAT / T)."""
        found = self._evaluator.evaluate(network, seed=0, time_limit_s=60.0)
        return found.accuracy, found.metrics["latency_ms"] / target_ms


def campaign(folder: Path, settings: list[str]) -> tuple[list[Trial], Trial, float]:
    """Run a campaign, or finish it; return its trials, the one to hand over, and its target."""
    if (folder / "campaign.db").exists():
        resume(folder)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        start(load_campaign_config("accel_nasbench", settings), folder)
    store = open_to_read(folder)
    trials, chosen, target_ms = store.trials(), candidates(store, 1)[0], store.meta("target_ms")
    store.close()
    return trials, chosen, target_ms


def rewards(arguments: argparse.Namespace, truth: Truth) -> None:
    """PPO's samples and finds under every reward."""
    print(
        f"{'reward':>30}{'found: accuracy':>17}{'LAT / T':>9}   samples of the last half:"
        f" {'<= T':>6}{'0.9 to 1.1':>12}{'median':>8}"
    )
    samples: dict[str, NDArray[np.float64]] = {}
    for label, settings in REWARDS.items():
        found, late = [], []
        for seed in range(arguments.seeds):
            trials, chosen, target_ms = campaign(
                arguments.runs / f"rewards-{_stem(label)}-{arguments.trials}-{seed}",
                [f"seed={seed}", f"stop.trials={arguments.trials}", *settings],
            )
            found.append(truth(find_architecture(chosen.architecture), target_ms))
            late += [
                trial.metrics["latency_ms"] / target_ms
                for trial in trials[len(trials) // 2 :]
                if trial.metrics is not None
            ]
        ratios = np.asarray(late)
        samples[label] = ratios
        near = float(np.mean(np.abs(ratios - 1) <= 0.1))
        print(
            f"{label:>30}{statistics.median(a for a, _ in found):>17.4f}"
            f"{statistics.median(r for _, r in found):>9.2f}{' ':>28}{np.mean(ratios <= 1):>6.0%}"
            f"{near:>12.0%}{np.median(ratios):>8.2f}",
            flush=True,
        )
    if arguments.plots is not None:
        draw_samples(samples, arguments)


def diversity(arguments: argparse.Namespace, truth: Truth) -> None:
    """What guided search finds where blocks must not differ in operation and kernel."""
    print(f"{'blocks':>18}{'accuracy':>10}{'LAT / T':>9}{'reward':>9}   medians of the seeds")
    shipped = load_yaml(find_config(SPACE, "space"))
    for label, choices in VARIANTS.items():
        settings = []
        if choices:
            name = f"{SPACE}_{_stem(label)}"
            file = arguments.runs / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            space = {**shipped, "name": name, "choices": {**shipped["choices"], **choices}}
            file.write_text(dump_yaml(space), encoding="utf-8")
            settings = [f"space.name={file}"]
        found = []
        for seed in range(arguments.seeds):
            _, chosen, target_ms = campaign(
                arguments.runs / f"diversity-{_stem(label)}-{seed}",
                [f"seed={seed}", "stop.trials=250", "controller.name=guided", *settings],
            )
            accuracy, ratio = truth(find_architecture(chosen.architecture), target_ms)
            found.append((accuracy, ratio, accuracy * ratio**-0.07))
        middle = [statistics.median(column) for column in zip(*found, strict=True)]
        print(f"{label:>18}{middle[0]:>10.4f}{middle[1]:>9.2f}{middle[2]:>9.4f}", flush=True)


def budgets(arguments: argparse.Namespace, truth: Truth) -> None:
    """What controllers find for the `absolute` reward; medians of the seeds' noise-free means."""
    print(f"{'controller':>12}{'trials':>8}{'done':>8}{'reward':>9} [{'lowest':>7},", end="")
    print(f"{'highest':>8}]{'accuracy':>10}{'LAT / T':>9}")
    rewards_at: dict[tuple[str, int], list[float]] = {}
    for controller in CONTROLLERS:
        looked_at = BUDGETS if controller == "guided" else sorted({*BUDGETS, *PLOTTED})
        for trials in looked_at:
            found = []
            for seed in range(arguments.seeds):
                done, chosen, target_ms = found_after(arguments.runs, controller, trials, seed)
                accuracy, ratio = truth(find_architecture(chosen.architecture), target_ms)
                found.append((accuracy - 0.07 * abs(ratio - 1), accuracy, ratio, done))
            rewards_at[controller, trials] = [row[0] for row in found]
            reward, accuracy, ratio, done = map(statistics.median, zip(*found, strict=True))
            if trials in BUDGETS:
                print(
                    f"{controller:>12}{trials:>8,}{done:>8,}{reward:>9.4f} [{min(found)[0]:>7.4f},"
                    f"{max(found)[0]:>8.4f}]{accuracy:>10.4f}{ratio:>9.2f}",
                    flush=True,
                )
    if arguments.plots is not None:
        draw_budgets(rewards_at, arguments)


def found_after(runs: Path, controller: str, trials: int, seed: int) -> tuple[int, Trial, float]:
    """Return trials done, what a campaign of so many would hand over, and its target.

    Guided's models choose at the end of a campaign, so each budget is one. The others hand over
    the highest reward seen: the first trials of a long campaign are a short one.
    """
    length = trials if controller == "guided" else max(BUDGETS)
    done, chosen, target_ms = campaign(
        runs / f"budgets-{controller}-{length}-{seed}",
        [
            f"seed={seed}", f"stop.trials={length}", f"controller.name={controller}",
            "objective.name=absolute",
        ],
    )  # fmt: skip
    if trials < len(done):
        done = done[:trials]
        seen = [trial for trial in done if trial.reward is not None]
        chosen = max(seen, key=lambda trial: trial.reward or 0.0)
    return len(done), chosen, target_ms


def best(arguments: argparse.Namespace, truth: Truth) -> None:
    """How many networks differ in kernel size, and in expansion or SE, from block to block."""
    found: dict[str, float] = {}
    for controller in ("evolution", "local"):
        for seed in range(arguments.seeds):
            done, _, target_ms = campaign(
                arguments.runs / f"best-{controller}-{seed}",
                [
                    f"seed={seed}", "stop.trials=8000", f"controller.name={controller}",
                    "objective.name=absolute", "evaluator.noise=false",
                ],
            )  # fmt: skip
            found.update({t.architecture: t.reward for t in done if t.reward is not None})
    order = sorted(found, key=lambda text: -found[text])
    networks = [find_architecture(text) for text in order[:BEST]]
    accuracy, ratio = truth(networks[0], target_ms)
    print(f"  the best of {len(found):,} without noise: {accuracy:.4f} at {ratio:.3f} T")
    print(f"    {order[0]}")
    print(f"    {'differs' if is_diverse(networks[0]) else 'does NOT differ'} from block to block")
    print(f"  of the best {BEST}: {sum(map(is_diverse, networks))}")
    space, rng = load_space(SPACE), np.random.default_rng(0)
    everywhere = [space.decode(space.sample(rng)) for _ in range(RANDOM_NETWORKS)]
    print(f"  of {RANDOM_NETWORKS:,} random networks: {sum(map(is_diverse, everywhere))}")
    near: list[Architecture] = []
    while len(near) < RANDOM_NETWORKS:
        network = space.decode(space.sample(rng))
        if abs(truth(network, target_ms)[1] - 1) <= 0.02:
            near.append(network)
    print(f"  of as many within 2 % of the target: {sum(map(is_diverse, near))}")


def draw_samples(samples: dict[str, NDArray[np.float64]], arguments: argparse.Namespace) -> None:
    """Draw how the sampled latencies lie under every reward, as the paper's histograms do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(samples), 1, figsize=(7.0, 0.95 * len(samples) + 0.8), sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    edges = np.linspace(0.2, 2.4, 89)
    for panel, (label, ratios) in zip(axes, samples.items(), strict=True):
        percent = np.full(len(ratios), 100 / len(ratios))
        panel.hist(ratios.clip(edges[0], edges[-1]), bins=edges, weights=percent, color="#0072B2")
        panel.axvline(1.0, color="#D55E00", linewidth=1)
        panel.set_title(label, loc="right", fontsize=8, pad=2)
    axes[0].text(1.02, 0.8 * axes[0].get_ylim()[1], "target", color="#D55E00", fontsize=8)
    figure.supylabel("% of the samples", fontsize=9)
    axes[-1].set_xlabel("latency / target of the last half's samples; the last bar: 2.4 and more")
    figure.suptitle(
        f"PPO, {arguments.trials:,} trials, {arguments.seeds} seeds: sampled networks by reward",
        fontsize=10,
    )
    figure.savefig(arguments.plots / "derivation-rewards.png", dpi=150)


def draw_budgets(
    rewards_at: dict[tuple[str, int], list[float]], arguments: argparse.Namespace
) -> None:
    """Draw what each controller would hand over after so many trials."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
    for controller, colour, marker in zip(CONTROLLERS, COLOURS, "osD^", strict=False):
        trials = sorted(number for name, number in rewards_at if name == controller)
        found = np.asarray([rewards_at[controller, number] for number in trials])
        middle = np.median(found, axis=1)
        axes.errorbar(
            trials, middle, yerr=(middle - found.min(1), found.max(1) - middle), fmt=marker,
            linestyle=":" if controller == "guided" else "-", color=colour, capsize=2,
            linewidth=1.2, elinewidth=0.7, markersize=4, label=controller,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(PLOTTED, [f"{number:,}" for number in PLOTTED])
    axes.minorticks_off()
    axes.set_xlabel("trials")
    axes.set_ylabel("noise-free reward of what is handed over")
    axes.set_title(
        f"Accel-NASBench, absolute reward: median and range of {arguments.seeds} seeds", fontsize=9
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(arguments.plots / "derivation-budgets.png", dpi=150)


def _stem(label: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in label.lower())


EXPERIMENTS: dict[str, Callable[[argparse.Namespace, Truth], None]] = {
    "rewards": rewards,
    "diversity": diversity,
    "budgets": budgets,
    "best": best,
}


def main() -> None:
    """Run the experiments and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--trials", type=positive, default=2000, help="of rewards")
    parser.add_argument("--runs", type=Path, default=Path("runs/derivation-experiments"))
    parser.add_argument("--plots", type=Path, help="a folder, for those of rewards and of budgets")
    arguments = parser.parse_args()
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
    try:
        truth = Truth()
        for name in arguments.only:
            print(f"{name}: {EXPERIMENTS[name].__doc__}")
            EXPERIMENTS[name](arguments, truth)
    except MnasError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
