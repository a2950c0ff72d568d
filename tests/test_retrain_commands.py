"""Commands: a folder per training, never overwritten; evaluation; export; the command line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import onnx
import psutil
import pytest
from campaigns import mnas_here
from retrain_parts import TINY, TINY_RECIPE, TINY_TEXT

import retrain.__main__
from retrain import commands, export
from retrain.checkpoint import load_checkpoint, load_state, save_checkpoint
from retrain.commands import export_command, validate_command
from retrain.config import load_recipe
from retrain.confusion import confusion_png, count_confusions
from retrain.folder import TrainReport
from retrain.request import TrainRequest
from retrain.start import network_for
from space.errors import ConfigError, MnasError
from space.records import build, to_plain

QUIET = {**os.environ, "GLOG_v": "3"}


def train_command(config: str, arch: str | None = None, **asked: Any) -> TrainReport:
    report = commands.train_command(TrainRequest(config, arch, **asked))
    assert report is not None
    return report


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def folder(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train_command(recipe, TINY_TEXT, out=out, seed=2, threads=1)
    return out


def test_a_trainings_folder_holds_what_was_asked_and_what_came_out(
    folder: Path, recipe: str
) -> None:
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml", "architecture.txt", "model.safetensors", "best.safetensors", "result.json",
        "train.log",
    }  # fmt: skip
    assert load_recipe(str(folder / "recipe.yaml")) == load_recipe(recipe)
    assert (folder / "architecture.txt").read_text() == TINY.text + "\n"
    assert "epoch 3 of 3" in (folder / "train.log").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() == {field.name for field in dataclasses.fields(TrainReport)}
    checkpoint = load_checkpoint(folder / "model.safetensors")
    training = checkpoint.training
    assert training is not None
    assert training.validation_accuracy == result["validation_accuracy"]
    assert (checkpoint.architecture, training.seed, training.epochs) == (TINY, 2, 3)
    assert checkpoint.style == training.recipe.style


def test_the_last_epochs_and_the_best_are_kept_as_they_were_evaluated(
    tmp_path: Path, recipe: str
) -> None:
    out = tmp_path / "out"
    report = train_command(
        recipe, TINY_TEXT, out=out, threads=1, tensorboard=True,
        overrides=("checkpoints={keep_last: 2, format: ckpt}",),
    )  # fmt: skip
    epochs = {path.name for path in (out / "checkpoints").iterdir()}
    assert epochs == {"epoch_0002.ckpt", "epoch_0003.ckpt"}
    best = load_checkpoint(out / "best.ckpt").training
    assert best is not None
    assert best.validation_accuracy == max(report.accuracies)
    assert best.epochs == report.accuracies.index(max(report.accuracies)) + 1
    assert report.weights == "model.ckpt"
    last, model = (load_checkpoint(out / n) for n in ("checkpoints/epoch_0003.ckpt", "model.ckpt"))
    assert all(np.array_equal(last.weights[n], v) for n, v in model.weights.items())
    assert validate_command(out / "model.ckpt", threads=1).top1 == report.validation_accuracy
    (events,) = (out / "curves").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"loss/train", b"accuracy/validation"))


def test_the_best_weights_are_kept_before_the_state_says_so(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, saved: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(commands, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        train_command(recipe, TINY_TEXT, out=tmp_path / "out", threads=1)
    best = load_checkpoint(tmp_path / "out" / "best.safetensors").training
    assert best is not None
    assert best.epochs == 1


def test_a_full_disk_ends_a_training_in_a_sentence_that_says_how_to_go_on(
    tmp_path: Path, recipe: str
) -> None:
    done = subprocess.run(
        started(recipe, tmp_path / "out"),
        capture_output=True,
        text=True,
        timeout=200,
        env=QUIET,
        # The largest file may have 8,000 bytes: the state has more.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000)),
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("retrain: cannot read or write: ")
    assert last.endswith("make room and go on with the same command and --resume.")
    assert "Traceback" not in done.stderr


def test_a_confusion_matrix_counts_every_image_and_is_drawn(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plots" / "confusion.png"
    report = validate_command(folder / "model.safetensors", confusion_matrix=path, threads=1)
    assert report.confusion_matrix == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    counts = count_confusions(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert confusion_png(counts, ["$5 to $10", "\N{CJK UNIFIED IDEOGRAPH-72D7}", "_x^"])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ConfigError, match=r"--confusion_matrix: must end in \.png"):
        validate_command(folder / "model.safetensors", confusion_matrix=tmp_path / "m.jpg")


def test_a_finished_training_is_not_overwritten(folder: Path, recipe: str) -> None:
    before = (folder / "result.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a finished training already"):
        train_command(recipe, TINY_TEXT, out=folder, seed=2, threads=1)
    assert (folder / "result.json").read_bytes() == before


def test_resuming_a_finished_training_returns_its_report(folder: Path, recipe: str) -> None:
    report = train_command(recipe, TINY_TEXT, out=folder, seed=2, threads=1, resume=True)
    assert to_plain(report) == json.loads((folder / "result.json").read_text())


def test_resuming_as_another_training_lists_every_difference(folder: Path, recipe: str) -> None:
    other = TINY_TEXT.replace("head48", "head24")
    with pytest.raises(ConfigError) as caught:
        train_command(
            recipe, other, out=folder, seed=3, resume=True, overrides=("optimizer.momentum=0.8",)
        )
    for part in ("architecture is", "seed is 2, not 3", "optimizer.momentum is 0.9, not 0.8"):
        assert part in str(caught.value)


def test_an_unfinished_training_is_only_touched_to_resume_it(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"holds an unfinished training already \(recipe.yaml\)"):
        train_command(recipe, TINY_TEXT, out=tmp_path)


def test_a_training_that_stopped_before_its_first_step_may_be_corrected(
    tmp_path: Path, recipe: str
) -> None:
    out, settings = tmp_path / "out", ("epochs=1", "frozen_stages=99")
    with pytest.raises(ConfigError, match="frozen_stages"):
        train_command(recipe, TINY_TEXT, out=out, threads=1, overrides=settings)
    assert (out / "recipe.yaml").exists()
    assert (
        train_command(recipe, TINY_TEXT, out=out, threads=1, overrides=("epochs=1",)) is not None
    )


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path: Path, recipe: str) -> None:
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(ConfigError, match="another process is training into this folder"),
    ):
        train_command(recipe, TINY_TEXT, out=tmp_path)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be used as a folder"):
        train_command(recipe, TINY_TEXT, out=tmp_path / "file")


def test_a_published_network_gets_the_datas_classes_and_channels(recipe: str) -> None:
    network = network_for("mnasnet-a1", load_recipe(recipe), resolution=32)
    assert (network.classes, network.input_channels, network.resolution) == (10, 1, 32)
    assert network_for(TINY_TEXT, load_recipe(recipe)) == TINY


# ---------------------------------------------------------------------------- validate, export


def test_validating_a_checkpoint_gives_the_accuracy_of_its_training(folder: Path) -> None:
    report = validate_command(folder / "model.safetensors", threads=1)
    result = json.loads((folder / "result.json").read_text())
    assert report.top1 == result["validation_accuracy"]
    assert report.loss == pytest.approx(result["validation_loss"], rel=1e-5)
    assert report.images == result["validation_images"]


def test_the_test_split_is_another_one(folder: Path) -> None:
    report = validate_command(folder / "model.safetensors", split="test", threads=1)
    assert (report.split, report.images) == ("test", 364)
    assert report.per_class_top1.keys() == set("0123456789")


def test_images_that_a_training_did_not_hold_out_are_told_of(folder: Path, tmp_path: Path) -> None:
    assert validate_command(folder / "model.safetensors", threads=1).note is None
    other = tmp_path / "other.yaml"
    other.write_text(TINY_RECIPE.replace("0.2}", "0.3}"))
    report = validate_command(folder / "model.safetensors", config=str(other), threads=1)
    assert report.note is not None
    assert "holds out other images" in report.note


def test_another_split_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--split: must be validation or test, but got 'train'"):
        validate_command(folder / "model.safetensors", split="train")  # type: ignore[arg-type]


def test_a_data_folder_for_digits_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--data_dir: path must be left out for digits"):
        validate_command(folder / "model.safetensors", data_dir="/somewhere")


def test_a_data_set_of_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder / "model.safetensors")
    renamed = dataclasses.replace(checkpoint, classes=("zero", *checkpoint.classes[1:]))
    save_checkpoint(tmp_path / "m", renamed)
    with pytest.raises(ConfigError, match=r"classes must be those of the checkpoint.* 0, zero"):
        validate_command(tmp_path / "m")


def test_weights_without_a_training_need_a_recipe_for_the_data(
    folder: Path, tmp_path: Path, recipe: str
) -> None:
    checkpoint = load_checkpoint(folder / "model.safetensors")
    path = tmp_path / "m"
    save_checkpoint(path, dataclasses.replace(checkpoint, training=None, classes=()))
    with pytest.raises(ConfigError, match=r"holds weights from elsewhere.*--config RECIPE"):
        validate_command(path)
    with pytest.raises(ConfigError, match=r"holds weights from elsewhere.*--config RECIPE"):
        export_command(path, tmp_path / "model.onnx")
    result = json.loads((folder / "result.json").read_text())
    # The recipe's style is another one: the checkpoint's counts.
    other = tmp_path / "other.yaml"
    style = "style: {batch_norm_epsilon: 0.5, padding: symmetric}"
    other.write_text(TINY_RECIPE.replace("style: {batch_norm_momentum: 0.8}", style))
    report = validate_command(path, config=str(other), split="validation", threads=1)
    assert report.top1 == result["validation_accuracy"]
    assert report.note is not None
    assert "come from elsewhere" in report.note
    # Nobody held our validation images out from their training.
    assert validate_command(path, config=str(other), threads=1).split == "test"
    assert report.per_class_top1.keys() == set("0123456789")
    exported = export_command(path, tmp_path / "model.onnx", config=recipe, threads=1)
    assert exported.mindspore_top1 == result["validation_accuracy"]


def test_an_exported_graph_is_the_trained_network(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model.onnx"
    report = export_command(folder / "model.safetensors", out, threads=1)
    assert report.max_abs_difference <= 1e-4
    assert report.exported_top1 == report.mindspore_top1
    assert report.size_bytes == out.stat().st_size
    result = json.loads((folder / "result.json").read_text())
    assert report.mindspore_top1 == result["validation_accuracy"]
    model = onnx.load(out)
    onnx.checker.check_model(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == list("0123456789")
    assert json.loads(metadata["normalisation"]).keys() == {"mean", "deviation"}
    assert float(metadata["validation_accuracy"]) == result["validation_accuracy"]


def test_an_export_is_not_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"is there already.*--overwrite"):
        export_command(folder / "model.safetensors", out)
    assert out.read_bytes() == b"mine"
    export_command(folder / "model.safetensors", out, overwrite=True, threads=1)
    onnx.checker.check_model(onnx.load(out))


def test_a_graph_that_differs_is_never_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.onnx_logits

    def wrong(*arguments: object, **names: object) -> np.ndarray:
        return right(*arguments, **names) + np.float32(0.1)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "onnx_logits", wrong)
    with pytest.raises(MnasError, match=r"must be within .* of MindSpore's.*nothing was written"):
        export_command(folder / "model.safetensors", tmp_path / "m.onnx", threads=1)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- command line


def run(*arguments: str, status: int = 0, cwd: Path | None = None) -> str:
    """Run `python -m retrain`, check its exit status, return standard output or error."""
    done = subprocess.run(
        [sys.executable, "-m", "retrain", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=QUIET,
        cwd=cwd,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.mark.slow
def test_the_command_line_trains_validates_and_exports(tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    printed = run(
        "train", "--config", recipe, "--arch", TINY_TEXT, "--out", str(out), "--seed", "1",
        "--threads", "1", "--json", "epochs=1",
    )  # fmt: skip
    report = json.loads(printed)
    assert printed.count("\n") == 1
    assert report["epochs"] == 1
    weights = str(out / "model.safetensors")
    validated = json.loads(run("validate", "--ckpt_path", weights, "--json"))
    assert validated["top1"] == report["validation_accuracy"]
    exported = run("export", "--ckpt_path", weights, "--out", str(tmp_path / "m.onnx"))
    assert "largest difference" in exported


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--config", "digits"), "--arch: must name a network"),
        (("--config", "digit", "--arch", TINY_TEXT), "did you mean 'digits'?"),
        (("--config", "digits", "--arch", "mnasnet-a"), "did you mean 'mnasnet-a"),
        (("--config", "digits", "--arch", TINY_TEXT, "epoch=3"), "did you mean 'epochs'?"),
        (("--config", "digits", "--arch", TINY_TEXT, "--threads", "0"), "--threads: must be >= 1"),
        (("--config", "digits", "--arch", TINY_TEXT, "--seed", "-1"), "--seed: must be in"),
        (
            ("--config", "fashion_mnist", "--arch", TINY_TEXT, "--data_dir", "/none"),
            "dataset-fashion-mnist",
        ),
        (("--config", "digits", "--arch", TINY_TEXT.replace("c10", "c7")), "the network has 7"),
    ],
)
def test_bad_input_ends_in_a_sentence_and_status_2(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    done = mnas_here("train", *arguments, cwd=tmp_path, main=retrain.__main__.main)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("retrain: ")


def test_a_training_that_diverges_ends_in_a_sentence_and_status_3(
    tmp_path: Path, recipe: str
) -> None:
    out = tmp_path / "out"
    command = started(recipe, out, "schedule.learning_rate=1000", "optimizer.weight_decay=1.0")
    complaint = run(*command[3:], "optimizer.name=sgd", status=3)
    assert complaint.strip().splitlines()[-1].startswith("retrain: diverged: ")
    assert not (out / "result.json").exists()


def started(recipe: str, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "retrain", "train", "--config", recipe, "--arch", TINY_TEXT, "--out",
        str(out), "--threads", "1", *more,
    ]  # fmt: skip


def wait_until(happened: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end, if it has not ended."""
    process = subprocess.Popen(
        command, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def killed_and_resumed(
    recipe: str, tmp_path: Path, *changes: str
) -> tuple[TrainReport, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A training killed within an epoch: its report, its weights, those of an unbroken one."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    # 35 steps an epoch.
    asked = ["epochs=4", "checkpoints.every_steps=9", *changes]
    command = started(recipe, out, *asked)

    def within_an_epoch() -> bool:
        try:
            return load_state(out / "state.safetensors").state.step % 35 > 0
        except ConfigError:
            return False

    with running(command) as process:
        wait_until(within_an_epoch)
        process.send_signal(signal.SIGKILL)
    assert not (out / "result.json").exists()
    resumed = json.loads(run(*command[3:], "--resume", "--json"))
    run(*started(recipe, whole, *asked)[3:])
    weights = [load_checkpoint(folder / "model.safetensors").weights for folder in (out, whole)]
    unbroken = json.loads((whole / "result.json").read_text())
    assert len(resumed["losses"]) == len(unbroken["losses"]) == 4
    return build(TrainReport, resumed, where="resumed"), weights[0], weights[1]


@pytest.mark.slow
def test_a_training_killed_within_an_epoch_ends_bit_by_bit_as_an_unbroken_one(
    tmp_path: Path, recipe: str
) -> None:
    report, resumed, unbroken = killed_and_resumed(
        recipe, tmp_path, "optimizer.name=sgd", "schedule.learning_rate=0.1"
    )
    for name, value in unbroken.items():
        assert np.array_equal(resumed[name], value), name
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert list(report.losses) == whole["losses"]
    assert list(report.accuracies) == whole["accuracies"]


@pytest.mark.slow
def test_with_rmsprop_a_killed_training_ends_near_the_unbroken_one(
    tmp_path: Path, recipe: str
) -> None:
    # MindSpore's kernel on a CPU is not exact; see retrain/optimizer.py.
    report, resumed, unbroken = killed_and_resumed(recipe, tmp_path)
    differences = {n: float(np.abs(resumed[n] - v).max()) for n, v in unbroken.items()}
    for kind, found in (
        ("statistic", {n: d for n, d in differences.items() if ".moving_" in n}),
        ("weight", {n: d for n, d in differences.items() if ".moving_" not in n}),
    ):
        name = max(found, key=lambda n: found[n])
        largest = np.abs(unbroken[name]).max()
        print(f"largest difference of a {kind}: {found[name]:.3g} of {largest:.3g} in {name}")
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert report.losses[-1] == pytest.approx(whole["losses"][-1], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_in_order_with_a_word_how_to_go_on(
    tmp_path: Path, recipe: str, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    with running(started(recipe, out, "epochs=2000")) as process:
        wait_until((out / "state.safetensors").exists)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaint.strip().endswith("--resume.")
    assert "Traceback" not in complaint


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(
    sys.argv[1:],
    env={**os.environ, "MNAS_PARENT_PID": str(os.getpid())},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
print(child.pid, flush=True)
time.sleep(300)
"""


def test_a_training_dies_with_its_parent(tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    command = started(recipe, out, "epochs=100000")
    with running([sys.executable, "-c", PARENT, *command]) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until((out / "recipe.yaml").exists)
        assert psutil.pid_exists(child)
    wait_until(lambda: not psutil.pid_exists(child), 60)


def test_a_training_whose_parent_is_gone_already_does_not_begin(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUIET, "MNAS_PARENT_PID", "1")
    run("train", "--config", recipe, "--arch", TINY_TEXT, "--out", str(tmp_path / "o"), status=1)
    assert not (tmp_path / "o").exists()


def test_help_loads_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['retrain', '--help']\n"
        "from retrain.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'mindspore', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_the_default_folder_names_recipe_network_and_seed(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        train_command(recipe, TINY_TEXT, seed=9)
    assert (tmp_path / "runs" / f"retrain-tiny-{TINY.hash[:8]}-seed9" / "recipe.yaml").exists()
