"""Accel-NASBench as an evaluator: thousands of trials in seconds, without training or a device.

Upstream trained and timed 5,138 networks of a MnasNet-like space (`accel_nasbench_data`); a
surrogate predicts all others. Nothing is measured here, and nothing says so: the evaluator's
lines and the campaign's log speak of a surrogate.

Two backends. `fitted` is a ridge regression on products of decisions: of any two, because an
accuracy is nearly that, and of all within a block, because a latency is nearly a sum over the
blocks. Its scores on networks that it was not fitted to are logged. `harness` evaluates tree
ensembles that were prepared elsewhere, those of the runs that `benchmarks/search_efficiency.py`
compares with.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from search.accel_nasbench_data import data_files, read_networks, sha256
from search.evaluation import Evaluation, Evaluator
from search.objective import LATENCY
from space.architecture import Architecture
from space.errors import ConfigError, TrialFailed
from space.records import record
from space.search_space import SearchSpace, load_space
from space.tokens import Tokens

logger = logging.getLogger(__name__)

Device = Literal["a100", "3090", "tpuv2", "tpuv3", "zcu102", "vck190"]

#: Where the data are, if the configuration does not say.
FOLDER_VARIABLE = "MNAS_ACCEL_NASBENCH"
SPACE = "accel_nasbench"

#: Upstream's training of a network (github.com/afzalxo/ANB-DatasetCollection): 16 epochs of
#: ImageNet, 12 at 160 and 4 at 192 pixels; about 10 points below a full training.
EPOCHS = 16.0

#: Standard deviations between two trainings or timings of the same network, from the 13 networks
#: that upstream has twice: of the accuracy, and of the latency relative to it.
ACCURACY_NOISE = 0.0027
LATENCY_NOISE = {"a100": 0.0013, "zcu102": 0.0005, "tpuv2": 0.027}

#: Share of the networks that the scores are computed on, and the ridge's penalty: 0.03 or 1
#: change the held-out R2 of no figure by more than 0.002.
HELD_OUT = 0.1
PENALTY = 0.3

#: With fewer, the scores are of a handful.
LEAST_NETWORKS = 100


@record
class AccelNasBenchConfig:
    """A network's accuracy and latency as a surrogate of Accel-NASBench predicts them.

    Attributes:
        data: Upstream's `anb_dataset_jsons.tar.gz`, or a folder; None takes the environment's
            MNAS_ACCEL_NASBENCH. A resolved configuration has the absolute path.
        device: Whose latency is `latency_ms`.
        other_devices: Those whose latency is recorded as `latency_ms:DEVICE`.
        backend: `fitted`: a model fitted to the data, in about two seconds. `harness`: the tree
            ensembles `surr/*.npz` in the folder.
        noise: Whether the trial's seed adds what two trainings of a network differ by.
        sha256: Of the data; other data are refused. None takes what is there, and a resolved
            configuration has it.
    """

    name: Literal["accel_nasbench"]
    data: str | None = None
    device: Device = "a100"
    other_devices: tuple[Device, ...] = ()
    backend: Literal["fitted", "harness"] = "fitted"
    noise: bool = False
    sha256: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.devices)) != len(self.devices):
            raise ValueError(f"other_devices must be others, but got {list(self.other_devices)}")
        unknown = [device for device in self.devices if device not in LATENCY_NOISE]
        if self.noise and unknown:
            raise ValueError(
                f"noise must be false for {unknown[0]}, whose noise is unknown, but got true"
            )

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, the one of `latency_ms` first."""
        return (self.device, *self.other_devices)


def resolve(config: AccelNasBenchConfig) -> AccelNasBenchConfig:
    """Return the configuration with the data's path and SHA-256, if it is said where they are.

    Raises:
        ConfigError: There are no data.
    """
    where = config.data or os.environ.get(FOLDER_VARIABLE)
    if not where:
        return config
    path = Path(where).expanduser().resolve()
    digest = config.sha256 or sha256(_files(config, path), path)
    return replace(config, data=str(path), sha256=digest)


def _files(config: AccelNasBenchConfig, path: Path) -> list[Path]:
    """The files that the backend reads."""
    try:
        path.stat()
    except OSError as error:
        raise ConfigError(
            f"evaluator.data: must exist, but got {str(path)!r} ({error.strerror})."
        ) from None
    if config.backend == "fitted":
        return data_files(path)
    folder = path / "surr" if (path / "surr").is_dir() else path
    files = [folder / f"{name}.npz" for name in ("top1", *(f"lat_{d}" for d in config.devices))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"evaluator.data: must hold surr/{missing[0]} for backend harness, but {str(path)!r}"
            " does not; take backend fitted."
        )
    return files


class AccelNasBenchEvaluator(Evaluator):
    """Predicts accuracy and latency; the same network and seed give the same figures.

    Raises:
        ConfigError: The configuration does not say where the data are.
    """

    def __init__(self, config: AccelNasBenchConfig) -> None:
        self._config = resolve(config)
        if self._config.data is None:
            raise ConfigError(
                "evaluator.data: must name Accel-NASBench's data, but got null; give"
                f" evaluator.data=DIR or set {FOLDER_VARIABLE} (see docs/accel-nasbench.md)."
            )
        self._space = load_space(SPACE)
        self._names = [LATENCY, *(f"{LATENCY}:{name}" for name in config.other_devices)]

    @property
    def epochs(self) -> float:
        """Upstream's 16."""
        return EPOCHS

    def warm_up(self) -> None:
        """Read the data and fit the surrogate; log what it is."""
        for label, text in self.about():
            logger.info("%s: %s", label, text)

    def about(self) -> list[tuple[str, str]]:
        """Say what predicts, from which data, how well."""
        config = self._config
        return [
            ("surrogate", f"{config.backend}; {_surrogate(config).about}; nothing is measured"),
            ("data", f"{config.data}, sha256 {config.sha256}"),
        ]

    def check(self, space: SearchSpace) -> None:
        """Refuse data that cannot be used, and a space with networks outside the benchmark's.

        Raises:
            ConfigError: One of these.
        """
        _surrogate(self._config)
        try:
            self._space.encode(space.decode((0,) * len(space.decisions)))
        except ValueError as error:
            raise ConfigError(
                f"space: must be within {SPACE} for its evaluator: {error}."
            ) from None
        filters = self._space.config.stem
        for index, block in enumerate(self._space.config.blocks):
            known = self._space.block_choices(index, filters)
            others = [b for b in space.block_choices(index, filters) if b not in known]
            if others:
                raise ConfigError(
                    f"space: must be within {SPACE} for its evaluator, but its block {index} may"
                    f" be {others[0]}; set space.name={SPACE}."
                )
            assert isinstance(block.filters, int)  # the benchmark's widths are fixed
            filters = block.filters

    def metrics(self, architecture: Architecture) -> dict[str, float]:
        """Return the predicted latencies, without noise."""
        return self._named(self._predict(architecture)[1:])

    def evaluate(
        self, architecture: Architecture, *, seed: int, time_limit_s: float
    ) -> Evaluation:
        """Return the predicted accuracy and latencies."""
        predicted = self._predict(architecture)
        if self._config.noise:
            sd = [LATENCY_NOISE[device] for device in self._config.devices]
            draws = np.random.default_rng(seed).normal(size=len(predicted))
            predicted[0] += ACCURACY_NOISE * draws[0]
            predicted[1:] *= np.exp(sd * draws[1:])
        return Evaluation(
            accuracy=float(np.clip(predicted[0], 0.0, 1.0)),
            metrics=self._named(predicted[1:]),
            epochs=EPOCHS,
        )

    def _predict(self, architecture: Architecture) -> NDArray[np.float64]:
        try:
            tokens = self._space.encode(architecture)
        except ValueError as error:
            raise TrialFailed(f"Accel-NASBench does not know the network: {error}") from error
        return _surrogate(self._config).predict(tokens)

    def _named(self, latencies: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self._names, latencies.tolist(), strict=True))


# ---------------------------------------------------------------------------- surrogates


class _Surrogate(Protocol):
    """Predicts the accuracy (a fraction) and then each device's latency in ms."""

    about: str

    def predict(self, tokens: Tokens) -> NDArray[np.float64]:
        """Return the predictions, float64, (1 + devices,)."""


@functools.lru_cache(maxsize=4)
def _surrogate(config: AccelNasBenchConfig) -> _Surrogate:
    """The surrogate of a resolved configuration, made once in a process."""
    assert config.data is not None  # it is resolved
    path = Path(config.data)
    files = _files(config, path)
    found = sha256(files, path)
    if found != config.sha256:
        raise ConfigError(
            f"evaluator.sha256: must be that of the data, {found}, but got {config.sha256!r};"
            " these are other data than the campaign's."
        )
    return _Fitted(path, config.devices) if config.backend == "fitted" else _Trees(files)


@dataclass(frozen=True, slots=True)
class _Features:
    """Products of indicators that a decision has another than its first choice.

    Attributes:
        decision: int64, (indicators,): whose each indicator is, and
        choice: int64, (indicators,): for which choice.
        terms: int64, (features, 4): indicators of each product; one more is always true.
    """

    decision: NDArray[np.int64]
    choice: NDArray[np.int64]
    terms: NDArray[np.int64]

    def __call__(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the features, float64, (n, features), of tokens, int64, (n, decisions)."""
        hot = tokens[:, self.decision] == self.choice
        hot = np.concatenate([hot, np.ones((len(hot), 1), bool)], axis=1)
        products: NDArray[np.float64] = hot[:, self.terms].all(axis=2).astype(np.float64)
        return products


def _make_features(space: SearchSpace) -> _Features:
    """All products of at most two decisions, and of all of a block's own."""
    own = [(d, c) for d, n in enumerate(space.num_choices) for c in range(1, n)]
    block = [space.decisions[d].block_index for d, _ in own]
    terms = [
        term
        for size in (1, 2, 3, 4)
        for term in itertools.combinations(range(len(own)), size)
        if len({own[i][0] for i in term}) == size
        and (size <= 2 or len({block[i] for i in term}) == 1)
    ]
    padded = [(*term, *[len(own)] * (4 - len(term))) for term in terms]
    decision, choice = np.array(own, np.int64).T
    return _Features(decision, choice, np.array(padded, np.int64))


class _Fitted:
    """A ridge regression of each figure on all networks, scored before without a tenth of them."""

    def __init__(self, path: Path, devices: Sequence[str]) -> None:
        networks = read_networks(path, devices)
        self._features = _make_features(load_space(SPACE))
        features = self._features(networks.tokens)
        order = np.random.default_rng(0).permutation(len(features))
        figures = {"accuracy": networks.accuracy, **networks.latency_ms}
        fits = {name: _fit(features, values, order) for name, values in figures.items()}
        self._intercepts = np.array([fit.intercept for fit in fits.values()])
        self._weights = np.stack([fit.weights for fit in fits.values()], axis=1)
        scores = "; ".join(f"{name} {fit.scores}" for name, fit in fits.items())
        self.about = f"from {len(features):,} networks; on a held-out tenth: {scores}"

    def predict(self, tokens: Tokens) -> NDArray[np.float64]:
        present = self._features(np.array([tokens]))[0] > 0
        predicted: NDArray[np.float64] = self._weights[present].sum(axis=0) + self._intercepts
        return predicted


@dataclass(frozen=True, slots=True)
class _Fit:
    """A figure's model: intercept + features @ weights."""

    intercept: float
    weights: NDArray[np.float64]
    scores: str


def _fit(
    features: NDArray[np.float64], values: NDArray[np.float64], order: NDArray[np.int64]
) -> _Fit:
    """Fit a figure; `order` has the held-out networks first, missing values are left out."""
    from scipy.stats import kendalltau  # type: ignore[import-untyped]
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    order = order[np.isfinite(values[order])]
    if len(order) < LEAST_NETWORKS:
        raise ConfigError(
            f"evaluator.data: must hold {LEAST_NETWORKS} networks to fit to, but has {len(order)}."
        )
    held_out, rest = np.split(order, [round(HELD_OUT * len(order))])
    model = Ridge(PENALTY, solver="cholesky")
    # Sums depend on how many threads make them; the libraries that make them are loaded by now.
    with threadpool_limits(limits=1):
        guessed = model.fit(features[rest], values[rest]).predict(features[held_out])
        model.fit(features[order], values[order])
    true = values[held_out]
    scores = f"R2 {r2_score(true, guessed):.4f}, tau {kendalltau(true, guessed)[0]:.3f}"
    return _Fit(float(model.intercept_), model.coef_, scores)


#: Where the harness has a block's expansion, kernel, layers and squeeze-and-excitation, the space
#: has operation, kernel, squeeze-and-excitation and layers.
_HARNESS_ORDER = [4 * block + k for block in range(7) for k in (0, 1, 3, 2)]


class _Trees:
    """Tree ensembles that were fitted elsewhere, one file for each figure."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._ensembles = [_Ensemble(file) for file in files]
        self.about = "tree ensembles that were fitted elsewhere"

    def predict(self, tokens: Tokens) -> NDArray[np.float64]:
        x = np.array(tokens)[_HARNESS_ORDER]
        percent, *latencies = (ensemble.predict(x) for ensemble in self._ensembles)
        return np.array([percent / 100, *latencies])


class _Ensemble:
    """The mean of a few sums of trees with at most 16 leaves.

    A leaf is a bit of 16. A test that fails leaves the bits of its mask only; the lowest bit that
    all tests of a tree leave is its leaf.
    """

    def __init__(self, file: Path) -> None:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                order = np.argsort(arrays["node_tree"], kind="stable")
                self._starts = np.unique(arrays["node_tree"][order], return_index=True)[1]
                self._decision, self._threshold, self._mask = (
                    arrays[name][order] for name in ("node_feat", "node_thr", "node_mask")
                )
                self._leaves: NDArray[np.float64] = arrays["leaf"].astype(np.float64)
                self._members = int(arrays["n_members"])
                self._log = bool(arrays["log"])
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{file}: must hold a tree ensemble: {error}.") from error

    def predict(self, x: NDArray[np.int64]) -> float:
        """Return the prediction for choices (28,) in the harness's order."""
        fails = x[self._decision] > self._threshold
        masks = np.where(fails, self._mask, np.uint16(0xFFFF))
        left = np.bitwise_and.reduceat(masks, self._starts).astype(np.int64)
        leaf = np.log2(left & -left).astype(np.int64)
        values = self._leaves[np.arange(len(leaf)), leaf].reshape(self._members, -1).sum(axis=1)
        mean = float(values.mean())
        return math.exp(mean) if self._log else mean
