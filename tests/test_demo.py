"""Half the demo's campaign, with another seed: search, full training, test, export, report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from campaigns import mnas

from retrain.config import DataConfig
from retrain.data import load_data
from search.store import Store
from space.architecture import parse_architecture


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_digits_campaign_finds_trains_tests_and_exports_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A busy machine needs four times as long as a quiet one.
    command = ["search", "digits", "seed=1", "stop.trials=12", "--out", str(folder), "--json"]
    done = mnas(*command, timeout_s=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["trials"] == 12

    store = Store(folder / "campaign.db", read_only=True)
    trials = store.trials(role="search")
    assert len({trial.architecture_hash for trial in trials}) >= 8
    assert len(store.updates()) == 3
    for trial in trials:
        if trial.outcome == "completed":
            measurement = store.measurement(trial.measurement_ids[0])
            assert trial.latency_ms == measurement.median_ms
            assert len(measurement.samples_ms) >= 15
    store.close()

    winner = outcome["winner"]
    assert winner["test_accuracy"] >= 0.97
    assert winner["onnx_max_abs_difference"] <= 1e-4
    assert (folder / winner["weights"]).exists()
    assert (folder / "report.html").stat().st_size < 20 * 2**20

    # The exported file alone gives the accuracy on the test images.
    model = onnx.load(folder / winner["onnx"])
    described = {entry.key: entry.value for entry in model.metadata_props}
    network = parse_architecture(described["architecture"])
    data = load_data(DataConfig("digits"), network.resolution, network.input_channels)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": data.normalise(data.test.images)})[0]
    accuracy = float(np.mean(logits.argmax(axis=1) == data.test.labels))
    assert accuracy == pytest.approx(winner["test_accuracy"], abs=1e-9)

    # Its weights can be exported again, and evaluated by hand.
    again = mnas("export", str(folder), "--json", timeout_s=200)
    assert again.returncode == 0, again.stderr[-2000:]
    validated = mnas("validate", "--ckpt_path", str(folder / winner["weights"]), "--json")
    assert json.loads(validated.stdout.splitlines()[-1])["top1"] == winner["validation_accuracy"]
