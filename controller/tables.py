"""Tables: functions of tokens made of main effects and pairwise interactions, and their maxima.

    f(x) = constant + sum_d main[x_d] + sum_{d < e} pair[x_d, x_e]

Choices are numbered through all decisions, `width` in all, so that tokens are one-hot rows. What
a change of one decision gives is then read off a row's `field`, main + pair @ row, for all changes
at once: climbing costs next to nothing, in a space of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.tokens import Tokens

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

#: What is maximised: outputs (outputs, ...) -> rewards (...).
Value = Callable[[Array], Array]

#: A change must gain more than rounding errors.
MIN_GAIN = 1e-12

#: Changes of a pair of decisions that start another climb, per call of `best_first`.
MAX_PAIR_STEPS = 4

#: Changed pairs among the candidates of `best_first`.
PAIR_CANDIDATES = 400


class Layout:
    """How choices are numbered through all decisions.

    Attributes:
        width: Number of choices of all decisions.
        decision: (width,), the decision of each choice.
        starts: (decisions,), the number of each decision's first choice.
        same: (width, width), whether two choices are of one decision.
    """

    def __init__(self, num_choices: Sequence[int]) -> None:
        sizes = np.array(num_choices, dtype=np.int64)
        self.num_choices = tuple(num_choices)
        self.width = int(sizes.sum())
        self.decision: Rows = np.repeat(np.arange(len(sizes)), sizes)
        self.starts: Rows = np.cumsum(sizes) - sizes
        self.same: NDArray[np.bool_] = self.decision[:, None] == self.decision[None, :]

    def one_hot(self, rows: NDArray[Any]) -> Array:
        """Return tokens (..., decisions) as one-hot rows (..., width)."""
        made = np.zeros((*rows.shape[:-1], self.width))
        np.put_along_axis(made, rows.astype(np.int64) + self.starts, 1.0, axis=-1)
        return made


class Tables:
    """A batch of functions; `pair` counts every pair from both sides.

    Attributes:
        constant: (...,).
        main: (..., width).
        pair: (..., width, width), symmetric, and zero within a decision.
    """

    def __init__(self, constant: Array, main: Array, pair: Array) -> None:
        self.constant, self.main, self.pair = constant, main, pair

    def __call__(self, one_hot: Array) -> Array:
        """Return the values (..., n) at one-hot rows (n, width)."""
        field = self.main[..., None, :] + 0.5 * (one_hot @ self.pair)
        values: Array = self.constant[..., None] + (field * one_hot).sum(axis=-1)
        return values

    def __getitem__(self, index: Any) -> Tables:
        """Return some of the functions: the leading axes, indexed."""
        return Tables(self.constant[index], self.main[index], self.pair[index])


def stack(tables: Sequence[Tables]) -> Tables:
    """Return batches of one shape along a new first axis."""
    return Tables(
        np.stack([one.constant for one in tables]),
        np.stack([one.main for one in tables]),
        np.stack([one.pair for one in tables]),
    )


class Climb:
    """Steepest ascent from several tokens, one decision a step.

    Args:
        layout: Of the space.
        tables: Of shape (outputs,).
        value: Outputs -> what is maximised.
        rows: (starts, decisions), where the climbs begin.

    Attributes:
        rows: (starts, decisions), where they end.
        outputs: (outputs, starts), the functions there.
        values: (starts,), what is maximised there.
        changed: (outputs, starts, width), the functions after each change of one decision.
    """

    def __init__(self, layout: Layout, tables: Tables, value: Value, rows: NDArray[Any]) -> None:
        self.rows: Rows = rows.astype(np.int64)
        one_hot = layout.one_hot(self.rows)
        main = tables.main[:, None, :]
        field = main + one_hot @ tables.pair
        self.outputs: Array = tables.constant[:, None] + 0.5 * ((main + field) * one_hot).sum(-1)
        # Every step gains something, so that the climb ends.
        while True:
            self.values = value(self.outputs)
            at = self.rows + layout.starts
            here = np.take_along_axis(field, np.broadcast_to(at, (len(field), *at.shape)), -1)
            self.changed: Array = self.outputs[..., None] + field - here[..., layout.decision]
            gains = value(self.changed) - self.values[:, None]
            (start,) = np.nonzero(gains.max(axis=-1) > MIN_GAIN)
            if not len(start):
                return
            new = gains[start].argmax(axis=-1)
            decision = layout.decision[new]
            self.outputs[:, start] = self.changed[:, start, new]
            field[:, start] += tables.pair[:, new] - tables.pair[:, at[start, decision]]
            self.rows[start, decision] = new - layout.starts[decision]


def best_first(
    layout: Layout, tables: Tables, value: Value, starts: NDArray[Any]
) -> Iterator[Tokens]:
    """Yield good tokens of one function, best first; some may come twice.

    They are the best local maximum that climbs from `starts` (n, decisions) find, polished by
    changes of two decisions at once, then the other maxima and the tokens that differ from the
    best in one decision or two, a few hundred in all.

    Args:
        layout: Of the space.
        tables: Of shape (outputs,).
        value: Outputs -> what is maximised.
        starts: Where to climb from.
    """
    maxima, values = [], []
    for _ in range(MAX_PAIR_STEPS):
        climb = Climb(layout, tables, value, starts)
        maxima.append(climb.rows)
        values.append(climb.values)
        best = int(climb.values.argmax())
        row = climb.rows[best]
        pairs = _pair_values(
            layout, tables, value, row, climb.outputs[:, best], climb.changed[:, best]
        ).ravel()
        top = int(pairs.argmax())
        if not pairs[top] > climb.values[best] + MIN_GAIN:
            break
        starts = _changed(layout, row, np.array([top]))
    count = min(PAIR_CANDIDATES, len(pairs))
    others = np.argpartition(-pairs, count - 1)[:count]
    others = others[np.isfinite(pairs[others])]
    rows = np.concatenate([*maxima, _changed(layout, row, others)])
    order = np.argsort(-np.concatenate([*values, pairs[others]]), kind="stable")
    yield from (tuple(rows[k].tolist()) for k in order)


def _pair_values(
    layout: Layout, tables: Tables, value: Value, row: Rows, outputs: Array, changed: Array
) -> Array:
    """The values (width, width) after a change of two decisions, of one on the diagonal; -inf
    elsewhere within a decision.
    """
    at = row + layout.starts
    here = at[layout.decision]  # the present choice of each choice's decision
    pair = tables.pair
    # What two changes give together beyond the sum of what each gives alone.
    both = pair - pair[:, :, here] - pair[:, here, :] + pair[:, here, :][:, :, here]
    gain = changed - outputs[:, None]
    values = value(outputs[:, None, None] + gain[:, :, None] + gain[:, None, :] + both)
    values = np.where(layout.same, -np.inf, values)
    np.fill_diagonal(values, value(changed))
    return values


def _changed(layout: Layout, row: Rows, indices: NDArray[np.integer[Any]]) -> Rows:
    """Rows (n, decisions): the row with the two choices of each index into (width, width)."""
    made = np.repeat(row[None], len(indices), axis=0)
    for choices in np.divmod(indices, layout.width):
        decision = layout.decision[choices]
        made[np.arange(len(made)), decision] = choices - layout.starts[decision]
    return made
