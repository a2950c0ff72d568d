"""How many training images a second the input pipeline makes, and what memory it takes.

    python benchmarks/input_pipeline.py [--threads 2] [--rounds 3] [--json FILE]

Made images, so that nothing is downloaded: 10,000 arrays of 32 pixels, and 512 JPEG files of
500 x 375 pixels, about ImageNet's size. `mindspore` is the same recipe as the users of MindSpore
write it, ImageFolderDataset with its own random transforms. Printed are medians over rounds; the
cases take turns. `network` is what MnasNet-A1 consumes at 32 pixels, batch 64, on as many threads.
The memory is that of four processes that train on one CIFAR-sized data set.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")

import numpy as np
import psutil
from PIL import Image

from retrain.data import DataSet, Split, load_data, train_batches
from retrain.data_config import AugmentConfig, DataConfig

BATCH_SIZE = 64
PROCESSES = 4
TIMEOUT_S = 300
ZOO = AugmentConfig(
    scale=(0.08, 1.0), hflip=0.5, crop_pct=0.875, interpolation="bilinear",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip
HEAVY = AugmentConfig(
    scale=(0.08, 1.0), hflip=0.5, auto_augment="randaug-m9-mstd0.5", re_prob=0.25, mixup=0.2,
    cutmix=1.0, mean=ZOO.mean, std=ZOO.std,
)  # fmt: skip

Batches = Callable[[int], Iterator[Any]]


# ---------------------------------------------------------------------------- images


def write_folder(folder: Path) -> None:
    """Two classes of smooth JPEG files, 40 kB each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 256), ("val", 8)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pattern = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                image = pattern.resize((500, 375), Image.Resampling.BICUBIC)
                image.save(folder / part / name / f"{index}.jpg", quality=90)


def write_cifar(folder: Path) -> None:
    """CIFAR-10's binary files with noise."""
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        rows = rng.integers(0, 256, (10_000, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / name).write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class{number}" for number in range(10)))


def small_arrays() -> DataSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10_000, 3, 32, 32), dtype=np.uint8)
    split = Split(images, rng.integers(0, 10, 10_000).astype(np.int32))
    return DataSet(tuple("0123456789"), split, split, split)


# ---------------------------------------------------------------------------- throughput


def cases(folder: Path, records: Path, threads: int) -> dict[str, Batches]:
    """Name -> the batches of an epoch."""
    small = small_arrays()
    files, packed = (
        {
            name: load_data(DataConfig(source, path=str(path)), 224, 3, augment)
            for name, augment in (("zoo", ZOO), ("heavy", HEAVY))
        }
        for source, path in (("image_folder", folder), ("mindrecord", records))
    )
    ours = {
        "32 px arrays, shift and flip": (small, AugmentConfig(shift=4, flip=True)),
        "32 px arrays, crop, RandAugment, erasing, mixing": (small, HEAVY),
        "224 px JPEG, crop and flip": (files["zoo"], ZOO),
        "224 px JPEG, crop, RandAugment, erasing, mixing": (files["heavy"], HEAVY),
        "224 px MindRecord, crop and flip": (packed["zoo"], ZOO),
    }

    def batches(data: DataSet, augment: AugmentConfig, epoch: int) -> Iterator[Any]:
        return train_batches(
            data, augment, batch_size=BATCH_SIZE, seed=0, epoch=epoch, workers=threads
        )

    made: dict[str, Batches] = {
        name: functools.partial(batches, *arguments) for name, arguments in ours.items()
    }
    made["224 px JPEG, crop and flip, mindspore"] = functools.partial(
        mindspore_batches, folder / "train", threads
    )
    return made


def mindspore_batches(folder: Path, threads: int, epoch: int) -> Iterator[Any]:
    """The recipe as MindSpore's model zoo has it."""
    import mindspore.dataset as ds
    from mindspore.dataset import vision

    data = ds.ImageFolderDataset(str(folder), shuffle=True, num_parallel_workers=1)
    transforms = [
        vision.RandomCropDecodeResize(224, (0.08, 1.0), (0.75, 1.333), vision.Inter.BILINEAR),
        vision.RandomHorizontalFlip(0.5),
        vision.Normalize([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        vision.HWC2CHW(),
    ]
    data = data.map(transforms, "image", num_parallel_workers=threads)
    data = data.batch(BATCH_SIZE, drop_remainder=True, num_parallel_workers=1)
    return iter(data.create_tuple_iterator(num_epochs=1, output_numpy=True))


def speed(batches: Batches, epoch: int) -> tuple[float, float]:
    """Images a second and milliseconds of CPU an image, the start of the pipeline left out."""
    iterator = batches(epoch)
    next(iterator)
    started, cpu = time.perf_counter(), time.process_time()
    count = sum(len(images) for images, _ in iterator)
    return count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1000


def network_images_per_s(threads: int) -> float:
    """What MnasNet-A1 at 32 pixels consumes in training, batch 64."""
    from retrain.config import Recipe
    from retrain.train import train
    from space.mnasnet import adapt, find_architecture

    a1 = adapt(find_architecture("mnasnet-a1"), resolution=32, classes=10, input_channels=3)
    recipe = Recipe(DataConfig("digits"), epochs=1, batch_size=BATCH_SIZE)
    return train(a1, recipe, seed=0, threads=threads).images_per_s


# ---------------------------------------------------------------------------- memory


def hold(folder: str) -> None:
    """One of the processes: train through an epoch, say so, and keep the data until told."""
    logging.disable(logging.WARNING)
    data = load_data(DataConfig("cifar10", path=folder), 32, 3)
    augment = AugmentConfig(shift=4, flip=True)
    for _ in train_batches(data, augment, batch_size=256, seed=0, epoch=0, workers=1):
        pass
    print("ready", flush=True)
    sys.stdin.readline()


def memory_mb(folder: Path, cache: Path, processes: int) -> tuple[float, float]:
    """Resident and proportional set sizes in MB, each the sum over the processes.

    Proportional: a page that four processes map counts a quarter in each.
    """
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--hold", str(folder)],
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise RuntimeError(f"process {child.pid} ended early")
        sizes = [psutil.Process(child.pid).memory_full_info() for child in children]
        for child in children:
            child.communicate("\n", timeout=TIMEOUT_S)
    finally:
        for child in children:
            child.kill()
    return sum(s.rss for s in sizes) / 1e6, sum(s.pss for s in sizes) / 1e6


# ---------------------------------------------------------------------------- report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        hold(arguments.hold)
        return
    report: dict[str, Any] = {"threads": arguments.threads, "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        report["images_per_s"] = throughput(Path(temporary), arguments.threads, arguments.rounds)
        report["memory_mb"] = memory(Path(temporary))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


def throughput(folder: Path, threads: int, rounds: int) -> dict[str, float]:
    from retrain.data_sources import class_folders
    from retrain.mindrecord import to_mindrecord

    write_folder(folder / "images")
    train, val = class_folders(folder / "images")
    to_mindrecord({"train": train, "val": val}, folder / "records")
    made = cases(folder / "images", folder / "records", threads)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for number in range(rounds):
        for name, batches in made.items():
            found[name].append(speed(batches, number))
    network = network_images_per_s(threads)
    print(f"{threads} threads, median of {rounds} rounds; network: {network:.0f} images/s")
    rates = {}
    for name, values in found.items():
        rates[name], cpu = (statistics.median(column) for column in zip(*values, strict=True))
        ratio = f"{rates[name] / network:5.1f} x the network" if name.startswith("32") else ""
        print(f"  {name:<50} {rates[name]:7.0f} images/s {cpu:7.3f} ms of CPU an image {ratio}")
    return {**rates, "network": network}


def memory(folder: Path) -> dict[str, list[float]]:
    (folder / "cifar").mkdir()
    write_cifar(folder / "cifar")
    (folder / "no cache").write_text("A file where the folder should be: nothing is shared.")
    print("memory, MB: resident and proportional set size, summed over processes")
    found = {}
    for name, cache, processes in (
        ("one process", "cache", 1),
        (f"{PROCESSES} processes, shared", "cache", PROCESSES),
        (f"{PROCESSES} processes, each its own", "no cache", PROCESSES),
    ):
        found[name] = list(memory_mb(folder / "cifar", folder / cache, processes))
        print(f"  {name:<30} {found[name][0]:7.0f} {found[name][1]:7.0f}")
    return found


if __name__ == "__main__":
    main()
