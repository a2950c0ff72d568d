"""ImageNet's way in small: a model zoo recipe on 20 classes of JPEG files of every odd kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_folders import make_image_folder

from retrain.checkpoint import load_checkpoint
from retrain.data import load_data
from retrain.export import onnx_logits


def mnas(*arguments: str, status: int = 0) -> str:
    """Run `mnas`, check its exit status, return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "search", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if status else None,
        text=True,
        timeout=600,
        env={**os.environ, "GLOG_v": "3"},
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_zoo_recipe_trains_validates_and_exports_on_a_folder_of_photographs(
    tmp_path: Path,
) -> None:
    photographs = make_image_folder(tmp_path / "photographs", classes=20, train=10, val=7)
    data = ["--data_dir", str(photographs)]
    # Two epochs are 20 steps: batch norms' averages of the last 100 would be those of the start.
    small = ["epochs=2", "batch_size=16", "--scale_lr", "data.validation_images=40"]
    small += ["style.batch_norm_momentum=0.8"]
    out = tmp_path / "out"
    train = ["retrain", "-c", "mnasnet_0.5", *data, *small, "--out", str(out)]

    # One damaged file among them is named, by the check and by the training, which then goes on.
    damaged = photographs / "train" / "class07" / "3.jpg"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert str(damaged) in mnas("data", "check", str(photographs), status=2)
    assert str(damaged) in mnas(*train, status=2)
    damaged.write_bytes(whole)
    assert "2 epochs, 20 steps" in mnas(*train, "--resume")

    weights = ["--ckpt_path", str(out / "model.safetensors")]
    found = json.loads(mnas("validate", *weights, *data, "--split", "test", "--json"))
    assert found["images"] == 140
    graph = tmp_path / "model.onnx"
    mnas("export", *weights, *data, "--out", str(graph))
    training = load_checkpoint(out / "model.safetensors").training
    assert training is not None
    photos = load_data(training.recipe.data, 224, 3, training.recipe.augment)
    logits = onnx_logits(graph.read_bytes(), photos, photos.test, 32)
    right = logits.argmax(1) == photos.test.labels
    assert right.mean() == found["top1"]
    assert len(set(logits.argmax(1))) > 1  # not a network that says the same of every image
