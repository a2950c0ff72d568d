"""What the training loop costs on a CPU: beside a bare MindSpore loop, its input, and two workers.

    python benchmarks/training_loop.py [--threads 2] [--rounds 9] [--workers 2]

    loop     the steps of retrain/train.py with all that a recipe asks for: batches with shifts,
             learning rate, dropout, averaged weights
    bare     value_and_grad and optimizer of the same network on one batch that is there already

Rounds of a few steps are interleaved, so that a busy machine hits both alike. Then the images per
second that the input pipeline makes alone, and with --workers those of one process and of several
at the same global batch. Expected: loop at least 0.95 of bare, input at least 3 times the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np

from retrain.config import Recipe
from retrain.data import DataSet, load_data, train_batches
from retrain.optimizer import make_optimizer
from retrain.train import Trainer, _Loss, prepare_process
from space.architecture import Architecture
from space.mnasnet import adapt, published
from space.network import build_network
from space.records import build

RECIPE = {
    "data": {"name": "digits"},
    "epochs": 1000,
    "batch_size": 64,
    "schedule": {"learning_rate": 0.01},
    "dropout": 0.2,
    "ema_decay": 0.999,
    "augment": {"shift": 2},
}
#: A round is as many steps as take about so long.
ROUND_S = 2.0
WORKERS_TIMEOUT_S = 600


def bare_step(network: Architecture, recipe: Recipe, data: DataSet) -> Callable[[], ms.Tensor]:
    """A step as MindSpore's own documentation writes it, on a batch that is there already."""
    cell = build_network(network, recipe.style, seed=0).set_train(True)
    parameters = list(cell.trainable_params())
    optimizer = make_optimizer(recipe.optimizer, parameters)
    gradient = ms.value_and_grad(_Loss(cell, recipe.label_smoothing), None, parameters)
    images, labels = next(
        train_batches(data, recipe.augment, batch_size=recipe.batch_size, seed=0, epoch=0)
    )
    batch = (ms.Tensor(images), ms.Tensor(labels), ms.Tensor(np.ones((1, 1), np.float32)))

    def step() -> ms.Tensor:
        loss, gradients = gradient(*batch)
        optimizer(gradients)
        return loss

    return step


def seconds_of(step: Callable[[], ms.Tensor], steps: int) -> float:
    """How long some steps take, the last one's loss waited for."""
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    loss.asnumpy()
    return (time.perf_counter() - started) / steps


def input_speed(recipe: Recipe, data: DataSet, threads: int) -> float:
    """Images per second that the input pipeline makes when nobody uses them."""
    images, started = 0, time.perf_counter()
    for epoch in range(1000):
        for _, labels in train_batches(
            data, recipe.augment, batch_size=recipe.batch_size, seed=0, epoch=epoch,
            workers=threads,
        ):  # fmt: skip
            images += len(labels)
        if time.perf_counter() - started > ROUND_S:
            break
    return images / (time.perf_counter() - started)


def workers_speed(network: Architecture, workers: int, threads: int) -> float:
    """Images per second of a training by so many workers, with the same global batch for all."""
    recipe = {**RECIPE, "epochs": 2, "batch_size": 64 // workers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        command = [
            sys.executable, "-m", "retrain", "--config", str(path), "--arch", network.text,
            "--out", str(Path(folder) / "out"), "--threads", str(max(1, threads // workers)),
            "--json", *(["--workers", str(workers)] if workers > 1 else []),
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WORKERS_TIMEOUT_S, check=True
        )
    speed: float = json.loads(done.stdout.strip().splitlines()[-1])["images_per_s"]
    return speed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, help="compare with so many workers, too")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    recipe = build(Recipe, RECIPE, where="benchmark")
    network = adapt(published("mnasnet-a1"), resolution=32, classes=10, input_channels=1)
    data = load_data(recipe.data, 32, 1, recipe.augment)
    trainer = Trainer(network, recipe, data, seed=0, threads=arguments.threads)
    contestants = {"bare": bare_step(network, recipe, data), "loop": trainer.take_step}
    for step in contestants.values():
        seconds_of(step, 2)
    steps = max(1, round(ROUND_S / seconds_of(contestants["bare"], 2)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, step in contestants.items():
            times[name].append(seconds_of(step, steps))
    print(f"mnasnet-a1, 32 px, batch {recipe.batch_size}, {arguments.rounds} rounds of {steps}")
    for name, seconds in times.items():
        print(f"{name:<8}{recipe.batch_size / statistics.median(seconds):9.1f} images/s")
    ratios = [b / x for b, x in zip(times["bare"], times["loop"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"loop is {middle:.3f} of bare [{low:.3f}, {high:.3f}]; expected: at least 0.95")
    speed = input_speed(recipe, data, arguments.threads)
    times_faster = speed * statistics.median(times["loop"]) / recipe.batch_size
    print(f"input   {speed:9.1f} images/s, {times_faster:.1f} x the loop; expected: at least 3")
    if arguments.workers:
        for workers in (1, arguments.workers):
            speed = workers_speed(network, workers, arguments.threads)
            print(f"{workers} worker(s), global batch 64: {speed:.1f} images/s")


if __name__ == "__main__":
    main()
