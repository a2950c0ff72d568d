"""When a search ends: the stop rules, and what they look at, counted along as trials end.

A large campaign's rows are read once, when it is opened, and not again.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Sequence

from search.config import StopConfig
from search.store import Store
from search.trial import Trial, is_infrastructure

#: So many batches in a row of which 95 % only repeat earlier networks end the search.
REPEATING_BATCHES = 5
REPEATING_SHARE = 0.95


class Tally:
    """How far a search has come.

    Args:
        stop: The rules.
        store: Of the campaign, which may have been run before.
        clock: Seconds, from any start.
    """

    def __init__(
        self, stop: StopConfig, store: Store, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stop = stop
        self._clock = clock
        self._counts = collections.Counter(store.counts())
        self._recent: collections.deque[tuple[int, int]] = collections.deque(
            (
                repeats(store.trials_by_id(ids))
                for _, ids, _ in store.updates(last=REPEATING_BATCHES)
            ),
            maxlen=REPEATING_BATCHES,
        )
        # Only that rule needs to know, and every row is read for it.
        self._training_s = 0.0 if stop.training_hours is None else store.training_s()
        self._last_success = store.last_success()
        self._last_failure = store.last_failure()
        self._best = (-math.inf, -1)
        self.note_best(store)
        self._spent_s: float = store.meta("spent_s", 0.0)
        self._started = clock()

    @property
    def proposed(self) -> int:
        """Number of the search's trials."""
        return self._counts.total()

    def spent_s(self) -> float:
        """Wall time over all sessions, in seconds."""
        return self._spent_s + self._clock() - self._started

    def begin(self, count: int) -> None:
        """Count new trials."""
        self._counts["pending"] += count

    def note(self, trial: Trial) -> None:
        """Count a trial that has its result."""
        assert trial.outcome is not None  # it is finished
        self._counts["pending"] -= 1
        self._counts[trial.outcome] += 1
        self._training_s += (trial.timings or {}).get("train_s", 0.0)
        if trial.outcome != "failed":
            self._last_success = max(self._last_success, trial.id)
        if trial.reward is not None and trial.reward > self._best[0]:
            self._best = trial.reward, trial.id
        if trial.failure is not None:
            self._last_failure = trial.failure.reason

    def note_best(self, store: Store) -> None:
        """Look for the best trial anew: the one that was may have been trained again."""
        best = store.best(1)
        self._best = (best[0].reward or 0.0, best[0].id) if best else (-math.inf, -1)

    def note_batch(self, trials: Sequence[Trial]) -> None:
        """Count a batch that the controller learned from."""
        self._recent.append(repeats(trials))

    def reason(self) -> str | None:
        """Return the sentence that says which rule holds, or None."""
        stop, proposed, trained = self._stop, self.proposed, self._counts["completed"]
        last = proposed - 1
        best = self._best[1]
        since_best = last - best
        failed = last - self._last_success - self._counts["pending"]
        # Limit, how far the search has come, what to say when it is reached.
        rules: tuple[tuple[float | None, float, str], ...] = (
            (stop.trials, proposed, f"all {proposed} trials are done"),
            (stop.trained, trained, f"{trained} networks are trained"),
            (stop.hours, self.spent_s() / 3600, f"{stop.hours} hours are over"),
            (
                stop.training_hours,
                self._training_s / 3600,
                f"{stop.training_hours} hours of training are spent",
            ),
            (
                stop.no_improvement,
                since_best,
                f"none of the {since_best} trials has a reward"
                if best < 0
                else f"no network of the last {since_best} trials was better than trial {best}'s",
            ),
            (
                stop.failed_in_a_row,
                failed,
                f"the last {failed} trials all failed: {self._last_failure}",
            ),
        )
        for limit, reached, sentence in rules:
            if limit is not None and reached >= limit:
                return sentence
        return self._repeats_itself()

    def _repeats_itself(self) -> str | None:
        if len(self._recent) < REPEATING_BATCHES:
            return None
        repeated, of = (sum(numbers) for numbers in zip(*self._recent, strict=True))
        if not of or repeated < REPEATING_SHARE * of:
            return None
        return (
            f"{repeated} of the last {of} trials only repeated earlier networks: the"
            " controller has settled"
        )


def repeats(trials: Sequence[Trial]) -> tuple[int, int]:
    """Return how many trials took an earlier network's result, and how many there are.

    Without the machine's failures, which the controller does not learn from.
    """
    told = [trial for trial in trials if not is_infrastructure(trial)]
    return sum(trial.reused_from is not None for trial in told), len(told)
