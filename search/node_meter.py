"""A latency device at another node of Ray's cluster, measured where it hangs.

A node offers what hangs at it as a resource of its own:

    ray start --address HEAD:6379 --resources '{"device:pixel1": 1}'

and `executor.devices: [pixel1]` says that the campaign's device of that name is measured there.
The device's configuration goes to that node, with the networks as data: graphs are built there,
and whatever the device needs (adb, a key, onnxruntime) has to be there only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from latency.device import DeviceConfig, LatencyMeter, Outcome, only_measurement
from latency.measurement import Measurement
from search.ray_cluster import connect
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import ConfigError, MeasurementError

if TYPE_CHECKING:
    from search.config import PluginConfig, RayConfig

#: The node has so long to start a process that measures.
START_LIMIT_S = 120.0


class _AtNode:
    """The body of a Ray actor at the device's node; the device is its for as long as it lives."""

    def __init__(self, device: DeviceConfig | PluginConfig, full: bool) -> None:
        self._device = device
        self._full = full

    def start(self) -> None:
        """Make the meter; not in the constructor, whose exceptions Ray hides behind its own."""
        from search.parts import device_meter

        self._meter = device_meter(self._device, full=self._full)

    def identity(self) -> dict[str, Any] | MeasurementError:
        """Return the meter's, or why there is none."""
        try:
            return self._meter.identity()
        except MeasurementError as error:
            return error

    def measure_all(
        self, architectures: list[Architecture], style: NetworkStyle
    ) -> Iterator[Outcome]:
        """Yield what the meter yields, one by one."""
        yield from self._meter.measure_all(architectures, style)


class NodeMeter(LatencyMeter):
    """Times networks on a device of another node.

    Args:
        config: Of the cluster.
        device: Of the device; its name is the resource's.
        full: Never quickly.

    Raises:
        ConfigError: The cluster cannot be joined, no node of it offers the device, or what is
            configured of the device does not work there.
    """

    def __init__(
        self, config: RayConfig, device: DeviceConfig | PluginConfig, *, full: bool
    ) -> None:
        self._config = config
        self._device = device
        self._full = full
        self._resource = f"device:{device.name}"
        self._ray = connect(config)
        if self._resource not in self._ray.cluster_resources():
            raise ConfigError(
                f"executor.devices: no node of Ray's cluster offers {self._resource!r}; start the"
                f" node at which {device.name} hangs with `ray start --address ... --resources"
                f" '{{\"{self._resource}\": 1}}'`."
            )
        self._session, self._actor = "", None
        try:
            self._started()
        except MeasurementError as error:
            raise ConfigError(f"executor.devices: {error}.") from None

    def identity(self) -> dict[str, Any]:
        """Return what the device's own meter returns."""
        try:
            found = self._ray.get(self._started().identity.remote())
        except self._ray.exceptions.RayError as error:
            raise self._lost(error) from None
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

        If the process at the node dies, the network that was its turn has no figure, and another
        process measures the rest; if the node starts none, they have no figure either.
        """
        left = {network.hash: network for network in architectures}
        while left:
            try:
                for outcome in self._started().measure_all.remote(list(left.values()), style):
                    network, found = self._ray.get(outcome)
                    yield left.pop(network.hash), found
            except MeasurementError as error:
                yield from ((network, error) for network in left.values())
                return
            except self._ray.exceptions.RayError as error:
                yield left.pop(next(iter(left))), self._lost(error)
            else:
                return

    def _started(self) -> Any:
        """The process that measures; a new one, if there is none or the connection is a new one.

        Raises:
            MeasurementError: The node does not start it.
            ConfigError: What is configured of the device does not work there.
        """
        self._ray = connect(self._config)  # the executor leaves the cluster when it is done
        session = self._ray.get_runtime_context().get_job_id()
        if self._actor is not None and self._session == session:
            return self._actor
        actor = (
            self._ray.remote(_AtNode)
            .options(num_cpus=0, resources={self._resource: 1})
            .remote(self._device, self._full)
        )
        try:
            self._ray.get(actor.start.remote(), timeout=START_LIMIT_S)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise self._lost(error) from None
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            raise self._lost(error) from None
        self._session, self._actor = session, actor
        return actor

    def _lost(self, error: Exception) -> MeasurementError:
        """What a node that is gone, or has no room, means for a measurement."""
        self._actor = None
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return MeasurementError(f"the node of {self._resource} gives no figure: {first_line}")
