"""What controllers share: whose state it is and of which space, checks, and tokens as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from controller.base import Result
from space.tokens import Tokens


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


def check_results(
    results: Iterable[Result], num_choices: tuple[int, ...], num_proposed: int
) -> None:
    """Refuse results of proposals that a controller never made.

    Raises:
        ValueError: An id is not below `num_proposed`, or tokens do not fit the space.
    """
    for result in results:
        check_tokens(result.proposal.tokens, num_choices)
        if not 0 <= result.proposal.id < num_proposed:
            raise ValueError(
                f"proposal.id must be one of {num_proposed} proposals made, but got"
                f" {result.proposal.id}"
            )


def pack_tokens(
    tokens: Iterable[Tokens], num_choices: tuple[int, ...]
) -> NDArray[np.unsignedinteger[Any]]:
    """Return token vectors as rows, (n, decisions), in the smallest unsigned type that fits."""
    rows = np.array(list(tokens), dtype=np.min_scalar_type(max(num_choices) - 1))
    return rows.reshape(-1, len(num_choices))


def unpack_tokens(rows: NDArray[Any]) -> list[Tokens]:
    """Return the token vectors that `pack_tokens` made rows of, in order."""
    return [tuple(row) for row in rows.tolist()]


def one_blas_thread() -> AbstractContextManager[object]:
    """Return a context in which BLAS computes with one thread.

    A matrix product's last bit depends on the number of threads, which the environment of a
    resumed campaign may set otherwise; a controller's products are too small to gain from them.
    """
    limit: AbstractContextManager[object] = _blas().limit(limits=1, user_api="blas")
    return limit


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    """The process's BLAS libraries, which take a moment to find."""
    # It brings a BLAS of its own, which is found only once it is loaded.
    import scipy.linalg  # type: ignore[import-untyped]  # noqa: F401

    return ThreadpoolController()
