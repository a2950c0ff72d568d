"""The stop rules, as they count: the clock over all sessions, and trials since the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from search.config import StopConfig
from search.stop import Tally
from search.store import Store
from search.trial import Failure, Trial


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "campaign.db", read_only=False)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 5e6

    def __call__(self) -> float:
        return self.seconds


def make_trial(trial_id: int) -> Trial:
    return Trial(
        id=trial_id, batch=trial_id, role="search", proposal_id=trial_id, tokens=(0,),
        log_prob=0.0, architecture="text", architecture_hash=f"{trial_id}", seed=0, epochs=1.0,
    )  # fmt: skip


def end(store: Store, tally: Tally, trial_id: int, reward: float | None) -> None:
    """Propose a trial and give it its reward; None lets it fail."""
    trial = make_trial(trial_id)
    store.begin_batch([trial], b"")
    tally.begin(1)
    failure = Failure("diverged", "architecture") if reward is None else None
    outcome = "completed" if reward is not None else "failed"
    done = replace(trial, outcome=outcome, reward=reward, failure=failure, finished_at=1.0)
    store.finish_trial(done)
    tally.note(done)


def test_the_hours_of_all_sessions_count_but_not_those_between_them(store: Store) -> None:
    clock, stop = Clock(), StopConfig(trials=100, hours=2.0)
    first = Tally(stop, store, clock)
    clock.seconds += 3600
    assert first.reason() is None
    store.set_meta("spent_s", first.spent_s())
    clock.seconds += 1e6
    second = Tally(stop, store, clock)
    clock.seconds += 3599
    assert second.reason() is None
    clock.seconds += 1
    assert second.reason() == "2.0 hours are over"
    assert second.spent_s() == 7200


def test_without_any_reward_no_trial_is_called_the_best(store: Store) -> None:
    stop = StopConfig(trials=100, no_improvement=3)
    tally = Tally(stop, store)
    for trial_id in range(3):
        assert tally.reason() is None
        end(store, tally, trial_id, None)
    assert tally.reason() == "none of the 3 trials has a reward"
    # A resumed search says the same.
    assert Tally(stop, store).reason() == tally.reason()


def test_trials_count_from_the_best_on(store: Store) -> None:
    stop = StopConfig(trials=100, no_improvement=3)
    tally = Tally(stop, store)
    for trial_id, reward in enumerate([0.1, None, 0.5, 0.5, 0.2]):
        end(store, tally, trial_id, reward)
        assert tally.reason() is None
    end(store, tally, 5, None)
    said = "no network of the last 3 trials was better than trial 2's"
    assert tally.reason() == Tally(stop, store).reason() == said


def test_batches_that_the_machine_lost_are_no_repetition(store: Store) -> None:
    tally = Tally(StopConfig(trials=1000), store)
    lost = Failure("the worker died", "infrastructure")
    for batch in range(6):
        trial = make_trial(batch)
        store.begin_batch([trial], b"")
        tally.begin(1)
        done = replace(trial, outcome="failed", failure=lost, finished_at=1.0)
        store.finish_trial(done)
        tally.note(done)
        store.commit_update(batch, [], {})
        tally.note_batch([done])
    assert tally.reason() is None
    # A resumed search counts as the one that went on.
    assert Tally(StopConfig(trials=1000), store).reason() is None
