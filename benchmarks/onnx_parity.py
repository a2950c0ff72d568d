"""Is the ONNX graph the network? Random members of every shipped space, by two writers.

    python benchmarks/onnx_parity.py [--members 200] [--full 5] [--writers direct mindspore]
                                     [--spaces NAME...] [--seed 0] [--json FILE]

Writers: `direct` is space/onnx_graph.py; `mindspore` is the framework's own export, a second
opinion. Each member gets random weights and random positive batch-norm statistics; the two
paddings take turns. Its logits, scaled to 5 at most, are computed by MindSpore's own kernels,
eager, and by ONNX Runtime. Printed is the largest difference of a logit, and every member that
differs by more than 1e-4 or that a writer fails on. Members are drawn at 32 pixels, and `--full`
more at the space's own resolution.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# MindSpore's warnings about its own writer are not the result.
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.network import build_network
from space.onnx_graph import INPUT_NAME, OUTPUT_NAME, onnx_model
from space.parameters import initial_parameters
from space.search_space import load_space

SPACES = ("mnasnet", "mnasnet_derivation", "accel_nasbench", "small_image")
TOLERANCE = 1e-4

#: As the TensorFlow and the PyTorch world build the same network.
STYLES = (PAPER_STYLE, NetworkStyle("symmetric", 1e-5, 0.9))

Array = NDArray[np.float32]
Weights = dict[str, Array]


def random_weights(architecture: Architecture, seed: int) -> Weights:
    """Random weights, with batch norms as if trained: all statistics differ from 0 and 1.

    Kernels keep the size of activations from layer to layer (He et al., 2015, with fan-in). Those
    that a training starts with would let them grow to thousands where no training set the
    statistics: squeeze-and-excitation's sigmoids turn into steps, and float32 itself is wrong by
    1e-4, whoever computes.
    """
    rng = np.random.default_rng(seed)
    weights = dict(initial_parameters(architecture, seed))
    for name, value in weights.items():
        shape = value.shape
        if name.endswith(("gamma", "moving_variance")):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif value.ndim == 1:
            drawn = rng.normal(0, 0.3, shape)
        else:
            gain = 1.0 if ".project." in name else 2.0
            drawn = rng.normal(0, np.sqrt(gain / np.prod(shape[1:])), shape)
        weights[name] = drawn.astype(np.float32)
    # Logits of the size that a trained network has.
    x = images(architecture, 4, seed)
    largest = float(np.abs(onnx_logits(onnx_model(architecture, weights=weights), x)).max())
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = (weights[name] * (5.0 / largest)).astype(np.float32)
    return weights


def images(architecture: Architecture, batch: int, seed: int) -> Array:
    """Normal pixels (batch, channels, resolution, resolution)."""
    size = architecture.resolution
    shape = (batch, architecture.input_channels, size, size)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def mindspore_network(architecture: Architecture, style: NetworkStyle, weights: Weights) -> Any:
    """The network of MindSpore's own kernels, with these weights, for inference."""
    network = build_network(architecture, style, seed=0, depthwise="native")
    for parameter in network.get_parameters():
        parameter.set_data(ms.Tensor(weights[parameter.name]))
    network.set_train(False)
    return network


def mindspore_logits(
    architecture: Architecture, style: NetworkStyle, weights: Weights, x: Array
) -> Array:
    """Logits (n, classes) of MindSpore."""
    network = mindspore_network(architecture, style, weights)
    logits: Array = network(ms.Tensor(x)).asnumpy()
    return logits


def onnx_logits(model: onnx.ModelProto, x: Array) -> Array:
    """Logits (n, classes) of ONNX Runtime."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: Array = session.run([OUTPUT_NAME], {INPUT_NAME: x})[0]
    return logits


# ---------------------------------------------------------------------------- writers


def written_directly(
    architecture: Architecture, style: NetworkStyle, weights: Weights, x: Array
) -> onnx.ModelProto:
    """The graph that the engine times and exports."""
    return onnx_model(architecture, style, weights=weights)


def written_by_mindspore(
    architecture: Architecture, style: NetworkStyle, weights: Weights, x: Array
) -> onnx.ModelProto:
    """The graph that MindSpore writes: for this batch only, batch norms as nodes of their own.

    A cell can be exported once, so it is a fresh one.
    """
    network = mindspore_network(architecture, style, weights)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        ms.onnx.export(
            network,
            ms.Tensor(x),
            file_name=str(file),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
        )
        return onnx.load(file)


Writer = Callable[[Architecture, NetworkStyle, Weights, Array], onnx.ModelProto]
WRITERS: dict[str, Writer] = {"direct": written_directly, "mindspore": written_by_mindspore}


# ---------------------------------------------------------------------------- comparison


def members(space_name: str, count: int, resolution: int | None, seed: int) -> list[Architecture]:
    """Members drawn uniformly over a space's tokens, at a resolution (None: the space's own)."""
    space = load_space(space_name, resolution=resolution)
    # Spaces with the same decisions are to get different members.
    rng = np.random.default_rng([seed, SPACES.index(space_name)])
    return [space.decode(space.sample(rng)) for _ in range(count)]


def differences(
    architecture: Architecture, style: NetworkStyle, writers: list[str], seed: int
) -> dict[str, float | str]:
    """Writer -> largest difference of a logit on two images, or why there is none."""
    weights, x = random_weights(architecture, seed), images(architecture, 2, seed + 1)
    expected = mindspore_logits(architecture, style, weights, x)
    found: dict[str, float | str] = {}
    for name in writers:
        try:
            logits = onnx_logits(WRITERS[name](architecture, style, weights, x), x)
            found[name] = float(np.abs(logits - expected).max())
        # A writer or a runtime may raise anything; the reason is what is asked for.
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


def compared(
    space: str, count: int, resolution: int | None, writers: list[str], seed: int
) -> Iterator[dict[str, Any]]:
    """Compare members of a space; yield a row a writer."""
    drawn = members(space, count, resolution, seed)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "space": space, "pixels": drawn[0].resolution, "writer": name, "members": count,
            "max_abs_difference": 0.0, "failures": [],
        }
        for name in writers
    }  # fmt: skip
    for number, architecture in enumerate(drawn):
        style = STYLES[number % len(STYLES)]
        for name, found in differences(architecture, style, writers, number).items():
            row = rows[name]
            if isinstance(found, float):
                row["max_abs_difference"] = max(row["max_abs_difference"], found)
            # `not <=`, so that a difference that is no number fails, too.
            if isinstance(found, str) or not found <= TOLERANCE:
                row["failures"].append(f"{found} {style.padding} {architecture.text}")
    yield from rows.values()


def main() -> None:
    """Compare, print a table, list failures; exit status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=200, help="of each space, at 32 pixels")
    parser.add_argument("--full", type=int, default=5, help="more, at the space's resolution")
    parser.add_argument("--writers", nargs="+", choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows into this file, too")
    arguments = parser.parse_args()
    # Eager: compiling a graph for one batch of images takes longer than the batch.
    ms.set_context(mode=ms.PYNATIVE_MODE)
    print(
        f"{'space':<20}{'pixels':>7}{'members':>9}  {'writer':<10}{'max |diff|':>11}{'failed':>8}"
    )
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for space in arguments.spaces:
        for count, resolution in ((arguments.members, 32), (arguments.full, None)):
            if not count:
                continue
            for row in compared(space, count, resolution, arguments.writers, arguments.seed):
                rows.append(row)
                print(
                    f"{space:<20}{row['pixels']:>6}{count:>9}  {row['writer']:<11}"
                    f"{row['max_abs_difference']:>10.2g}{len(row['failures']):>8}",
                    flush=True,
                )
    print(f"{time.monotonic() - started:.0f} s, tolerance {TOLERANCE:g}")
    failures = [f"{row['writer']}: {failure}" for row in rows for failure in row["failures"]]
    print("\n".join(failures))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
