"""Token vectors as such: drawing them, changing them, and what lies next to them.

A token vector holds one choice index per decision; `num_choices` says how many choices each
decision has, which is all that is known here. What network a vector stands for is
space.search_space's matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Tokens = tuple[int, ...]


def uniform_tokens(num_choices: Sequence[int], rng: np.random.Generator) -> Tokens:
    """Return tokens drawn uniformly from all vectors."""
    return tuple(int(rng.integers(n)) for n in num_choices)


def neighbours_of(tokens: Tokens, num_choices: Sequence[int]) -> Iterator[Tokens]:
    """Yield every token vector that differs in exactly one decision, in order."""
    for position, n in enumerate(num_choices):
        for choice in range(n):
            if choice != tokens[position]:
                yield (*tokens[:position], choice, *tokens[position + 1 :])


def mutated(
    tokens: Tokens, num_choices: Sequence[int], rng: np.random.Generator, *, changes: int = 1
) -> Tokens:
    """Return tokens that differ from the given ones in exactly `changes` decisions.

    The decisions are drawn uniformly, without repetition, from those that have another choice;
    then each one's new choice uniformly from its others (Real et al., AAAI 2019).

    Raises:
        ValueError: `changes` is below 1 or above the number of decisions that can change.
    """
    changeable = [position for position, n in enumerate(num_choices) if n > 1]
    if not 1 <= changes <= len(changeable):
        raise ValueError(
            f"changes must be in [1, {len(changeable)}], the decisions with more than one choice,"
            f" but got {changes!r}"
        )
    made = list(tokens)
    for k in rng.choice(len(changeable), size=changes, replace=False):
        position = changeable[k]
        other = int(rng.integers(num_choices[position] - 1))
        made[position] = other + (other >= tokens[position])  # steps over the present choice
    return tuple(made)
