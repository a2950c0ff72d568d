"""Device and LatencyMeter: where networks are timed, and the contract of what times them.

A device's configuration says what to time on; `make_meter` turns it into the LatencyMeter that
does. A user's own kind of device is a subclass of LatencyMeter; `latency.contract.check_meter`
says whether it keeps the contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import Field

from latency.command_config import CommandConfig
from latency.config import AscendConfig, OnnxRuntimeConfig, SshConfig, check_in_ranges
from latency.measurement import Measurement
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import MeasurementError
from space.records import build, find_config, load_yaml, record

__all__ = [
    "AscendConfig", "CommandConfig", "DeviceConfig", "LatencyMeter", "OnnxRuntimeConfig",
    "Outcome", "PoolConfig", "SshConfig", "Timed", "in_full", "load_device", "make_meter",
    "measured_or_why", "only_measurement", "resolve_members",
]  # fmt: skip

#: What may stand in a pool: devices that do not get into one another's way.
MemberConfig = Annotated[SshConfig | CommandConfig, Field(discriminator="kind")]


@record
class PoolConfig:
    """Several identical devices that share the networks to be measured (latency/pool.py).

    Attributes:
        name: What reports call the pool.
        kind: `pool`.
        devices: Its members, `ssh` or `command`: a name, a path or the settings themselves. They
            must be identical but for their names and addresses.
        retire_after: Failures in a row, the device's own fault, after which it gets no more work.
    """

    name: str
    kind: Literal["pool"]
    devices: tuple[MemberConfig, ...]
    retire_after: int = 3

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"name must be printable text, but got {self.name!r}")
        check_in_ranges(self, (("retire_after", 1, 1000),))
        names = [device.name for device in self.devices]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"devices must be one or more with names of their own, got {names}")

    @property
    def shares_cores(self) -> bool:
        """Whether trainings run on the cores of any member."""
        return any(device.shares_cores for device in self.devices)


#: One schema per kind of device, told apart by `kind`.
DeviceConfig = Annotated[
    OnnxRuntimeConfig | SshConfig | CommandConfig | AscendConfig | PoolConfig,
    Field(discriminator="kind"),
]


class Timed(NamedTuple):
    """A network's median time in one of several rounds, and whether it is a good one."""

    median_ms: float
    is_good: bool


#: A network with its time, or with the reason why there is none.
Outcome = tuple[Architecture, Measurement | MeasurementError]


class LatencyMeter(ABC):
    """Times networks on one device.

    A figure depends on nothing that was measured before: the same call may be repeated, in any
    order, in any process that can reach the device, and between calls the meter holds nothing open
    on it.
    """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what a figure's validity depends on, as JSON values: a cache's key.

        Name, kind, runtime and its version, threads, cores, precision, batch, processor, effort:
        two figures with equal identities may stand in for one another. It is the same from call to
        call and process to process, holds `name`, and costs next to nothing but the first time,
        when a device elsewhere is asked. Load, temperature and the like belong to a measurement's
        environment.

        Raises:
            MeasurementError: A device elsewhere does not answer.
        """

    @abstractmethod
    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """Return the network's time on the device.

        Its `device` is `identity()`, its `graph_hash` that of the network and the style. A noisy
        measurement is repeated, then returned as it is: its verdict says so.

        Raises:
            MeasurementError: There is no figure. Its `cause` is `architecture` where the device
                cannot run this network, `infrastructure` where it would on another day.
        """

    def measure_all(
        self, architectures: Iterable[Architecture], style: NetworkStyle = PAPER_STYLE
    ) -> Iterator[Outcome]:
        """Yield every network once, with its time or the reason why there is none.

        Here one after the other, as they are asked for. Two kinds of meter have a way of their
        own: a pool's devices share the networks, and a drift guard holds figures back until it
        has found the device unchanged; with these the order is theirs.
        """
        for architecture in architectures:
            yield architecture, measured_or_why(self, architecture, style)

    def measure_in_turn(
        self, first: Architecture, second: Architecture, rounds: int
    ) -> list[tuple[Timed, Timed]]:
        """Return two networks' times, measured in turn so that what slows the device slows both.

        Here a round is a measurement of each; a meter that can keep both networks open takes
        single inferences in turn.

        Raises:
            MeasurementError: A measurement gives no figure.
        """
        pairs = [(self.measure(first), self.measure(second)) for _ in range(rounds)]
        return [
            (Timed(a.median_ms, a.verdict == "ok"), Timed(b.median_ms, b.verdict == "ok"))
            for a, b in pairs
        ]


def measured_or_why(
    meter: LatencyMeter, architecture: Architecture, style: NetworkStyle
) -> Measurement | MeasurementError:
    """Return a network's time, or the error in its place."""
    try:
        return meter.measure(architecture, style)
    except MeasurementError as error:
        return error


def only_measurement(outcomes: Iterable[Outcome]) -> Measurement:
    """Return the time that the one outcome holds.

    Raises:
        MeasurementError: It holds none.
    """
    ((_, outcome),) = outcomes
    if isinstance(outcome, MeasurementError):
        raise outcome
    return outcome


def load_device(name_or_path: str) -> DeviceConfig:
    """Return the configuration of a shipped device by name, or of a file.

    Raises:
        ConfigError: There is none, or it is not as its record says.
    """
    path = find_config(name_or_path, "device")
    values = resolve_members(load_yaml(path), path.parent)
    config: DeviceConfig = build(cast(Any, DeviceConfig), values, where=str(path))
    return config


def resolve_members(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a device's values; where it is a pool, with its named members' own in their places.

    Args:
        values: Of a device, as YAML holds them; not yet checked.
        folder: Against which a member's relative path is tried after the current folder.

    Raises:
        ConfigError: A member has no such file.
    """
    members = values.get("devices")
    if values.get("kind") != "pool" or not isinstance(members, list):
        return values
    found = [
        load_yaml(find_config(member, "device", relative_to=folder))
        if isinstance(member, str)
        else member
        for member in members
    ]
    return {**values, "devices": found}


def in_full(config: DeviceConfig) -> DeviceConfig:
    """Return a device that never measures quickly: the same one, if it has no quick way."""
    if isinstance(config, (OnnxRuntimeConfig, SshConfig, AscendConfig)):
        return replace(config, effort="full")
    if isinstance(config, PoolConfig):
        members = tuple(cast(MemberConfig, in_full(member)) for member in config.devices)
        return replace(config, devices=members)
    return config


def make_meter(config: DeviceConfig) -> LatencyMeter:
    """Return what times networks on a device, under its drift guard if it has one.

    Raises:
        ConfigError: This host cannot be used as the configuration says.
    """
    meter = _METERS[config.kind](config)
    if config.kind == "pool" or config.drift is None:
        return meter
    from latency.drift import DriftGuard

    return DriftGuard(meter, config.drift)


# Imports stand inside: a campaign's configuration can be read without loading ONNX Runtime.


def _onnxruntime_meter(config: Any) -> LatencyMeter:
    from latency.onnxruntime_device import OnnxRuntimeMeter

    return OnnxRuntimeMeter(config)


def _ssh_meter(config: Any) -> LatencyMeter:
    from latency.remote import SshMeter

    return SshMeter(config)


def _command_meter(config: Any) -> LatencyMeter:
    from latency.command import CommandMeter

    return CommandMeter(config)


def _ascend_meter(config: Any) -> LatencyMeter:
    from latency.ascend import AscendMeter

    return AscendMeter(config)


def _pool_meter(config: Any) -> LatencyMeter:
    from latency.pool import Member, PoolMeter

    members = [Member(device.name, make_meter(device)) for device in config.devices]
    return PoolMeter(config.name, members, retire_after=config.retire_after)


_METERS: dict[str, Callable[[Any], LatencyMeter]] = {
    "onnxruntime": _onnxruntime_meter,
    "ssh": _ssh_meter,
    "command": _command_meter,
    "ascend": _ascend_meter,
    "pool": _pool_meter,
}
