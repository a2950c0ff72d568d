"""How timm, torchvision and MindCV name and build MnasNets: tables that serve both directions.

A framework's table says what its modules are called where this project's are called otherwise;
`name_map` makes of it the names of a whole network. What the tables cannot say - that a network
has a block which the framework does not build - is told by `Framework.refusal`.

Sources: timm/models/efficientnet.py, _efficientnet_blocks.py and _efficientnet_builder.py (1.0),
torchvision/models/mnasnet.py (0.29), mindcv/models/mnasnet.py (0.3).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from space.architecture import Architecture, BlockSpec, Layer, NetworkStyle
from space.mnasnet import published, scale_width
from space.parameters import layer_prefix, parameter_shapes

#: Mean and deviation of ImageNet's pixels, red, green, blue, of 1: all three frameworks take them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, slots=True)
class Framework:
    """One framework's names and habits.

    Attributes:
        title: Its name for people.
        style: Padding and batch norm as it builds them.
        leaves: Our last name -> its, of a module's arrays.
        modules: Network -> our module's name -> its.
        known_by: What its arrays' names look like, and no other framework's.
        models: Its networks' name -> ours and the multiplier of the width.
        refusal: Network, style -> why it cannot have such a network; None if it can.
        ignored: Names that are no weights, and why they may be left.
        counter: Last name of a counter beside each batch norm, which it expects; "" for none.
        module_version: Of its state dict, as PyTorch counts.
        endings: Of the files it reads, the usual one first.
        loading: Network, style, model's name or None, file -> Python lines that load it, or None.
    """

    title: str
    style: NetworkStyle
    leaves: Mapping[str, str]
    modules: Callable[[Architecture], dict[str, str]]
    known_by: re.Pattern[str]
    models: Mapping[str, tuple[str, float]]
    refusal: Callable[[Architecture, NetworkStyle], str | None]
    ignored: tuple[tuple[re.Pattern[str], str], ...]
    counter: str
    module_version: int
    endings: tuple[str, ...]
    loading: Callable[[Architecture, NetworkStyle, str | None, Path], str | None]


def name_map(framework: Framework, architecture: Architecture) -> dict[str, str]:
    """Return our name -> the framework's, of every parameter and statistic of a network.

    The network must be one that the framework can have (`Framework.refusal`).
    """
    modules = framework.modules(architecture)
    names = {}
    for ours in parameter_shapes(architecture):
        module, _, leaf = ours.rpartition(".")
        names[ours] = f"{modules[module]}.{framework.leaves[leaf]}"
    return names


def counter_names(framework: Framework, architecture: Architecture) -> list[str]:
    """Return the names of the counters that the framework keeps beside its batch norms."""
    if not framework.counter:
        return []
    modules = framework.modules(architecture)
    norms = [n.rpartition(".")[0] for n in parameter_shapes(architecture) if n.endswith(".gamma")]
    return [f"{modules[norm]}.{framework.counter}" for norm in norms]


def known_network(framework: Framework, model: str) -> Architecture:
    """Return one of a framework's networks, for 1000 classes and color images of 224 pixels."""
    name, width = framework.models[model]
    return scale_width(published(name), width)


def model_name(framework: Framework, architecture: Architecture) -> str | None:
    """Return the framework's name of a network, whatever its images and classes, if it has one."""
    for model in framework.models:
        known = known_network(framework, model)
        if known == dataclasses.replace(
            architecture,
            resolution=known.resolution,
            classes=known.classes,
            input_channels=known.input_channels,
        ):
            return model
    return None


# ---------------------------------------------------------------------------- names

_SAME_LEAVES = {
    name: name for name in ("weight", "bias", "gamma", "beta", "moving_mean", "moving_variance")
}
_TORCH_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

_TIMM_ENDS = {
    "stem.conv": "conv_stem",
    "stem.norm": "bn1",
    "head.conv": "conv_head",
    "head.norm": "bn2",
    "classifier": "classifier",
}
_TIMM_LAYERS = {
    "mbconv": {  # InvertedResidual
        "expand.conv": "conv_pw",
        "expand.norm": "bn1",
        "depthwise.conv": "conv_dw",
        "depthwise.norm": "bn2",
        "se.reduce": "se.conv_reduce",
        "se.expand": "se.conv_expand",
        "project.conv": "conv_pwl",
        "project.norm": "bn3",
    },
    "dconv": {  # DepthwiseSeparableConv
        "depthwise.conv": "conv_dw",
        "depthwise.norm": "bn1",
        "se.reduce": "se.conv_reduce",
        "se.expand": "se.conv_expand",
        "project.conv": "conv_pw",
        "project.norm": "bn2",
    },
    "conv": {"spatial.conv": "conv", "spatial.norm": "bn1"},  # ConvBnAct
}

#: Both frameworks number the first block's parts and the head in one sequence with the stem.
_SEQUENCE_START = {
    "stem.conv": 0,
    "stem.norm": 1,
    "blocks.0.0.depthwise.conv": 3,
    "blocks.0.0.depthwise.norm": 4,
    "blocks.0.0.project.conv": 6,
    "blocks.0.0.project.norm": 7,
}
_SEQUENCE_LAYER = {
    "expand.conv": 0,
    "expand.norm": 1,
    "depthwise.conv": 3,
    "depthwise.norm": 4,
    "project.conv": 6,
    "project.norm": 7,
}


def _timm_modules(architecture: Architecture) -> dict[str, str]:
    modules = dict(_TIMM_ENDS)
    for layer in architecture.layers():
        prefix = layer_prefix(layer)
        for ours, theirs in _TIMM_LAYERS[layer.op].items():
            modules[f"{prefix}.{ours}"] = f"{prefix}.{theirs}"
    return modules


def _torchvision_modules(architecture: Architecture) -> dict[str, str]:
    modules = {ours: f"layers.{number}" for ours, number in _SEQUENCE_START.items()}
    for layer in _later_layers(architecture):
        # A stack of layers per block.
        at = f"layers.{7 + layer.block_index}.{layer.layer_index}.layers"
        _add_sequence(modules, layer, at)
    head = 7 + len(architecture.blocks)
    modules.update({"head.conv": f"layers.{head}", "head.norm": f"layers.{head + 1}"})
    modules["classifier"] = "classifier.1"
    return modules


def _mindcv_modules(architecture: Architecture) -> dict[str, str]:
    modules = {ours: f"features.{number}" for ours, number in _SEQUENCE_START.items()}
    layers = _later_layers(architecture)
    for index, layer in enumerate(layers):
        _add_sequence(modules, layer, f"features.{8 + index}.layers")
    head = 8 + len(layers)
    modules.update({"head.conv": f"features.{head}", "head.norm": f"features.{head + 1}"})
    modules["classifier"] = "classifier"
    return modules


def _later_layers(architecture: Architecture) -> list[Layer]:
    return [layer for layer in architecture.layers() if layer.block_index > 0]


def _add_sequence(modules: dict[str, str], layer: Layer, at: str) -> None:
    for ours, number in _SEQUENCE_LAYER.items():
        modules[f"{layer_prefix(layer)}.{ours}"] = f"{at}.{number}"


# ---------------------------------------------------------------------------- refusals


def _timm_refusal(architecture: Architecture, style: NetworkStyle) -> str | None:
    for layer in architecture.layers():
        where = f"block {layer.block_index + 1}"
        if layer.skip == "pool":
            return f"{where} has a pooling skip, which timm does not build"
        if layer.op == "conv" and layer.se_filters:
            return f"{where} is a regular convolution with squeeze-and-excitation; timm has none"
        # make_divisible(in_chs * exp_ratio) of InvertedResidual
        if layer.op == "mbconv" and layer.mid_filters % 8:
            return (
                f"{where} has {layer.mid_filters} channels in its middle; timm builds multiples of"
                " 8 only"
            )
    return None


def _sequence_refusal(architecture: Architecture, style: NetworkStyle) -> str | None:
    """Why MNASNet of torchvision or MindCV cannot be such a network: both build B1 alone."""
    first = architecture.blocks[0]
    if style.padding == "same" and _strided_on_even_maps(architecture):
        return "its convolutions pad as TensorFlow does, behind more than before"
    if architecture.stem_stride != 2:
        return "its stem has stride 1, not 2"
    if (first.op, first.layers, first.stride, first.skip) != ("dconv", 1, 1, "none"):
        return (
            "its first block is not one depthwise separable layer with stride 1 and without a skip"
        )
    if any(block.se_ratio for block in architecture.blocks):
        return "it has squeeze-and-excitation"
    for layer in _later_layers(architecture):
        if layer.op != "mbconv":
            return f"block {layer.block_index + 1} is no inverted bottleneck with an expansion"
        fits = layer.stride == 1 and layer.input_filters == layer.output_filters
        if layer.skip != ("identity" if fits else "none"):
            return f"block {layer.block_index + 1} lacks the identity skip, or has a pooling one"
    return None


def _strided_on_even_maps(architecture: Architecture) -> bool:
    """Whether `same` and `symmetric` padding differ: they do where a stride meets an even size."""
    maps = [(architecture.stem_stride, architecture.resolution)]
    maps += [(layer.stride, layer.input_size) for layer in architecture.layers()]
    return any(stride == 2 and size % 2 == 0 for stride, size in maps)


# ---------------------------------------------------------------------------- loading


def _quoted(path: Path) -> str:
    return json.dumps(str(path))


def _timm_loading(
    architecture: Architecture, style: NetworkStyle, model: str | None, path: Path
) -> str:
    options = [f"num_classes={architecture.classes}", f"in_chans={architecture.input_channels}"]
    if style.padding == "same":
        options.append('pad_type="same"')
    if model is not None:
        made = ["import timm", f'model = timm.create_model("{model}", {", ".join(options)})']
    else:
        options += [
            f"num_features={architecture.head_filters}",
            f"stem_size={architecture.stem_filters}",
            "round_chs_fn=int",
            # Above it, timm dilates in place of strides; it counts a stem of stride 2.
            f"output_stride={2 * architecture.total_stride // architecture.stem_stride}",
        ]
        made = [
            "from timm.models.efficientnet import EfficientNet, decode_arch_def",
            f"blocks = decode_arch_def({timm_strings(architecture)})",
            f"model = EfficientNet(blocks, {', '.join(options)})",
        ]
        if architecture.stem_stride == 1:
            made.append("model.conv_stem.stride = (1, 1)")
    return "\n".join(
        [
            "from timm.models import load_checkpoint",
            *made,
            f"load_checkpoint(model, {_quoted(path)})",
        ]
    )


def timm_strings(architecture: Architecture) -> list[list[str]]:
    """Return the network's blocks in the notation of timm's `decode_arch_def`."""
    stages: list[list[str]] = []
    for index, block in enumerate(architecture.blocks):
        layers = [layer for layer in architecture.layers() if layer.block_index == index]
        if all(_timm_squeeze(layer, block.se_ratio) == layer.se_filters for layer in layers):
            stages.append([_timm_string(block, block.layers, block.se_ratio)])
            continue
        # timm rounds the squeezed width otherwise: say it layer by layer, as exactly as it is.
        exact = [layer.se_filters / layer.input_filters for layer in layers]
        stages.append([_timm_string(block, 1, ratio) for ratio in exact])
    return stages


def _timm_squeeze(layer: Layer, ratio: float) -> int:
    """The squeezed width that timm makes of a ratio to the block's input."""
    expansion = layer.mid_filters / layer.input_filters if layer.op == "mbconv" else 1.0
    return round(layer.mid_filters * (ratio / expansion)) if layer.op != "conv" else 0


def _timm_string(block: BlockSpec, layers: int, se_ratio: float) -> str:
    parts = [
        {"mbconv": "ir", "dconv": "ds", "conv": "cn"}[block.op],
        f"r{layers}_k{block.kernel_size}_s{block.stride}_e{block.expand_ratio}_c{block.filters}",
    ]
    if se_ratio:
        parts.append(f"se{se_ratio}")
    if block.op == "conv" and block.skip == "identity":
        parts.append("skip")
    if block.op != "conv" and block.skip == "none":
        parts.append("noskip")
    return "_".join(parts)


def _torchvision_loading(
    architecture: Architecture, style: NetworkStyle, model: str | None, path: Path
) -> str | None:
    if model is None:
        return None
    lines = ["import torch, torchvision"]
    lines.append(f"model = torchvision.models.{model}(num_classes={architecture.classes})")
    if architecture.input_channels != 3:
        channels = f"{architecture.input_channels}, {architecture.stem_filters}"
        stem = f"torch.nn.Conv2d({channels}, 3, stride=2, padding=1, bias=False)"
        lines.append(f"model.layers[0] = {stem}")
    if path.suffix == ".safetensors":
        lines += [
            "from collections import OrderedDict",
            "from safetensors.torch import load_file",
            f"weights = OrderedDict(load_file({_quoted(path)}))",
            # Without it torchvision's MNASNet refuses them.
            'weights._metadata = {"": {"version": 2}}',
        ]
    else:
        lines.append(f"weights = torch.load({_quoted(path)}, weights_only=True)")
    return "\n".join([*lines, "model.load_state_dict(weights)"])


def _mindcv_loading(
    architecture: Architecture, style: NetworkStyle, model: str | None, path: Path
) -> str | None:
    if model is None:
        return None
    options = f"num_classes={architecture.classes}, in_channels={architecture.input_channels}"
    load_options = ', format="safetensors"' if path.suffix == ".safetensors" else ""
    return "\n".join(
        [
            "import mindcv, mindspore",
            f'network = mindcv.create_model("{model}", {options})',
            f"weights = mindspore.load_checkpoint({_quoted(path)}{load_options})",
            "mindspore.load_param_into_net(network, weights)",
        ]
    )


# ---------------------------------------------------------------------------- the frameworks

_COUNTER = re.compile(r"(.+\.)?num_batches_tracked|n_averaged")
_TORCH_IGNORED = ((_COUNTER, "counters of training steps, which no result depends on"),)
_STATE = (
    "global_step", "learning_rate", "momentum", "beta1_power", "beta2_power", "mu_schedule",
    "updates", "scale_sense", "current_iterator_step", "last_overflow_iterator_step", "epoch",
    "epoch_num", "step_num",
)  # fmt: skip
_MOMENTS = (
    "moment", "moments", "moment1", "moment2", "moment3", "mean_square", "mean_gradient", "accum",
    "stat", "adam_m", "adam_v", "lamb_m", "lamb_v", "nadam_m", "nadam_v", "lion_m",
    "prev_gradient",
)  # fmt: skip

FRAMEWORKS: dict[str, Framework] = {
    "timm": Framework(
        title="timm",
        # PyTorch's batch norm, whose momentum of 0.1 is the share of the new.
        style=NetworkStyle("symmetric", 1e-5, 0.9),
        leaves=_TORCH_LEAVES,
        modules=_timm_modules,
        known_by=re.compile(r"(conv_stem|bn1|bn2|conv_head)\..+|blocks\.\d+\.\d+\.(conv|bn|se).*"),
        models={
            "mnasnet_050": ("mnasnet-b1", 0.5),
            "mnasnet_075": ("mnasnet-b1", 0.75),
            "mnasnet_100": ("mnasnet-b1", 1.0),
            "mnasnet_140": ("mnasnet-b1", 1.4),
            "semnasnet_050": ("mnasnet-a1", 0.5),
            "semnasnet_075": ("mnasnet-a1", 0.75),
            "semnasnet_100": ("mnasnet-a1", 1.0),
            "semnasnet_140": ("mnasnet-a1", 1.4),
            "mnasnet_small": ("mnasnet-small", 1.0),
            # Its older names.
            "mnasnet_a1": ("mnasnet-a1", 1.0),
            "mnasnet_b1": ("mnasnet-b1", 1.0),
        },
        refusal=_timm_refusal,
        ignored=_TORCH_IGNORED,
        counter="num_batches_tracked",
        module_version=1,
        endings=(".safetensors", ".pth", ".pt", ".bin"),
        loading=_timm_loading,
    ),
    "torchvision": Framework(
        title="torchvision",
        style=NetworkStyle("symmetric", 1e-5, 0.9997),
        leaves=_TORCH_LEAVES,
        modules=_torchvision_modules,
        known_by=re.compile(r"layers\.\d+\..+|classifier\.1\..+"),
        models={
            "mnasnet0_5": ("mnasnet-b1", 0.5),
            "mnasnet0_75": ("mnasnet-b1", 0.75),
            "mnasnet1_0": ("mnasnet-b1", 1.0),
            "mnasnet1_3": ("mnasnet-b1", 1.3),
        },
        refusal=_sequence_refusal,
        ignored=_TORCH_IGNORED,
        counter="num_batches_tracked",
        module_version=2,
        endings=(".pth", ".safetensors", ".pt", ".bin"),
        loading=_torchvision_loading,
    ),
    "mindcv": Framework(
        title="MindCV",
        style=NetworkStyle("symmetric", 1e-3, 0.99),
        leaves=_SAME_LEAVES,
        modules=_mindcv_modules,
        known_by=re.compile(r"features\.\d+\..+"),
        models={
            "mnasnet_050": ("mnasnet-b1", 0.5),
            "mnasnet_075": ("mnasnet-b1", 0.75),
            "mnasnet_100": ("mnasnet-b1", 1.0),
            "mnasnet_130": ("mnasnet-b1", 1.3),
            "mnasnet_140": ("mnasnet-b1", 1.4),
        },
        refusal=_sequence_refusal,
        ignored=(
            (re.compile("|".join(_STATE)), "the state of a training, no weights"),
            (re.compile(rf"({'|'.join(_MOMENTS)})\..+"), "the state of an optimizer, no weights"),
        ),
        counter="",
        module_version=1,
        endings=(".ckpt", ".safetensors"),
        loading=_mindcv_loading,
    ),
}
