"""LatencyTable: milliseconds per feature, fitted to whole networks that were measured on a device.

A table is a JSON file that says on what it was fitted: device and runtime, space, and how far it
is off. What it gives is predicted: it is shown as such and never stored among measurements.

Ridge regression finds the numbers, on relative errors. The kind of features (latency/features.py)
and the strength of the ridge are those with the least cross-validated error, each network
predicted by a table fitted to all others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latency.features import TERMS, FeatureKind, Terms, scaled_matrix
from latency.measurement import fingerprint
from space.architecture import Architecture
from space.cost import count
from space.errors import ConfigError
from space.files import write_atomically
from space.records import build, read_text, record, to_plain
from space.search_space import SearchSpace, SpaceConfig

Array = NDArray[np.float64]

#: Fewer networks say nothing about the error.
FEWEST_NETWORKS = 10

#: Share of cross-validated predictions that lie within a table's bound.
BOUND_LEVEL = 0.95

#: The term that every network has once: stem, classifier, and what a call costs. Its column is so
#: large that the ridge does not shrink it.
_EVERY, _EVERY_SCALE = "every network", 100.0

#: Strengths of the ridge that are tried.
_ALPHAS = np.logspace(-8, 5, 40)


@record
class Accuracy:
    """How far predictions are off on networks that were not fitted.

    Attributes:
        networks: How many were predicted and measured.
        mape: Mean of |predicted / measured - 1|.
        within_10_percent: Share of the networks that are off by at most 10 %.
        kendall_tau: Rank correlation; None where all times are equal.
    """

    networks: int
    mape: float
    within_10_percent: float
    kendall_tau: float | None


@record
class LatencyTable:
    """What a table's file holds.

    Attributes:
        format_version: Of the file.
        space: Whose members it predicts.
        device: Identity of the device whose times it predicts (LatencyMeter.identity).
        features: The kind that `numbers` belong to.
        numbers: Term -> milliseconds for one unit of it.
        fitted_networks: To how many it was fitted.
        least_ms: Half of the least time among them: a smaller sum is not believed.
        cross_validated: Kind of features -> mean relative error of its predictions, each by a
            table fitted to all other networks.
        bound: Relative error within which 95 % of these predictions are.
        held_out: On networks that nothing was fitted to; None if there were none.
        macs_line: A straight line through multiply-adds, fitted to the same and on the same.
    """

    format_version: Literal[1]
    space: SpaceConfig
    device: dict[str, Any]
    features: FeatureKind
    numbers: dict[str, float]
    fitted_networks: int
    least_ms: float
    cross_validated: dict[str, float]
    bound: float
    held_out: Accuracy | None = None
    macs_line: Accuracy | None = None

    def __post_init__(self) -> None:
        if _EVERY not in self.numbers:
            raise ValueError(f"numbers must hold {_EVERY!r}, but got {len(self.numbers)} others")
        for name in ("least_ms", "bound"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be >= 0, but got {getattr(self, name)!r}")


class LatencyPredictor:
    """Predicts the latency of a space's members with a table.

    Args:
        table: From `load_table` or `fit_table`.
    """

    def __init__(self, table: LatencyTable) -> None:
        self.table = table
        self._space = SearchSpace(table.space)

    def predict(self, architectures: Sequence[Architecture]) -> Array:
        """Return predicted milliseconds, float64, (len(architectures),), all > 0.

        Raises:
            ConfigError: One is no member of the table's space.
        """
        for architecture in architectures:
            try:
                self._space.encode(architecture)
            except ValueError as error:
                raise ConfigError(
                    f"latency table: must be asked for members of the space"
                    f" {self._space.name!r}, but {error}."
                ) from None
        numbers, terms = self.table.numbers, TERMS[self.table.features]
        sums = [
            numbers[_EVERY]
            + sum(numbers.get(name, 0.0) * amount for name, amount in terms(network).items())
            for network in architectures
        ]
        return np.maximum(np.array(sums, dtype=np.float64), self.table.least_ms)


def fit_table(
    space: SpaceConfig,
    device: dict[str, Any],
    architectures: Sequence[Architecture],
    times_ms: Sequence[float],
) -> LatencyTable:
    """Return the table with the least cross-validated error.

    Args:
        space: What the networks are members of.
        device: Identity of the device that they were measured on.
        architectures: At least ten.
        times_ms: Their measured times, > 0.

    Raises:
        ValueError: There are too few networks.
    """
    if len(architectures) < FEWEST_NETWORKS:
        raise ValueError(
            f"architectures must be at least {FEWEST_NETWORKS}, but got {len(architectures)}"
        )
    times = np.array(times_ms, dtype=np.float64)
    fits = {kind: _fit([terms(a) for a in architectures], times) for kind, terms in TERMS.items()}
    means = {str(kind): float(errors.mean()) for kind, (_, errors) in fits.items()}
    best = min(fits, key=lambda kind: means[kind])
    numbers, errors = fits[best]
    return LatencyTable(
        format_version=1,
        space=space,
        device=to_plain(device),
        features=best,
        numbers=numbers,
        fitted_networks=len(architectures),
        least_ms=float(times.min()) / 2,
        cross_validated=means,
        bound=float(np.quantile(errors, BOUND_LEVEL)),
    )


def _fit(terms: Sequence[Terms], times: Array) -> tuple[dict[str, float], Array]:
    """Milliseconds per unit, and every network's relative error when it was left out."""
    from sklearn.linear_model import RidgeCV

    names, amounts, units = scaled_matrix(terms)
    scaled = np.hstack([amounts, np.full((len(terms), 1), _EVERY_SCALE)])
    # Divided by its time, a network should come to 1, and what is squared are relative errors.
    unit_ms = float(np.median(times))
    model = RidgeCV(_ALPHAS, fit_intercept=False, store_cv_results=True)
    model.fit(scaled * (unit_ms / times)[:, None], np.ones(len(times)))
    errors = np.sqrt(model.cv_results_)  # (networks, alphas), each network left out in turn
    best = int(np.flatnonzero(np.isclose(model.alpha_, _ALPHAS))[0])
    weights = unit_ms * model.coef_
    numbers = dict(zip(names, (weights[:-1] / units).tolist(), strict=True))
    return {_EVERY: float(weights[-1] * _EVERY_SCALE), **numbers}, errors[:, best]


def accuracy(predicted_ms: Array, measured_ms: Array) -> Accuracy:
    """Return how far predictions are off; both float64, (n,), n > 0."""
    from scipy.stats import kendalltau  # type: ignore[import-untyped]

    relative = np.abs(predicted_ms / measured_ms - 1)
    tau = float(kendalltau(predicted_ms, measured_ms).statistic)
    return Accuracy(
        networks=len(relative),
        mape=float(relative.mean()),
        within_10_percent=float((relative <= 0.1).mean()),
        kendall_tau=None if np.isnan(tau) else tau,
    )


def predict_by_macs(
    fitted: Sequence[Architecture], times_ms: Sequence[float], others: Sequence[Architecture]
) -> Array:
    """Return what a straight line through multiply-adds says of other networks, float64, (n,).

    The line has the least squares of relative errors.
    """
    times = np.array(times_ms, dtype=np.float64)
    macs = np.array([count(network).macs for network in fitted], dtype=np.float64)
    slope, start = np.polyfit(macs, times, 1, w=1 / times)
    return np.array([start + slope * count(network).macs for network in others])


# ---------------------------------------------------------------------------- file


def save_table(table: LatencyTable, path: Path) -> None:
    """Write a table's file, whole or not at all."""
    write_atomically(path, (json.dumps(to_plain(table), indent=1) + "\n").encode())


def load_table(path: Path) -> LatencyTable:
    """Return the table of a file.

    Raises:
        ConfigError: There is no such file, or it is not a whole table.
    """
    text = read_text(path)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{path}: must be a latency table, but it is not JSON ({error}); make it anew with"
            " `mnas latency table`."
        ) from None
    return build(LatencyTable, values, where=str(path))


def check_device(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse what belongs to another device or runtime.

    Raises:
        ConfigError: The identities differ; says in what.
    """
    expected, found = to_plain(expected), to_plain(found)
    if fingerprint(expected) == fingerprint(found):
        return
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    sides = [f"{name} {found.get(name)!r} and not {expected.get(name)!r}" for name in names[:5]]
    raise ConfigError(
        f"{where}: must belong to the device {expected.get('name')!r} as it is now, but it has"
        f" {', '.join(sides)}; make another with `mnas latency table`."
    )


def check_space(expected: SpaceConfig, found: SpaceConfig, where: str) -> None:
    """Refuse what belongs to another space.

    Raises:
        ConfigError: They differ; says in what.
    """
    if expected == found:
        return
    ours, theirs = to_plain(expected), to_plain(found)
    differ = [name for name in ours if ours[name] != theirs[name]]
    raise ConfigError(
        f"{where}: must belong to the space {expected.name!r}, but that of {found.name!r} differs"
        f" in {', '.join(differ)}; make another with `mnas latency table --out`."
    )
