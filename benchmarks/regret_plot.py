"""A figure of how regret falls with trials: a panel per device and objective.

`search_efficiency.py --plot` draws it. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Regrets in points after so many trials, one for each seed.
Curve = Mapping[int, Sequence[float]]

#: The colours of Okabe and Ito that differ for colour-blind eyes too, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

#: The axis is logarithmic, which has no zero: less is drawn here. Below 0.05 nothing means much.
FLOOR = 0.01


def draw(
    path: Path,
    panels: Mapping[tuple[str, str], Mapping[str, Curve]],
    recorded: Mapping[str, str],
) -> None:
    """Draw medians over seeds with a band between the quartiles.

    Args:
        path: Where to; the suffix, .svg or .png, is the format.
        panels: (device, objective) -> label -> curve.
        recorded: Labels of recorded runs, dashed -> the label whose colour each shares.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    devices = list(dict.fromkeys(device for device, _ in panels))
    objectives = list(dict.fromkeys(objective for _, objective in panels))
    shape = (len(objectives), len(devices))
    figure, grid = pyplot.subplots(
        *shape,
        figsize=(4.2 * shape[1] + 2.2, 3.4 * shape[0] + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    styles = _styles(panels, recorded)
    for (device, objective), curves in panels.items():
        axes = grid[objectives.index(objective)][devices.index(device)]
        _panel(axes, f"{device}, {objective}", curves, styles)
    figure.supxlabel("trials")
    figure.supylabel(f"regret in points, at least {FLOOR}: median and quartiles over seeds")
    handles = {
        label: line
        for axes in grid.flat
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _styles(
    panels: Mapping[tuple[str, str], Mapping[str, Curve]], recorded: Mapping[str, str]
) -> dict[str, dict[str, object]]:
    """How each label's line is drawn."""
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    leaders = list(dict.fromkeys(recorded.get(label, label) for label in labels))
    styles = {}
    for label in labels:
        place = leaders.index(recorded.get(label, label))
        is_recorded = label in recorded
        styles[label] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "--" if is_recorded else "-",
            "markerfacecolor": "white" if is_recorded else COLOURS[place % len(COLOURS)],
            "linewidth": 1.0 if is_recorded else 1.8,
        }
    return styles


def _panel(
    axes: Any,
    title: str,
    curves: Mapping[str, Curve],
    styles: Mapping[str, Mapping[str, object]],
) -> None:
    ticks: set[int] = set()
    for label, curve in curves.items():
        budgets = sorted(curve)
        ticks.update(budgets)
        quartiles = np.array([np.quantile(curve[b], [0.25, 0.5, 0.75]) for b in budgets])
        low, middle, high = np.maximum(quartiles, FLOOR).T
        axes.plot(budgets, middle, label=label, markersize=5, **styles[label])
        axes.fill_between(budgets, low, high, color=styles[label]["color"], alpha=0.1, linewidth=0)
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
