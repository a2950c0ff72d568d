"""ONNX graphs are the networks: published ones and members of every shipped space, two writers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import pytest
from onnx_parity import SPACES, STYLES, TOLERANCE, compared, differences

from space.mnasnet import adapt, published

ROOT = Path(__file__).parents[1]
BOTH = ["direct", "mindspore"]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Compiling a graph for one batch of images takes longer than the batch."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def test_every_shipped_space_is_compared() -> None:
    assert set(SPACES) == {path.stem for path in (ROOT / "configs" / "space").glob("*.yaml")}


@pytest.mark.parametrize("name", ["mnasnet-a1", "mnasnet-b1", "mnasnet-small"])
def test_published_networks_are_written_alike_by_both_writers(name: str) -> None:
    architecture = adapt(published(name), resolution=64)
    found = differences(architecture, STYLES[0], BOTH, seed=1)
    assert found.keys() == set(BOTH)
    assert all(isinstance(d, float) and d <= TOLERANCE for d in found.values()), found


@pytest.mark.parametrize("space", SPACES)
def test_two_members_of_a_space_are_written_alike_by_both_writers(space: str) -> None:
    """One with each padding, at 32 pixels."""
    rows = list(compared(space, 2, 32, BOTH, seed=5))
    assert [row["writer"] for row in rows] == BOTH
    assert [row["failures"] for row in rows] == [[], []]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("space", SPACES)
def test_two_hundred_members_of_a_space_are_written_as_they_are(
    space: str, tmp_path: Path
) -> None:
    """200 at 32 pixels by the direct writer, 5 more at the space's own resolution."""
    rows = run_benchmark(tmp_path, space, members=200, full=5, writer="direct")
    assert [row["members"] for row in rows] == [200, 5]
    assert [row["failures"] for row in rows] == [[], []]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("space", SPACES)
def test_twelve_members_of_a_space_are_written_as_they_are_by_mindspore(
    space: str, tmp_path: Path
) -> None:
    """12 at 32 pixels: this writer takes seconds for each. The benchmark does as many as asked."""
    rows = run_benchmark(tmp_path, space, members=12, full=0, writer="mindspore")
    assert [row["members"] for row in rows] == [12]
    assert [row["failures"] for row in rows] == [[]]


def run_benchmark(
    folder: Path, space: str, *, members: int, full: int, writer: str
) -> list[dict[str, object]]:
    """The rows of benchmarks/onnx_parity.py, in a process whose memory goes away with it."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "onnx_parity.py"), "--spaces", space,
            "--members", str(members), "--full", str(full), "--writers", writer,
            "--json", str(folder / "rows.json"),
        ],
        capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    rows: list[dict[str, object]] = json.loads((folder / "rows.json").read_text())
    return rows
