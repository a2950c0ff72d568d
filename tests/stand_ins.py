"""Stand-ins for a phone and its tools: `python stand_ins.py adb shell ...`; nothing is computed.

They print what the real tools document: onnxruntime_perf_test its report and the lines that its
source writes into the result file (model, seconds, bytes, percent, run), TensorFlow Lite's
benchmark_model its log, MindSpore Lite's benchmark its line. The phone is a folder, $PHONE, and
$FAULT makes a tool fail.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PERF_TEST = """\
Session creation time cost: 0.0102016 s
First inference time cost: 2 ms
Total inference time cost: 0.185739 s
Total inference requests: {runs}
Average inference time cost: 1.85739 ms
Total inference run time: 0.18581 s
Number of inferences per second: 538.184
Avg CPU usage: 96 %
Peak working set size: 36696064 bytes
Avg CPU usage:96
Peak working set size:36696064
Runs:{runs}
Min Latency: 0.00183404 s
Max Latency: 0.00190312 s
P50 Latency: 0.00185674 s
P90 Latency: 0.00187215 s
P95 Latency: 0.00187393 s
P99 Latency: 0.00190312 s
P999 Latency: 0.00190312 s
"""

BENCHMARK_MODEL = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Min num runs: [{runs}]
INFO: Num threads: [{threads}]
INFO: Graph: [{graph}]
INFO: Loaded model {graph}
INFO: The input model file size (MB): 3.34914
INFO: Initialized session in 3.501ms.
INFO: Running benchmark for at least {warmup} iterations and at least 0 seconds but terminate if \
exceeding 150 seconds.
INFO: count={warmup} first=156677 curr=33205 min=32578 max=156677 avg=43268.1 std=34197

INFO: Running benchmark for at least {runs} iterations and at least 0 seconds but terminate if \
exceeding 150 seconds.
INFO: count={made} first=33228 curr=33130 min=32687 max=33239 avg={mean} std=129 p5=32700 \
median=33100 p95=33200

INFO: Inference timings in us: Init: 3501, First inference: 156677, Warmup (avg): 43268.1, \
Inference (avg): {mean}
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only \
APPROXIMATE to the actual memory footprint of the model at runtime. Take the information at your \
discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=54.2852 overall=73.4102
"""

MINDSPORE_LITE = """\
ModelPath = {model}
NumThreads = {threads}
Running warm up loops...
Running benchmark loops...
Model = {name}, NumThreads = {threads}, MinRunTime = 72.228996 ms, MaxRuntime = 73.094002 ms, \
AvgRunTime = {mean} ms
"""

PROPERTIES = {
    "ro.product.model": "Stand-in 1",
    "ro.build.fingerprint": "stand/in:14/UP1A/1:user/release-keys",
}


def phone(path: str) -> Path:
    """Where a path on the phone is here."""
    return Path(os.environ["PHONE"]) / path.lstrip("/")


def fault(name: str) -> bool:
    """Whether the test wants this fault."""
    return os.environ.get("FAULT") == name


def jitter(centre: float) -> str:
    """A time near `centre`, with 6 significant digits, as C++ streams print it."""
    return f"{centre * random.uniform(0.99, 1.01):.6g}"


def flags(words: Sequence[str]) -> dict[str, str]:
    """`--name=value` words."""
    return dict(word[2:].split("=", 1) for word in words if word.startswith("--"))


def perf_test(words: Sequence[str]) -> int:
    """`onnxruntime_perf_test [options...] model_path result_file`."""
    model, result = words[-2:]
    if fault("rejects"):
        print("Could not find an implementation for NoSuch(1) node with name ''", file=sys.stderr)
        return 255
    assert phone(model).read_bytes()
    assert words[words.index("-f") + 1] == "batch:1"
    runs = int(words[words.index("-r") + 1])
    with phone(result).open("a") as file:
        for run in range(runs):
            file.write(f"{model},{jitter(0.00185674)},36696064,96,{run}\n")
    print(PERF_TEST.format(runs=runs), end="")
    return 0


def benchmark_model(words: Sequence[str]) -> int:
    """TensorFlow Lite's."""
    given = flags(words)
    assert phone(given["graph"]).read_bytes()
    assert given["graph"].endswith(".tflite")
    runs, warmup = given["num_runs"], given["warmup_runs"]
    made = "7" if fault("fewer runs") else runs
    print(
        BENCHMARK_MODEL.format(
            runs=runs, made=made, warmup=warmup, threads=given["num_threads"],
            graph=given["graph"], mean=jitter(33071.8),
        ),
        end="",
    )  # fmt: skip
    return 0


def benchmark(words: Sequence[str]) -> int:
    """MindSpore Lite's."""
    given = flags(words)
    model = given["modelFile"]
    assert phone(model).read_bytes()
    assert model.endswith(".ms")
    print(
        MINDSPORE_LITE.format(
            model=model, name=Path(model).name, threads=given["numThreads"], mean=jitter(72.556)
        ),
        end="",
    )
    return 0


TOOLS = {"onnxruntime_perf_test": perf_test, "benchmark_model": benchmark_model}


def shell(words: Sequence[str]) -> int:
    """What the phone's shell would do with the line."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    name, rest = words[0].rpartition("/")[2], words[1:]
    if name == "getprop":
        print(PROPERTIES[rest[0]])
    elif name == "cat":
        print(phone(rest[0]).read_text(), end="")
    elif name == "rm":
        pattern = phone(rest[-1])
        for path in pattern.parent.glob(pattern.name):
            path.unlink()
    else:
        return {**TOOLS, "benchmark": benchmark}[name](rest)
    return 0


def adb(words: Sequence[str]) -> int:
    """Android's debugging bridge."""
    if fault("offline"):
        print("adb: error: device offline", file=sys.stderr)
        return 1
    if words[0] == "push":
        shutil.copyfile(words[1], phone(words[2]))
        print(f"{words[1]}: 1 file pushed, 0 skipped. 35.2 MB/s (16900760 bytes in 0.458s)")
        return 0
    return shell(words[1:])


def onnx2tf(words: Sequence[str]) -> int:
    """Makes FOLDER/STEM_float32.tflite."""
    source, folder = Path(words[words.index("-i") + 1]), Path(words[words.index("-o") + 1])
    folder.mkdir()
    shutil.copyfile(source, folder / f"{source.stem}_float32.tflite")
    return 0


def converter_lite(words: Sequence[str]) -> int:
    """MindSpore Lite's: makes OUTPUT.ms."""
    given = flags(words)
    assert given["inputShape"] == "input:1,1,16,16"
    shutil.copyfile(given["modelFile"], f"{given['outputFile']}.ms")
    print("CONVERT RESULT SUCCESS:0")
    return 0


if __name__ == "__main__":
    tool = {"adb": adb, "onnx2tf": onnx2tf, "converter_lite": converter_lite}[sys.argv[1]]
    sys.exit(tool(sys.argv[2:]))
