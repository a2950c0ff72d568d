"""What `mnas latency table` and `predict` do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latency.design import choose_networks
from latency.device import load_device, make_meter
from latency.journal import Outcome
from latency.lookup_table import (
    Accuracy,
    LatencyPredictor,
    LatencyTable,
    check_device,
    check_space,
    load_table,
    save_table,
)
from latency.measurement import Measurement, fingerprint
from latency.plots import check_picture, plot_predictions
from latency.table_run import TableRun, make_table
from space.architecture import Architecture
from space.errors import ConfigError
from space.records import record, to_plain
from space.search_space import load_space

#: What is added to a table's name for the file of its measurements.
JOURNAL_ENDING = ".measurements.jsonl"

Lines = list[tuple[str, str]]


@record
class TableOptions:
    """The options of `mnas latency table`; see there."""

    device: str
    space: str
    networks: int
    held_out: int
    out: Path | None
    resolution: int | None
    seed: int
    plot: Path | None


def run_table(options: TableOptions, *, as_json: bool) -> Lines:
    """Make a table, or go on with one; return what is to be printed.

    Raises:
        ConfigError: An option is wrong, or a file belongs to another device or space.
        MeasurementError: The device gives no figures.
    """
    space = load_space(options.space, resolution=options.resolution)
    config = load_device(options.device)
    out = options.out or Path(f"{config.name}-{space.name}.json")
    check_picture(options.plot)
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {str(out.parent)!r}; make it first.")
    meter = make_meter(config)
    if out.exists():
        earlier = load_table(out)
        check_device(meter.identity(), earlier.device, str(out))
        check_space(space.config, earlier.space, str(out))
    design = choose_networks(space, options.networks, options.held_out, options.seed)
    run = make_table(meter, space, design, out.with_name(out.name + JOURNAL_ENDING), _Progress())
    save_table(run.table, out)
    if options.plot is not None:
        _plot(run, options.plot)
    if not as_json:
        return _table_lines(run, out)
    plain = to_plain(run.table)
    report = {key: plain[key] for key in _REPORTED}
    counts = {"disturbed": run.disturbed, "failed": run.failed}
    print(json.dumps({"path": str(out), "space": space.name, **report, **counts}))
    return []


_REPORTED = (
    "device", "features", "fitted_networks", "cross_validated", "bound", "held_out", "macs_line"
)  # fmt: skip


class _Progress:
    """Says on standard error how many networks are done and how long the others will take."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._here = 0

    def __call__(self, done: int, total: int, outcome: Outcome) -> None:
        self._here += 1
        left_s = (time.monotonic() - self._started) / self._here * (total - done)
        if isinstance(outcome, Measurement):
            flag = "" if outcome.verdict == "ok" else f", {outcome.verdict}"
            what = f"{outcome.median_ms:.4g} ms{flag}"
        else:
            what = f"no time: {outcome}"
        print(f"{done} of {total}: {what}; {_duration(left_s)} left", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def _plot(run: TableRun, path: Path) -> None:
    plot_predictions(
        run.measured_ms,
        {"table": run.predicted_ms, "line through multiply-adds": run.macs_line_ms},
        f"{len(run.held_out)} networks of {run.table.space.name} that were not fitted,"
        f" on {run.table.device.get('name')}",
        path,
    )


def _table_lines(run: TableRun, out: Path) -> Lines:
    table = run.table
    assert table.held_out is not None  # make_table tests every table
    assert table.macs_line is not None
    kinds = sorted(table.cross_validated.items(), key=lambda item: item[1])
    return [
        ("table", f"{out}, fitted to {table.fitted_networks} networks of {table.space.name}"),
        ("features", ", ".join(f"{kind} {error:.1%}" for kind, error in kinds)
            + " (cross-validated error; the first was taken)"),
        ("bound", f"95 % of cross-validated predictions within {table.bound:.1%}"),
        ("held out", _accuracy_text(table.held_out)),
        ("multiply-adds", _accuracy_text(table.macs_line)),
        ("noisy", f"{run.disturbed} measurements were noisy or drifted, twice"),
        ("failed", f"{run.failed} networks have no time"),
        ("device", f"{table.device.get('name')}: {fingerprint(table.device)}"),
    ]  # fmt: skip


def _accuracy_text(found: Accuracy) -> str:
    tau = "none" if found.kendall_tau is None else f"{found.kendall_tau:.3f}"
    return (
        f"MAPE {found.mape:.1%}, {found.within_10_percent:.0%} within 10 %, Kendall's tau {tau},"
        f" on {found.networks} networks"
    )


def run_predict(
    path: Path, networks: Sequence[Architecture], device: str | None, *, as_json: bool
) -> Lines:
    """Predict latencies with a table; return what is to be printed.

    Raises:
        ConfigError: The table is not one, or of another device; a network is not in its space.
    """
    table = load_table(path)
    if device is not None:
        check_device(make_meter(load_device(device)).identity(), table.device, str(path))
    predicted = LatencyPredictor(table).predict(networks).tolist()
    if as_json:
        print(json.dumps(_prediction_report(path, table, networks, predicted)))
        return []
    shown = [
        ("predicted", f"{ms:.4g} ms, {_interval(ms, table.bound)}: {network.text}")
        for network, ms in zip(networks, predicted, strict=True)
    ]
    return [*shown, ("bound", f"95 % of cross-validated predictions within {table.bound:.1%}"),
            ("device", f"{table.device.get('name')}: {fingerprint(table.device)}")]  # fmt: skip


def _interval(predicted_ms: float, bound: float) -> str:
    """Where the time is if the prediction is off by at most `bound` of that time."""
    low = f"{predicted_ms / (1 + bound):.4g}"
    return f"{low} to {predicted_ms / (1 - bound):.4g} ms" if bound < 1 else f"{low} ms or more"


def _prediction_report(
    path: Path, table: LatencyTable, networks: Sequence[Architecture], predicted: Sequence[float]
) -> dict[str, Any]:
    return {
        "table": str(path),
        "device": table.device,
        "bound": table.bound,
        "predictions": [
            {"architecture": network.text, "predicted_ms": ms}
            for network, ms in zip(networks, predicted, strict=True)
        ],
    }
