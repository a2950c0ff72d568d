"""What every controller's state begins with: whose it is, and of which space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_num_choices(num_choices: Sequence[int]) -> tuple[int, ...]:
    """Return the number of choices of each decision as a tuple of ints.

    Raises:
        ValueError: No decision at all, or one without a choice.
    """
    made = tuple(num_choices)
    if not made or any(isinstance(n, bool) or n != int(n) or n < 1 for n in made):
        raise ValueError(f"num_choices must be one integer >= 1 or more, but got {num_choices!r}")
    return tuple(int(n) for n in made)


def identity(name: str, num_choices: tuple[int, ...]) -> dict[str, Any]:
    """Return the two entries by which `check_identity` knows a state."""
    return {"controller": name, "num_choices": list(num_choices)}


def check_identity(state: Mapping[str, Any], name: str, num_choices: tuple[int, ...]) -> None:
    """Refuse a state that another controller or a controller of another space gave.

    Raises:
        ValueError: It names both.
    """
    given = state.get("controller")
    if given != name:
        raise ValueError(f"state must be of the controller {name!r}, but it is of {given!r}")
    stored = state.get("num_choices")
    if stored is None or tuple(stored) != num_choices:
        raise ValueError(
            f"state must be of a space with num_choices {list(num_choices)}, but it is of one with"
            f" {stored!r}"
        )


def check_tokens(tokens: Sequence[int], num_choices: tuple[int, ...]) -> None:
    """Refuse tokens that are not one choice index per decision.

    Raises:
        ValueError: It gives both.
    """
    if len(tokens) != len(num_choices) or not all(
        0 <= token < n for token, n in zip(tokens, num_choices, strict=True)
    ):
        raise ValueError(
            f"tokens must be one index per decision, below {list(num_choices)}, but got"
            f" {list(tokens)}"
        )
