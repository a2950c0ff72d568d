"""What a Linux machine says about itself: processor, memory, load, governor, temperature.

`python -m latency.host` prints it as one JSON line, with the versions of what a measurement needs.
This file is also sent to devices elsewhere (latency/remote.py): of ours it may import only what is
sent along, and it must run on Python 3.8 with the standard library alone: the question may be
what else there is.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from datetime import datetime, timezone
from typing import Any

from space.errors import MeasurementError


def read_text(path: str) -> str | None:
    """Return a file's text without white space and zero bytes around it; None if unreadable."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0 \t\n")
    except OSError:
        return None


def processor_name() -> str:
    """Return the processor's or the board's model as Linux names it, or else its architecture."""
    lines = (read_text("/proc/cpuinfo") or "").splitlines()
    fields = dict(line.partition(":")[::2] for line in lines)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return (
        named.get("model name")
        or named.get("Model")
        or read_text("/proc/device-tree/model")
        or platform.machine()
    )


def allowed_cores() -> list[int]:
    """Return the numbers of the processor cores that this process may use, ascending."""
    return sorted(os.sched_getaffinity(0))


def memory_bytes() -> tuple[int, int] | None:
    """Return the memory in all and the memory free for use, or None where Linux does not say."""
    return _sizes("/proc/meminfo", "MemTotal", "MemAvailable")


def resident_bytes() -> tuple[int, int] | None:
    """Return this process's resident memory, now and at its highest, or None where not told."""
    return _sizes("/proc/self/status", "VmRSS", "VmHWM")


def _sizes(path: str, first: str, second: str) -> tuple[int, int] | None:
    """Two of the sizes that a file of Linux names and gives in units of 1024 bytes, in bytes."""
    sizes = {}
    for line in (read_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        sizes[name] = value.split()[0] if value.split() else "0"
    try:
        return 1024 * int(sizes[first]), 1024 * int(sizes[second])
    except (KeyError, ValueError):
        return None


def check_memory(needed_bytes: int, memory: tuple[int, int] | None) -> None:
    """Refuse a network that this machine's memory (in all, free) cannot hold.

    Raises:
        MeasurementError: The network's fault if it needs more than there is in all.
    """
    if memory is None:
        return
    total, available = memory
    if needed_bytes > total:
        raise MeasurementError(
            f"the network needs about {needed_bytes:,} bytes of memory, but there are {total:,}",
            cause="architecture",
        )
    if needed_bytes > available:
        raise MeasurementError(
            f"the network needs about {needed_bytes:,} bytes of memory, but only"
            f" {available:,} are free now"
        )


def governor(core: int) -> str | None:
    """Return the name of the policy that sets a core's frequency."""
    return read_text(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor")


def frequency_mhz(core: int) -> float | None:
    """Return a core's frequency now."""
    text = read_text(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
    if text is not None and text.isdigit():
        return round(int(text) / 1000, 1)
    for line in (read_text("/proc/cpuinfo") or "").splitlines():
        if line.startswith("cpu MHz"):
            return round(float(line.partition(":")[2]), 1)
    return None


def temperature_c() -> float | None:
    """Return the hottest sensor's reading."""
    patterns = ("/sys/class/thermal/thermal_zone*/temp", "/sys/class/hwmon/hwmon*/temp*_input")
    texts = [read_text(path) for pattern in patterns for path in glob.glob(pattern)]
    readings = [int(text) / 1000 for text in texts if text and text.lstrip("-").isdigit()]
    return max(readings, default=None)


def environment(core: int) -> dict[str, Any]:
    """Return the conditions of a measurement as JSON values; None where the machine is silent."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hostname": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "frequency_mhz": frequency_mhz(core),
        "governor": governor(core),
        "temperature_c": temperature_c(),
    }


class CpuTimes:
    """What the processors had done at one moment, to tell others' work from this process's."""

    def __init__(self) -> None:
        ticks = (read_text("/proc/stat") or "cpu").splitlines()[0].split()[1:]
        hertz = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, ...
        self._idle_s = sum(int(tick) for tick in ticks[3:5]) / hertz
        own = os.times()
        self._own_s = own.user + own.system
        self._clock_s = time.monotonic()

    def others_share(self) -> float | None:
        """Share of the host's processor time, 0 to 1, that others took since.

        None if less than 50 ms have passed: Linux counts in steps of 10 ms.
        """
        now = CpuTimes()
        if now._clock_s - self._clock_s < 0.05:
            return None
        available_s = (os.cpu_count() or 1) * (now._clock_s - self._clock_s)
        used_s = available_s - (now._idle_s - self._idle_s)
        others_s = used_s - (now._own_s - self._own_s)
        return round(min(1.0, max(0.0, others_s / available_s)), 3)


def describe() -> dict[str, Any]:
    """Return the machine and its software as JSON values.

    Keys: python, executable, processor, machine, system, hostname, cores (numbers of those that
    may be used), governor (of the last of them), memory_bytes, free_bytes (where temporary files
    go), load_average, temperature_c, numpy and onnxruntime (version or null), providers (of ONNX
    Runtime), problems (package -> why it cannot be imported).
    """
    cores = allowed_cores()
    memory = memory_bytes()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "processor": processor_name(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "hostname": socket.gethostname(),
        "cores": cores,
        "governor": governor(cores[-1]),
        "memory_bytes": memory[0] if memory else None,
        "free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "load_average": round(os.getloadavg()[0], 2),
        "temperature_c": temperature_c(),
    }
    return {**found, **_packages()}


def _packages() -> dict[str, Any]:
    found: dict[str, Any] = {"numpy": None, "onnxruntime": None, "providers": []}
    problems = {}
    for name in ("numpy", "onnxruntime"):
        try:
            module = __import__(name)
            found[name] = str(module.__version__)
        except Exception as error:  # a broken installation may raise anything
            problems[name] = f"{type(error).__name__}: {error}"
        else:
            if name == "onnxruntime":
                found["providers"] = list(module.get_available_providers())
    return {**found, "problems": problems}


if __name__ == "__main__":
    print(json.dumps(describe()))
