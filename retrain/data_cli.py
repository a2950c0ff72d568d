"""The commands of `mnas data`: look through image files, and pack them into MindRecord files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from space.errors import ConfigError

Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="A folder with train/<class>/ and val/<class>/.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]

app = typer.Typer(
    help="Prepare image data sets.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command("check")
def check(source: Source, as_json: Json = False) -> None:
    """Decode every image once and name those that cannot be read."""
    from retrain.data_sources import class_folders, passed_over, unreadable

    train, test = class_folders(source)
    files = [file for part in (train, test) for name in sorted(part) for file in part[name]]
    with _bar() as show:
        found = unreadable(files, lambda done: show(done, len(files), None))
    others = passed_over(source)
    if as_json:
        _print_json(
            {
                "classes": len(train),
                "train_images": sum(map(len, train.values())),
                "val_images": sum(map(len, test.values())),
                "unreadable": found,
                "passed_over": [str(file) for file in others],
            }
        )
    elif found:
        print("\n".join(found))
    else:
        print(f"{len(files):,} images of {len(train)} classes can be read.")
    if others and not as_json:
        print(f"{len(others):,} files are passed over, as {others[0]}: no image ends so.")
    if found:
        raise ConfigError(
            f"{source}: {len(found)} of {len(files):,} images cannot be read; replace or remove"
            " them."
        )


@app.command("to-mindrecord")
def to_mindrecord(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or one to go on in.")],
    as_json: Json = False,
) -> None:
    """Pack a folder's images into MindRecord files; the same call goes on after a break."""
    from retrain import mindrecord
    from retrain.data_sources import class_folders

    train, test = class_folders(source)
    with _bar() as show:
        manifest = mindrecord.to_mindrecord(
            {"train": train, "val": test},
            out,
            on_progress=lambda p: show(p.images, p.total, p.seconds_left),
        )
    size_bytes = sum(file.size_bytes for file in manifest.record_files)
    counts = {part: sum(numbers) for part, numbers in manifest.counts.items()}
    if as_json:
        _print_json(
            {
                "folder": str(out),
                "classes": len(manifest.classes),
                "train_images": counts["train"],
                "val_images": counts["val"],
                "files": len(manifest.record_files),
                "size_bytes": size_bytes,
            }
        )
        return
    print(
        f"{out}: {counts['train']:,} training and {counts['val']:,} test images (val/) of"
        f" {len(manifest.classes)} classes in {len(manifest.record_files)} files,"
        f" {size_bytes:,} bytes, with their checksums in {mindrecord.MANIFEST}."
    )


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, float | None], None]]:
    """A bar on a terminal's standard error; nothing in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images {task.fields[left]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, left="")

        def show(done: int, total: int, seconds_left: float | None) -> None:
            left = "" if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
            progress.update(task, completed=done, total=total, left=left)

        yield show


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))
