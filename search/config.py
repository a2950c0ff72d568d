"""A campaign's configuration: one strict YAML file -> frozen records -> objects, once.

A user's own part replaces `name` by `class`: `controller: {class: my_package.module:MyController,
options: {...}}`; the same for `evaluator` and `device`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from controller.registry import ControllerConfig
from latency.device import DeviceConfig, resolve_members
from retrain.config import Recipe
from search.accel_nasbench import AccelNasBenchConfig, resolve
from search.early_stop import EarlyStopConfig
from search.objective import ObjectiveConfig
from space.errors import ConfigError
from space.records import (
    apply_overrides,
    build,
    did_you_mean,
    find_config,
    load_yaml,
    record,
    to_plain,
)
from space.search_space import SpaceConfig


@record
class PluginConfig:
    """A user's own class: `class_path` is `package.module:Name`; `options` go to it as they are.

    In YAML the key is `class`; a resolved configuration writes it the same way.
    """

    name: Literal["plugin"]
    class_path: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, colon, attribute = self.class_path.partition(":")
        if not (module and colon and attribute.isidentifier()):
            raise ValueError(f"class must read package.module:Name, but got {self.class_path!r}")


@record
class SpaceChoice:
    """A shipped space's name or a path, and what the images change about it.

    Attributes:
        definition: What the file of that name held when the campaign began, which rules from then
            on; tokens mean nothing without it.
    """

    name: str
    resolution: int | None = None
    classes: int | None = None
    input_channels: int | None = None
    definition: SpaceConfig | None = None


@record
class TrainEvaluatorConfig:
    """Children are trained by MindSpore with this recipe; `recipe.epochs` is the fidelity.

    Attributes:
        checkpoints: A folder in which every child in training keeps its state after its last epoch
            (some megabytes, gone when it ends): one whose worker, node or engine died goes on from
            there. All nodes must share it. None: it starts anew.
    """

    name: Literal["train"]
    recipe: Recipe
    checkpoints: str | None = None

    def __post_init__(self) -> None:
        if self.checkpoints is not None and not os.path.isabs(self.checkpoints):
            raise ValueError(
                "checkpoints must be an absolute path, since workers have folders of their own,"
                f" but got {self.checkpoints!r}"
            )


@record
class SyntheticEvaluatorConfig:
    """A stand-in that trains nothing: accuracy and latency are fixed functions of the network.

    Deterministic and instant, for trying out and testing the engine itself. Its latency is not a
    measurement and is never shown as one.

    Attributes:
        epochs: How many it pretends to train; the accuracy comes halfway nearer with each.
        seconds: How long an evaluation pretends to take.
        slowest_seconds: Each takes a time of its own between `seconds` and this, chosen by hash,
            most of them short ones; None: all the same.
        fail_share: Share of networks whose evaluation fails, chosen by hash.
    """

    name: Literal["synthetic"]
    epochs: int = 1
    seconds: float = 0.0
    slowest_seconds: float | None = None
    fail_share: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 1000:
            raise ValueError(f"epochs must be in [1, 1000], but got {self.epochs}")
        if not 0 <= self.seconds <= 3600:
            raise ValueError(f"seconds must be in [0, 3600], but got {self.seconds!r}")
        if self.slowest_seconds is not None and not 0 < self.seconds <= self.slowest_seconds:
            raise ValueError(
                "slowest_seconds must be at least seconds, and these > 0, but got"
                f" {self.slowest_seconds!r} and {self.seconds!r}"
            )
        if not 0 <= self.fail_share <= 1:
            raise ValueError(f"fail_share must be in [0, 1], but got {self.fail_share!r}")


@record
class SerialConfig:
    """Trials are evaluated one after another in the engine's own process.

    A crash or a hang of a child is then the engine's: meant for debugging and instant evaluators.
    """

    name: Literal["serial"]


@record
class RayConfig:
    """Trials are evaluated by Ray workers, one process each.

    Attributes:
        workers: Number of workers; None takes as many as the cluster's CPUs (and NPUs) allow, more
            when nodes join.
        threads: CPU threads (Ray CPUs) of a worker.
        pin: Whether each worker's process keeps to CPU cores of its own, as many as `threads`.
            MindSpore's helper threads otherwise use half a core more. Not for machines on which
            others run workers, too.
        npus: Ascend NPUs of a worker, 0 or 1. Ray gives each worker one of its own and shows it
            no other (ASCEND_RT_VISIBLE_DEVICES).
        address: A cluster to join, `auto` for one on this machine; None starts a local one.
        runtime_env: Ray's runtime environment for the workers, as Ray's documentation describes
            it: `py_modules` and `working_dir` bring code along, `env_vars` set variables.
        devices: Names of the campaign's devices that hang at other nodes of the cluster, which
            offer them as resources `device:NAME`: they are measured there (search/node_meter.py).
        trials_per_process: A worker's process is replaced after so many trials, since MindSpore
            does not give all memory back.
        max_memory_mb: ... or when its resident memory exceeds this.
        time_limit_s: A trial that takes longer fails; after a second time, if `retries` allows it.
        retries: How often a trial whose worker died, or that failed by the machine's fault, is
            tried again, on another worker.
    """

    name: Literal["ray"]
    workers: int | None = None
    threads: int = 1
    pin: bool = False
    npus: int = 0
    address: str | None = None
    runtime_env: dict[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    trials_per_process: int = 16
    max_memory_mb: int = 3000
    time_limit_s: float = 1800.0
    retries: int = 1

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be >= 1, but got {self.workers}")
        for name in ("threads", "trials_per_process", "max_memory_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, but got {getattr(self, name)}")
        if self.devices and self.address is None:
            raise ValueError(
                "devices must be left out without the address of a cluster, but got"
                f" {list(self.devices)}"
            )
        if self.npus not in (0, 1):
            raise ValueError(f"npus must be 0 or 1, but got {self.npus}")
        if self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s must be > 0, but got {self.time_limit_s!r}")
        if self.retries < 0:
            raise ValueError(f"retries must be >= 0, but got {self.retries}")


@record
class StopConfig:
    """When the search ends: whichever comes first, or when hardly anything new is proposed.

    Attributes:
        trials: Number of proposals (the paper's 8,000).
        trained: Number of networks trained to their end. It is looked at between batches (`async`:
            between results), so that more may be.
        hours: Wall time over all sessions of the campaign.
        training_hours: Time of all trainings, summed over the workers: accelerator-hours, but for
            attempts that a kill or a dead worker cut short.
        no_improvement: So many proposals since the one with the best reward.
        failed_in_a_row: So many trials without a single result: something is wrong that more
            trials will not mend.
    """

    trials: int
    trained: int | None = None
    hours: float | None = None
    training_hours: float | None = None
    no_improvement: int | None = None
    failed_in_a_row: int | None = 50

    def __post_init__(self) -> None:
        for name in (
            "trials", "trained", "hours", "training_hours", "no_improvement", "failed_in_a_row",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, but got {value!r}")


@record
class WarmStartConfig:
    """An earlier campaign's trials as the controller's first knowledge.

    Their accuracies carry over; the latency is measured on this campaign's own device. In YAML the
    folder alone will do.

    Attributes:
        campaign: Its folder; its children must have been trained the same way.
        trials: Only the last so many of its networks; None takes all.
    """

    campaign: str
    trials: int | None = None

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be >= 1, but got {self.trials}")


@record
class RetrainConfig:
    """What happens to the best networks after the search.

    Attributes:
        top: How many are fully retrained; the best of them by reward on held-out images is named
            the winner, evaluated on the test set once, and exported.
        recipe: Of the full training.
        threads: CPU threads of the training, of each process; None takes all.
        workers: Processes, and so NPUs, of this machine that train a network together, which msrun
            starts; None: one process. Every step has as many images times the recipe's batch.
    """

    recipe: Recipe
    top: int = 1
    threads: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be >= 1, but got {self.top}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be >= 1, but got {self.threads}")
        if self.workers is None:
            return
        if self.workers < 2:
            raise ValueError(f"workers must be >= 2, or left out for one, but got {self.workers}")
        meant, passes = self.recipe.global_batch, self.recipe.accumulate * self.workers
        batch = self.recipe.batch_size * passes
        if meant is not None and meant != batch:
            fitting = f"; retrain.recipe.batch_size={meant // passes} fits"
            raise ValueError(
                f"workers must make batch_size x accumulate x workers the recipe's global_batch,"
                f" {meant}, but got {self.workers}, which make it {batch}"
                + ("" if meant % passes else fitting)
            )


def _device_kind(values: Any) -> str:
    """Which schema a device's values are held against."""
    is_plugin = isinstance(values, dict) and "class_path" in values
    return "plugin" if is_plugin or isinstance(values, PluginConfig) else "device"


ControllerChoice = Annotated[ControllerConfig | PluginConfig, Field(discriminator="name")]
DeviceChoice = Annotated[
    Annotated[DeviceConfig, Tag("device")] | Annotated[PluginConfig, Tag("plugin")],
    Discriminator(_device_kind),
]
EvaluatorChoice = Annotated[
    TrainEvaluatorConfig | SyntheticEvaluatorConfig | AccelNasBenchConfig | PluginConfig,
    Field(discriminator="name"),
]
ExecutorChoice = Annotated[SerialConfig | RayConfig, Field(discriminator="name")]


@record
class CampaignConfig:
    """A whole campaign.

    Attributes:
        name: Shown in reports; the default folder is runs/<name>.
        seed: All randomness of the campaign comes from it.
        space: Where networks are searched.
        controller: Who proposes them.
        evaluator: What gives their accuracy.
        device: What gives their latency; null if the evaluator gives `latency_ms` itself.
        other_devices: Where they are measured, too: see `objective.device_weights`.
        measurement_cache: A file of measurements that campaigns share: what one of them has timed
            on a device is not timed again (search/measurement_cache.py). Made if missing.
        objective: Accuracy and latency -> reward.
        batch_size: Proposals that are evaluated before the controller learns from them.
        mode: `sync`: a batch is evaluated as a whole before the next one is proposed (the paper's;
            deterministic with a deterministic evaluator). `async`: every worker that comes free
            gets a proposal at once, and the controller learns whenever `batch_size` results have
            come, in the order in which they came.
        executor: Where trials are evaluated.
        stop: When the search ends.
        early_stop: Which children are stopped before their last epoch; null trains all to the end.
        trainings_per_network: A network that is proposed again is trained again, with a new seed,
            until it has had so many trainings; its accuracy is their mean, which later proposals
            take. 1 takes the first training's at once.
        warm_start: An earlier campaign to learn from first; null starts from nothing.
        baseline_share: Share of the trials, 0 to 0.5, that are drawn at random in the controller's
            place, so that the report can say what the controller gains.
        retrain: What happens to the best; null ends with the search.
    """

    name: str
    space: SpaceChoice
    controller: ControllerChoice
    evaluator: EvaluatorChoice
    objective: ObjectiveConfig
    executor: ExecutorChoice
    stop: StopConfig
    device: DeviceChoice | None = None
    other_devices: tuple[DeviceChoice, ...] = ()
    measurement_cache: str | None = None
    retrain: RetrainConfig | None = None
    early_stop: EarlyStopConfig | None = None
    warm_start: WarmStartConfig | None = None
    baseline_share: float = 0.0
    trainings_per_network: int = 1
    seed: int = 0
    batch_size: int = 16
    mode: Literal["sync", "async"] = "sync"

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\\0") or self.name.startswith("."):
            raise ValueError(f"name must be usable as a folder's name, but got {self.name!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, but got {self.batch_size}")
        if self.trainings_per_network < 1:
            raise ValueError(
                f"trainings_per_network must be >= 1, but got {self.trainings_per_network}"
            )
        if not 0 <= self.baseline_share <= 0.5:
            raise ValueError(
                f"baseline_share must be in [0, 0.5], but got {self.baseline_share!r}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), but got {self.seed}")
        if self.device is None and isinstance(self.evaluator, TrainEvaluatorConfig):
            raise ValueError("device must be given: training gives no latency, but got null")
        if self.early_stop is not None and isinstance(self.evaluator, AccelNasBenchConfig):
            raise ValueError(
                "early_stop must be left out for the evaluator accel_nasbench, which trains"
                f" nothing, but got {self.early_stop}"
            )
        self._check_devices()
        shares_cores = any(getattr(device, "shares_cores", False) for device in self.devices)
        if self.mode == "async" and shares_cores:
            raise ValueError(
                "mode must be sync for a device that shares its cores with trainings, which go on"
                " in async while it measures, but got 'async'"
            )

    @property
    def devices(self) -> tuple[DeviceConfig | PluginConfig, ...]:
        """Return all devices, the first one first."""
        return () if self.device is None else (self.device, *self.other_devices)

    @property
    def at_nodes(self) -> tuple[str, ...]:
        """Return the names of the devices that are measured at other nodes of the cluster."""
        return self.executor.devices if isinstance(self.executor, RayConfig) else ()

    def _check_devices(self) -> None:
        """What several devices need: names, a target each, weights for all of them or none."""
        names = [device.name for device in self.devices]
        unknown = sorted(set(self.at_nodes) - set(names))
        if unknown:
            raise ValueError(
                f"executor.devices must be among the campaign's devices {names}, but got"
                f" {unknown[0]!r}"
            )
        if self.other_devices and self.device is None:
            raise ValueError("other_devices must be left out without device")
        if len(set(names)) < len(names):
            raise ValueError(f"other_devices must have names of their own, but got {names}")
        for key, given in (
            ("other_targets_ms", self.objective.other_targets_ms),
            ("device_weights", self.objective.device_weights),
        ):
            wanted = names[1:] if key == "other_targets_ms" else names
            if given is not None and sorted(given) != sorted(wanted):
                raise ValueError(f"objective.{key} must be for {wanted}, but got {sorted(given)}")
        if names[1:] and self.objective.target is None and not self.objective.other_targets_ms:
            raise ValueError(
                f"objective.other_targets_ms must be given for {names[1:]}, or a target in the"
                " place of target_ms"
            )
        unmeasured = sorted(set(self.objective.caps) - {"macs", "parameters"})
        if unmeasured and self.device is None:
            raise ValueError(f"objective.caps: {unmeasured} must be measured: give a device")


#: Keys that may differ when a campaign goes on: none of them changes what a trial's result means.
RESUMABLE = (
    "stop",
    "measurement_cache",
    "executor.workers",
    "executor.pin",
    "executor.address",
    "executor.devices",
    "executor.time_limit_s",
    "executor.retries",
    "executor.trials_per_process",
    "executor.max_memory_mb",
    "executor.runtime_env",
    "evaluator.data",
    "evaluator.checkpoints",
    "evaluator.recipe.data.path",
    "retrain.recipe.data.path",
    "retrain.threads",
    "retrain.workers",
)


def load_campaign_config(name_or_path: str, overrides: Iterable[str] = ()) -> CampaignConfig:
    """Return the configuration of a file or a shipped name, with `key=value` overrides.

    Raises:
        ConfigError: Anything in it is not as this module's records say.
    """
    path = find_config(name_or_path, "search")
    # Names first, so that `device.threads=2` reaches into the device that a name stands for.
    named = _resolve_names(load_yaml(path), path.parent)
    values = apply_overrides(named, overrides)
    return campaign_config(values, where=str(path), folder=path.parent)


def campaign_config(values: dict[str, Any], *, where: str, folder: Path) -> CampaignConfig:
    """Return the configuration that plain values describe.

    Names in it are resolved here: a device's name or path becomes its configuration, a recipe's
    name its recipe, and a space's file is read, so that the result stands by itself.

    Raises:
        ConfigError: See `load_campaign_config`.
    """
    resolved = _resolve_names(values, folder)
    resolved["space"] = _defined(resolved.get("space"), folder)
    for key in ("controller", "evaluator", "device"):
        resolved[key] = _plugin_keys(resolved.get(key), f"{where}: {key}")
        if resolved[key] is None:
            del resolved[key]
    others = resolved.get("other_devices")
    if isinstance(others, list):
        keyed = [_plugin_keys(other, f"{where}: other_devices") for other in others]
        resolved["other_devices"] = keyed
    config = build(CampaignConfig, resolved, where=where)
    if config.measurement_cache is not None:
        absolute = str(Path(config.measurement_cache).expanduser().absolute())
        config = replace(config, measurement_cache=absolute)
    if isinstance(config.evaluator, AccelNasBenchConfig):
        return replace(config, evaluator=resolve(config.evaluator))
    return config


def _resolve_names(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A device's or recipe's name or path replaced by what its file holds."""
    resolved = dict(values)
    resolved["device"] = _device_values(resolved.get("device"), folder)
    if isinstance(resolved.get("other_devices"), list):
        others = resolved["other_devices"]
        resolved["other_devices"] = [_device_values(other, folder) for other in others]
    if isinstance(resolved.get("warm_start"), str):
        resolved["warm_start"] = {"campaign": resolved["warm_start"]}
    for key in ("evaluator", "retrain"):
        part = resolved.get(key)
        if isinstance(part, dict) and isinstance(part.get("recipe"), str):
            path = find_config(part["recipe"], "retrain", relative_to=folder)
            resolved[key] = {**part, "recipe": load_yaml(path)}
    return resolved


def _defined(space: Any, folder: Path) -> Any:
    """A space's values with what the file that its name stands for holds."""
    if not isinstance(space, dict) or not isinstance(space.get("name"), str):
        return space
    if space.get("definition") is not None:
        return space
    path = find_config(space["name"], "space", relative_to=folder)
    definition = build(SpaceConfig, load_yaml(path), where=str(path))
    return {**space, "definition": to_plain(definition)}


def _device_values(device: Any, folder: Path) -> Any:
    """A device's values: those that a name stands for, a pool's members among them."""
    if isinstance(device, str):
        path = find_config(device, "device", relative_to=folder)
        device, folder = load_yaml(path), path.parent
    return resolve_members(device, folder) if isinstance(device, dict) else device


def _plugin_keys(part: Any, where: str) -> Any:
    """`{class: a.b:C, options: {...}}` -> the keys of PluginConfig."""
    if not isinstance(part, dict) or "class" not in part:
        return part
    unknown = sorted(set(part) - {"class", "options"})
    if unknown:
        hint = did_you_mean(unknown[0], ["class", "options"]) or "; put it under options."
        raise ConfigError(f"{where}: unknown key {unknown[0]!r} beside class{hint}")
    plugin = {"name": "plugin", "class_path": part["class"]}
    return {**plugin, "options": part["options"]} if "options" in part else plugin


def config_to_plain(config: CampaignConfig) -> dict[str, Any]:
    """Return plain values that `campaign_config` reads back as the same configuration."""
    plain: dict[str, Any] = to_plain(config)
    for key in ("controller", "evaluator", "device"):
        plain[key] = _class_key(plain[key])
    plain["other_devices"] = [_class_key(part) for part in plain["other_devices"]]
    return plain


def _class_key(part: Any) -> Any:
    """The reverse of `_plugin_keys`."""
    if isinstance(part, dict) and part.get("name") == "plugin" and "class_path" in part:
        return {"class": part["class_path"], "options": part["options"]}
    return part


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, our value, their value) for every leaf that differs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            difference
            for key in dict.fromkeys((*ours, *theirs))
            for difference in differences(
                ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if ours == theirs else [(prefix, ours, theirs)]


def may_change(key: str) -> bool:
    """Whether a dotted key may differ when a campaign is resumed."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in RESUMABLE)


def load_class(class_path: str, *, base: type, where: str) -> Any:
    """Return a user's class, importable from the current folder or the environment.

    Raises:
        ConfigError: It cannot be imported or is not a subclass of `base`.
    """
    module_name, _, attribute = class_path.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{where}: cannot import {module_name!r}: {type(error).__name__}: {error}."
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        names: Sequence[str] = [name for name in vars(module) if not name.startswith("_")]
        hint = did_you_mean(attribute, names) or "."
        raise ConfigError(f"{where}: {module_name!r} has no {attribute!r}{hint}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{where}: {class_path!r} must be a subclass of {base.__module__}.{base.__name__}."
        )
    return found
