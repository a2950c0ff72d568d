"""Seen: which tokens a controller has proposed or observed, so that it proposes others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.state import pack_tokens, unpack_tokens
from space.tokens import Tokens, mutated

#: How far `fresh` walks at most. While any part of a space worth searching is left, a few steps
#: are enough.
MAX_STEPS = 1000
#: So many token vectors can be gone through.
SMALL_SPACE = 100_000


class Seen:
    """A set of token vectors that remembers their order, for exact states."""

    def __init__(self, num_choices: tuple[int, ...]) -> None:
        self._num_choices = num_choices
        self._size = math.prod(num_choices)
        self._tokens: dict[Tokens, None] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, tokens: Tokens) -> bool:
        return tokens in self._tokens

    @property
    def is_whole_space(self) -> bool:
        """Whether nothing new is left to propose."""
        return len(self._tokens) == self._size

    def add(self, tokens: Iterable[Tokens]) -> None:
        """Take note of tokens."""
        self._tokens.update(dict.fromkeys(tokens))

    def fresh(self, tokens: Tokens, rng: np.random.Generator) -> Tokens:
        """Return tokens not seen before and take note of them.

        These are the ones given, if they are new; otherwise the first new ones on a walk from
        them that changes one decision a step, or, where a walk finds none in a small space, any.
        A repetition comes only if the whole space was seen, or nearly all of a large one.
        """
        made = tokens
        if not self.is_whole_space:
            for _ in range(MAX_STEPS):
                if made not in self._tokens:
                    break
                made = mutated(made, self._num_choices, rng)
            if made in self._tokens and self._size <= SMALL_SPACE:
                every = itertools.product(*map(range, self._num_choices))
                left = [tokens for tokens in every if tokens not in self._tokens]
                made = left[rng.integers(len(left))]
        self.add([made])
        return made

    def to_array(self) -> NDArray[Any]:
        """Return the tokens as rows, (n, decisions), in order."""
        return pack_tokens(self._tokens, self._num_choices)

    def load_array(self, rows: NDArray[Any]) -> None:
        """Become what `to_array` gave."""
        self._tokens = dict.fromkeys(unpack_tokens(rows))
