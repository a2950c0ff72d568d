"""What a controller itself costs: milliseconds of CPU per trial for propose and update.

    python benchmarks/controller_step.py
    python benchmarks/controller_step.py --controllers ppo guided --spaces mnasnet --trials 250

Every controller searches each space in batches of 16 with its default settings, for a made-up
reward that costs nothing and is not counted. The figures are of the last batches before a number
of trials, since what has been learned may cost time: their median and quartiles, and their mean,
which counts what is done in some batches only. BLAS has one thread. A busy machine's figures are
higher.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from controller.base import Controller
from controller.contract import synthetic_result
from controller.registry import CONTROLLERS, ControllerConfig, make_controller
from space.cost import count
from space.records import build, record
from space.search_space import SearchSpace, load_space
from space.tokens import Tokens

BATCH = 16
SPACES = ["accel_nasbench", "mnasnet"]


@record
class _Holder:
    controller: ControllerConfig


def new_controller(name: str, space: SearchSpace) -> Controller:
    """Return a controller with default settings and all that a campaign gives it."""

    def score(accuracy: Any, metrics: Mapping[str, Any]) -> Any:
        return accuracy * (metrics["latency_ms"] / 30) ** -0.07

    def metrics_of(tokens: Tokens) -> dict[str, float]:
        return {"macs": float(count(space.decode(tokens)).macs)}

    config = build(_Holder, {"controller": {"name": name}}, where=name).controller
    rng = np.random.default_rng(0)
    return make_controller(config, space.num_choices, rng, score=score, metrics_of=metrics_of)


def batch_ms(controller: Controller, num_choices: tuple[int, ...]) -> float:
    """Let it learn from one more batch; return its CPU milliseconds per trial."""
    start = time.process_time()
    proposals = controller.propose(BATCH)
    spent = time.process_time() - start
    results = [synthetic_result(proposal, num_choices) for proposal in proposals]
    start = time.process_time()
    controller.update(results)
    return 1000 * (spent + time.process_time() - start) / BATCH


def main() -> None:
    """Time, and print a line per space, controller and number of trials."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--controllers", nargs="+", default=list(CONTROLLERS), choices=CONTROLLERS)
    parser.add_argument("--spaces", nargs="+", default=SPACES)
    parser.add_argument("--trials", nargs="+", type=int, default=[250, 1000])
    parser.add_argument("--rounds", type=int, default=12, help="batches that are counted, >= 2")
    arguments = parser.parse_args()
    print(f"CPU ms per trial: median (quartiles), mean of {arguments.rounds} batches of {BATCH}")
    with threadpool_limits(1, user_api="blas"):
        for space in map(load_space, arguments.spaces):
            print(f"{space.name}, {len(space.num_choices)} decisions")
            for name in arguments.controllers:
                controller = new_controller(name, space)
                samples: list[float] = []
                for trials in sorted(arguments.trials):
                    while BATCH * len(samples) < trials:
                        samples.append(batch_ms(controller, space.num_choices))
                    last = samples[-arguments.rounds :]
                    low, median, high = statistics.quantiles(last, n=4)
                    figures = (
                        f"{median:8.2f} ({low:.2f} to {high:.2f}), {statistics.mean(last):.2f}"
                    )
                    print(f"  {name:<10} at {trials:>5} trials {figures}", flush=True)


if __name__ == "__main__":
    main()
