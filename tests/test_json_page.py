"""docs/json.md names the keys that the commands print."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from latency.measurement import Measurement, summary
from retrain.commands import TrainReport, ValidationReport
from retrain.convert import ConvertReport
from retrain.export import ExportReport
from search.tables import trial_summary
from search.trial import Trial

PAGE = (Path(__file__).parents[1] / "docs" / "json.md").read_text()


def documented(heading: str) -> set[str]:
    """The words in code style of the paragraph that starts with a heading."""
    paragraph = next(p for p in PAGE.split("\n\n") if p.startswith(heading))
    return set(re.findall(r"`([a-z0-9_]+)`", paragraph))


def test_a_trials_keys_are_documented() -> None:
    trial = Trial(
        id=0, batch=0, role="search", proposal_id=0, tokens=(0,), log_prob=0.0, architecture="",
        architecture_hash="", seed=0, epochs=1.0,
    )  # fmt: skip
    assert set(trial_summary(trial)) <= documented("**A trial**")


def test_a_measurements_keys_are_documented() -> None:
    measurement = Measurement((1.0,), 1, 0, 1, "graph", {}, {}, {})
    assert set(summary(measurement)) <= documented("**`mnas latency measure")


@pytest.mark.parametrize(
    ("record", "heading"),
    [
        (TrainReport, "**`mnas retrain --config"),
        (ValidationReport, "**`mnas validate`**"),
        (ExportReport, "**`mnas export`**"),
        (ConvertReport, "**`mnas convert SOURCE OUT`**"),
    ],
)
def test_a_reports_keys_are_documented(record: type, heading: str) -> None:
    names = {field.name for field in dataclasses.fields(record)}
    assert names <= documented(heading)
