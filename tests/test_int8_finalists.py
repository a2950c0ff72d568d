"""With an int8 device, finalists are chosen by their accuracy in int8, and every page says so."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from campaigns import mnas, write_synthetic

from search.config import load_campaign_config
from search.engine import CampaignOutcome, resume, start
from search.finalists import HandOver
from search.store import Store
from search.trial import Trial
from space.errors import TrialFailed

#: Trial -> accuracy of its full training in float32 and in int8.
ACCURACIES = {0: (0.95, 0.30), 1: (0.90, 0.89)}


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Room:
    """Stands in for the retrain room's commands: no training, the accuracies above."""

    def __init__(self) -> None:
        self.called: list[list[str]] = []

    def run(self, arguments: Sequence[str]) -> list[str]:
        self.called.append(list(arguments))
        given = dict(itertools.pairwise(arguments))
        folder = Path(given["--out"] if arguments[0] == "train" else given["--ckpt_path"])
        float32, int8 = next(
            pair for trial, pair in ACCURACIES.items() if f"trial_{trial}" in str(folder)
        )
        if arguments[0] == "train":
            folder.mkdir()
            result = {
                "validation_accuracy": float32, "weights": "model.ckpt", "accuracies": [float32],
                "losses": [0.5], "epochs": 1, "seconds": 3.0, "images_per_s": 90.0, "workers": 1,
                "global_batch": 64, "resumed_at_epoch": 0,
            }  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result))
            (folder / "model.ckpt").write_bytes(b"weights")
            return []
        if arguments[0] == "validate":
            top1 = int8 if "--onnx" in arguments else float32
            return [json.dumps({"top1": top1 - 0.01, "images": 360})]
        out = Path(given["--out"])
        out.write_bytes(f"{folder} {out.name}".encode())
        return [json.dumps({"exported_top1": int8, "max_abs_difference": 0.0})]


def campaign(
    folder: Path, precision: str, *overrides: str
) -> tuple[CampaignOutcome, Path, list[Trial]]:
    """A campaign of two trials, both handed over."""
    device = f"{{name: here, kind: onnxruntime, attempts: 1, precision: {precision}}}"
    path = write_synthetic(folder, trials=2, fail_share=0.0)
    config = load_campaign_config(
        str(path), [f"device={device}", "retrain={top: 2, recipe: digits}", *overrides]
    )
    outcome = start(config, folder / "run")
    store = Store(folder / "run" / "campaign.db", read_only=True)
    finalists = store.trials(role="finalist")
    store.close()
    return outcome, folder / "run", sorted(finalists, key=lambda trial: trial.finalist_of or 0)


def the_winner(outcome: CampaignOutcome) -> dict[str, Any]:
    assert outcome.winner is not None
    return outcome.winner


@pytest.mark.slow
def test_on_an_int8_device_the_int8_accuracy_chooses_and_every_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room()
    monkeypatch.setattr(HandOver, "_run", lambda _, arguments: room.run(arguments))
    outcome, folder, finalists = campaign(tmp_path, "int8")
    for trial, (float32, int8) in zip(finalists, ACCURACIES.values(), strict=True):
        assert trial.metrics is not None
        assert trial.parts is not None
        assert (trial.accuracy, trial.metrics["int8_accuracy"]) == (float32, int8)
        assert trial.parts.accuracy == int8
        assert trial.reward == pytest.approx(int8 * trial.parts.factor)

    winner = the_winner(outcome)
    assert winner["trial"] == 1
    assert (winner["validation_accuracy"], winner["test_accuracy"]) == (0.90, 0.89)
    assert (winner["int8_validation_accuracy"], winner["int8_test_accuracy"]) == (0.89, 0.88)
    # What was chosen and tested is what is handed over.
    quantized = folder / "finalists" / "trial_1" / "model_int8.onnx"
    tested = [command for command in room.called if "test" in command]
    assert [str(quantized) in command for command in tested] == [False, True]
    assert (folder / winner["onnx_int8"]).read_bytes() == quantized.read_bytes()
    assert winner["onnx_int8"] == "export/model_int8.onnx"

    said = "chosen by its accuracy in int8; test accuracy 0.8800 in int8, 0.8900 in float32"
    assert said in mnas("status", str(folder)).stdout
    assert "latency in int8, accuracy in float32" in " ".join(
        mnas("top", str(folder)).stdout.split()
    )
    page = (folder / "report.html").read_text()
    assert "0.8800 accuracy in int8 and 0.8900 in float32 on the test set of 360 images" in page
    assert "the choice by accuracy in int8 on held-out images" in page
    assert "from the training set, in float32; latency is measured on here in int8" in page
    assert "test accuracy in int8" in page
    assert ", accuracy in int8" in page


@pytest.mark.slow
def test_finalists_are_trained_by_as_many_workers_as_the_campaign_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room()
    monkeypatch.setattr(HandOver, "_run", lambda _, arguments: room.run(arguments))
    campaign(tmp_path, "float32", "retrain.workers=4")
    trained = [dict(itertools.pairwise(c)) for c in room.called if c[0] == "train"]
    assert [given["--workers"] for given in trained] == ["4", "4"]
    # msrun's processes share the machine's threads.
    assert all("--threads" not in given for given in trained)


@pytest.mark.slow
def test_a_training_that_failed_by_the_machine_s_fault_is_tried_again_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room()

    def broken(_: HandOver, arguments: Sequence[str]) -> list[str]:
        raise TrialFailed("no NPU is here", cause="infrastructure")

    monkeypatch.setattr(HandOver, "_run", broken)
    outcome, folder, finalists = campaign(tmp_path, "float32", "retrain.workers=8")
    assert outcome.winner is None
    assert [trial.outcome for trial in finalists] == ["failed", "failed"]
    monkeypatch.setattr(HandOver, "_run", lambda _, arguments: room.run(arguments))
    assert the_winner(resume(folder, ["retrain.workers=2"]))["trial"] == 0
    trained = [dict(itertools.pairwise(c)) for c in room.called if c[0] == "train"]
    assert [given["--workers"] for given in trained] == ["2", "2"]
    # What was trained is not trained again.
    called = len(room.called)
    assert the_winner(resume(folder))["trial"] == 0
    assert not [c for c in room.called[called:] if c[0] == "train"]


@pytest.mark.slow
def test_on_a_float32_device_nothing_is_quantized_or_said_of_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room()
    monkeypatch.setattr(HandOver, "_run", lambda _, arguments: room.run(arguments))
    outcome, folder, finalists = campaign(tmp_path, "float32")
    winner = the_winner(outcome)
    assert winner["trial"] == 0
    assert not [key for key in winner if "int8" in key]
    assert not [command for command in room.called if "--int8" in command or "--onnx" in command]
    assert all("int8_accuracy" not in (trial.metrics or {}) for trial in finalists)
    for command in ("status", "top"):
        assert "int8" not in mnas(command, str(folder)).stdout
    assert "latency is measured on here." in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_finalist_is_trained_quantized_tested_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOG_v", "3")
    recipe = "{top: 1, threads: 1, recipe: {data: {name: digits}, epochs: 1, batch_size: 32}}"
    outcome, folder, (finalist,) = campaign(tmp_path, "int8", "stop.trials=1", f"retrain={recipe}")
    winner = the_winner(outcome)
    assert finalist.metrics is not None
    assert finalist.metrics["int8_accuracy"] == winner["int8_validation_accuracy"]
    assert winner["test_images"] > 300
    assert 0 <= winner["int8_test_accuracy"] <= 1
    sizes = [os.path.getsize(folder / winner[key]) for key in ("onnx_int8", "onnx")]
    assert sizes[0] < sizes[1]
    model = onnx.load(folder / winner["onnx_int8"])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["architecture"] == winner["architecture"]
    assert float(metadata["int8_validation_accuracy"]) == winner["int8_validation_accuracy"]
