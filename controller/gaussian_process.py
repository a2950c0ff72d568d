"""A Gaussian process over tokens: main effects and pairwise interactions, learned scales.

The prior is a functional ANOVA of order two (Duvenaud, Nickisch & Rasmussen, "Additive Gaussian
Processes", NeurIPS 2011): of `controller.tables`' form, with independent

    main_d ~ N(0, B_d),   pair_de ~ N(0, s * kron(B_d, B_e)),   constant ~ N(0, CONSTANT),
    B_d = ordinal_d * t t' + nominal_d * C

where t holds the ranks of a decision's choices, centred, and C is the centring matrix, each with
a mean diagonal of 1. So it is learned whether a decision matters and whether the order of its
choices means anything. Scales and noise maximise the marginal likelihood times a log-normal prior
(Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, equations 5.8 and 5.9).

With one-hot rows Z (n, width) and B = blockdiag(B_d), the kernel's matrix takes two products,
P = Z B Z' and Z (B o B) Z': sum_{d<e} z_d z_e = ((sum_d z_d)^2 - sum_d z_d^2) / 2. A sample of the
posterior is a table like any other function of the prior: drawn exactly, by Matheron's rule
(Wilson et al., "Efficiently Sampling Functions from Gaussian Process Posteriors", ICML 2020,
equation 8), and the same function wherever it is looked at.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # type: ignore[import-untyped]
from numpy.typing import NDArray

from controller.tables import Array, Layout, Tables

#: Prior variance of the constant; all variances are relative to that of the data.
CONSTANT = 4.0

#: The prior of a logarithmic scale: median and spread. The scales of the main effects share a
#: variance of 1 between them.
PAIR_PRIOR = (0.5, 1.5)
NOISE_PRIOR = (0.05, 2.0)
SCALE_SPREAD = 2.0

#: Bounds of `theta`; the noise's lower one keeps the kernel's matrix positive definite.
THETA_BOUNDS = (-14.0, 3.0)


class PairwiseProcess:
    """The posterior given noisy values at some tokens; first `fit`, then `condition`.

    Args:
        layout: Of the space.

    Attributes:
        theta: Natural logarithms, float64 (2 * decisions + 2,): ordinal_d, nominal_d, the pairs'
            scale s / decisions, the noise's variance. All that a later `fit` starts from.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        sizes = np.array(layout.num_choices)
        self._count = len(sizes)
        ranks = [np.arange(n) - (n - 1) / 2 for n in sizes]
        ranks = [rank / (rank.std() or 1.0) for rank in ranks]
        self._ordinal = scipy.linalg.block_diag(*[np.outer(rank, rank) for rank in ranks])
        self._nominal = scipy.linalg.block_diag(
            *[(np.eye(n) - 1 / n) * n / max(n - 1, 1) for n in sizes]
        )
        scales = np.full(2 * self._count, math.log(0.5 / self._count))
        self._prior_mean = np.array([*scales, math.log(PAIR_PRIOR[0]), math.log(NOISE_PRIOR[0])])
        self._prior_std = np.array(
            [*np.full(len(scales), SCALE_SPREAD), PAIR_PRIOR[1], NOISE_PRIOR[1]]
        )
        self.theta: Array = self._prior_mean.copy()
        self._one_hot: Array = np.zeros((0, layout.width))
        self._y: Array = np.zeros(0)
        self._mean, self._std = 0.0, 1.0

    def fit(self, one_hot: Array, values: Array, iterations: int) -> None:
        """Improve `theta` by so many steps of L-BFGS; the same start gives the same end."""
        # A third of a second, which every command that reads a campaign's settings would pay.
        from scipy.optimize import minimize  # type: ignore[import-untyped]

        _, _, y = _standardized(values)
        found = minimize(
            self.loss,
            self.theta,
            args=(one_hot, y),
            jac=True,
            method="L-BFGS-B",
            bounds=[THETA_BOUNDS] * len(self.theta),
            options={"maxiter": iterations, "maxfun": 2 * iterations},
        )
        self.theta = np.asarray(found.x, dtype=np.float64)

    def loss(self, theta: Array, one_hot: Array, y: Array) -> tuple[float, Array]:
        """Return minus the log of marginal likelihood times prior, up to a constant, and its
        gradient by `theta`, for standardized values (n,) at one-hot rows (n, width).
        """
        base, pair, noise = self._scales(theta)
        first, second = _orders(base, one_hot, one_hot)
        factor = _root(CONSTANT + first + pair * second, noise)
        alpha = scipy.linalg.cho_solve((factor, True), y, check_finite=False)
        gap = (theta - self._prior_mean) / self._prior_std
        loss = 0.5 * (y @ alpha + gap @ gap) + np.log(np.diag(factor)).sum()
        lower = np.tril(scipy.linalg.lapack.dpotri(factor, lower=1)[0])
        inverse = lower + np.tril(lower, -1).T
        slope = 0.5 * (inverse - np.outer(alpha, alpha))  # the derivative by the kernel's matrix
        d_base = one_hot.T @ (slope * (1 + pair * first)) @ one_hot
        d_base -= pair * base * (one_hot.T @ slope @ one_hot)
        gradient = gap / self._prior_std
        n, of = self._count, self._layout.decision
        for k, part in enumerate((self._ordinal, self._nominal)):
            by_decision = np.bincount(of, (d_base * part).sum(axis=1), n)
            gradient[k * n : (k + 1) * n] += np.exp(theta[k * n : (k + 1) * n]) * by_decision
        gradient[-2] += pair * float((slope * second).sum())
        gradient[-1] += noise * float(np.trace(slope))
        return float(loss), gradient

    def condition(self, one_hot: Array, values: Array) -> None:
        """Take the values (n,) at one-hot rows (n, width) as the data."""
        self._mean, self._std, self._y = _standardized(values)
        self._one_hot = one_hot
        self._base, self._pair, self._noise = self._scales(self.theta)
        first, second = _orders(self._base, one_hot, one_hot)
        self._factor = _root(CONSTANT + first + self._pair * second, self._noise)
        self._alpha = scipy.linalg.cho_solve((self._factor, True), self._y, check_finite=False)

    def mean(self) -> Tables:
        """Return the posterior's mean, one function."""
        return self._in_units(self._seen_through_data(self._alpha[:, None]))[0]

    def samples(self, scales: Array, rng: np.random.Generator) -> Tables:
        """Return samples of the posterior, whose deviations from its mean are scaled.

        Args:
            scales: (samples,), 1 for a sample proper, 0 for the mean.
            rng: Advances by the same number of draws for the same data's size.
        """
        prior = self._prior(len(scales), rng)
        errors = math.sqrt(self._noise) * rng.standard_normal((len(scales), len(self._y)))
        # Matheron: the prior's sample, less what the data would have told of it.
        residual = scipy.linalg.cho_solve((self._factor, True), -(prior(self._one_hot) + errors).T)
        weights = self._alpha[:, None] + scales * residual
        data = self._seen_through_data(weights)
        return self._in_units(
            Tables(
                data.constant + scales * prior.constant,
                data.main + scales[:, None] * prior.main,
                data.pair + scales[:, None, None] * prior.pair,
            )
        )

    def _scales(self, theta: Array) -> tuple[Array, float, float]:
        """B (width, width), s, the noise's variance."""
        n, of = self._count, self._layout.decision
        scale = np.exp(theta)
        ordinal, nominal = scale[:n][of, None], scale[n : 2 * n][of, None]
        base = ordinal * self._ordinal + nominal * self._nominal
        return base, float(scale[-2]) * n, float(scale[-1])

    def _prior(self, count: int, rng: np.random.Generator) -> Tables:
        n, of = self._count, self._layout.decision
        scale = np.exp(self.theta)
        # Roots of B's two parts, which are multiples of projections, side by side.
        sizes = np.array(self._layout.num_choices)[of]
        ordinal = np.sqrt(scale[:n])[of, None] * self._ordinal / np.sqrt(sizes)[:, None]
        norm = np.sqrt(np.maximum(sizes - 1, 1) / sizes)[:, None]
        nominal = np.sqrt(scale[n : 2 * n])[of, None] * self._nominal * norm
        root = scipy.sparse.csr_matrix(np.hstack([ordinal, nominal]))
        owner = np.concatenate([of, of])
        upper = owner[:, None] < owner[None, :]
        constant = math.sqrt(CONSTANT) * rng.standard_normal(count)
        main = (root @ rng.standard_normal((root.shape[1], count))).T
        pair = np.empty((count, self._layout.width, self._layout.width))
        for k in range(count):
            half = root @ (root @ np.where(upper, rng.standard_normal(upper.shape), 0.0)).T
            pair[k] = math.sqrt(self._pair) * (half + half.T)
        return Tables(constant, main, pair)

    def _seen_through_data(self, weights: Array) -> Tables:
        """The functions x -> sum_i k(x, x_i) weights_i, for weights (n, functions)."""
        base, rows = scipy.sparse.csr_matrix(self._base), scipy.sparse.csr_matrix(self._one_hot)
        main = (base @ (rows.T @ weights)).T
        pair = np.empty((weights.shape[1], self._layout.width, self._layout.width))
        for k, column in enumerate(weights.T):
            inner = rows.T @ (self._one_hot * column[:, None])  # symmetric, like B
            pair[k] = self._pair * (base @ (base @ inner).T)
        pair[:, self._layout.same] = 0.0
        return Tables(CONSTANT * weights.sum(axis=0), main, pair)

    def _in_units(self, tables: Tables) -> Tables:
        std = self._std
        return Tables(tables.constant * std + self._mean, tables.main * std, tables.pair * std)


def _standardized(values: Array) -> tuple[float, float, Array]:
    """Mean, spread (1 if there is none) and the values without them."""
    mean, std = float(values.mean()), float(values.std())
    if std <= 1e-12 * max(1.0, abs(mean)):
        std = 1.0
    return mean, std, (values - mean) / std


def _orders(base: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """The kernels of the main effects and of the pairs, (len(a), len(b)), for s = 1."""
    first = a @ base @ b.T
    second = 0.5 * (first * first - a @ (base * base) @ b.T)
    return first, second


def _root(kernel: Array, noise: float) -> NDArray[np.float64]:
    """The lower Cholesky factor of the kernel's matrix, which it overwrites, with the noise."""
    kernel[np.diag_indices(len(kernel))] += noise
    factor: Array = scipy.linalg.cholesky(kernel, lower=True, overwrite_a=True, check_finite=False)
    return factor
