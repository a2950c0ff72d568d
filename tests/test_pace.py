"""The pace of a core, kept from one process to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from latency.pace import KEPT, PaceHistory


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnas").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_fastest_of_the_last_measurements_is_remembered() -> None:
    history = PaceHistory("board/1")
    assert history.fastest_s() is None
    history.add(2.0)
    for _ in range(KEPT - 1):
        history.add(3.0)
    assert PaceHistory("board/1").fastest_s() == 2.0
    assert PaceHistory("board/2").fastest_s() is None
    history.add(3.0)
    assert history.fastest_s() == 3.0


@pytest.mark.parametrize("text", ["", "{", "{}", "[0.0, -1.0, NaN, Infinity, null, true, [1.0]]"])
def test_a_file_that_is_no_history_is_an_empty_one(text: str, tmp_path: Path) -> None:
    history = PaceHistory("here")
    history.add(1.0)
    (file,) = (tmp_path / "mnas").glob("pace-*")
    file.write_text(text)
    assert history.fastest_s() is None
    history.add(2.0)
    assert history.fastest_s() == 2.0


def test_what_is_no_pace_is_not_kept_and_a_full_disk_costs_no_figure(tmp_path: Path) -> None:
    history = PaceHistory("here")
    history.add(None)
    history.add("fast")
    assert list((tmp_path / "mnas").iterdir()) == []
    (tmp_path / "mnas").rmdir()
    history.add(1.0)
    assert history.fastest_s() is None
