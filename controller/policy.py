"""The paper's policy: an LSTM that draws one choice after another, with its exact gradient.

The controller of NASNet (Zoph et al., CVPR 2018, section 3 and appendix), which MnasNet keeps
(Tan et al., CVPR 2019, section 4.2): at decision d the LSTM's input is the embedding of the choice
made at d - 1, and a softmax of decision d's own turns its hidden state into probabilities. Forward
and backward passes are written out in numpy: light to import, exact to check, and the whole state
is one vector of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.state import check_num_choices
from space.records import record

#: float32 or float64, as the policy was made.
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

#: Where there are few decisions, the policy still decides most of the time.
MAX_UNIFORM_SHARE = 0.1

#: The smallest probability whose logarithm is taken; normal in float32 too.
TINY = 1e-37


@record
class PolicyConfig:
    """The network that draws tokens.

    Attributes:
        hidden_size: Units of the LSTM; 100 in NASNet.
        embedding_size: Numbers that stand for the previous choice.
        temperature: Divides the logits; above 1 draws more evenly.
        tanh_constant: If given, logits are `tanh_constant * tanh(logits / temperature)`, so that
            no choice can be ruled out (2.5 in ENAS, Pham et al., 2018); None leaves them free.
        exploration: On average, this many decisions of a proposal are drawn uniformly: every
            softmax is mixed with `exploration / decisions` (at most a tenth) of the uniform
            distribution. It cannot collapse then, and one that has settled tries the neighbours
            of its favourite, as a mutation would. 0 leaves the softmax alone.
        init_scale: Initial weights are uniform in [-init_scale, init_scale]; 0.1 in NASNet.
    """

    hidden_size: int = 100
    embedding_size: int = 100
    temperature: float = 1.0
    tanh_constant: float | None = None
    exploration: float = 1.0
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (
            ("hidden_size", self.hidden_size),
            ("embedding_size", self.embedding_size),
        ):
            if not 1 <= value <= 4096:
                raise ValueError(f"{name} must be in [1, 4096], but got {value!r}")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature must be > 0 and finite, but got {self.temperature!r}")
        if self.tanh_constant is not None and not 0 < self.tanh_constant < np.inf:
            raise ValueError(
                f"tanh_constant must be > 0 and finite, or null, but got {self.tanh_constant!r}"
            )
        if not 0 <= self.exploration < np.inf:
            raise ValueError(f"exploration must be >= 0 and finite, but got {self.exploration!r}")
        if not 0 < self.init_scale <= 10:
            raise ValueError(f"init_scale must be in (0, 10], but got {self.init_scale!r}")


class Evaluation:
    """What the policy says of given tokens, and what `LSTMPolicy.backward` needs to know.

    Attributes:
        log_probs: (n, decisions), natural logarithm of each choice's probability given the
            choices before it.
        entropies: (n, decisions), nats, of the distribution that each choice is drawn from.
    """

    def __init__(
        self,
        tokens: Ints,
        gates: Floats,
        cells: Floats,
        tanh_cells: Floats,
        hidden: Floats,
        logits: Floats,
        mask: NDArray[np.bool_],
        uniform_share: float,
    ) -> None:
        self.tokens = tokens
        self.gates = gates  # (decisions, n, 4 hidden): i, f, g, o
        self.cells = cells  # (decisions + 1, n, hidden)
        self.tanh_cells = tanh_cells  # (decisions, n, hidden)
        self.hidden = hidden  # (decisions + 1, n, hidden)
        self.logits = logits  # (decisions, n, choices), padded
        self.softmax = _softmax(np.where(mask, logits, -np.inf))
        self.p = _mix(self.softmax, uniform_share, mask / mask.sum(axis=-1, keepdims=True))
        # Padding has p = 0, and so may a choice that the policy has ruled out.
        self.log_p = np.log(np.maximum(self.p, TINY))
        chosen = tokens.T[:, :, None]
        self.log_probs: Floats = np.take_along_axis(self.log_p, chosen, axis=2)[:, :, 0].T
        self.entropies: Floats = -(self.p * self.log_p).sum(axis=2).T


class LSTMPolicy:
    """A distribution over tokens with `parameters`, one flat vector.

    Decisions with different numbers of choices are padded to the largest; padding has
    probability 0 and gradient 0.
    """

    def __init__(
        self,
        config: PolicyConfig,
        num_choices: tuple[int, ...],
        rng: np.random.Generator,
        *,
        dtype: type[np.floating[Any]] = np.float64,
    ) -> None:
        """Draw initial weights from `rng`; biases start at 0."""
        self.config = config
        self.num_choices = check_num_choices(num_choices)
        self.decisions = len(self.num_choices)
        choices = max(self.num_choices)
        self._uniform_share = min(MAX_UNIFORM_SHARE, config.exploration / self.decisions)
        self._mask = np.arange(choices) < np.array(self.num_choices)[:, None, None]
        hidden, embedding = config.hidden_size, config.embedding_size
        self.shapes: dict[str, tuple[int, ...]] = {
            "start": (embedding,),
            "embedding": (self.decisions - 1, choices, embedding),
            "input_weight": (embedding, 4 * hidden),
            "hidden_weight": (hidden, 4 * hidden),
            "gate_bias": (4 * hidden,),
            "output_weight": (self.decisions, hidden, choices),
            "output_bias": (self.decisions, 1, choices),
        }
        size = sum(int(np.prod(shape)) for shape in self.shapes.values())
        self.parameters: Floats = np.zeros(size, dtype=dtype)
        self.weights = self.views(self.parameters)
        for name, values in self.weights.items():
            if not name.endswith("bias"):
                values[...] = rng.uniform(-config.init_scale, config.init_scale, values.shape)

    def views(self, vector: Floats) -> dict[str, Floats]:
        """Return a vector laid out like `parameters` as named arrays that share its memory."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + int(np.prod(shape))
            views[name] = vector[start:stop].reshape(shape)
            start = stop
        return views

    @property
    def max_entropy(self) -> float:
        """Mean entropy per decision of the uniform distribution, nats."""
        return float(np.mean(np.log(self.num_choices)))

    @np.errstate(over="ignore")  # see _sigmoid; entered once, since it is slow
    def sample(self, n: int, rng: np.random.Generator) -> tuple[Ints, NDArray[np.float64]]:
        """Draw tokens.

        Returns:
            int64 (n, decisions), and float64 (n,): their log-probability, the decisions summed.
        """
        uniform = rng.random((self.decisions, n, 1))
        tokens = np.empty((n, self.decisions), dtype=np.int64)
        log_prob = np.zeros(n)
        start, table = self._project()
        hidden = np.zeros((n, self.config.hidden_size), dtype=self.parameters.dtype)
        cell = np.zeros_like(hidden)
        gates = np.repeat(start[None], n, axis=0)
        weight, bias = self.weights["output_weight"], self.weights["output_bias"]
        rows = np.arange(n)
        for d, choices in enumerate(self.num_choices):
            if d > 0:
                gates = table[d - 1, tokens[:, d - 1]]
            hidden, cell, _ = self._step(gates, hidden, cell)
            logits = self._bound(hidden @ weight[d, :, :choices] + bias[d, :, :choices])
            p = _mix(_softmax(logits), self._uniform_share, 1 / choices)
            cumulative = p.cumsum(axis=1, dtype=np.float64)
            # The last sum is left out of the comparison: no draw can fall beyond the last choice.
            drawn = (uniform[d] * cumulative[:, -1:] >= cumulative[:, :-1]).sum(axis=1)
            tokens[:, d] = drawn
            log_prob += np.log(p[rows, drawn])
        return tokens, log_prob

    @np.errstate(over="ignore")
    def evaluate(self, tokens: Ints) -> Evaluation:
        """Return log-probabilities and entropies of `tokens`, int64 (n, decisions)."""
        n = len(tokens)
        start, table = self._project()
        gates = np.empty((self.decisions, n, 4 * self.config.hidden_size), start.dtype)
        gates[0] = start
        gates[1:] = table[np.arange(self.decisions - 1)[:, None], tokens.T[:-1]]
        hidden = np.zeros((self.decisions + 1, n, self.config.hidden_size), start.dtype)
        cells, tanh_cells = np.zeros_like(hidden), np.empty_like(hidden[1:])
        for d in range(self.decisions):
            hidden[d + 1], cells[d + 1], tanh_cells[d] = self._step(gates[d], hidden[d], cells[d])
        logits = np.matmul(hidden[1:], self.weights["output_weight"])
        logits = self._bound(logits + self.weights["output_bias"])
        return Evaluation(
            tokens, gates, cells, tanh_cells, hidden, logits, self._mask, self._uniform_share
        )

    def backward(self, evaluation: Evaluation, d_log_probs: Floats, d_entropies: Floats) -> Floats:
        """Return the gradient of a loss with respect to `parameters`, laid out like them.

        Args:
            evaluation: Of the tokens that the loss is about, under the present parameters.
            d_log_probs: (n, decisions), derivative of the loss by each `log_probs`.
            d_entropies: (n, decisions), derivative of the loss by each `entropies`.
        """
        gradient = np.zeros_like(self.parameters)
        grads = self.views(gradient)
        d_logits = self._backward_softmax(evaluation, d_log_probs, d_entropies)
        hidden = evaluation.hidden
        grads["output_weight"][...] = np.matmul(hidden[1:].transpose(0, 2, 1), d_logits)
        grads["output_bias"][...] = d_logits.sum(axis=1, keepdims=True)
        d_hidden = np.matmul(d_logits, self.weights["output_weight"].transpose(0, 2, 1))
        d_gates = self._backward_lstm(evaluation, d_hidden)

        flat = d_gates.reshape(-1, d_gates.shape[2])
        grads["hidden_weight"][...] = hidden[:-1].reshape(len(flat), -1).T @ flat
        grads["gate_bias"][...] = flat.sum(axis=0)
        d_start = d_gates[0].sum(axis=0)
        # The sum over the rows of the batch that made each choice, as a product with one-hot rows.
        one_hot = evaluation.tokens.T[:-1, None, :] == np.arange(self._mask.shape[2])[:, None]
        d_table = np.matmul(one_hot.astype(flat.dtype), d_gates[1:])
        weight, table = self.weights["input_weight"], self.weights["embedding"]
        d_rows = d_table.reshape(-1, d_table.shape[2])
        grads["start"][...] = weight @ d_start
        grads["embedding"][...] = (d_rows @ weight.T).reshape(table.shape)
        grads["input_weight"][...] = table.reshape(-1, table.shape[2]).T @ d_rows
        grads["input_weight"] += np.outer(self.weights["start"], d_start)
        return gradient

    # ------------------------------------------------------------------ parts of both passes

    def _project(self) -> tuple[Floats, Floats]:
        """The input's share of the gates: of the start (4 hidden,), of each choice (d, n, 4h)."""
        weight, bias = self.weights["input_weight"], self.weights["gate_bias"]
        table = self.weights["embedding"]
        rows = table.reshape(-1, table.shape[2]) @ weight + bias
        return self.weights["start"] @ weight + bias, rows.reshape(*table.shape[:2], len(bias))

    def _step(self, gates: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
        """One LSTM step: the next hidden state, cell and the cell's tanh, each (n, hidden).

        `gates`, (n, 4 hidden), holds the input's share and is overwritten by the gates: input,
        forget, candidate, output.
        """
        size = self.config.hidden_size
        gates += hidden @ self.weights["hidden_weight"]
        candidate = gates[:, 2 * size : 3 * size]
        candidate *= 2  # tanh(x) = 2 sigmoid(2 x) - 1: one exponential serves all four gates
        _sigmoid(gates)
        candidate *= 2
        candidate -= 1
        cell = gates[:, size : 2 * size] * cell + gates[:, :size] * candidate
        tanh_cell = 2 * _sigmoid(2 * cell) - 1
        return gates[:, 3 * size :] * tanh_cell, cell, tanh_cell

    def _bound(self, logits: Floats) -> Floats:
        if self.config.temperature != 1:
            logits = logits / self.config.temperature
        if self.config.tanh_constant is not None:
            logits = self.config.tanh_constant * np.tanh(logits)
        return logits

    def _backward_softmax(
        self, evaluation: Evaluation, d_log_probs: Floats, d_entropies: Floats
    ) -> Floats:
        """Derivative by the raw logits, (decisions, n, choices)."""
        softmax, chosen = evaluation.softmax, evaluation.tokens.T[:, :, None]
        # By p, times the softmax: of H = -sum(p log p), and of log p where it was chosen. The
        # quotient softmax / p is taken first, since it is bounded where 1 / p is not.
        d_p = -d_entropies.T[:, :, None] * (evaluation.log_p + 1) * softmax
        share = np.take_along_axis(softmax / np.maximum(evaluation.p, TINY), chosen, axis=2)
        picked = np.take_along_axis(d_p, chosen, axis=2) + d_log_probs.T[:, :, None] * share
        np.put_along_axis(d_p, chosen, picked, axis=2)
        d_logits: Floats = d_p - softmax * d_p.sum(axis=2, keepdims=True)
        d_logits *= 1 - self._uniform_share
        constant = self.config.tanh_constant
        if constant is not None:
            d_logits = d_logits * (constant * (1 - (evaluation.logits / constant) ** 2))
        return d_logits / self.config.temperature

    def _backward_lstm(self, evaluation: Evaluation, d_hidden: Floats) -> Floats:
        """Derivative by the gates before their nonlinearity, (decisions, n, 4 hidden)."""
        gates = evaluation.gates.reshape(*d_hidden.shape[:2], 4, -1)
        i, f, g, o = (gates[:, :, k] for k in range(4))
        tanh_cells = evaluation.tanh_cells
        # All that does not depend on the recursion, for all steps at once: the slopes of the
        # nonlinearities, times what each gate is multiplied by.
        d_gates = gates * (1 - gates)
        d_gates[:, :, 2] = 1 - g * g
        d_gates[:, :, 0] *= g
        d_gates[:, :, 1] *= evaluation.cells[:-1]
        d_gates[:, :, 2] *= i
        d_gates[:, :, 3] *= tanh_cells
        cell_share = o * (1 - tanh_cells * tanh_cells)
        flat = d_gates.reshape(*d_hidden.shape[:2], -1)
        transposed = np.ascontiguousarray(self.weights["hidden_weight"].T)
        d_h: Floats = np.zeros_like(tanh_cells[0])
        d_cell: Floats = np.zeros_like(d_h)
        for d in range(self.decisions - 1, -1, -1):
            d_h += d_hidden[d]
            d_cell += d_h * cell_share[d]
            d_gates[d, :, :3] *= d_cell[:, None]
            d_gates[d, :, 3] *= d_h
            d_cell *= f[d]
            d_h = flat[d] @ transposed
        return flat


class Adam:
    """Adam (Kingma & Ba, 2015) on one array, with the gradient's norm clipped first."""

    def __init__(self, parameters: Floats) -> None:
        self.steps = 0
        self.mean: Floats = np.zeros_like(parameters)
        self.square: Floats = np.zeros_like(parameters)

    def step(
        self, parameters: Floats, gradient: Floats, *, learning_rate: float, max_norm: float
    ) -> float:
        """Change `parameters` in place; return the gradient's norm before clipping."""
        norm = float(np.linalg.norm(gradient))
        if norm > max_norm:
            gradient = gradient * (max_norm / norm)
        self.steps += 1
        self.mean += (1 - BETA_1) * (gradient - self.mean)
        self.square += (1 - BETA_2) * (gradient * gradient - self.square)
        scale = np.sqrt(self.square / (1 - BETA_2**self.steps)) + EPSILON
        parameters -= learning_rate / (1 - BETA_1**self.steps) * self.mean / scale
        return norm

    def state(self) -> dict[str, Any]:
        """Return copies of the moments and the number of steps."""
        return {"mean": self.mean.copy(), "square": self.square.copy(), "steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave."""
        self.mean[...] = state["mean"]
        self.square[...] = state["square"]
        self.steps = int(state["steps"])


BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def _softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def _mix(softmax: Floats, uniform_share: float, uniform: NDArray[np.float64] | float) -> Floats:
    mixed = (1 - uniform_share) * softmax + uniform_share * uniform
    return mixed.astype(softmax.dtype, copy=False)


def _sigmoid(values: Floats) -> Floats:
    """Logistic function, in place; far out exp() overflows, and it is exactly 0."""
    np.negative(values, out=values)
    np.exp(values, out=values)
    values += 1
    return np.reciprocal(values, out=values)
