"""Times networks with any command-line tool, as a configuration describes it (CommandConfig).

The clock is the tool's. Where it prints a mean and no samples, a sample is the mean of `runs`
inferences of one call, and the measurement says so: `inner_iterations` is `runs`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from latency.command_config import CommandConfig, JsonRule, RegexRule
from latency.device import LatencyMeter
from latency.fits import needed_bytes
from latency.host import check_memory
from latency.lock import device_lock, host_lock
from latency.measurement import Measurement
from latency.placeholders import fill_in
from latency.processes import Finished, run_to_end, temporary_folder
from latency.runs import graph_versions, input_shape, model_metrics
from latency.timing import FEWEST_SAMPLES, NOISY_SPREAD, interquartile_range
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, graph_hash
from space.errors import FailureCause, MeasurementError
from space.onnx_graph import onnx_model
from space.records import to_plain

_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}

#: Of one command that identifies the device or cleans up.
SHORT_LIMIT_S = 30.0


class CommandMeter(LatencyMeter):
    """Times networks with a command-line tool."""

    def __init__(self, config: CommandConfig) -> None:
        self._config = config
        self._identified: tuple[str, ...] | None = None

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter; `identified` is what the `identify` commands print, asked once."""
        config = self._config
        shown = (
            "name", "kind", "run", "convert", "parse", "env", "threads", "precision", "batch",
            "runs", "warmup", "invocations", "model_format",
        )  # fmt: skip
        return {
            **{name: to_plain(getattr(config, name)) for name in shown},
            "identified": list(self.identify()),
        }

    def identify(self) -> tuple[str, ...]:
        """Return what the `identify` commands print.

        Raises:
            MeasurementError: One of them fails.
        """
        if self._identified is None:
            values = {"threads": str(self._config.threads), "address": self._config.address or ""}
            self._identified = tuple(
                self._call("identify", fill_in(command, values), SHORT_LIMIT_S).output.strip()
                for command in self._config.identify
            )
        return self._identified

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter."""
        config = self._config
        memory = psutil.virtual_memory()
        check_memory(needed_bytes(architecture, 0), (memory.total, memory.available))
        device = self.identity()
        model: bytes = onnx_model(architecture, style).SerializeToString()
        environment: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hostname": socket.gethostname(),
            **graph_versions(),
            "clock": "the tool's own",
            "sample": _meaning(config),
        }
        # Two profiles of one phone are one device; a tool on this host shares its cores with us.
        lock = f"command-{config.address or config.name}"
        patience_s = config.lock_timeout_s
        with (
            device_lock(lock, f"on {config.name}", patience_s),
            host_lock(patience_s) if config.shares_cores else contextlib.nullcontext(),
            self._ready(architecture, model, environment) as job,
        ):
            attempts = self._attempts(job)
        spreads = [interquartile_range(a) / float(np.median(a)) for a in attempts]
        best = attempts[int(np.argmin(spreads))]
        return Measurement(
            samples_ms=best,
            inner_iterations=config.runs if config.parse.each == "mean" else 1,
            warmup_runs=config.warmup,
            attempts=len(attempts),
            graph_hash=graph_hash(architecture, style),
            device=device,
            environment={**environment, "spreads": spreads},
            metrics=model_metrics(len(model)),
        )

    @contextlib.contextmanager
    def _ready(
        self, architecture: Architecture, model: bytes, environment: dict[str, Any]
    ) -> Iterator[_Job]:
        """The model converted and on the device; cleaned up afterwards, whatever happened."""
        config = self._config
        with temporary_folder() as folder:
            job = _Job(config, architecture, str(folder))
            Path(job.values["model"]).write_bytes(model)
            try:
                for key in ("convert", "push"):
                    for command in getattr(config, key):
                        self._call(key, fill_in(command, job.values), job.left_s())
                yield job
            finally:
                complaints = self._clean_up(job)
                if complaints:
                    environment["cleanup"] = complaints

    def _attempts(self, job: _Job) -> list[tuple[float, ...]]:
        """Samples in ms of every attempt; at least one, the last one quiet if any is."""
        attempts: list[tuple[float, ...]] = []
        while len(attempts) < self._config.attempts:
            try:
                samples = self._attempt(job)
            except _TimeIsUp:
                if not attempts:
                    raise
                break
            attempts.append(samples)
            if interquartile_range(samples) <= NOISY_SPREAD * float(np.median(samples)):
                break
        return attempts

    def _attempt(self, job: _Job) -> tuple[float, ...]:
        config = self._config
        samples: list[float] = []
        for _ in range(config.invocations):
            values = job.next_call()
            finished = self._call("run", fill_in(config.run, values), job.left_s())
            if config.fetch is not None:
                finished = self._call("fetch", fill_in(config.fetch, values), job.left_s())
            samples += self._times_ms(finished)
        if len(samples) < FEWEST_SAMPLES:
            raise MeasurementError(
                f"{config.name}: at least {FEWEST_SAMPLES} times are needed to tell the spread,"
                f" but the tool printed {len(samples)}; raise runs or invocations"
            )
        return tuple(samples)

    def _times_ms(self, finished: Finished) -> list[float]:
        config = self._config
        try:
            values = times(config, finished)
        except ValueError as error:
            raise MeasurementError(
                f"{config.name}: what the tool printed is not as `parse` says: {error}",
                cause=self._cause(finished),
            ) from None
        return [value * _MS[config.parse.unit] for value in values]

    def _call(self, key: str, argv: Sequence[str], timeout_s: float) -> Finished:
        """Run a command that must succeed."""
        config = self._config
        try:
            finished = run_to_end(
                argv, timeout_s=timeout_s, env=config.env, to_the_end=key == "cleanup"
            )
        except OSError as error:
            raise MeasurementError(
                f"{config.name}: {key} needs the program {argv[0]!r}, which cannot be started:"
                f" {error.strerror or error}"
            ) from error
        if finished.ending == "time":
            limit = f"time_limit_s ({config.time_limit_s:g} s)"
            if key in ("identify", "cleanup"):
                limit = f"{SHORT_LIMIT_S:g} s"
            raise _TimeIsUp(f"{config.name}: {key} did not end within {limit} and was killed")
        if finished.ending == "output":
            raise MeasurementError(f"{config.name}: {key} printed without end and was killed")
        if finished.status != 0:
            said = finished.errors.strip() or finished.output.strip()
            last_words = said.splitlines()[-1][:300] if said else "nothing printed"
            raise MeasurementError(
                f"{config.name}: {key} failed with status {finished.status}: {last_words}",
                cause=self._cause(finished),
            )
        return finished

    def _cause(self, finished: Finished) -> FailureCause:
        pattern = self._config.rejects
        said = f"{finished.output}\n{finished.errors}"
        if pattern is not None and re.search(pattern, said, re.MULTILINE):
            return "architecture"
        return "infrastructure"

    def _clean_up(self, job: _Job) -> str:
        """Run all cleanup commands; return what went wrong, if anything."""
        complaints = []
        for command in self._config.cleanup:
            try:
                self._call("cleanup", fill_in(command, job.values), SHORT_LIMIT_S)
            except MeasurementError as error:
                complaints.append(str(error))
        return "; ".join(complaints)


class _TimeIsUp(MeasurementError):
    """A command was killed at its time limit."""


class _Job:
    """What the placeholders stand for in one measurement, and its time."""

    def __init__(self, config: CommandConfig, architecture: Architecture, folder: str) -> None:
        name = f"mnas-{uuid.uuid4().hex[:12]}"
        shape = input_shape(architecture, config.batch)
        self._deadline = time.monotonic() + config.time_limit_s
        self._calls = 0
        self.values = {
            "model": str(Path(folder) / f"{name}.onnx"),
            "folder": folder,
            "id": name,
            "threads": str(config.threads),
            "runs": str(config.runs),
            "warmup": str(config.warmup),
            "batch": str(config.batch),
            "input_shape": ",".join(map(str, shape)),
            "address": config.address or "",
        }
        if config.converted is not None:
            self.values["converted"] = fill_in([config.converted], self.values)[0]
        if config.remote_folder is not None:
            suffix = Path(self.values.get("converted", self.values["model"])).suffix
            place = config.remote_folder.rstrip("/")
            self.values["remote_model"] = f"{place}/{name}{suffix}"
            self.values["remote_result"] = f"{place}/{name}-0.txt"

    def next_call(self) -> dict[str, str]:
        """The values for the next call of `run`: every call has a result file of its own."""
        self._calls += 1
        values = dict(self.values)
        if "remote_result" in values:
            stem = values["remote_result"].removesuffix("-0.txt")
            values["remote_result"] = f"{stem}-{self._calls}.txt"
        return values

    def left_s(self) -> float:
        """Seconds until the measurement's time limit."""
        return max(0.0, self._deadline - time.monotonic())


def _meaning(config: CommandConfig) -> str:
    if config.parse.each == "mean":
        return f"mean of the {config.runs} inferences of one call of the tool"
    return "one inference"


# ---------------------------------------------------------------------------- parsing


def times(config: CommandConfig, finished: Finished) -> list[float]:
    """Return the times in what a tool printed, in the rule's unit; at least one, all > 0.

    Raises:
        ValueError: There are none, or they are not as the rule says.
    """
    rule = config.parse
    if isinstance(rule, JsonRule):
        values = _json_times(rule, finished.output)
    else:
        values = _regex_times(rule, finished, config.runs)
    wrong = [value for value in values if not 0 < value < math.inf]
    if wrong:
        raise ValueError(f"times must be > 0, but it has {wrong[0]!r}")
    if not values:
        raise ValueError(f"it has no time in {finished.output[-200:]!r}")
    return values


def _json_times(rule: JsonRule, text: str) -> list[float]:
    try:
        found: list[Any] = [json.loads(text)]
    except ValueError:
        raise ValueError(f"it is not one JSON document: {text[-200:]!r}") from None
    for key in rule.path.split("."):
        found = [inner for value in found for inner in _step(value, key, rule.path)]
    wrong = [v for v in found if isinstance(v, bool) or not isinstance(v, (int, float))]
    if wrong:
        raise ValueError(f"{rule.path} must lead to numbers, but leads to {wrong[0]!r}")
    return [float(value) for value in found]


def _step(value: Any, key: str, path: str) -> list[Any]:
    if isinstance(value, list) and key == "*":
        return value
    try:
        return [value[int(key)] if isinstance(value, list) else value[key]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"{path} leads nowhere at {key!r}") from None


def _regex_times(rule: RegexRule, finished: Finished, runs: int) -> list[float]:
    text = {
        "stdout": finished.output,
        "stderr": finished.errors,
        "both": f"{finished.output}\n{finished.errors}",
    }[rule.stream]
    values = []
    for match in re.finditer(rule.pattern, text, re.MULTILINE):
        groups = match.groupdict()
        made = groups.get("runs")
        if made is not None and int(made) != runs:
            raise ValueError(f"it was asked for {runs} runs, but made {made}")
        values.append(float(groups["value"]))
    return values
