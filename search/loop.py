"""The synchronous search: a batch is proposed, measured, trained, and then learned from.

    propose -> (a) -> measure -> train -> (b) each -> update -> (c) -> next batch

Latency is measured in a phase of its own, while no child trains (on shared cores, training would
distort it up to sixteenfold). With a deterministic evaluator the whole campaign depends on the
configuration alone: killed anywhere and resumed, it gives the same rows as one never killed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from controller.base import Controller, Proposal, Result, state_from_bytes, state_to_bytes
from search.campaign import Campaign
from search.campaign_log import tell_end
from search.early_stop import EarlyStop
from search.executor import Executor, Finished, Job, Stopped, make_executor
from search.measuring import Figures
from search.objective import Objective
from search.parts import Parts
from search.stop import Tally
from search.trial import Failure, Trial, is_infrastructure
from search.warm_start import carry_over
from space.architecture import Architecture
from space.cost import count
from space.errors import ConfigError, MeasurementError
from space.tokens import uniform_tokens

logger = logging.getLogger(__name__)

#: The campaign's random streams, by the first key under its seed: the controller's is 0.
TRAINING, BASELINE, FULL_TRAINING = 1, 2, 3

#: While trials end, the time that was spent is recorded so often, seconds.
NOTE_TIME_S = 30.0

#: Metrics of a training where a network's accuracy is the mean of several: its own, and how many.
MEAN_METRICS = OWN_ACCURACY, TRAININGS = "own_accuracy", "trainings"

#: How many networks a controller is asked to recommend at the end.
RECOMMENDED = 10


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

    def note(self, text: str) -> None:
        """A sentence that a reader should not miss."""


def trial_seed(campaign_seed: int, trial_id: int, purpose: int = TRAINING) -> int:
    """Return the seed of a trial's training, 0 to 2**32 - 1: independent of all others."""
    return int(stream(campaign_seed, purpose, trial_id).generate_state(1)[0])


def stream(campaign_seed: int, purpose: int, trial_id: int) -> np.random.SeedSequence:
    """Return the randomness of a trial for one purpose; ids below 0 are not the search's own."""
    key = (purpose, trial_id) if trial_id >= 0 else (purpose, -trial_id, 1)
    return np.random.SeedSequence(campaign_seed, spawn_key=key)


def is_baseline(trial_id: int, share: float) -> bool:
    """Whether a trial is drawn at random in the controller's place, given the share of those."""
    return math.floor((trial_id + 1) * share) > math.floor(trial_id * share)


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
        self.latencies = parts.latencies(self.store)
        self.objective = Objective(self.config.objective, self.latencies.target_ms)
        self._tally = Tally(self.config.stop, self.store)
        self._early_stop: EarlyStop | None = None
        if self.config.early_stop is not None:
            self._early_stop = EarlyStop(
                self.config.early_stop, self.objective, parts.epochs, self.store.learned_trials()
            )
        self._time_noted = time.monotonic()
        self._batch: dict[int, Trial] = {}
        self._networks: dict[int, Architecture] = {}
        self._next_id, self._next_batch = self.store.next_ids()

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
                reason = None if open_batch else self._tally.reason()
                if reason is not None:
                    self._end(controller, reason)
                    return reason
                trials = open_batch or self._propose(controller)
                if executor is None and any(t.outcome is None for t in trials):
                    executor = make_executor(self.config.executor, self.config.evaluator)
                self._update(controller, self._evaluate(trials, executor))
        finally:
            # First: a disk that is full must not keep processes alive.
            if executor is not None:
                executor.close()
            self._note_time()

    # ------------------------------------------------------------------ the steps of a batch

    def _propose(self, controller: Controller) -> list[Trial]:
        """The next batch's trials."""
        self._networks.clear()
        left = self.config.stop.trials - self._tally.proposed
        return self._next_trials(controller, min(self.config.batch_size, left))

    def _next_trials(self, controller: Controller, count: int) -> list[Trial]:
        """Transaction (a): the controller's proposals and, by the share, random ones."""
        share = self.config.baseline_share
        ids = range(self._next_id, self._next_id + count)
        own = sum(not is_baseline(trial_id, share) for trial_id in ids)
        self._probe(controller, own)
        proposals = iter(controller.propose(own) if own else ())
        trials = [
            self._new_trial(i, None if is_baseline(i, share) else next(proposals)) for i in ids
        ]
        self.store.begin_batch(trials, state_to_bytes(controller.state_dict()))
        if self.store.meta("stop_reason") is not None:
            self.store.set_meta("stop_reason", None)  # it goes on
        self._next_id += count
        self._next_batch += 1
        self._tally.begin(count)
        return trials

    def _new_trial(self, trial_id: int, proposal: Proposal | None) -> Trial:
        """The trial of a proposal; without one it is drawn at random, as a baseline."""
        if proposal is None:
            choices = self.parts.space.num_choices
            rng = np.random.default_rng(stream(self.config.seed, BASELINE, trial_id))
            tokens, log_prob = uniform_tokens(choices, rng), -float(np.log(choices).sum())
        else:
            tokens, log_prob = proposal.tokens, proposal.log_prob
        architecture = self.parts.space.decode(tokens)
        self._networks[trial_id] = architecture
        return Trial(
            id=trial_id,
            batch=self._next_batch,
            role="baseline" if proposal is None else "search",
            proposal_id=None if proposal is None else proposal.id,
            tokens=tokens,
            log_prob=log_prob,
            architecture=architecture.text,
            architecture_hash=architecture.hash,
            seed=trial_seed(self.config.seed, trial_id),
            epochs=self.parts.epochs,
            created_at=time.time(),
        )

    def _probe(self, controller: Controller, count: int) -> None:
        """Tell the controller the metrics that it asks for before it proposes."""
        wanted = {self.parts.space.decode(tokens): tokens for tokens in controller.probe(count)}
        if not wanted:
            return
        known = []
        with self._devices():
            for network, figures in self.latencies.measure(wanted):
                if isinstance(figures, MeasurementError):
                    logger.warning("a network that was only to be measured failed: %s", figures)
                elif figures.metrics:
                    known.append((wanted[network], figures.metrics))
        if known:
            controller.observe_metrics(known)

    def _devices(self) -> AbstractContextManager[object]:
        """Keeps the devices to who enters it; there is nobody else here."""
        return nullcontext()

    def _evaluate(self, trials: Sequence[Trial], executor: Executor | None) -> list[Trial]:
        """Give every trial of a batch its result, transaction (b) for each; return them all."""
        self._batch = {trial.id: trial for trial in trials}
        open_trials = [trial for trial in trials if trial.outcome is None]
        followers: list[Trial] = []
        to_train: list[Trial] = []
        leaders: set[str] = set()
        known = self._own_results([trial.architecture_hash for trial in open_trials])
        for trial in open_trials:
            own = known.get(trial.architecture_hash, [])
            if trial.architecture_hash in leaders or self._settled(own):
                followers.append(trial)
            else:
                leaders.add(trial.architecture_hash)
                to_train.append(trial)
        if to_train:
            assert executor is not None  # made as soon as some trial is open
            self._train(self._measure(to_train, executor), executor)
        self.watcher.phase("reuse", len(followers))
        while followers:
            # One of each network at a time, since a result settles what becomes of the next.
            first = {trial.architecture_hash: trial for trial in reversed(followers)}
            followers = [t for t in followers if t is not first[t.architecture_hash]]
            to_train = []
            for trial in sorted(first.values(), key=lambda trial: trial.id):
                original = self._original(trial.architecture_hash)
                if original is None:
                    # The one it waited for failed by the machine's fault, or the mean wants more
                    # trainings: it does the work itself.
                    to_train.append(trial)
                else:
                    self._reuse(trial, original)
            if to_train:
                assert executor is not None  # its leader was open, too
                self._train(self._measure(to_train, executor), executor)
        return list(self._batch.values())

    def _measure(self, trials: Sequence[Trial], executor: Executor) -> list[Trial]:
        """Return the trials to train: measured, if there is a device, and not rejected."""
        kept = [trial for trial in map(self._sized, trials) if self._goes_on(trial)]
        if self.parts.meters:
            executor.quiesce()
            self.watcher.phase("measure", len(kept))
        measured = []
        for trial in self._measured(kept):
            if self.parts.meters:
                self.watcher.advance()
            if self._goes_on(trial):
                measured.append(trial)
        return sorted(measured, key=lambda trial: trial.id)

    def _goes_on(self, trial: Trial) -> bool:
        """Whether a trial has no outcome yet; one that has is recorded."""
        if trial.outcome is not None:
            self._finish(trial)
        return trial.outcome is None

    def _sized(self, trial: Trial) -> Trial:
        """The trial with its multiply-adds and parameters; rejected if they are too many."""
        cost = count(self._network(trial))
        sizes = {"macs": float(cost.macs), "parameters": float(cost.parameters)}
        # By its sizes alone: what an earlier campaign's device said of it does not count here.
        return self._checked(replace(trial, metrics={**(trial.metrics or {}), **sizes}), sizes)

    def _checked(self, trial: Trial, metrics: Mapping[str, float]) -> Trial:
        """The trial; rejected, if these metrics rule it out."""
        reason = self.objective.rejects(metrics)
        if reason is None:
            return trial
        failure = Failure(f"rejected before training: {reason}", "architecture")
        return replace(trial, outcome="rejected", failure=failure)

    def _measured(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """The trials with their latencies; with an outcome, if they failed or are rejected."""
        by_hash = {trial.architecture_hash: trial for trial in trials}
        for network, figures in self.latencies.measure([self._network(t) for t in trials]):
            yield self._with_figures(by_hash[network.hash], figures)

    def _with_figures(self, trial: Trial, figures: Figures | MeasurementError) -> Trial:
        """The trial with its latencies; with an outcome, if it failed or is rejected."""
        if isinstance(figures, MeasurementError):
            failure = Failure(f"measuring failed: {figures}", figures.cause)
            return replace(trial, outcome="failed", failure=failure)
        metrics = {**(trial.metrics or {}), **figures.metrics}
        unknown = sorted(set(self.objective.caps) - set(metrics))
        if unknown:
            raise ConfigError(
                f"objective.caps: the device does not measure {unknown[0]}; peak memory needs"
                " device.own_process=true."
            )
        ids, timings = figures.measurement_ids, {"measure_s": figures.seconds}
        timed = timings if ids else None
        trial = replace(trial, metrics=metrics, measurement_ids=ids, timings=timed)
        return self._checked(trial, metrics)

    def _train(self, trials: Sequence[Trial], executor: Executor) -> None:
        if not trials:
            return
        self.watcher.phase("train", len(trials))
        by_id = {trial.id: trial for trial in trials}
        self.store.start_attempts(by_id)
        for trial in trials:
            executor.submit(self._job(trial))
        while by_id:
            for finished in executor.wait(timeout_s=1.0):
                trial = by_id.pop(finished.job.trial_id)
                self._finish(self._trained(trial, finished))
                self.watcher.advance()

    def _job(self, trial: Trial) -> Job:
        bars: dict[int, float] = {}
        # The next training of a network that was worth all its epochs before is so, too.
        if self._early_stop is not None and not self._earlier_trainings(trial):
            bars = self._early_stop.bars(trial.metrics or {})
        return Job(trial.id, self._network(trial), trial.seed, bars)

    def _trained(self, trial: Trial, finished: Finished) -> Trial:
        timings = {
            **(trial.timings or {}),
            "train_s": finished.seconds,
            "wait_s": finished.waited_s,
        }
        attempt = trial.attempt + finished.attempts
        evaluation, known = finished.outcome, trial.metrics or {}
        if isinstance(evaluation, Failure):
            result: dict[str, Any] = {"outcome": "failed", "failure": evaluation}
        elif isinstance(evaluation, Stopped):
            failure = Failure(evaluation.reason, "architecture")
            metrics = {**known, **evaluation.metrics}
            result = {"outcome": "stopped", "metrics": metrics, "failure": failure}
        else:
            # What a device measured is never overwritten by what an evaluator says.
            metrics = (
                {**evaluation.metrics, **known} if trial.measurement_ids else
                {**known, **evaluation.metrics}
            )  # fmt: skip
            result = self._rewarded(*self._averaged(trial, evaluation.accuracy, metrics))
        return replace(trial, attempt=attempt, timings=timings, finished_at=time.time(), **result)

    def _averaged(
        self, trial: Trial, accuracy: float, metrics: dict[str, float]
    ) -> tuple[float, dict[str, float]]:
        """The mean accuracy of a network's trainings and the metrics that say what it is of."""
        earlier = self._earlier_trainings(trial)
        if not earlier:
            return accuracy, metrics
        all_of_them = [accuracy]
        for before in earlier:
            assert before.accuracy is not None  # it is completed
            all_of_them.append((before.metrics or {}).get(OWN_ACCURACY, before.accuracy))
        counted = {OWN_ACCURACY: accuracy, TRAININGS: float(len(all_of_them))}
        return math.fsum(all_of_them) / len(all_of_them), {**metrics, **counted}

    def _earlier_trainings(self, trial: Trial) -> list[Trial]:
        """The completed trainings of a trial's network, where their mean counts."""
        if self.config.trainings_per_network == 1:
            return []
        own = self._own_results([trial.architecture_hash]).get(trial.architecture_hash, [])
        return _completed(own)

    def _rewarded(self, accuracy: float, metrics: dict[str, float]) -> dict[str, Any]:
        """What a trial becomes by these figures: completed, or failed if they give no reward."""
        try:
            reward, parts = self.objective.reward(accuracy, metrics)
        except ValueError as error:
            failure = Failure(f"no reward: {error}", "infrastructure")
            return {"outcome": "failed", "metrics": metrics, "failure": failure}
        return {
            "outcome": "completed",
            "accuracy": accuracy,
            "metrics": metrics,
            "reward": reward,
            "parts": parts,
        }

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
        if trial.finished_at is None:
            trial = replace(trial, finished_at=time.time())
        superseded: list[int] = []
        if trial.outcome == "completed":
            superseded = [before.id for before in self._earlier_trainings(trial)]
        if not self.store.finish_trial(trial, superseded):
            raise RuntimeError(f"trial {trial.id} already had a result: two writers?")
        self._batch[trial.id] = trial
        self._tally.note(trial)
        if superseded:
            self._tally.note_best(self.store)
        tell_end(trial)
        if trial.failure is not None:
            self.parts.evaluator.forget(self._network(trial), seed=trial.seed)
        if time.monotonic() - self._time_noted > NOTE_TIME_S:
            self._note_time()  # a kill forgets no more of `stop.hours` than that, and a trial
        self.watcher.trial(trial)

    def _update(self, controller: Controller, trials: Sequence[Trial]) -> None:
        """Transaction (c). The infrastructure's failures are withheld from the controller."""
        self._commit(controller, trials[0].batch, trials)

    def _commit(
        self, controller: Controller, number: int, trials: Sequence[Trial], *, state: bool = False
    ) -> None:
        """Let the controller learn, and record that; with its `state` where none else tells it."""
        learned = [trial for trial in trials if not is_infrastructure(trial)]
        learn(controller, learned)
        diagnostics = controller.diagnostics()
        self._note_time()
        self.store.commit_update(
            number,
            [trial.id for trial in learned],
            diagnostics,
            state_to_bytes(controller.state_dict()) if state else None,
        )
        self._note_batch(number, trials, learned)
        self.watcher.update(number, diagnostics)

    def _note_batch(self, number: int, trials: Sequence[Trial], learned: Sequence[Trial]) -> None:
        """Count a batch, and those of it that the controller has learned from, for the rules."""
        if number == 0:
            self._tell_feasible(trials)
        self._tally.note_batch(trials)
        if self._early_stop is not None:
            self._early_stop.note(learned)

    def _tell_feasible(self, trials: Sequence[Trial]) -> None:
        """Say early whether the target is within reach."""
        found = self.objective.feasible([trial.metrics or {} for trial in trials])
        if found is not None:
            sentence, meeting = found
            logger.log(logging.INFO if meeting else logging.WARNING, "%s", sentence)
            self.store.add_event("feasible", sentence)
            self.watcher.note(sentence)

    # ------------------------------------------------------------------ resume and stop

    def _restore(self) -> Controller:
        """The controller as it was at the last commit, ready for the next step."""
        controller = self.parts.controller(self.objective)
        snapshot = self.store.snapshot()
        if snapshot is None:
            self._warm_start(controller)
            return controller
        batch, state = snapshot
        controller.load_state_dict(state_from_bytes(state))
        if self.store.has_update(batch):
            _, ids, _ = self.store.updates(last=1)[0]
            by_id = {trial.id: trial for trial in self.store.trials(batch=batch)}
            learn(controller, [by_id[trial_id] for trial_id in ids])
        return controller

    def _warm_start(self, controller: Controller) -> None:
        """Let the controller observe an earlier campaign's trials, as they are on this device."""
        if self.config.warm_start is None:
            return
        if not self.store.trials(role="warm_start"):
            carry_over(self.config, self.parts, self.store)
        waiting = [t for t in self.store.trials(role="warm_start") if t.outcome is None]
        self.watcher.phase("warm start", len(waiting))
        # Ids of such trials count down: the earliest has the highest.
        for trial in self._on_this_device(waiting[::-1]):
            self.store.finish_trial(replace(trial, finished_at=time.time()))
            self.watcher.advance()
        known = [t for t in self.store.trials(role="warm_start") if not is_infrastructure(t)]
        controller.observe([result_of(trial) for trial in reversed(known)])

    def _on_this_device(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """An earlier campaign's trials with the latencies and the rewards that they have here."""
        sized = [self._sized(trial) for trial in trials]
        yield from (trial for trial in sized if trial.outcome is not None)
        for trial in self._measured([trial for trial in sized if trial.outcome is None]):
            if trial.outcome is None:
                assert trial.accuracy is not None  # only completed ones are carried over
                trial = replace(trial, **self._rewarded(trial.accuracy, trial.metrics or {}))
            yield trial

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

    def _own_results(self, architecture_hashes: Sequence[str]) -> dict[str, list[Trial]]:
        return self.store.own_results(architecture_hashes, self.parts.epochs)

    def _settled(self, own: Sequence[Trial]) -> bool:
        """Whether a network with these results needs no further training."""
        return bool(own) and (not _completed(own) or len(own) >= self.config.trainings_per_network)

    def _original(self, architecture_hash: str) -> Trial | None:
        """The trial whose result identical networks take, if there is one."""
        own = self._own_results([architecture_hash]).get(architecture_hash, [])
        return (_completed(own) or own)[-1] if self._settled(own) else None

    def _end(self, controller: Controller, reason: str) -> None:
        """Record why the search ended and which networks the controller would hand over."""
        hashes = [self.parts.space.decode(t).hash for t in controller.recommend(RECOMMENDED)]
        own = self._own_results(hashes)
        last = [(_completed(own[key]) or own[key])[-1] for key in hashes if key in own]
        self.store.set_meta("recommended", [trial.id for trial in last])
        self.store.set_meta("stop_reason", reason)

    def _note_time(self) -> None:
        self._time_noted = time.monotonic()
        self.store.set_meta("spent_s", self._tally.spent_s())


def _completed(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.outcome == "completed"]


def learn(controller: Controller, trials: Sequence[Trial]) -> None:
    """Let the controller learn from finished trials: its own, and those drawn at random."""
    controller.update([result_of(trial) for trial in trials if trial.role == "search"])
    others = [result_of(trial) for trial in trials if trial.role != "search"]
    if others:
        controller.observe(others)


def result_of(trial: Trial) -> Result:
    """What the controller gets to see of a finished trial."""
    assert trial.outcome is not None  # a batch is learned from when all of it is done
    # What is only observed was no proposal; its id means nothing.
    proposal_id = trial.id if trial.proposal_id is None else trial.proposal_id
    return Result(
        proposal=Proposal(proposal_id, trial.tokens, trial.log_prob),
        outcome=trial.outcome,
        reward=trial.reward,
        accuracy=trial.accuracy,
        metrics=trial.metrics or {},
        fidelity=trial.epochs,
        reused=trial.reused_from is not None,
        cause=trial.failure.cause if trial.failure else None,
    )
