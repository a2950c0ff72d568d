"""int8: quantized files of the paper's networks run, and the identity says what was used."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from latency.config import OnnxRuntimeConfig
from latency.device import make_meter
from latency.int8 import calibration_images, int8_model
from space.architecture import Architecture, parse_architecture
from space.errors import ConfigError, MeasurementError
from space.mnasnet import adapt, published
from space.onnx_graph import INPUT_NAME, onnx_model
from space.search_space import load_space

SMALL = parse_architecture(
    "stem8_s11 | r1_k3_s11_e1_i8_o8 | r2_k3_s22_e3_i8_o16_se0.25 | head32 | r16 | c10 | in1"
)


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(calibration: str | None = None, *, precision: str = "int8") -> OnnxRuntimeConfig:
    return OnnxRuntimeConfig(
        "here", "onnxruntime", effort="quick", attempts=1,
        precision=precision, calibration=calibration,  # type: ignore[arg-type]
    )  # fmt: skip


def images_in(path: Path, shape: tuple[int, ...] = (3, 1, 16, 16), seed: int = 1) -> str:
    np.save(path, np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    return str(path)


def logits(model: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {INPUT_NAME: images})[0]
    return found


def correlation(architecture: Architecture) -> tuple[float, float]:
    """Of the int8 and the float32 network's logits, and how many times smaller the file is."""
    size = architecture.resolution
    images = calibration_images(None, (architecture.input_channels, size, size))
    model = onnx_model(architecture).SerializeToString()
    small = int8_model(model, images)
    pair = logits(model, images).ravel(), logits(small, images).ravel()
    return float(np.corrcoef(*pair)[0, 1]), len(model) / len(small)


def test_members_of_the_paper_s_space_with_every_kind_of_skip_compute_much_the_same() -> None:
    space = load_space("mnasnet", resolution=32, classes=10)
    rng = np.random.default_rng(394)  # two small networks that have all kinds together
    seen = set()
    for _ in range(2):
        architecture = space.decode(space.sample(rng))
        seen |= {block.skip for block in architecture.blocks}
        seen |= {"se" for block in architecture.blocks if block.se_ratio}
        agreement, smaller = correlation(architecture)
        assert agreement > 0.9
        assert smaller > 2.5
    assert seen == {"none", "identity", "pool", "se"}


@pytest.mark.slow
def test_a1_computes_much_the_same_in_int8() -> None:
    agreement, smaller = correlation(adapt(published("mnasnet-a1")))
    assert agreement > 0.95
    assert smaller > 3.5


def test_what_is_timed_is_the_quantized_file() -> None:
    taken = make_meter(config()).measure(SMALL)
    plain = make_meter(config(precision="float32")).measure(SMALL)
    assert taken.median_ms > 0
    assert taken.metrics["model_mb"] != plain.metrics["model_mb"]
    assert taken.device["precision"] == "int8"
    assert taken.device_fingerprint != plain.device_fingerprint
    assert taken.graph_hash == plain.graph_hash


def test_real_images_are_taken_from_a_file_and_are_part_of_the_identity(tmp_path: Path) -> None:
    real = make_meter(config(images_in(tmp_path / "a.npy")))
    again = make_meter(config(images_in(tmp_path / "same.npy")))
    other = make_meter(config(images_in(tmp_path / "b.npy", seed=2)))
    assert real.measure(SMALL).device["calibration"].startswith("sha256 ")
    assert real.identity() == again.identity()
    assert real.identity() != other.identity()
    assert make_meter(config()).identity()["calibration"] == "4 random images"


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    meter = make_meter(config(images_in(tmp_path / "a.npy", (3, 3, 32, 32))))
    with pytest.raises(MeasurementError, match=r"network's shape \(1, 16, 16\), but has \(3, 32"):
        meter.measure(SMALL)


def test_a_file_that_holds_no_images_is_a_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"must hold float32 images .* float64 \(2, 3\)"):
        make_meter(config(str(tmp_path / "a.npy")))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("nothing.npy", "objects.npy"):
        with pytest.raises(ConfigError, match=r"must be a \.npy file of images"):
            make_meter(config(str(tmp_path / name)))


def test_a_graph_that_cannot_be_quantized_is_the_network_s_fault() -> None:
    with pytest.raises(MeasurementError, match="cannot quantize the network") as caught:
        int8_model(b"no model", np.zeros((1, 1, 16, 16), np.float32))
    assert caught.value.cause == "architecture"


def test_quantizing_leaves_the_root_logger_alone() -> None:
    handlers = list(logging.root.handlers)
    images = calibration_images(None, (1, 16, 16))
    int8_model(onnx_model(SMALL).SerializeToString(), images)
    assert logging.root.handlers == handlers
