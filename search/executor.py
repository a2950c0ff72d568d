"""Executor: where trials are evaluated; serial in this process, or in Ray workers.

    executor.submit(job)        # any number of jobs; they start as workers come free
    executor.wait(timeout_s)    # -> finished jobs, each exactly once
    executor.quiesce()          # nothing of this executor uses the cores until the next submit
    executor.close()            # ends every process it started

A job that ends without an accuracy comes back with a Failure. A worker that dies takes only its
own job with it: the job is tried again on another worker, `retries` times, and then fails.

Ray's part: a *slot* is a placement group with the CPUs of one worker. The worker is an actor in
the slot, one MindSpore process; it is replaced after `trials_per_process` trials or above
`max_memory_mb`, and its successor is started and warmed up in the same slot one trial ahead.
"""

from __future__ import annotations

import collections
import logging
import os
import signal
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import psutil

from search.evaluation import Evaluation, Evaluator, make_evaluator
from search.trial import Failure
from space.architecture import Architecture
from space.errors import ConfigError, TrialFailed
from space.records import record

if TYPE_CHECKING:
    from search.config import EvaluatorChoice, RayConfig, SerialConfig

logger = logging.getLogger(__name__)

#: A worker gets so long beyond the time limit to end a trial by itself before it is killed.
KILL_GRACE_S = 15.0
#: A worker that is not ready after so long is replaced.
START_LIMIT_S = 180.0
#: So many workers in a row that die before they are ready end the campaign.
MAX_FAILED_STARTS = 3


@record
class Job:
    """A network to evaluate.

    Attributes:
        trial_id: The key that makes recording exactly-once.
        architecture: The network.
        seed: 0 to 2**32 - 1.
    """

    trial_id: int
    architecture: Architecture
    seed: int


@record
class Finished:
    """A job's end: exactly one of `evaluation` and `failure`.

    Attributes:
        job: As submitted.
        evaluation: The accuracy.
        failure: Why there is none.
        attempts: How often it was started.
        seconds: From the last start to the end.
        waited_s: From submission to the last start.
    """

    job: Job
    evaluation: Evaluation | None
    failure: Failure | None
    attempts: int
    seconds: float
    waited_s: float


class Executor(ABC):
    """Evaluates jobs; see the module for the order of calls."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many jobs run at once."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Queue a job."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[Finished]:
        """Return jobs that ended, waiting at most `timeout_s` for the first; may be empty."""

    @abstractmethod
    def quiesce(self) -> None:
        """Wait until nothing of this executor uses the cores, so that latency can be measured."""

    @abstractmethod
    def close(self) -> None:
        """End every process that it started; jobs that are not finished are dropped."""


def run_job(evaluator: Evaluator, job: Job, time_limit_s: float) -> Evaluation | Failure:
    """Evaluate a job; whatever goes wrong inside becomes a Failure."""
    try:
        return evaluator.evaluate(job.architecture, seed=job.seed, time_limit_s=time_limit_s)
    except TrialFailed as error:
        return Failure(error.reason, error.cause, error.detail)
    except MemoryError:
        return Failure("out of memory", "architecture", traceback.format_exc())
    except Exception as error:
        # A child may die of anything that MindSpore raises: the campaign goes on, with the reason
        # recorded and the traceback kept.
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        reason = f"{type(error).__name__}: {first_line}"
        return Failure(reason, "architecture", traceback.format_exc()[-4000:])


class SerialExecutor(Executor):
    """Evaluates in this process, one job after another, when asked for results."""

    def __init__(
        self, config: SerialConfig, evaluator: EvaluatorChoice, *, time_limit_s: float = 3600.0
    ) -> None:
        self._evaluator = make_evaluator(evaluator, threads=os.cpu_count() or 1)
        self._warm = False
        self._time_limit_s = time_limit_s
        self._queue: collections.deque[tuple[Job, float]] = collections.deque()

    @property
    def capacity(self) -> int:
        """One."""
        return 1

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.append((job, time.monotonic()))

    def wait(self, timeout_s: float) -> list[Finished]:
        """Evaluate the next job, however long it takes."""
        if not self._queue:
            return []
        if not self._warm:
            self._evaluator.warm_up()
            self._warm = True
        job, submitted = self._queue.popleft()
        started = time.monotonic()
        outcome = run_job(self._evaluator, job, self._time_limit_s)
        return [_finished(job, outcome, 1, started, submitted)]

    def quiesce(self) -> None:
        """Nothing runs between calls of `wait`."""

    def close(self) -> None:
        """There is no process to end."""
        self._queue.clear()


def _finished(
    job: Job, outcome: Evaluation | Failure, attempts: int, started: float, submitted: float
) -> Finished:
    evaluation = outcome if isinstance(outcome, Evaluation) else None
    failure = outcome if isinstance(outcome, Failure) else None
    now = time.monotonic()
    return Finished(job, evaluation, failure, attempts, now - started, started - submitted)


class Worker:
    """The body of a Ray actor: one process that evaluates one job at a time."""

    def __init__(self, evaluator: EvaluatorChoice, threads: int) -> None:
        # Before any numerical library is loaded; a worker must not use its neighbours' cores.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(threads)
        self._evaluator = make_evaluator(evaluator, threads=threads)

    def warm_up(self) -> int:
        """Load what evaluations need; return the process id."""
        self._evaluator.warm_up()
        return os.getpid()

    def run(self, job: Job, time_limit_s: float) -> tuple[Evaluation | Failure, float]:
        """Return the outcome and the process's resident memory in MB."""
        outcome = run_job(self._evaluator, job, time_limit_s)
        return outcome, psutil.Process().memory_info().rss / 2**20


class _Process:
    """A worker process as the driver sees it."""

    def __init__(self, actor: Any, warm: Any) -> None:
        self.actor = actor
        self.warm = warm
        self.warm_since = time.monotonic()
        self.ready = False
        self.trials = 0
        self.memory_mb = 0.0


class _Slot:
    """The CPUs of one worker: its process, the successor, the job that runs."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.process: _Process | None = None
        self.successor: _Process | None = None
        self.running: _Running | None = None


class _Running:
    """A job on a worker."""

    def __init__(self, waiting: _Waiting, result: Any) -> None:
        self.waiting = waiting
        self.result = result
        self.started = time.monotonic()


class _Waiting:
    """A job in the queue."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.submitted = time.monotonic()
        self.attempts = 0


class RayExecutor(Executor):
    """Evaluates in Ray workers; see the module.

    Args:
        config: Workers, threads, limits.
        evaluator: Built anew in every worker.

    Raises:
        ConfigError: The cluster cannot be reached or has not the CPUs asked for.
    """

    def __init__(self, config: RayConfig, evaluator: EvaluatorChoice) -> None:
        self._config = config
        self._evaluator = evaluator
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._failed_starts = 0
        self._ray = _connect(config)
        self._actor_class = self._ray.remote(Worker)
        self._slots = self._reserve()
        self._evaluator_ref = self._ray.put(evaluator)
        for slot in self._slots:
            slot.process = self._start(slot)

    @property
    def capacity(self) -> int:
        """The number of workers."""
        return len(self._slots)

    def submit(self, job: Job) -> None:
        """Queue a job; it starts as soon as a worker is ready."""
        self._queue.append(_Waiting(job))
        self._dispatch()

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return the jobs that ended; start queued ones on the workers that came free."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_starts()
            finished = self._collect()
            self._dispatch()
            if finished or time.monotonic() >= deadline:
                return finished
            pending = [slot.running.result for slot in self._slots if slot.running]
            pending += [p.warm for p in self._processes() if not p.ready]
            if not pending:
                return []
            pause = min(1.0, max(0.0, deadline - time.monotonic()))
            self._ray.wait(pending, num_returns=1, timeout=pause)

    def quiesce(self) -> None:
        """Wait until no worker starts or warms up; only called while no job runs."""
        while any(not process.ready for process in self._processes()):
            self._check_starts()
            starting = [p.warm for p in self._processes() if not p.ready]
            if starting:
                self._ray.wait(starting, num_returns=len(starting), timeout=1.0)

    def close(self) -> None:
        """Kill the workers and leave the cluster; a local cluster ends."""
        for process in self._processes():
            self._ray.kill(process.actor)
        for slot in self._slots:
            self._ray.util.remove_placement_group(slot.group)
        self._slots = []
        self._ray.shutdown()

    # ------------------------------------------------------------------ inside

    def _reserve(self) -> list[_Slot]:
        threads = self._config.threads
        available = int(self._ray.cluster_resources().get("CPU", 0)) // threads
        wanted = self._config.workers or available
        if wanted > available or wanted == 0:
            self._ray.shutdown()
            raise ConfigError(
                f"executor.workers: {max(wanted, 1)} workers of {threads} threads need"
                f" {max(wanted, 1) * threads} CPUs, but Ray has {available * threads};"
                " ask for fewer workers or threads."
            )
        groups = [
            self._ray.util.placement_group([{"CPU": threads}], strategy="PACK")
            for _ in range(wanted)
        ]
        for group in groups:
            if not group.wait(timeout_seconds=60):
                self._ray.shutdown()
                raise ConfigError(
                    f"executor.workers: Ray did not give {wanted} workers their CPUs within 60 s;"
                    " another job may hold them."
                )
        return [_Slot(group) for group in groups]

    def _start(self, slot: _Slot) -> _Process:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=slot.group, placement_group_bundle_index=0
        )
        # The slot holds the CPUs; a worker and its successor share it for a moment.
        actor = self._actor_class.options(
            num_cpus=0.01, max_restarts=0, scheduling_strategy=strategy
        ).remote(self._evaluator_ref, self._config.threads)
        return _Process(actor, actor.warm_up.remote())

    def _processes(self) -> list[_Process]:
        both = [process for slot in self._slots for process in (slot.process, slot.successor)]
        return [process for process in both if process is not None]

    def _check_starts(self) -> None:
        """Note which processes became ready; replace those that died or hang at the start."""
        for slot in self._slots:
            slot.process = self._checked(slot, slot.process)
            slot.successor = self._checked(slot, slot.successor)

    def _checked(self, slot: _Slot, process: _Process | None) -> _Process | None:
        """The process itself, or a new one in its place."""
        if process is None or process.ready or not self._start_ended(process):
            return process
        reason = self._start_failure(process)
        if reason is None:
            process.ready = True
            self._failed_starts = 0
            return process
        self._failed_starts += 1
        self._ray.kill(process.actor)
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise ConfigError(
                f"executor: {self._failed_starts} workers in a row died at their start: {reason}"
            )
        logger.warning("a worker died at its start and is replaced: %s", reason)
        return self._start(slot)

    def _start_ended(self, process: _Process) -> bool:
        ready, _ = self._ray.wait([process.warm], timeout=0)
        return bool(ready) or time.monotonic() - process.warm_since > START_LIMIT_S

    def _start_failure(self, process: _Process) -> str | None:
        try:
            self._ray.get(process.warm, timeout=0.1)
        except self._ray.exceptions.RayTaskError as error:
            # The evaluator itself refused: a wrong configuration is wrong on every worker.
            cause = error.cause
            if isinstance(cause, ConfigError):
                raise cause from None
            return str(cause)
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return None

    def _dispatch(self) -> None:
        for slot in self._slots:
            if slot.running is not None:
                continue
            self._recycle(slot)
            process = slot.process
            if process is None or not process.ready or not self._queue:
                continue
            waiting = self._queue.popleft()
            waiting.attempts += 1
            process.trials += 1
            result = process.actor.run.remote(waiting.job, self._config.time_limit_s)
            slot.running = _Running(waiting, result)
            if process.trials == self._config.trials_per_process and slot.successor is None:
                slot.successor = self._start(slot)

    def _recycle(self, slot: _Slot) -> None:
        """Replace an idle process that has done its share."""
        process = slot.process
        if process is None:
            return
        worn = (
            process.trials >= self._config.trials_per_process
            or process.memory_mb > self._config.max_memory_mb
        )
        if worn:
            self._ray.kill(process.actor)
            slot.process = slot.successor or self._start(slot)
            slot.successor = None

    def _collect(self) -> list[Finished]:
        return [end for slot in self._slots for end in self._collect_from(slot)]

    def _collect_from(self, slot: _Slot) -> list[Finished]:
        running = slot.running
        if running is None:
            return []
        overtime = time.monotonic() - running.started - self._config.time_limit_s
        ready, _ = self._ray.wait([running.result], timeout=0)
        if not ready and overtime < KILL_GRACE_S:
            return []
        assert slot.process is not None  # a job runs on it
        slot.running = None
        if not ready:
            self._replace(slot)
            reason = (
                f"time limit of {self._config.time_limit_s:g} s reached; the worker was killed"
            )
            return [self._end(running, Failure(reason, "architecture"))]
        try:
            outcome, slot.process.memory_mb = self._ray.get(running.result)
        except self._ray.exceptions.RayError as error:
            self._replace(slot)
            return self._retry(running, error)
        return [self._end(running, outcome)]

    def _retry(self, running: _Running, error: Exception) -> list[Finished]:
        """A worker died: the job goes back to the head of the queue, or fails for good."""
        first_line = (str(error).strip().splitlines() or [""])[0]
        if running.waiting.attempts <= self._config.retries:
            logger.warning(
                "trial %d: its worker died (%s); it is tried again on another one",
                running.waiting.job.trial_id,
                first_line,
            )
            self._queue.appendleft(running.waiting)
            return []
        reason = f"its worker died {running.waiting.attempts} times: {first_line}"
        return [self._end(running, Failure(reason, "infrastructure", str(error)[-4000:]))]

    def _replace(self, slot: _Slot) -> None:
        assert slot.process is not None  # only called for a slot whose job just ended
        self._ray.kill(slot.process.actor)
        slot.process = slot.successor or self._start(slot)
        slot.successor = None

    def _end(self, running: _Running, outcome: Evaluation | Failure) -> Finished:
        waiting = running.waiting
        return _finished(
            waiting.job, outcome, waiting.attempts, running.started, waiting.submitted
        )


def _connect(config: RayConfig) -> Any:
    """Import Ray and join or start a cluster."""
    # Workers inherit these; the driver's own environment decides where nothing is set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.exceptions
    import ray.util
    import ray.util.scheduling_strategies

    # Its remarks about a cluster's defaults are not for the user of a campaign; errors still come.
    logging.getLogger("ray").setLevel(logging.ERROR)
    _check_reachable(config.address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if config.address is None:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=200 * 2**20,
                configure_logging=False,
            )
        else:
            ray.init(
                address=config.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"executor.address: cannot join Ray at {config.address!r}: {first_line}"
        ) from error
    # Ray's own handler prints a stack and ends the engine at once.
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    return ray


def _check_reachable(address: str | None) -> None:
    """Refuse at once a cluster that nobody listens for: Ray would try for minutes.

    Raises:
        ConfigError: No connection to `host:port` within 5 s.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"executor.address: no Ray cluster answers at {address!r} ({error}); start it with"
            " `ray start --head`, or leave the address out for a local one."
        ) from None


def make_executor(config: SerialConfig | RayConfig, evaluator: EvaluatorChoice) -> Executor:
    """Return the executor that a configuration asks for.

    Raises:
        ConfigError: Ray cannot be reached or lacks resources.
    """
    if config.name == "serial":
        return SerialExecutor(config, evaluator)
    return RayExecutor(config, evaluator)
