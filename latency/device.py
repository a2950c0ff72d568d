"""Device and LatencyMeter: where networks are timed, and the contract of what times them.

A device's configuration says what to time on; `make_meter` turns it into the LatencyMeter that
does. A user's own kind of device is a subclass of LatencyMeter; `latency.contract.check_meter`
says whether it keeps the contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from latency.measurement import Measurement
from latency.timing import Effort
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.records import build, find_config, load_yaml, record


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
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"name must be printable text, but got {self.name!r}")
        if not self.provider.strip():
            raise ValueError(f"provider must be an execution provider, but got {self.provider!r}")
        for name, high in (("threads", 1024), ("batch", 4096), ("attempts", 20)):
            if not 1 <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in [1, {high}], but got {getattr(self, name)}")
        if self.lock_timeout_s < 0:
            raise ValueError(f"lock_timeout_s must be >= 0, but got {self.lock_timeout_s!r}")
        if self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s must be > 0, but got {self.time_limit_s!r}")
        if self.cores is None:
            return
        if min(self.cores, default=0) < 0 or len(set(self.cores)) != len(self.cores):
            raise ValueError(f"cores must be different numbers >= 0, but got {list(self.cores)}")
        if len(self.cores) != self.threads:
            raise ValueError(
                f"cores must list one core per thread ({self.threads}), but got {list(self.cores)}"
            )


#: One schema per kind of device, told apart by `kind`.
DeviceConfig = OnnxRuntimeConfig


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
        call and process to process, holds `name`, and costs next to nothing. Load, temperature and
        the like belong to a measurement's environment.
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
    return build(DeviceConfig, load_yaml(path), where=str(path))


def make_meter(config: DeviceConfig) -> LatencyMeter:
    """Return what times networks on a device.

    Raises:
        ConfigError: This host cannot be used as the configuration says.
    """
    return _METERS[config.kind](config)


def _onnxruntime_meter(config: OnnxRuntimeConfig) -> LatencyMeter:
    # Here, so that a campaign's configuration can be read without loading ONNX Runtime.
    from latency.onnxruntime_device import OnnxRuntimeMeter

    return OnnxRuntimeMeter(config)


_METERS: dict[str, Callable[[OnnxRuntimeConfig], LatencyMeter]] = {
    "onnxruntime": _onnxruntime_meter
}
