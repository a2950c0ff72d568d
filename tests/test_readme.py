"""Every command of the README runs, but those that set up a machine (`make ...`)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from campaigns import mnas_here

ROOT = Path(__file__).parents[1]


def code_blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The page's shell lines without comments, `make` and the activation of the environment."""
    lines = [
        line.split("  #")[0].strip()
        for block in code_blocks(page, "sh")
        for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith(("make", "source", "#"))]


def run_lines(lines: list[str], folder: Path) -> None:
    """Run lines in one shell, as a reader would, in a folder where docs/ and configs/ are seen."""
    for name in ("docs", "configs"):
        (folder / name).symlink_to(ROOT / name)
    # The console script of the environment that runs this test.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    lines = commands("README.md")
    assert sum(line.startswith("mnas ") for line in lines) >= 9
    run_lines(lines, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_python_lines_of_the_readme_run(tmp_path: Path) -> None:
    (block,) = code_blocks("README.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 trials" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_and_the_python_lines_of_the_export_page_run(tmp_path: Path) -> None:
    run_lines(commands("docs/export.md"), tmp_path)
    (block,) = code_blocks("docs/export.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.stdout == "(3, 10)\n", done.stderr[-3000:]


def test_the_commands_of_the_networks_page_run(tmp_path: Path) -> None:
    (space,) = code_blocks("docs/networks.md", "yaml")
    (tmp_path / "my_space.yaml").write_text(space)
    lines = commands("docs/networks.md")
    assert len(lines) == 5
    for line in lines:
        done = mnas_here(*shlex.split(line)[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_the_examples_of_own_parts_run_and_keep_the_contract(tmp_path: Path) -> None:
    lines = [
        line.replace("/tmp/own_parts", str(tmp_path / "run"))
        for line in commands("docs/own-parts.md")
    ]
    assert len(lines) == 5
    run_lines(lines, tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [
        (page, *link)
        for page in pages
        for link in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text())
    ]
    assert len(links) > 50
    for page, target, anchor in links:
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"
