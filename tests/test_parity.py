"""Converted networks compute what timm's, torchvision's and MindCV's compute, and go back whole.

`make parity` installs the frameworks and runs this file; it prints the differences of the logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from campaigns import mnas
from convert_parts import lively, lively_checkpoint, same_arrays
from PIL import Image
from safetensors.numpy import save_file
from test_readme import commands, run_lines

from retrain.checkpoint import load_checkpoint, save_checkpoint
from retrain.convert import ConvertReport, convert
from retrain.foreign_weights import Origin
from retrain.frameworks import FRAMEWORKS
from space.architecture import NetworkStyle, parse_architecture
from space.errors import ConfigError
from space.network import build_network

PACKAGES = ("torch", "torchvision", "timm", "mindcv")
MISSING = [package for package in PACKAGES if importlib.util.find_spec(package) is None]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        bool(MISSING), reason=f"the extra [parity] is missing ({', '.join(MISSING)}): make parity"
    ),
    # The frameworks' own.
    pytest.mark.filterwarnings("ignore"),
]

TOLERANCE = 1e-4

FULL = [("timm", "semnasnet_100"), ("timm", "mnasnet_100"), ("timm", "mnasnet_small"),
        ("torchvision", "mnasnet1_0")]  # fmt: skip
FULL += [("mindcv", model) for model in FRAMEWORKS["mindcv"].models]
OTHERS = [
    (framework, model)
    for framework in ("timm", "torchvision")
    for model in FRAMEWORKS[framework].models
    if (framework, model) not in FULL and model not in ("mnasnet_a1", "mnasnet_b1")
]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------- the frameworks


def torch_model(framework: str, model: str, *, seed: int = 0, **options: Any) -> Any:
    """A PyTorch model with random weights and batch norms, for evaluation."""
    import timm
    import torch
    import torchvision

    if framework == "timm":
        made = timm.create_model(model, **options)
    else:
        made = getattr(torchvision.models, model)(**options)
    rng = np.random.default_rng(seed)
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(lively(name, tuple(value.shape), rng)))
    return made.eval()


def mindcv_network(model: str, **options: Any) -> Any:
    """A MindCV network with random weights and batch norms, for evaluation."""
    import mindcv

    rng = np.random.default_rng(0)
    made = mindcv.create_model(model, **options)
    for parameter in made.get_parameters():
        parameter.set_data(ms.Tensor(lively(parameter.name, parameter.shape, rng)))
    made.set_train(False)
    return made


def made_by(framework: str, model: str, **options: Any) -> Any:
    return (
        mindcv_network(model, **options)
        if framework == "mindcv"
        else torch_model(framework, model, **options)
    )


def save(model: Any, path: Path) -> Path:
    """Save as the framework's users do."""
    import torch

    if isinstance(model, torch.nn.Module):
        torch.save(model.state_dict(), path)
    else:
        ms.save_checkpoint(model, str(path))
    return path


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    import torch

    if isinstance(model, torch.nn.Module):
        return {name: value.numpy() for name, value in model.state_dict().items()}
    return {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}


def images_of(size: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, channels, size, size), np.float32)


def logits_of(model: Any, images: np.ndarray) -> np.ndarray:
    import torch

    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return np.asarray(model.eval()(torch.from_numpy(images)).numpy())
    model.set_train(False)
    return np.asarray(model(ms.Tensor(images)).asnumpy())


def our_logits(path: Path, images: np.ndarray) -> np.ndarray:
    checkpoint = load_checkpoint(path)
    network = build_network(checkpoint.architecture, checkpoint.style, seed=0)
    weights = {n: ms.Parameter(ms.Tensor(v), name=n) for n, v in checkpoint.weights.items()}
    assert ms.load_param_into_net(network, weights) == ([], [])
    return logits_of(network, images)


def loaded_by(report: ConvertReport) -> Any:
    """What the report's lines load, as its reader would."""
    names: dict[str, Any] = {}
    assert report.load is not None
    exec(report.load, names)
    return names["network"] if report.to == "mindcv" else names["model"]


def same_weights(left: Any, right: Any) -> bool:
    a, b = arrays_of(left), arrays_of(right)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a
    )


def compare(what: str, left: np.ndarray, right: np.ndarray) -> None:
    """Print the largest difference; fail unless it is small beside logits of ordinary size."""
    difference = float(np.abs(left - right).max())
    print(
        f"{what}: largest difference of a logit {difference:.3g},"
        f" largest logit {float(np.abs(left).max()):.3g}"
    )
    assert 0.1 < left.std() < 5
    assert difference <= TOLERANCE


# ---------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    ("framework", "model", "size"),
    [(*one, 224) for one in FULL] + [(*one, 64) for one in OTHERS],
)
def test_a_converted_network_computes_the_same_and_goes_back_bit_by_bit(
    framework: str, model: str, size: int, tmp_path: Path
) -> None:
    original = made_by(framework, model)
    ending = ".ckpt" if framework == "mindcv" else ".pth"
    source = save(original, tmp_path / f"in{ending}")
    ours = tmp_path / "ours.safetensors"
    report = convert(source, ours, origin=Origin(resolution=size))
    assert (report.source_framework, report.model, report.recognised) == (framework, model, True)
    images = images_of(size)
    compare(f"{framework} {model} at {size} px", logits_of(original, images),
            our_logits(ours, images))  # fmt: skip
    for back in (tmp_path / f"back{ending}", tmp_path / "back.safetensors"):
        assert same_weights(loaded_by(convert(ours, back, to=framework)), original)


@pytest.mark.parametrize(
    ("framework", "model", "options"),
    [
        ("timm", "semnasnet_050", {"num_classes": 7, "in_chans": 1}),
        ("torchvision", "mnasnet0_5", {"num_classes": 7}),
        ("mindcv", "mnasnet_050", {"num_classes": 7, "in_channels": 1}),
    ],
)
def test_a_fine_tuned_network_keeps_its_classes_and_channels(
    framework: str, model: str, options: dict[str, int], tmp_path: Path
) -> None:
    original = made_by(framework, model, **options)
    source = save(original, tmp_path / ("in.ckpt" if framework == "mindcv" else "in.pth"))
    channels = 3 if framework == "torchvision" else 1
    origin = Origin(resolution=64, mean=(0.5,) * channels, deviation=(0.25,) * channels)
    report = convert(source, tmp_path / "ours.safetensors", origin=origin)
    assert "| c7" in report.architecture
    images = images_of(64, channels)
    compare(f"{framework} {model}, 7 classes", logits_of(original, images),
            our_logits(tmp_path / "ours.safetensors", images))  # fmt: skip
    back = convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to=framework)
    assert same_weights(loaded_by(back), original)


def test_torchvision_takes_back_a_gray_network(tmp_path: Path) -> None:
    import torch

    original = torch_model("torchvision", "mnasnet0_5")
    original.layers[0] = torch.nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    source = save(original, tmp_path / "in.pth")
    origin = Origin(mean=(0.5,), deviation=(0.25,))
    convert(source, tmp_path / "ours.safetensors", origin=origin)
    back = convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", to="torchvision")
    assert same_weights(loaded_by(back), original)


NETWORKS = {
    "a network of every block, TensorFlow's padding and epsilon": (
        "stem16_s11 | r2_k3_s22_e1_i16_o24_conv | r1_k5_s11_e1_i24_o24_conv"
        " | r2_k5_s22_e3_i24_o40_se0.3 | r2_k7_s22_e6_i40_o40_se0.25_noskip"
        " | r1_k3_s11_e1_i40_o48_se0.1 | r2_k3_s22_e2_i48_o64 | head96 | r56 | c9 | in1",
        NetworkStyle("same", 1e-3, 0.99),
    ),
    "strides of 128 in all": (
        "stem8 | r1_k3_s22_e1_i8_o16 | r1_k3_s22_e3_i16_o16 | r1_k5_s22_e3_i16_o24"
        " | r1_k3_s22_e3_i24_o32 | r1_k3_s22_e3_i32_o40 | r2_k3_s22_e3_i40_o48 | head64 | r128"
        " | c5",
        NetworkStyle("symmetric", 1e-5, 0.9),
    ),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_timm_computes_the_same_with_a_network_of_ours(name: str, tmp_path: Path) -> None:
    text, style = NETWORKS[name]
    network = parse_architecture(text)
    save_checkpoint(tmp_path / "ours.safetensors", lively_checkpoint(network, style))
    report = convert(tmp_path / "ours.safetensors", tmp_path / "t.safetensors", to="timm")
    images = images_of(network.resolution, network.input_channels)
    ours = our_logits(tmp_path / "ours.safetensors", images)
    compare(name, ours, logits_of(loaded_by(report), images))


@pytest.mark.parametrize("to", ["timm", "mindcv"])
def test_weights_of_torchvision_work_in_another_framework(to: str, tmp_path: Path) -> None:
    original = torch_model("torchvision", "mnasnet1_0")
    source = save(original, tmp_path / "in.pth")
    out = tmp_path / ("out.ckpt" if to == "mindcv" else "out.pth")
    report = convert(source, out, to=to)
    images = images_of(96)
    compare(f"torchvision -> {to}", logits_of(original, images),
            logits_of(loaded_by(report), images))  # fmt: skip


def test_a_training_file_of_timm_offers_its_sets_of_weights(tmp_path: Path) -> None:
    import torch

    first, second = (torch_model("timm", "mnasnet_small", seed=seed) for seed in (0, 1))
    held = {
        "epoch": 3,
        "arch": "mnasnet_small",
        "state_dict": {f"module.{n}": v.bfloat16() for n, v in first.state_dict().items()
                       if v.is_floating_point()},
        "state_dict_ema": second.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "args": argparse.Namespace(model="mnasnet_small"),
        "metric": 0.5,
    }  # fmt: skip
    source, out = tmp_path / "model_best.pth.tar", tmp_path / "out.safetensors"
    torch.save(held, source)
    with pytest.raises(ConfigError, match="several sets of weights, state_dict, state_dict_ema"):
        convert(source, out)
    convert(source, out, origin=Origin(key="state_dict_ema"))
    assert np.array_equal(
        load_checkpoint(out).weights["classifier.bias"], second.classifier.bias.detach().numpy()
    )
    report = convert(source, out, origin=Origin(key="state_dict"), overwrite=True)
    assert "beside it lie state_dict_ema, epoch, arch, optimizer, args, metric" in report.notes[0]
    assert report.notes[1:] == (
        "'module.' was cut from the names.",
        f"{report.arrays} arrays were widened from bfloat16 to float32.",
    )
    assert np.array_equal(
        load_checkpoint(out).weights["classifier.bias"],
        first.classifier.bias.detach().bfloat16().float().numpy(),
    )


class Evil:
    """What a pickle can hold."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("run",)


def test_nothing_in_a_pickle_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    source = tmp_path / "in.pth"
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))):
        write({"conv_stem.weight": Evil()}, source)
        with pytest.raises(ConfigError, match="which is not run"):
            convert(source, tmp_path / "out.safetensors")
        assert capsys.readouterr().out == ""
    source.write_bytes(save(torch_model("timm", "mnasnet_small"), source).read_bytes()[:-5000])
    with pytest.raises(ConfigError, match="is a damaged PyTorch file"):
        convert(source, tmp_path / "out.safetensors")


def test_arrays_of_other_kinds_are_listed(tmp_path: Path) -> None:
    import torch

    weights = torch_model("timm", "mnasnet_small").state_dict()
    weights["classifier.weight"] = weights["classifier.weight"].to_sparse()
    weights["bn1.weight"] = weights["bn1.weight"].to(torch.float8_e4m3fn)
    weights["bn2.weight"] = weights["bn2.weight"].to(torch.complex64)
    weights["bn2.bias"] = "none"
    torch.save(weights, tmp_path / "in.pth")
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    for part in (
        "classifier.weight (float32, not dense)", "bn1.weight (float8_e4m3fn)",
        "bn2.weight (complex64)", "bn2.bias (str)",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_an_old_file_of_pytorch_is_read(tmp_path: Path) -> None:
    import torch

    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    weights = torch_model("timm", "mnasnet_small").state_dict()
    torch.save(weights, source, _use_new_zipfile_serialization=False)
    convert(source, out)
    stem = load_checkpoint(out).weights["stem.conv.weight"]
    assert np.array_equal(stem, weights["conv_stem.weight"].numpy())


@pytest.mark.timeout(600)
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    save_file(
        arrays_of(torch_model("timm", "semnasnet_100")), tmp_path / "semnasnet_100.safetensors"
    )
    save(torch_model("torchvision", "mnasnet1_0"), tmp_path / "mnasnet1_0.pth")
    save(mindcv_network("mnasnet_100"), tmp_path / "mnasnet_100.ckpt")
    save(torch_model("timm", "mnasnet_050", num_classes=3), tmp_path / "flowers.pth")
    names = ("daisy", "poppy", "tulip")
    (tmp_path / "flowers.txt").write_text("\n".join(names))
    (tmp_path / "flowers.yaml").write_text(
        "data: {name: image_folder, path: flowers}\nepochs: 1\n"
    )
    rng = np.random.default_rng(0)
    for part, name in itertools.product(("train", "val"), names):
        folder = tmp_path / "flowers" / part / name
        folder.mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    lines = commands("docs/weights.md")
    text = next(line for line in lines if "--arch" in line).split('"')[1]
    style = FRAMEWORKS["timm"].style
    checkpoint = lively_checkpoint(parse_architecture(text), style)
    save_checkpoint(tmp_path / "small.safetensors", checkpoint)
    run_lines(lines, tmp_path)
    assert same_arrays(tmp_path / "again.safetensors", tmp_path / "small.safetensors")
    assert (tmp_path / "flowers.onnx").exists()


def test_the_command_line_reads_a_pytorch_file(tmp_path: Path) -> None:
    source = save(torch_model("timm", "mnasnet_small"), tmp_path / "in.pth")
    done = mnas("convert", str(source), str(tmp_path / "out.safetensors"))
    assert done.returncode == 0, done.stderr
    assert "timm mnasnet_small, recognised from its arrays" in done.stdout
