"""`python -m retrain [train]|finetune|validate|export|convert`: one training and what follows.

Without a command, `train` is meant, as the model zoo's `train.py` has it. Bad input ends in one
sentence on standard error and exit status 2; a training that diverged, and would again, in status
3; one that was stopped in 130; whatever else failed in status 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from retrain.convert_cli import convert
from retrain.launch import MSRUN, PARENT, complaint, die_with_launcher, die_with_parent
from retrain.progress import ProgressDisplay
from retrain.request import TrainRequest, int8_request
from space.command_line import exit_status
from space.errors import ConfigError, Interrupted, MnasError
from space.files import is_full
from space.records import to_plain

if TYPE_CHECKING:
    from retrain.folder import TrainReport

#: What whoever began a training that ended early can do.
_GO_ON = "go on with the same command and --resume"

app = typer.Typer(
    help="Train a network fully, evaluate it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("convert")(convert)

Config = Annotated[str, typer.Option("--config", "-c", help="A recipe's file or shipped name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Of the recipe.")
]
DataDir = Annotated[
    str | None,
    typer.Option("--data_dir", "--data-dir", help="Folder of the images; replaces data.path."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the result.")]
Resolution = Annotated[int | None, typer.Option("--resolution", help="Input pixels.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where it was killed.")]
NumWorkers = Annotated[
    int | None, typer.Option("--workers", help="Let msrun start so many processes here.")
]
Distribute = Annotated[
    str | None,
    typer.Option(
        "--distribute", metavar="BOOL", help="Whether msrun or mpirun started several [told]."
    ),
]
ScaleLr = Annotated[
    bool,
    typer.Option(
        "--scale_lr", "--scale-lr", help="Scale the learning rate with the global batch."
    ),
]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write curves into the folder.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads; all that may be used by default.")
]
CkptPath = Annotated[
    Path, typer.Option("--ckpt_path", "--ckpt-path", help="A training's model.safetensors.")
]
StartPath = Annotated[
    Path | None, typer.Option("--ckpt_path", "--ckpt-path", help="Weights to start from.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A recipe whose data are taken [the training's]."),
]
ExportFormat = Annotated[
    str, typer.Option("--format", help="onnx, mindir, or python: a module that stands alone.")
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Quantize the ONNX file, calibrated on training images.")
]
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        "--calibration_images", "--calibration-images", help="How many of them, for --int8 [256]."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max_drop", "--max-drop", help="Top-1 accuracy, a fraction, that --int8 may cost [0.02]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]


@app.command("train")
def train(
    config: Config,
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="A published name or a text form [the recipe's]."),
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    out: Out = None,
    resolution: Resolution = None,
    seed: Seed = 0,
    threads: Threads = None,
    resume: Resume = False,
    as_json: Json = False,
    ckpt_path: StartPath = None,
    workers: NumWorkers = None,
    distribute: Distribute = None,
    scale_lr: ScaleLr = False,
    tensorboard: Tensorboard = False,
) -> None:
    """Train a network with a recipe; the result is a folder."""
    _train(
        TrainRequest(
            config, arch, ckpt_path, out=out, resolution=resolution, data_dir=data_dir, seed=seed,
            threads=threads, resume=resume, scale_lr=scale_lr, tensorboard=tensorboard,
            overrides=tuple(overrides or ()),
        ),
        workers, distribute, as_json=as_json,
    )  # fmt: skip


@app.command("finetune")
def finetune(
    config: Config,
    ckpt_path: CkptPath,
    overrides: Overrides = None,
    frozen_stages: Annotated[
        int | None,
        typer.Option(
            "--frozen_stages",
            "--frozen-stages",
            help="Of stem, blocks and head, so many first ones stay as they are [the recipe's].",
        ),
    ] = None,
    data_dir: DataDir = None,
    out: Out = None,
    resolution: Resolution = None,
    seed: Seed = 0,
    threads: Threads = None,
    resume: Resume = False,
    workers: NumWorkers = None,
    distribute: Distribute = None,
    scale_lr: ScaleLr = False,
    tensorboard: Tensorboard = False,
    as_json: Json = False,
) -> None:
    """Take trained or converted weights to other classes; train as `train` does."""
    frozen = [] if frozen_stages is None else [f"frozen_stages={frozen_stages}"]
    _train(
        TrainRequest(
            config, None, ckpt_path, finetune=True, out=out, resolution=resolution,
            data_dir=data_dir, seed=seed, threads=threads, resume=resume, scale_lr=scale_lr,
            tensorboard=tensorboard, overrides=(*(overrides or ()), *frozen),
        ),
        workers, distribute, as_json=as_json,
    )  # fmt: skip


def _train(
    request: TrainRequest, workers: int | None, distribute: str | None, *, as_json: bool
) -> None:
    from retrain.commands import launch_command, train_command

    _quiet_mindspore()
    console = Console(stderr=as_json)

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    told = _truth("distribute", distribute)
    if workers is not None and told is not None:
        raise ConfigError("--workers: starts workers itself; leave --distribute out.")
    report: TrainReport | None
    try:
        if workers is not None:
            report = launch_command(request, workers, on_line=say)
        else:
            with ProgressDisplay(console) as progress:
                report = train_command(
                    request, distribute=told, on_progress=progress.show, on_note=say
                )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {_GO_ON}.") from None
    except OSError as error:
        remedy = f"make room and {_GO_ON}" if is_full(error) else _GO_ON
        raise MnasError(f"cannot read or write: {error}; {remedy}.") from error
    if workers is not None and not as_json:
        # The first worker has said it all.
        return
    if report is None:
        return
    if as_json:
        _print_json(report)
        return
    _print_lines(
        console,
        [
            ("validation accuracy", f"{report.validation_accuracy:.4f}"),
            ("of", f"{report.validation_images:,} images held out from the training set"),
            ("trained", f"{report.epochs:,} epochs, {report.steps:,} steps"),
            ("seconds", f"{report.seconds:.1f}, {report.images_per_s:,.0f} images/s"),
            ("folder", report.folder),
        ],
    )


def _truth(option: str, text: str | None) -> bool | None:
    """True or False as the model zoo's users write them."""
    if text is None or text.lower() in ("true", "false"):
        return None if text is None else text.lower() == "true"
    raise ConfigError(f"--{option}: must be True or False, but got {text!r}.")


@app.command("validate")
def validate(
    ckpt_path: CkptPath,
    config: RecipeOption = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="validation or test [validation; test for weights from elsewhere]."
        ),
    ] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
    confusion_matrix: Annotated[
        Path | None,
        typer.Option(
            "--confusion_matrix", "--confusion-matrix", help="Draw it into this PNG file."
        ),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="An export, to be evaluated in its place.")
    ] = None,
) -> None:
    """Evaluate a checkpoint on held-out images or, once, at the end, on the test set."""
    from retrain.commands import validate_command

    _quiet_mindspore()
    report = validate_command(
        ckpt_path,
        config=config,
        split=split,  # type: ignore[arg-type]  # checked there, with a sentence
        data_dir=data_dir,
        confusion_matrix=confusion_matrix,
        threads=threads,
        onnx=onnx,
    )
    if as_json:
        _print_json(report)
        return
    lines = [
        ("top-1", f"{report.top1:.4f}"),
        ("top-5", f"{report.top5:.4f}"),
        ("loss", f"{report.loss:.4f}"),
        ("images", f"{report.images:,} ({report.split})"),
    ]
    if report.note is not None:
        lines.append(("warning", report.note))
    lines += [(f"  {name}", f"{top1:.4f}") for name, top1 in report.per_class_top1.items()]
    _print_lines(Console(), lines)


@app.command("export")
def export(
    ckpt_path: CkptPath,
    out: Annotated[Path, typer.Option("--out", help="The file.")],
    format: ExportFormat = "onnx",
    config: RecipeOption = None,
    data_dir: DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    int8: Int8 = False,
    calibration_images: CalibrationImages = None,
    max_drop: MaxDrop = None,
) -> None:
    """Export a checkpoint to another format, checked against MindSpore on held-out images."""
    from retrain.commands import export_command

    _quiet_mindspore()
    report = export_command(
        ckpt_path,
        out,
        format=format,
        config=config,
        data_dir=data_dir,
        overwrite=overwrite,
        threads=threads,
        int8=int8_request(int8, calibration_images, max_drop),
    )
    if as_json:
        _print_json(report)
        return
    opset = f", opset {report.opset}" if report.opset else ""
    lines = [
        ("file", f"{report.path} ({report.size_bytes:,} bytes{opset})"),
        ("largest difference", f"{report.max_abs_difference:.3g} on {report.images:,} images"),
        ("accuracy", f"{report.exported_top1:.4f} (MindSpore: {report.mindspore_top1:.4f})"),
    ]
    if report.precision == "int8":
        lines[1:] = [
            ("calibrated on", f"{report.calibration_images:,} training images"),
            (
                "accuracy",
                f"{report.exported_top1:.4f} in int8, {report.mindspore_top1:.4f} in float32:"
                f" {_points(report.top1_drop)} on {report.images:,} validation images",
            ),
        ]
    _print_lines(Console(), lines)


def _points(drop: float) -> str:
    return f"{abs(100 * drop):.2f} points {'less' if drop >= 0 else 'more'}"


def _print_json(report: object) -> None:
    print(json.dumps(to_plain(report), allow_nan=False))


def _print_lines(console: Console, lines: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        console.print(f"{label:<{width}}{text}", highlight=False, markup=False, soft_wrap=True)


def _heed_parent() -> None:
    """Where MNAS_PARENT_PID names the parent, let the kernel kill this process when it dies.

    Raises:
        ConfigError: The variable is not a number.
    """
    given = os.environ.get(PARENT)
    if given is None:
        return
    number = given.removeprefix(MSRUN)
    if not number.isdecimal():
        raise ConfigError(f"{PARENT}: must be a process id, but got {given!r}.")
    heed = die_with_parent if number == given else die_with_launcher
    if not heed(int(number)):
        sys.exit(MnasError.exit_status)


def _quiet_mindspore() -> None:
    """MindSpore's warnings about its own deprecated settings are not for the user."""
    os.environ.setdefault("GLOG_v", "3")


def main() -> None:
    """Run a command and exit with its status."""
    if sys.argv[1:] and sys.argv[1].startswith("-") and sys.argv[1] != "--help":
        sys.argv.insert(1, "train")
    sys.exit(exit_status(_command, "python -m retrain --help", line=complaint))


def _command() -> object:
    _heed_parent()
    return app(standalone_mode=False)


if __name__ == "__main__":
    main()
