"""Device and LatencyMeter: where networks are timed, and the contract of what times them.

A device's configuration says what to time on; `make_meter` turns it into the LatencyMeter that
does. A user's own kind of device is a subclass of LatencyMeter; `latency.contract.check_meter`
says whether it keeps the contract.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from latency.measurement import Measurement
from latency.placeholders import check_commands
from latency.timing import FEWEST_SAMPLES, Effort
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.records import build, find_config, load_yaml, record

TimeUnit = Literal["s", "ms", "us", "ns"]
Each = Literal["sample", "mean"]


def _check_common(config: OnnxRuntimeConfig | SshConfig | CommandConfig) -> None:
    """What every kind of device has.

    Raises:
        ValueError: As `record` wants it.
    """
    if not config.name.strip() or not config.name.isprintable():
        raise ValueError(f"name must be printable text, but got {config.name!r}")
    _check_in_ranges(config, (("threads", 1, 1024), ("batch", 1, 4096), ("attempts", 1, 20)))
    if config.lock_timeout_s < 0:
        raise ValueError(f"lock_timeout_s must be >= 0, but got {config.lock_timeout_s!r}")
    if config.time_limit_s <= 0:
        raise ValueError(f"time_limit_s must be > 0, but got {config.time_limit_s!r}")


def _check_in_ranges(config: Any, ranges: Iterable[tuple[str, int, int]]) -> None:
    for name, low, high in ranges:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], but got {value}")


def _check_runner(config: OnnxRuntimeConfig | SshConfig) -> None:
    """What latency.runner needs, here or elsewhere."""
    if not config.provider.strip():
        raise ValueError(f"provider must be an execution provider, but got {config.provider!r}")
    if config.cores is None:
        return
    if min(config.cores, default=0) < 0 or len(set(config.cores)) != len(config.cores):
        raise ValueError(f"cores must be different numbers >= 0, but got {list(config.cores)}")
    if len(config.cores) != config.threads:
        raise ValueError(
            f"cores must list one core per thread ({config.threads}), but got {list(config.cores)}"
        )


def _check_pattern(name: str, value: str | None, pattern: str | None) -> None:
    """A text that must match a pattern, or, without one, be a regular expression itself."""
    if value is None:
        return
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name} must be a regular expression, but got {value!r}: {error}"
        ) from None
    if pattern is not None and not re.fullmatch(pattern, value):
        raise ValueError(f"{name} must be a path of letters, digits and ._/-, but got {value!r}")


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
        precision: Of weights and activations.
        batch: Images per inference; the figure is the time of the whole batch.
        shares_cores: Whether trainings run on the same cores: then nothing is measured while they
            run.
        effort: `quick` (a tenth of a second per network and more, to rank many) or `full`
            (a second and more).
        attempts: How often a noisy measurement is taken before the least noisy one is kept and
            flagged.
        lock_timeout_s: How long to wait while another process measures on this host.
        time_limit_s: How long a network's measurement may take in all, apart from that wait.
    """

    name: str
    kind: Literal["onnxruntime"]
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    cores: tuple[int, ...] | None = None
    precision: Literal["float32"] = "float32"
    batch: int = 1
    shares_cores: bool = True
    effort: Effort = "full"
    attempts: int = 3
    lock_timeout_s: float = 600.0
    time_limit_s: float = 300.0

    def __post_init__(self) -> None:
        _check_common(self)
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
    precision: Literal["float32"] = "float32"
    batch: int = 1
    shares_cores: bool = False
    effort: Effort = "full"
    attempts: int = 3
    connect_timeout_s: float = 10.0
    lock_timeout_s: float = 600.0
    time_limit_s: float = 300.0

    def __post_init__(self) -> None:
        _check_common(self)
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
class JsonRule:
    """Times are the numbers at a path of the output, which is one JSON document.

    Attributes:
        kind: `json`.
        path: Keys and positions with dots between, `*` for every item of a list: `runs.*.ms`.
        unit: Of the numbers.
        each: What a number is: one inference (`sample`), or the mean of `runs` inferences.
    """

    kind: Literal["json"]
    path: str
    unit: TimeUnit
    each: Each

    def __post_init__(self) -> None:
        if not all(self.path.split(".")):
            raise ValueError(f"path must be keys with dots between, but got {self.path!r}")


@record
class RegexRule:
    """Times are the matches of a regular expression in the output.

    Attributes:
        kind: `regex`.
        pattern: Python's; `^` and `$` match at lines. The group `value` is the number. A group
            `runs`, if there is one, is how many inferences the tool says to have made: it must be
            what it was asked for.
        unit: Of the numbers.
        each: What a number is: one inference (`sample`), or the mean of `runs` inferences.
        stream: Where the tool prints.
    """

    kind: Literal["regex"]
    pattern: str
    unit: TimeUnit
    each: Each
    stream: Literal["stdout", "stderr", "both"] = "stdout"

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression, but got {self.pattern!r}: {error}"
            ) from None
        if "value" not in groups:
            raise ValueError(f"pattern must have a group (?P<value>...), but got {self.pattern!r}")


@record
class CommandConfig:
    """Any device that a command-line tool on this host times, or reaches and times.

    Commands are lists of arguments; no shell sees them. Within an argument stand placeholders:
    {model} (the ONNX file here), {folder} (a temporary folder here), {converted}, {remote_model},
    {remote_result}, {id} (of the measurement), {threads}, {runs}, {warmup}, {batch} and
    {input_shape} (`1,3,224,224`: batch, channels, height, width). {{word}} is the text {word}.

    Attributes:
        name: What reports call the device.
        kind: `command`.
        run: Times the model and prints the result.
        parse: Where the times are in what `run` prints (or `fetch`, if there is one).
        convert: Commands that make {converted} from {model}, here.
        converted: The file that they make, e.g. `{folder}/model.tflite`.
        push: Commands that bring the model to the device.
        fetch: A command that prints the result in place of `run`.
        cleanup: Commands that remove what the others left on the device; they always run.
        identify: Commands whose output becomes part of the device's identity.
        remote_folder: A folder on the device for {remote_model} and {remote_result}.
        env: Environment variables of all commands, beside this process's.
        rejects: A regular expression: where a command fails and its output matches, the device
            cannot run this network. Any other failure counts as the device's.
        model_format: Of the file behind {model}.
        threads: For {threads}.
        batch: Images per inference.
        runs: Inferences that one call of `run` times.
        warmup: Inferences before them.
        invocations: How often `run` is called for one attempt.
        attempts: How often a noisy measurement is taken before the least noisy one is kept and
            flagged.
        precision: Of weights and activations in the ONNX file.
        shares_cores: Whether trainings run on the same cores.
        lock_timeout_s: How long to wait while another process measures on the device.
        time_limit_s: How long a network's measurement may take in all, apart from that wait.
    """

    name: str
    kind: Literal["command"]
    run: tuple[str, ...]
    parse: Annotated[JsonRule | RegexRule, Field(discriminator="kind")]
    convert: tuple[tuple[str, ...], ...] = ()
    converted: str | None = None
    push: tuple[tuple[str, ...], ...] = ()
    fetch: tuple[str, ...] | None = None
    cleanup: tuple[tuple[str, ...], ...] = ()
    identify: tuple[tuple[str, ...], ...] = ()
    remote_folder: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    rejects: str | None = None
    model_format: Literal["onnx"] = "onnx"
    threads: int = 1
    batch: int = 1
    runs: int = 50
    warmup: int = 1
    invocations: int = 1
    attempts: int = 3
    precision: Literal["float32"] = "float32"
    shares_cores: bool = False
    lock_timeout_s: float = 600.0
    time_limit_s: float = 300.0

    def __post_init__(self) -> None:
        _check_common(self)
        _check_in_ranges(self, (("runs", 1, 100_000), ("warmup", 0, 100_000)))
        _check_in_ranges(self, (("invocations", 1, 1000),))
        if self.parse.each == "mean" and self.invocations < FEWEST_SAMPLES:
            raise ValueError(
                f"invocations must be >= {FEWEST_SAMPLES} where each value is a mean (fewer tell"
                f" nothing about the spread), but got {self.invocations}"
            )
        if bool(self.convert) != (self.converted is not None):
            raise ValueError(
                "converted must name the file that convert makes, and only then, but got"
                f" {self.converted!r}"
            )
        for name, pattern in (("rejects", None), ("remote_folder", r"/?[A-Za-z0-9_./-]+")):
            _check_pattern(name, getattr(self, name), pattern)
        check_commands(self)


#: One schema per kind of device, told apart by `kind`.
DeviceConfig = Annotated[
    OnnxRuntimeConfig | SshConfig | CommandConfig, Field(discriminator="kind")
]


class LatencyMeter(ABC):
    """Times networks on one device.

    Stateless: the same call may be repeated, in any order, in any process that can reach the
    device, and between calls the meter holds nothing open on it.
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


def load_device(name_or_path: str) -> DeviceConfig:
    """Return the configuration of a shipped device by name, or of a file.

    Raises:
        ConfigError: There is none, or it is not as its record says.
    """
    path = find_config(name_or_path, "device")
    config: DeviceConfig = build(cast(Any, DeviceConfig), load_yaml(path), where=str(path))
    return config


def make_meter(config: DeviceConfig) -> LatencyMeter:
    """Return what times networks on a device.

    Raises:
        ConfigError: This host cannot be used as the configuration says.
    """
    return _METERS[config.kind](config)


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


_METERS: dict[str, Callable[[Any], LatencyMeter]] = {
    "onnxruntime": _onnxruntime_meter,
    "ssh": _ssh_meter,
    "command": _command_meter,
}
