"""How a finalist's full training ends: whose fault a failure is, and what resume makes of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from campaigns import write_synthetic

from retrain.__main__ import EXIT_DIVERGED, EXIT_ERROR
from search.config import load_campaign_config
from search.engine import resume, start
from search.store import Store
from search.trial import Failure
from space.errors import Diverged

# The retrain room's command line as far as a training that fails: it is counted, speaks and ends.
ROOM = """
import pathlib, sys
with pathlib.Path("started").open("a") as file:
    print(sys.argv[1], file=file)
print("{sentence}")
sys.exit({status})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which `python -m retrain` looks first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "retrain").mkdir()
    (tmp_path / "retrain" / "__init__.py").touch()
    return tmp_path


def run_room(folder: Path, sentence: str, status: int) -> None:
    code = ROOM.format(sentence=sentence, status=status)
    (folder / "retrain" / "__main__.py").write_text(code)


def start_campaign(folder: Path) -> None:
    """A campaign of one trial, which is handed over."""
    path = write_synthetic(folder, trials=1, fail_share=0.0)
    start(load_campaign_config(str(path), ["retrain={top: 1, recipe: digits}"]), folder / "run")


def failures(folder: Path) -> list[Failure]:
    """Of all finalists, in the order in which they were made."""
    store = Store(folder / "run" / "campaign.db", read_only=True)
    finalists = store.trials(role="finalist")
    store.close()
    return [f.failure for f in sorted(finalists, key=lambda f: -f.id) if f.failure is not None]


def test_a_finalist_that_diverged_is_recorded_as_such_and_not_trained_again(folder: Path) -> None:
    run_room(folder, "retrain: diverged: the loss was nan at step 3", EXIT_DIVERGED)
    start_campaign(folder)
    assert resume(folder / "run").winner is None
    assert (folder / "started").read_text().split() == ["train"]
    (failure,) = failures(folder)
    assert failure.cause == "architecture"
    assert failure.reason.endswith("status 3: retrain: diverged: the loss was nan at step 3")


def test_a_finalist_whose_training_failed_otherwise_is_trained_again(folder: Path) -> None:
    run_room(folder, "retrain: MindSpore failed: no device is free", EXIT_ERROR)
    start_campaign(folder)
    resume(folder / "run")
    assert (folder / "started").read_text().split() == ["train", "train"]
    assert [failure.cause for failure in failures(folder)] == ["infrastructure"] * 2


def test_a_divergence_comes_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(Diverged("the loss was nan at step 3")))
    assert type(error) is Diverged
    assert (error.reason, error.cause) == ("diverged: the loss was nan at step 3", "architecture")
