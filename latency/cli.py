"""The commands of `mnas latency` and `python -m latency`.

Heavy imports stand inside the commands, so that `--help` answers at once. A device that gives no
figure ends in one sentence and exit status 1; bad input in status 2.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from space.errors import MeasurementError

if TYPE_CHECKING:
    from latency.device import DeviceConfig
    from latency.measurement import Measurement
    from space.architecture import Architecture

EXIT_NO_FIGURE = 1

Arch = Annotated[
    str,
    typer.Argument(metavar="ARCH", help="A published name, a text form, or in `mnas` DIR:TRIAL."),
]
Archs = Annotated[list[str], typer.Argument(metavar="ARCH...", help="As for measure.")]
Second = Annotated[str, typer.Argument(metavar="SECOND", help="Likewise.")]
Device = Annotated[str, typer.Option(help="A file or a shipped name.")]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="A file or a shipped name.")]
Width = Annotated[float, typer.Option(help="Multiplier of stem and blocks.")]
Resolution = Annotated[int | None, typer.Option(help="Input pixels.")]
Rounds = Annotated[int, typer.Option(min=6, help="Measurements of each network.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a picture, too.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]


def make_app(find: Callable[[str], Architecture]) -> typer.Typer:
    """Return the group of commands; `find` turns what a user calls a network into it."""
    app = typer.Typer(
        help="Measure latency on devices.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    def network(name: str, width: float, resolution: int | None) -> Architecture:
        from space.mnasnet import adapt

        return adapt(find(name), width=width, resolution=resolution)

    @app.command("measure")
    def measure(
        arch: Arch,
        device: Device = "host",
        width: Width = 1.0,
        resolution: Resolution = None,
        plot: Plot = None,
        as_json: Json = False,
    ) -> None:
        """Measure a network's latency on a device."""
        _measure(network(arch, width, resolution), device, plot, as_json=as_json)

    @app.command("compare")
    def compare(
        first: Annotated[str, typer.Argument(metavar="FIRST", help="As for measure.")],
        second: Second,
        device: Device = "host",
        rounds: Rounds = 6,
        width: Width = 1.0,
        resolution: Resolution = None,
        as_json: Json = False,
    ) -> None:
        """Measure two networks in turn and say how much slower the second is."""
        networks = [network(name, width, resolution) for name in (first, second)]
        _compare(networks[0], networks[1], device, rounds, as_json=as_json)

    @app.command("predict")
    def predict(
        archs: Archs,
        table: Annotated[Path, typer.Option(metavar="FILE", help="Of `table`.")],
        device: Annotated[
            str | None, typer.Option(help="Refuse a table of another device than this.")
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Predict the latency of members of a table's space; nothing is measured."""
        from latency.table_cli import run_predict

        networks = [find(name) for name in archs]
        with _one_sentence(device or str(table)):
            _print_lines(run_predict(table, networks, device, as_json=as_json))

    app.command("table")(make_table)
    app.command("devices")(devices)
    app.command("check")(check)
    return app


@contextlib.contextmanager
def _one_sentence(device: str) -> Iterator[None]:
    """A measurement without a figure ends the command with the reason."""
    try:
        yield
    except MeasurementError as error:
        print(f"mnas: {device}: measuring failed: {error}.", file=sys.stderr)
        raise typer.Exit(EXIT_NO_FIGURE) from error


def _measure(network: Architecture, device: str, plot: Path | None, *, as_json: bool) -> None:
    from latency.device import load_device, make_meter
    from latency.measurement import summary
    from latency.plots import check_picture, plot_samples

    check_picture(plot)
    with _one_sentence(device):
        measurement = make_meter(load_device(device)).measure(network)
    if plot is not None:
        plot_samples(measurement, plot)
    if as_json:
        print(json.dumps({"architecture": network.text, **summary(measurement)}, allow_nan=False))
    else:
        _print_lines(_measurement_lines(measurement))


def _measurement_lines(measurement: Measurement) -> list[tuple[str, str]]:
    low, high = measurement.median_interval_ms
    return [
        ("median", f"{measurement.median_ms:.4g} ms"),
        ("95 % interval", f"{low:.4g} to {high:.4g} ms"),
        ("IQR", f"{measurement.iqr_ms:.3g} ms ({measurement.spread:.1%} of the median)"),
        ("p90", f"{measurement.percentile_ms(90):.4g} ms"),
        (
            "samples",
            f"{len(measurement.samples_ms)} of {measurement.inner_iterations} inferences"
            f" ({len(measurement.disturbed)} disturbed, not counted),"
            f" after {measurement.warmup_runs} to warm up",
        ),
        ("verdict", measurement.verdict),
        ("device", f"{measurement.device.get('name')}: {measurement.device_fingerprint}"),
    ]


def _compare(
    first: Architecture, second: Architecture, device: str, rounds: int, *, as_json: bool
) -> None:
    import numpy as np

    from latency.compare import compare
    from latency.device import load_device, make_meter
    from space.records import to_plain

    meter = make_meter(load_device(device))
    with _one_sentence(device):
        found = compare(meter, first, second, rounds)
        identity = meter.identity()
    if as_json:
        report = {
            "first": first.text,
            "second": second.text,
            **to_plain(found),
            "verdict": found.verdict,
            "device": identity,
        }
        print(json.dumps(report, allow_nan=False))
        return
    lines = [
        ("first", f"{np.median(found.first_ms):.4g} ms"),
        ("second", f"{np.median(found.second_ms):.4g} ms"),
        ("second / first", f"{found.ratio:.4g}"),
        ("95 % interval", f"{found.ratio_low:.4g} to {found.ratio_high:.4g}"),
        ("verdict", found.verdict),
        ("measured", f"{rounds} times each, in turn; {found.noisy} of {2 * rounds} were noisy"),
        ("device", str(identity["name"])),
    ]
    _print_lines(lines)


def make_table(
    device: Device = "host",
    space: Annotated[str, typer.Option(help="A file or a shipped name.")] = "mnasnet",
    networks: Annotated[int, typer.Option(min=10, help="How many are fitted.")] = 300,
    held_out: Annotated[
        int,
        typer.Option("--held_out", "--held-out", min=1, help="How many only test the table."),
    ] = 50,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table.", show_default="DEVICE-SPACE.json"),
    ] = None,
    resolution: Resolution = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure networks of a space and fit a table that predicts the latency of all.

    Killed, it goes on where it was: what was measured is in FILE.measurements.jsonl.
    """
    from latency.table_cli import TableOptions, run_table

    options = TableOptions(device, space, networks, held_out, out, resolution, seed, plot)
    with _one_sentence(device):
        _print_lines(run_table(options, as_json=as_json))


def devices(as_json: Json = False) -> None:
    """List the shipped devices."""
    from latency.device import load_device
    from space.records import shipped_names, to_plain

    found = {name: load_device(name) for name in shipped_names("device")}
    if as_json:
        print(json.dumps(to_plain(found), allow_nan=False))
    else:
        _print_lines([(name, _what(config)) for name, config in found.items()])


def _what(config: DeviceConfig) -> str:
    """A device in a few words."""
    if config.kind == "pool":
        return f"{', '.join(device.name for device in config.devices)}, whichever is free"
    if config.kind == "ascend":
        return f"{config.target}, MindSpore, {config.precision}, batch {config.batch}"
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}, batch {config.batch}"
    if config.kind == "onnxruntime":
        return f"this host, ONNX Runtime, {threads}, {config.effort}"
    if config.kind == "ssh":
        return f"{config.host} over ssh, ONNX Runtime, {threads}, {config.effort}"
    each = "means" if config.parse.each == "mean" else "samples"
    programs = [*config.convert, config.run]
    return f"{' and '.join(p[0] for p in programs)}, {threads}, {each} of {config.runs} runs"


def check(device: DeviceArgument, as_json: Json = False) -> None:
    """Say what a device has and lacks; nothing is measured. The exit status is 1 if it lacks."""
    from latency.checks import check_device
    from latency.device import load_device
    from space.records import to_plain

    config = load_device(device)
    findings = check_device(config)
    if as_json:
        report = {"device": config.name, "findings": to_plain(findings)}
        print(json.dumps(report, allow_nan=False))
    else:
        width = max(len(finding.name) for finding in findings) + 2
        for finding in findings:
            print(f"{finding.state.upper():<9}{finding.name:<{width}}{finding.text}")
    if any(finding.state == "lacks" for finding in findings):
        raise typer.Exit(EXIT_NO_FIGURE)


def _print_lines(lines: list[tuple[str, Any]]) -> None:
    width = max((len(label) for label, _ in lines), default=0) + 2
    for label, text in lines:
        print(f"{label:<{width}}{text}")
