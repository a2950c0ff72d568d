"""Environments: under which software, and on which devices, a campaign's trials came about.

A campaign that goes on with another MindSpore, ONNX Runtime or device may get other figures for
the same networks. It does go on, but says so, and every trial can be told which environment it
ended in: they are numbered from 1, and the first is the one in which the campaign was made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from latency.device import LatencyMeter
from latency.measurement import fingerprint
from search.config import differences
from search.store import Store
from search.trial import Trial
from space.errors import MeasurementError
from space.files import versions
from space.records import build, record, to_plain

logger = logging.getLogger(__name__)


@record
class Environment:
    """What trials' figures may depend on beside the configuration.

    Attributes:
        since: When it began, in seconds since the epoch; 0 for the first.
        first_trial: The search's first trial that had no result then.
        versions: Package -> version.
        devices: Device -> its identity, if it has answered.
        changes: What differs from the one before, `name earlier -> later` each.
    """

    since: float = 0.0
    first_trial: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


class Environments:
    """A campaign's environments, for reading.

    Args:
        store: Of the campaign; one of an earlier engine has one environment.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.known = _known(store)

    def of(self, trial: Trial) -> int | None:
        """Return the number of the environment in which a trial got its result, if it has one.

        A reused result is its original's, wherever it was reused.
        """
        if len(self.known) > 1 and trial.reused_from is not None:
            trial = self._store.trial(trial.reused_from) or trial
        if trial.outcome is None:
            return None
        # Not by id: trials may end in another order than they were proposed in.
        ended_at = trial.finished_at or 0.0
        return sum(ended_at >= environment.since for environment in self.known) or 1

    def notes(self) -> list[str]:
        """Return a text for each environment but the first: from where on, and what changed."""
        return [
            change_note(number, environment.first_trial, environment.changes)
            for number, environment in enumerate(self.known[1:], 2)
        ]


def change_note(number: int, first_trial: int, changes: Sequence[str]) -> str:
    """Return where an environment, given by its number, begins and what has changed there."""
    return f"environment {number} from trial {first_trial:,} on: {', '.join(changes)}"


def note_environment(
    store: Store, meters: Mapping[str, LatencyMeter], tell: Callable[[str], None]
) -> None:
    """Compare the environment with the one that the campaign had last, and record it.

    What was not known of the last one, and a device that does not answer, counts as unchanged.

    Args:
        store: Of the campaign, open for writing.
        meters: Name -> what measures on a device.
        tell: Is told of a change, in one sentence.
    """
    known = _known(store)
    last, now = known[-1], versions()
    devices = {**last.devices, **_identities(meters)}
    changes = _changes(last, now, devices)
    store.set_meta("versions", now)
    if not changes:
        known[-1] = replace(last, versions=now, devices=devices)
        store.set_meta("environments", to_plain(known))
        return
    waiting = store.open_trials()
    first_trial = waiting[0].id if waiting else store.next_ids()[0]
    known.append(Environment(time.time(), first_trial, now, devices, changes))
    sentence = (
        f"the environment has changed: from trial {first_trial} on it is environment"
        f" {len(known)} ({', '.join(changes)}), so that figures before and after may differ for"
        " that alone; `mnas trials` has each trial's environment as a column"
    )
    store.add_event("environment", sentence)
    store.set_meta("environments", to_plain(known))
    logger.warning("%s", sentence)
    tell(f"Warning: {sentence}.")


def _known(store: Store) -> list[Environment]:
    """The recorded environments; of an earlier engine's campaign the versions are known."""
    found: Sequence[Any] = store.meta("environments") or [
        {"versions": store.meta("versions") or {}}
    ]
    return [build(Environment, values, where="campaign.db: environments") for values in found]


def _identities(meters: Mapping[str, LatencyMeter]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, meter in meters.items():
        try:
            found[name] = to_plain(meter.identity())
        except MeasurementError as error:
            # Each measurement will say so itself.
            logger.info("device %s does not say what it is: %s", name, error)
    return found


def _changes(
    last: Environment, now: dict[str, str], devices: dict[str, dict[str, Any]]
) -> tuple[str, ...]:
    changed = differences(last.versions, now) if last.versions else []
    for name, identity in devices.items():
        before = last.devices.get(name, identity)
        if fingerprint(before) != fingerprint(identity):
            changed += differences(before, identity, f"device {name}")
    return tuple(f"{what} {_text(ours)} -> {_text(theirs)}" for what, ours, theirs in changed)


def _text(value: Any) -> str:
    return "(none)" if value is None else str(value)
