"""Draw a network stage by stage as an SVG that stands by itself.

One bar is one layer: its height grows with the feature map that it puts out, its width with the
channels, its colour and label say the operation; a cap marks squeeze-and-excitation, an arc the
residual branch. Colours are Okabe and Ito's, which colour-blind people tell apart; the drawing
follows the reader's light or dark mode and prints dark on white.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence

from space.architecture import Architecture, Layer
from space.cost import count
from space.records import record

#: Layers of a block beyond this many are folded into one bar with their number.
_MAX_BARS = 8
_GAP, _STAGE_GAP, _MARGIN = 5.0, 18.0, 14.0
_TOP, _BARS, _LABELS, _LEGEND = 74.0, 118.0, 92.0, 46.0
_BASE = _TOP + _BARS
_LINE = 14.5
_LETTER, _BOLD_LETTER = 6.1, 6.9  # mean widths at 11 px, generously
_MIN_WIDTH = 780.0

_NAMES = {"conv": "Conv", "dconv": "DWSep", "mbconv": "MBConv"}
_LEGENDS = (
    ("end", "3×3 stem, 1×1 head"),
    ("conv", "Conv: k×k convolution"),
    ("dconv", "DWSep: depthwise separable"),
    ("mbconv", "MBConv: inverted bottleneck, ×n expansion"),
)

_STYLE = """
.mnas-net{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.mnas-net .paper{fill:#fff}.mnas-net text{fill:#1b1f24}.mnas-net .soft{fill:#59636e}
.mnas-net .strong{font-weight:600}.mnas-net .rule{stroke:#c8ced6;fill:none}
.mnas-net .end{fill:#8b949e}.mnas-net .conv{fill:#cc79a7}.mnas-net .dconv{fill:#e69f00}
.mnas-net .mbconv{fill:#0072b2}.mnas-net .se{fill:#009e73;stroke:#fff;stroke-width:1}
.mnas-net .arc{fill:none;stroke:#1b1f24;stroke-width:1.3}.mnas-net .pool{stroke-dasharray:3 2.5}
.mnas-net .fold{fill:#fff;font-weight:600}
@media screen and (prefers-color-scheme:dark){.mnas-net .paper{fill:#161b22}
.mnas-net text{fill:#e6edf3}.mnas-net .soft{fill:#9aa4af}.mnas-net .rule{stroke:#3d444d}
.mnas-net .end{fill:#7d8590}.mnas-net .mbconv{fill:#56b4e9}.mnas-net .arc{stroke:#e6edf3}
.mnas-net .se{stroke:#161b22}.mnas-net .fold{fill:#10151b}}
@media print{.mnas-net{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


@record
class _Bar:
    """A layer, or several alike folded into one."""

    kind: str
    filters: int
    size: int
    has_se: bool
    skip: str
    layers: int
    title: str

    @property
    def width(self) -> float:
        narrowest = 32.0 if self.layers > 1 else 10.0
        return min(90.0, max(narrowest, 3.2 * math.sqrt(self.filters)))


@record
class _Stage:
    name: str
    lines: tuple[str, ...]
    bars: tuple[_Bar, ...]

    @property
    def bars_width(self) -> float:
        return sum(bar.width for bar in self.bars) + _GAP * (len(self.bars) - 1)

    @property
    def width(self) -> float:
        texts = [_LETTER * len(line) for line in (self.name, *self.lines)]
        return max(self.bars_width, *texts, _BOLD_LETTER * len(self.lines[0]))


def architecture_svg(architecture: Architecture) -> str:
    """Return the drawing as the text of one `<svg>` element, with a title and a legend.

    It needs no other file and no script, can be written to a file as it is or put into an HTML
    page, and carries its size in `width` and `height` (CSS pixels).
    """
    stages = _stages(architecture)
    natural = sum(stage.width for stage in stages) + _STAGE_GAP * (len(stages) - 1)
    width = max(_MIN_WIDTH, natural + 2 * _MARGIN)
    # Short networks are spread over the whole width.
    gap = _STAGE_GAP + (width - 2 * _MARGIN - natural) / max(1, len(stages) - 1)
    height = _BASE + _LABELS + _LEGEND
    cost = count(architecture)
    channels = _plural(architecture.input_channels, "channel")
    title = (
        f"{architecture.resolution}×{architecture.resolution} pixels,"
        f" {channels} → {architecture.classes:,} classes"
    )
    costs = f"{cost.parameters:,} parameters, {cost.macs:,} multiply-adds"
    parts = [
        f'<svg class="mnas-net" xmlns="http://www.w3.org/2000/svg" role="img"'
        f' width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' aria-label="{html.escape(f"Network {architecture.hash}: {title}")}">',
        f"<style>{_STYLE}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        _text(_MARGIN, 20, title, "strong"),
        _text(_MARGIN, 36, f"{costs}, hash {architecture.hash}", "soft"),
        f'<path class="rule" d="M{_MARGIN} {_BASE + 0.5}H{width - _MARGIN:.1f}"/>',
    ]
    x = _MARGIN
    for stage in stages:
        parts.extend(_draw_stage(stage, x, architecture.stem_size))
        x += stage.width + gap
    parts.extend(_draw_legend(height - _LEGEND + 12))
    parts.append("</svg>")
    return "\n".join(parts)


# ---------------------------------------------------------------------------- what is drawn


def _stages(architecture: Architecture) -> list[_Stage]:
    size, last = architecture.stem_size, architecture.layers()[-1].output_size
    stem, head = architecture.stem_filters, architecture.head_filters
    made = [
        _Stage(
            "stem",
            ("Conv 3×3", f"{stem} ch", f"{size}×{size} px"),
            (
                _Bar(
                    "end",
                    stem,
                    size,
                    False,
                    "none",
                    1,
                    f"stem: 3×3 convolution, {_plural(stem, 'channel')}",
                ),
            ),
        )
    ]
    for index, layers in itertools.groupby(architecture.layers(), lambda x: x.block_index):
        made.append(_block_stage(architecture, index, list(layers)))
    made.append(
        _Stage(
            "head",
            ("Conv 1×1", f"{head} ch", "mean pooling", f"→ {architecture.classes:,} classes"),
            (
                _Bar(
                    "end",
                    head,
                    last,
                    False,
                    "none",
                    1,
                    f"head: 1×1 convolution, {_plural(head, 'channel')}",
                ),
            ),
        )
    )
    return made


def _block_stage(architecture: Architecture, index: int, layers: Sequence[Layer]) -> _Stage:
    block, last = architecture.blocks[index], layers[-1]
    expansion = str(block.expand_ratio) if block.op == "mbconv" else ""
    times = f"{block.layers} × " if block.layers > 1 else ""
    lines = [
        f"{times}{_NAMES[block.op]}{expansion} {block.kernel_size}×{block.kernel_size}",
        f"{block.filters} ch",
        f"{last.output_size}×{last.output_size} px",
    ]
    extras = [f"SE {block.se_ratio:.4g}"] if block.se_ratio else []
    extras += {"none": ["no skip"], "pool": ["pool skip"], "identity": []}[block.skip]
    if extras:
        lines.append(", ".join(extras))
    shown = layers if len(layers) <= _MAX_BARS else layers[: _MAX_BARS - 1]
    bars = [_bar(layer) for layer in shown]
    if len(shown) < len(layers):
        rest = len(layers) - len(shown)
        title = f"block {index + 1}: {rest} more layers like the one before"
        bars.append(_bar(last, layers=rest, title=title))
    return _Stage(f"block {index + 1}", tuple(lines), tuple(bars))


def _bar(layer: Layer, *, layers: int = 1, title: str | None = None) -> _Bar:
    middle = "" if layer.op != "mbconv" else f" {layer.mid_filters} →"
    facts = [
        f"block {layer.block_index + 1}, layer {layer.layer_index + 1}: {_NAMES[layer.op]}"
        f" {layer.kernel_size}×{layer.kernel_size}, stride {layer.stride}",
        f"{layer.input_filters} →{middle} {layer.output_filters} channels",
        f"{layer.input_size} → {layer.output_size} pixels",
    ]
    if layer.se_filters:
        facts.append(f"squeeze-and-excitation {layer.se_filters}")
    if layer.skip != "none":
        facts.append(f"{layer.skip} skip")
    return _Bar(
        kind=layer.op,
        filters=layer.output_filters,
        size=layer.output_size,
        has_se=layer.se_filters > 0,
        skip=layer.skip,
        layers=layers,
        title=title or ", ".join(facts),
    )


# ---------------------------------------------------------------------------- how it is drawn


def _draw_stage(stage: _Stage, left: float, largest: int) -> list[str]:
    middle = left + stage.width / 2
    x = middle - stage.bars_width / 2
    parts = []
    for bar in stage.bars:
        tall = 14 + (_BARS - 14) * math.sqrt(bar.size / largest)
        parts.extend(_draw_bar(bar, x, _BASE - tall, tall))
        x += bar.width + _GAP
    parts.append(_text(middle, _BASE + 18, stage.name, "soft", anchor="middle"))
    for row, line in enumerate(stage.lines):
        style = "strong" if row == 0 else ""
        parts.append(_text(middle, _BASE + 18 + _LINE * (row + 1), line, style, anchor="middle"))
    return parts


def _draw_bar(bar: _Bar, x: float, y: float, tall: float) -> list[str]:
    parts = [
        f"<g><title>{html.escape(bar.title)}</title>",
        f'<rect class="{bar.kind}" x="{x:.1f}" y="{y:.1f}" width="{bar.width:.1f}"'
        f' height="{tall:.1f}" rx="2"/>',
    ]
    if bar.has_se:
        parts.append(
            f'<rect class="se" x="{x - 0.5:.1f}" y="{y - 0.5:.1f}" width="{bar.width + 1:.1f}"'
            ' height="8" rx="2"/>'
        )
    if bar.skip != "none":
        start, end, reach = x - _GAP / 2 + 1, x + bar.width + _GAP / 2 - 1, 13
        style = "arc pool" if bar.skip == "pool" else "arc"
        parts.append(
            f'<path class="{style}" d="M{start:.1f} {y - 3:.1f}C{start:.1f} {y - reach:.1f}'
            f' {end:.1f} {y - reach:.1f} {end:.1f} {y - 3:.1f}"/>'
        )
    if bar.layers > 1:
        label = f"+{bar.layers}"
        parts.append(_text(x + bar.width / 2, _BASE - 4, label, "fold", anchor="middle"))
    parts.append("</g>")
    return parts


def _draw_legend(y: float) -> list[str]:
    parts, x = [], _MARGIN
    for kind, label in _LEGENDS:
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y - 9}" width="10" height="10"/>')
        parts.append(_text(x + 14, y, label, "soft"))
        x += 14 + _LETTER * len(label) + 10
    y, x = y + 18, _MARGIN
    parts.append(f'<rect class="se" x="{x}" y="{y - 8}" width="12" height="8" rx="2"/>')
    parts.append(_text(x + 16, y, "SE: squeeze-and-excitation", "soft"))
    for style, label, shift in (("arc", "identity skip", 186.0), ("arc pool", "pool skip", 296.0)):
        parts.append(
            f'<path class="{style}" d="M{x + shift} {y}c0 -11 14 -11 14 0"/>'
            + _text(x + shift + 18, y, label, "soft")
        )
    parts.append(_text(x + 386, y, "height: feature map; width: channels (ch)", "soft"))
    return parts


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _text(x: float, y: float, text: str, style: str, *, anchor: str = "start") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )
