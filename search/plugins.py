"""Checks of a user's own controller, evaluator or device against the public contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from controller.base import Controller
from controller.contract import check_controller
from latency.contract import check_meter
from latency.device import LatencyMeter
from search.config import load_class
from search.evaluation import Evaluation, Evaluator
from space.architecture import Architecture
from space.checks import CheckResult
from space.errors import ConfigError, TrialFailed
from space.records import did_you_mean
from space.search_space import SearchSpace, load_space

#: Long enough for a short training on a CPU.
EVALUATION_LIMIT_S = 600.0


def check(kind: str, class_path: str, options: dict[str, Any], space: str) -> list[CheckResult]:
    """Return the results of the contract suite of a kind of plug-in.

    Args:
        kind: `controller`, `evaluator` or `device`.
        class_path: `package.module:Name`.
        options: Handed to the class.
        space: A space's name or path, to draw networks from.

    Raises:
        ConfigError: Unknown kind, or the class cannot be loaded.
    """
    suites: dict[str, Callable[[str, dict[str, Any], SearchSpace], list[CheckResult]]] = {
        "controller": _check_controller,
        "evaluator": _check_evaluator,
        "device": _check_device,
    }
    if kind not in suites:
        hint = did_you_mean(kind, list(suites)) or f"; known are {', '.join(suites)}."
        raise ConfigError(f"check-plugin: unknown kind {kind!r}{hint}")
    return suites[kind](class_path, options, load_space(space))


def _check_controller(
    class_path: str, options: dict[str, Any], space: SearchSpace
) -> list[CheckResult]:
    cls = load_class(class_path, base=Controller, where="controller")
    return check_controller(lambda rng: cls(options, space.num_choices, rng), space.num_choices)


def _check_device(
    class_path: str, options: dict[str, Any], space: SearchSpace
) -> list[CheckResult]:
    cls = load_class(class_path, base=LatencyMeter, where="device")
    return check_meter(cls(options), _some_network(space))


def _check_evaluator(
    class_path: str, options: dict[str, Any], space: SearchSpace
) -> list[CheckResult]:
    cls = load_class(class_path, base=Evaluator, where="evaluator")
    return check_evaluator(cls(options), _some_network(space))


def _some_network(space: SearchSpace) -> Architecture:
    return space.decode(space.sample(np.random.default_rng(0)))


def check_evaluator(evaluator: Evaluator, network: Architecture) -> list[CheckResult]:
    """Return what an evaluator does right and wrong under the contract of `Evaluator`."""
    results: list[CheckResult] = []

    def note(name: str, fault: str) -> None:
        results.append(CheckResult(name, not fault, fault))

    epochs = evaluator.epochs
    is_number = isinstance(epochs, (int, float)) and not isinstance(epochs, bool) and epochs >= 0
    note("epochs is a number >= 0", "" if is_number else f"got {epochs!r}")
    found: list[Evaluation] = []
    try:
        evaluator.warm_up()
        for _ in range(2):
            found.append(evaluator.evaluate(network, seed=1, time_limit_s=EVALUATION_LIMIT_S))
    except TrialFailed as error:
        note("evaluate gives an Evaluation", f"TrialFailed: {error.reason}")
        return results
    except Exception as error:
        note("evaluate gives an Evaluation", f"{type(error).__name__}: {error}")
        return results
    wrong = [type(item).__name__ for item in found if not isinstance(item, Evaluation)]
    note("evaluate gives an Evaluation", f"got {wrong[0]}" if wrong else "")
    if wrong:
        return results
    note("epochs of an evaluation are the evaluator's",
         "" if found[0].epochs == epochs else f"{found[0].epochs!r}, not {epochs!r}")  # fmt: skip
    bad = [name for name, value in found[0].metrics.items() if not np.isfinite(value)]
    note("metrics are finite numbers", f"not {', '.join(bad)}" if bad else "")
    same = found[0].accuracy == found[1].accuracy
    note("the same seed gives the same accuracy",
         "" if same else f"{found[0].accuracy!r}, then {found[1].accuracy!r}")  # fmt: skip
    return results
