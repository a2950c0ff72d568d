"""Parts that misbehave on purpose, loaded by the tests as a user's own classes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from controller.random_search import RandomConfig, RandomSearch
from latency.device import LatencyMeter
from latency.measurement import Measurement
from latency.processes import run_to_end
from search.config import TrainEvaluatorConfig, load_campaign_config
from search.evaluation import Evaluation, Evaluator, TrainEvaluator
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle, graph_hash
from space.cost import count
from space.errors import ConfigError, MeasurementError, TrialFailed


class FaultyEvaluator(Evaluator):
    """Diverges, hangs, crashes its process or raises, each for a share of the networks."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._faults = list(options.get("faults", []))
        self._folder = options.get("folder")

    @property
    def epochs(self) -> float:
        return 1.0

    def warm_up(self) -> None:
        pass

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        number = int(architecture.hash, 16) % 8
        fault = self._faults[number] if number < len(self._faults) else None
        if fault == "diverge":
            raise TrialFailed("diverged: loss was nan at step 3")
        if fault == "raise" or (fault == "raise_once" and self._first_time(architecture.hash)):
            raise RuntimeError("kernel launch failed\nwith a second line")
        if fault == "hang":
            time.sleep(600)
        if fault == "crash" or (fault == "crash_once" and self._first_time(architecture.hash)):
            os._exit(7)
        return Evaluation(count(architecture).macs % 1000 / 1000, {"latency_ms": 1.0}, 1.0)

    def _first_time(self, name: str) -> bool:
        mark = Path(str(self._folder)) / name
        if mark.exists():
            return False
        mark.touch()
        return True


class FaultyDevice(LatencyMeter):
    """Fails for a quarter of the networks; counts its measurements in a file."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._log = Path(str(options["log"]))

    def identity(self) -> dict[str, Any]:
        return {"name": "faulty", "kind": "test"}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        with self._log.open("a") as file:
            file.write(f"{architecture.hash}\n")
        if int(architecture.hash, 16) % 4 == 0:
            raise MeasurementError("the device went away")
        median = count(architecture).macs / 1e6 + 0.01
        return Measurement(
            (median,) * 3, 1, 0, 1, graph_hash(architecture, style), self.identity(), {}, {}
        )


class EndlessDevice(FaultyDevice):
    """Runs a program that never ends; its arguments name the folder."""

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        forever = "import time; time.sleep(600)"
        run_to_end([sys.executable, "-c", forever, str(self._log.parent)], timeout_s=600)
        raise MeasurementError("it was killed")


class QuittingDevice(FaultyDevice):
    """Ends the program, as a library made for command lines may."""

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        sys.exit(3)


class UnpluggedDevice(FaultyDevice):
    """Has no figure while a file `unplugged` is there."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._unplugged = self._log.parent / "unplugged"

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        if self._unplugged.exists():
            raise MeasurementError("no device is attached")
        return Measurement(
            (1.0,) * 3, 1, 0, 1, graph_hash(architecture, style), self.identity(), {}, {}
        )


class Rendezvous:
    """A training and a measurement that each wait for the other to have begun."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._folder = Path(str(options["folder"]))

    def meet(self, own: str, other: str) -> None:
        (self._folder / own).touch()
        deadline = time.monotonic() + 60
        while not (self._folder / other).exists():
            if time.monotonic() > deadline:
                raise TrialFailed(f"{own} went on, but {other} never did")
            time.sleep(0.01)


class MeetingDevice(LatencyMeter):
    """Measures its first network at once; the second only once a training goes on."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._rendezvous = Rendezvous(options)
        self._measured = 0

    def identity(self) -> dict[str, Any]:
        return {"name": "meeting", "kind": "test"}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        self._measured += 1
        if self._measured == 2:
            self._rendezvous.meet("measurement", "training")
        return Measurement(
            (1.0,) * 3, 1, 0, 1, graph_hash(architecture, style), self.identity(), {}, {}
        )


class MeetingEvaluator(FaultyEvaluator):
    """Trains its networks only once a second one is measured."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__({})
        self._rendezvous = Rendezvous(options)

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        self._rendezvous.meet("training", "measurement")
        return super().evaluate(architecture, seed=seed, time_limit_s=time_limit_s)


class NoisyAtFirst(FaultyDevice):
    """Its first so many measurements are noisy and half as slow again, each less so."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._noisy = int(options["noisy"])
        self._done = 0

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        found = super().measure(architecture, style)
        self._done += 1
        if self._done > self._noisy:
            return found
        median, swing = 1.5 * found.median_ms, 0.9 / self._done
        samples = ((1 - swing) * median, median, (1 + swing) * median)
        return replace(found, samples_ms=samples)


class DeviceAtNode(FaultyDevice):
    """Tells which process measured; the process dies of every second network."""

    def identity(self) -> dict[str, Any]:
        if "PLUGIN_DEVICE" not in os.environ:
            raise MeasurementError("this is not the device's node")
        return {"name": "plugin", "kind": "test"}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        if int(architecture.hash, 16) % 2 == 0:
            os._exit(1)
        environment = {"pid": os.getpid()}
        return Measurement(
            (1.0,) * 3, 1, 0, 1, graph_hash(architecture, style), self.identity(), environment, {}
        )


class NotAController:
    """Not a subclass of Controller."""


class OneNetwork(RandomSearch):
    """Proposes the same network again and again."""

    def __init__(
        self, options: Mapping[str, Any], num_choices: tuple[int, ...], rng: np.random.Generator
    ) -> None:
        super().__init__(RandomConfig("random"), (1,) * len(num_choices), rng)


class ForgetfulController(RandomSearch):
    """Breaks the contract: its state says nothing of its generator."""

    def __init__(
        self, options: Mapping[str, Any], num_choices: tuple[int, ...], rng: np.random.Generator
    ) -> None:
        super().__init__(RandomConfig("random"), num_choices, rng)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class RefusesInWorkers(FaultyEvaluator):
    """Finds its data in the engine's process, but not in a worker's."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        if "pytest" not in sys.modules:
            raise ConfigError("options: no data are here")


class TwoEpochs(FaultyEvaluator):
    """Says to train for two epochs; its latency is known after the evaluation only."""

    @property
    def epochs(self) -> float:
        return 2.0


class Forgetting(FaultyEvaluator):
    """Notes in a file what it is told to forget."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._log = Path(str(options["log"]))

    def forget(self, architecture: Architecture, *, seed: int) -> None:
        with self._log.open("a") as file:
            file.write(f"{architecture.hash} {seed}\n")


class LuckyFirst(FaultyEvaluator):
    """Gives .9 first, and .3 less each time."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._next = 0.9

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        accuracy, self._next = self._next, self._next - 0.3
        return Evaluation(accuracy, {"latency_ms": 1.0}, 1.0)


class TellsItsProcess(FaultyEvaluator):
    """Tells the process that it runs in; takes longer than a process needs to start."""

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        time.sleep(3.0)
        return Evaluation(0.5, {"latency_ms": 1.0, "pid": float(os.getpid())}, 1.0)


class BadAtOneNode(FaultyEvaluator):
    """Fails on the node whose environment says so: at the start of a process or in evaluations."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._fault = os.environ.get("PLUGIN_BAD_NODE", "")

    def warm_up(self) -> None:
        if self._fault == "no data at the start":
            raise ConfigError("data.path: nothing is here")

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        time.sleep(0.2)
        if self._fault == "a disk that fails":
            raise OSError(5, "Input/output error")
        if self._fault == "an NPU that fails":
            raise TrialFailed("MindSpore failed: no device") from RuntimeError("no device")
        return Evaluation(0.5, {"latency_ms": 1.0}, 1.0)


class NpuEvaluator(FaultyEvaluator):
    """Tells which NPU its worker was given; takes long enough for both workers to take part."""

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        time.sleep(0.5)
        given = float(os.environ["ASCEND_RT_VISIBLE_DEVICES"])
        return Evaluation(0.5, {"latency_ms": 1.0, "npu": given}, 1.0)


class OneEpoch(TrainEvaluator):
    """Real MindSpore trainings of one epoch on 320 of the digits; latency is made up."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        short = ["evaluator.recipe.epochs=1", "evaluator.recipe.data.train_images=320"]
        config = load_campaign_config("digits", short).evaluator
        assert isinstance(config, TrainEvaluatorConfig)
        super().__init__(config, threads=1)

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        trained = super().evaluate(architecture, seed=seed, time_limit_s=time_limit_s)
        return replace(trained, metrics={**trained.metrics, "latency_ms": 1.0})
