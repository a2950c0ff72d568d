"""The asynchronous search: no worker waits for another one's child.

    a worker is free -> propose one -> (a) -> measure -> train -> (b)
    batch_size results have come -> update -> (c)

Devices measure in a thread of their own; while they do, some networks more than there are workers
are proposed, so that a worker that comes free finds one that is measured.

The controller learns from results in the order in which they come, whatever it proposed in
between; each controller documents what it makes of results that are older than its last update.
With real trainings the order depends on the clock, so a campaign is not repeated by its seed. What
is recorded stays: the state after the last proposal or update is exact, and a resumed search goes
on from it, evaluates what had no result, and learns first from what nobody had learned from.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from controller.base import Controller, state_from_bytes
from controller.ppo import PPOConfig
from search.campaign import Campaign
from search.executor import Executor, make_executor
from search.loop import Search, Watcher
from search.measuring_thread import MeasuringThread
from search.parts import Parts
from search.trial import Trial

logger = logging.getLogger(__name__)

#: How long the search waits for a training while a device measures, before it looks there.
LOOK_S = 0.05


class AsyncSearch(Search):
    """Runs a campaign's search to its stop rule, every worker at its own pace.

    Args:
        campaign: Open for writing.
        parts: Made from the campaign's configuration.
        watcher: Is told of every step.
    """

    def __init__(self, campaign: Campaign, parts: Parts, watcher: Watcher) -> None:
        super().__init__(campaign, parts, watcher)
        self._measuring: MeasuringThread | None = None
        #: Architecture hash -> the trial that waits for its latencies.
        self._at_device: dict[str, Trial] = {}
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
        waiting = self.store.open_trials()
        if not waiting:
            # Of a search that has ended only the hand-over may be left, which needs no workers.
            self._learn_when_due(controller)
            reason = self._tally.reason()
            if reason is not None:
                self._end(controller, reason)
                return reason
        executor = make_executor(self.config.executor, self.config.evaluator)
        try:
            self.watcher.phase("evaluate", 0)
            if self.parts.meters:
                self._measuring = MeasuringThread(self.store.path, self.parts.latencies)
            self._tell_staleness(executor)
            for trial in waiting:
                self._start(trial, executor)
            while True:
                self._fill(controller, executor)
                reason = None if self._in_work() else self._tally.reason()
                if reason is not None:
                    # What is left to learn from waits, so that an extended search leaves no seam.
                    self._end(controller, reason)
                    return reason
                self._take_measured(executor)
                for finished in executor.wait(timeout_s=LOOK_S if self._at_device else 1.0):
                    trial = self._running.pop(finished.job.trial_id)
                    self._finish(self._trained(trial, finished))
                    self._start_followers(trial, executor)
        finally:
            # First: a disk that is full must not keep processes alive. A node's device needs Ray,
            # which goes with the executor.
            try:
                if self._measuring is not None:
                    self._measuring.close()
            finally:
                executor.close()
            self._note_time()

    def _tell_staleness(self, executor: Executor) -> None:
        """Say so if the controller would drop most results: they come from too many workers."""
        controller, size = self.config.controller, self.config.batch_size
        if not isinstance(controller, PPOConfig):
            return
        # While one training goes on, every other worker ends about one.
        updates = executor.capacity / size
        if updates > controller.max_staleness:
            sentence = (
                f"{executor.capacity} workers end about {updates:.0f} batches of {size} during a"
                f" training, and ppo drops results older than {controller.max_staleness} updates:"
                " set a larger batch_size"
            )
            logger.warning("%s", sentence)
            self.watcher.note(sentence)

    def _in_work(self) -> int:
        """How many trials are measured, wait for a worker, or train."""
        return len(self._at_device) + len(self._running)

    def _fill(self, controller: Controller, executor: Executor) -> None:
        """Propose until every worker has something to do or a stop rule holds."""
        self._learn_when_due(controller)
        ahead = max(1, executor.capacity // 4) if self._measuring is not None else 0
        while self._in_work() < executor.capacity + ahead and self._tally.reason() is None:
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
        if not self._goes_on(trial):
            return
        self._followers[trial.architecture_hash] = []
        if self._measuring is None:
            (trial,) = self._measured([trial])
            self._train_measured(trial, executor)
        else:
            self._at_device[trial.architecture_hash] = trial
            self._measuring.ask(self._network(trial))

    def _take_measured(self, executor: Executor) -> None:
        """Let workers have the networks that the devices are done with."""
        if self._measuring is None:
            return
        # Without a training to wait for, it waits here.
        for network, figures in self._measuring.found(0.0 if self._running else LOOK_S):
            trial = self._at_device.pop(network.hash)
            self._train_measured(self._with_figures(trial, figures), executor)

    def _train_measured(self, trial: Trial, executor: Executor) -> None:
        """Submit a trial, unless its latencies or their lack ended it."""
        if not self._goes_on(trial):
            self._start_followers(trial, executor)
            return
        self.store.start_attempts([trial.id])
        self._running[trial.id] = trial
        executor.submit(self._job(trial))

    def _start_followers(self, trial: Trial, executor: Executor) -> None:
        """Let the trials of an identical network take an ended one's result, or do the work."""
        for follower in self._followers.pop(trial.architecture_hash):
            self._start(follower, executor)

    def _devices(self) -> AbstractContextManager[object]:
        return super()._devices() if self._measuring is None else self._measuring.in_use

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
        self._commit(controller, self._updates, trials, state=True)
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
