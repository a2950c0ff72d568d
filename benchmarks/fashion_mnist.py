"""A campaign's network against the MobileNetV2 skeleton of the same latency, on Fashion-MNIST.

    mnas search fashion_mnist --out runs/fashion_mnist
    python benchmarks/fashion_mnist.py runs/fashion_mnist --plot docs/fashion-mnist-accuracy.png

The campaign names its best network. Its reference network, a MobileNetV2 for such images, is
scaled in width until it takes as long, both measured in turn at full precision: the width whose
latency is nearest to the found network's among those that are at most 2 % faster. Then both are
trained with one recipe for the same number of epochs, each with two seeds, and the test set is
used once for each training. A step of the skeleton takes longer: with `--more_epochs N` the found
network is also trained for so many, to compare the two after the same time.

Figures go to results.json in the folder `--out`. Kill the program and call it again: what is
finished is not repeated, a training goes on from its last epoch. The exit status is 1 where a bar
was missed: the found network's mean test accuracy, its being above the skeleton's, and the minutes
of the longest training.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latency.compare import FEWEST_ROUNDS, Comparison, compare
from latency.device import LatencyMeter, load_device, make_meter
from retrain.launch import die_with_parent
from search.campaign import open_to_read, read_config
from search.config import load_campaign_config
from search.finalists import candidates
from space.architecture import Architecture
from space.cost import count
from space.errors import ConfigError, MnasError
from space.files import versions, write_atomically
from space.mnasnet import find_architecture, scale_width
from space.records import to_plain

#: Bars: the found network's mean test accuracy; the longest training.
ACCURACY, MINUTES = 0.928, 25.0
#: How much faster than the found network the skeleton may be, since no width is exactly right.
FASTER = 0.02
#: Comparisons of a pair at full precision, whose interval is reported.
ROUNDS = 9
WIDTHS = tuple(round(0.25 + 0.01 * step, 2) for step in range(176))
COLOURS = {"skeleton": "C1", "found": "C0", "found_longer": "C2"}


@dataclass(frozen=True)
class Training:
    """One network trained with one seed; `epochs` replaces the recipe's."""

    name: str
    network: Architecture
    seed: int
    out: Path
    epochs: int | None = None

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.out / f"{self.name}-seed{self.seed}"


# ---------------------------------------------------------------------------- networks


def given(text: str) -> tuple[int | None, Architecture, Architecture]:
    """Return a network that an earlier campaign found, and the shipped one's reference network."""
    target = load_campaign_config("fashion_mnist").objective.target
    assert target is not None  # it is shipped so
    return None, find_architecture(text), find_architecture(target.reference)


def networks_of(campaign: Path) -> tuple[int, Architecture, Architecture]:
    """Return the trial, the network that a campaign found, and its reference network.

    Raises:
        ConfigError: No network has a reward yet, or the target is no reference network's.
    """
    config, store = read_config(campaign), open_to_read(campaign)
    winner, best = store.meta("winner"), candidates(store, 1)
    store.close()
    target = config.objective.target
    if target is None:
        raise ConfigError(f"{campaign}: its objective has no reference network to scale.")
    if winner is None and not best:
        raise ConfigError(f"{campaign}: no network has a reward yet.")
    trial = best[0].id if winner is None else winner["trial"]
    text = best[0].architecture if winner is None else winner["architecture"]
    return trial, find_architecture(text), find_architecture(target.reference)


def scaled(reference: Architecture) -> list[tuple[float, Architecture]]:
    """Return the different networks that width multipliers give, each with its first one."""
    networks: dict[str, tuple[float, Architecture]] = {}
    for width in WIDTHS:
        network = scale_width(reference, width)
        networks.setdefault(network.text, (width, network))
    return list(networks.values())


def as_slow(
    found: Architecture, reference: Architecture
) -> tuple[float, Architecture, Comparison]:
    """Return the width at which the reference network takes as long as `found`, and it, measured.

    Latency rises with the width but for steps of the runtime's kernels. So quick measurements
    bisect the widths, and full ones choose among the neighbours of the crossing.

    Raises:
        ConfigError: Every width near the crossing is too fast.
    """
    choices = scaled(reference)
    quick, full = make_meter(load_device("host_quick")), make_meter(load_device("host"))
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        ratio = _compared(quick, found, choices[middle], FEWEST_ROUNDS).ratio
        low, high = (low, middle) if ratio >= 1 - FASTER else (middle + 1, high)
    near = choices[max(0, low - 1) : low + 2]
    measured = [(*choice, _compared(full, found, choice, ROUNDS)) for choice in near]
    slow_enough = [one for one in measured if one[2].ratio >= 1 - FASTER]
    if not slow_enough:
        raise ConfigError(f"widths to {near[-1][0]} are faster than the network found.")
    return min(slow_enough, key=lambda one: abs(one[2].ratio - 1))


def _compared(
    meter: LatencyMeter, found: Architecture, choice: tuple[float, Architecture], rounds: int
) -> Comparison:
    pair = compare(meter, found, choice[1], rounds)
    print(
        f"width {choice[0]:.2f}: {pair.ratio:.3f} times as long"
        f" [{pair.ratio_low:.3f}, {pair.ratio_high:.3f}]",
        flush=True,
    )
    return pair


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return both networks with their latencies, from the folder or measured now."""
    out: Path = arguments.out
    file = out / "latency.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if known["campaign"] != arguments.campaign:
            raise ConfigError(
                f"{out}: holds the figures of {known['campaign']}, not of {arguments.campaign};"
                " choose another folder with --out."
            )
        return known
    if "|" in arguments.campaign:
        trial, found, reference = given(arguments.campaign)
    else:
        trial, found, reference = networks_of(Path(arguments.campaign))
    width, skeleton, pair = as_slow(found, reference)
    result = {
        "campaign": arguments.campaign, "trial": trial, "found": found.text,
        "skeleton": skeleton.text, "width": width, "comparison": to_plain(pair),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1).encode())
    return result


# ---------------------------------------------------------------------------- trainings


def run(*arguments: str) -> str:
    """Run a command of the retrain room and return what it printed.

    Raises:
        ConfigError: It failed; the last line that it printed says why.
    """
    command = [sys.executable, "-m", "retrain", *arguments]
    # Whatever ends this program ends the training, or a second call would find it running.
    done = subprocess.run(
        command,
        text=True,
        capture_output=True,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        raise ConfigError(f"retrain {arguments[0]}: {lines[-1]}")
    return done.stdout


def trained(training: Training, config: str, threads: int, overrides: list[str]) -> dict[str, Any]:
    """Train, or go on, or take what is finished; return the figures with the test accuracy."""
    folder = training.folder
    if training.epochs is not None:
        overrides = [*overrides, f"epochs={training.epochs}"]
    run(
        "train", "--config", config, "--arch", training.network.text, "--out", str(folder),
        "--seed", str(training.seed), "--threads", str(threads), "--resume", *overrides,
    )  # fmt: skip
    report = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    file = folder / "test.json"
    if not file.exists():
        # Kept, so that the test set is used once.
        printed = run(
            "validate", "--ckpt_path", str(folder / report["weights"]), "--split", "test",
            "--threads", str(threads), "--json",
        )  # fmt: skip
        line = next(x for x in reversed(printed.splitlines()) if x.startswith("{"))
        write_atomically(file, line.encode())
    test = json.loads(file.read_text(encoding="utf-8"))
    keys = ("validation_accuracy", "accuracies", "epochs", "seconds", "images_per_s", "threads",
            "resumed_at_epoch", "train_images")  # fmt: skip
    # `seconds` are the last process's: of a training that went on, they are not all.
    images = report["epochs"] * report["train_images"]
    steps_s = images / report["images_per_s"] if report["images_per_s"] else 0.0
    minutes = max(report["seconds"], steps_s) / 60
    figures = {
        "network": training.name, "seed": training.seed, "test_accuracy": test["top1"],
        "test_images": test["images"], "minutes": minutes, **{key: report[key] for key in keys},
    }  # fmt: skip
    print(
        f"{training.name}, seed {training.seed}: test {test['top1']:.4f}, validation"
        f" {report['validation_accuracy']:.4f}, {minutes:.1f} min",
        flush=True,
    )
    return figures


def plan(latency: dict[str, Any], arguments: argparse.Namespace) -> list[Training]:
    """Return what is to be trained, in this order: what takes long first, side by side."""
    skeleton, found = (find_architecture(latency[name]) for name in ("skeleton", "found"))
    groups: list[tuple[str, Architecture, int | None]] = [
        ("skeleton", skeleton, None),
        ("found", found, None),
    ]
    if arguments.more_epochs is not None:
        groups.insert(1, ("found_longer", found, arguments.more_epochs))
    return [
        Training(name, network, seed, arguments.out, epochs)
        for name, network, epochs in groups
        for seed in arguments.seeds
    ]


# ---------------------------------------------------------------------------- results


def summary(latency: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return everything that results.json holds."""
    pair = latency["comparison"]
    networks, groups = {}, {}
    for name, times in (("skeleton", pair["second_ms"]), ("found", pair["first_ms"])):
        network = find_architecture(latency[name])
        cost = count(network)
        networks[name] = {
            "architecture": network.text, "parameters": cost.parameters, "macs": cost.macs,
            "latency_ms": statistics.median(times),
        }  # fmt: skip
    for name in dict.fromkeys(row["network"] for row in rows):
        group = [row for row in rows if row["network"] == name]
        accuracies = [row["test_accuracy"] for row in group]
        groups[name] = {
            "epochs": group[0]["epochs"], "test_accuracies": accuracies,
            "mean_test_accuracy": statistics.mean(accuracies),
            "minutes": [row["minutes"] for row in group],
        }  # fmt: skip
    return {
        "trial": latency["trial"], "width": latency["width"], "networks": networks,
        "latency_ratio": pair["ratio"],
        "latency_ratio_interval": [pair["ratio_low"], pair["ratio_high"]],
        "noisy_measurements": pair["noisy"], "rounds": len(pair["ratios"]),
        "groups": groups, "trainings": rows, "versions": versions(),
    }  # fmt: skip


def show(result: dict[str, Any]) -> bool:
    """Print the figures; return whether every bar was met."""
    print(f"{'network':>10}{'parameters':>12}{'multiply-adds':>15}{'ms':>8}")
    for name, network in result["networks"].items():
        print(
            f"{name:>10}{network['parameters']:>12,}{network['macs']:>15,}"
            f"{network['latency_ms']:>8.3f}  {network['architecture']}"
        )
    low, high = result["latency_ratio_interval"]
    print(
        f"the skeleton, at width {result['width']:.2f}, takes {result['latency_ratio']:.3f} times"
        f" as long [{low:.3f}, {high:.3f}], {result['noisy_measurements']} of"
        f" {2 * result['rounds']} measurements noisy"
    )
    groups = result["groups"]
    for name, group in groups.items():
        each = ", ".join(
            f"{accuracy:.4f} in {minutes:.1f} min"
            for accuracy, minutes in zip(group["test_accuracies"], group["minutes"], strict=True)
        )
        mean = group["mean_test_accuracy"]
        print(f"{name}, {group['epochs']} epochs: test accuracy {mean:.4f} ({each})")
    found, skeleton = (groups[name]["mean_test_accuracy"] for name in ("found", "skeleton"))
    best = max(group["mean_test_accuracy"] for name, group in groups.items() if name != "skeleton")
    longest = max(row["minutes"] for row in result["trainings"])
    bars = {
        f"test accuracy {best:.4f}, bar {ACCURACY}": best >= ACCURACY,
        f"{100 * (found - skeleton):+.2f} points over the skeleton": found > skeleton,
        f"longest training {longest:.1f} min, bar {MINUTES:.0f}": longest <= MINUTES,
    }
    for text, met in bars.items():
        print(f"{text}: {'met' if met else 'MISSED'}")
    return all(bars.values())


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw validation accuracy over time, and test accuracy over latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.4, 4.0), layout="constrained")
    labels = {
        "skeleton": f"MobileNetV2 skeleton x {result['width']:g}",
        "found": "found" if result["trial"] is None else f"found (trial {result['trial']})",
        "found_longer": "found, more epochs",
    }
    first_seed = min(row["seed"] for row in result["trainings"])
    for row in result["trainings"]:
        first = row["seed"] == first_seed
        epochs = range(1, row["epochs"] + 1)
        minutes = [row["minutes"] * epoch / row["epochs"] for epoch in epochs]
        left.plot(
            minutes, [100 * value for value in row["accuracies"]], "o-" if first else "s--",
            color=COLOURS[row["network"]], markersize=4,
            label=f"{labels[row['network']]}, seed {row['seed']}",
        )  # fmt: skip
    for name, group in result["groups"].items():
        network = result["networks"]["skeleton" if name == "skeleton" else "found"]
        accuracies = [100 * value for value in group["test_accuracies"]]
        times = [network["latency_ms"]] * len(accuracies)
        label = f"{labels[name]}: {group['epochs']} epochs"
        right.plot(times, accuracies, "o", color=COLOURS[name], alpha=0.8, label=label)
    right.axhline(100 * ACCURACY, color="gray", linewidth=0.8, linestyle=":")
    slowest = max(network["latency_ms"] for network in result["networks"].values())
    right.set_xlim(0, 1.4 * slowest)
    left.set_xlabel("minutes of training; a mark is an epoch")
    left.set_ylabel("validation accuracy %")
    right.set_xlabel("latency on this host, ms")
    right.set_ylabel("test accuracy %")
    right.set_title(f"after the last epoch; dotted: {100 * ACCURACY:g} %", fontsize=9)
    left.legend(frameon=False, fontsize=7, loc="lower right")
    right.legend(frameon=False, fontsize=8, loc="center left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and train what is missing, print, draw; exit with 1 where a bar was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "campaign", help="a campaign's folder, or a network that one has found, as text"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_mnist-benchmark"))
    parser.add_argument("--recipe", default="fashion_mnist", help="a shipped name or a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of a training")
    parser.add_argument(
        "--side_by_side", type=int, default=os.cpu_count(), help="trainings at a time"
    )
    parser.add_argument("--more_epochs", type=int, help="train the found network for so many, too")
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args()
    try:
        latency = measured(arguments)
        trainings = plan(latency, arguments)
        with ThreadPoolExecutor(arguments.side_by_side) as pool:
            rows = list(
                pool.map(
                    lambda training: trained(
                        training, arguments.recipe, arguments.threads, arguments.overrides
                    ),
                    trainings,
                )
            )
    except MnasError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    result = summary(latency, rows)
    write_atomically(arguments.out / "results.json", json.dumps(result, indent=1).encode())
    if arguments.plot is not None:
        draw(result, arguments.plot)
    sys.exit(0 if show(result) else 1)


if __name__ == "__main__":
    main()
