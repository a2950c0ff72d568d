"""Trials on Ray workers: one machine's, or a cluster's whose nodes come and go.

A *slot* is a placement group with the CPUs of one worker. The worker is an actor in the slot, one
MindSpore process; it is replaced after `trials_per_process` trials or above `max_memory_mb`, and
its successor is started and warmed up in the same slot one trial ahead.

A worker that dies takes only its own job with it: the job is tried again, on another node or at
least in another slot where there is one, `retries` times, and then fails. So is a job that failed
by the machine's fault; one whose failure may be the machine's or the network's is tried once more.
A network that killed every worker it was given to is quarantined.

When a node dies, Ray looks for another place for its slots; those that find none wait for a node
to come. Where the number of workers is left to the cluster, a new node's CPUs become new slots. A
slot whose processes die before they are ready is tried again at growing intervals.
"""

from __future__ import annotations

import collections
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from search.campaign_log import about
from search.evaluation import Evaluation
from search.executor import Executor, Finished, Job, Stopped, ended
from search.ray_cluster import connect, gist
from search.ray_worker import Worker
from search.trial import Failure
from space.errors import ConfigError, MnasError

if TYPE_CHECKING:
    from search.config import EvaluatorChoice, RayConfig

logger = logging.getLogger(__name__)

#: A worker gets so long beyond the time limit to end a trial by itself before it is killed.
KILL_GRACE_S = 15.0
#: A worker that is not ready after so long is replaced.
START_LIMIT_S = 180.0
#: The pause before a job is tried again, or a worker that died at its start is replaced: 1 s,
#: doubled each time, up to this.
MAX_PAUSE_S = 60.0
#: So many workers that die before any one was ever ready end the campaign.
MAX_FAILED_STARTS = 3
#: Ray has so long to find a place for the workers at the start.
PLACE_LIMIT_S = 60.0
#: How often the cluster is asked which nodes it has.
FOLLOW_S = 5.0
#: A cluster that has had no place for any worker, or none that became ready, for so long ends the
#: search.
NO_WORKER_LIMIT_S = 600.0


class _Process:
    """A worker process as the driver sees it."""

    def __init__(self, actor: Any, warm: Any, node: str) -> None:
        self.actor = actor
        self.warm = warm
        self.node = node
        self.warm_since = time.monotonic()
        self.ready = False
        self.trials = 0
        self.memory_mb = 0.0
        self.growth_mb = 0.0  # by its last trial

    def grown_to(self, memory_mb: float) -> None:
        """Note its memory after a trial."""
        self.growth_mb = memory_mb - self.memory_mb
        self.memory_mb = memory_mb


class _Slot:
    """The CPUs of one worker: its process, the successor, the job that runs."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.node: str | None = None  # the id of the cluster's node that has a place for it
        self.place: tuple[str, int] | None = None  # its node, and which cores it has there
        self.process: _Process | None = None
        self.successor: _Process | None = None
        self.running: _Running | None = None
        self.failed_starts = 0  # in a row, its successors' too
        self.not_before = 0.0  # is the next process started

    @property
    def is_able(self) -> bool:
        """Whether a job may wait for it: it has a process, or one starts as far as is known."""
        return not self.failed_starts or (self.process is not None and self.process.ready)


class _Running:
    """A job on a worker."""

    def __init__(self, waiting: _Waiting, result: Any, node: str) -> None:
        self.waiting = waiting
        self.result = result
        self.node = node
        self.started = time.monotonic()


class _Waiting:
    """A job in the queue."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.submitted = time.monotonic()
        self.attempts = 0
        self.nodes_lost = 0  # while it ran there
        self.workers_killed = 0  # by it, for all that is known
        self.doubtful = 0  # failures that may be the network's fault
        self.not_before = self.submitted
        # Where it failed by what may be their fault: slots, by id(), and nodes.
        self.tried_slots: set[int] = set()
        self.tried_nodes: set[str | None] = set()


class RayExecutor(Executor):
    """Evaluates in Ray workers; see the module.

    Args:
        config: Workers, threads, limits.
        evaluator: Built anew in every worker.

    Raises:
        ConfigError: The cluster cannot be reached or has not the CPUs asked for.
        MnasError: Another job holds them.
    """

    def __init__(self, config: RayConfig, evaluator: EvaluatorChoice) -> None:
        self._config = config
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._start_failure = ""  # of the worker that died last before it was ready
        self._any_ready = False
        self._ray = connect(config)
        self._actor_class = self._ray.remote(Worker)
        self._followed = self._last_able = time.monotonic()
        self._slots = self._reserve()
        self._evaluator_ref = self._ray.put(evaluator)
        self._look()

    @property
    def capacity(self) -> int:
        """The number of workers that have a node."""
        return sum(slot.node is not None for slot in self._slots)

    def submit(self, job: Job) -> None:
        """Queue a job; it starts as soon as a worker is ready."""
        self._queue.append(_Waiting(job))
        self._dispatch()

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return the jobs that ended; start queued ones on the workers that came free."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_starts()
            self._follow()
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
            self._check_starts()
            self._follow()
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
        while sum(self._node_of(group) is not None for group in groups) < enough:
            if time.monotonic() > deadline:
                self._ray.shutdown()
                raise MnasError(
                    f"executor.workers: Ray did not give {wanted} workers their CPUs within"
                    f" {PLACE_LIMIT_S:.0f} s; another job may hold them."
                )
            time.sleep(0.1)
        return [_Slot(group) for group in groups]

    def _node_of(self, group: Any) -> str | None:
        """The id of the node where a placement group is, if it has one."""
        found = self._ray.util.placement_group_table(group)
        nodes: dict[int, str] = found["bundles_to_node_id"]
        return nodes[0] if found["state"] == "CREATED" else None

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
        if now - self._followed >= 2 * FOLLOW_S:
            self._last_able = now  # nobody has looked for a while: devices were measuring
        if now - self._followed >= FOLLOW_S:
            self._followed = now
            self._look()
        if any(process.ready for process in self._processes()):
            self._last_able = now
        elif now - self._last_able > NO_WORKER_LIMIT_S:
            why = f"; the last one died at its start: {self._start_failure}"
            raise MnasError(
                f"executor: Ray's cluster has had no worker of {self._asked()} for"
                f" {NO_WORKER_LIMIT_S:.0f} s{why if self._start_failure else ''}; resume the"
                " campaign when its nodes are back."
            )

    def _look(self) -> None:
        """Find out which slots have a node; make slots of what new nodes offer."""
        if self._config.workers is None:
            room = sum(self._room(node) for node in self._alive())
            for _ in range(room - len(self._slots)):
                self._slots.append(_Slot(self._group()))
        for slot in self._slots:
            self._place(slot, self._node_of(slot.group))

    def _place(self, slot: _Slot, node: str | None) -> None:
        """Note a slot's node, if it has one; a job whose node is gone ends by Ray's error."""
        if slot.node is not None and node is None:
            logger.warning("a node of the cluster is gone; a worker waits for another one")
        if node != slot.node:
            slot.failed_starts, slot.not_before = 0, 0.0
        slot.node = node
        if slot.running is not None:
            return
        slot.process = self._still_there(slot, slot.process) or self._start(slot)
        slot.successor = self._still_there(slot, slot.successor)

    def _still_there(self, slot: _Slot, process: _Process | None) -> _Process | None:
        """A process, if it is on the node that its slot has now."""
        if process is None or process.node == slot.node:
            return process
        self._ray.kill(process.actor)
        return None

    def _start(self, slot: _Slot) -> _Process | None:
        """A new process in a slot, unless it has no node or has to wait."""
        if slot.node is None or time.monotonic() < slot.not_before:
            return None
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
        ).remote(
            self._evaluator_ref,
            self._config.threads,
            self._place_on(slot.node, slot) if self._config.pin else None,
        )
        return _Process(actor, actor.warm_up.remote(), slot.node)

    def _place_on(self, node: str, slot: _Slot) -> int:
        """The how manieth of its node's workers a slot is."""
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
            slot.process = self._checked(slot, slot.process or self._start(slot))
            slot.successor = self._checked(slot, slot.successor)

    def _checked(self, slot: _Slot, process: _Process | None) -> _Process | None:
        """The process itself, a new one in its place, or none for a while."""
        if process is None or process.ready or not self._start_ended(process):
            return process
        reason = self._why_not_ready(process)
        if reason is None:
            process.ready = self._any_ready = True
            slot.failed_starts = 0
            return process
        self._ray.kill(process.actor)
        if self._is_gone(process.node):
            return self._start(slot)
        self._start_failure = str(reason)
        pause = _pause_s(slot.failed_starts)
        slot.failed_starts += 1
        slot.not_before = time.monotonic() + pause
        if not self._any_ready and all(s.failed_starts for s in self._slots if s.node):
            self._give_up(reason)
        logger.warning("a worker died at its start; another one starts in %g s: %s", pause, reason)
        return None

    def _give_up(self, reason: str | ConfigError) -> None:
        """End the campaign if it looks as if no worker could ever start anywhere."""
        if isinstance(reason, ConfigError):
            raise reason from None
        failed = sum(slot.failed_starts for slot in self._slots)
        if failed >= MAX_FAILED_STARTS:
            raise MnasError(f"executor: {failed} workers in a row died at their start: {reason}")

    def _is_gone(self, node: str) -> bool:
        """Whether a node has left the cluster: a process's death is then no wonder."""
        return node not in {each["NodeID"] for each in self._alive()}

    def _start_ended(self, process: _Process) -> bool:
        ready, _ = self._ray.wait([process.warm], timeout=0)
        return bool(ready) or time.monotonic() - process.warm_since > START_LIMIT_S

    def _why_not_ready(self, process: _Process) -> str | ConfigError | None:
        """Why the start of a process failed, or its evaluator's refusal; None if it is ready."""
        try:
            process.memory_mb = self._ray.get(process.warm, timeout=0.1)
        except self._ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, ConfigError) else str(error.cause)
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
            slot.running = _Running(waiting, result, process.node)
            if self._nears_its_end(process) and slot.successor is None:
                slot.successor = self._start(slot)

    def _nears_its_end(self, process: _Process) -> bool:
        """Whether the trial that a process was given is likely its last."""
        return (
            process.trials >= self._config.trials_per_process
            or process.memory_mb + process.growth_mb > self._config.max_memory_mb
        )

    def _next_for(self, slot: _Slot) -> _Waiting | None:
        """Take the first job from the queue that this slot may have now.

        A job that failed by what may be a node's fault waits a while, and is then left to a worker
        of another node, or else in another slot, where there is one.
        """
        now = time.monotonic()
        for waiting in self._queue:
            if now < waiting.not_before:
                continue
            # Nearly always nothing has failed, and any slot will do.
            if not waiting.tried_slots or slot in self._fit_for(waiting):
                self._queue.remove(waiting)
                return waiting
        return None

    def _fit_for(self, waiting: _Waiting) -> list[_Slot]:
        """The slots, busy or not, that a job is left to."""
        able = [slot for slot in self._slots if slot.node and slot.is_able]
        elsewhere = [slot for slot in able if slot.node not in waiting.tried_nodes]
        others = [slot for slot in able if id(slot) not in waiting.tried_slots]
        return elsewhere or others or able

    def _recycle(self, slot: _Slot) -> None:
        """Replace an idle process that has done its share."""
        process = slot.process
        if process is None:
            return
        worn = (
            process.trials >= self._config.trials_per_process
            or process.memory_mb > self._config.max_memory_mb
        )
        if worn and process.trials:  # a limit that none can keep still gets a trial from each
            self._replace(slot)

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
            # It was to end by itself before: a network that is slow, or an NPU that hangs.
            limit = f"time limit of {self._config.time_limit_s:g} s reached"
            failure = Failure(f"{limit}; the worker was killed", "architecture", confirmed=False)
            return self._failed(slot, running, failure)
        try:
            outcome, memory_mb = self._ray.get(running.result)
        except self._ray.exceptions.RayError as error:
            return self._worker_died(slot, running, error)
        slot.process.grown_to(memory_mb)
        if not isinstance(outcome, Failure):
            return [self._end(running, outcome)]
        if outcome.cause == "infrastructure" or not outcome.confirmed:
            self._replace(slot)  # something is wrong with it
        return self._failed(slot, running, outcome)

    def _worker_died(self, slot: _Slot, running: _Running, error: Exception) -> list[Finished]:
        """A job may have killed its worker; that a node went away is not its fault."""
        waiting = running.waiting
        gone = self._is_gone(running.node)
        waiting.nodes_lost += gone
        waiting.workers_killed += not gone
        self._replace(slot)
        if waiting.attempts - waiting.nodes_lost <= self._config.retries:
            if not gone:
                self._avoid(waiting, slot, running.node)
            return self._again(waiting, f"its worker died ({gist(error)})")
        failure = Failure(
            f"its worker died {waiting.workers_killed} times: {gist(error)}",
            "infrastructure",
            str(error)[-4000:],
            quarantined=waiting.workers_killed > max(1, self._config.retries),
        )
        return [self._end(running, failure)]

    def _failed(self, slot: _Slot, running: _Running, failure: Failure) -> list[Finished]:
        """A failure that is not surely the network's is looked at again, elsewhere."""
        waiting = running.waiting
        waiting.doubtful += not failure.confirmed
        # Once more is enough for what may be the network's own fault.
        sure = failure.cause == "architecture" and (failure.confirmed or waiting.doubtful > 1)
        if sure or waiting.attempts - waiting.nodes_lost > self._config.retries:
            confirmed = failure.confirmed or waiting.doubtful > 1
            return [self._end(running, replace(failure, confirmed=confirmed))]
        self._avoid(waiting, slot, running.node)
        return self._again(waiting, f"it failed ({failure.reason})")

    def _avoid(self, waiting: _Waiting, slot: _Slot, node: str) -> None:
        """Note where a job has failed by what may be the machine's fault."""
        waiting.tried_slots.add(id(slot))
        waiting.tried_nodes.add(node)

    def _again(self, waiting: _Waiting, reason: str) -> list[Finished]:
        """Put a job back at the head of the queue."""
        own = waiting.attempts - waiting.nodes_lost
        pause = _pause_s(own - 1) if own else 0.0
        waiting.not_before = time.monotonic() + pause
        logger.warning(
            "trial %d: %s; it is tried again in %g s",
            waiting.job.trial_id,
            reason,
            pause,
            extra=about(waiting.job.trial_id),
        )
        self._queue.appendleft(waiting)
        return []

    def _replace(self, slot: _Slot) -> None:
        if slot.process is not None:  # it went with its node otherwise
            self._ray.kill(slot.process.actor)
        slot.process = self._still_there(slot, slot.successor) or self._start(slot)
        slot.successor = None

    def _end(self, running: _Running, outcome: Evaluation | Stopped | Failure) -> Finished:
        waiting = running.waiting
        return ended(waiting.job, outcome, waiting.attempts, running.started, waiting.submitted)


def _pause_s(failures: int) -> float:
    """The pause after a failure that so many came before."""
    return float(min(MAX_PAUSE_S, 2.0**failures))
