"""How long from an Architecture to something that runs: a MindSpore cell, an ONNX graph.

    python benchmarks/child_construction.py [--arch mnasnet-a1] [--rounds 7] [--json FILE]

Each round is two fresh processes, one for the cell and one for the graph, since what a first call
costs is what a search pays: every child is built by a process that may be new. Imports do not
count. The graph's process must not load MindSpore. Where the time that passed exceeds that of CPU,
the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

#: What is built -> program that prints the seconds that passed and those of CPU. argv[1]: network.
PROGRAMS = {
    "cell": """
import sys, time
import mindspore, space.depthwise
from space.mnasnet import find_architecture
from space.network import build_network
architecture = find_architecture(sys.argv[1])
clock, cpu = time.perf_counter(), time.process_time()
build_network(architecture, seed=0)
print(time.perf_counter() - clock, time.process_time() - cpu)
""",
    "graph": """
import sys, time
from space.mnasnet import find_architecture
from space.onnx_graph import onnx_model
architecture = find_architecture(sys.argv[1])
clock, cpu = time.perf_counter(), time.process_time()
onnx_model(architecture).SerializeToString()
print(time.perf_counter() - clock, time.process_time() - cpu)
assert 'mindspore' not in sys.modules
""",
}

#: Seconds that MnasNet-A1 should stay below on a quiet machine.
TARGETS = {"cell": 0.5, "graph": 0.3}


def seconds(program: str, architecture: str) -> tuple[float, float]:
    """Run a program in a fresh process and return the two figures that it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", program, architecture],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    passed, cpu = done.stdout.splitlines()[-1].split()
    return float(passed), float(cpu)


def main() -> None:
    """Time, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="mnasnet-a1", help="a published name or a text form")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the samples into this file, too")
    arguments = parser.parse_args()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(arguments.rounds):
        for name, program in PROGRAMS.items():
            samples[name].append(seconds(program, arguments.arch))
    for name, pairs in samples.items():
        passed, cpu = zip(*pairs, strict=True)
        print(
            f"{name:<6} median {statistics.median(passed):.3f} s ({min(passed):.3f} to"
            f" {max(passed):.3f}), {statistics.median(cpu):.3f} s of CPU, {len(pairs)} processes;"
            f" A1 should take less than {TARGETS[name]} s"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
