"""Chooses which networks of a space are measured for a table: those that together teach most."""

from __future__ import annotations

import numpy as np

from latency.features import TERMS, Terms, scaled_matrix
from space.architecture import Architecture
from space.errors import ConfigError
from space.records import record
from space.search_space import SearchSpace

#: Networks among which those to fit are chosen. More cost time and hardly teach more.
POOL = 2000

#: Draws for every network wanted; in a small space some would take forever to come up.
_DRAWS = 10

#: Variance of a measurement beside the terms' own, which are scaled to 1.
_NOISE = 1e-3


@record
class Design:
    """The networks of a table, all different.

    Attributes:
        fitted: Chosen to be fitted, the most telling first.
        held_out: Drawn at random; nothing is fitted to them.
    """

    fitted: tuple[Architecture, ...]
    held_out: tuple[Architecture, ...]

    @property
    def in_turn(self) -> tuple[Architecture, ...]:
        """All, with those held out evenly among the others: what disturbs meets both alike."""
        places = [(index + 0.5) / len(part) for part in self._parts for index in range(len(part))]
        networks = [network for part in self._parts for network in part]
        order = sorted(range(len(networks)), key=lambda k: places[k])
        return tuple(networks[k] for k in order)

    @property
    def _parts(self) -> tuple[tuple[Architecture, ...], tuple[Architecture, ...]]:
        return self.fitted, self.held_out


def choose_networks(space: SearchSpace, fitted: int, held_out: int, seed: int) -> Design:
    """Return the networks of a table; more of them begin with the same.

    Args:
        space: From which.
        fitted: How many are to be fitted.
        held_out: How many are not.
        seed: Of the draws.

    Raises:
        ConfigError: The space has not so many networks.
    """
    _check_size(space, space.distinct_size, fitted + held_out)
    held_rng, pool_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)
    )
    held = _draw(space, held_out, held_rng, set())
    others = space.distinct_size - len(held)
    pool = _draw(space, min(max(POOL, fitted), others), pool_rng, set(held))
    _check_size(space, len(pool) + len(held), fitted + held_out)
    telling = most_telling([TERMS["operations"](network) for network in pool], fitted)
    return Design(tuple(pool[k] for k in telling), tuple(held))


def _check_size(space: SearchSpace, found: int, wanted: int) -> None:
    if found < wanted:
        raise ConfigError(
            f"space {space.name}: must have {wanted} different networks, but {found} were found;"
            " ask for fewer."
        )


def _draw(
    space: SearchSpace, count: int, rng: np.random.Generator, known: set[Architecture]
) -> list[Architecture]:
    """Up to `count` different networks, none of them known."""
    drawn: dict[Architecture, None] = {}
    for _ in range(_DRAWS * count):
        if len(drawn) == count:
            break
        network = space.decode(space.sample(rng))
        if network not in known:
            drawn[network] = None
    return list(drawn)


def most_telling(terms: list[Terms], count: int) -> list[int]:
    """Indices of a D-optimal choice, one after the other.

    Each time the network is taken whose time is least certain given those taken before: of a
    linear model this is the greedy maximum of the determinant, and the pivots of a Cholesky
    factorization of the networks' covariance.
    """
    _, rows, _ = scaled_matrix(terms)
    rows /= np.sqrt(np.mean(np.sum(rows**2, axis=1)))
    variance = np.sum(rows**2, axis=1)
    factor = np.zeros((len(rows), count))
    taken: list[int] = []
    for step in range(count):
        open_variance = variance.copy()
        open_variance[taken] = -1.0
        best = int(np.argmax(open_variance))
        taken.append(best)
        covariance = rows @ rows[best] - factor[:, :step] @ factor[best, :step]
        factor[:, step] = covariance / np.sqrt(variance[best] + _NOISE)
        variance = variance - factor[:, step] ** 2
    return taken
