"""An image folder as MindRecord files: a few hundred large files in place of a million small ones.

A folder of them holds mindrecord.json, the manifest, and for train and val some
`<part>-<number>.mindrecord`, each with its index `.db`. Their rows are `image` (the bytes of the
image's file, unchanged), `label` (its class's place in the manifest) and `name`, class/file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from retrain.data_images import EncodedImage, Rows, available_cores, decode
from space.errors import ConfigError
from space.files import write_atomically
from space.records import build, record, to_plain

MANIFEST = "mindrecord.json"
#: About 450 MB of ImageNet.
ROWS_PER_FILE = 4096
_ROWS_IN_MEMORY = 128
#: In the folder, beside its files.
_LOCK, _WRITING = ".lock", ".writing"

_SCHEMA = {"image": {"type": "bytes"}, "label": {"type": "int32"}, "name": {"type": "string"}}


@record
class RecordFile:
    """One MindRecord file that is finished.

    Attributes:
        name: Without the folder.
        part: `train` or `val`.
        rows: How many images.
        images: Hash of their names and sizes: says that it need not be written again.
        size_bytes: Of the file.
        sha256: Of the file.
        index_sha256: Of its index, the same name with .db added.
    """

    name: str
    part: str
    rows: int
    images: str
    size_bytes: int
    sha256: str
    index_sha256: str


@record
class Manifest:
    """What a folder of MindRecord files holds.

    Attributes:
        classes: Names in the order of the labels.
        counts: Part -> images of each class; the rows are sorted by class.
        record_files: In the order of their rows.
        finished: Whether all images are in.
    """

    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    record_files: tuple[RecordFile, ...]
    finished: bool

    def __post_init__(self) -> None:
        for part, counts in self.counts.items():
            rows = sum(file.rows for file in self.record_files if file.part == part)
            if len(counts) != len(self.classes) or (self.finished and rows != sum(counts)):
                raise ValueError(
                    f"counts must have one number for each of {len(self.classes)} classes, in all"
                    f" the {rows} rows of {part}, but has {len(counts)}, in all {sum(counts)}"
                )

    def labels(self, part: str) -> NDArray[np.int32]:
        """Return int32 (n,), the labels of a part's rows."""
        return np.repeat(np.arange(len(self.classes), dtype=np.int32), self.counts[part])

    def files(self, folder: Path, part: str) -> tuple[Path, ...]:
        """Return the paths of a part's files, in the order of their rows."""
        return tuple(folder / file.name for file in self.record_files if file.part == part)


@record
class Progress:
    """How far a conversion is.

    Attributes:
        images: Done, those of an earlier call included.
        total: Of all.
        seconds_left: Estimated; None before the first image of this call.
    """

    images: int
    total: int
    seconds_left: float | None


def load_manifest(folder: Path) -> Manifest:
    """Return what a folder holds, after a look at the files' sizes.

    Raises:
        ConfigError: It has no manifest, is unfinished, or a file is missing or has another size.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise ConfigError(
            f"data.path: {folder / MANIFEST} does not exist; make it with `mnas data to-mindrecord"
            f" SRC {folder}`."
        )
    if not manifest.finished:
        raise ConfigError(
            f"data.path: {folder} is unfinished; call `mnas data to-mindrecord SRC {folder}` once"
            " more."
        )
    for file in manifest.record_files:
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size_bytes or not _index(path).is_file():
            raise ConfigError(
                f"data.path: {path} must be there with {file.size_bytes:,} bytes and with its"
                f" index, but has {size or 0:,}; call `mnas data to-mindrecord SRC {folder}` once"
                " more."
            )
    return manifest


def record_stream(files: tuple[Path, ...], rows: Rows) -> Iterator[EncodedImage]:
    """Yield the images at these rows of some files, counted through, in the order of the rows."""
    import mindspore.dataset as ds

    if not len(rows):
        return
    folder = files[0].parent
    try:
        data = ds.MindDataset(
            [str(file) for file in files],
            columns_list=["image", "name"],
            sampler=ds.SubsetSampler(rows.tolist()),
            num_parallel_workers=1,
        )
        for image, name in data.create_tuple_iterator(num_epochs=1, output_numpy=True):
            yield EncodedImage(f"{name} of {folder}", image.tobytes())
    except RuntimeError as error:
        raise ConfigError(
            f"data.path: MindSpore cannot read {folder}: {str(error).splitlines()[0]}; call"
            f" `mnas data to-mindrecord SRC {folder}` to have damaged files written again."
        ) from None


# ---------------------------------------------------------------------------- writing


def to_mindrecord(
    classes: dict[str, dict[str, list[Path]]],
    out: Path,
    *,
    rows_per_file: int = ROWS_PER_FILE,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write images into MindRecord files, each image decoded once to see that it can be.

    A call after one that was killed goes on: files that hold the images they should, by name, size
    and checksum, stay as they are; all others are written again.

    Args:
        classes: Part (`train`, `val`) -> class -> its image files, sorted.
        out: A folder, new or of an earlier call.
        rows_per_file: Images in one file.
        on_progress: Called every 128 images.

    Raises:
        ConfigError: An image cannot be read, `out` is used by another process or for something
            else, or the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Beside them, a killed call may have left a half-written list.
        there = {path.name for path in out.iterdir() if path.suffix != ".tmp"}
        if there - {_LOCK, _WRITING} and MANIFEST not in there:
            raise ConfigError(
                f"{out}: must be a new folder or one of MindRecord files, but is neither."
            )
        with FileLock(out / _LOCK, timeout=0):
            return _write_all(classes, out, rows_per_file, on_progress)
    except Timeout:
        raise ConfigError(f"{out}: another process is writing into this folder.") from None
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}.") from None


def _write_all(
    classes: dict[str, dict[str, list[Path]]],
    out: Path,
    rows_per_file: int,
    on_progress: Callable[[Progress], None] | None,
) -> Manifest:
    names = tuple(sorted(classes["train"]))
    counts = {part: tuple(len(files[name]) for name in names) for part, files in classes.items()}
    before = _read_manifest(out)
    if before and before.classes != names and any(out.glob("*.mindrecord")):
        differing = sorted(set(before.classes) ^ set(names))[:5]
        raise ConfigError(
            f"{out}: holds MindRecord files of other classes, which differ in"
            f" {', '.join(differing)}; choose another folder."
        )
    if before is None or before.classes != names:
        # Before the first file: by it a later call knows the folder as its own.
        _save_manifest(out, Manifest(names, counts, (), False))
    known = {file.name: file for file in before.record_files} if before else {}
    clock = _Clock(sum(map(sum, counts.values())), on_progress)
    finished: list[RecordFile] = []
    for part, files_of in classes.items():
        rows = [(file, label) for label, name in enumerate(names) for file in files_of[name]]
        for number, start in enumerate(range(0, len(rows), rows_per_file)):
            chunk = rows[start : start + rows_per_file]
            file_name = f"{part}-{number:05d}.mindrecord"
            there = known.get(file_name)
            if there is not None and there.images == _images_hash(chunk) and _is_whole(out, there):
                finished.append(there)
                clock.advance(len(chunk), written=False)
                continue
            finished.append(_write_file(out, file_name, part, chunk, clock))
            known[file_name] = finished[-1]
            _save_manifest(out, Manifest(names, counts, tuple(known.values()), False))
    manifest = Manifest(names, counts, tuple(finished), True)
    _save_manifest(out, manifest)
    _remove_others(out, manifest)
    return manifest


class _Clock:
    """Counts images and tells how long the rest will take."""

    def __init__(self, total: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self._before = time.monotonic()
        self._done = 0
        self._written = 0
        self._writing_s = 0.0

    def advance(self, images: int, *, written: bool) -> None:
        now = time.monotonic()
        self._done += images
        # Files that are only checked take far less time.
        if written:
            self._written += images
            self._writing_s += now - self._before
        self._before = now
        if self._on_progress is None:
            return
        left = None
        if self._written:
            left = self._writing_s / self._written * (self._total - self._done)
        self._on_progress(Progress(self._done, self._total, left))


def _write_file(
    out: Path, name: str, part: str, rows: list[tuple[Path, int]], clock: _Clock
) -> RecordFile:
    # Under its own name in a folder of its own: the index holds the name.
    writing = out / _WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    path = writing / name
    index = _index(path)
    try:
        _write_rows(path, rows, clock)
    except RuntimeError as error:
        raise ConfigError(
            f"{out / name}: MindSpore cannot write it (is the disk full?):"
            f" {str(error).splitlines()[0]}"
        ) from None
    made = RecordFile(
        name=name,
        part=part,
        rows=len(rows),
        images=_images_hash(rows),
        size_bytes=path.stat().st_size,
        sha256=_sha256(path),
        index_sha256=_sha256(index),
    )
    for file in (path, index):
        _flush(file)
        # MindSpore makes them for their owner alone.
        file.chmod(0o644)
        file.replace(out / file.name)
    writing.rmdir()
    return made


def _write_rows(path: Path, rows: list[tuple[Path, int]], clock: _Clock) -> None:
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(path), shard_num=1)
    writer.add_schema(_SCHEMA, "images")
    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(rows), _ROWS_IN_MEMORY):
            some = rows[start : start + _ROWS_IN_MEMORY]
            contents = pool.map(_readable, [file for file, _ in some])
            writer.write_raw_data(
                [
                    {"image": content, "label": label, "name": _name(file)}
                    for content, (file, label) in zip(contents, some, strict=True)
                ]
            )
            clock.advance(len(some), written=True)
    writer.commit()


def _readable(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from None
    decode(EncodedImage(str(file), content), 3)
    return content


def _images_hash(rows: list[tuple[Path, int]]) -> str:
    digest = hashlib.sha256()
    for file, label in rows:
        try:
            found = file.stat()
        except OSError as error:
            raise _unreadable(file, error) from None
        # By size and time: an image that was replaced is packed anew, whatever its size.
        known = f"{_name(file)}\0{label}\0{found.st_size}\0{found.st_mtime_ns}\n"
        digest.update(known.encode())
    return digest.hexdigest()


def _unreadable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{file}: cannot be read: {error.strerror or error}.")


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.db")


def _is_whole(out: Path, file: RecordFile) -> bool:
    path = out / file.name
    return (
        path.is_file()
        and _index(path).is_file()
        and _sha256(path) == file.sha256
        and _sha256(_index(path)) == file.index_sha256
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_others(out: Path, manifest: Manifest) -> None:
    """Remove files of an earlier call with other images."""
    names = {file.name for file in manifest.record_files}
    for path in out.glob("*.mindrecord*"):
        if path.name.removesuffix(".db") not in names:
            path.unlink()


def _save_manifest(out: Path, manifest: Manifest) -> None:
    write_atomically(out / MANIFEST, json.dumps(to_plain(manifest), indent=1).encode())


def _read_manifest(out: Path) -> Manifest | None:
    path = out / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    return build(Manifest, values, where=str(path))
