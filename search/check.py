"""What a campaign is about to do, what it lacks here, and what it will take, before it is run.

    look(config, folder)             what this machine has and lacks for it
    plan(config, folder, findings)   the campaign in figures
    check(config, ...)               networks tried (check_networks.py): times, memory, faults
    estimate(config, ...)            hours and money, from what is measured or stated

No campaign is created, and nothing is written.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from latency.checks import Finding, State, check_device
from latency.device import OnnxRuntimeConfig, PoolConfig
from retrain.config import Recipe
from retrain.data import class_names
from search.config import (
    CampaignConfig,
    PluginConfig,
    RayConfig,
    SyntheticEvaluatorConfig,
    TrainEvaluatorConfig,
)
from search.evaluation import make_evaluator
from search.extremes import extreme_network
from search.parts import Parts, campaign_space
from space.cost import count
from space.errors import ConfigError
from space.records import record

#: What a trial and a measurement take in campaign.db, in bytes: seen in a campaign of 2,000 trials
#: in the paper's space, and with a host's measurements of 2,300 bytes and their rows and indexes.
TRIAL_BYTES, MEASUREMENT_BYTES = 1150, 3000
#: The state of a training beside its weights: two values of the optimizer and an average of each.
STATE_COPIES = 4

Source = Literal["stated", "measured"]


@record
class Plan:
    """A campaign in figures.

    Attributes:
        size_log10: Of the number of token vectors.
        epochs: That a network is trained for: the fidelity.
        workers: Evaluations at once; None where a cluster decides.
        cpus: Of a worker; None: all of this machine.
        npus: Of a worker.
        trials: Proposals, at most.
        target: In words.
        folder: Where `mnas search` would write.
        free_bytes: Of the disk there.
        database_bytes: Of campaign.db in the end, an estimate.
        finalists_bytes: Of the finalists' weights, the state of the one that trains and the ONNX
            file, were they all the space's largest network.
    """

    name: str
    space: str
    size_log10: float
    decisions: int
    controller: str
    evaluator: str
    epochs: float | None
    workers: int | None
    cpus: int | None
    npus: int
    devices: tuple[str, ...]
    trials: int
    batch_size: int
    mode: str
    objective: str
    target: str
    folder: str
    free_bytes: int
    database_bytes: int
    finalists_bytes: int


@record
class Estimate:
    """What a campaign takes, at most: repeated networks take nothing.

    Attributes:
        seconds_per_child: Of a network's evaluation on one worker.
        seconds_per_measurement: On one device, mean.
        children: Networks evaluated.
        child_hours: Summed over the workers.
        accelerator_hours: Of NPUs, for the children and the full trainings; 0 without NPUs.
        measuring_hours: Latency, on all devices.
        retrain_hours: Full trainings of the best; None where they don't follow from a child's.
        search_hours: Wall time of the search.
        money: `price` times the worker hours: the workers' over the search's wall time, and the
            full trainings'.
    """

    seconds_per_child: float | None
    seconds_per_child_source: Source | None
    seconds_per_measurement: float | None
    seconds_per_measurement_source: Source | None
    children: int
    measurements: int
    workers: int | None
    child_hours: float | None
    accelerator_hours: float | None
    measuring_hours: float | None
    retrain_hours: float | None
    search_hours: float | None
    price: float | None
    money: float | None


# ---------------------------------------------------------------------------- plan


def look(config: CampaignConfig, folder: Path) -> list[Finding]:
    """Return what is here for a campaign; what `lacks` cannot be had. Nothing is measured."""
    there, free = _disk(folder)
    size = _database_bytes(config) + _finalists_bytes(config)
    state: State = "ok" if size < free else "lacks"
    return [
        *_data(config),
        *_devices(config),
        *_workers(config),
        Finding("disk", state, f"{size:,} of {free:,} bytes in {there}"),
        *_folder(folder),
    ]


def plan(config: CampaignConfig, folder: Path, findings: Sequence[Finding]) -> Plan:
    """Return what a campaign is about to do in `folder`, which is not made.

    Raises:
        ConfigError: `mnas search` would refuse the configuration on any machine.
    """
    parts = parts_here(config, findings)
    executor, objective = config.executor, config.objective
    target = f"{objective.target_ms:g} ms" if objective.target_ms is not None else ""
    if objective.target is not None:
        target = f"{objective.target.times:g} x the latency of {objective.target.reference}"
    return Plan(
        name=config.name,
        space=parts.space.name,
        size_log10=math.log10(parts.space.size),
        decisions=len(parts.space.decisions),
        controller=config.controller.name,
        evaluator=config.evaluator.name,
        epochs=_epochs(config, parts),
        workers=num_workers(config),
        cpus=executor.threads if isinstance(executor, RayConfig) else None,
        npus=executor.npus if isinstance(executor, RayConfig) else 0,
        devices=tuple(device.name for device in config.devices),
        trials=config.stop.trials,
        batch_size=config.batch_size,
        mode=config.mode,
        objective=objective.name,
        target=target,
        folder=str(folder),
        free_bytes=_disk(folder)[1],
        database_bytes=_database_bytes(config),
        finalists_bytes=_finalists_bytes(config),
    )


def _epochs(config: CampaignConfig, parts: Parts) -> float | None:
    if isinstance(config.evaluator, TrainEvaluatorConfig):
        return float(config.evaluator.recipe.epochs)
    return parts.epochs if parts.config.evaluator == config.evaluator else None


def _folder(folder: Path) -> Iterator[Finding]:
    """What stands in a new campaign's way."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        yield Finding("folder", "lacks", f"{folder} is taken; choose another one with --out")


def _disk(folder: Path) -> tuple[Path, int]:
    """The folder, or the nearest one above it that is there, and the bytes free in it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return there, shutil.disk_usage(there).free


def _database_bytes(config: CampaignConfig) -> int:
    return config.stop.trials * (TRIAL_BYTES + MEASUREMENT_BYTES * len(config.devices))


def _finalists_bytes(config: CampaignConfig) -> int:
    if config.retrain is None:
        return 0
    kept = config.retrain.recipe.checkpoints
    files = 1 + kept.keep_best + kept.keep_last
    largest = count(extreme_network(campaign_space(config), 1))
    weights = 4 * largest.parameters_with_statistics
    return weights * (config.retrain.top * files + STATE_COPIES + 1)


def lacks(findings: Sequence[Finding], name: str) -> bool:
    """Whether something is lacking: of this name, or a part of it, `name: part`."""
    return any(
        finding.state == "lacks" and (finding.name == name or finding.name.startswith(f"{name}: "))
        for finding in findings
    )


def can_evaluate(config: CampaignConfig, findings: Sequence[Finding]) -> bool:
    """Whether networks can be evaluated on this machine as a worker would: its data, its NPU."""
    needs_npu = isinstance(config.executor, RayConfig) and config.executor.npus > 0
    return not lacks(findings, "evaluator") and (not needs_npu or bool(_npus()))


def num_workers(config: CampaignConfig) -> int | None:
    """Return how many evaluations run at once; None where a cluster decides, or none fits here."""
    executor = config.executor
    if not isinstance(executor, RayConfig):
        return 1
    if executor.workers is not None or executor.address is not None:
        return executor.workers
    room = (os.cpu_count() or 1) // executor.threads
    return (min(room, len(_npus())) if executor.npus else room) or None


def _data(config: CampaignConfig) -> Iterator[Finding]:
    """The data that children and full trainings read."""
    if isinstance(config.evaluator, TrainEvaluatorConfig):
        yield _recipe_data("evaluator", config.evaluator.recipe)
    elif not isinstance(config.evaluator, PluginConfig):
        try:
            make_evaluator(config.evaluator, threads=1)
            yield Finding("evaluator", "ok", config.evaluator.name)
        except ConfigError as error:
            yield Finding("evaluator", "lacks", str(error))
    if config.retrain is not None:
        yield _recipe_data("retrain", config.retrain.recipe)


def _recipe_data(key: str, recipe: Recipe) -> Finding:
    try:
        classes = class_names(recipe.data)
    except ConfigError as error:
        return Finding(key, "lacks", str(error))
    return Finding(key, "ok", f"data {recipe.data.name}, {len(classes)} classes")


def _devices(config: CampaignConfig) -> Iterator[Finding]:
    """One line for a device that is there, one for each thing that it lacks."""
    for device in config.devices:
        name = f"device {device.name}"
        if device.name in config.at_nodes:
            yield Finding(name, "unknown", "hangs at a node of Ray's cluster, which is not asked")
            continue
        if isinstance(device, PluginConfig):
            yield Finding(name, "unknown", f"{device.class_path} is asked when it measures")
            continue
        lacking = [finding for finding in check_device(device) if finding.state == "lacks"]
        for finding in lacking:
            yield Finding(f"{name}: {finding.name}", "lacks", finding.text)
        if not lacking:
            yield Finding(name, "ok", f"{device.kind}, can be measured on")


def _workers(config: CampaignConfig) -> Iterator[Finding]:
    """What the workers need of this machine, or that a cluster has to give it."""
    executor = config.executor
    if not isinstance(executor, RayConfig):
        return
    if executor.address is not None:
        yield Finding("workers", "unknown", f"Ray at {executor.address!r} is not asked")
        return
    workers = num_workers(config) or 1
    cores, npus = os.cpu_count() or 1, len(_npus())
    enough = workers * executor.threads <= cores
    text = f"{workers} x {executor.threads} CPUs, of {cores}"
    yield Finding("workers", "ok" if enough else "lacks", text)
    if executor.npus:
        text = f"{workers} NPUs, of {npus} under /dev/davinci*"
        yield Finding("workers: NPUs", "ok" if workers <= npus else "lacks", text)


def _npus() -> list[Path]:
    return [path for path in Path("/dev").glob("davinci[0-9]*") if path.name[7:].isdecimal()]


def parts_here(config: CampaignConfig, findings: Sequence[Finding]) -> Parts:
    """Return a campaign's parts, with something that is here in the place of all that is lacking.

    So what is not lacking is held against the same rules as in a search.

    Raises:
        ConfigError: A search would refuse it on any machine.
    """
    devices = [
        OnnxRuntimeConfig(device.name, "onnxruntime", shares_cores=False)
        if lacks(findings, f"device {device.name}") or device.name in config.at_nodes
        else device
        for device in config.devices
    ]
    recipe = getattr(config.evaluator, "recipe", None)
    stand_in = SyntheticEvaluatorConfig("synthetic", recipe.epochs if recipe else 1)
    executor = config.executor
    if isinstance(executor, RayConfig):
        executor = replace(executor, devices=())
    return Parts(
        replace(
            config,
            evaluator=stand_in if lacks(findings, "evaluator") else config.evaluator,
            retrain=None if lacks(findings, "retrain") else config.retrain,
            executor=executor,
            device=devices[0] if devices else None,
            other_devices=tuple(devices[1:]),
            measurement_cache=None,  # a check leaves nothing behind
        )
    )


# ---------------------------------------------------------------------------- estimate


def estimate(
    config: CampaignConfig,
    *,
    child_s: tuple[float, Source] | None,
    measurement_s: tuple[float, Source] | None,
    price: float | None = None,
) -> Estimate:
    """Return what a campaign takes.

    Args:
        config: Of the campaign.
        child_s: Seconds of a network's evaluation on one worker, and whence they are known.
        measurement_s: Seconds of a measurement on one device, likewise.
        price: Of a worker hour, in any currency.
    """
    trials, trained = config.stop.trials, config.stop.trained
    # The rule looks at what is trained to its end, and where a batch is one, between batches.
    children = trials
    if trained is not None and config.early_stop is None:
        children = min(trials, trained + config.batch_size - 1)
    asked = getattr(config.controller, "latencies_per_trial", 0)  # without a training
    measured = trials * (1 + asked)
    # Members of a pool share the networks.
    shares = sum(1 / _members(device) for device in config.devices)
    measuring_s = 0.0 if not shares else None
    if shares and measurement_s is not None:
        measuring_s = measured * shares * measurement_s[0]
    workers = num_workers(config)
    search_s = None
    if child_s is not None and measuring_s is not None and workers:
        search_s = _search_s(config, children, workers, child_s[0], measuring_s)
    child_hours = None if child_s is None else children * child_s[0] / 3600
    retrain_hours = _retrain_hours(config, child_s[0] if child_s else None)
    money = accelerator = None
    npus = config.executor.npus if isinstance(config.executor, RayConfig) else 0
    # What the full trainings take is not left out where it is not known.
    if child_hours is not None and retrain_hours is not None:
        accelerator = npus * (child_hours + retrain_hours)
    if price is not None and search_s is not None and retrain_hours is not None and workers:
        money = price * (workers * search_s / 3600 + retrain_hours)
    return Estimate(
        seconds_per_child=child_s[0] if child_s else None,
        seconds_per_child_source=child_s[1] if child_s else None,
        seconds_per_measurement=measurement_s[0] if measurement_s else None,
        seconds_per_measurement_source=measurement_s[1] if measurement_s else None,
        children=children,
        measurements=measured * len(config.devices),
        workers=workers,
        child_hours=child_hours,
        accelerator_hours=accelerator,
        measuring_hours=None if measuring_s is None else measuring_s / 3600,
        retrain_hours=retrain_hours,
        search_hours=None if search_s is None else search_s / 3600,
        price=price,
        money=money,
    )


def _members(device: object) -> int:
    return len(device.devices) if isinstance(device, PoolConfig) else 1


def _search_s(
    config: CampaignConfig, children: int, workers: int, child_s: float, measuring_s: float
) -> float:
    """Wall time: in sync a batch is measured, then evaluated in rounds of all workers."""
    if config.mode == "async":
        return max(measuring_s, children * child_s / workers)
    batches, rest = divmod(children, config.batch_size)
    rounds = batches * math.ceil(config.batch_size / workers) + math.ceil(rest / workers)
    return measuring_s + rounds * child_s


def _retrain_hours(config: CampaignConfig, child_s: float | None) -> float | None:
    """Full trainings on one worker, at a child's time per epoch: only on the same images."""
    if config.retrain is None:
        return 0.0
    if child_s is None or not isinstance(config.evaluator, TrainEvaluatorConfig):
        return None
    child, full = config.evaluator.recipe, config.retrain.recipe
    same = ("name", "path", "train_images")
    if any(getattr(child.data, key) != getattr(full.data, key) for key in same):
        return None
    return config.retrain.top * child_s * full.epochs / child.epochs / 3600
