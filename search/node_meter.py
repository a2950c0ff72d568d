"""A latency device at another node of Ray's cluster, measured where it hangs.

A node offers what hangs at it as a resource of its own:

    ray start --address HEAD:6379 --resources '{"device:pixel1": 1}'

and `executor.devices: [pixel1]` says that the campaign's device of that name is measured there.
The device's configuration goes to that node, with the networks as data: graphs are built there,
and whatever the device needs (adb, a key, onnxruntime) has to be there only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from latency.device import DeviceConfig, LatencyMeter, Outcome, only_measurement
from latency.measurement import Measurement
from latency.processes import heed_breaking_off
from search.ray_cluster import connect, gist
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import ConfigError, MeasurementError

if TYPE_CHECKING:
    from search.config import PluginConfig, RayConfig

#: The node has so long to start a process that measures.
START_LIMIT_S = 120.0
#: Its device has limits of its own; a process that says nothing for so long is taken for lost.
SILENCE_LIMIT_S = 1800.0
#: How often it is looked whether figures are still wanted.
LOOK_S = 1.0


class _AtNode:
    """The body of a Ray actor at the device's node; the device is its for as long as it lives."""

    def __init__(self, device: DeviceConfig | PluginConfig) -> None:
        self._device = device
        self._meters: dict[bool, LatencyMeter] = {}

    def meter(self, *, full: bool) -> LatencyMeter:
        """Return what measures quickly, if the device is configured so, or fully."""
        from search.parts import device_meter

        if full not in self._meters:
            self._meters[full] = device_meter(self._device, full=full)
        return self._meters[full]

    def identity(self, *, full: bool) -> dict[str, Any] | MeasurementError:
        """Return the meter's, or why there is none."""
        try:
            return self.meter(full=full).identity()
        except MeasurementError as error:
            return error

    def measure_all(
        self, architectures: list[Architecture], style: NetworkStyle, *, full: bool
    ) -> Iterator[Outcome]:
        """Yield what the meter yields, one by one."""
        yield from self.meter(full=full).measure_all(architectures, style)


class _Bench:
    """A process at the device's node, as the engine's sees it: started when it is needed.

    Args:
        config: Of the cluster.
        device: Of the device; its name is the resource's.

    Raises:
        ConfigError: The cluster cannot be joined, or no node of it offers the device.
    """

    def __init__(self, config: RayConfig, device: DeviceConfig | PluginConfig) -> None:
        self._config = config
        self._device = device
        self._session, self._actor = "", None
        self.resource = f"device:{device.name}"
        self.ray = connect(config)
        if self.resource not in self.ray.cluster_resources():
            raise ConfigError(
                f"executor.devices: no node of Ray's cluster offers {self.resource!r}; start the"
                f" node at which {device.name} hangs with `ray start --address ... --resources"
                f" '{{\"{self.resource}\": 1}}'`."
            )

    def started(self) -> Any:
        """Return the process; a new one, if there is none or the connection is a new one.

        Raises:
            MeasurementError: The node does not start it.
            ConfigError: What is configured of the device does not work there.
        """
        self.ray = connect(self._config)  # the executor leaves the cluster when it is done
        session = self.ray.get_runtime_context().get_job_id()
        if self._actor is not None and self._session == session:
            return self._actor
        actor = (
            self.ray.remote(_AtNode)
            .options(num_cpus=0, resources={self.resource: 1})
            .remote(self._device)
        )
        try:
            self.ray.get(actor.identity.remote(full=False), timeout=START_LIMIT_S)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(actor)
            raise self.lost(error) from None
        self._session, self._actor = session, actor
        return actor

    def lost(self, error: Exception) -> MeasurementError:
        """Return what a node that is gone, or has no room, means for a measurement.

        Raises:
            ConfigError: It is the device's configuration that does not work there.
        """
        if self._actor is not None:
            self.ray.kill(self._actor)
        self._actor = None
        cause = getattr(error, "cause", None)
        if isinstance(cause, ConfigError):
            raise cause from None
        return MeasurementError(f"the node of {self.resource} gives no figure: {gist(error)}")


class NodeMeter(LatencyMeter):
    """Times networks on a device of another node.

    Args:
        bench: The process there.
        full: Never quickly.
    """

    def __init__(self, bench: _Bench, *, full: bool) -> None:
        self._bench = bench
        self._full = full

    @classmethod
    def at_node(cls, config: RayConfig, device: DeviceConfig | PluginConfig) -> NodeMeter:
        """Return what measures as the device is configured.

        Raises:
            ConfigError: The cluster cannot be joined, no node of it offers the device, or what is
                configured of the device does not work there.
        """
        bench = _Bench(config, device)
        try:
            bench.started()
        except MeasurementError as error:
            raise ConfigError(f"executor.devices: {error}.") from None
        return cls(bench, full=False)

    def in_full(self) -> NodeMeter:
        """Return what never measures quickly, in the same process."""
        return NodeMeter(self._bench, full=True)

    def identity(self) -> dict[str, Any]:
        """Return what the device's own meter returns."""
        try:
            asked = self._bench.started().identity.remote(full=self._full)
            found = self._bench.ray.get(asked, timeout=SILENCE_LIMIT_S)
        except self._bench.ray.exceptions.RayError as error:
            raise self._bench.lost(error) from None
        if isinstance(found, MeasurementError):
            raise found
        return cast("dict[str, Any]", found)

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """Return the network's time on the device."""
        return only_measurement(self.measure_all([architecture], style))

    def measure_all(
        self, architectures: Iterable[Architecture], style: NetworkStyle = PAPER_STYLE
    ) -> Iterator[Outcome]:
        """Yield every network once, in the order of the device's own meter.

        If the process at the node dies, the networks that are left are measured one by one, so
        that those alone of which it dies have no figure; if the node starts no other process, the
        rest has none either.
        """
        left = {network.hash: network for network in architectures}
        together = True
        while left:
            asked = list(left.values()) if together else [next(iter(left.values()))]
            try:
                for network, found in self._outcomes(asked, style):
                    yield left.pop(network.hash), found
            except MeasurementError as error:
                yield from ((network, error) for network in left.values())
                return
            except self._bench.ray.exceptions.RayError as error:
                lost = self._bench.lost(error)
                if len(asked) == 1 and asked[0].hash in left:
                    yield left.pop(asked[0].hash), lost
                together = False
            else:
                for network in (network for network in asked if network.hash in left):
                    yield left.pop(network.hash), MeasurementError("its meter gave no figure")

    def _outcomes(
        self, architectures: list[Architecture], style: NetworkStyle
    ) -> Iterator[Outcome]:
        actor = self._bench.started()
        outcomes = actor.measure_all.remote(architectures, style, full=self._full)
        while True:
            if not self._ready(outcomes):
                raise self._bench.ray.exceptions.GetTimeoutError(
                    f"nothing came for {SILENCE_LIMIT_S:.0f} s"
                )
            outcome = next(outcomes, None)
            if outcome is None:
                return
            found: Outcome = self._bench.ray.get(outcome)
            yield found

    def _ready(self, outcomes: Any) -> bool:
        """Whether there is one, or an end, before the actor has been silent for too long."""
        deadline = time.monotonic() + SILENCE_LIMIT_S
        while time.monotonic() < deadline:
            ready, _ = self._bench.ray.wait([outcomes], timeout=LOOK_S)
            heed_breaking_off()
            if ready:
                return True
        return False
