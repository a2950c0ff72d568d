"""A network as data: BlockSpec, Architecture, the layers they stand for, and the text form.

The text form of an Architecture is one line:

    stem32 | r1_k3_s11_e1_i32_o16_noskip | ... | head1280 | r224 | c1000

Blocks are written in the notation of the published MnasNet TPU code, in this order of tokens:

    r1            layers (repeats)            i32, o16   channels in and out
    k3            kernel size                 se0.25     squeeze-and-excitation ratio
    s22           stride, written twice       noskip     no residual branch
    e6            expansion ratio; 1 is a     pool       residual branch is 3x3 max pooling
                  depthwise separable layer   conv       a regular convolution

Without `noskip` or `pool` the skip is the identity, where a layer can carry it. An optional last
part `in1` gives the image's channels where they are not 3. An Architecture is canonical: two
descriptions of one network are equal, print the same and have the same hash.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from typing import Literal

from space.errors import ConfigError
from space.records import build, record, to_plain

Op = Literal["conv", "dconv", "mbconv"]
Skip = Literal["none", "identity", "pool"]

MAX_RESOLUTION = 4096
MAX_CHANNELS = 65536
RATIO_DECIMALS = 10


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], but got {value!r}")


@record
class BlockSpec:
    """One block (stage): `layers` identical layers, of which only the first has the stride.

    Attributes:
        op: `conv` (k x k convolution), `dconv` (depthwise separable), `mbconv` (inverted
            bottleneck).
        kernel_size: Odd, 1 to 15.
        expand_ratio: Width of an mbconv's middle relative to its input; 1 otherwise.
        se_ratio: Squeeze-and-excitation width relative to the layer's *input*; 0 is none. At
            most 10 decimals, as many as the text form writes.
        skip: Residual branch of every layer that can carry it.
        filters: Output channels.
        layers: Number of layers, at least 1.
        stride: Of the first layer, 1 or 2.
    """

    op: Op
    kernel_size: int
    expand_ratio: int
    se_ratio: float
    skip: Skip
    filters: int
    layers: int
    stride: int

    def __post_init__(self) -> None:
        _require("kernel_size", self.kernel_size, 1, 15)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, but got {self.kernel_size}")
        _require("expand_ratio", self.expand_ratio, 1, 64)
        _require("se_ratio", self.se_ratio, 0, 1)
        if round(self.se_ratio, RATIO_DECIMALS) != self.se_ratio:
            raise ValueError(
                f"se_ratio must have at most {RATIO_DECIMALS} decimals, but got {self.se_ratio!r}"
            )
        _require("filters", self.filters, 1, MAX_CHANNELS)
        _require("layers", self.layers, 1, 1000)
        _require("stride", self.stride, 1, 2)
        if self.op == "mbconv" and self.expand_ratio == 1:
            object.__setattr__(self, "op", "dconv")
        if self.op != "mbconv" and self.expand_ratio != 1:
            raise ValueError(f"expand_ratio must be 1 for {self.op}, but got {self.expand_ratio}")
        object.__setattr__(self, "se_ratio", float(self.se_ratio))

    def canonical(self, input_filters: int) -> BlockSpec:
        """Return the block with a skip that no layer could carry written `none`."""
        carries = self.layers > 1 or (self.stride == 1 and input_filters == self.filters)
        if self.skip == "identity" and not carries:
            return dataclasses.replace(self, skip="none")
        return self


@record
class Layer:
    """One layer of a block with its shapes: what a builder, a counter or a writer needs.

    Sizes are pixels of the square feature map. `mid_filters` is the width of the depthwise
    convolution (of the output for `conv`), `se_filters` the reduced width of the
    squeeze-and-excitation (0: none). `skip` is what this layer really carries.
    """

    block_index: int
    layer_index: int
    op: Op
    kernel_size: int
    stride: int
    input_filters: int
    mid_filters: int
    output_filters: int
    se_filters: int
    skip: Skip
    input_size: int
    output_size: int


class _Named:
    """Where an Architecture keeps its text and hash, which are asked for all the time."""

    __slots__ = ("_hash", "_text")

    _hash: str
    _text: str


@record
class Architecture(_Named):
    """A whole network, canonical and hashable.

    Attributes:
        stem_filters: Output channels of the 3x3 stride-2 (or `stem_stride`) stem convolution.
        blocks: The blocks in order.
        head_filters: Output channels of the 1x1 convolution before the pooling.
        resolution: Input height and width in pixels.
        classes: Number of classes.
        stem_stride: 2 as published; 1 for small images.
        input_channels: 3, or 1 for gray images.
    """

    stem_filters: int
    blocks: tuple[BlockSpec, ...]
    head_filters: int
    resolution: int
    classes: int
    stem_stride: int = 2
    input_channels: int = 3

    def __post_init__(self) -> None:
        _require("stem_filters", self.stem_filters, 1, MAX_CHANNELS)
        _require("head_filters", self.head_filters, 1, MAX_CHANNELS)
        _require("resolution", self.resolution, 1, MAX_RESOLUTION)
        _require("classes", self.classes, 2, 1_000_000)
        _require("stem_stride", self.stem_stride, 1, 2)
        _require("input_channels", self.input_channels, 1, 64)
        if not self.blocks:
            raise ValueError("blocks must hold at least one block, but got none")
        if self.resolution < self._least_resolution():
            raise ValueError(
                f"resolution must be at least {self._least_resolution()}, so that no stride"
                f" (in all {self.total_stride}) exceeds the map it is taken on, but got"
                f" {self.resolution}"
            )
        filters, canonical = self.stem_filters, []
        for block in self.blocks:
            canonical.append(block.canonical(filters))
            filters = block.filters
        object.__setattr__(self, "blocks", tuple(canonical))

    @property
    def total_stride(self) -> int:
        """Product of all strides: how many input pixels one pixel of the last map spans."""
        stride = self.stem_stride
        for block in self.blocks:
            stride *= block.stride
        return stride

    def _least_resolution(self) -> int:
        """The fewest pixels with which every stride still finds a map as large as itself."""
        least = 1
        for stride in (*(block.stride for block in reversed(self.blocks)), self.stem_stride):
            # A map of `least` pixels is what the smallest of these leaves: sizes round up.
            least = max(stride, (least - 1) * stride + 1)
        return least

    @property
    def text(self) -> str:
        """The text form (see the module's docstring); `parse_architecture` reads it back."""
        try:
            return self._text
        except AttributeError:
            object.__setattr__(self, "_text", _text(self))
            return self._text

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that identify the network in caches, files and the database."""
        try:
            return self._hash
        except AttributeError:
            digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
            object.__setattr__(self, "_hash", digest)
            return digest

    def __hash__(self) -> int:
        return hash(self.text)

    def layers(self) -> tuple[Layer, ...]:
        """All layers between stem and head, in order, with their shapes."""
        return _layers(self)

    @property
    def stem_size(self) -> int:
        """Pixels of the map after the stem."""
        return -(-self.resolution // self.stem_stride)

    def __str__(self) -> str:
        return self.text


@record
class NetworkStyle:
    """How a source framework builds the same Architecture; stored with weights and exports.

    Attributes:
        padding: `same` as TensorFlow pads (the surplus after), `symmetric` as k // 2 pads.
        batch_norm_epsilon: Added to the variance.
        batch_norm_momentum: Share of the old moving statistics kept at each step.
    """

    padding: Literal["same", "symmetric"] = "same"
    batch_norm_epsilon: float = 1e-3
    batch_norm_momentum: float = 0.99

    def __post_init__(self) -> None:
        _require("batch_norm_epsilon", self.batch_norm_epsilon, 1e-12, 1)
        _require("batch_norm_momentum", self.batch_norm_momentum, 0, 1)


PAPER_STYLE = NetworkStyle()


def graph_hash(architecture: Architecture, style: NetworkStyle = PAPER_STYLE) -> str:
    """Return 16 hexadecimal digits that identify the computation graph: network and style.

    The batch norm's momentum is left out: it does not change an inference graph.
    """
    text = f"{architecture.text} | {style.padding} | {style.batch_norm_epsilon!r}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1024)
def _layers(architecture: Architecture) -> tuple[Layer, ...]:
    made: list[Layer] = []
    filters, size = architecture.stem_filters, architecture.stem_size
    for index, block in enumerate(architecture.blocks):
        made += block_layers(index, block, filters, size)
        filters, size = block.filters, made[-1].output_size
    return tuple(made)


def block_layers(
    block_index: int, block: BlockSpec, input_filters: int, input_size: int
) -> tuple[Layer, ...]:
    """Return the layers of a block that stands at a place, after so many channels and pixels."""
    made = []
    filters, size = input_filters, input_size
    for layer_index in range(block.layers):
        stride = block.stride if layer_index == 0 else 1
        fits = stride == 1 and filters == block.filters
        output_size = -(-size // stride)
        middle = filters * block.expand_ratio if block.op != "conv" else block.filters
        made.append(
            Layer(
                block_index=block_index,
                layer_index=layer_index,
                op=block.op,
                kernel_size=block.kernel_size,
                stride=stride,
                input_filters=filters,
                mid_filters=middle,
                output_filters=block.filters,
                se_filters=max(1, int(filters * block.se_ratio)) if block.se_ratio else 0,
                skip="none" if block.skip == "identity" and not fits else block.skip,
                input_size=size,
                output_size=output_size,
            )
        )
        filters, size = block.filters, output_size
    return tuple(made)


# ---------------------------------------------------------------------------- text


_TOKENS = (
    ("r", r"r([1-9]\d*)"),
    ("k", r"k([1-9]\d*)"),
    ("s", r"s([1-9])([1-9])"),
    ("e", r"e([1-9]\d*)"),
    ("i", r"i([1-9]\d*)"),
    ("o", r"o([1-9]\d*)"),
)
_OPTIONAL = (r"se(0\.\d+|1)", r"(noskip|pool)", r"(conv)")


@functools.lru_cache(maxsize=4096)
def format_block(block: BlockSpec, input_filters: int) -> str:
    """Return a block in TPU notation, `r2_k3_s22_e6_i16_o24`."""
    tokens = [
        f"r{block.layers}_k{block.kernel_size}_s{block.stride}{block.stride}"
        f"_e{block.expand_ratio}_i{input_filters}_o{block.filters}"
    ]
    if block.se_ratio:
        tokens.append(f"se{_ratio_text(block.se_ratio)}")
    if block.skip != "identity":
        tokens.append({"none": "noskip", "pool": "pool"}[block.skip])
    if block.op == "conv":
        tokens.append("conv")
    return "_".join(tokens)


def _ratio_text(ratio: float) -> str:
    text = f"{ratio:.{RATIO_DECIMALS}f}".rstrip("0")
    return "1" if ratio == 1 else text


@functools.lru_cache(maxsize=4096)
def parse_block(text: str) -> tuple[BlockSpec, int]:
    """Return the block and the input channels that a string in TPU notation describes.

    `format_block` prints the same string back.

    Raises:
        ConfigError: A token is unknown, missing, repeated or out of order; it is named.
    """
    tokens = text.split("_")
    numbers: dict[str, int] = {}
    for name, pattern in _TOKENS:
        token = tokens.pop(0) if tokens else ""
        match = re.fullmatch(pattern, token, re.ASCII)
        if match is None:
            raise ConfigError(
                f"block {text!r}: the token {name}<number> must stand here, but got {token!r};"
                " the order is r k s e i o [se] [noskip|pool] [conv]."
            )
        if len(set(match.groups())) > 1:
            raise ConfigError(f"block {text!r}: both strides must be equal, but got {token!r}.")
        numbers[name] = int(match.group(1)[:9])
        if len(match.group(1)) > 9:
            raise ConfigError(f"block {text!r}: the number in {token[:20]!r} is too large.")
    se_ratio, skip, conv = _parse_optional_tokens(text, tokens)
    op: Op = "conv" if conv else "dconv" if numbers["e"] == 1 else "mbconv"
    try:
        _require("i", numbers["i"], 1, MAX_CHANNELS)
        block = BlockSpec(
            op, numbers["k"], numbers["e"], se_ratio, skip, numbers["o"], numbers["r"],
            numbers["s"],
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"block {text!r}: {error}.") from None
    if format_block(block, numbers["i"]) != text:
        raise ConfigError(
            f"block {text!r}: must be written {format_block(block, numbers['i'])!r}."
        )
    return block, numbers["i"]


def _parse_optional_tokens(text: str, tokens: list[str]) -> tuple[float, Skip, bool]:
    found: list[str | None] = []
    for pattern in _OPTIONAL:
        match = re.fullmatch(pattern, tokens[0], re.ASCII) if tokens else None
        found.append(match.group(1) if match else None)
        if match:
            tokens.pop(0)
    if tokens:
        raise ConfigError(
            f"block {text!r}: unknown token {tokens[0]!r};"
            " after o<number> may stand se<ratio>, noskip or pool, conv, in this order."
        )
    ratio, skip, conv = found
    skips: dict[str | None, Skip] = {None: "identity", "noskip": "none", "pool": "pool"}
    return float(ratio or 0), skips[skip], conv is not None


def _text(architecture: Architecture) -> str:
    stem = f"stem{architecture.stem_filters}" + ("_s11" if architecture.stem_stride == 1 else "")
    parts, filters = [stem], architecture.stem_filters
    for block in architecture.blocks:
        parts.append(format_block(block, filters))
        filters = block.filters
    parts.append(f"head{architecture.head_filters}")
    parts.append(f"r{architecture.resolution}")
    parts.append(f"c{architecture.classes}")
    if architecture.input_channels != 3:
        parts.append(f"in{architecture.input_channels}")
    return " | ".join(parts)


@functools.lru_cache(maxsize=1024)
def parse_architecture(text: str) -> Architecture:
    """Return the Architecture that a line in the text form describes.

    The first block's `i` may differ from the stem (the published small network says i16 after a
    stem of 8): the real input is the stem. Any other break in the chain of channels is an error.

    Raises:
        ConfigError: The offending part is named.
    """
    parts = [part.strip() for part in text.split("|")]
    channels = 3
    if re.fullmatch(r"in[1-9]\d{0,3}", parts[-1], re.ASCII):
        channels = int(parts.pop()[2:])
    stem_stride = 2
    if parts[0].endswith("_s11"):
        stem_stride, parts[0] = 1, parts[0].removesuffix("_s11")
    if len(parts) < 5:
        raise ConfigError(
            f"architecture {_shorten(text)}: must read 'stem<n> | <block> | ... | head<n> |"
            f" r<pixels> | c<classes>', but has {len(parts)} parts."
        )
    blocks: list[BlockSpec] = []
    for index, part in enumerate(parts[1:-3]):
        block, input_filters = parse_block(part)
        if index > 0 and input_filters != blocks[-1].filters:
            raise ConfigError(
                f"block {part!r}: i must be {blocks[-1].filters}, the channels of the block"
                f" before it, but got {input_filters}."
            )
        blocks.append(block)
    try:
        return Architecture(
            stem_filters=_number("stem", parts[0]),
            blocks=tuple(blocks),
            head_filters=_number("head", parts[-3]),
            resolution=_number("r", parts[-2]),
            classes=_number("c", parts[-1]),
            stem_stride=stem_stride,
            input_channels=channels,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"architecture {_shorten(text)}: {error}.") from None


def _number(name: str, part: str) -> int:
    match = re.fullmatch(rf"{name}([1-9]\d{{0,8}})", part, re.ASCII)
    if match is None:
        raise ConfigError(f"architecture: {name}<number> must stand here, but got {part!r}.")
    return int(match.group(1))


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---------------------------------------------------------------------------- JSON


def architecture_to_json(architecture: Architecture) -> dict[str, object]:
    """Return plain JSON values; `architecture_from_json` reads them back."""
    plain: dict[str, object] = to_plain(architecture)
    return plain


def architecture_from_json(values: object, *, where: str = "architecture") -> Architecture:
    """Return the Architecture that plain JSON values describe.

    Raises:
        ConfigError: A key or value is not an Architecture's.
    """
    return build(Architecture, values, where=where)
