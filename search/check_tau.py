"""Kendall's tau of two rows of accuracies: its interval, and what noise alone would make of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Of an interval, and of the tau that noise allows.
RESAMPLES = 2000

Figures = NDArray[np.float64]


def kendall_tau(a: Figures, b: Figures) -> float | None:
    """Return Kendall's tau-b of two rows of figures, (n,) each; None if one of them is all ties.

    As scipy's, without its test of significance: it is asked for thousands of resamples.
    """
    rows, columns = np.triu_indices(len(a), 1)
    in_a, in_b = np.sign(a[rows] - a[columns]), np.sign(b[rows] - b[columns])
    untied = np.count_nonzero(in_a) * np.count_nonzero(in_b)
    return float(in_a @ in_b) / untied**0.5 if untied else None


def interval(
    a: Figures, b: Figures, rng: np.random.Generator
) -> tuple[float | None, float | None]:
    """Return the 95 % percentile interval of tau over networks drawn with replacement."""
    if kendall_tau(a, b) is None:
        return None, None
    draws = (rng.integers(len(a), size=len(a)) for _ in range(RESAMPLES))
    taus = [tau for rows in draws if (tau := kendall_tau(a[rows], b[rows])) is not None]
    low, high = np.quantile(taus, (0.025, 0.975))
    return float(low), float(high)


def accuracy_noise(
    accuracies: Figures, images: Sequence[int | None], seed_sd: float
) -> Figures | None:
    """Return the standard deviation of each accuracy: of its finite images and of its seed.

    Args:
        accuracies: Fractions, (n,).
        images: Held-out images of each.
        seed_sd: Standard deviation over seeds; 0 where it is not known.

    Returns:
        (n,), or None where a number of images is not known.
    """
    known = [n for n in images if n is not None]
    if len(known) < len(images):
        return None
    spread: Figures = np.sqrt(accuracies * (1 - accuracies) / np.array(known) + seed_sd**2)
    return spread


def tau_of_noise(
    proxies: Figures,
    fulls: Figures,
    proxy_sd: Figures | None,
    full_sd: Figures | None,
    rng: np.random.Generator,
) -> float | None:
    """Return the mean tau of a faultless proxy: the same accuracies in the full ones' order.

    Both rows are drawn anew with their noise. It is independent between networks here; on the
    same held-out images it partly is not, and takes less.

    Args:
        proxies: Accuracies, (n,).
        fulls: Accuracies, (n,).
        proxy_sd: Standard deviation of each, (n,); None: not known.
        full_sd: Likewise.
        rng: Of the draws.
    """
    if proxy_sd is None or full_sd is None or kendall_tau(proxies, fulls) is None:
        return None
    by_proxy = np.argsort(proxies, kind="stable")
    place = np.argsort(np.argsort(fulls, kind="stable"), kind="stable")
    order = by_proxy[place]
    taus = []
    for _ in range(RESAMPLES):
        faultless = rng.normal(proxies[order], proxy_sd[order])
        tau = kendall_tau(faultless, rng.normal(fulls, full_sd))
        if tau is not None:
            taus.append(tau)
    return statistics.fmean(taus) if taus else None
