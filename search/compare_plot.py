"""The picture of a comparison: best reward so far against trials and hours, and the fronts.

PNG and SVG are drawn by matplotlib; HTML by plotly.js, which is part of the file, beside the
tables that `mnas compare` prints.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from search.compare import PAIR_HEADS, Comparison, campaign_lines, pair_tables
from search.history import Curve
from search.page import html_table, script_text, write_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What a picture's name may end in.
ENDINGS = (".html", ".png", ".svg")

#: The colours of Okabe and Ito that differ for colour-blind eyes too, without the yellow; a grey
#: that is seen on a dark page, too, in place of the black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
#: Campaigns that share a colour differ in these: matplotlib's name -> plotly's.
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
#: Likewise.
_MARKS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "x": "x-thin-open"}

_WIDEST, _NARROWEST = 3.2, 1.6
_FOLDER_LETTERS, _DOTS_PER_INCH = 32, 150
_HOURS = "hours since the first proposal, pauses included"
_TITLES = {
    "trials": ("trials", "best reward so far"),
    "hours": (_HOURS, "best reward so far"),
    "fronts": ("latency, ms", "accuracy"),
}


@dataclasses.dataclass(slots=True)
class Series:
    """What is drawn of a campaign.

    Attributes:
        number: The campaign's, from 1.
        label: What the legend calls it.
        colour: Shared by campaigns that differ in the seed alone.
        style: Which of those it is, from 0.
        width: Of its lines; those that are drawn first are wider, and seen under the others.
        panels: `trials`, `hours` and `fronts` -> points (x, y) of a staircase.
        front: (latency_ms, accuracy), fastest first.
        front_trials: Of each point of the front.
    """

    number: int
    label: str
    colour: str
    style: int
    width: float
    panels: dict[str, Curve]
    front_trials: list[int]

    @property
    def dash(self) -> str:
        return list(_DASHES)[self.style % len(_DASHES)]

    @property
    def mark(self) -> str:
        return list(_MARKS)[self.style % len(_MARKS)]


def write_plot(comparison: Comparison, path: Path) -> None:
    """Write the picture, so that no reader sees a part of it; an earlier one is replaced.

    Args:
        comparison: What was found.
        path: The suffix, one of ENDINGS, is the format.

    Raises:
        ConfigError: It cannot be written there.
    """
    series = series_of(comparison)
    if path.suffix == ".html":
        write_named(path, _page(comparison, series).encode())
    else:
        write_named(path, _picture(series, path.suffix.removeprefix(".")))


def series_of(comparison: Comparison) -> list[Series]:
    """Return what is drawn of each campaign: staircases of some hundred points."""
    variants = comparison.variants
    if len(set(variants)) == 1:  # they differ in their seeds alone: no groups to tell apart
        variants = list(range(len(variants)))
    order = list(dict.fromkeys(variants))
    made = []
    for index, (row, history) in enumerate(
        zip(comparison.campaigns, comparison.histories, strict=True)
    ):
        group, place = order.index(variants[index]), variants[:index].count(variants[index])
        front = [(point["latency_ms"], point["accuracy"]) for point in row["front"]]
        made.append(
            Series(
                number=index + 1,
                label=f"{index + 1} {row['controller']}, seed {row['seed']}"
                f" ({_end(row['folder'])})",
                colour=_COLOURS[group % len(_COLOURS)],
                # Groups beyond the colours take a colour again, with other dashes.
                style=place + group // len(_COLOURS),
                width=_WIDEST - (_WIDEST - _NARROWEST) * index / (len(variants) - 1),
                panels={
                    "trials": history.by_trials(),
                    "hours": history.by_hours(),
                    "fronts": front,
                },
                front_trials=[point["trial"] for point in row["front"]],
            )
        )
    return made


def _end(folder: str) -> str:
    return folder if len(folder) <= _FOLDER_LETTERS else "…" + folder[1 - _FOLDER_LETTERS :]


# ---------------------------------------------------------------------------- PNG and SVG


def _picture(series: Sequence[Series], form: str) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 2
    legend_rows = -(-len(series) // columns)
    figure = Figure(
        figsize=(13.5, 4.4 + 0.2 * legend_rows), layout=ConstrainedLayoutEngine(wspace=0.05)
    )
    panels: Sequence[Axes] = figure.subplots(1, len(_TITLES))
    for axes, (name, (x_title, y_title)) in zip(panels, _TITLES.items(), strict=True):
        for one in series:
            # A gid keeps its name in an SVG.
            axes.step(
                *_columns(one.panels[name]), where="post", color=one.colour, linestyle=one.dash,
                marker=one.mark if name == "fronts" else "", markersize=5, linewidth=one.width,
                label=one.label, gid=f"{name}-{one.number}",
            )  # fmt: skip
        axes.set(xlabel=x_title, ylabel=y_title)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    handles, labels = panels[-1].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may hold dollar signs
    made = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    figure.savefig(made, format=form, dpi=_DOTS_PER_INCH, metadata=metadata)
    return made.getvalue()


def _columns(points: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# ---------------------------------------------------------------------------- HTML


def _page(comparison: Comparison, series: Sequence[Series]) -> str:
    from plotly.offline import get_plotlyjs

    names = ", ".join(dict.fromkeys(row["controller"] for row in comparison.campaigns))
    heads = ["", *(str(one.number) for one in series)]
    numbers = range(1, len(heads))
    campaigns = [(label, *texts) for label, texts in campaign_lines(comparison)]
    template = importlib.resources.files("search") / "compare.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{len(series)} campaigns: {names}"),
        notes="".join(_paragraph(note) for note in comparison.notes),
        legend="".join(_legend(one) for one in series),
        campaigns=html_table(heads, campaigns, numbers=numbers),
        pairs=_pairs(comparison),
        front=_front(comparison),
        data=script_text(_charts(series)),
        plotly=get_plotlyjs(),
    )


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _legend(one: Series) -> str:
    dashes = {"-": "", "--": "7 4", ":": "2 3", "-.": "7 3 2 3"}[one.dash]
    return (
        '<li><svg width="36" height="10" aria-hidden="true"><line x1="0" y1="5" x2="36" y2="5"'
        f' stroke="{one.colour}" stroke-width="{one.width:.1f}" stroke-dasharray="{dashes}"/>'
        f"</svg>{html.escape(one.label)}</li>"
    )


def _pairs(comparison: Comparison) -> str:
    parts = [] if comparison.not_paired is None else [_paragraph(comparison.not_paired)]
    tables = pair_tables(comparison)
    if tables:
        parts.append(
            _paragraph(
                "One campaign's best after so many trials less the other's: above 0 the one named"
                " first is better. Hypervolume: the part that the front dominates of the box"
                " between the worst and the best accuracy and latency of all these campaigns."
            )
        )
    for table in tables:
        parts.append(f"<h3>{html.escape(table.title)}</h3>")
        parts.append(html_table(PAIR_HEADS, table.lines, numbers=range(1, len(PAIR_HEADS))))
    return "".join(parts)


def _front(comparison: Comparison) -> str:
    rows = [
        (str(number), str(point["trial"]), f"{point['accuracy']:.4f}",
         f"{point['latency_ms']:.4g}", f"{point['reward']:.4f}")
        for number, row in enumerate(comparison.campaigns, 1)
        for point in row["front"]
        if point["on_union_front"]
    ]  # fmt: skip
    rows.sort(key=lambda row: float(row[3]))
    return html_table(
        ("campaign", "trial", "accuracy", "latency ms", "reward"), rows, numbers=range(5)
    )


def _charts(series: Sequence[Series]) -> list[dict[str, Any]]:
    """What the page's script draws: id, traces and layout of each chart."""
    return [
        {
            "id": name,
            "traces": [_trace(one, name) for one in series],
            "layout": {
                "xaxis": {"title": {"text": x}, "exponentformat": "none"},
                "yaxis": {"title": {"text": y}},
            },
        }
        for name, (x, y) in _TITLES.items()
    ]


def _trace(one: Series, name: str) -> dict[str, Any]:
    x, y = _columns(one.panels[name])
    on_front = name == "fronts"
    # plotly reads a few tags in texts: a folder's name must not be read as such.
    label = html.escape(one.label)
    return {
        "type": "scatter",
        "mode": "lines+markers" if on_front else "lines",
        "name": label,
        "x": x,
        "y": y,
        "line": {
            "color": one.colour,
            "dash": _DASHES[one.dash],
            "width": one.width,
            "shape": "hv",
        },
        "marker": {"symbol": _MARKS[one.mark], "size": 7, "color": one.colour},
        "text": [f"trial {trial}" for trial in one.front_trials] if on_front else [],
        "hovertemplate": f"{label}<br>%{{x:.5g}}: %{{y:.4f}} %{{text}}<extra></extra>",
    }
