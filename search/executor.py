"""Executor: where trials are evaluated; serial in this process, or in Ray workers.

    executor.submit(job)        # any number of jobs; they start as workers come free
    executor.wait(timeout_s)    # -> finished jobs, each exactly once
    executor.quiesce()          # nothing of this executor uses the cores until the next submit
    executor.close()            # ends every process it started

A job that ends without an accuracy comes back with a Failure, or Stopped before its time. The Ray
workers are in search/ray_executor.py.
"""

from __future__ import annotations

import collections
import os
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import field, replace
from typing import TYPE_CHECKING

from search.evaluation import Evaluation, Evaluator, TrialStopped, make_evaluator
from search.trial import Failure
from space.architecture import Architecture
from space.errors import ConfigError, TrialFailed
from space.records import record

if TYPE_CHECKING:
    from search.config import EvaluatorChoice, RayConfig, SerialConfig


@record
class Job:
    """A network to evaluate.

    Attributes:
        trial_id: The key that makes recording exactly-once.
        architecture: The network.
        seed: 0 to 2**32 - 1.
        bars: Epoch -> the accuracy under which the training is stopped after it (early_stop).
    """

    trial_id: int
    architecture: Architecture
    seed: int
    bars: dict[int, float] = field(default_factory=dict)


@record
class Stopped:
    """A child that was not worth another epoch.

    Attributes:
        reason: One sentence.
        metrics: The accuracies after its epochs.
    """

    reason: str
    metrics: dict[str, float]


@record
class Finished:
    """A job's end.

    Attributes:
        job: As submitted.
        outcome: The accuracy, or why there is none.
        attempts: How often it was started.
        seconds: From the last start to the end.
        waited_s: From submission to the last start.
    """

    job: Job
    outcome: Evaluation | Stopped | Failure
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


def run_job(evaluator: Evaluator, job: Job, time_limit_s: float) -> Evaluation | Stopped | Failure:
    """Evaluate a job; whatever goes wrong inside becomes a Failure."""
    try:
        evaluator.begin(job.bars)
        found = evaluator.evaluate(job.architecture, seed=job.seed, time_limit_s=time_limit_s)
        if not job.bars:
            return found
        return replace(found, metrics={**found.metrics, **evaluator.curve_metrics()})
    except TrialStopped as stop:
        return Stopped(str(stop), evaluator.curve_metrics())
    except TrialFailed as error:
        # What another exception led to, a broken NPU may have led to as well.
        sure = error.__cause__ is None or error.cause == "infrastructure"
        return Failure(error.reason, error.cause, error.detail, confirmed=sure)
    except MemoryError:
        return Failure("out of memory", "architecture", traceback.format_exc(), confirmed=False)
    except (ConfigError, OSError) as error:
        # Data that are not there, a full disk: the network has nothing to do with it.
        return Failure(_described(error), "infrastructure", traceback.format_exc()[-4000:])
    except Exception as error:
        # A child may die of anything that MindSpore raises: the campaign goes on, with the reason
        # recorded and the traceback kept.
        detail = traceback.format_exc()[-4000:]
        return Failure(_described(error), "architecture", detail, confirmed=False)


def _described(error: Exception) -> str:
    """An exception in one line."""
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first_line}"


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
        attempts, outcome = 1, run_job(self._evaluator, job, self._time_limit_s)
        if isinstance(outcome, Failure) and not outcome.confirmed:
            # Whose fault it is, a second one tells.
            attempts, outcome = 2, run_job(self._evaluator, job, self._time_limit_s)
        return [ended(job, outcome, attempts, started, submitted)]

    def quiesce(self) -> None:
        """Nothing runs between calls of `wait`."""

    def close(self) -> None:
        """There is no process to end."""
        self._queue.clear()


def ended(
    job: Job,
    outcome: Evaluation | Stopped | Failure,
    attempts: int,
    started: float,
    submitted: float,
) -> Finished:
    """Return the end of a job that was submitted and last started at these monotonic times."""
    now = time.monotonic()
    return Finished(job, outcome, attempts, now - started, started - submitted)


def make_executor(config: SerialConfig | RayConfig, evaluator: EvaluatorChoice) -> Executor:
    """Return the executor that a configuration asks for.

    Raises:
        ConfigError: Ray cannot be reached or lacks resources.
    """
    if config.name == "serial":
        return SerialExecutor(config, evaluator)
    from search.ray_executor import RayExecutor

    return RayExecutor(config, evaluator)
