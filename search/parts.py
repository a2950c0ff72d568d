"""Parts: the objects that a campaign's configuration stands for, made and checked together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from controller.base import Controller
from controller.registry import make_controller
from latency.device import DeviceConfig, LatencyMeter, in_full, make_meter
from retrain.data import class_names
from search.config import (
    CampaignConfig,
    PluginConfig,
    RayConfig,
    TrainEvaluatorConfig,
    load_class,
)
from search.evaluation import make_evaluator
from search.measurement_cache import MeasurementCache
from search.measuring import Latencies
from search.node_meter import NodeMeter
from search.objective import Objective
from search.store import Store
from space.architecture import Architecture
from space.cost import count
from space.errors import ConfigError
from space.mnasnet import adapt, find_architecture
from space.search_space import SearchSpace, adapted_space


class Parts:
    """The objects that a configuration stands for, made once, before a folder is touched.

    Raises:
        ConfigError: A part cannot be made: a space, a class, a device or data that is not there.
    """

    def __init__(self, config: CampaignConfig) -> None:
        self.config = config
        self.space = campaign_space(config)
        self.meters = _make_meters(config)
        path = config.measurement_cache
        self.measurement_cache = None if path is None else MeasurementCache(Path(path))
        self.evaluator = make_evaluator(config.evaluator, threads=1)
        self.epochs = self.evaluator.epochs
        early_stop = config.early_stop
        if early_stop is not None and early_stop.after_epochs >= self.epochs:
            raise ConfigError(
                f"early_stop.after_epochs must be below the evaluator's {self.epochs:g} epochs, or"
                f" it would never look at a child, but got {early_stop.after_epochs}."
            )
        self.reference = self._reference()
        self._check_data()
        self.evaluator.check(self.space)
        self.controller(Objective(config.objective, config.objective.target_ms or 1.0))

    def _reference(self) -> Architecture | None:
        """The network whose latency the target is a multiple of, for this space's images."""
        target = self.config.objective.target
        if target is None:
            return None
        if not self.meters:
            raise ConfigError(
                "objective.target: a reference network needs a device to be measured on, but"
                " there is none; give target_ms."
            )
        space = self.space.config
        return adapt(
            find_architecture(target.reference),
            resolution=space.resolution,
            classes=space.classes,
            input_channels=space.input_channels,
        )

    def _check_data(self) -> None:
        """Look for the data sets before anything is spent."""
        recipes = []
        if isinstance(self.config.evaluator, TrainEvaluatorConfig):
            recipes.append(("evaluator", self.config.evaluator.recipe))
        if self.config.retrain is not None:
            recipes.append(("retrain", self.config.retrain.recipe))
        for key, recipe in recipes:
            classes = class_names(recipe.data)
            if len(classes) != self.space.config.classes:
                raise ConfigError(
                    f"{key}.recipe.data: {recipe.data.name} has {len(classes)} classes, but the"
                    f" space has {self.space.config.classes}; set space.classes."
                )

    def controller(self, objective: Objective) -> Controller:
        """Return the controller, new, with the campaign's first random stream."""
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(0,)))
        config = self.config.controller
        if isinstance(config, PluginConfig):
            cls = load_class(config.class_path, base=Controller, where="controller")
            made: Controller = cls(config.options, self.space.num_choices, rng)
            return made
        return make_controller(
            config,
            self.space.num_choices,
            rng,
            score=objective.score,
            metrics_of=self._metrics_of,
        )

    def latencies(self, store: Store, *, full: bool = False) -> Latencies:
        """Return what measures the campaign's networks; `full`: never quickly, for finalists.

        Raises:
            ConfigError: The target's reference network cannot be measured.
        """
        return Latencies(
            self.config.objective,
            self._full_meters() if full else self.meters,
            self.evaluator,
            store,
            self.reference,
            self._full_meters(),
            self.measurement_cache,
        )

    def _full_meters(self) -> dict[str, LatencyMeter]:
        """What never measures quickly; a device that has no quick way is opened only once."""
        return {device.name: self._full_meter(device) for device in self.config.devices}

    def _full_meter(self, device: DeviceConfig | PluginConfig) -> LatencyMeter:
        meter = self.meters[device.name]
        if isinstance(meter, NodeMeter):
            return meter.in_full()
        if isinstance(device, PluginConfig) or in_full(device) == device:
            return meter
        return device_meter(device, full=True)

    def _metrics_of(self, tokens: tuple[int, ...]) -> Mapping[str, float]:
        cost = count(self.space.decode(tokens))
        return {"macs": float(cost.macs), "parameters": float(cost.parameters)}


def campaign_space(config: CampaignConfig) -> SearchSpace:
    """Return the space of a campaign.

    Raises:
        ConfigError: It does not take what is changed about it.
    """
    choice = config.space
    assert choice.definition is not None  # campaign_config() reads it
    return adapted_space(
        choice.definition,
        resolution=choice.resolution,
        classes=choice.classes,
        input_channels=choice.input_channels,
    )


def _make_meters(config: CampaignConfig) -> dict[str, LatencyMeter]:
    made: dict[str, LatencyMeter] = {}
    for device in config.devices:
        if device.name in config.at_nodes:
            assert isinstance(config.executor, RayConfig)  # nodes are a cluster's
            made[device.name] = NodeMeter.at_node(config.executor, device)
        else:
            made[device.name] = device_meter(device)
    return made


def device_meter(device: DeviceConfig | PluginConfig, *, full: bool = False) -> LatencyMeter:
    """Return what measures on a device of this machine; `full`: never quickly.

    Raises:
        ConfigError: A user's class cannot be loaded, or the device's settings do not work here.
    """
    if isinstance(device, PluginConfig):
        cls = load_class(device.class_path, base=LatencyMeter, where="device")
        made: LatencyMeter = cls(device.options)
        return made
    return make_meter(in_full(device) if full else device)
