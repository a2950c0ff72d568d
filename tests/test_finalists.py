"""How a finalist's full training ends: whose fault a failure is, and what resume makes of it."""

from __future__ import annotations

import contextlib
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from campaigns import write_synthetic
from image_folders import make_image_folder

from search.campaign import create, open_to_write, read_config
from search.cli_parts import retrain
from search.config import load_campaign_config
from search.engine import Silent, resume, start
from search.finalists import HandOver, candidates, hand_over
from search.loop import Search
from search.parts import Parts
from search.retrain_command import run_retrain
from search.store import Store
from search.trial import Failure, Trial
from space.errors import ConfigError, Diverged, MnasError, TrialFailed

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
    run_room(folder, "retrain: diverged: the loss was nan at step 3", Diverged.exit_status)
    start_campaign(folder)
    assert resume(folder / "run").winner is None
    assert (folder / "started").read_text().split() == ["train"]
    (failure,) = failures(folder)
    assert failure.cause == "architecture"
    assert failure.reason.endswith("status 3: retrain: diverged: the loss was nan at step 3")


def test_the_campaigns_log_says_why_no_network_was_retrained(folder: Path) -> None:
    run_room(folder, "retrain: MindSpore failed: no device is free", MnasError.exit_status)
    start_campaign(folder)
    run_room(folder, "retrain: diverged: the loss was nan at step 3", Diverged.exit_status)
    with pytest.raises(MnasError, match=r"no network was retrained; campaign\.log says why"):
        retrain(campaign=folder / "run")
    log = (folder / "run" / "campaign.log").read_text()
    said = [line for line in log.splitlines() if re.search(r"trial -\d failed: ", line)]
    assert len(said) == 2
    assert "no device is free" in said[0]
    assert "diverged: the loss was nan at step 3" in said[1]


def test_a_finalist_whose_training_failed_otherwise_is_trained_again(folder: Path) -> None:
    run_room(folder, "retrain: MindSpore failed: no device is free", MnasError.exit_status)
    start_campaign(folder)
    resume(folder / "run")
    assert (folder / "started").read_text().split() == ["train", "train"]
    assert [failure.cause for failure in failures(folder)] == ["infrastructure"] * 2


# A training that hangs, deaf to SIGTERM, with a process that it has started and that hangs, too.
HANGING = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("child").write_text(str(child.pid))
print("epoch 1/16")
time.sleep(600)
"""


@pytest.mark.slow
def test_a_finalist_that_hung_is_killed_with_what_it_started_and_trained_again(
    folder: Path,
) -> None:
    run_room(folder, "retrain: MindSpore failed: no device is free", MnasError.exit_status)
    start_campaign(folder)
    (folder / "retrain" / "__main__.py").write_text(HANGING)
    with open_to_write(folder / "run") as campaign:
        winner = hand_over(campaign, Parts(campaign.config), Silent(), silence_limit_s=5.0)
    assert winner is None
    wait_until_ended(int((folder / "child").read_text()))
    hung = failures(folder)[-1]
    assert hung.cause == "infrastructure"
    assert hung.reason == "retrain train hung: it printed nothing for 5 s and was killed"
    assert hung.detail == "epoch 1/16"
    run_room(folder, "retrain: diverged: the loss was nan at step 3", Diverged.exit_status)
    resume(folder / "run")
    assert [f.cause for f in failures(folder)][1:] == ["infrastructure", "architecture"]


def test_a_campaign_without_a_recipe_is_handed_over_with_one_that_is_given(folder: Path) -> None:
    run_room(folder, "retrain: diverged: the loss was nan at step 3", Diverged.exit_status)
    path = write_synthetic(folder, trials=1, fail_share=0.0)
    start(load_campaign_config(str(path)), folder / "run")
    with pytest.raises(
        ConfigError, match=r"no recipe for full trainings; give one, `mnas retrain"
    ):
        retrain(campaign=folder / "run")
    with pytest.raises(
        ConfigError, match=r"must have the 10 classes of the networks of .* have 3"
    ):
        retrain(campaign=folder / "run", config=str(three_classes(folder)))
    assert read_config(folder / "run").retrain is None
    with pytest.raises(MnasError, match="no network was retrained"):
        retrain(campaign=folder / "run", config="digits", overrides=["epochs=2"], threads=1)
    saved = read_config(folder / "run").retrain
    assert saved is not None
    assert (saved.recipe.epochs, saved.threads) == (2, 1)
    # Now it is settled, since a network has been handed over.
    with pytest.raises(ConfigError, match=r"retrain.recipe.epochs is 2, given 3"):
        retrain(campaign=folder / "run", config="digits", overrides=["epochs=3"], threads=1)


def three_classes(folder: Path) -> Path:
    images = make_image_folder(folder / "images", classes=3, train=1, val=1)
    recipe = folder / "three.yaml"
    recipe.write_text(f"data: {{name: image_folder, path: {images}}}\nepochs: 1\n")
    return recipe


def test_flags_that_a_hand_over_does_not_heed_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--campaign: goes without --out, --seed, --resume;"):
        retrain(campaign=folder / "run", out=folder, seed=3, resume=True)
    with pytest.raises(ConfigError, match="--top: goes with --campaign DIR only"):
        retrain(config="digits", top=3)


def wait_until_ended(process: int) -> None:
    """Wait for the end of a process that is nobody's child any more; it may stay a zombie."""
    deadline = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it lives"
            time.sleep(0.05)


@pytest.mark.slow
def test_a_training_that_prints_now_and_then_is_not_taken_to_hang(folder: Path) -> None:
    # A bar without a line's end is a sign of life.
    code = "import time\nfor _ in range(14):\n    time.sleep(0.5)\n    print('.', end='')\nprint()"
    (folder / "retrain" / "__main__.py").write_text(code)
    assert run_retrain(["train"], print, silence_limit_s=5.0) == ["." * 14]


def test_what_a_finished_training_leaves_behind_is_not_waited_for(folder: Path) -> None:
    code = "import subprocess\nprint('done', flush=True)\nsubprocess.Popen(['sleep', '600'])"
    (folder / "retrain" / "__main__.py").write_text(code)
    assert run_retrain(["train"], print, silence_limit_s=100.0) == ["done"]


@pytest.mark.parametrize("count", [0, 3])
def test_a_training_is_told_by_its_last_lines(folder: Path, count: int) -> None:
    run_room(folder, "a line\\n" * count + "\\n", MnasError.exit_status)
    with pytest.raises(TrialFailed, match="ended with status 1: ") as e:
        run_retrain(["export"], print)
    assert e.value.detail == "\n".join(["a line"] * count)


def test_a_divergence_comes_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(Diverged("the loss was nan at step 3")))
    assert type(error) is Diverged
    assert (error.reason, error.cause) == ("diverged: the loss was nan at step 3", "architecture")


def test_the_winner_is_the_best_of_all_that_were_trained_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def winner(self: HandOver, finalist: Trial) -> dict[str, Any]:
        return {"trial": finalist.finalist_of}

    monkeypatch.setattr(HandOver, "_winner", winner)
    path = write_synthetic(tmp_path, trials=8, fail_share=0.0)
    config = load_campaign_config(str(path), ["retrain={top: 1, recipe: digits}"])
    with create(tmp_path / "run", config) as campaign:
        parts, store = Parts(config), campaign.store
        Search(campaign, parts, Silent()).run()
        first, second = candidates(store, 2)
        # As an earlier `mnas retrain --campaign DIR --top 2` left them: the second one is better.
        for trial, reward in ((first, 0.5), (second, 0.6)):
            row = replace(trial, id=store.next_other_id(), role="finalist", finalist_of=trial.id)
            store.add_trials([replace(row, outcome=None)])
            store.finish_trial(replace(row, reward=reward))
        assert hand_over(campaign, parts, Silent()) == {"trial": second.id}
