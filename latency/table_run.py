"""Makes a LatencyTable: chooses networks, measures those that are not yet, fits, and tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from latency.design import Design
from latency.device import LatencyMeter
from latency.journal import Journal, Watch
from latency.lookup_table import (
    FEWEST_NETWORKS,
    LatencyPredictor,
    LatencyTable,
    accuracy,
    fit_table,
    predict_by_macs,
)
from space.architecture import Architecture
from space.errors import MeasurementError
from space.records import record
from space.search_space import SearchSpace


@record
class TableRun:
    """A table and what it was tested with.

    Attributes:
        table: With its errors.
        held_out: The networks that nothing was fitted to and that have a time.
        measured_ms: Their times.
        predicted_ms: What the table says.
        macs_line_ms: What a straight line through multiply-adds says.
        disturbed: How many of all measurements were noisy or drifted when taken twice.
        failed: How many networks have no time: the device cannot run them, or failed just now.
    """

    table: LatencyTable
    held_out: tuple[Architecture, ...]
    measured_ms: tuple[float, ...]
    predicted_ms: tuple[float, ...]
    macs_line_ms: tuple[float, ...]
    disturbed: int
    failed: int


def make_table(
    meter: LatencyMeter, space: SearchSpace, design: Design, journal_path: Path, watch: Watch
) -> TableRun:
    """Return the table of a device and a space.

    Args:
        meter: Of the device.
        space: That the networks are members of.
        design: Which networks.
        journal_path: File of the measurements. What it holds is not measured again.
        watch: See Journal.measure; it is called for a second pass over what was disturbed, too.

    Raises:
        ConfigError: The file is another device's, is in use, or is not a journal.
        MeasurementError: The device does not answer, or too few networks have a time.
    """
    with Journal(journal_path, meter.identity()) as journal:
        networks = design.in_turn
        journal.measure(meter, journal.missing(networks), watch)
        journal.measure(meter, journal.disturbed(networks), watch)
        return _fitted(meter, space, design, journal)


def _fitted(meter: LatencyMeter, space: SearchSpace, design: Design, journal: Journal) -> TableRun:
    found = {network: journal.get(network) for network in design.in_turn}
    times = {network: m.median_ms for network, m in found.items() if m is not None}
    fitted = [network for network in design.fitted if network in times]
    held_out = [network for network in design.held_out if network in times]
    if len(fitted) < FEWEST_NETWORKS or not held_out:
        raise MeasurementError(
            f"a table needs {FEWEST_NETWORKS} networks to fit and 1 to test, but of those measured"
            f" {len(fitted)} and {len(held_out)} have a time"
        )
    fitted_ms, measured = [times[n] for n in fitted], np.array([times[n] for n in held_out])
    table = fit_table(space.config, meter.identity(), fitted, fitted_ms)
    predicted = LatencyPredictor(table).predict(held_out)
    line = predict_by_macs(fitted, fitted_ms, held_out)
    return TableRun(
        table=dataclasses.replace(
            table, held_out=accuracy(predicted, measured), macs_line=accuracy(line, measured)
        ),
        held_out=tuple(held_out),
        measured_ms=tuple(measured.tolist()),
        predicted_ms=tuple(predicted.tolist()),
        macs_line_ms=tuple(line.tolist()),
        disturbed=sum(m is not None and m.verdict != "ok" for m in found.values()),
        failed=sum(m is None for m in found.values()),
    )
