"""Objective: accuracy and latency -> reward and its parts (MnasNet paper, eq. 2 and 3; TuNAS).

    reward(m) = ACC(m) * (LAT(m) / T) ** w,   w = alpha if LAT(m) <= T else beta

`soft` (the paper's default) has alpha = beta = -0.07: doubling the latency must buy about 5 %
relative accuracy. `hard` has alpha = 0, beta = -1: only accuracy counts below the target; above it
the reward falls as T / LAT.

    reward(m) = ACC(m) + beta * |LAT(m) / T - 1|

`absolute` (Bender et al., "Can weight sharing outperform random architecture search?", CVPR 2020)
is greatest at the target itself, where soft rewards drift past it. Its beta is -0.07 by default:
for networks of perfect accuracy, the slope of `soft` at the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from search.trial import RewardParts
from space.records import record

#: name -> (alpha, beta)
EXPONENTS: dict[str, tuple[float, float]] = {
    "soft": (-0.07, -0.07),
    "hard": (0.0, -1.0),
    "absolute": (0.0, -0.07),
}

#: What a network may be refused for before it is trained.
Capped = Literal["macs", "parameters", "model_mb", "peak_memory_mb"]

#: The metric that the target is about.
LATENCY = "latency_ms"


@record
class TargetConfig:
    """A target as a multiple of a reference network's latency on the campaign's device.

    Attributes:
        reference: A published network's name or an architecture's text.
        times: The multiple.
    """

    reference: str
    times: float = 1.0

    def __post_init__(self) -> None:
        if self.times <= 0:
            raise ValueError(f"times must be > 0, but got {self.times!r}")


@record
class ObjectiveConfig:
    """The rule that computes a reward; exactly one of `target_ms` and `target` is given.

    Attributes:
        name: `soft`, `hard` or `absolute`.
        target_ms: T in milliseconds.
        target: T as a multiple of a reference network's measured latency.
        alpha: Exponent where the target is met; None takes the name's; `absolute` has none.
        beta: Exponent elsewhere, or what `absolute` weighs the distance with; None takes the
            name's.
        reject_above: Networks slower than this multiple of T are rejected before training; None
            trains them all, as the paper does.
        caps: Metric -> the most that is trained at all: `macs`, `parameters`, or what a device
            measures (`model_mb`, `peak_memory_mb`).
        other_targets_ms: Name -> T of each of the campaign's other devices.
        device_weights: Name -> weight of each of several devices' ratios LAT / T, which then
            count by their weighted mean; None lets the worst ratio count.
    """

    name: Literal["soft", "hard", "absolute"] = "soft"
    target_ms: float | None = None
    target: TargetConfig | None = None
    alpha: float | None = None
    beta: float | None = None
    reject_above: float | None = None
    caps: dict[Capped, float] = field(default_factory=dict)
    other_targets_ms: dict[str, float] | None = None
    device_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.target_ms is None) == (self.target is None):
            given = "neither" if self.target is None else "both"
            raise ValueError(f"target_ms or target must be given, one of them, but got {given}")
        if self.target_ms is not None and self.target_ms <= 0:
            raise ValueError(f"target_ms must be > 0, but got {self.target_ms!r}")
        if self.name == "absolute" and self.alpha is not None:
            raise ValueError(f"alpha must be left out for absolute, but got {self.alpha!r}")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and value > 0:
                raise ValueError(
                    f"{name} must be <= 0, or slower networks would be rewarded, but got {value!r}"
                )
        if self.reject_above is not None and self.reject_above < 1:
            raise ValueError(f"reject_above must be >= 1, but got {self.reject_above!r}")
        for key in ("caps", "other_targets_ms", "device_weights"):
            for name, number in (getattr(self, key) or {}).items():
                if number <= 0:
                    raise ValueError(f"{key}.{name} must be > 0, but got {number!r}")


class Objective:
    """The reward's rule with the target as a number.

    Args:
        config: The rule.
        target_ms: T in milliseconds, > 0: given, or measured from the reference network.
    """

    def __init__(self, config: ObjectiveConfig, target_ms: float) -> None:
        if not 0 < target_ms < float("inf"):
            raise ValueError(f"target_ms must be finite and > 0, but got {target_ms!r}")
        alpha, beta = EXPONENTS[config.name]
        self.absolute = config.name == "absolute"
        self.alpha = alpha if config.alpha is None else config.alpha
        self.beta = beta if config.beta is None else config.beta
        self.target_ms = target_ms
        self.caps = config.caps
        self.reject_above_ms = (
            None if config.reject_above is None else config.reject_above * target_ms
        )

    def reward(self, accuracy: float, metrics: Mapping[str, float]) -> tuple[float, RewardParts]:
        """Return the reward and its parts.

        Args:
            accuracy: Fraction in [0, 1].
            metrics: Must hold `latency_ms` > 0.

        Raises:
            ValueError: The latency is missing, or a number is out of its range.
        """
        latency = metrics.get(LATENCY)
        if latency is None or not 0 < latency < float("inf"):
            raise ValueError(f"{LATENCY} must be finite and > 0, but got {latency!r}")
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy must be in [0, 1], but got {accuracy!r}")
        ratio = latency / self.target_ms
        exponent, penalty = 0.0, 0.0
        if self.absolute:
            penalty = -self.beta * abs(ratio - 1)
        else:
            exponent = self.alpha if ratio <= 1 else self.beta
        factor = ratio**exponent
        parts = RewardParts(accuracy, latency, self.target_ms, ratio, exponent, factor, penalty)
        return accuracy * factor - penalty, parts

    def accuracy_for(self, reward: float, metrics: Mapping[str, float]) -> float:
        """Return the accuracy that gives a network with these metrics this reward.

        It may lie outside [0, 1]: then no accuracy does.
        """
        _, parts = self.reward(1.0, metrics)
        return (reward + parts.penalty) / parts.factor

    def score(
        self, accuracy: NDArray[np.float64], metrics: Mapping[str, NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Return the rewards of many networks: the same formula on float64 arrays (n,)."""
        ratio = metrics[LATENCY] / self.target_ms
        rewards: NDArray[np.float64]
        if self.absolute:
            rewards = accuracy + self.beta * np.abs(ratio - 1)
        else:
            rewards = accuracy * ratio ** np.where(ratio <= 1, self.alpha, self.beta)
        return rewards

    def feasible(self, metrics: Sequence[Mapping[str, float]]) -> tuple[str, int] | None:
        """Return a sentence about how many networks meet the target and caps, and their number.

        None if no network's latency is known.
        """
        known = [m for m in metrics if LATENCY in m]
        if not known:
            return None
        meeting = sum(m[LATENCY] <= self.target_ms and self.rejects(m) is None for m in known)
        latencies = sorted(m[LATENCY] for m in known)
        what = f"the target of {self.target_ms:.4g} ms{' and the caps' if self.caps else ''}"
        spread = f"they take {latencies[0]:.4g} to {latencies[-1]:.4g} ms"
        if meeting:
            return f"{meeting} of the first {len(known)} networks meet {what}; {spread}", meeting
        advice = "if that stays so, the target is out of reach of this space on this device"
        return f"none of the first {len(known)} networks meets {what}; {spread}; {advice}", 0

    def rejects(self, metrics: Mapping[str, float]) -> str | None:
        """Return why a network is not to be trained at all, or None; unknown metrics pass."""
        limits: dict[str, float] = dict(self.caps.items())
        if self.reject_above_ms is not None:
            limits[LATENCY] = self.reject_above_ms
        for name, limit in limits.items():
            if metrics.get(name, 0.0) > limit:
                return f"{name} is {metrics[name]:.4g}, above {limit:.4g}"
        return None
