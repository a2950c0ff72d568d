"""Trial: the record of one network that a campaign proposed, evaluated or handed over."""

from __future__ import annotations

from typing import Literal

from controller.base import Outcome
from space.architecture import Architecture, parse_architecture
from space.errors import FailureCause
from space.records import record

Role = Literal["search", "baseline", "warm_start", "finalist"]


@record
class Failure:
    """Why a trial has no reward.

    Attributes:
        reason: One sentence.
        cause: Whose fault: the network's, or the machine's (then it is withheld from the
            controller).
        detail: A traceback or the last lines of a log.
        confirmed: Whether the cause is beyond doubt; an error that a sound machine may not have is
            confirmed by a second one.
        quarantined: The network killed every worker it was given to: no other one gets it.
    """

    reason: str
    cause: FailureCause
    detail: str = ""
    confirmed: bool = True
    quarantined: bool = False


def is_infrastructure(trial: Trial) -> bool:
    """Whether a failure is the machine's: it is withheld from the controller."""
    return trial.failure is not None and trial.failure.cause == "infrastructure"


@record
class RewardParts:
    """How a reward came about, so that tables explain themselves.

    Attributes:
        accuracy: Fraction in [0, 1].
        latency_ms: The latency that counted.
        target_ms: T.
        ratio: LAT / T.
        exponent: w: alpha where the target is met, beta elsewhere.
        factor: (LAT / T) ** w.
        penalty: What `absolute` takes off for the distance from the target. The reward is
            accuracy * factor - penalty.
    """

    accuracy: float
    latency_ms: float
    target_ms: float
    ratio: float
    exponent: float
    factor: float
    penalty: float = 0.0


@record
class Trial:
    """One row of a campaign.

    Attributes:
        id: Counts the search's trials from 0; all others count down from -1, so that an extended
            search goes on as if it had never stopped.
        batch: Index of the batch; -1 for trials that are not the search's.
        role: `search`: proposed by the controller; `baseline`: drawn at random in its place, to be
            compared with; `warm_start`: an earlier campaign's; `finalist`: fully retrained after
            the search.
        proposal_id: The controller's number for it; None unless role is `search`.
        tokens: One choice index per decision.
        log_prob: Natural logarithm of the probability under the policy that drew it.
        architecture: The network's text form.
        architecture_hash: The network's identity.
        seed: Of its training, 0 to 2**32 - 1.
        epochs: Fidelity: how long it is to be trained.
        outcome: None while there is no result.
        attempt: How often its evaluation was started.
        reused_from: The earlier trial whose result it took.
        finalist_of: The search trial whose network a finalist trains fully.
        accuracy: Fraction in [0, 1] on images held out from the training set.
        metrics: Name -> value, units in the names.
        reward: The number the controller saw.
        parts: How the reward came about.
        measurement_ids: Rows of the table `measurement`, one per device.
        timings: Name -> seconds: `measure_s`, `train_s`, `wait_s`.
        failure: Why there is no reward.
        created_at: Seconds since the epoch.
        finished_at: Seconds since the epoch.
    """

    id: int
    batch: int
    role: Role
    proposal_id: int | None
    tokens: tuple[int, ...]
    log_prob: float
    architecture: str
    architecture_hash: str
    seed: int
    epochs: float
    outcome: Outcome | None = None
    attempt: int = 0
    reused_from: int | None = None
    accuracy: float | None = None
    metrics: dict[str, float] | None = None
    reward: float | None = None
    parts: RewardParts | None = None
    measurement_ids: tuple[int, ...] = ()
    timings: dict[str, float] | None = None
    failure: Failure | None = None
    created_at: float = 0.0
    finished_at: float | None = None
    finalist_of: int | None = None

    def network(self) -> Architecture:
        """The network that the text stands for."""
        return parse_architecture(self.architecture)

    @property
    def latency_ms(self) -> float | None:
        """The latency that counted, if there is one."""
        return (self.metrics or {}).get("latency_ms")
