"""One training step on a CPU: this project's child training against PyTorch's, same network.

    pip install torch                     # or `make parity`: not a dependency of the project
    python benchmarks/child_step.py [--threads 2] [--rounds 9] [--json FILE]

Every contestant is a process of its own that waits for its turn: rounds of a few steps are
interleaved, so that a busy machine hits all of them alike, and a round's ratio is of two times
taken seconds apart. Printed are medians over rounds and the quartiles of the ratios.

    mnas       the training step of retrain/train.py, with space/depthwise.py
    plain      the same with MindSpore's own depthwise convolution
    floor      `mnas` with the depthwise convolutions taken out
    torch      the same network, optimizer and loss in PyTorch, eager, as its users write it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from space.architecture import Architecture, Layer, parse_architecture
from space.mnasnet import adapt, find_architecture
from space.search_space import load_space

CONTESTANTS = ("mnas", "plain", "floor", "torch")

#: Name -> (network, batch size, ratio to PyTorch that it should stay below).
CASES: dict[str, tuple[str, int, float]] = {
    "mnasnet-a1, 32 px, batch 64": ("a1_32", 64, 1.8),
    "small-image skeleton, 28 px, batch 128": ("small_28", 128, 1.5),
    "a1's blocks on that skeleton, 28 px, batch 128": ("small_a1_28", 128, 1.5),
    "mnasnet-a1, 224 px, batch 16": ("a1_224", 16, 2.0),
}

#: A round is as many steps as take about so long.
ROUND_S = 1.5
WORKER_TIMEOUT_S = 900


#: The skeleton of configs/space/small_image.yaml: blocks of mbconv6 k3, as wide and deep as given.
SMALL_28 = """
    stem8_s11
    | r1_k3_s11_e6_i8_o16
    | r2_k3_s22_e6_i16_o24
    | r2_k3_s22_e6_i24_o40
    | r2_k3_s11_e6_i40_o64
    | r1_k3_s22_e6_i64_o96
    | head192 | r28 | c10"""

#: The same with the operations, kernels and squeeze-and-excitations of MnasNet-A1's blocks.
SMALL_A1_28 = """
    stem8_s11
    | r1_k3_s11_e1_i8_o16
    | r2_k3_s22_e6_i16_o24
    | r2_k5_s22_e3_i24_o40_se0.25
    | r2_k3_s11_e6_i40_o64
    | r1_k5_s22_e6_i64_o96_se0.25
    | head192 | r28 | c10"""


def network_of(name: str) -> Architecture:
    """The network of a case."""
    if name.startswith("small"):
        network = parse_architecture(SMALL_A1_28 if name == "small_a1_28" else SMALL_28)
        assert network in load_space("small_image")
        return network
    return adapt(find_architecture("mnasnet-a1"), resolution=int(name.split("_")[1]), classes=10)


# ---------------------------------------------------------------------------- contestants


def mindspore_step(
    architecture: Architecture, batch: int, threads: int, contestant: str
) -> Callable[[], float]:
    """A function that does one step and returns its loss."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms
    from mindspore import nn

    from retrain.config import OptimizerConfig
    from retrain.optimizer import make_optimizer, set_learning_rate
    from retrain.train import _Loss, prepare_process
    from space.network import build_network

    prepare_process(threads)

    class Subsample(nn.Cell):  # type: ignore[misc]
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.stride = stride

        def construct(self, x: Any) -> Any:
            return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]

    depthwise = "numba" if contestant == "mnas" else "native"
    network = build_network(architecture, seed=0, depthwise=depthwise)  # type: ignore[arg-type]
    if contestant == "floor":
        for layer in architecture.layers():
            if layer.op != "conv":
                block = network.blocks[layer.block_index][layer.layer_index]
                block.depthwise.conv = Subsample(layer.stride)
    network.set_train(True)
    parameters = list(network.trainable_params())
    optimizer = make_optimizer(OptimizerConfig(name="rmsprop"), parameters)
    gradient = ms.value_and_grad(_Loss(network, 0.1), None, parameters)
    images, labels = (ms.Tensor(values) for values in batch_of(architecture, batch))
    mask = ms.Tensor(np.ones((1, 1), np.float32))

    def step() -> float:
        set_learning_rate(optimizer, 1e-3)
        loss, gradients = gradient(images, labels, mask)
        optimizer(gradients)
        return float(loss.asnumpy())

    return step


def torch_step(architecture: Architecture, batch: int, threads: int) -> Callable[[], float]:
    """A function that does one step and returns its loss."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def conv_norm(
        inputs: int, outputs: int, kernel: int, stride: int, group: int = 1, relu: bool = True
    ) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group, bias=False)
        return [conv, nn.BatchNorm2d(outputs)] + [nn.ReLU(inplace=True)] * relu

    class SqueezeExcite(nn.Module):  # type: ignore[misc]
        def __init__(self, channels: int, reduced: int) -> None:
            super().__init__()
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(channels, reduced, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(reduced, channels, 1),
                nn.Sigmoid(),
            )

        def forward(self, x: Any) -> Any:
            return x * self.gate(x)

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, layer: Layer) -> None:
            super().__init__()
            parts: list[Any] = []
            if layer.op == "mbconv":
                parts += conv_norm(layer.input_filters, layer.mid_filters, 1, 1)
            parts += conv_norm(
                layer.mid_filters,
                layer.mid_filters,
                layer.kernel_size,
                layer.stride,
                layer.mid_filters,
            )
            if layer.se_filters:
                parts.append(SqueezeExcite(layer.mid_filters, layer.se_filters))
            parts += conv_norm(layer.mid_filters, layer.output_filters, 1, 1, relu=False)
            self.parts = nn.Sequential(*parts)
            self.identity = layer.skip == "identity"

        def forward(self, x: Any) -> Any:
            y = self.parts(x)
            return y + x if self.identity else y

    layers = list(architecture.layers())
    unsupported = [x for x in layers if x.op == "conv" or x.skip == "pool"]
    assert not unsupported, "only depthwise layers and identities are written here"
    stem = conv_norm(
        architecture.input_channels, architecture.stem_filters, 3, architecture.stem_stride
    )
    network = nn.Sequential(
        *stem,
        *(Block(layer) for layer in layers),
        *conv_norm(layers[-1].output_filters, architecture.head_filters, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(architecture.head_filters, architecture.classes),
    )
    optimizer = torch.optim.RMSprop(
        network.parameters(), lr=1e-3, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    images, labels = (torch.from_numpy(values) for values in batch_of(architecture, batch))
    labels = labels.long()
    network.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def batch_of(architecture: Architecture, batch: int) -> tuple[Any, Any]:
    """Random images, float32 (batch, channels, size, size), and labels, int32 (batch,)."""
    rng = np.random.default_rng(0)
    size = architecture.resolution
    shape = (batch, architecture.input_channels, size, size)
    labels = rng.integers(0, architecture.classes, batch).astype(np.int32)
    return rng.standard_normal(shape).astype(np.float32), labels


def work(contestant: str, network: str, batch: int, threads: int) -> None:
    """Answer every number of steps on standard input with their seconds."""
    architecture = network_of(network)
    if contestant == "torch":
        step = torch_step(architecture, batch, threads)
    else:
        step = mindspore_step(architecture, batch, threads, contestant)
    for _ in range(4):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        seconds = time.perf_counter() - started
        # Constant images and growing steps may lead to anything but NaN, which would be cheaper.
        assert np.isfinite(loss), f"the loss became {loss}"
        print(seconds, flush=True)


# ---------------------------------------------------------------------------- the race


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: str, network: str, batch: int, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", contestant, network, str(batch)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
            ),
        }
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer(expected="ready")

    def steps(self, count: int) -> float:
        """Seconds per step of so many steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(self._answer()) / count

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, expected: str | None = None) -> str:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"a contestant ended with status {self._process.wait()}")
            text = line.strip()
            if expected is None or text == expected:
                return text


def race(network: str, batch: int, threads: int, rounds: int, who: list[str]) -> dict[str, Any]:
    """Run the contestants in turn; name -> seconds per step of every round."""
    workers = {name: Worker(name, network, batch, threads) for name in who}
    try:
        counts = {name: max(1, round(ROUND_S / w.steps(2))) for name, w in workers.items()}
        times: dict[str, list[float]] = {name: [] for name in who}
        for index in range(rounds):
            for name in who[index % len(who) :] + who[: index % len(who)]:
                times[name].append(workers[name].steps(counts[name]))
        return times
    finally:
        for worker in workers.values():
            worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step against PyTorch's.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--json", type=Path, help="write all times to a file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        contestant, network, batch = args.worker
        work(contestant, network, int(batch), args.threads)
        return
    report: dict[str, Any] = {}
    print(f"threads {args.threads}, {args.rounds} interleaved rounds, medians [quartiles]")
    for case, (network, batch, bar) in CASES.items():
        if args.only not in case:
            continue
        times = race(network, batch, args.threads, args.rounds, args.contestants)
        report[case] = times
        print(f"\n{case}: mnas should take at most {bar} x torch")
        for name, seconds in times.items():
            line = f"  {name:<8}{statistics.median(seconds) * 1000:9.1f} ms"
            if "torch" in times and name != "torch":
                ratios = [a / b for a, b in zip(seconds, times["torch"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                line += f"   {middle:5.2f} x torch [{low:.2f}, {high:.2f}]"
            print(line, flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
