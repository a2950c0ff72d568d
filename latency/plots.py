"""Pictures of measurements and predictions, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from space.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from latency.measurement import Measurement

#: Inches; with _DOTS_PER_INCH a picture for a page.
_SIZE = (7.0, 4.5)
_DOTS_PER_INCH = 150

#: Validated for colour-vision deficiency; the second is drawn with another mark, too.
_BLUE, _ORANGE, _GRAY = "#2166ac", "#d6604d", "#666666"
_SERIES = ((_BLUE, "o"), (_ORANGE, "x"))


def check_picture(path: Path | None, endings: Sequence[str] = (".png",)) -> None:
    """Refuse, before anything is measured, a picture that could not be written.

    Raises:
        ConfigError: Its ending is not one of these, or its folder is not there.
    """
    if path is None:
        return
    if path.suffix not in endings:
        raise ConfigError(f"{path}: a picture's name must end in {' or '.join(endings)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {str(path.parent)!r}; make it first.")


def plot_samples(measurement: Measurement, path: Path) -> None:
    """Draw how a measurement's samples are distributed, and in what order they came."""
    from matplotlib.figure import Figure

    samples, counted = measurement.samples_ms, measurement.counted_ms
    low, high = measurement.median_interval_ms
    figure = Figure(figsize=_SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    left.plot(samples, ".", color=_BLUE, markersize=4)
    if len(counted) < len(samples):
        marks = list(measurement.disturbed)
        left.plot(
            marks, [samples[k] for k in marks], ".", color=_GRAY, markersize=4,
            label=f"disturbed, not counted: {len(marks)} of {len(samples)}",
        )  # fmt: skip
        left.legend(frameon=False, fontsize=8)
    left.set_xlabel("sample, in the order taken")
    left.set_ylabel(f"ms per inference (mean of {measurement.inner_iterations})")
    right.hist(counted, bins="auto", orientation="horizontal", color=_BLUE)
    right.set_xlabel("samples that count")
    for axes in (left, right):
        axes.axhline(measurement.median_ms, color=_ORANGE, linewidth=1.2)
        axes.axhspan(low, high, color=_ORANGE, alpha=0.25, linewidth=0)
        axes.grid(alpha=0.3)
    device, median_ms = measurement.device.get("name"), measurement.median_ms
    figure.suptitle(
        f"{device}: median {median_ms:.4g} ms, 95 % interval {low:.4g} to {high:.4g} ms,"
        f" {measurement.verdict}",
        fontsize=10,
    )
    _save(figure, path)


def plot_predictions(
    measured_ms: Sequence[float],
    predicted_ms: Mapping[str, Sequence[float]],
    title: str,
    path: Path,
) -> None:
    """Draw predicted against measured times, with the band of 10 %.

    Args:
        measured_ms: Of each network.
        predicted_ms: Legend -> what was predicted of each; at most two.
        title: Of the picture.
        path: Of the file, .png.
    """
    from matplotlib.figure import Figure

    every = [*measured_ms, *(t for times in predicted_ms.values() for t in times)]
    ends = [0.95 * min(every), 1.05 * max(every)]
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot(ends, ends, color=_GRAY, linewidth=1)
    axes.fill_between(
        ends, [0.9 * e for e in ends], [1.1 * e for e in ends],
        color=_GRAY, alpha=0.2, linewidth=0, label="within 10 %",
    )  # fmt: skip
    drawn = list(zip(predicted_ms.items(), _SERIES, strict=False))
    for (legend, times), (color, mark) in reversed(drawn):
        axes.plot(measured_ms, times, mark, color=color, markersize=4, label=legend)
    axes.set(xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
