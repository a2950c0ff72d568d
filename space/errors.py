"""The engine's own exceptions: those that some caller catches to act on.

MnasError              a command that it ends has exit status 1
├── ConfigError        bad input: a file, a flag, an architecture's text (2)
├── Interrupted        a person ended it, by Ctrl-C or a signal (130)
├── MeasurementError   a device gave no believable figure; recorded as a failed measurement
└── TrialFailed        a child network gave no accuracy; recorded as a failed trial
    └── Diverged       because its training diverged (3)

Callers' programming mistakes are plain ValueError and TypeError.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

FailureCause = Literal["architecture", "infrastructure"]


class MnasError(Exception):
    """Root of the engine's exceptions.

    Attributes:
        exit_status: Of a command that ends with it.
    """

    exit_status: ClassVar[int] = 1


class ConfigError(MnasError, ValueError):
    """One sentence: where, rule, what was given, remedy. Words of hundreds of letters are cut."""

    exit_status = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(
            re.sub(r"\S{300,}", lambda word: f"{word[0][:60]}...{word[0][-1]}", sentence)
        )


class Interrupted(MnasError):
    """A person ended a command; the message says how to go on."""

    exit_status = 130


class MeasurementError(MnasError):
    """A latency measurement that ended without a figure; the message is the reason."""

    def __init__(self, reason: str, *, cause: FailureCause = "infrastructure") -> None:
        super().__init__(reason)
        self.cause: FailureCause = cause


class TrialFailed(MnasError):
    """A trial that ended without an accuracy.

    `cause` says whose fault it was: `architecture` failures (the training diverged, the network
    does not fit) are taught to the controller; `infrastructure` failures (a worker died) are
    retried elsewhere and withheld from it.
    """

    def __init__(
        self, reason: str, *, cause: FailureCause = "architecture", detail: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cause: FailureCause = cause
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_trial_failed, (self.reason, self.cause, self.detail))


class Diverged(TrialFailed):
    """A training in which a loss, a gradient or a weight became infinite or no number.

    Args:
        sign: By which it was noticed.
    """

    exit_status = 3

    #: How the reason begins.
    BEGINNING = "diverged: "

    def __init__(self, sign: str) -> None:
        super().__init__(self.BEGINNING + sign)
        self.sign = sign

    def __reduce__(self) -> tuple[object, ...]:
        return (Diverged, (self.sign,))


def _rebuild_trial_failed(reason: str, cause: FailureCause, detail: str) -> TrialFailed:
    return TrialFailed(reason, cause=cause, detail=detail)
