"""ONNX graphs are the networks: published ones and members of every shipped space, two writers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
from onnx_parity import SPACES, STYLES, TOLERANCE, WRITERS, compared, differences

from space.architecture import Architecture, NetworkStyle
from space.mnasnet import adapt, published
from space.onnx_graph import onnx_model

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnasnet-a1", "mnasnet-b1", "mnasnet-small"])
def test_published_networks_are_written_alike_by_both_writers(name: str) -> None:
    architecture = adapt(published(name), resolution=64)
    found = differences(architecture, STYLES[0], BOTH, seed=1)
    assert found.keys() == set(BOTH)
    assert all(isinstance(d, float) and d <= TOLERANCE for d in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_two_members_of_a_space_are_written_alike_by_both_writers(space: str) -> None:
    """One with each padding, at 32 pixels."""
    rows = list(compared(space, 2, 32, BOTH, seed=5))
    assert [row["writer"] for row in rows] == BOTH
    assert [row["failures"] for row in rows] == [[], []]


@pytest.mark.parametrize("space", ["mnasnet", "small_image"])
@pytest.mark.parametrize(
    "wrong",
    [NetworkStyle("symmetric", 1e-3), NetworkStyle("same", 2e-3)],
    ids=["padding", "epsilon"],
)
def test_a_graph_that_is_slightly_wrong_is_noticed(
    space: str, wrong: NetworkStyle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(architecture: Architecture, style: NetworkStyle, weights: Any, x: Any) -> Any:
        return onnx_model(architecture, wrong, weights=weights)

    monkeypatch.setitem(WRITERS, "direct", write)
    rows = list(compared(space, 1, 32, ["direct"], seed=6))
    assert [len(row["failures"]) for row in rows] == [1]


#: So many with the slow tests, and all that was asked of them with `make parity`.
FEW_AND_MANY = [
    pytest.param(40, 4, marks=pytest.mark.slow),
    pytest.param(200, 12, marks=pytest.mark.parity),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("members", "slow_writers"), FEW_AND_MANY)
def test_members_of_a_space_are_written_as_they_are(
    space: str, members: int, slow_writers: int, tmp_path: Path
) -> None:
    """At 32 pixels by the direct writer, 5 more at the space's own resolution."""
    rows = run_benchmark(tmp_path, space, members=members, full=5, writer="direct")
    assert [row["members"] for row in rows] == [members, 5]
    # In one network of some hundreds, random weights let activations grow until float32 itself is
    # wrong by more than the tolerance: PyTorch's logits then differ by as much from float64's.
    assert len(rows[0]["failures"]) <= 4, rows[0]
    assert rows[0]["max_abs_difference"] <= 20 * TOLERANCE
    assert rows[1]["failures"] == []
    # MindSpore's own writer takes seconds for each.
    rows = run_benchmark(tmp_path, space, members=slow_writers, full=0, writer="mindspore")
    assert [row["members"] for row in rows] == [slow_writers]
    assert [row["failures"] for row in rows] == [[]]


def run_benchmark(
    folder: Path, space: str, *, members: int, full: int, writer: str
) -> list[dict[str, Any]]:
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
