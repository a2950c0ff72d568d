"""How good measured and predicted latencies are, on this machine.

    python benchmarks/latency_accuracy.py                        # all, an hour and more
    python benchmarks/latency_accuracy.py --only repeatability agreement cost
    python benchmarks/latency_accuracy.py --only table --spaces mnasnet --networks 200
    python benchmarks/latency_accuracy.py --only pixel --beside NETWORK
    export MNAS_ACCEL_NASBENCH=FOLDER                            # with anb_dev.csv.gz
    python benchmarks/latency_accuracy.py --only data            # measures nothing

Sections:

    repeatability  a network measured by ten processes, then while another core is busy
    agreement      the meter's median beside that of a plain loop around session.run
    pixel          A1 at five widths and five resolutions beside the published times on a Pixel 1,
                   and another network at the same ones, measured in turn with it
    cost           seconds that one measurement takes
    table          tables fitted to networks measured here, tested on others that were measured
    data           the same with the times that Accel-NASBench recorded on its devices

Every figure is printed with its bar; the exit status is 1 where one was missed. Figures of a busy
machine say little: the load stands in the first line, and the verdicts beside the figures. The
section `table` keeps its measurements in the cache folder: kill the program and call it again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from latency.design import choose_networks, most_telling
from latency.device import load_device, make_meter
from latency.features import TERMS
from latency.lookup_table import Accuracy, LatencyPredictor, accuracy, fit_table, predict_by_macs
from latency.plots import plot_predictions
from latency.table_run import make_table
from latency.timing import SLOW_PROBE, probe
from search.accel_nasbench_data import read_networks
from space.architecture import Architecture
from space.errors import MnasError
from space.mnasnet import adapt, find_architecture
from space.onnx_graph import INPUT_NAME, onnx_model
from space.search_space import load_space

FOLDER_VARIABLE = "MNAS_ACCEL_NASBENCH"

#: Milliseconds of MnasNet-A1 on a Pixel 1, one thread, by width and resolution, as published with
#: the networks (Tan et al., CVPR 2019, and the TPU code's page).
PIXEL_1_RESOLUTIONS = (224, 192, 160, 128, 96)
PIXEL_1_MS = {
    1.4: (135, 99, 72, 49, 32),
    1.0: (78, 57, 41, 29, 18),
    0.75: (61, 45, 33, 23, 17),
    0.5: (32, 24, 18, 12, 7.4),
    0.35: (22, 17, 13, 8.5, 5.4),
}

#: Space -> least and greatest figures of its table: MAPE, share within 10 %, Kendall's tau.
TABLE_BARS = {"accel_nasbench": (0.04, 0.95, 0.95), "mnasnet": (0.06, 0.90, 0.92)}

#: Times a measurement in a fresh process, imports not counted; argv: network, resolution, device.
TIMED = """
import sys, time
from latency.device import load_device, make_meter
from space.mnasnet import adapt, find_architecture
network = adapt(find_architecture(sys.argv[1]), resolution=int(sys.argv[2]))
meter = make_meter(load_device(sys.argv[3]))
meter.identity()
before = time.perf_counter()
measurement = meter.measure(network)
print(time.perf_counter() - before, measurement.attempts, measurement.verdict)
assert "mindspore" not in sys.modules
"""

BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


class Bars:
    """Prints figures with their bars and remembers whether all were met."""

    def __init__(self) -> None:
        self.all_met = True

    def at_most(self, what: str, value: float, bar: float, form: str = ".2%") -> None:
        """A figure that must not exceed its bar."""
        self.holds(value <= bar, f"{what} {value:{form}}, at most {bar:{form}}")

    def at_least(self, what: str, value: float, bar: float, form: str = ".3f") -> None:
        """A figure that must reach its bar."""
        self.holds(value >= bar, f"{what} {value:{form}}, at least {bar:{form}}")

    def holds(self, met: bool, text: str) -> None:
        """A line of the report."""
        self.all_met = self.all_met and met
        print(f"  {'met   ' if met else 'MISSED'}  {text}", flush=True)


def measured_by_a_process(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures that `python -m latency measure --json` prints."""
    done = subprocess.run(
        [
            sys.executable, "-m", "latency", "measure", arguments.arch,
            "--resolution", str(arguments.resolution), "--device", arguments.device, "--json",
        ],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def repeatability(arguments: argparse.Namespace, bars: Bars) -> None:
    """Ten processes agree; load on another core is seen, or does not matter."""
    found = [measured_by_a_process(arguments) for _ in range(arguments.processes)]
    medians = [figures["median_ms"] for figures in found]
    verdicts = ", ".join(sorted({figures["verdict"] for figures in found}))
    print(f"  {len(found)} processes: {min(medians):.4g} to {max(medians):.4g} ms ({verdicts})")
    bars.at_most(
        "coefficient of variation of the medians",
        statistics.stdev(medians) / statistics.fmean(medians), 0.015,
    )  # fmt: skip
    others = sorted(os.sched_getaffinity(0))[:-1]
    if not others:
        print("  there is no other core to be busy")
        return
    with busy(others[0]):
        disturbed = measured_by_a_process(arguments)
    shift = disturbed["median_ms"] / statistics.median(medians) - 1
    bars.holds(
        disturbed["verdict"] != "ok" or abs(shift) <= 0.03,
        f"with core {others[0]} busy the median shifts by {shift:+.2%} and the verdict is"
        f" {disturbed['verdict']}; within 3 %, or not ok",
    )


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Keep a core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(core)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def agreement(arguments: argparse.Namespace, bars: Bars) -> None:
    """The meter adds nothing to what a plain loop measures at quiet moments."""
    network = the_network(arguments)
    meter = make_meter(load_device(arguments.device))
    plain_ms, meter_ms, verdicts = [], [], set()
    for _ in range(arguments.rounds):
        measurement = meter.measure(network)
        meter_ms.append(measurement.median_ms)
        verdicts.add(measurement.verdict)
        plain_ms.append(plain_loop_ms(network))
    ratio = statistics.median(a / b for a, b in zip(meter_ms, plain_ms, strict=True))
    print(
        f"  meter {statistics.median(meter_ms):.4g} ms, plain loop"
        f" {statistics.median(plain_ms):.4g} ms, {arguments.rounds} times each in turn"
        f" ({', '.join(sorted(verdicts))})"
    )
    bars.at_most("meter / plain loop differs from 1 by", abs(ratio - 1), 0.02)


def plain_loop_ms(network: Architecture, runs: int = 200) -> float:
    """Return the median time of session.run as anyone would write it, on the meter's core.

    Like the meter's, the median leaves out runs beside which a probe was slow: on a shared host
    what a neighbour takes changes from one second to the next and would be all that is compared.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_model(network).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    shape = (1, network.input_channels, network.resolution, network.resolution)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        for _ in range(10):
            session.run(None, {INPUT_NAME: images})
        times, probes = [], [probe_s()]
        for _ in range(runs):
            before = time.perf_counter()
            session.run(None, {INPUT_NAME: images})
            times.append(1e3 * (time.perf_counter() - before))
            probes.append(probe_s())
    finally:
        os.sched_setaffinity(0, allowed)
    slow = SLOW_PROBE * min(probes)
    beside = zip(times, probes[:-1], probes[1:], strict=True)
    return statistics.median(ms for ms, before, after in beside if max(before, after) <= slow)


def probe_s() -> float:
    """Return how long the probe takes now."""
    before = time.perf_counter()
    probe()
    return time.perf_counter() - before


def pixel(arguments: argparse.Namespace, bars: Bars) -> None:
    """A1's variants come in the order that they have on a phone."""
    meter = make_meter(load_device(arguments.device))
    networks = [find_architecture("mnasnet-a1")]
    if arguments.beside is not None:
        networks.append(find_architecture(arguments.beside))
    here_ms, phone_ms, disturbed = [], [], 0
    cell = 14 if len(networks) == 1 else 22
    print("  width  " + "".join(f"{size:>{cell}}" for size in PIXEL_1_RESOLUTIONS))
    for width, row_ms in PIXEL_1_MS.items():
        row = []
        for resolution, on_phone_ms in zip(PIXEL_1_RESOLUTIONS, row_ms, strict=True):
            taken = [meter.measure(adapt(n, width=width, resolution=resolution)) for n in networks]
            disturbed += sum(measurement.verdict != "ok" for measurement in taken)
            here_ms.append(taken[0].median_ms)
            phone_ms.append(on_phone_ms)
            shown = " /".join(f"{measurement.median_ms:>6.2f}" for measurement in taken)
            row.append(f"{f'{shown} /{on_phone_ms:>5}':>{cell}}")
        print(f"  {width:<7}" + "".join(row), flush=True)
    both = "A1 here / " + ("" if arguments.beside is None else "the other network here / ")
    print(f"  ms of {both}A1 on a Pixel 1; {disturbed} measurements not ok")
    bars.at_least("Spearman's correlation", float(spearmanr(here_ms, phone_ms).statistic), 0.995)


def cost(arguments: argparse.Namespace, bars: Bars) -> None:
    """A measurement is cheap."""
    for device, bar_s in (("host", 3.0), ("host_quick", 0.6)):
        said = []
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", TIMED, arguments.arch, str(arguments.resolution), device],
                capture_output=True, text=True, timeout=600, check=True,
            )  # fmt: skip
            said.append(done.stdout.split())
        seconds = statistics.median(float(line[0]) for line in said)
        attempts = ", ".join(f"{line[1]} ({line[2]})" for line in said)
        bars.at_most(
            f"{device}: seconds with the graph; attempts {attempts};", seconds, bar_s, ".2f"
        )


def table(arguments: argparse.Namespace, bars: Bars) -> None:
    """Tables of this host predict networks that they were not fitted to."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    meter = make_meter(load_device(arguments.table_device))
    for name in arguments.spaces:
        space = load_space(name, resolution=arguments.table_resolution)
        began = time.monotonic()
        design = choose_networks(space, arguments.networks, arguments.held_out, seed=0)
        stem = arguments.cache / f"{name}-{space.config.resolution}"
        run = make_table(meter, space, design, stem.with_suffix(".jsonl"), _progress)
        print(file=sys.stderr)
        fitted = run.table
        assert fitted.held_out is not None
        assert fitted.macs_line is not None
        print(
            f"  {name}: {fitted.features}, fitted to {fitted.fitted_networks} networks;"
            f" {run.disturbed} measurements not ok; {(time.monotonic() - began) / 60:.1f} minutes"
            " in this call"
        )
        print(f"          multiply-adds line: {accuracy_text(fitted.macs_line)}")
        mape, within, tau = TABLE_BARS.get(name, (0.06, 0.90, 0.92))
        check_accuracy(fitted.held_out, mape, within, tau, bars)
        legend = {"table": run.predicted_ms, "line through multiply-adds": run.macs_line_ms}
        picture = stem.with_suffix(".png")
        plot_predictions(run.measured_ms, legend, f"{name}, held out", picture)
        print(f"          {picture}")


def _progress(done: int, total: int, outcome: object) -> None:
    print(f"\r{done} of {total} networks ", end="", file=sys.stderr, flush=True)


def accuracy_text(found: Accuracy) -> str:
    """Return an accuracy on one line."""
    return (
        f"MAPE {found.mape:.2%}, {found.within_10_percent:.1%} within 10 %,"
        f" tau {found.kendall_tau or 0:.3f} on {found.networks} networks"
    )


def check_accuracy(found: Accuracy, mape: float, within: float, tau: float, bars: Bars) -> None:
    """Hold an accuracy against its bars."""
    print(f"          table: {accuracy_text(found)}")
    bars.at_most("MAPE", found.mape, mape)
    bars.at_least("share within 10 %", found.within_10_percent, within)
    bars.at_least("Kendall's tau", found.kendall_tau or 0.0, tau)


def data(arguments: argparse.Namespace, bars: Bars) -> None:
    """Tables of Accel-NASBench's devices predict networks that they were not fitted to."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        print(f"  skipped: {FOLDER_VARIABLE} names no folder")
        return
    devices = ("zcu102", "a100")
    recorded = read_networks(Path(folder), devices)
    space = load_space("accel_nasbench")
    networks = [space.decode(tokens.tolist()) for tokens in recorded.tokens]
    for device in devices:
        times = recorded.latency_ms[device]
        known = np.flatnonzero(np.isfinite(times))
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(known)
            held_out, pool = order[:1000], order[1000:3000]
            telling = most_telling([TERMS["operations"](networks[k]) for k in pool], 300)
            fitted = pool[telling]
            found = fit_table(
                space.config, {"name": device}, [networks[k] for k in fitted], times[fitted]
            )
            others = [networks[k] for k in held_out]
            line = predict_by_macs([networks[k] for k in fitted], times[fitted], others)
            tested = accuracy(LatencyPredictor(found).predict(others), times[held_out])
            print(f"  {device}, seed {seed}: {found.features}, {accuracy_text(tested)}")
            print(
                f"          multiply-adds line: {accuracy_text(accuracy(line, times[held_out]))}"
            )
            bars.at_most("MAPE", tested.mape, 0.02)


def the_network(arguments: argparse.Namespace) -> Architecture:
    """Return the network that most sections measure."""
    return adapt(find_architecture(arguments.arch), resolution=arguments.resolution)


SECTIONS: dict[str, Callable[[argparse.Namespace, Bars], None]] = {
    "repeatability": repeatability,
    "agreement": agreement,
    "pixel": pixel,
    "cost": cost,
    "table": table,
    "data": data,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--arch", default="mnasnet-a1")
    add("--resolution", type=int, default=224)
    add("--beside", metavar="NETWORK", help="of pixel: another network than A1, beside it")
    add("--device", default="host", help="a file or a shipped name; one that times on this host")
    add("--processes", type=int, default=10, help="of repeatability")
    add("--rounds", type=int, default=5, help="of agreement")
    add("--spaces", nargs="+", default=list(TABLE_BARS), help="of table")
    add("--table-device", default="host_quick")
    add("--table-resolution", type=int, help="in place of the spaces' own")
    add("--networks", type=int, default=400, help="that a table is fitted to")
    add("--held-out", type=int, default=100, help="that it is tested on")
    add("--cache", type=Path, default=Path("runs/latency"), help="folder of table's measurements")
    return parser.parse_args()


def main() -> None:
    """Run the sections and exit with 1 where a bar was missed."""
    arguments, bars = _arguments(), Bars()
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    try:
        for name in arguments.only:
            print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
            SECTIONS[name](arguments, bars)
    except MnasError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    sys.exit(0 if bars.all_met else 1)


if __name__ == "__main__":
    main()
