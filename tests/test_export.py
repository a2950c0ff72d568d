"""A trained network leaves as ONNX, MindIR or Python, and is the same network outside."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from networks import EVERYTHING, IDENTITIES, SYMMETRIC
from onnx_parity import mindspore_logits, random_weights
from PIL import Image

from retrain import export, standalone
from retrain.augment import evaluation_view
from retrain.checkpoint import Checkpoint, Training, load_checkpoint, save_checkpoint
from retrain.commands import export_command
from retrain.config import DataConfig, Recipe
from retrain.data import DataSet, Normalisation, load_data
from retrain.data_config import AugmentConfig
from retrain.python_module import python_module
from space.architecture import PAPER_STYLE, NetworkStyle, parse_architecture
from space.cost import count
from space.errors import ConfigError, MnasError
from space.files import versions
from space.mnasnet import published
from space.onnx_graph import OPSET
from space.parameters import parameter_shapes

ROOT = Path(__file__).parents[1]

DIGITS = (
    "stem8_s11 | r2_k3_s22_e3_i8_o16_se0.25_pool | r1_k5_s11_e1_i16_o16"
    " | r1_k3_s22_e1_i16_o12_noskip_conv | head24 | r12 | c10 | in1"
)


def checkpoint(
    text: str, style: NetworkStyle, *, classes: tuple[str, ...] = (), training: bool = False
) -> Checkpoint:
    """Random weights, with statistics as if trained."""
    network = parse_architecture(text)
    channels = network.input_channels
    recipe = Recipe(DataConfig("digits"), 3, style=style, eval_batch_size=100)
    return Checkpoint(
        architecture=network,
        style=style,
        normalisation=Normalisation((0.3, 0.4, 0.5)[:channels], (0.35, 0.25, 0.3)[:channels]),
        classes=classes,
        versions=versions(),
        weights=random_weights(network, 3),
        training=Training(recipe, 5, 3, 0.5) if training else None,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the digits, with everything that a graph holds."""
    path = tmp_path_factory.mktemp("digits") / "model.safetensors"
    classes = tuple("0123456789")
    save_checkpoint(path, checkpoint(DIGITS, SYMMETRIC, classes=classes, training=True))
    return path


def digits_data() -> DataSet:
    return load_data(DataConfig("digits"), 12, 1)


def python(*arguments: str, cwd: Path, status: int = 0) -> str:
    """Run an interpreter in which this project does not exist."""
    blocker = (
        "import runpy, sys\n"
        "for room in ('space', 'controller', 'latency', 'retrain', 'search', 'configs'):\n"
        "    sys.modules[room] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, '.')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocker, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


# ---------------------------------------------------------------------------- the Python module


CASES = {
    "identities": (IDENTITIES, PAPER_STYLE),
    "everything": (EVERYTHING, PAPER_STYLE),
    # With this padding, sizes that are even make a difference.
    "everything-symmetric": (EVERYTHING.replace("r19", "r20"), SYMMETRIC),
}

#: Imports each case's module, takes its logits in both modes, then trains it for a step.
USER = """
import sys
import mindspore as ms
import numpy as np
from mindspore import nn
import importlib

for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    model = importlib.reload(importlib.import_module("model"))
    sys.path.pop(0)
    pixels = np.load(folder + "/pixels.npy")
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        network = model.load(folder + "/model.safetensors")
        logits = network(ms.Tensor(model.normalise(pixels))).asnumpy()
        np.save(f"{folder}/logits{mode}.npy", logits)
    names = [parameter.name for parameter in network.get_parameters()]
    # Compiling a gradient takes seconds: once.
    ms.set_context(mode=ms.GRAPH_MODE if folder == sys.argv[1] else ms.PYNATIVE_MODE)
    trained = network.trainable_params()
    before = [parameter.asnumpy().copy() for parameter in trained]
    step = nn.TrainOneStepCell(
        nn.WithLossCell(network, nn.CrossEntropyLoss()), nn.SGD(trained, 0.01)
    )
    labels = ms.Tensor(np.arange(len(pixels), dtype=np.int32))
    loss = float(step(ms.Tensor(model.normalise(pixels)), labels).asnumpy())
    moved = [bool((p.asnumpy() != b).any()) for p, b in zip(trained, before)]
    finite = all(np.isfinite(p.asnumpy()).all() for p in trained)
    print(names, [p.name for p in trained], loss, all(moved), finite, sep="|")
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Case -> its folder, and what a process without this project printed about it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "user.py").write_text(USER)
    for name, (text, style) in CASES.items():
        (folder / name).mkdir()
        made = checkpoint(text, style)
        (folder / name / "model.py").write_text(python_module(made))
        save_checkpoint(folder / name / "model.safetensors", made)
        size, channels = made.architecture.resolution, made.architecture.input_channels
        shape = (3, channels, size, size)
        pixels = np.random.default_rng(8).integers(0, 256, shape, np.uint8)
        np.save(folder / name / "pixels.npy", pixels)
    printed = python("user.py", *CASES, cwd=folder).splitlines()
    lines = [line for line in printed if line.startswith("[")]
    assert len(lines) == len(CASES)
    return {name: (folder / name, line) for name, line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_the_module_computes_our_logits_where_this_project_is_not(
    case: str, outside: dict[str, tuple[Path, str]]
) -> None:
    folder, _ = outside[case]
    made = checkpoint(*CASES[case])
    data = copy.copy(digits_data())
    data.normalisation = made.normalisation
    x = data.normalise(np.load(folder / "pixels.npy"))
    ms.set_context(mode=ms.GRAPH_MODE)
    expected = mindspore_logits(made.architecture, made.style, made.weights, x)
    assert np.abs(expected).max() > 0.1
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        logits = np.load(folder / f"logits{mode}.npy")
        assert np.abs(logits - expected).max() <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_module_names_its_parameters_as_the_checkpoint_and_trains(
    case: str, outside: dict[str, tuple[Path, str]]
) -> None:
    names, trained, loss, moved, finite = outside[case][1].split("|")
    shapes = parameter_shapes(parse_architecture(CASES[case][0]))
    assert set(ast.literal_eval(names)) == set(shapes)
    assert set(ast.literal_eval(trained)) == {name for name in shapes if ".moving_" not in name}
    assert np.isfinite(float(loss))
    assert (moved, finite) == ("True", "True")


NASTY = ('a "quoted" one', "back\\slash \\1", "two\nlines", "ünï 🐈", "it's", '"""', "x" * 60)


@pytest.mark.parametrize("classes", [(), NASTY, NASTY[:5]], ids=["none", "long", "short"])
def test_the_module_is_tidy_whatever_the_classes_are_called(
    classes: tuple[str, ...], tmp_path: Path
) -> None:
    text = IDENTITIES.replace("c7", f"c{len(classes) or 7}")
    file = tmp_path / "model.py"
    file.write_text(python_module(checkpoint(text, SYMMETRIC, classes=classes)))
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [Path(sys.executable).with_name("ruff"), *command, "--no-cache", "--config",
             str(ROOT / "pyproject.toml"), str(file)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    tree = ast.parse(file.read_text())
    found = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    if classes:
        assert ast.literal_eval(found["CLASSES"]) == classes
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        str(node.module).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    # Pillow comes with MindSpore.
    assert imported == {"__future__", "argparse", "typing", "mindspore", "numpy", "PIL"}


def test_the_template_is_the_module_of_a1() -> None:
    a1 = Checkpoint(
        architecture=published("mnasnet-a1"),
        style=PAPER_STYLE,
        normalisation=Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        classes=(),
        versions={},
        weights={},
    )
    assert python_module(a1) == Path(str(standalone.__file__)).read_text()


def test_the_module_cuts_images_as_the_training_s_evaluation_does(tmp_path: Path) -> None:
    text = DIGITS.replace("c10 | in1", "c10 | in3")
    augment = AugmentConfig(crop_pct=0.875, interpolation="bicubic")
    recipe = Recipe(DataConfig("image_folder", path="images"), 3, augment=augment)
    made = dataclasses.replace(checkpoint(text, SYMMETRIC), training=Training(recipe, 5, 3, 0.5))
    (tmp_path / "cutting.py").write_text(python_module(made))
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    # 16 bits of gray, which Pillow would clip at 255.
    deep = np.random.default_rng(1).integers(0, 65536, (37, 50), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (tmp_path / "cut.py").write_text(
        "import numpy, cutting\n"
        "for name in ('noise', 'deep'):\n"
        "    numpy.save(name + '.npy', cutting.read_image(name + '.png'))\n"
    )
    python("cut.py", cwd=tmp_path)
    gray = (deep >> 8).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    for name, image in (("noise", noise), ("deep", gray)):
        cut = np.load(tmp_path / f"{name}.npy").transpose(1, 2, 0)
        np.testing.assert_array_equal(cut, evaluation_view(image, 12, augment))


@pytest.mark.slow
def test_the_module_as_a_script_names_the_classes_of_images(digits: Path, tmp_path: Path) -> None:
    report = export_command(digits, tmp_path / "model.py", format="python", threads=1)
    assert report.max_abs_difference <= 1e-4
    assert report.exported_top1 == report.mindspore_top1
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]
    made, data = checkpoint(DIGITS, SYMMETRIC), copy.copy(digits_data())
    data.normalisation = made.normalisation
    images = data.test.images[:2]
    x = data.normalise(images)
    expected = mindspore_logits(made.architecture, made.style, made.weights, x).argmax(1)
    for number, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / f"{number}.png")
    printed = python("model.py", str(digits), "0.png", "1.png", cwd=tmp_path)
    size = f"{count(made.architecture).parameters:,} trainable parameters, 10 classes"
    assert printed.startswith(size)
    for number, best in enumerate(expected):
        assert f"\n{number}.png: {best} " in printed
    assert "random pixels: " in python("model.py", str(digits), cwd=tmp_path)
    # MindSpore's own files hold texts beside the weights.
    save_checkpoint(tmp_path / "same.ckpt", load_checkpoint(digits))
    assert python("model.py", "same.ckpt", "0.png", cwd=tmp_path).startswith(size)


def test_the_script_refuses_other_weights_with_a_sentence(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(python_module(checkpoint(DIGITS, PAPER_STYLE)))
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, checkpoint(DIGITS.replace("head24", "head32"), PAPER_STYLE))
    complaint = python("model.py", "other.safetensors", cwd=tmp_path, status=2)
    assert "other.safetensors holds another network's weights: 6 parameters" in complaint
    assert "Traceback" not in complaint
    assert "none.safetensors" in python("model.py", "none.safetensors", cwd=tmp_path, status=2)


# ---------------------------------------------------------------------------- MindIR


LOADER = """
import sys
import mindspore as ms
import numpy as np
from mindspore import nn

network = nn.GraphCell(ms.load("model.mindir"))
images = np.load("images.npy")
np.save("logits.npy", np.concatenate([
    network(ms.Tensor(images[:1])).asnumpy(), network(ms.Tensor(images[1:])).asnumpy()
]))
"""


def test_a_mindir_is_the_network_for_any_batch_and_says_how_to_feed_it(
    digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.mindir"
    report = export_command(digits, out, format="mindir", threads=1)
    assert (report.format, report.opset) == ("mindir", None)
    assert report.max_abs_difference <= 1e-4
    assert report.size_bytes == out.stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"model.mindir", "model.mindir.json"}
    said = json.loads((tmp_path / "model.mindir.json").read_text())
    assert said["input"] == ["batch", 1, 12, 12]
    assert said["logits"] == ["batch", 10]
    assert_complete(said)
    made = checkpoint(DIGITS, SYMMETRIC)
    x = np.random.default_rng(1).normal(size=(6, 1, 12, 12)).astype(np.float32)
    np.save(tmp_path / "images.npy", x)
    (tmp_path / "loader.py").write_text(LOADER)
    python("loader.py", cwd=tmp_path)
    expected = mindspore_logits(made.architecture, made.style, made.weights, x)
    assert np.abs(np.load(tmp_path / "logits.npy") - expected).max() <= 1e-5


def assert_complete(said: dict[str, Any]) -> None:
    """What a user needs to feed an export and to read its answer."""
    network = parse_architecture(DIGITS)
    assert said["architecture"] == network.text
    assert said["architecture_hash"] == network.hash
    assert said["padding"] == "symmetric"
    assert said["precision"] == "float32"
    assert said["batch_norm_epsilon"] == 1e-5
    assert said["classes"] == list("0123456789")
    assert said["normalisation"] == {"mean": [0.3], "deviation": [0.35]}
    assert said["data"] == "digits"
    assert (said["crop_pct"], said["interpolation"]) == (1.0, "bilinear")
    assert (said["validation_accuracy"], said["epochs"], said["seed"]) == (0.5, 3, 5)
    for made_by in ("versions", "exported_with"):
        assert {"mnas", "mindspore", "python"} <= said[made_by].keys()


# ---------------------------------------------------------------------------- ONNX


def test_an_onnx_file_says_how_to_feed_it_and_takes_any_batch(
    digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    report = export_command(digits, out, threads=1)
    assert (report.format, report.opset) == ("onnx", OPSET)
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    texts = {entry.key: entry.value for entry in model.metadata_props}
    plain = ("architecture", "architecture_hash", "padding", "precision", "data", "interpolation")
    assert_complete({k: v if k in plain else json.loads(v) for k, v in texts.items()})
    made = checkpoint(DIGITS, SYMMETRIC)
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 1, 12, 12)).astype(np.float32)
        expected = mindspore_logits(made.architecture, made.style, made.weights, x)
        assert np.abs(session.run(["logits"], {"input": x})[0] - expected).max() <= 1e-4


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("format", ["onnx", "mindir", "python"])
def test_an_export_that_computes_something_else_is_never_written(
    format: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export._WRITERS[format]

    def wrong(made: Checkpoint, folder: Path, threads: int) -> export.Draft:
        style = dataclasses.replace(made.style, batch_norm_epsilon=0.1)
        return right(dataclasses.replace(made, style=style), folder, threads)

    monkeypatch.setitem(export._WRITERS, format, wrong)
    suffix = {"onnx": ".onnx", "mindir": ".mindir", "python": ".py"}[format]
    with pytest.raises(MnasError, match=r"must be within .* of MindSpore's.*nothing was written"):
        export_command(digits, tmp_path / f"m{suffix}", format=format, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_kept_unless_asked(digits: Path, tmp_path: Path) -> None:
    for name, format in (("m.py", "python"), ("m.mindir", "mindir"), ("n.mindir", "mindir")):
        there = tmp_path / (name if name[0] == "m" else f"{name}.json")
        there.write_text("mine")
        with pytest.raises(ConfigError, match=r"is there already.*--overwrite"):
            export_command(digits, tmp_path / name, format=format)
        assert there.read_text() == "mine"
    export_command(digits, tmp_path / "m.py", format="python", overwrite=True, threads=1)
    assert "class Network" in (tmp_path / "m.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--format", "pythn"), "--format: unknown format 'pythn'; did you mean 'python'?"),
        (("--format", "tflite"), "must be one of onnx, mindir, python."),
        (("--format", "mindir", "--out", "m.onnx"), "m.onnx: must end in .mindir"),
        (("--out", "there.onnx"), "there.onnx: is there already"),
        (("--ckpt_path", "none/model.safetensors"), "no such checkpoint file"),
    ],
)
def test_bad_input_ends_in_a_sentence_and_status_2(
    arguments: tuple[str, ...], sentence: str, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    if "--ckpt_path" not in arguments:
        arguments = (*arguments, "--ckpt_path", str(digits))
    done = subprocess.run(
        [Path(sys.executable).with_name("mnas"), "export", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_a_campaigns_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("mnas"), "export", "none", "--format", "python"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "mnas: none: no such folder.\n")
    assert list(tmp_path.iterdir()) == []
