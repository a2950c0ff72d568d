"""The published MnasNet networks as tables, and scaling by width and resolution.

The tables are those of the MnasNet paper (Tan et al., CVPR 2019) as its TPU code publishes them.
"""

from __future__ import annotations

import dataclasses

from space.architecture import Architecture, parse_architecture
from space.errors import ConfigError
from space.records import did_you_mean

#: Every row is a block in the notation of the published TPU code.
PUBLISHED: dict[str, str] = {
    "mnasnet-a1": """
        stem32
        | r1_k3_s11_e1_i32_o16_noskip
        | r2_k3_s22_e6_i16_o24
        | r3_k5_s22_e3_i24_o40_se0.25
        | r4_k3_s22_e6_i40_o80
        | r2_k3_s11_e6_i80_o112_se0.25
        | r3_k5_s22_e6_i112_o160_se0.25
        | r1_k3_s11_e6_i160_o320
        | head1280 | r224 | c1000""",
    "mnasnet-b1": """
        stem32
        | r1_k3_s11_e1_i32_o16_noskip
        | r3_k3_s22_e3_i16_o24
        | r3_k5_s22_e3_i24_o40
        | r3_k5_s22_e6_i40_o80
        | r2_k3_s11_e6_i80_o96
        | r4_k5_s22_e6_i96_o192
        | r1_k3_s11_e6_i192_o320_noskip
        | head1280 | r224 | c1000""",
    "mnasnet-small": """
        stem8
        | r1_k3_s11_e1_i16_o8
        | r1_k3_s22_e3_i8_o16
        | r2_k3_s22_e6_i16_o16
        | r4_k5_s22_e6_i16_o32_se0.25
        | r3_k3_s11_e6_i32_o32_se0.25
        | r3_k5_s22_e6_i32_o88_se0.25
        | r1_k3_s11_e6_i88_o144
        | head1280 | r224 | c1000""",
    # The skeleton that the paper's space varies (Sandler et al., CVPR 2018).
    "mobilenet-v2": """
        stem32
        | r1_k3_s11_e1_i32_o16_noskip
        | r2_k3_s22_e6_i16_o24
        | r3_k3_s22_e6_i24_o32
        | r4_k3_s22_e6_i32_o64
        | r3_k3_s11_e6_i64_o96
        | r3_k3_s22_e6_i96_o160
        | r1_k3_s11_e6_i160_o320
        | head1280 | r224 | c1000""",
}


def round_filters(filters: int, multiplier: float) -> int:
    """Return `filters * multiplier` rounded to a multiple of 8, as the published code rounds.

    Never less than 8 and never less than 0.9 times the exact product.
    """
    exact = filters * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def scale_width(architecture: Architecture, multiplier: float) -> Architecture:
    """Return the network with the stem and every block (not the head) scaled in width.

    A block of one layer that changes the number of channels has no identity, and gets none where
    rounding makes the numbers equal: its text does not say that it might have had one.

    Raises:
        ConfigError: The multiplier is not in (0, 16].
    """
    if not 0 < multiplier <= 16:
        raise ConfigError(f"width: must be in (0, 16], but got {multiplier!r}.")
    if multiplier == 1:
        return architecture
    return dataclasses.replace(
        architecture,
        stem_filters=round_filters(architecture.stem_filters, multiplier),
        blocks=tuple(
            dataclasses.replace(block, filters=round_filters(block.filters, multiplier))
            for block in architecture.blocks
        ),
    )


def adapt(
    architecture: Architecture,
    *,
    width: float = 1.0,
    resolution: int | None = None,
    classes: int | None = None,
    input_channels: int | None = None,
) -> Architecture:
    """Return the network scaled in width and set to another kind of image.

    Raises:
        ConfigError: A value is out of range for this network.
    """
    scaled = scale_width(architecture, width)
    try:
        return dataclasses.replace(
            scaled,
            resolution=scaled.resolution if resolution is None else resolution,
            classes=scaled.classes if classes is None else classes,
            input_channels=(scaled.input_channels if input_channels is None else input_channels),
        )
    except ValueError as error:
        raise ConfigError(f"architecture: {error}.") from None


def published(name: str) -> Architecture:
    """Return a published network by name.

    Raises:
        ConfigError: Unknown name; names the nearest.
    """
    if name not in PUBLISHED:
        hint = did_you_mean(name, list(PUBLISHED)) or f"; known are {', '.join(PUBLISHED)}."
        raise ConfigError(f"unknown network {name!r}{hint}")
    return parse_architecture(" ".join(PUBLISHED[name].split()))


def find_architecture(name_or_text: str) -> Architecture:
    """Return a network given by a published name or by its text form.

    Raises:
        ConfigError: Neither.
    """
    return parse_architecture(name_or_text) if "|" in name_or_text else published(name_or_text)
