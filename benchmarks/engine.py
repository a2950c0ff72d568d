"""What the engine itself costs: trials per second, memory, database, with an instant evaluator.

    python benchmarks/engine.py [--trials 20000] [--ray-trials 2000] [--use-trials 160]
    python benchmarks/engine.py --trials 0 --ray-trials 0 --use-trials 0 --children 0 --rows 0

Every trial is committed on its own. Serial: the whole campaign in this process, the random
controller. Ray: the same through Ray workers, beside bare Ray: actor calls of the same function at
the same concurrency that record nothing, the two taking turns in one run. Children: real trainings
by one worker and by two, free to roam and kept to a core each. Watched: how large the write-ahead
file grows while `mnas status --watch` reads. Rows: what a large campaign's reader waits for; its
rows are copies of a small campaign's, with rewards of their own.
"""

from __future__ import annotations

import argparse
import collections
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from search import campaign as folders
from search.async_loop import make_search
from search.config import CampaignConfig, RayConfig, campaign_config, load_campaign_config
from search.engine import Silent
from search.executor import Job
from search.parts import Parts
from search.trial import Trial
from space.architecture import parse_architecture
from space.search_space import load_space

BATCH = 16


def config(trials: int, executor: dict[str, Any], **changes: Any) -> CampaignConfig:
    """A campaign of the paper's space with the synthetic evaluator, which only computes."""
    return campaign_config(
        {
            "name": "engine",
            "space": {"name": "mnasnet"},
            "controller": {"name": "random"},
            "evaluator": {"name": "synthetic", **changes.pop("evaluator", {})},
            "objective": {"target_ms": 75.0},
            "executor": executor,
            "stop": {"trials": trials},
            "batch_size": BATCH,
            **changes,
        },
        where="benchmarks/engine.py",
        folder=Path("."),
    )


class Clock(Silent):
    """Notes when a trial was done and how much memory the process had."""

    def __init__(self) -> None:
        self.done = 0
        self.times: list[float] = [time.perf_counter()]
        self.memory_mb: dict[int, float] = {}

    def trial(self, trial: Trial) -> None:
        """Count it."""
        self.done += 1
        if self.done % 1000 == 0:
            self.times.append(time.perf_counter())
            self.memory_mb[self.done] = psutil.Process().memory_info().rss / 2**20

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Ignore it."""


def campaign_seconds(made: CampaignConfig, watcher: Silent) -> tuple[float, int]:
    """Run a search; return its seconds and the bytes of its database."""
    parts = Parts(made)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "campaign"
        with folders.create(path, made) as campaign:
            started = time.perf_counter()
            make_search(campaign, parts, watcher).run()
            seconds = time.perf_counter() - started
        return seconds, (path / "campaign.db").stat().st_size


def serial(trials: int) -> None:
    """Print what a serial campaign costs."""
    clock = Clock()
    seconds, size = campaign_seconds(config(trials, {"name": "serial"}), clock)
    laps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    rates = sorted(1000 / lap for lap in laps)
    print(f"serial, {trials:,} trials in {seconds:.1f} s")
    print(
        f"  {statistics.median(rates):8.0f} trials/s, median of thousands"
        f" [{rates[0]:.0f}, {rates[-1]:.0f}]"
    )
    print(f"  {size / trials:8.0f} bytes of campaign.db per trial")
    first, last = clock.memory_mb[1000], clock.memory_mb[max(clock.memory_mb)]
    print(
        f"  {100 * (last / first - 1):+8.1f} % memory from trial 1,000 ({first:.0f} MB) to"
        f" {max(clock.memory_mb):,} ({last:.0f} MB)"
    )


class Bare:
    """A bare Ray actor that does what a worker does with a job, and no more."""

    def __init__(self) -> None:
        from search.config import SyntheticEvaluatorConfig
        from search.evaluation import SyntheticEvaluator

        self.evaluator = SyntheticEvaluator(SyntheticEvaluatorConfig("synthetic"))

    def run(self, text: str, seed: int) -> object:
        """Evaluate a network."""
        return self.evaluator.evaluate(parse_architecture(text), seed=seed, time_limit_s=60)


def bare_rates(trials: int, workers: int, rounds: int) -> list[float]:
    """Actor calls per second of bare Ray with one call in flight per worker."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        actors = [ray.remote(Bare).options(num_cpus=1).remote() for _ in range(workers)]
        space, rng = load_space("mnasnet"), np.random.default_rng(1)
        texts = [space.decode(space.sample(rng)).text for _ in range(trials)]
        ray.get([actor.run.remote(texts[0], 0) for actor in actors])
        rates = []
        for _ in range(rounds):
            queue = collections.deque(texts)
            started = time.perf_counter()
            running = {a.run.remote(queue.popleft(), 0): a for a in actors}
            while running:
                done, _ = ray.wait(list(running))
                for ref in done:
                    actor = running.pop(ref)
                    ray.get(ref)
                    if queue:
                        running[actor.run.remote(queue.popleft(), 0)] = actor
            rates.append(trials / (time.perf_counter() - started))
        return rates
    finally:
        ray.shutdown()


class Laps(Silent):
    """Times a Ray campaign from its first result, so that Ray's start is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def trial(self, trial: Trial) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def through_ray(trials: int, workers: int, rounds: int) -> None:
    """Print how the Ray executor compares with bare Ray."""
    ours, bare = [], []
    executor = {"name": "ray", "workers": workers, "trials_per_process": 10**9}
    for _ in range(rounds):
        laps = Laps()
        campaign_seconds(config(trials, executor), laps)
        ours.append((trials - 1) / (laps.times[-1] - laps.times[0]))
        bare += bare_rates(trials, workers, 1)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"Ray, {workers} workers, {trials:,} trials, {rounds} rounds in turn")
    print(f"  {statistics.median(ours):8.0f} trials/s, each committed")
    print(f"  {statistics.median(bare):8.0f} bare actor calls/s")
    print(f"  {statistics.median(ratios):8.2f} of bare Ray [{min(ratios):.2f}, {max(ratios):.2f}]")


class Spans(Silent):
    """Notes from when to when each trial was trained, in seconds since the epoch."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def trial(self, trial: Trial) -> None:
        """Note it."""
        if trial.timings and trial.finished_at:
            self.spans.append((trial.finished_at - trial.timings["train_s"], trial.finished_at))


def use_of_workers(trials: int, workers: int) -> None:
    """Print the share of the time that simulated workers have something to do, in both modes.

    The window is from the moment when every worker had its first child to the start of the last
    child: at the end of a search there is nothing left to give.
    """
    from ray.cluster_utils import Cluster

    print(f"use of {workers} simulated workers, {trials} trials of 0.5 to 4 s")
    for mode in ("async", "sync"):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": workers})
        try:
            made = config(
                trials,
                {
                    "name": "ray",
                    "workers": workers,
                    "address": cluster.address,
                    "trials_per_process": 10**9,
                },
                mode=mode,
                evaluator={"seconds": 0.5, "slowest_seconds": 4.0},
            )
            watcher = Spans()
            campaign_seconds(made, watcher)
        finally:
            cluster.shutdown()
        starts = sorted(start for start, _ in watcher.spans)
        low, high = starts[workers - 1], starts[-1]
        busy = sum(max(0.0, min(b, high) - max(a, low)) for a, b in watcher.spans)
        print(f"  {100 * busy / (workers * (high - low)):8.1f} % {mode}")


def real_children(children: int, rounds: int) -> None:
    """Print how many children of the digits campaign two workers train beside what one does."""
    from search.ray_executor import RayExecutor

    evaluator = load_campaign_config("digits", ["evaluator.recipe.epochs=1"]).evaluator
    space, rng = (
        load_space("small_image", resolution=16, input_channels=1),
        np.random.default_rng(0),
    )
    networks = [space.decode(space.sample(rng)) for _ in range(children)]
    rates: dict[tuple[int, bool], list[float]] = collections.defaultdict(list)
    cores: dict[tuple[int, bool], list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        for workers, pin in ((1, False), (2, False), (1, True), (2, True)):
            settings = RayConfig("ray", workers, pin=pin, trials_per_process=10**9)
            executor = RayExecutor(settings, evaluator)
            try:
                executor.quiesce()
                before, started = _cpu_s(), time.perf_counter()
                for index, network in enumerate(networks):
                    executor.submit(Job(index, network, index))
                done = 0
                while done < children:
                    done += len(executor.wait(timeout_s=1.0))
                seconds = time.perf_counter() - started
                rates[workers, pin].append(60 * children / seconds)
                told = f"  {children} children in {seconds:.0f} s: {workers} workers, {pin=}"
                print(told, file=sys.stderr, flush=True)
                cores[workers, pin].append((_cpu_s() - before) / seconds)
            finally:
                executor.close()
    print(f"real children, one epoch of digits, {children} at a time, {rounds} rounds in turn")
    for pin in (False, True):
        ratios = [b / a for a, b in zip(rates[1, pin], rates[2, pin], strict=True)]
        for workers in (1, 2):
            print(
                f"  {statistics.median(rates[workers, pin]):8.1f} a minute, {workers} workers of 1"
                f" thread{', pinned' if pin else ''};"
                f" {statistics.median(cores[workers, pin]):.2f} cores busy"
            )
        print(
            f"  {statistics.median(ratios):8.2f} times one worker's"
            f" [{min(ratios):.2f}, {max(ratios):.2f}]"
        )


def _cpu_s() -> float:
    """CPU time of this process's workers and their helpers so far, in seconds."""
    times = [p.cpu_times() for p in psutil.process_iter() if p.name().startswith("ray::Worker")]
    return sum(t.user + t.system for t in times)


def large_campaign(rows: int) -> None:
    """Print how long status, top, resume and report take on a campaign of so many trials."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "campaign"
        with folders.create(path, config(1008, {"name": "serial"})) as campaign:
            make_search(campaign, Parts(campaign.config), Silent()).run()
        _copy_rows(path / "campaign.db", rows)
        print(f"a campaign of {rows:,} trials")
        commands = {
            "status": ["status", str(path)],
            "top": ["top", str(path)],
            "report": ["report", str(path)],
        }
        for name, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "search", *arguments],
                check=True, stdout=subprocess.DEVNULL, timeout=600,
            )  # fmt: skip
            print(f"  {time.perf_counter() - started:8.2f} s {name}")
        started = time.perf_counter()
        wanted = folders.resumed_config(path, [f"stop.trials={rows + 16}"])
        with folders.continue_with(path, wanted) as campaign:
            make_search(campaign, Parts(wanted), Silent()).run()
        print(f"  {time.perf_counter() - started:8.2f} s resume, with 16 trials more")
        print(f"  {(path / 'report.html').stat().st_size / 1e6:8.1f} MB report.html")


def _copy_rows(database: Path, rows: int) -> None:
    """Fill a campaign's database up with copies of its trials and updates."""
    db = sqlite3.connect(database)
    (done,) = db.execute("SELECT count(*) FROM trial").fetchone()
    columns = [row[1] for row in db.execute("PRAGMA table_info(trial)")]
    changed = {
        "id": "trial.id + ?1", "batch": "batch + ?1 / 16", "proposal_id": "proposal_id + ?1",
        "reward": "reward * (0.9 + (trial.id * 7919 + ?1) % 1000 / 1e4)",
        "architecture_hash": "substr(architecture_hash, 1, 8) || printf('%08x', ?1)",
    }  # fmt: skip
    values = ", ".join(changed.get(name, name) for name in columns)
    copy = f"INSERT INTO trial SELECT {values} FROM trial WHERE id < {done} AND id + ?1 < {rows}"
    for start in range(done, rows, done):
        db.execute(copy, (start,))
        db.execute(
            "INSERT INTO batch_update SELECT batch + ?1, (SELECT json_group_array(value + ?2)"
            f" FROM json_each(trial_ids)), diagnostics, created_at FROM batch_update"
            f" WHERE batch < {done // 16} AND batch + ?1 < {rows} / 16",
            (start // 16, start),
        )
    db.execute(f"UPDATE snapshot SET batch = {rows} / 16 - 1")
    db.commit()
    db.close()


class LargestLog(Silent):
    """Notes the largest size of a database's write-ahead file."""

    def __init__(self, database: Path) -> None:
        self.log = database.with_name(f"{database.name}-wal")
        self.size = 0

    def trial(self, trial: Trial) -> None:
        """Look at it."""
        self.size = max(self.size, self.log.stat().st_size)


def watched_campaign(trials: int) -> None:
    """Print how large the write-ahead file grows while `mnas status --watch` reads."""
    # Slow enough that the reader looks many times.
    made = config(trials, {"name": "serial"}, evaluator={"seconds": 0.01})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "campaign"
        with folders.create(path, made) as campaign:
            reader = subprocess.Popen(
                [sys.executable, "-m", "search", "status", str(path), "--watch"],
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            log = LargestLog(path / "campaign.db")
            started = time.perf_counter()
            make_search(campaign, Parts(made), log).run()
            seconds = time.perf_counter() - started
            if reader.poll() is not None:
                raise RuntimeError("the reader ended before the campaign")
        reader.wait(timeout=60)
        print(f"watched: {trials:,} trials in {seconds:.1f} s, `mnas status --watch` beside them")
        print(f"  {log.size / 2**20:8.2f} MiB campaign.db-wal, the largest seen")
        print(f"  {(path / 'campaign.db').stat().st_size / 2**20:8.2f} MiB campaign.db in the end")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description="What the engine itself costs.")
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--ray-trials", type=int, default=2000)
    parser.add_argument("--use-trials", type=int, default=160)
    parser.add_argument("--children", type=int, default=8, help="real ones; 0 leaves them out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--watched-trials", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.trials:
        serial(args.trials)
    if args.use_trials:
        use_of_workers(args.use_trials, 8)
    if args.ray_trials:
        through_ray(args.ray_trials, args.workers, args.rounds)
    if args.children:
        real_children(args.children, args.rounds)
    if args.watched_trials:
        watched_campaign(args.watched_trials)
    if args.rows:
        large_campaign(args.rows)


if __name__ == "__main__":
    main()
