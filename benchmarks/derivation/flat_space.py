"""The factorized space beside a flat one of the same depth, where every layer has its own choices.

    export MNAS_ACCEL_NASBENCH=FOLDER     # docs/accel-nasbench.md says where to get the data
    python benchmarks/derivation/flat_space.py

Both have the 15 layers of A1's projection. Factorized: the layers of a block are alike, 12 choices
a block, 12^7 networks. Flat: 12 choices a layer, 12^15 networks, the factorized ones among them.

Nobody has trained networks of the flat space. So both are judged by an extension of the
benchmark's surrogate, which makes this a figure about searching and not about networks: the
accuracy is the mean of the six networks of the benchmark that the blocks' layers spell when they
are taken in turn. On the factorized space that is the surrogate itself; in the flat one no network
is more accurate than the best of the factorized. The cost is multiply-adds, which are exact in
both; the target is that of A1's projection, the reward `absolute`. The search sees the noise of
two trainings, the table does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from search.accel_nasbench import ACCURACY_NOISE, AccelNasBenchConfig, AccelNasBenchEvaluator
from search.campaign import open_to_read
from search.config import campaign_config
from search.engine import resume, start
from search.evaluation import Evaluation, Evaluator
from search.finalists import candidates
from space.architecture import Architecture
from space.cost import count
from space.errors import MnasError
from space.mnasnet import find_architecture
from space.records import dump_yaml, find_config, load_yaml
from space.search_space import load_space

#: Layers of each block of A1's projection.
DEPTHS = (1, 2, 3, 3, 2, 3, 1)
#: Controller -> trials.
CONTROLLERS = {"random": 2000, "evolution": 2000, "ppo": 2000, "guided": 250}
BETA = -0.07


class PerLayer(Evaluator):
    """Accuracy by the extension that the module describes; `latency_ms` is 10^6 multiply-adds."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._noise = ACCURACY_NOISE if options.get("noise") else 0.0
        self._members = AccelNasBenchEvaluator(AccelNasBenchConfig("accel_nasbench"))
        self._space = load_space("accel_nasbench")

    @property
    def epochs(self) -> float:
        """Those of the benchmark's trainings."""
        return self._members.epochs

    def metrics(self, architecture: Architecture) -> dict[str, float]:
        """Return the cost under the name that objectives know."""
        return {"latency_ms": count(architecture).macs / 1e6}

    def warm_up(self) -> None:
        """Fit the surrogate."""
        self._members.warm_up()

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        """Return the mean of the members that the layers spell, and the cost."""
        layers = [
            (
                (1, 4, 6).index(block.expand_ratio),
                (3, 5).index(block.kernel_size),
                block.se_ratio > 0,
            )
            for block in architecture.blocks
            for _ in range(block.layers)
        ]
        ends = np.cumsum(DEPTHS)
        blocks = [layers[end - depth : end] for end, depth in zip(ends, DEPTHS, strict=True)]
        accuracies = []
        for turn in range(6):  # the least common multiple of the depths
            tokens: list[int] = []
            for block in blocks:
                op, kernel, ratio = block[turn % len(block)]
                tokens += [op, kernel, int(ratio), len(block) - 1]
            member = self._space.decode(tokens)
            accuracies.append(
                self._members.evaluate(member, seed=0, time_limit_s=time_limit_s).accuracy
            )
        noise = self._noise * float(np.random.default_rng(seed).normal()) if self._noise else 0.0
        return Evaluation(
            statistics.fmean(accuracies) + noise, self.metrics(architecture), self.epochs
        )


def write_spaces(folder: Path) -> dict[str, Path]:
    """Write both spaces' files; return them by name."""
    shipped = load_yaml(find_config("accel_nasbench", "space"))
    alike, own = [], []
    for block, depth in zip(shipped["blocks"], DEPTHS, strict=True):
        alike.append({**block, "layers": [depth]})
        own += [
            {**block, "layers": [1], "stride": block["stride"] if k == 0 else 1}
            for k in range(depth)
        ]
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, blocks in (("factorized", alike), ("flat", own)):
        files[name] = folder / f"{name}.yaml"
        text = dump_yaml({**shipped, "name": name, "blocks": blocks})
        files[name].write_text(text, encoding="utf-8")
    return files


def found(
    folder: Path, space: Path, controller: str, seed: int, target: float, means: PerLayer
) -> tuple[float, float, float]:
    """Run a campaign or finish it; return what it hands over: reward, accuracy, cost / target."""
    if (folder / "campaign.db").exists():
        resume(folder)
    else:
        values = {
            "name": "flat_space", "seed": seed, "space": {"name": str(space)},
            "controller": {"name": controller},
            "evaluator": {"class": "flat_space:PerLayer", "options": {"noise": True}},
            "objective": {"name": "absolute", "target_ms": target, "beta": BETA},
            "executor": {"name": "serial"}, "stop": {"trials": CONTROLLERS[controller]},
        }  # fmt: skip
        start(campaign_config(values, where="flat_space.py", folder=Path(".")), folder)
    store = open_to_read(folder)
    (chosen,) = candidates(store, 1)
    store.close()
    network = find_architecture(chosen.architecture)
    accuracy = means.evaluate(network, seed=0, time_limit_s=60).accuracy
    ratio = count(network).macs / 1e6 / target
    return accuracy + BETA * abs(ratio - 1), accuracy, ratio


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, choices=range(1, 101), metavar="N", default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/derivation-flat"))
    arguments = parser.parse_args()
    reference = load_yaml(find_config("mnasnet_a1_laptop", "search"))["objective"]["target"]
    projection = find_architecture(reference["reference"])
    try:
        means = PerLayer({})
        target = count(projection).macs / 1e6
        files = write_spaces(arguments.runs)
        accuracy = means.evaluate(projection, seed=0, time_limit_s=60).accuracy
        print(
            f"A1's projection: accuracy {accuracy:.4f}, {target:.1f}e6 multiply-adds, the target"
        )
        for name, file in files.items():
            print(f"{name}: {load_space(str(file)).size:.1e} networks")
        print(
            f"{'controller':>12}{'trials':>8}{'space':>12}{'reward':>9} [{'lowest':>7},"
            f"{'highest':>8}]{'accuracy':>10}{'cost / T':>10}"
        )
        for controller, trials in CONTROLLERS.items():
            for name, file in files.items():
                rows = [
                    found(
                        arguments.runs / f"{controller}-{name}-{seed}", file, controller, seed,
                        target, means,
                    )
                    for seed in range(arguments.seeds)
                ]  # fmt: skip
                reward, accuracy, ratio = map(statistics.median, zip(*rows, strict=True))
                print(
                    f"{controller:>12}{trials:>8,}{name:>12}{reward:>9.4f} [{min(rows)[0]:>7.4f},"
                    f"{max(rows)[0]:>8.4f}]{accuracy:>10.4f}{ratio:>10.3f}",
                    flush=True,
                )
    except MnasError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
