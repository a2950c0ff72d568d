"""Several workers: the same training as one process would do, and sentences where it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest
from boards import free_port
from retrain_parts import TINY, TINY_TEXT

from retrain.checkpoint import load_checkpoint
from retrain.commands import launch_command
from retrain.launch import launch, stands_by
from retrain.request import TrainRequest
from space.errors import ConfigError, Diverged
from space.parameters import initial_parameters

# 20 steps of 48 images; statistics are frozen, for each worker normalises with its own images.
RECIPE = """
data: {name: digits, validation_fraction: 0.2, train_images: 960}
epochs: 1
batch_size: 48
global_batch: 48
eval_batch_size: 100
optimizer: {name: sgd}
schedule: {learning_rate: 0.1}
dropout: 0.1
augment: {shift: 1}
batch_norm: frozen
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def retrain(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "retrain", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "GLOG_v": "3", **variables},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_take_the_steps_that_one_process_takes(tmp_path: Path, recipe: str) -> None:
    reports = {}
    for name, more in (("one", ("--threads", "1")), ("two", ("--workers", "2", "batch_size=24"))):
        out = str(tmp_path / name)
        done = retrain(
            "--config", recipe, "--arch", TINY_TEXT, "--out", out, "--json", *more
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        reports[name] = json.loads(done.stdout.strip().splitlines()[-1])
    assert "global batch 48 (24 images x 2 workers)" in done.stderr
    one, two = reports["one"], reports["two"]
    assert (one["steps"], two["steps"], one["workers"], two["workers"]) == (20, 20, 1, 2)
    assert one["global_batch"] == two["global_batch"] == 48
    weights = [load_checkpoint(tmp_path / name / "model.safetensors").weights for name in reports]
    start = initial_parameters(TINY, 0)
    moved = max(np.abs(weights[0][n] - start[n]).max() for n in start)
    difference = max(np.abs(weights[0][n] - weights[1][n]).max() for n in start)
    print(
        f"largest difference {difference:.2g}; images/s: one {one['images_per_s']:.0f},"
        f" two {two['images_per_s']:.0f}"
    )
    assert moved > 1e-2
    assert difference <= 1e-5
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["validation_accuracy"] == one["validation_accuracy"]
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_first_worker_refuses_is_said_once_and_ends_the_others(
    tmp_path: Path, recipe: str
) -> None:
    (tmp_path / "recipe.yaml").rename(tmp_path / "given.yaml")
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("{}")
    done = retrain(
        "--config", str(tmp_path / "given.yaml"), "--arch", TINY_TEXT, "--workers", "2", "--out",
        str(out),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().startswith(f"retrain: {out}: holds a finished training already")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_of_the_command_leaves_no_worker(tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "retrain", "--config", recipe, "--arch", TINY_TEXT, "--out",
         str(out), "--workers", "2", "batch_size=24", "epochs=100000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "GLOG_v": "3"},
    )  # fmt: skip
    try:
        wait_until(lambda: len(processes_of(out)) >= 4, 60)  # the command, msrun, two workers
        wait_until((out / "recipe.yaml").exists, 120)
    finally:
        process.kill()
        process.wait(10)
    wait_until(lambda: not processes_of(out), 30)


# One of two workers diverges; the other one is interrupted for it, and says so.
MSRUN = """#!{python}
import pathlib, sys, time
logs = pathlib.Path(sys.argv[sys.argv.index("--log_dir") + 1])
(logs / "worker_1.log").write_text("retrain[3]: diverged: the loss was nan at step 3\\n")
try:
    time.sleep(60)
except KeyboardInterrupt:
    (logs / "worker_0.log").write_text("retrain[130]: stopped; go on with --resume.\\n")
    sys.exit(1)
"""


def test_a_worker_that_diverges_ends_the_training_as_one_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    msrun = tmp_path / "msrun"
    msrun.write_text(MSRUN.format(python=sys.executable))
    msrun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Diverged, match=r"^diverged: the loss was nan at step 3$"):
        launch(2, ["train"], tmp_path / "logs", print)
    assert "stopped" in (tmp_path / "logs" / "worker_0.log").read_text()


@pytest.mark.parametrize("lock", [".lock", ".launch.lock"])
def test_a_second_launch_leaves_the_first_ones_folder_alone(
    tmp_path: Path, recipe: str, lock: str
) -> None:
    log = tmp_path / "workers" / "worker_0.log"
    log.parent.mkdir()
    log.write_text("epoch 1 of 3\n")
    request = TrainRequest(recipe, TINY_TEXT, out=tmp_path, resume=True)
    with (
        filelock.FileLock(tmp_path / lock),
        pytest.raises(ConfigError, match="another process is training into this folder"),
    ):
        launch_command(request, 2, on_line=print)
    assert log.read_text() == "epoch 1 of 3\n"


@pytest.mark.parametrize(
    ("environment", "stands"),
    [
        ({}, False),
        ({"RANK_ID": "3"}, False),
        ({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "1"}, True),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_ID": "0"}, False),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_ID": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True),
    ],
)
def test_where_one_process_trains_the_launchers_others_stand_by(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *, stands: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert stands_by() == stands


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_process_trains_whatever_msrun_starts(tmp_path: Path, recipe: str) -> None:
    out, scripts = tmp_path / "out", Path(sys.executable).parent
    msrun = [
        str(scripts / "msrun"), "--worker_num", "2", "--local_worker_num",
        "2", "--master_port", str(free_port()), "--log_dir", str(tmp_path / "logs"), "--join",
        "True",
        "python", "-m", "retrain", "--config", recipe, "--arch", TINY_TEXT, "--out", str(out),
        "--threads", "1", "--distribute", "False", "epochs=1",
    ]  # fmt: skip
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "GLOG_v": "3", "PATH": path}
    done = subprocess.run(msrun, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert (result["workers"], result["global_batch"]) == (1, 48)


def processes_of(out: Path) -> list[int]:
    """The processes on whose command lines a training's folder stands."""
    running = psutil.process_iter(["cmdline"])
    return [p.pid for p in running if str(out) in (p.info["cmdline"] or [])]


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (("--distribute", "True"), {}, "--distribute: must be left out or False for a single"),
        ((), {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun: starts workers on Ascend only"),
        (("--distribute", "yes"), {}, "--distribute: must be True or False, but got 'yes'"),
        (("--workers", "1"), {}, "--workers: must be >= 2, but got 1; leave it out for one"),
    ],
)
def test_workers_that_cannot_work_together_get_a_sentence(
    recipe: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    sentence: str,
) -> None:
    asked = ("--config", recipe, "--arch", TINY_TEXT, "--out", str(tmp_path / "out"))
    done = retrain(*asked, *arguments, **variables)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()
