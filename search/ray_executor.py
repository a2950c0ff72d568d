"""Trials on Ray workers: one machine's, or a cluster's whose nodes come and go.

A *slot* is a placement group with the CPUs of one worker. The worker is an actor in the slot, one
MindSpore process; it is replaced after `trials_per_process` trials or above `max_memory_mb`, and
its successor is started and warmed up in the same slot one trial ahead.

A worker that dies takes only its own job with it: the job is tried again on another worker,
`retries` times, and then fails. When a node dies, Ray looks for another place for its slots; those
that find none wait for a node to come. Where the number of workers is left to the cluster, a new
node's CPUs become new slots.
"""

from __future__ import annotations

import collections
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import psutil

from search.campaign_log import about
from search.evaluation import Evaluation, Evaluator, make_evaluator
from search.executor import Executor, Finished, Job, Stopped, ended, run_job
from search.ray_cluster import connect, gist
from search.trial import Failure
from space.errors import ConfigError

if TYPE_CHECKING:
    from search.config import EvaluatorChoice, RayConfig

logger = logging.getLogger(__name__)

#: A worker gets so long beyond the time limit to end a trial by itself before it is killed.
KILL_GRACE_S = 15.0
#: A worker that is not ready after so long is replaced.
START_LIMIT_S = 180.0
#: The pause before a job whose worker died is tried again: 1 s, doubled each time, up to this.
MAX_PAUSE_S = 60.0
#: So many workers in a row that die before they are ready end the campaign.
MAX_FAILED_STARTS = 3
#: Ray has so long to find a place for the workers at the start.
PLACE_LIMIT_S = 60.0
#: How often the cluster is asked which nodes it has.
FOLLOW_S = 5.0
#: A cluster that has had no place for any worker for so long ends the search.
NO_NODE_LIMIT_S = 600.0


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

    def warm_up(self) -> int:
        """Load what evaluations need; return the process id."""
        # Not in the constructor, whose exceptions Ray hides behind one of its own.
        self._evaluator = make_evaluator(self._config, threads=self._threads)
        self._evaluator.warm_up()
        return os.getpid()

    def run(self, job: Job, time_limit_s: float) -> tuple[Evaluation | Stopped | Failure, float]:
        """Return the outcome and the process's resident memory in MB."""
        assert self._evaluator is not None  # it is warm before there is a job
        outcome = run_job(self._evaluator, job, time_limit_s)
        return outcome, self._process.memory_info().rss / 2**20


def keep_to_cores(first: int, count: int) -> None:
    """Let this process run on so many of its cores only; with fewer of them nothing changes."""
    cores = sorted(os.sched_getaffinity(0))[first : first + count]
    if len(cores) == count:
        os.sched_setaffinity(0, cores)


class _Process:
    """A worker process as the driver sees it."""

    def __init__(self, actor: Any, warm: Any, nodes_lost: int) -> None:
        self.actor = actor
        self.warm = warm
        self.nodes_lost = nodes_lost  # by the cluster, when it was started
        self.warm_since = time.monotonic()
        self.ready = False
        self.trials = 0
        self.memory_mb = 0.0


class _Slot:
    """The CPUs of one worker: its process, the successor, the job that runs."""

    def __init__(self, group: Any, *, placed: bool) -> None:
        self.group = group
        self.placed = placed  # on a node of the cluster
        self.place: tuple[str | None, int] | None = None  # its node, and which cores it has there
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
        self.nodes_lost = 0  # while it ran there
        self.not_before = self.submitted
        self.tried: set[int] = set()  # slots, by id(), whose worker died of it or beside it


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
        self._ray = connect(config)
        self._actor_class = self._ray.remote(Worker)
        self._nodes: set[str] = set()
        self._nodes_lost = 0
        self._followed = self._last_placed = time.monotonic()
        self._slots = self._reserve()
        self._evaluator_ref = self._ray.put(evaluator)
        self._look()

    @property
    def capacity(self) -> int:
        """The number of workers that have a node."""
        return sum(slot.placed for slot in self._slots)

    def submit(self, job: Job) -> None:
        """Queue a job; it starts as soon as a worker is ready."""
        self._queue.append(_Waiting(job))
        self._dispatch()

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return the jobs that ended; start queued ones on the workers that came free."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._follow()
            self._check_starts()
            self._dispatch()
            pending = [slot.running.result for slot in self._slots if slot.running]
            pending += [p.warm for p in self._processes() if not p.ready]
            pause = min(1.0, max(0.0, deadline - time.monotonic()))
            came: list[Any] = []
            if pending:
                came, _ = self._ray.wait(pending, num_returns=1, timeout=pause)
                if came and len(pending) > 1:
                    # All that have come: a late slot's must not wait behind early ones.
                    came, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
            elif self._queue or not self.capacity:
                time.sleep(pause)  # until a node comes
            else:
                return []
            finished = [end for slot in self._slots for end in self._collect_from(slot, came)]
            if finished:
                self._dispatch()
            if finished or time.monotonic() >= deadline:
                return finished

    def quiesce(self) -> None:
        """Wait until no worker starts or warms up; only called while no job runs."""
        while any(not process.ready for process in self._processes()):
            self._follow()
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
        available = sum(self._room(node) for node in self._alive())
        wanted = self._config.workers or available
        if wanted > available or wanted == 0:
            self._ray.shutdown()
            raise ConfigError(
                f"executor.workers: {max(wanted, 1)} workers of {self._asked()} do not fit: the"
                f" nodes of Ray's cluster have room for {available}; ask for fewer workers or"
                " threads."
            )
        groups = [self._group() for _ in range(wanted)]
        # A node that has just died is still counted for a while, and an earlier driver's workers
        # may not be gone yet: where the number is Ray's choice, one worker is enough to begin.
        enough = wanted if self._config.workers else 1
        deadline = time.monotonic() + PLACE_LIMIT_S
        while sum(self._is_placed(group) for group in groups) < enough:
            if time.monotonic() > deadline:
                self._ray.shutdown()
                raise ConfigError(
                    f"executor.workers: Ray did not give {wanted} workers their CPUs within"
                    f" {PLACE_LIMIT_S:.0f} s; another job may hold them."
                )
            time.sleep(0.1)
        return [_Slot(group, placed=False) for group in groups]

    def _is_placed(self, group: Any) -> bool:
        state: str = self._ray.util.placement_group_table(group)["state"]
        return state == "CREATED"

    def _group(self) -> Any:
        bundle = {"CPU": self._config.threads}
        if self._config.npus:
            bundle["NPU"] = self._config.npus
        return self._ray.util.placement_group([bundle], strategy="PACK")

    def _asked(self) -> str:
        """What one worker asks for, in words."""
        npus = f" and {self._config.npus} NPU" if self._config.npus else ""
        return f"{self._config.threads} threads{npus}"

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _room(self, node: dict[str, Any]) -> int:
        """How many workers a node has room for."""
        has = node["Resources"]
        room = int(has.get("CPU", 0)) // self._config.threads
        return min(room, int(has.get("NPU", 0))) if self._config.npus else room

    def _follow(self) -> None:
        """Look at the cluster from time to time."""
        now = time.monotonic()
        if now - self._followed >= FOLLOW_S:
            self._followed = now
            self._look()
        if self.capacity:
            self._last_placed = now
        elif now - self._last_placed > NO_NODE_LIMIT_S:
            raise ConfigError(
                f"executor: Ray's cluster has had no room for a worker of {self._asked()} for"
                f" {NO_NODE_LIMIT_S:.0f} s; resume the campaign when its nodes are back."
            )

    def _look(self) -> None:
        """Find out which slots have a node; make slots of what new nodes offer."""
        alive = self._alive()
        ids = {node["NodeID"] for node in alive}
        self._nodes_lost += len(self._nodes - ids)
        self._nodes = ids
        if self._config.workers is None:
            room = sum(self._room(node) for node in alive)
            for _ in range(room - len(self._slots)):
                self._slots.append(_Slot(self._group(), placed=False))
        for slot in self._slots:
            self._place(slot, self._is_placed(slot.group))

    def _place(self, slot: _Slot, placed: bool) -> None:
        """Note whether a slot has a node; a job whose node is gone ends by Ray's error."""
        if slot.placed and not placed:
            logger.warning("a node of the cluster is gone; a worker waits for another one")
        slot.placed = placed
        if slot.running is not None:
            return
        if not placed:
            for process in (slot.process, slot.successor):
                if process is not None:
                    self._ray.kill(process.actor)
            slot.process = slot.successor = None
        elif slot.process is None:
            slot.process = self._start(slot)

    def _start(self, slot: _Slot) -> _Process:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=slot.group, placement_group_bundle_index=0
        )
        # The slot holds the CPUs; a worker and its successor share it for a moment.
        # Half an NPU each: Ray shows both of them the slot's one.
        actor = self._actor_class.options(
            num_cpus=0.01,
            resources={"NPU": 0.5} if self._config.npus else None,
            max_restarts=0,
            scheduling_strategy=strategy,
        ).remote(self._evaluator_ref, self._config.threads, self._place_on_node(slot))
        return _Process(actor, actor.warm_up.remote(), self._nodes_lost)

    def _place_on_node(self, slot: _Slot) -> int | None:
        """The how manieth of its node's workers a slot is, where they keep to their cores."""
        if not self._config.pin:
            return None
        node = _node_of(self._ray, slot)
        if slot.place is None or slot.place[0] != node:
            taken = {other.place for other in self._slots if other is not slot}
            free = next(i for i in range(len(self._slots)) if (node, i) not in taken)
            slot.place = (node, free)
        return slot.place[1]

    def _processes(self) -> list[_Process]:
        both = [process for slot in self._slots for process in (slot.process, slot.successor)]
        return [process for process in both if process is not None]

    def _check_starts(self) -> None:
        """Note which processes became ready; replace those that died or hang at the start."""
        for slot in self._slots:
            if slot.process is None and slot.placed:
                slot.process = self._start(slot)
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
        self._ray.kill(process.actor)
        if self._lost_its_node(process):
            return None if not slot.placed else self._start(slot)
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise ConfigError(
                f"executor: {self._failed_starts} workers in a row died at their start: {reason}"
            )
        logger.warning("a worker died at its start and is replaced: %s", reason)
        return self._start(slot)

    def _lost_its_node(self, process: _Process) -> bool:
        """Whether a node went away since a process was started: its death is then no wonder."""
        self._look()
        return self._nodes_lost > process.nodes_lost

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
            return f"{type(error).__name__}: {gist(error)}"
        return None

    def _dispatch(self) -> None:
        for slot in self._slots:
            if slot.running is not None:
                continue
            self._recycle(slot)
            process = slot.process
            if process is None or not process.ready or not self._queue:
                continue
            waiting = self._next_for(slot)
            if waiting is None:
                continue
            waiting.attempts += 1
            process.trials += 1
            result = process.actor.run.remote(waiting.job, self._config.time_limit_s)
            slot.running = _Running(waiting, result)
            if process.trials == self._config.trials_per_process and slot.successor is None:
                slot.successor = self._start(slot)

    def _next_for(self, slot: _Slot) -> _Waiting | None:
        """Take the first job from the queue that this slot may have now.

        A job whose worker died waits a while, and is then left to an idle slot that it was not
        tried in, where there is one: what killed its worker may be the node's fault.
        """
        now = time.monotonic()
        idle = {id(s) for s in self._slots if s.process and s.process.ready and not s.running}
        for waiting in self._queue:
            elsewhere = id(slot) in waiting.tried and bool(idle - waiting.tried)
            if now >= waiting.not_before and not elsewhere:
                self._queue.remove(waiting)
                return waiting
        return None

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

    def _collect_from(self, slot: _Slot, results: list[Any]) -> list[Finished]:
        """The end of a job whose result is among those that have come, or whose time is up."""
        running = slot.running
        if running is None:
            return []
        overtime = time.monotonic() - running.started - self._config.time_limit_s
        ready = running.result in results
        if not ready:
            if overtime < KILL_GRACE_S:
                return []
            # The driver may have been busy elsewhere for long.
            ready = bool(self._ray.wait([running.result], timeout=0)[0])
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
            node_lost = self._lost_its_node(slot.process)
            self._replace(slot)
            if not node_lost:
                running.waiting.tried.add(id(slot))
            return self._retry(running, error, node_lost=node_lost)
        return [self._end(running, outcome)]

    def _retry(self, running: _Running, error: Exception, *, node_lost: bool) -> list[Finished]:
        """A worker died: the job goes back to the head of the queue, or fails for good.

        A job may kill its worker; that a node went away is not its fault.
        """
        reason = gist(error)
        running.waiting.nodes_lost += node_lost
        own = running.waiting.attempts - running.waiting.nodes_lost
        if own <= self._config.retries:
            pause = min(MAX_PAUSE_S, 0.5 * 2**own) if own else 0.0
            running.waiting.not_before = time.monotonic() + pause
            logger.warning(
                "trial %d: its worker died (%s); it is tried again in %g s",
                running.waiting.job.trial_id,
                reason,
                pause,
                extra=about(running.waiting.job.trial_id),
            )
            self._queue.appendleft(running.waiting)
            return []
        sentence = f"its worker died {running.waiting.attempts} times: {reason}"
        return [self._end(running, Failure(sentence, "infrastructure", str(error)[-4000:]))]

    def _replace(self, slot: _Slot) -> None:
        if slot.process is not None:  # it went with its node otherwise
            self._ray.kill(slot.process.actor)
        slot.process = slot.successor or (self._start(slot) if slot.placed else None)
        slot.successor = None

    def _end(self, running: _Running, outcome: Evaluation | Stopped | Failure) -> Finished:
        waiting = running.waiting
        return ended(waiting.job, outcome, waiting.attempts, running.started, waiting.submitted)


def _node_of(ray: Any, slot: _Slot) -> str | None:
    """The id of the node where a slot is, if it has one."""
    nodes: dict[int, str] = ray.util.placement_group_table(slot.group)["bundles_to_node_id"]
    return nodes.get(0)
