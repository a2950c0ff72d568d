"""How well short trainings rank networks: a few of a space, trained as children and in full.

    spread(space, seed, number)                networks from the smallest to the largest
    open_ranking(config, number, path, ...)    their trainings, kept in a file as they end
    ranking.report()                           Kendall's tau of the two accuracies, its interval

The proxy accuracy is the evaluator's, the full one that of `retrain.recipe` on its held-out
images. Full trainings take hours: what was trained before is taken from the file, and the one that
was killed goes on from its last epoch, whose state is in a folder beside the file.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np

from search.accel_nasbench import AccelNasBenchConfig
from search.check import can_evaluate, lacks, look, parts_here
from search.check_brief import Brief, evaluate_brief, train_fully
from search.check_tau import accuracy_noise, interval, kendall_tau, tau_of_noise
from search.config import (
    CampaignConfig,
    PluginConfig,
    RetrainConfig,
    SyntheticEvaluatorConfig,
    config_to_plain,
    differences,
    may_change,
)
from search.extremes import extreme_network
from search.loop import stream, trial_seed
from space.architecture import Architecture
from space.cost import Cost, count
from space.errors import ConfigError, FailureCause
from space.files import write_atomically
from space.records import build, read_text, record, to_plain
from space.search_space import SearchSpace
from space.tokens import uniform_tokens

#: Fewer networks say nothing of a ranking.
MIN_NETWORKS = 4
#: Under this tau a search mistakes good networks for bad ones too often.
GOOD_TAU = 0.65
#: Networks drawn at random, from which those with the wanted multiply-adds are taken.
DRAWN = 300
#: The random streams of a ranking, beside those of a campaign (0 to 3) and of a check (4).
DRAWING, PROXY, FULL, REPEAT, RESAMPLING = 5, 6, 7, 8, 9

Kind = Literal["proxy", "full"]


@record
class Task:
    """A training that a ranking wants.

    Attributes:
        kind: `proxy`: by the evaluator, as a child; `full`: by the full recipe.
        seed: Of the training, 0 to 2**32 - 1.
    """

    kind: Kind
    architecture: Architecture
    seed: int


@record
class Training:
    """A training that has ended; the file of a ranking holds them.

    Attributes:
        accuracy: Fraction on held-out images; None if it failed.
        validation_images: How many these are; None where the evaluator does not tell.
        seconds: Since it last went on, with the start of its process.
        failure: Why there is no accuracy.
        cause: Of the failure; `infrastructure` (its process died): not kept, so that the next run
            tries it again.
    """

    kind: Kind
    architecture: str
    architecture_hash: str
    seed: int
    accuracy: float | None
    validation_images: int | None
    seconds: float
    failure: str | None
    cause: FailureCause | None


@record
class RankingFile:
    """What a ranking keeps.

    Attributes:
        settings: What its accuracies depend on; trainings of other settings are refused.
        trainings: In the order in which they ended.
    """

    settings: dict[str, Any]
    trainings: tuple[Training, ...]


@record
class RankedNetwork:
    """A network and its two accuracies.

    Attributes:
        proxy_accuracy: The evaluator's, fraction; None: failed, or not trained yet.
        full_accuracy: Of the full training, fraction; likewise.
        proxy_s: Of the evaluation.
        full_s: Of the full training.
        failure: Why an accuracy is missing; the network is then left out of tau.
    """

    architecture: str
    architecture_hash: str
    parameters: int
    macs: int
    proxy_accuracy: float | None
    full_accuracy: float | None
    proxy_s: float | None
    full_s: float | None
    failure: str | None


@record
class RankReport:
    """How well the proxy ranks.

    Attributes:
        file: Where the trainings are kept.
        networks: By multiply-adds, smallest first.
        ranked: How many have both accuracies.
        tau: Kendall's tau-b of the two accuracies, -1 to 1; None of fewer than 4 networks, or
            where one of the accuracies is the same for all.
        tau_low: Of the 95 % bootstrap interval over networks.
        tau_high: Likewise.
        tau_macs: Of the multiply-adds and the full accuracies: what ranks without any training.
        tau_noise: Mean tau that a proxy would show which ranks exactly as the full training does,
            were its accuracies as far apart and as noisy: what noise alone takes from 1. None
            where the number of held-out images is not known.
        seed_accuracies: Proxy accuracies of one network with different seeds, fractions.
        seed_sd: Their standard deviation; None of fewer than two.
        good_tau: Under this a search is misled.
        seconds: Of all trainings.
    """

    file: str
    networks: tuple[RankedNetwork, ...]
    ranked: int
    tau: float | None
    tau_low: float | None
    tau_high: float | None
    tau_macs: float | None
    tau_noise: float | None
    seed_accuracies: tuple[float, ...]
    seed_sd: float | None
    good_tau: float
    seconds: float


# ---------------------------------------------------------------------------- networks


def spread(space: SearchSpace, seed: int, number: int) -> list[Architecture]:
    """Return different networks, spread evenly over the ranks of multiply-adds.

    Of some hundred random networks and the space's smallest and largest, sorted: the smallest,
    the largest, the middle, the quarters, the eighths, ... Any first few are spread, too, so that
    a larger `number` adds networks to those of a smaller one.

    Args:
        space: The space.
        seed: 0 to 2**63 - 1.
        number: 2 at least.

    Raises:
        ConfigError: Fewer different networks were drawn.
    """
    rng = np.random.default_rng(stream(seed, DRAWING, 0))
    drawn = [space.decode(uniform_tokens(space.num_choices, rng)) for _ in range(DRAWN)]
    networks = {n.hash: n for n in (extreme_network(space, -1), extreme_network(space, 1), *drawn)}
    by_macs = sorted(networks.values(), key=lambda network: (count(network).macs, network.hash))
    if number > len(by_macs):
        raise ConfigError(
            f"--rank: must be at most {len(by_macs)}, the different networks among {DRAWN} drawn,"
            f" but got {number}."
        )
    places = (round(share * (len(by_macs) - 1)) for share in _shares())
    # Two shares may fall on one place; in the end every place is met.
    distinct: dict[int, Architecture] = {}
    while len(distinct) < number:
        place = next(places)
        distinct[place] = by_macs[place]
    return list(distinct.values())


def _shares() -> Iterator[float]:
    """0, 1, 1/2, 1/4, 3/4, 1/8, ...: then the binary digits of 1, 2, 3, ... after the point."""
    yield from (0.0, 1.0)
    for number in itertools.count(1):
        digits = f"{number:b}"[::-1]
        yield int(digits, 2) / 2 ** len(digits)


# ---------------------------------------------------------------------------- trainings


class Ranking:
    """Networks, the trainings wanted of them and those that have ended.

    Args:
        config: Of the campaign.
        networks: See `spread`; 4 at least.
        path: Where the trainings are kept.
        kept: What it holds.
        repeats: Seeds of the middle network's proxy; 0: its own alone.

    Attributes:
        path: As given.
        states: Folder of the states that killed full trainings go on from.
        networks: As given.
    """

    def __init__(
        self,
        config: CampaignConfig,
        networks: Sequence[Architecture],
        path: Path,
        kept: RankingFile,
        repeats: int,
    ) -> None:
        self.path = path
        self.states = path.with_suffix(".states")
        self.networks = tuple(networks)
        self._config = config
        self._full = _full_training(config)
        self._settings = kept.settings
        self._ended = {(t.kind, t.architecture_hash, t.seed): t for t in kept.trainings}
        #: Seconds by kind of training, as far as a few steps tell them, of the middle network.
        self._tried: dict[Kind, float] = {}
        self._middle = networks[2]
        self._pairs = [
            (
                Task("proxy", network, trial_seed(config.seed, index, PROXY)),
                Task("full", network, trial_seed(config.seed, index, FULL)),
            )
            for index, network in enumerate(networks)
        ]
        self._repeats = [
            Task("proxy", self._middle, trial_seed(config.seed, index, REPEAT))
            for index in range(repeats - 1)
        ]

    @property
    def all(self) -> int:
        """Number of trainings, those that have ended among them."""
        return 2 * len(self._pairs) + len(self._repeats)

    def left(self) -> list[Task]:
        """Return what is to be trained, in this order.

        A network that failed as a child cannot be ranked, and is not trained in full.
        """
        wanted = []
        for child, full in self._pairs:
            ended = self._training(child)
            if ended is None:
                wanted.append(child)
            if self._training(full) is None and (ended is None or ended.failure is None):
                wanted.append(full)
        return [*wanted, *(task for task in self._repeats if self._training(task) is None)]

    def _training(self, task: Task) -> Training | None:
        return self._ended.get((task.kind, task.architecture.hash, task.seed))

    def try_out(self, steps: int) -> None:
        """Train the middle network for a few steps, where nothing else tells how long it takes.

        Args:
            steps: Optimizer steps, 2 at least.
        """
        for kind in sorted({task.kind for task in self.left()} - self._timed()):
            # A user's own evaluator has no steps: it would be a whole training.
            if kind == "full" or not isinstance(self._config.evaluator, PluginConfig):
                brief = self._train(Task(kind, self._middle, 0), steps)
                if brief.child_s is not None:
                    self._tried[kind] = brief.child_s

    def _timed(self) -> set[Kind]:
        return {t.kind for t in self._ended.values() if t.failure is None}

    def seconds_left(self) -> float | None:
        """Return about how long the trainings that are left take; None if it is not known.

        Of a network between two trained ones in multiply-adds, a training takes time between
        theirs.
        """
        total = 0.0
        for task in self.left():
            seconds = self._expected_s(task)
            if seconds is None:
                return None
            total += seconds
        return total

    def _expected_s(self, task: Task) -> float | None:
        times = {}
        if task.kind in self._tried:
            times[count(self._middle).macs] = self._tried[task.kind]
        for pair in self._pairs:
            for known in pair:
                ended = self._training(known)
                if known.kind == task.kind and ended is not None and ended.failure is None:
                    times[count(known.architecture).macs] = ended.seconds
        if not times:
            return None
        macs = sorted(times)
        return float(np.interp(count(task.architecture).macs, macs, [times[m] for m in macs]))

    def train(self, task: Task) -> Training:
        """Train to the end, keep what comes out in the file, and return it."""
        started = time.monotonic()
        brief = self._train(task, None)
        training = Training(
            kind=task.kind,
            architecture=task.architecture.text,
            architecture_hash=task.architecture.hash,
            seed=task.seed,
            accuracy=brief.accuracy,
            validation_images=brief.validation_images,
            seconds=time.monotonic() - started,
            failure=brief.failure,
            cause=brief.cause,
        )
        self._ended[task.kind, task.architecture.hash, task.seed] = training
        lasting = [t for t in self._ended.values() if t.cause != "infrastructure"]
        kept = RankingFile(self._settings, tuple(lasting))
        write_atomically(self.path, (json.dumps(to_plain(kept), indent=1) + "\n").encode())
        return training

    def _train(self, task: Task, steps: int | None) -> Brief:
        if task.kind == "proxy":
            return evaluate_brief(self._config, task.architecture, task.seed, steps)
        states = self.states if steps is None else None
        return train_fully(self._full, task.architecture, task.seed, steps, states)

    # ------------------------------------------------------------------------ what comes out

    def report(self) -> RankReport:
        """Return how well the proxy ranks, by the trainings that have ended."""
        ended = [(self._training(child), self._training(full)) for child, full in self._pairs]
        costs = [count(network) for network in self.networks]
        both = [
            (proxy, full, cost.macs)
            for (proxy, full), cost in zip(ended, costs, strict=True)
            if proxy and full and proxy.accuracy is not None and full.accuracy is not None
        ]
        proxies = np.array([proxy.accuracy for proxy, _, _ in both], dtype=float)
        fulls = np.array([full.accuracy for _, full, _ in both], dtype=float)
        macs = np.array([macs for _, _, macs in both], dtype=float)
        repeats = [self._training(task) for task in (self._pairs[2][0], *self._repeats)]
        seeds = [t.accuracy for t in repeats if t is not None and t.accuracy is not None]
        seed_sd = statistics.stdev(seeds) if len(seeds) > 1 else None
        proxy_sd = accuracy_noise(
            proxies, [proxy.validation_images for proxy, _, _ in both], seed_sd or 0.0
        )
        full_sd = accuracy_noise(fulls, [full.validation_images for _, full, _ in both], 0.0)
        rng = np.random.default_rng(stream(self._config.seed, RESAMPLING, 0))
        enough = len(both) >= MIN_NETWORKS
        low, high = interval(proxies, fulls, rng) if enough else (None, None)
        rows = [
            _row(network, cost, *trainings)
            for network, cost, trainings in zip(self.networks, costs, ended, strict=True)
        ]
        return RankReport(
            file=str(self.path),
            networks=tuple(sorted(rows, key=lambda row: row.macs)),
            ranked=len(both),
            tau=kendall_tau(proxies, fulls) if enough else None,
            tau_low=low,
            tau_high=high,
            tau_macs=kendall_tau(macs, fulls) if enough else None,
            tau_noise=tau_of_noise(proxies, fulls, proxy_sd, full_sd, rng) if enough else None,
            seed_accuracies=tuple(seeds),
            seed_sd=seed_sd,
            good_tau=GOOD_TAU,
            seconds=sum(training.seconds for training in self._ended.values()),
        )


def _row(
    network: Architecture, cost: Cost, proxy: Training | None, full: Training | None
) -> RankedNetwork:
    failures = [
        f"{name}: {training.failure}"
        for name, training in (("as a child", proxy), ("in full", full))
        if training is not None and training.failure is not None
    ]
    return RankedNetwork(
        architecture=network.text,
        architecture_hash=network.hash,
        parameters=cost.parameters,
        macs=cost.macs,
        proxy_accuracy=proxy.accuracy if proxy else None,
        full_accuracy=full.accuracy if full else None,
        proxy_s=proxy.seconds if proxy else None,
        full_s=full.seconds if full else None,
        failure="; ".join(failures) or None,
    )


def _full_training(config: CampaignConfig) -> RetrainConfig:
    if config.retrain is None:
        raise ConfigError(
            "--rank: needs a full training to hold the short ones against, but the configuration"
            " has no retrain section; give retrain.recipe."
        )
    return config.retrain


@contextmanager
def open_ranking(
    config: CampaignConfig, number: int, path: Path, *, repeats: int = 0
) -> Iterator[Ranking]:
    """Open a ranking, new or begun before; no other process has it meanwhile.

    Args:
        config: Of the campaign.
        number: Of networks.
        path: Of its file, which is made with the first training that ends.
        repeats: Seeds of the middle network's proxy; 0: its own alone.

    Raises:
        ConfigError: There is nothing to hold the evaluator's accuracies against, something is
            lacking here, or the file is another configuration's.
    """
    if number < MIN_NETWORKS:
        raise ConfigError(f"--rank: must be >= {MIN_NETWORKS} networks, but got {number}.")
    if isinstance(config.evaluator, (SyntheticEvaluatorConfig, AccelNasBenchConfig)):
        raise ConfigError(
            f"--rank: needs an evaluator that trains, but {config.evaluator.name} makes up its"
            " accuracies without; give evaluator: {name: train, recipe: ...}."
        )
    _full_training(config)
    findings = look(config, path.parent)
    for name in ("evaluator", "retrain"):
        if lacks(findings, name):
            text = next(finding.text for finding in findings if finding.name == name)
            raise ConfigError(f"--rank: {name} lacks what it trains on here: {text}")
    if not can_evaluate(config, findings):
        raise ConfigError("--rank: executor.npus: there is no NPU here; set executor.npus=0.")
    networks = spread(parts_here(config, findings).space, config.seed, number)
    settings = _settings(config)
    _read(path, settings)  # another campaign's is refused before anything is made
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            ranking = Ranking(config, networks, path, _read(path, settings), repeats)
            yield ranking
            with suppress(OSError):  # there is none, or it holds a state to go on from
                ranking.states.rmdir()
    except filelock.Timeout:
        raise ConfigError(f"{path}: another process trains for it; only one may.") from None


def _settings(config: CampaignConfig) -> dict[str, Any]:
    """What the networks and their accuracies depend on; their number only adds to them."""
    plain = config_to_plain(config)
    settings = {key: plain[key] for key in ("seed", "space", "evaluator")}
    return {**settings, "retrain": {"recipe": plain["retrain"]["recipe"]}}


def _read(path: Path, settings: dict[str, Any]) -> RankingFile:
    """What a file holds, or nothing where there is none."""
    if not path.exists():
        return RankingFile(settings, ())
    text = read_text(path)
    try:
        kept = build(RankingFile, json.loads(text), where=str(path))
    except ValueError:
        raise ConfigError(
            f"{path}: must be a file of `mnas check --rank`, but it holds something else; choose"
            " another one with --out."
        ) from None
    changes = differences(kept.settings, settings)
    refused = [change for change in changes if not may_change(change[0])]
    if refused:
        listed = "; ".join(f"{key} was {ours!r}, now {theirs!r}" for key, ours, theirs in refused)
        raise ConfigError(
            f"{path}: its networks were trained with another configuration: {listed}; choose"
            " another file with --out."
        )
    return kept
