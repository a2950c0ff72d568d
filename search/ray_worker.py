"""The process that evaluates trials for the Ray executor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil

from search.evaluation import Evaluation, Evaluator, make_evaluator
from search.executor import Job, Stopped, run_job
from search.trial import Failure

if TYPE_CHECKING:
    from search.config import EvaluatorChoice


class Worker:
    """The body of a Ray actor: one process that evaluates one job at a time.

    Args:
        evaluator: Made when it warms up.
        threads: CPU threads.
        place: The how manieth worker of its node it is, from 0, to keep to cores of its own; None
            leaves the cores to the system.
    """

    def __init__(self, evaluator: EvaluatorChoice, threads: int, place: int | None) -> None:
        if place is not None:
            keep_to_cores(place * threads, threads)
        # Before any numerical library is loaded; a worker must not use its neighbours' cores.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(threads)
        self._config = evaluator
        self._threads = threads
        self._evaluator: Evaluator | None = None
        self._process = psutil.Process()

    def warm_up(self) -> float:
        """Load what evaluations need; return the process's resident memory in MB."""
        # Not in the constructor, whose exceptions Ray hides behind one of its own.
        self._evaluator = make_evaluator(self._config, threads=self._threads)
        self._evaluator.warm_up()
        return self._memory_mb()

    def run(self, job: Job, time_limit_s: float) -> tuple[Evaluation | Stopped | Failure, float]:
        """Return the outcome and the process's resident memory in MB."""
        assert self._evaluator is not None  # it is warm before there is a job
        outcome = run_job(self._evaluator, job, time_limit_s)
        return outcome, self._memory_mb()

    def _memory_mb(self) -> float:
        return self._process.memory_info().rss / 2**20


def keep_to_cores(first: int, count: int) -> None:
    """Let this process run on so many of its cores only; with fewer of them nothing changes."""
    cores = sorted(os.sched_getaffinity(0))[first : first + count]
    if len(cores) == count:
        os.sched_setaffinity(0, cores)
