"""The smallest and the largest network of a space, in multiply-adds."""

from __future__ import annotations

from space.architecture import Architecture
from space.cost import count
from space.search_space import SearchSpace


def extreme_network(space: SearchSpace, sign: int) -> Architecture:
    """Return the network than which none one decision away has more (-1: fewer) multiply-adds."""
    tokens = [0] * len(space.num_choices)

    def size(index: int, choice: int) -> int:
        return sign * count(space.decode([*tokens[:index], choice, *tokens[index + 1 :]])).macs

    changed = True
    while changed:
        changed = False
        for index, choices in enumerate(space.num_choices):
            sizes = [size(index, choice) for choice in range(choices)]
            if max(sizes) > sizes[tokens[index]]:
                tokens[index] = sizes.index(max(sizes))
                changed = True
    return space.decode(tokens)
