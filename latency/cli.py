"""The commands of `mnas latency` and `python -m latency`: measure, compare, devices, check.

Heavy imports stand inside the commands, so that `--help` answers at once. A device that gives no
figure ends in one sentence and exit status 1; bad input in status 2.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
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
Second = Annotated[str, typer.Argument(metavar="SECOND", help="Likewise.")]
Device = Annotated[str, typer.Option(help="A file or a shipped name.")]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="A file or a shipped name.")]
Width = Annotated[float, typer.Option(help="Multiplier of stem and blocks.")]
Resolution = Annotated[int | None, typer.Option(help="Input pixels.")]
Rounds = Annotated[int, typer.Option(min=6, help="Measurements of each network.")]
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
        as_json: Json = False,
    ) -> None:
        """Measure a network's latency on a device."""
        _measure(network(arch, width, resolution), device, as_json=as_json)

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


def _measure(network: Architecture, device: str, *, as_json: bool) -> None:
    from latency.device import load_device, make_meter
    from latency.measurement import summary

    with _one_sentence(device):
        measurement = make_meter(load_device(device)).measure(network)
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
            f"{len(measurement.samples_ms)} of {measurement.inner_iterations} inferences,"
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
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        print(f"{label:<{width}}{text}")
