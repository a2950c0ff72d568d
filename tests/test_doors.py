"""The rooms import one way, and heavy packages only through their doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("space", "controller", "latency", "retrain", "search")

DOORS = {
    "mindspore": {"space/network.py", "space/depthwise.py", "latency/ascend.py", "retrain/"},
    "onnx": {"space/onnx_graph.py"},
    "onnxruntime": {
        "latency/onnxruntime_device.py",
        "latency/runner.py",
        "retrain/export.py",
        "space/quantization.py",
    },
    "numba": {"space/compiled.py"},
    "ray": {"search/ray_cluster.py"},
    "mlflow": {"search/tracking.py"},
    "torch": {"retrain/weight_files.py"},
    "yaml": {"space/records.py"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(DOORS))
def test_a_heavy_package_is_imported_only_through_its_doors(package: str) -> None:
    strangers = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            at_a_door = any(name == door or name.startswith(door) for door in DOORS[package])
            if package in imported(path) and not at_a_door:
                strangers.append(name)
    assert strangers == []


def test_the_rooms_import_one_way() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
