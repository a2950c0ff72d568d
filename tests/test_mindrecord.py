"""MindRecord: the same images as the folder's, written once, whole, and checked."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from image_folders import make_image_folder
from PIL import Image

from retrain import data_cli, mindrecord
from retrain.data import class_names, load_data, train_batches
from retrain.data_config import AugmentConfig, DataConfig
from retrain.data_sources import class_folders
from retrain.mindrecord import MANIFEST, Manifest, Progress, to_mindrecord
from space.errors import ConfigError

RECIPE = AugmentConfig(scale=(0.1, 1.0), hflip=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images", classes=4, train=6, val=2)


def convert(folder: Path, out: Path, done: list[Progress] | None = None) -> Manifest:
    train, val = class_folders(folder)
    on_progress = None if done is None else done.append
    return to_mindrecord(
        {"train": train, "val": val}, out, rows_per_file=10, on_progress=on_progress
    )


def state(out: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.glob("*record*")
    }


def test_training_and_evaluation_see_the_same_as_in_the_folder(
    folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "out")
    from_folder, from_records = (
        load_data(DataConfig(name, path=str(path), validation_images=4), 16, 3, RECIPE)
        for name, path in (("image_folder", folder), ("mindrecord", tmp_path / "out"))
    )
    assert from_records.classes == from_folder.classes
    for part in ("train", "validation", "test"):
        assert np.array_equal(from_records.split(part).labels, from_folder.split(part).labels)
        assert np.array_equal(from_records.split(part).images, from_folder.split(part).images)
    batches = [
        list(train_batches(data, RECIPE, batch_size=4, seed=0, epoch=1, start_batch=1))
        for data in (from_folder, from_records)
    ]
    assert len(batches[0]) == 4
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(*batches, strict=True))


def test_files_are_as_many_as_needed_and_their_checksums_are_kept(
    folder: Path, tmp_path: Path
) -> None:
    done: list[Progress] = []
    manifest = convert(folder, tmp_path / "out", done)
    rows = [(file.part, file.rows) for file in manifest.record_files]
    assert rows == [("train", 10), ("train", 10), ("train", 4), ("val", 8)]
    assert manifest.counts == {"train": (6, 6, 6, 6), "val": (2, 2, 2, 2)}
    assert len({file.sha256 for file in manifest.record_files}) == 4
    assert [progress.images for progress in done] == [10, 20, 24, 32]
    assert done[0].seconds_left is not None
    assert done[-1].seconds_left == 0
    assert class_names(DataConfig("mindrecord", path=str(tmp_path / "out"))) == manifest.classes


def test_a_second_call_leaves_whole_files_alone_and_writes_damaged_or_missing_ones_again(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = convert(folder, out)
    before = state(out)
    assert convert(folder, out) == manifest
    assert {name: value for name, value in state(out).items() if name != MANIFEST} == {
        name: value for name, value in before.items() if name != MANIFEST
    }
    damaged = out / "train-00001.mindrecord"
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        file.write(b"damage")
    (out / "val-00000.mindrecord.db").unlink()
    convert(folder, out)
    changed = {name for name, value in state(out).items() if before.get(name) != value}
    assert changed - {MANIFEST} == {
        "train-00001.mindrecord", "train-00001.mindrecord.db", "val-00000.mindrecord",
        "val-00000.mindrecord.db",
    }  # fmt: skip


def test_after_kill_minus_9_the_same_call_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal; from pathlib import Path; from test_mindrecord import convert\n"
        "class Kill(list):\n"
        "    def append(self, progress):\n"
        "        if progress.images > 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert(Path({str(folder)!r}), Path({str(out)!r}), Kill())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=in_tests(), timeout=120)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(ConfigError, match="is unfinished; call `mnas data to-mindrecord"):
        class_names(DataConfig("mindrecord", path=str(out)))
    first = state(out)["train-00000.mindrecord"]
    done: list[Progress] = []
    assert convert(folder, out, done).finished
    assert state(out)["train-00000.mindrecord"] == first
    assert not (out / ".writing").exists()
    # What was there is counted, but not into the time that the rest takes.
    assert done[0] == Progress(10, 32, None)


def test_killed_before_the_first_file_was_listed_the_same_call_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = mindrecord._save_manifest, []

    def save_once(out: Path, manifest: Manifest) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(manifest)
        save(out, manifest)

    with monkeypatch.context() as patched:
        patched.setattr(mindrecord, "_save_manifest", save_once)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "train-00000.mindrecord").is_file()
    (tmp_path / "out" / f".{MANIFEST}.123.tmp").write_text("{")
    assert convert(folder, tmp_path / "out").finished


def in_tests() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "GLOG_v": "4"}


def test_an_unreadable_image_is_named_and_after_its_removal_the_call_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    damaged = folder / "train" / "class02" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"the image .*class02/1.jpg cannot be read"):
        convert(folder, out)
    first = state(out)["train-00000.mindrecord"]
    damaged.unlink()
    manifest = convert(folder, out)
    assert manifest.counts["train"] == (6, 6, 5, 6)
    assert state(out)["train-00000.mindrecord"] == first


def test_what_is_no_image_or_cannot_be_opened_is_named_and_nothing_else_blamed(
    folder: Path, tmp_path: Path
) -> None:
    file = folder / "train" / "class02" / "1.jpg"
    file.write_text("a thesis")
    with pytest.raises(ConfigError, match=r"class02/1.jpg cannot be read: it is no image that"):
        convert(folder, tmp_path / "out")
    train, val = class_folders(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"class02/1.jpg: cannot be read: No such file"):
        to_mindrecord({"train": train, "val": val}, tmp_path / "out")


def test_a_folder_with_something_else_or_in_use_is_left_alone(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be a new folder or one of MindRecord files"):
        convert(folder, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    out = tmp_path / "out"
    out.mkdir()
    # A call that was killed early leaves no more than this.
    (out / ".writing").mkdir()
    with FileLock(out / ".lock"), pytest.raises(ConfigError, match="another process is writing"):
        convert(folder, out)
    assert convert(folder, out).finished
    before = state(out)
    other_classes = make_image_folder(tmp_path / "more", classes=5, train=2)
    with pytest.raises(ConfigError, match="of other classes, which differ in class04; choose"):
        convert(other_classes, out)
    assert state(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / MANIFEST).unlink(), "mindrecord.json does not exist; make it with"),
        (lambda out: (out / MANIFEST).write_text("{"), "mindrecord.json: cannot be read"),
        (
            lambda out: (out / "val-00000.mindrecord").unlink(),
            r"must be there with .* has 0; call",
        ),
        (
            lambda out: os.truncate(out / "train-00000.mindrecord", 1000),
            r"train-00000.mindrecord must be there with [\d,]+ bytes and .* has 1,000; call",
        ),
    ],
)
def test_a_damaged_folder_of_records_is_named(
    folder: Path, tmp_path: Path, change: object, message: str
) -> None:
    convert(folder, tmp_path / "out")
    change(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig("mindrecord", path=str(tmp_path / "out")), 16, 3, RECIPE)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-m", "search", "data", "to-mindrecord", str(folder), str(out)],
        env=in_tests(),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        # The largest file may have 100,000 bytes: what a full disk looks like to MindSpore.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert ended.returncode == 2
    assert "train-00000.mindrecord: MindSpore cannot write it (is the disk full?)" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not list(out.glob("*.mindrecord"))


def test_the_command_writes_and_the_check_names_every_unreadable_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> str:
        data_cli.app(arguments, standalone_mode=False)
        return capsys.readouterr().out

    report = json.loads(call("to-mindrecord", str(folder), str(tmp_path / "out"), "--json"))
    assert (report["classes"], report["train_images"], report["val_images"]) == (4, 24, 8)
    assert "32 images of 4 classes can be read" in call("check", str(folder))
    for name in ("train/class00/0.jpg", "val/class03/1.jpg"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ConfigError, match="2 of 32 images cannot be read"):
        call("check", str(folder))
    named = capsys.readouterr().out
    assert "class00/0.jpg" in named
    assert "class03/1.jpg" in named


def test_an_image_that_was_replaced_by_one_as_large_is_packed_anew(
    folder: Path, tmp_path: Path
) -> None:
    image = sorted((folder / "train").rglob("*.*"))[0].with_suffix(".bmp")
    for value in (10, 200):
        Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(image)
        convert(folder, tmp_path / "out")
        data = load_data(DataConfig("mindrecord", path=str(tmp_path / "out")), 16, 3, RECIPE)
        seen = data.train.views(np.arange(len(data.train)))
        assert (seen.reshape(len(seen), -1) == value).all(axis=1).any()
        load_data.cache_clear()
        os.utime(image, ns=(1, 1))
