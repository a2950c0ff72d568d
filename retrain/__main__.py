"""`python -m retrain train|validate|export|convert`: one training, its evaluation, its export.

Bad input ends in one sentence on standard error and exit status 2; a failed training in status 1.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from retrain.convert_cli import convert
from space.errors import ConfigError, MnasError
from space.records import to_plain

if TYPE_CHECKING:
    from retrain.train import TrainProgress

#: The class of all complaints about flags and arguments, whichever click typer is built on.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

EXIT_ERROR, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

#: In a pipe, a line of progress is printed at most this often.
LINE_INTERVAL_S = 5.0

_PARENT = "MNAS_PARENT_PID"
_PR_SET_PDEATHSIG = 1

app = typer.Typer(
    help="Train a network fully, evaluate it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("convert")(convert)

DataDir = Annotated[
    str | None, typer.Option("--data_dir", help="Folder of the images; replaces data.path.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads; all that may be used by default.")
]
CkptPath = Annotated[Path, typer.Option("--ckpt_path", help="A training's model.safetensors.")]
RecipeOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A recipe whose data are taken [the training's]."),
]
ExportFormat = Annotated[
    str, typer.Option("--format", help="onnx, mindir, or python: a module that stands alone.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]


@app.command("train")
def train(
    config: Annotated[
        str, typer.Option("--config", "-c", help="A recipe's file or shipped name.")
    ],
    arch: Annotated[str, typer.Option("--arch", help="A published name or a text form.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Of the recipe.")
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result.")] = None,
    resolution: Annotated[int | None, typer.Option("--resolution", help="Input pixels.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was killed.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network with a recipe; the result is a folder."""
    from retrain.commands import train_command

    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=as_json)
    with _Progress(console) as progress:
        report = train_command(
            config,
            arch,
            out=out,
            resolution=resolution,
            data_dir=data_dir,
            seed=seed,
            threads=threads,
            resume=resume,
            overrides=overrides or [],
            on_progress=progress.show,
        )
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


@app.command("validate")
def validate(
    ckpt_path: CkptPath,
    config: RecipeOption = None,
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "validation",
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on held-out images or, once, at the end, on the test set."""
    from retrain.commands import validate_command

    report = validate_command(
        ckpt_path,
        config=config,
        split=split,  # type: ignore[arg-type]  # checked there, with a sentence
        data_dir=data_dir,
        threads=threads,
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
) -> None:
    """Export a checkpoint to another format, checked against MindSpore on held-out images."""
    from retrain.commands import export_command

    report = export_command(
        ckpt_path,
        out,
        format=format,
        config=config,
        data_dir=data_dir,
        overwrite=overwrite,
        threads=threads,
    )
    if as_json:
        _print_json(report)
        return
    opset = f", opset {report.opset}" if report.opset else ""
    _print_lines(
        Console(),
        [
            ("file", f"{report.path} ({report.size_bytes:,} bytes{opset})"),
            ("largest difference", f"{report.max_abs_difference:.3g} on {report.images:,} images"),
            ("accuracy", f"{report.exported_top1:.4f} (MindSpore: {report.mindspore_top1:.4f})"),
        ],
    )


class _Progress:
    """One line that is rewritten on a terminal, a line now and then in a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._accuracy: float | None = None
        self._next_line = 0.0

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            waiting = Text("loading and compiling")
            self._live = Live(waiting, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: TrainProgress) -> None:
        """Show how far the training is."""
        if progress.accuracy is not None:
            self._accuracy = progress.accuracy
        line = _progress_line(progress, self._accuracy)
        if self._live is not None:
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
            return
        now = time.monotonic()
        if now >= self._next_line or progress.step == progress.steps:
            self._next_line = now + LINE_INTERVAL_S
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _progress_line(progress: TrainProgress, accuracy: float | None) -> str:
    parts = [
        f"epoch {progress.epoch}/{progress.epochs}",
        f"step {progress.step:,}/{progress.steps:,}",
        f"loss {progress.loss:.4f}",
        f"lr {progress.learning_rate:.3g}",
    ]
    if accuracy is not None:
        parts.append(f"validation accuracy {accuracy:.4f}")
    if progress.images_per_s > 0:
        parts.append(f"{progress.images_per_s:,.0f} images/s")
    parts.append(f"{progress.seconds_left:,.0f} s left")
    return "  ".join(parts)


def _print_json(report: object) -> None:
    print(json.dumps(to_plain(report), allow_nan=False))


def _print_lines(console: Console, lines: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        console.print(f"{label:<{width}}{text}", highlight=False, markup=False, soft_wrap=True)


def _interrupt(number: int, frame: object) -> None:
    """Take SIGTERM as Ctrl-C: while MindSpore computes, it answers SIGINT by sending SIGTERM."""
    raise KeyboardInterrupt


def die_with_parent() -> None:
    """Where MNAS_PARENT_PID names the parent, let the kernel kill this process when it dies.

    Raises:
        ConfigError: The variable is not a number.
    """
    given = os.environ.get(_PARENT)
    if given is None:
        return
    if not given.isdecimal():
        raise ConfigError(f"{_PARENT}: must be a process id, but got {given!r}.")
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the kernel was asked.
    if os.getppid() != int(given):
        sys.exit(EXIT_ERROR)


def main() -> None:
    """Run a command and exit with its status."""
    # MindSpore's warnings about its own deprecated settings are not for the user.
    os.environ.setdefault("GLOG_v", "3")
    sys.exit(_run())


def _run() -> int:
    try:
        die_with_parent()
        status = app(standalone_mode=False)
        # typer answers Ctrl-C with this status itself.
        if status == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except ConfigError as error:
        return _complain(str(error), EXIT_BAD_INPUT)
    except MnasError as error:
        return _complain(str(error), EXIT_ERROR)
    except _UsageError as error:
        sentence = error.format_message()  # type: ignore[attr-defined]  # click's, whichever it is
        return _complain(f"{sentence} See `python -m retrain --help`.", EXIT_BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped; go on with the same command and --resume.", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe went away: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        return _complain(f"cannot read or write: {error}", EXIT_ERROR)


def _complain(sentence: str, status: int) -> int:
    print(f"retrain: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
