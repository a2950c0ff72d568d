"""Warm start: an earlier campaign's trials become a new controller's first knowledge.

Accuracies carry over, since they don't depend on the device; latencies and rewards do, so each
network is measured again unless the earlier campaign measured it on the very same device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from latency.measurement import fingerprint
from search.campaign import open_to_read, read_config
from search.config import CampaignConfig, WarmStartConfig, differences, may_change
from search.parts import Parts, campaign_space
from search.store import Store
from search.trial import Trial
from space.architecture import graph_hash
from space.errors import ConfigError, MeasurementError
from space.records import to_plain
from space.search_space import SearchSpace

#: Metrics that a device gives, `latency_ms:DEVICE` among them.
MEASURED = frozenset({"latency_ms", "model_mb", "peak_memory_mb"})
#: Keys of an evaluator that change latencies, but no accuracy.
NO_ACCURACY = frozenset(
    f"evaluator.{key}" for key in ("device", "other_devices", "seconds", "slowest_seconds")
)


def check_warm_start(config: CampaignConfig) -> None:
    """Look at the earlier campaign, if one is given, before anything is made.

    Raises:
        ConfigError: It is none, its children were trained otherwise, or the space has none of its
            networks.
    """
    if config.warm_start is not None:
        with closing(open_to_read(_folder(config.warm_start))) as earlier:
            _networks(config.warm_start, config, campaign_space(config), earlier)


def carry_over(config: CampaignConfig, parts: Parts, store: Store) -> None:
    """Record the earlier campaign's networks as trials with an accuracy and no outcome yet.

    Measurements on the very same device are carried over, too.

    Raises:
        ConfigError: See `check_warm_start`.
    """
    assert config.warm_start is not None  # asked for by the caller
    with closing(open_to_read(_folder(config.warm_start))) as earlier:
        known = _networks(config.warm_start, config, parts.space, earlier)
        for meter in parts.meters.values():
            try:
                device = fingerprint(meter.identity())
            except MeasurementError:
                continue  # a device that does not answer is asked again for each network
            for trial in known:
                found = earlier.find_measurement(graph_hash(trial.network()), device)
                if found is not None:
                    store.add_measurement(found[1])
    first_id = store.next_other_id()
    store.add_trials(
        [
            replace(trial, id=first_id - index, epochs=parts.epochs)
            for index, trial in enumerate(known)
        ]
    )
    store.add_event(
        "warm start", f"{len(known)} networks of {_folder(config.warm_start).absolute()}"
    )


def _folder(config: WarmStartConfig) -> Path:
    return Path(config.campaign).expanduser()


def _networks(
    config: WarmStartConfig, new: CampaignConfig, space: SearchSpace, earlier: Store
) -> list[Trial]:
    """The earlier campaign's networks that the space has, in the order they were proposed."""
    _check_comparable(config, new)
    trials = [*reversed(earlier.trials(role="warm_start")), *earlier.trials()]
    trials = [trial for trial in trials if trial.outcome == "completed"]
    # Of several trainings the last one has their mean.
    members = _members(trials, space, measured=bool(new.devices))
    known = list({trial.architecture_hash: trial for trial in members}.values())
    if not known:
        raise ConfigError(
            f"warm_start: the space has none of the {len(trials)} networks that"
            f" {config.campaign} trained; choose a campaign in the same space."
        )
    return known[-(config.trials or len(known)) :]


def _check_comparable(config: WarmStartConfig, new: CampaignConfig) -> None:
    theirs = {"evaluator": to_plain(read_config(_folder(config)).evaluator)}
    ours = {"evaluator": to_plain(new.evaluator)}
    for key, our_value, their_value in differences(ours, theirs):
        if not may_change(key) and key not in NO_ACCURACY:
            raise ConfigError(
                f"warm_start: accuracies carry over only between campaigns that train alike, but"
                f" {key} is {our_value!r} here and {their_value!r} in {config.campaign}."
            )


def _members(trials: list[Trial], space: SearchSpace, *, measured: bool) -> Iterator[Trial]:
    """The trials whose networks the space has, with its tokens and without their result.

    Where they are to be `measured`, without what the earlier campaign's devices said, too.
    """
    for trial in trials:
        metrics = trial.metrics or {}
        if measured:
            metrics = {k: v for k, v in metrics.items() if k.partition(":")[0] not in MEASURED}
        network = trial.network()
        try:
            tokens = space.encode(network)
        except ValueError:
            continue
        yield Trial(
            id=0,
            batch=-1,
            role="warm_start",
            proposal_id=None,
            tokens=tokens,
            log_prob=0.0,
            architecture=network.text,
            architecture_hash=network.hash,
            seed=trial.seed,
            epochs=trial.epochs,
            accuracy=trial.accuracy,
            metrics=metrics,
            created_at=time.time(),
        )
