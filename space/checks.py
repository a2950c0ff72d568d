"""CheckResult: what one check of a user's own class against a contract found."""

from __future__ import annotations

from space.records import record


@record
class CheckResult:
    """One check of a contract.

    Attributes:
        name: The rule, as a statement that should be true.
        passed: Whether it is.
        message: What was found instead; empty if it passed.
    """

    name: str
    passed: bool
    message: str = ""
