"""The synchronous search: a batch is proposed, measured, trained, and then learned from.

    propose -> (a) -> measure -> train -> (b) each -> update -> (c) -> next batch

Latency is measured in a phase of its own, while no child trains (on shared cores, training would
distort it up to sixteenfold). With a deterministic evaluator the whole campaign depends on the
configuration alone: killed anywhere and resumed, it gives the same rows as one never killed.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from controller.base import Controller, Proposal, Result, state_from_bytes, state_to_bytes
from latency.device import LatencyMeter
from latency.measurement import fingerprint
from search.campaign import Campaign
from search.executor import Executor, Finished, Job, make_executor
from search.objective import LATENCY, Objective
from search.parts import Parts
from search.trial import Failure, Trial
from space.architecture import Architecture, graph_hash
from space.cost import count
from space.errors import ConfigError, MeasurementError

logger = logging.getLogger(__name__)

#: So many batches in a row of which 95 % only repeat earlier networks end the search.
REPEATING_BATCHES = 5
REPEATING_SHARE = 0.95


class Watcher(Protocol):
    """Who is told how the search goes: a progress bar, a log, nobody."""

    def phase(self, name: str, total: int) -> None:
        """A phase (measure, train, ...) of `total` steps begins."""

    def advance(self) -> None:
        """One step of the phase is done."""

    def trial(self, trial: Trial) -> None:
        """A trial has its result."""

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """The controller has learned from a batch."""


def trial_seed(campaign_seed: int, trial_id: int) -> int:
    """Return the seed of a trial's training, 0 to 2**32 - 1: independent of all others."""
    sequence = np.random.SeedSequence(campaign_seed, spawn_key=(1, trial_id))
    return int(sequence.generate_state(1)[0])


class Search:
    """Runs a campaign's search to its stop rule.

    Args:
        campaign: Open for writing.
        parts: Made from the campaign's configuration.
        watcher: Is told of every step.
    """

    def __init__(self, campaign: Campaign, parts: Parts, watcher: Watcher) -> None:
        self.campaign = campaign
        self.config = campaign.config
        self.store = campaign.store
        self.watcher = watcher
        self.parts = parts
        self.objective = Objective(self.config.objective, self._target_ms())
        self._spent_s: float = self.store.meta("spent_s", 0.0)
        self._started = time.monotonic()
        self._last_failure = self.store.last_failure()
        self._batch: dict[int, Trial] = {}
        self._networks: dict[int, Architecture] = {}
        # What the stop rules look at, counted along: a large campaign's rows are not read again.
        self._counts = collections.Counter(self.store.counts())
        self._next_id, self._next_batch = self.store.next_ids()
        self._recent: collections.deque[tuple[int, int]] = collections.deque(
            (
                repeats(self.store.trials_by_id(ids))
                for _, ids, _ in self.store.updates(last=REPEATING_BATCHES)
            ),
            maxlen=REPEATING_BATCHES,
        )
        self._training_s = self.store.training_s()
        self._last_success = self.store.last_success()
        best = self.store.trials(role="search", best=1)
        self._best = (best[0].reward or 0.0, best[0].id) if best else (-math.inf, 0)

    def run(self) -> str:
        """Search until a stop rule holds; return the sentence that says which.

        Raises:
            ConfigError: A part of the configuration turns out not to work.
        """
        controller = self._restore()
        executor: Executor | None = None
        try:
            while True:
                open_batch = self._open_batch()
                reason = None if open_batch else self._stop_reason()
                if reason is not None:
                    self.store.set_meta("stop_reason", reason)
                    return reason
                trials = open_batch or self._propose(controller)
                if executor is None and any(t.outcome is None for t in trials):
                    executor = make_executor(self.config.executor, self.config.evaluator)
                self._update(controller, self._evaluate(trials, executor))
        finally:
            self._note_time()
            if executor is not None:
                executor.close()

    # ------------------------------------------------------------------ the steps of a batch

    def _propose(self, controller: Controller) -> list[Trial]:
        """Transaction (a)."""
        left = self.config.stop.trials - self._counts.total()
        self._networks.clear()
        proposals = controller.propose(min(self.config.batch_size, left))
        trials = [
            self._new_trial(self._next_id + index, self._next_batch, proposal)
            for index, proposal in enumerate(proposals)
        ]
        self.store.begin_batch(trials, state_to_bytes(controller.state_dict()))
        self._next_id += len(trials)
        self._next_batch += 1
        self._counts["pending"] += len(trials)
        return trials

    def _new_trial(self, trial_id: int, batch: int, proposal: Proposal) -> Trial:
        architecture = self.parts.space.decode(proposal.tokens)
        self._networks[trial_id] = architecture
        return Trial(
            id=trial_id,
            batch=batch,
            role="search",
            proposal_id=proposal.id,
            tokens=proposal.tokens,
            log_prob=proposal.log_prob,
            architecture=architecture.text,
            architecture_hash=architecture.hash,
            seed=trial_seed(self.config.seed, trial_id),
            epochs=self.parts.epochs,
            created_at=time.time(),
        )

    def _evaluate(self, trials: Sequence[Trial], executor: Executor | None) -> list[Trial]:
        """Give every trial of a batch its result, transaction (b) for each; return them all."""
        self._batch = {trial.id: trial for trial in trials}
        open_trials = [trial for trial in trials if trial.outcome is None]
        followers: list[Trial] = []
        to_train: list[Trial] = []
        leaders: set[str] = set()
        for trial in open_trials:
            if trial.architecture_hash in leaders or self._original(trial):
                followers.append(trial)
            else:
                leaders.add(trial.architecture_hash)
                to_train.append(trial)
        if to_train:
            assert executor is not None  # made as soon as some trial is open
            self._train(self._measure(to_train, executor), executor)
        self.watcher.phase("reuse", len(followers))
        for trial in followers:
            original = self._original(trial)
            if original is None:
                # The one it waited for failed by the machine's fault: it does the work itself.
                assert executor is not None  # its leader was open, too
                self._train(self._measure([trial], executor), executor)
            else:
                self._reuse(trial, original)
        return list(self._batch.values())

    def _measure(self, trials: Sequence[Trial], executor: Executor) -> list[Trial]:
        """Return the trials to train: measured, if there is a device, and not rejected."""
        if self.parts.meter is None:
            return list(trials)
        executor.quiesce()
        self.watcher.phase("measure", len(trials))
        kept = []
        for trial in trials:
            measured = self._measured(self.parts.meter, trial)
            self.watcher.advance()
            if measured is not None:
                kept.append(measured)
        return kept

    def _measured(self, meter: LatencyMeter, trial: Trial) -> Trial | None:
        """The trial with its latency, or None: it failed or is rejected, and has its result."""
        started = time.monotonic()
        try:
            measurement_id, metrics = self._measurement(meter, self._network(trial))
        except MeasurementError as error:
            failure = Failure(f"measuring failed: {error}", error.cause)
            self._finish(replace(trial, outcome="failed", failure=failure))
            return None
        timings = {"measure_s": time.monotonic() - started}
        trial = replace(trial, metrics=metrics, measurement_ids=(measurement_id,), timings=timings)
        if self.objective.rejects(metrics):
            limit = self.objective.reject_above_ms
            failure = Failure(
                f"rejected before training: {metrics[LATENCY]:.4g} ms is above {limit:.4g} ms",
                "architecture",
            )
            self._finish(replace(trial, outcome="rejected", failure=failure))
            return None
        return trial

    def _measurement(
        self, meter: LatencyMeter, architecture: Architecture
    ) -> tuple[int, dict[str, float]]:
        """A network's measurement from the cache or the device: its row's id and its metrics."""
        found = self.store.find_measurement(
            graph_hash(architecture), fingerprint(meter.identity())
        )
        if found is None:
            measurement = meter.measure(architecture)
            measurement_id = self.store.add_measurement(measurement)
        else:
            measurement_id, measurement = found
        return measurement_id, {LATENCY: measurement.median_ms, **measurement.metrics}

    def _train(self, trials: Sequence[Trial], executor: Executor) -> None:
        if not trials:
            return
        self.watcher.phase("train", len(trials))
        by_id = {trial.id: replace(trial, attempt=trial.attempt + 1) for trial in trials}
        self.store.start_attempts(list(by_id.values()))
        for trial in trials:
            executor.submit(Job(trial.id, self._network(trial), trial.seed))
        while by_id:
            for finished in executor.wait(timeout_s=1.0):
                trial = by_id.pop(finished.job.trial_id)
                self._finish(self._trained(trial, finished))
                self.watcher.advance()

    def _trained(self, trial: Trial, finished: Finished) -> Trial:
        timings = {
            **(trial.timings or {}),
            "train_s": finished.seconds,
            "wait_s": finished.waited_s,
        }
        trial = replace(trial, attempt=trial.attempt + finished.attempts - 1, timings=timings)
        if finished.evaluation is None:
            return replace(trial, outcome="failed", failure=finished.failure)
        evaluation = finished.evaluation
        metrics = {**(trial.metrics or {}), **evaluation.metrics}
        if trial.measurement_ids:
            # What the device measured is never overwritten by what an evaluator says.
            metrics[LATENCY] = (trial.metrics or {})[LATENCY]
        cost = count(self._network(trial))
        metrics.update(macs=float(cost.macs), parameters=float(cost.parameters))
        try:
            reward, parts = self.objective.reward(evaluation.accuracy, metrics)
        except ValueError as error:
            return replace(
                trial,
                outcome="failed",
                metrics=metrics,
                failure=Failure(f"no reward: {error}", "infrastructure"),
            )
        return replace(
            trial,
            outcome="completed",
            accuracy=evaluation.accuracy,
            metrics=metrics,
            reward=reward,
            parts=parts,
        )

    def _reuse(self, trial: Trial, original: Trial) -> None:
        """The result of an identical network at equal fidelity, said to be one."""
        outcome = "reused" if original.outcome == "completed" else original.outcome
        self._finish(
            replace(
                trial,
                outcome=outcome,
                reused_from=original.id,
                accuracy=original.accuracy,
                metrics=original.metrics,
                measurement_ids=original.measurement_ids,
                reward=original.reward,
                parts=original.parts,
                failure=original.failure,
            )
        )

    def _finish(self, trial: Trial) -> None:
        """Transaction (b)."""
        trial = replace(trial, finished_at=time.time())
        if not self.store.finish_trial(trial):
            raise RuntimeError(f"trial {trial.id} already had a result: two writers?")
        assert trial.outcome is not None  # it is finished
        self._batch[trial.id] = trial
        self._counts["pending"] -= 1
        self._counts[trial.outcome] += 1
        self._training_s += (trial.timings or {}).get("train_s", 0.0)
        if trial.outcome != "failed":
            self._last_success = max(self._last_success, trial.id)
        if trial.reward is not None and trial.reward > self._best[0]:
            self._best = trial.reward, trial.id
        if trial.failure is not None:
            self._last_failure = trial.failure.reason
            logger.warning("trial %d %s: %s", trial.id, trial.outcome, trial.failure.reason)
            if trial.failure.detail:
                logger.info("trial %d detail:\n%s", trial.id, trial.failure.detail)
        self.watcher.trial(trial)

    def _update(self, controller: Controller, trials: Sequence[Trial]) -> None:
        """Transaction (c). The infrastructure's failures are withheld from the controller."""
        batch = trials[0].batch
        learned = [trial for trial in trials if not is_infrastructure(trial)]
        controller.update([result_of(trial) for trial in learned])
        diagnostics = controller.diagnostics()
        self._note_time()
        self.store.commit_update(batch, [trial.id for trial in learned], diagnostics)
        self._recent.append(repeats(trials))
        self.watcher.update(batch, diagnostics)

    # ------------------------------------------------------------------ resume and stop

    def _restore(self) -> Controller:
        """The controller as it was at the last commit, ready for the next step."""
        controller = self.parts.controller(self.objective)
        snapshot = self.store.snapshot()
        if snapshot is None:
            return controller
        batch, state = snapshot
        controller.load_state_dict(state_from_bytes(state))
        if self.store.has_update(batch):
            _, ids, _ = self.store.updates(last=1)[0]
            by_id = {trial.id: trial for trial in self.store.trials(batch=batch)}
            controller.update([result_of(by_id[trial_id]) for trial_id in ids])
        return controller

    def _open_batch(self) -> list[Trial]:
        """The last batch, if the controller has not learned from it yet."""
        snapshot = self.store.snapshot()
        if snapshot is None or self.store.has_update(snapshot[0]):
            return []
        return self.store.trials(batch=snapshot[0])

    def _network(self, trial: Trial) -> Architecture:
        """The network of a trial of the open batch, which a resumed search has to read again."""
        if trial.id not in self._networks:
            self._networks[trial.id] = trial.network()
        return self._networks[trial.id]

    def _original(self, trial: Trial) -> Trial | None:
        """The earlier trial whose result an identical one takes, if there is one."""
        return self.store.original(trial.architecture_hash, trial.epochs)

    def _stop_reason(self) -> str | None:
        stop, proposed, trained = self.config.stop, self._counts.total(), self._counts["completed"]
        last = self._next_id - 1
        since_best = last - self._best[1]
        failed = last - self._last_success - self._counts["pending"]
        # Limit, how far the search has come, what to say when it is reached.
        rules: tuple[tuple[float | None, float, str], ...] = (
            (stop.trials, proposed, f"all {proposed} trials are done"),
            (stop.trained, trained, f"{trained} networks are trained"),
            (stop.hours, self._spent() / 3600, f"{stop.hours} hours are over"),
            (
                stop.training_hours,
                self._training_s / 3600,
                f"{stop.training_hours} hours of training are spent",
            ),
            (
                stop.no_improvement,
                since_best,
                f"no network of the last {since_best} trials was better than trial"
                f" {self._best[1]}'s",
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
        if repeated < REPEATING_SHARE * of:
            return None
        return (
            f"{repeated} of the last {of} trials only repeated earlier networks: the"
            " controller has settled"
        )

    def _spent(self) -> float:
        return self._spent_s + time.monotonic() - self._started

    def _note_time(self) -> None:
        self.store.set_meta("spent_s", self._spent())

    # ------------------------------------------------------------------ the target

    def _target_ms(self) -> float:
        """T: as configured, or measured once at the campaign's start and kept."""
        objective = self.config.objective
        if objective.target_ms is not None:
            self.store.set_meta("target_ms", objective.target_ms)
            return objective.target_ms
        known = self.store.meta("target_ms")
        if known is not None:
            return float(known)
        assert objective.target is not None  # ObjectiveConfig demands one of the two
        meter, reference = self.parts.meter, self.parts.reference
        assert meter is not None  # Parts refuses a target without a device
        assert reference is not None  # there is a target
        try:
            measurement_id, metrics = self._measurement(meter, reference)
        except MeasurementError as error:
            raise ConfigError(
                f"objective.target: the reference network cannot be measured: {error}"
            ) from error
        target_ms = objective.target.times * metrics[LATENCY]
        self.store.set_meta("target_measurement", measurement_id)
        self.store.set_meta("target_ms", target_ms)
        return target_ms


def repeats(trials: Sequence[Trial]) -> tuple[int, int]:
    """How many of a batch's trials took an earlier network's result, and how many there are."""
    return sum(trial.reused_from is not None for trial in trials), len(trials)


def is_infrastructure(trial: Trial) -> bool:
    """Whether a failure is the machine's: it is withheld from the controller."""
    return trial.failure is not None and trial.failure.cause == "infrastructure"


def result_of(trial: Trial) -> Result:
    """What the controller gets to see of a finished trial."""
    assert trial.proposal_id is not None  # search trials come from a controller
    assert trial.outcome is not None  # a batch is learned from when all of it is done
    return Result(
        proposal=Proposal(trial.proposal_id, trial.tokens, trial.log_prob),
        outcome=trial.outcome,
        reward=trial.reward,
        accuracy=trial.accuracy,
        metrics=trial.metrics or {},
        fidelity=trial.epochs,
        reused=trial.reused_from is not None,
        cause=trial.failure.cause if trial.failure else None,
    )
