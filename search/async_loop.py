"""The asynchronous search: no worker waits for another one's child.

    a worker is free -> propose one -> (a) -> measure -> train -> (b)
    batch_size results have come -> update -> (c)

The controller learns from results in the order in which they come, whatever it proposed in
between; each controller documents what it makes of results that are older than its last update.
With real trainings the order depends on the clock, so a campaign is not repeated by its seed. What
is recorded stays: the state after the last proposal or update is exact, and a resumed search goes
on from it, evaluates what had no result, and learns first from what nobody had learned from.
"""

from __future__ import annotations

from controller.base import Controller, state_from_bytes, state_to_bytes
from search.campaign import Campaign
from search.executor import Executor, make_executor
from search.loop import Search, Watcher, is_infrastructure, learn
from search.parts import Parts
from search.trial import Trial


class AsyncSearch(Search):
    """Runs a campaign's search to its stop rule, every worker at its own pace.

    Args:
        campaign: Open for writing.
        parts: Made from the campaign's configuration.
        watcher: Is told of every step.
    """

    def __init__(self, campaign: Campaign, parts: Parts, watcher: Watcher) -> None:
        super().__init__(campaign, parts, watcher)
        self._running: dict[int, Trial] = {}
        #: Architecture hash -> trials that wait for an identical network in work.
        self._followers: dict[str, list[Trial]] = {}
        self._unlearned = self.store.unlearned_trials()
        last = self.store.updates(last=1)
        self._updates = last[0][0] + 1 if last else 0

    def run(self) -> str:
        """Search until a stop rule holds; return the sentence that says which.

        Raises:
            ConfigError: A part of the configuration turns out not to work.
        """
        controller = self._restore()
        executor = make_executor(self.config.executor, self.config.evaluator)
        self.watcher.phase("evaluate", 0)
        try:
            for trial in self.store.open_trials():
                self._start(trial, executor)
            while True:
                self._fill(controller, executor)
                reason = None if self._running else self._tally.reason()
                if reason is not None:
                    # What is left to learn from waits, so that an extended search leaves no seam.
                    self._end(controller, reason)
                    return reason
                for finished in executor.wait(timeout_s=1.0):
                    trial = self._running.pop(finished.job.trial_id)
                    self._finish(self._trained(trial, finished))
                    for follower in self._followers.pop(trial.architecture_hash):
                        self._start(follower, executor)
        finally:
            # First: a disk that is full must not keep processes alive.
            executor.close()
            self._note_time()

    def _fill(self, controller: Controller, executor: Executor) -> None:
        """Propose until every worker has something to do or a stop rule holds."""
        self._learn_when_due(controller)
        while len(self._running) < executor.capacity and self._tally.reason() is None:
            for trial in self._next_trials(controller, 1):
                self._start(trial, executor)
            self._learn_when_due(controller)

    def _start(self, trial: Trial, executor: Executor) -> None:
        """Submit a trial, or let it take an identical one's result, now or when that is there."""
        original = self._original(trial.architecture_hash)
        if original is not None:
            self._reuse(trial, original)
            return
        if trial.architecture_hash in self._followers:
            self._followers[trial.architecture_hash].append(trial)
            return
        trial = self._sized(trial)
        if trial.outcome is None:
            (trial,) = self._measured([trial])
        if not self._goes_on(trial):
            return
        self.store.start_attempts([trial.id])
        self._running[trial.id] = trial
        self._followers[trial.architecture_hash] = []
        executor.submit(self._job(trial))

    def _finish(self, trial: Trial) -> None:
        super()._finish(trial)
        self._networks.pop(trial.id, None)
        self._unlearned.append(self._batch.pop(trial.id))

    def _learn_when_due(self, controller: Controller) -> None:
        """Transaction (c), once enough results have come."""
        size = self.config.batch_size
        if len(self._unlearned) < size:
            return
        trials, self._unlearned = self._unlearned[:size], self._unlearned[size:]
        learned = [trial for trial in trials if not is_infrastructure(trial)]
        learn(controller, learned)
        diagnostics = controller.diagnostics()
        self._note_time()
        self.store.commit_update(
            self._updates,
            [trial.id for trial in learned],
            diagnostics,
            state_to_bytes(controller.state_dict()),
        )
        self._note_batch(self._updates, trials, learned)
        self.watcher.update(self._updates, diagnostics)
        self._updates += 1

    def _restore(self) -> Controller:
        """The controller as it was after its last proposal or update."""
        controller = self.parts.controller(self.objective)
        snapshot = self.store.snapshot()
        if snapshot is None:
            self._warm_start(controller)
        else:
            controller.load_state_dict(state_from_bytes(snapshot[1]))
        return controller


def make_search(campaign: Campaign, parts: Parts, watcher: Watcher) -> Search:
    """Return the search of a campaign's mode."""
    kind = {"sync": Search, "async": AsyncSearch}[campaign.config.mode]
    return kind(campaign, parts, watcher)
