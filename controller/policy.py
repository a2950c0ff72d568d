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


class Tape:
    """What a forward pass notes down, and room for the backward pass.

    Trials are the last axis: with the weights as left operands BLAS is faster, and each gate's
    part of an array is contiguous.
    """

    def __init__(
        self, decisions: int, choices: int, size: int, n: int, parameters: Floats
    ) -> None:
        """Make the arrays for `n` trials of an LSTM with `size` hidden units."""
        dtype = parameters.dtype
        # A step's input: the hidden state, and the choice before as one-hot rows. Before the
        # first decision it is choice 0, see LSTMPolicy._embedded.
        self.inputs: Floats = np.zeros((size + choices, decisions + 1, n), dtype)
        self.hidden, self.one_hot = self.inputs[:size], self.inputs[size:]
        self.one_hot[0, 0] = 1
        # Input, forget, candidate, output.
        self.gates: Floats = np.empty((decisions, 4, size, n), dtype)
        self.cells: Floats = np.zeros((decisions + 1, size, n), dtype)
        self.tanh_cells: Floats = np.empty((decisions, size, n), dtype)
        # The backward pass's own.
        self.slopes: Floats = np.empty_like(self.gates)
        self.cell_slopes: Floats = np.empty_like(self.tanh_cells)
        self.d_gates: Floats = np.empty((4 * size, decisions, n), dtype)
        self.gradient: Floats = np.empty_like(parameters)


class Evaluation:
    """What the policy says of tokens.

    Attributes:
        tokens: int64, (n, decisions).
        log_probs: (n, decisions), natural logarithm of each choice's probability given the
            choices before it.
        entropies: (n, decisions), nats, of the distribution that each choice is drawn from.
    """

    def __init__(
        self,
        tokens: Ints,
        tape: Tape,
        logits: Floats,
        mask: NDArray[np.bool_],
        uniform_share: float,
    ) -> None:
        self.tokens = tokens
        self.tape = tape
        self.logits = logits  # (decisions, choices, n), padded
        self.softmax = _softmax(np.where(mask, logits, -np.inf))
        self.p = _mix(self.softmax, uniform_share, mask / mask.sum(axis=1, keepdims=True))
        # Padding has p = 0, and so may a choice that the policy has ruled out.
        self.log_p = np.log(np.maximum(self.p, TINY))
        self.chosen = tape.one_hot[:, 1:].transpose(1, 0, 2)
        self.log_probs: Floats = (self.log_p * self.chosen).sum(axis=1).T
        self.entropies: Floats = -(self.p * self.log_p).sum(axis=1).T

    @property
    def log_prob(self) -> NDArray[np.float64]:
        """The log-probability of each trial's tokens, float64 (n,)."""
        return np.asarray(self.log_probs.sum(axis=1, dtype=np.float64))


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
        self._choices = np.arange(choices)[:, None]
        self._mask = self._choices < np.array(self.num_choices)[:, None, None]
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
        #: Mean entropy per decision of the uniform distribution, nats.
        self.max_entropy = float(np.mean(np.log(self.num_choices)))
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

    @np.errstate(over="ignore")  # see _sigmoid; entered once, since it is slow
    def sample(
        self, n: int, rng: np.random.Generator, *, reuse: Evaluation | None = None
    ) -> Evaluation:
        """Draw tokens for `n` trials; `evaluate` would return the same about them.

        Args:
            n: Number of trials.
            rng: What to draw with.
            reuse: An evaluation that is not needed any more: if it is of as many trials, its tape
                is overwritten, since fresh memory costs as much as the arithmetic on it.
        """
        uniform = rng.random((self.decisions, n))
        tokens = np.empty((n, self.decisions), dtype=np.int64)
        tape = self._tape(n, reuse)
        output_weight, output_bias = self.weights["output_weight"], self.weights["output_bias"]
        weight, tables = self._fused()
        for d, choices in enumerate(self.num_choices):
            hidden = self._step(tape, d, weight, tables[d])
            logits = output_weight[d, :, :choices].T @ hidden + output_bias[d, :, :choices].T
            p = _mix(_softmax(self._bound(logits)), self._uniform_share, 1 / choices)
            cumulative = p.cumsum(axis=0, dtype=np.float64)
            # The last sum is left out of the comparison: no draw can fall beyond the last choice.
            tokens[:, d] = (uniform[d] * cumulative[-1] >= cumulative[:-1]).sum(axis=0)
            tape.one_hot[:, d + 1] = tokens[:, d] == self._choices
        return self._evaluation(tokens, tape)

    @np.errstate(over="ignore")
    def evaluate(self, tokens: Ints, *, reuse: Evaluation | None = None) -> Evaluation:
        """Return log-probabilities and entropies of `tokens`, int64 (n, decisions).

        Args:
            tokens: What to evaluate.
            reuse: As in `sample`.
        """
        tape = self._tape(len(tokens), reuse)
        tape.one_hot[:, 1:] = tokens.T == self._choices[:, None]
        weight, tables = self._fused()
        for d in range(self.decisions):
            self._step(tape, d, weight, tables[d])
        return self._evaluation(tokens, tape)

    def backward(self, evaluation: Evaluation, d_log_probs: Floats, d_entropies: Floats) -> Floats:
        """Return the gradient of a loss with respect to `parameters`, laid out like them.

        Args:
            evaluation: Of the tokens that the loss is about, under the present parameters. Its
                next use overwrites the gradient, too.
            d_log_probs: (n, decisions), derivative of the loss by each `log_probs`.
            d_entropies: (n, decisions), derivative of the loss by each `entropies`.
        """
        tape = evaluation.tape
        grads = self.views(tape.gradient)
        d_logits = self._backward_softmax(evaluation, d_log_probs, d_entropies)
        after = tape.hidden[:, 1:].transpose(1, 0, 2)
        np.matmul(after, d_logits.transpose(0, 2, 1), out=grads["output_weight"])
        grads["output_bias"][...] = d_logits.sum(axis=2)[:, None]
        self._backward_lstm(tape, np.matmul(self.weights["output_weight"], d_logits))

        d_gates = tape.d_gates.reshape(len(tape.d_gates), -1)  # (4 hidden, decisions * n)
        before = tape.hidden.reshape(len(tape.hidden), -1)[:, : d_gates.shape[1]]
        np.matmul(before, d_gates.T, out=grads["hidden_weight"])
        one_hot = tape.one_hot[:, :-1].transpose(1, 0, 2)
        d_rows = np.matmul(one_hot, tape.d_gates.transpose(1, 2, 0)).reshape(-1, len(d_gates))
        d_rows.sum(axis=0, out=grads["gate_bias"])  # every trial made one choice
        embedded = self._embedded()
        np.matmul(embedded.reshape(len(d_rows), -1).T, d_rows, out=grads["input_weight"])
        d_embedded = (d_rows @ self.weights["input_weight"].T).reshape(embedded.shape)
        d_embedded[0].sum(axis=0, out=grads["start"])
        grads["embedding"][...] = d_embedded[1:]
        return tape.gradient

    # ------------------------------------------------------------------ parts of both passes

    def _embedded(self) -> Floats:
        """What each choice before each decision is to the LSTM, (decisions, choices, embedding).

        Before the first decision all choices stand for the start.
        """
        start, embedding = self.weights["start"], self.weights["embedding"]
        first = np.broadcast_to(start, (1, len(self._choices), len(start)))
        return np.concatenate([first, embedding])

    def _fused(self) -> tuple[Floats, Floats]:
        """The weights by which one product gives all of a step's gates.

        Returns:
            (4 hidden, hidden + choices), whose last columns are still empty, and what belongs
            there at each decision, (decisions, 4 hidden, choices): the share of the choice before
            in the gates, and the bias.
        """
        hidden_weight, input_weight = self.weights["hidden_weight"], self.weights["input_weight"]
        embedded = self._embedded()
        rows = embedded.reshape(-1, len(input_weight)) @ input_weight + self.weights["gate_bias"]
        weight = np.empty((rows.shape[1], len(hidden_weight) + len(self._choices)), rows.dtype)
        weight[:, : len(hidden_weight)] = hidden_weight.T
        return weight, rows.reshape(*embedded.shape[:2], -1).transpose(0, 2, 1)

    def _tape(self, n: int, reuse: Evaluation | None) -> Tape:
        if reuse is not None and len(reuse.tokens) == n:
            return reuse.tape
        size = self.config.hidden_size
        return Tape(self.decisions, len(self._choices), size, n, self.parameters)

    def _step(self, tape: Tape, d: int, weight: Floats, table: Floats) -> Floats:
        """Go on to decision `d`; return the hidden state that its choice is made from."""
        weight[:, self.config.hidden_size :] = table
        gates = tape.gates[d]
        np.matmul(weight, tape.inputs[:, d], out=gates.reshape(len(weight), -1))
        i, f, g, o = gates
        g *= 2  # tanh(x) = 2 sigmoid(2 x) - 1: one exponential serves all four gates
        _sigmoid(gates)
        g *= 2
        g -= 1
        cell, tanh_cell = tape.cells[d + 1], tape.tanh_cells[d]
        np.multiply(f, tape.cells[d], out=cell)
        cell += i * g
        np.tanh(cell, out=tanh_cell)
        hidden = tape.hidden[:, d + 1]
        np.multiply(o, tanh_cell, out=hidden)
        return hidden

    def _evaluation(self, tokens: Ints, tape: Tape) -> Evaluation:
        output_weight = self.weights["output_weight"].transpose(0, 2, 1)
        logits = np.matmul(output_weight, tape.hidden[:, 1:].transpose(1, 0, 2))
        logits = self._bound(logits + self.weights["output_bias"].transpose(0, 2, 1))
        return Evaluation(tokens, tape, logits, self._mask, self._uniform_share)

    def _bound(self, logits: Floats) -> Floats:
        if self.config.temperature != 1:
            logits = logits / self.config.temperature
        if self.config.tanh_constant is not None:
            logits = self.config.tanh_constant * np.tanh(logits)
        return logits

    def _backward_softmax(
        self, evaluation: Evaluation, d_log_probs: Floats, d_entropies: Floats
    ) -> Floats:
        """Derivative by the raw logits, (decisions, choices, n)."""
        softmax = evaluation.softmax
        # By p, times the softmax: of log p where it was chosen, and of H = -sum(p log p). The
        # quotient softmax / p is taken first, since it is bounded where 1 / p is not.
        share = evaluation.chosen * (softmax / np.maximum(evaluation.p, TINY))
        d_p = d_log_probs.T[:, None] * share
        d_p -= d_entropies.T[:, None] * (evaluation.log_p + 1) * softmax
        d_logits: Floats = d_p - softmax * d_p.sum(axis=1, keepdims=True)
        d_logits *= 1 - self._uniform_share
        constant = self.config.tanh_constant
        if constant is not None:
            d_logits = d_logits * (constant * (1 - (evaluation.logits / constant) ** 2))
        return d_logits / self.config.temperature

    def _backward_lstm(self, tape: Tape, d_hidden: Floats) -> None:
        """Put the derivative by the gates before their nonlinearity into `tape.d_gates`.

        `d_hidden`, (decisions, hidden, n), is what each step's logits ask of its hidden state.
        """
        tanh_cells, slopes, cell_slopes = tape.tanh_cells, tape.slopes, tape.cell_slopes
        i, f, g, o = (tape.gates[:, k] for k in range(4))
        # All that does not depend on the recursion, for all steps at once: the slopes of the
        # nonlinearities, times what each gate is multiplied by.
        np.subtract(1, tape.gates, out=slopes)
        slopes *= tape.gates
        slopes[:, 0] *= g
        slopes[:, 1] *= tape.cells[:-1]
        slopes[:, 2] = (1 - g * g) * i
        slopes[:, 3] *= tanh_cells
        np.multiply(tanh_cells, tanh_cells, out=cell_slopes)
        np.subtract(1, cell_slopes, out=cell_slopes)
        cell_slopes *= o
        d_h: Floats = np.zeros_like(tanh_cells[0])
        d_cell: Floats = np.zeros_like(d_h)
        for d in range(self.decisions - 1, -1, -1):
            d_h += d_hidden[d]
            d_cell += d_h * cell_slopes[d]
            d_gates = slopes[d]
            d_gates[:3] *= d_cell
            d_gates[3] *= d_h
            d_cell *= f[d]
            flat = d_gates.reshape(len(tape.d_gates), -1)
            d_h = self.weights["hidden_weight"] @ flat
            tape.d_gates[:, d] = flat


class Adam:
    """Adam (Kingma & Ba, 2015) on one array, with the gradient's norm clipped first."""

    def __init__(self, parameters: Floats) -> None:
        self.steps = 0
        self.mean: Floats = np.zeros_like(parameters)
        self.square: Floats = np.zeros_like(parameters)
        self._gradient: Floats = np.empty_like(parameters)
        self._change: Floats = np.empty_like(parameters)

    def step(
        self, parameters: Floats, gradient: Floats, *, learning_rate: float, max_norm: float
    ) -> float:
        """Change `parameters` in place; return the gradient's norm before clipping."""
        norm = float(np.linalg.norm(gradient))
        clipped, change = self._gradient, self._change  # made once, as a tape is
        np.multiply(gradient, min(1.0, max_norm / max(norm, TINY)), out=clipped)
        self.steps += 1
        np.subtract(clipped, self.mean, out=change)
        change *= 1 - BETA_1
        self.mean += change
        clipped *= clipped
        np.subtract(clipped, self.square, out=change)
        change *= 1 - BETA_2
        self.square += change
        scale = clipped
        np.divide(self.square, 1 - BETA_2**self.steps, out=scale)
        np.sqrt(scale, out=scale)
        scale += EPSILON
        np.multiply(self.mean, learning_rate / (1 - BETA_1**self.steps), out=change)
        change /= scale
        parameters -= change
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
    """Probabilities over the last axis but one, the choices'."""
    raised = np.exp(logits - logits.max(axis=-2, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-2, keepdims=True))


def _mix(softmax: Floats, uniform_share: float, uniform: NDArray[np.float64] | float) -> Floats:
    mixed = (1 - uniform_share) * softmax + uniform_share * uniform
    return mixed.astype(softmax.dtype, copy=False)


def _sigmoid(values: Floats) -> Floats:
    """Logistic function, in place; far out exp() overflows, and it is exactly 0."""
    np.negative(values, out=values)
    np.exp(values, out=values)
    values += 1
    return np.reciprocal(values, out=values)
