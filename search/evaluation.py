"""Evaluator: a network -> its accuracy, in the process where it runs.

The contract is small so that a user's own class fits it (`evaluator: {class: module:Name}`): the
engine builds one Evaluator per worker process, calls `warm_up` once and `evaluate` for each trial;
the process may be replaced at any time.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING

from space.architecture import Architecture
from space.cost import count
from space.errors import TrialFailed
from space.records import record

if TYPE_CHECKING:
    from retrain.checkpoint import KeptState
    from search.config import EvaluatorChoice, SyntheticEvaluatorConfig, TrainEvaluatorConfig
    from space.search_space import SearchSpace


@record
class Evaluation:
    """What an evaluation gives.

    Attributes:
        accuracy: Fraction in [0, 1] on images held out from the training set.
        metrics: Other figures, units in the names; `latency_ms` where the campaign has no device.
        epochs: How long it was trained.
    """

    accuracy: float
    metrics: dict[str, float]
    epochs: float

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy must be in [0, 1], but got {self.accuracy!r}")
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"metrics must be finite numbers, but {name} is {value!r}")


class TrialStopped(Exception):
    """A child that is not worth another epoch."""


#: A metric with the accuracy after an epoch is named by it: accuracy@epoch1, ...
_CURVE = "accuracy@epoch"


def curve_of(metrics: Mapping[str, float]) -> dict[int, float]:
    """Return epoch -> accuracy after it, as far as a trial's metrics tell."""
    return {
        int(name.removeprefix(_CURVE)): value
        for name, value in metrics.items()
        if name.startswith(_CURVE)
    }


class Evaluator(ABC):
    """Gives networks their accuracy; see the module."""

    #: Of the evaluation that runs: see `begin`.
    _bars: Mapping[int, float] = MappingProxyType({})
    _curve: Mapping[int, float] = MappingProxyType({})

    def begin(self, bars: Mapping[int, float]) -> None:
        """Begin an evaluation; called by the engine.

        Args:
            bars: Epoch -> the accuracy under which the training is stopped after it; epochs that
                are not named are not looked at.
        """
        self._bars, self._curve = bars, {}

    @property
    def reports(self) -> bool:
        """Whether the engine wants to be told the accuracy after each epoch."""
        return bool(self._bars)

    def report(self, epoch: int, accuracy: float) -> None:
        """Tell the engine how far a training is; `evaluate` may call it after each epoch.

        Args:
            epoch: Epochs done, from 1.
            accuracy: Fraction in [0, 1] on the images that `evaluate`'s is of.

        Raises:
            TrialStopped: The child is not worth another epoch; `evaluate` lets it pass.
        """
        if epoch not in self._bars:
            return
        self._curve = {**self._curve, epoch: accuracy}
        if accuracy < self._bars[epoch]:
            raise TrialStopped(
                f"stopped early after epoch {epoch} of {self.epochs:g}: its accuracy"
                f" {accuracy:.4f} is below {self._bars[epoch]:.4f}"
            )

    def curve_metrics(self) -> dict[str, float]:
        """Return what was reported as metrics: see `curve_of`."""
        return {f"{_CURVE}{epoch}": value for epoch, value in self._curve.items()}

    @property
    @abstractmethod
    def epochs(self) -> float:
        """Fidelity of an evaluation: results are reused only at equal fidelity."""

    def metrics(self, architecture: Architecture) -> dict[str, float]:
        """Return the metrics that take no evaluation, e.g. a surrogate's `latency_ms`.

        None by default: a network's figures are known once it is evaluated.
        """
        return {}

    def check(self, space: SearchSpace) -> None:
        """Refuse, before anything is spent, what `evaluate` could not work with. None by default.

        Raises:
            ConfigError: Networks of the space or the evaluator's data cannot be used.
        """
        return

    def about(self) -> list[tuple[str, str]]:
        """Return (label, text) lines that a campaign shows of the evaluator at its start."""
        return []

    @abstractmethod
    def warm_up(self) -> None:
        """Load what every evaluation needs (frameworks, data), before there is a trial."""

    @abstractmethod
    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        """Return the network's accuracy.

        Args:
            architecture: The network.
            seed: 0 to 2**32 - 1; the same seed gives the same result.
            time_limit_s: The evaluation is killed a little after this; better to raise before.

        Raises:
            TrialFailed: There is none; the reason is recorded.
        """

    def forget(self, architecture: Architecture, *, seed: int) -> None:
        """Remove what a training that has no result left for the next attempt. Nothing by default.

        Called by the engine, in its own process, once the trial is recorded as failed.
        """
        return


class TrainEvaluator(Evaluator):
    """Trains the network briefly with MindSpore and validates it."""

    def __init__(self, config: TrainEvaluatorConfig, *, threads: int) -> None:
        self._recipe = config.recipe
        self._checkpoints = config.checkpoints
        self._threads = threads

    @property
    def epochs(self) -> float:
        """The recipe's epochs."""
        return float(self._recipe.epochs)

    def warm_up(self) -> None:
        """Import MindSpore, which takes seconds, and read the data."""
        from retrain.train import warm_up

        warm_up(self._recipe, threads=self._threads)

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        """Train with the recipe and return the validation accuracy."""
        from retrain.train import train

        kept = self._kept(architecture, seed)
        try:
            result = train(
                architecture,
                self._recipe,
                seed=seed,
                threads=self._threads,
                deadline=time.monotonic() + time_limit_s,
                on_epoch=self.report if self.reports else None,
                state=kept.load() if kept else None,
                on_state=kept.save if kept else None,
            )
        except (TrialFailed, TrialStopped):
            if kept:
                kept.remove()
            raise
        # Nothing else removes it: a process that is told to end leaves what the next one needs.
        if kept:
            kept.remove()
        return Evaluation(
            accuracy=result.accuracy,
            metrics={"train_loss": result.losses[-1], "images_per_s": result.images_per_s},
            epochs=self.epochs,
        )

    def forget(self, architecture: Architecture, *, seed: int) -> None:
        """Remove the state of a child whose process was killed."""
        kept = self._kept(architecture, seed)
        if kept:
            kept.remove()

    def _kept(self, architecture: Architecture, seed: int) -> KeptState | None:
        if self._checkpoints is None:
            return None
        from retrain.checkpoint import KeptState

        return KeptState(Path(self._checkpoints), architecture, self._recipe, seed)


class SyntheticEvaluator(Evaluator):
    """A stand-in: accuracy and latency as fixed functions of the network; trains nothing.

    Accuracy saturates with the multiply-adds and has a part that depends on the hash and one that
    depends on the seed, as real short trainings have.
    """

    def __init__(self, config: SyntheticEvaluatorConfig) -> None:
        self._seconds = config.seconds
        self._slowest = config.slowest_seconds or config.seconds
        self._fail_share = config.fail_share
        self._epochs = config.epochs

    @property
    def epochs(self) -> float:
        """As configured."""
        return float(self._epochs)

    def metrics(self, architecture: Architecture) -> dict[str, float]:
        """Return the made-up latency."""
        return self._metrics(count(architecture).macs, _hash_unit(architecture.hash))

    @staticmethod
    def _metrics(macs: int, unit: float) -> dict[str, float]:
        return {"latency_ms": macs / 2e6 * (0.8 + 0.4 * unit) + 0.05}

    def warm_up(self) -> None:
        """There is nothing to load."""

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        """Return the made-up figures, after the time that the configuration asks for."""
        unit = _hash_unit(architecture.hash)
        seconds = 0.0
        if self._seconds:
            # Uniform in the logarithm: skewed, as real trainings' times are.
            seconds = self._seconds * (self._slowest / self._seconds) ** unit
            if seconds > time_limit_s:
                raise TrialFailed(f"time limit of {time_limit_s:g} s reached")
        if unit < self._fail_share:
            raise TrialFailed("diverged: the synthetic evaluator was asked to fail this network")
        macs = count(architecture).macs
        # A generator of NumPy's takes longer to make than all the rest takes.
        noise = NormalDist(0.0, 0.003).inv_cdf(_hash_unit(str(seed)) or 0.5)
        accuracy = 0.9 * macs / (macs + 2e6) + 0.08 * _hash_unit(architecture.hash[::-1]) + noise
        accuracy = min(1.0, max(0.0, accuracy))
        for epoch in range(1, self._epochs + 1):
            if seconds:
                time.sleep(seconds / self._epochs)
            # Halfway to the end with every epoch.
            self.report(epoch, accuracy * (1 - 0.5**epoch) / (1 - 0.5**self._epochs))
        return Evaluation(accuracy, self._metrics(macs, unit), self.epochs)


def _hash_unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def make_evaluator(config: EvaluatorChoice, *, threads: int) -> Evaluator:
    """Return the evaluator that a configuration asks for.

    Raises:
        ConfigError: A user's class cannot be loaded.
    """
    from search import config as schema
    from search.accel_nasbench import AccelNasBenchConfig, AccelNasBenchEvaluator

    if isinstance(config, schema.TrainEvaluatorConfig):
        return TrainEvaluator(config, threads=threads)
    if isinstance(config, schema.SyntheticEvaluatorConfig):
        return SyntheticEvaluator(config)
    if isinstance(config, AccelNasBenchConfig):
        return AccelNasBenchEvaluator(config)
    made: Evaluator = schema.load_class(config.class_path, base=Evaluator, where="evaluator")(
        config.options
    )
    return made
