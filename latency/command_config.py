"""What a device that a command-line tool times is configured by: commands, and what they print."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Literal

from pydantic import Field

from latency.config import DriftConfig, check_common, check_in_ranges
from latency.placeholders import check_commands
from latency.timing import FEWEST_SAMPLES
from space.records import record

TimeUnit = Literal["s", "ms", "us", "ns"]
Each = Literal["sample", "mean"]


def _check_pattern(name: str, value: str | None, pattern: str | None) -> None:
    """A text that must match a pattern, or, without one, be a regular expression itself."""
    if value is None:
        return
    _compiled(name, value)
    if pattern is not None and not re.fullmatch(pattern, value):
        raise ValueError(f"{name} must be a path of letters, digits and ._/-, but got {value!r}")


def _compiled(name: str, value: str) -> re.Pattern[str]:
    """A regular expression; one that Python warns about is refused, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return re.compile(value)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(
            f"{name} must be a regular expression, but got {value!r}: {error}"
        ) from None


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
        if "value" not in _compiled("pattern", self.pattern).groupindex:
            raise ValueError(f"pattern must have a group (?P<value>...), but got {self.pattern!r}")


@record
class CommandConfig:
    """Any device that a command-line tool on this host times, or reaches and times.

    Commands are lists of arguments; no shell sees them. Within an argument stand placeholders:
    {model} (the ONNX file here), {folder} (a temporary folder here), {converted}, {remote_model},
    {remote_result}, {id} (of the measurement), {address} (of the device), {threads}, {runs},
    {warmup}, {batch} and {input_shape} (`1,3,224,224`: batch, channels, height, width). {{word}}
    is the text {word}.

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
        address: For {address}: what tells one of several identical devices from the others, e.g. a
            phone's serial number for `adb -s {address}`. It is no part of the identity.
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
        drift: See latency.config.DriftConfig; None does not look.
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
    address: str | None = None
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
    drift: DriftConfig | None = None

    def __post_init__(self) -> None:
        check_common(self)
        check_in_ranges(self, (("threads", 1, 1024), ("invocations", 1, 1000)))
        check_in_ranges(self, (("runs", 1, 100_000), ("warmup", 0, 100_000)))
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
        if self.address is not None and not re.fullmatch(r"[A-Za-z0-9][\w.:@%-]*", self.address):
            raise ValueError(
                f"address must be a serial number or an address, but got {self.address!r}"
            )
        check_commands(self)
