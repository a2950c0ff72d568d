"""Which class is taken for which: counted, and drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: More classes than this are drawn without their names and counts.
_MAX_NAMED = 30


def count_confusions(
    labels: NDArray[np.int32], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Return int64 (classes, classes): how many images of each row's class got each column's."""
    flat = labels.astype(np.int64) * classes + predicted
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def confusion_png(counts: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Return a PNG of counts (classes, classes), coloured by the share of the row's images."""
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= _MAX_NAMED
    figure = Figure(figsize=(3 + 0.5 * len(classes),) * 2 if named else (12, 12))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the class's images")
    axes.set(xlabel="predicted class", ylabel="class")
    if named:
        # A name is a name, also with dollar signs in it.
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, size=8)
    written = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(written, format="png", bbox_inches="tight", dpi=100)
    return written.getvalue()
