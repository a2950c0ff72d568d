"""What a device is configured by: this host, a machine over ssh, an NPU, and their drift guard.

Tools with a command line have a page of their own: latency/command_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from latency.timing import Effort
from space.mnasnet import find_architecture
from space.records import record


def check_common(config: Any) -> None:
    """What every kind of device has.

    Raises:
        ValueError: As `record` wants it.
    """
    if not config.name.strip() or not config.name.isprintable():
        raise ValueError(f"name must be printable text, but got {config.name!r}")
    check_in_ranges(config, (("batch", 1, 4096), ("attempts", 1, 20)))
    if config.lock_timeout_s < 0:
        raise ValueError(f"lock_timeout_s must be >= 0, but got {config.lock_timeout_s!r}")
    if config.time_limit_s <= 0:
        raise ValueError(f"time_limit_s must be > 0, but got {config.time_limit_s!r}")


def check_in_ranges(config: Any, ranges: Iterable[tuple[str, int, int]]) -> None:
    """Check whole numbers of a configuration: name, lowest, highest.

    Raises:
        ValueError: As `record` wants it.
    """
    for name, low, high in ranges:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], but got {value}")


def _check_runner(config: OnnxRuntimeConfig | SshConfig) -> None:
    """What latency.runner needs, here or elsewhere."""
    check_in_ranges(config, (("threads", 1, 1024),))
    if not config.provider.strip():
        raise ValueError(f"provider must be an execution provider, but got {config.provider!r}")
    if config.calibration is not None and config.precision != "int8":
        raise ValueError(
            f"calibration must be given with precision int8 only, but got {config.calibration!r}"
            f" with {config.precision}"
        )
    if config.cores is None:
        return
    if min(config.cores, default=0) < 0 or len(set(config.cores)) != len(config.cores):
        raise ValueError(f"cores must be different numbers >= 0, but got {list(config.cores)}")
    if len(config.cores) != config.threads:
        raise ValueError(
            f"cores must list one core per thread ({config.threads}), but got {list(config.cores)}"
        )


@record
class DriftConfig:
    """How a device is watched for drift: throttling, a neighbour, anything that shifts all times.

    A reference network is measured at the start and at least every so many networks. Where its
    time has shifted, the figures since the last good check are taken again after a pause, or
    flagged (latency/drift.py).

    Attributes:
        every: The most networks between two checks.
        bound: Relative shift of the reference network's time, either way, that is accepted.
        pause_s: How long the device rests before it is looked at again.
        tries: How often it rests before the figures are flagged.
        reference: A published network or a text form; it must run on the device.
    """

    every: int = 20
    bound: float = 0.05
    pause_s: float = 10.0
    tries: int = 3
    reference: str = "mnasnet-small"

    def __post_init__(self) -> None:
        check_in_ranges(self, (("every", 1, 100_000), ("tries", 0, 1000)))
        if not 0 < self.bound < 1:
            raise ValueError(f"bound must be in (0, 1), but got {self.bound!r}")
        if not 0 <= self.pause_s <= 86_400:
            raise ValueError(f"pause_s must be in [0, 86400], but got {self.pause_s!r}")
        find_architecture(self.reference)


@record
class OnnxRuntimeConfig:
    """This host, as ONNX Runtime uses it.

    Attributes:
        name: What reports call the device.
        kind: `onnxruntime`.
        provider: ONNX Runtime's execution provider.
        threads: Threads that compute one inference.
        cores: One processor core (its number in Linux) per thread, to which the threads are
            pinned. None takes the last `threads` cores that this process may use: the first
            ones serve most interrupts.
        precision: Of weights and activations; `int8` is ONNX Runtime's static quantization.
        calibration: For int8, a .npy file of images as the network sees them in training: float32,
            (count, channels, height, width). None takes four random ones: latency does not depend
            on them.
        batch: Images per inference; the figure is the time of the whole batch.
        shares_cores: Whether trainings run on the same cores: then nothing is measured while they
            run.
        effort: `quick` (half a second per network or so, to rank many) or `full`
            (a second and more).
        attempts: How often a noisy measurement is taken before the least noisy one is kept and
            flagged.
        lock_timeout_s: How long to wait while another process measures on this host.
        time_limit_s: How long a network's measurement may take in all, apart from that wait.
        own_process: Whether every network is timed in a process of its own: that also tells the
            peak of memory (the metric `peak_memory_mb`), and a runtime that crashes or hangs ends
            that process alone. It costs about a third of a second per network.
        drift: See DriftConfig; None does not look.
    """

    name: str
    kind: Literal["onnxruntime"]
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    cores: tuple[int, ...] | None = None
    precision: Literal["float32", "int8"] = "float32"
    calibration: str | None = None
    batch: int = 1
    shares_cores: bool = True
    effort: Effort = "full"
    attempts: int = 3
    lock_timeout_s: float = 600.0
    time_limit_s: float = 300.0
    own_process: bool = False
    drift: DriftConfig | None = None

    def __post_init__(self) -> None:
        check_common(self)
        _check_runner(self)


@record
class SshConfig:
    """A board or a server that OpenSSH reaches, timed by ONNX Runtime there.

    The machine needs Python >= 3.8 with numpy and onnxruntime; of ours it needs nothing. Its host
    key must be known and a key must let the user in: no password is ever asked for. The user's own
    `~/.ssh/config` holds as well, e.g. for a jump host.

    Attributes:
        name: What reports call the device.
        kind: `ssh`.
        host: Its name or address, or an alias of `~/.ssh/config`.
        port: Of its SSH server; None takes OpenSSH's choice (22).
        user: Who logs in there; None takes OpenSSH's choice.
        identity_file: The private key's file; None takes OpenSSH's choice.
        known_hosts: The file with the machine's host key; None takes OpenSSH's own.
        python: The Python there, by name or absolute path.
        folder: An existing folder there in which a temporary one is made; None takes the system's.
        provider: See OnnxRuntimeConfig, as for all that follow.
        connect_timeout_s: How long to wait for the connection.
        lock_timeout_s: How long to wait while another process, on whatever machine, measures on
            the device.
        time_limit_s: How long a network's measurement may take there, apart from that wait.
        drift: See DriftConfig; None does not look.
    """

    name: str
    kind: Literal["ssh"]
    host: str
    port: int | None = None
    user: str | None = None
    identity_file: str | None = None
    known_hosts: str | None = None
    python: str = "python3"
    folder: str | None = None
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    cores: tuple[int, ...] | None = None
    precision: Literal["float32", "int8"] = "float32"
    calibration: str | None = None
    batch: int = 1
    shares_cores: bool = False
    effort: Effort = "full"
    attempts: int = 3
    connect_timeout_s: float = 10.0
    lock_timeout_s: float = 600.0
    time_limit_s: float = 300.0
    drift: DriftConfig | None = None

    def __post_init__(self) -> None:
        check_common(self)
        _check_runner(self)
        # None of these starts with `-`: ssh would take it for an option.
        for name, pattern, rule in _SSH_PATTERNS:
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                raise ValueError(f"{name} must be {rule}, but got {value!r}")
        if self.port is not None and not 1 <= self.port <= 65_535:
            raise ValueError(f"port must be in [1, 65535], but got {self.port}")
        if not 0 < self.connect_timeout_s <= 3600:
            raise ValueError(
                f"connect_timeout_s must be in (0, 3600], but got {self.connect_timeout_s!r}"
            )


#: ssh itself expands `%`, `$` and quotes in the names of files.
_FILE = r"[^-%$\"'\\\x00-\x1f\x7f][^%$\"'\\\x00-\x1f\x7f]*"
_FILE_RULE = "a path without quotes, backslashes, % and $"
_SSH_PATTERNS = (
    ("host", r"[A-Za-z0-9:][A-Za-z0-9._:-]*", "a host's name or address"),
    ("user", r"[A-Za-z0-9_][A-Za-z0-9._-]*", "a user's name"),
    ("identity_file", _FILE, _FILE_RULE),
    ("known_hosts", _FILE, _FILE_RULE),
    ("python", r"[A-Za-z0-9_./][A-Za-z0-9_./+ -]*", "a program's name or absolute path"),
    ("folder", r"/[^\x00-\x1f\x7f]*", "an absolute path"),
)


@record
class AscendConfig:
    """An NPU of this host, timed by MindSpore in graph mode.

    Attributes:
        name: What reports call the device.
        kind: `ascend`.
        target: MindSpore's name of the hardware. `CPU` is for trying the configuration out where
            there is no NPU: such a device records itself as kind `mindspore-cpu`.
        device_id: Which of the host's NPUs.
        precision: Of activations and, in computing, of weights.
        batch: Images per inference; the figure is the time of the whole batch.
        shares_cores: Whether trainings run on the same hardware.
        effort: See OnnxRuntimeConfig, as for all that follow.
        time_limit_s: How long a network's measurement may take, apart from the wait: MindSpore's
            compilation counts.
    """

    name: str
    kind: Literal["ascend"]
    target: Literal["Ascend", "CPU"] = "Ascend"
    device_id: int = 0
    precision: Literal["float32", "float16"] = "float32"
    batch: int = 1
    shares_cores: bool = True
    effort: Effort = "full"
    attempts: int = 3
    lock_timeout_s: float = 600.0
    time_limit_s: float = 600.0
    drift: DriftConfig | None = None

    def __post_init__(self) -> None:
        check_common(self)
        check_in_ranges(self, (("device_id", 0, 1023),))
