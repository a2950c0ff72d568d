"""Measuring in a thread: an asynchronous search goes on while a device times its networks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from latency.processes import BrokenOff, breaking_off
from search.measuring import Figures, Latencies
from search.store import Store
from space.architecture import Architecture
from space.errors import MeasurementError, MnasError

#: A measurement that runs at the end is waited for so long; nobody needs it any more.
END_LIMIT_S = 3.0

Found = tuple[Architecture, Figures | MeasurementError]


class MeasuringThread:
    """Measures networks in a thread of its own, those that wait together, as a pool likes it.

    Args:
        path: The campaign's database; the thread has a connection of its own.
        latencies: Is given that database in the thread; returns what measures.
    """

    def __init__(self, path: Path, latencies: Callable[[Store], Latencies]) -> None:
        self._path = path
        self._latencies = latencies
        self._asked: queue.SimpleQueue[Architecture | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Found | Exception] = queue.SimpleQueue()
        self._ended = threading.Event()
        #: Held while the devices are in use; who else uses them takes it, too.
        self.in_use = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="measuring", daemon=True)
        self._thread.start()

    def ask(self, network: Architecture) -> None:
        """Have a network measured."""
        self._asked.put(network)

    def found(self, timeout_s: float) -> list[Found]:
        """Return what has been measured, waiting at most `timeout_s` for the first; may be empty.

        Raises:
            ConfigError: A device turns out not to work as configured.
        """
        found: list[Found] = []
        try:
            while True:
                one = self._found.get(timeout=0.0 if found else timeout_s)
                if isinstance(one, Exception):
                    if found:  # they are told first
                        self._found.put(one)
                        return found
                    raise one
                found.append(one)
        except queue.Empty:
            return found

    def close(self) -> None:
        """End the thread after the network that it measures; those that wait are dropped.

        A measurement that takes long is broken off: no program of it outlives the campaign.
        """
        self._ended.set()
        self._asked.put(None)
        self._thread.join(timeout=END_LIMIT_S)
        if self._thread.is_alive():
            with breaking_off():
                self._thread.join(timeout=END_LIMIT_S)

    def _work(self) -> None:
        try:
            with closing(Store(self._path, read_only=False)) as store:
                latencies = self._latencies(store)
                while True:
                    networks = self._next_group()
                    if networks is None:
                        return
                    with self.in_use:
                        for found in latencies.measure(networks):
                            self._found.put(found)
                            if self._ended.is_set():
                                return
        except Exception as error:
            # The search's own thread raises it.
            self._found.put(error)
        except BrokenOff:
            return  # nobody listens any more
        except BaseException as error:
            # A plugin's meter that ends its thread, as sys.exit() does, must not do so unseen.
            self._found.put(MnasError(f"the device's meter ended its thread: {error!r}"))

    def _next_group(self) -> list[Architecture] | None:
        """The networks that wait, at least one; None at the end."""
        networks = [self._asked.get()]
        while not self._asked.empty():
            networks.append(self._asked.get())
        group = [network for network in networks if network is not None]
        return None if len(group) < len(networks) else group
