"""`convert` as a command, shared by `mnas` and `python -m retrain`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space.errors import ConfigError
from space.records import to_plain

if TYPE_CHECKING:
    from retrain.convert import ConvertReport


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file of weights: ours, or theirs.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    to: Annotated[str, typer.Option("--to", help="mnas, timm, torchvision or mindcv.")] = "mnas",
    framework: Annotated[
        str | None,
        typer.Option("--from", help="timm, torchvision or mindcv [told from the names]."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Their network [told from the shapes].")
    ] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", help="The network: a published name or a text form.")
    ] = None,
    width: Annotated[float | None, typer.Option("--width", help="Multiplier of --arch.")] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="Which of several sets of weights in SOURCE.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Input pixels [224].")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="A file with the classes' names, one a line.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Of the pixels, of 1: R,G,B [ImageNet's].")
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", help="Their deviation: R,G,B [ImageNet's].")
    ] = None,
    padding: Annotated[
        str | None, typer.Option("--padding", help="same or symmetric [the framework's].")
    ] = None,
    batch_norm_epsilon: Annotated[
        float | None,
        typer.Option("--batch_norm_epsilon", "--batch-norm-epsilon", help="[The framework's.]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on one line.")] = False,
) -> None:
    """Convert weights of timm, torchvision or MindCV to a checkpoint, or back again."""
    # A damaged file gets one sentence, not MindSpore's own lines before it.
    os.environ.setdefault("GLOG_v", "4")
    from retrain.convert import convert as convert_weights
    from retrain.foreign_weights import Origin

    origin = Origin(
        framework=framework,
        model=model,
        arch=arch,
        width=width,
        key=key,
        resolution=resolution,
        classes=classes,
        mean=_numbers("mean", mean),
        deviation=_numbers("std", std),
        padding=padding,
        batch_norm_epsilon=batch_norm_epsilon,
    )
    report = convert_weights(source, out, to=to, origin=origin, overwrite=overwrite)
    if as_json:
        print(json.dumps(to_plain(report), allow_nan=False))
    else:
        _print(report)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--{option}: must be numbers with commas between, such as 0.5,0.5,0.5, but got"
            f" {text!r}."
        ) from None


def _print(report: ConvertReport) -> None:
    how = "recognised from its arrays" if report.recognised else "as given"
    if report.source_framework == "mnas":
        how = "a checkpoint"
    lines = [
        ("read", f"{report.source_framework} {report.model or report.architecture_hash}, {how}"),
        ("network", report.architecture),
        ("wrote", f"{report.out} ({report.arrays} arrays, {report.size_bytes:,} bytes)"),
    ]
    for ignored in report.ignored:
        more = f" and {len(ignored.names) - 1} more" if len(ignored.names) > 1 else ""
        lines.append(("left out", f"{ignored.names[0]}{more}: {ignored.reason}"))
    lines += [("note", note) for note in report.notes]
    for label, text in lines:
        print(f"{label:<10}{text}")
    if report.load is not None:
        print("load it with")
        print("\n".join(f"    {line}" for line in report.load.splitlines()))
