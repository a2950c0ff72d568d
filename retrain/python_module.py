"""A checkpoint's network as a Python module that needs nothing of this project.

The module is retrain/standalone.py, whose section `architecture` is written anew; as the file
stands there, it is MnasNet-A1.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from importlib import resources

from retrain.checkpoint import Checkpoint
from space.architecture import Architecture

_WIDTH = 99
_SECTION = re.compile(r"(?<= architecture\n\n).*?(?=# -+ network\n)", re.DOTALL)


def python_module(checkpoint: Checkpoint) -> str:
    """Return the module's text; its parameters bear the names that the checkpoint's have."""
    template = (resources.files("retrain") / "standalone.py").read_text(encoding="utf-8")
    section = _architecture_section(checkpoint)
    # A function, so that a backslash in a class's name stays one.
    return _SECTION.sub(lambda _: section, template)


def _architecture_section(checkpoint: Checkpoint) -> str:
    network, style = checkpoint.architecture, checkpoint.style
    normalisation = checkpoint.normalisation
    crop_pct, interpolation = checkpoint.evaluation_crop
    comment = textwrap.wrap(
        network.text, _WIDTH, initial_indent="#   ", subsequent_indent="#   ",
        break_long_words=False,
    )  # fmt: skip
    return f"""\
# Network {network.hash}:
{chr(10).join(comment)}

SIZE, CHANNELS = {network.resolution}, {network.input_channels}
#: Of each channel, with pixels in [0, 1].
MEAN, DEVIATION = {normalisation.mean}, {normalisation.deviation}
#: An image file's shorter side is scaled to SIZE / CROP_PCT before the centre is cut out.
CROP_PCT, INTERPOLATION = {crop_pct}, "{interpolation.upper()}"

#: Where a convolution's border needs an odd number of zeros, `same` puts one more behind, as
#: TensorFlow does; `symmetric` puts kernel // 2 on every side, as PyTorch does.
PADDING = "{style.padding}"
BATCH_NORM = {{"eps": {style.batch_norm_epsilon}, "momentum": {style.batch_norm_momentum}}}

STEM_CHANNELS, STEM_STRIDE = {network.stem_filters}, {network.stem_stride}
# fmt: off
BLOCKS = (
{_table(network)}
)
HEAD_CHANNELS = {network.head_filters}
{_classes(network, checkpoint.classes)}
# fmt: on

"""


def _table(network: Architecture) -> str:
    """A row a block, in columns."""
    rows = [
        [
            f'"{block.op}",', f"{block.kernel_size},", f"{block.stride},",
            f"{block.expand_ratio},", f"{block.filters},", f"{block.layers},",
            f"{block.se_ratio},", f'"{block.skip}"',
        ]
        for block in network.blocks
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading = "    #     operation, kernel, stride, expansion, channels, layers, se, skip"
    lines = [heading]
    for row in rows:
        # Words begin, numbers end at the same place.
        cells = [
            cell.ljust(width) if cell.startswith('"') else cell.rjust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(f"    Block({' '.join(cells).rstrip()}),")
    return "\n".join(lines)


def _classes(network: Architecture, classes: Iterable[str]) -> str:
    """The tuple of the classes' names; where they are not known, of their numbers."""
    # JSON's strings are Python's.
    names = [json.dumps(name, ensure_ascii=False) for name in classes]
    if not names:
        return f"CLASSES = tuple(str(number) for number in range({network.classes}))"
    line = f"CLASSES = ({', '.join(names)})"
    if len(line) <= _WIDTH:
        return line
    lines = [f"    {name}," for name in names]
    return "\n".join(["CLASSES = (", *lines, ")"])
