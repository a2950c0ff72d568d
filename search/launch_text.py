"""What a search is about to do, in words: what its configuration tells, and nothing is asked."""

from __future__ import annotations

from latency.command_config import CommandConfig
from latency.config import AscendConfig, OnnxRuntimeConfig, SshConfig
from latency.device import DeviceConfig, PoolConfig
from search.check import num_workers
from search.config import CampaignConfig, PluginConfig, RayConfig
from search.parts import Parts
from search.stop import REPEATING_BATCHES

#: Fields of `stop`, beside `trials`, that end a search earlier -> what they count.
_ENDS = {
    "trained": "networks trained",
    "hours": "hours",
    "training_hours": "hours of training",
    "no_improvement": "trials without a better one",
}


def describe(parts: Parts) -> list[tuple[str, str]]:
    """Return (label, text) lines that say what a campaign is about to do."""
    config = parts.config
    return [
        ("space", f"{parts.space.name}: {parts.space.size:,} token vectors"),
        ("controller", config.controller.name),
        ("evaluator", f"{config.evaluator.name}, {parts.epochs:g} epochs"),
        *parts.evaluator.about(),
        *launch_lines(config),
    ]


def launch_lines(config: CampaignConfig) -> list[tuple[str, str]]:
    """Return (label, text) lines: workers, devices, what waits for what, how many trials."""
    devices = [("device", _device(config, device)) for device in config.devices]
    return [
        ("workers", _workers(config)),
        *(devices or [("device", "none: the evaluator gives the latency")]),
        ("waiting", _waiting(config)),
        ("trials", _trials(config)),
    ]


def _workers(config: CampaignConfig) -> str:
    executor = config.executor
    if not isinstance(executor, RayConfig):
        return "1, this process"
    workers = num_workers(config)
    each = _number(executor.threads, "thread") + (" and 1 NPU" if executor.npus else "")
    pinned = ", kept to their own cores" if executor.pin else ""
    if workers is None:
        return f"Ray workers x {each}, as many as there is room for{pinned}"
    return f"{_number(workers, 'Ray worker')} x {each}{pinned}"


def _device(config: CampaignConfig, device: DeviceConfig | PluginConfig) -> str:
    """How a device's latencies come about."""
    there = ", at its node of Ray's cluster" if device.name in config.at_nodes else ""
    if isinstance(device, PluginConfig):
        return f"{device.class_path}{there}"
    if isinstance(device, PoolConfig):
        members = ", ".join(member.name for member in device.devices)
        return f"{device.name}: shared among {members}{there}"
    guard = ", with a drift guard" if device.drift is not None else ""
    return f"{device.name}: {_means(device)}, {device.precision}{there}{guard}"


def _means(device: OnnxRuntimeConfig | SshConfig | CommandConfig | AscendConfig) -> str:
    if isinstance(device, CommandConfig):
        return f"{device.run[0]}, {_number(device.threads, 'thread')}"
    if isinstance(device, AscendConfig):
        return f"MindSpore on {device.target} {device.device_id}, effort {device.effort}"
    host = f" on {device.host}" if isinstance(device, SshConfig) else ""
    threads = _number(device.threads, "thread")
    return f"ONNX Runtime{host}, {threads}, effort {device.effort}"


def _waiting(config: CampaignConfig) -> str:
    """What waits for what."""
    waits = []
    if any(getattr(device, "shares_cores", False) for device in config.devices):
        waits.append("measuring waits for idle workers, because they share cores")
    elif config.devices:
        meanwhile = ", while others train" if config.mode == "async" else ""
        waits.append(f"a network is measured before a worker gets it{meanwhile}")
    if not isinstance(config.executor, RayConfig):
        waits.append("one network is evaluated after another")
    elif config.mode == "async":
        waits.append("a worker that is done gets the next network at once")
    else:
        waits.append("a worker that is done waits for the rest of its batch")
    return "; ".join(waits)


def _trials(config: CampaignConfig) -> str:
    stop = config.stop
    ends = [
        f"{getattr(stop, name):,g} {what}, "
        for name, what in _ENDS.items()
        if getattr(stop, name) is not None
    ]
    return (
        f"{stop.trials:,}, {config.mode}, in batches of {config.batch_size}; ends sooner at"
        f" {''.join(ends)}{REPEATING_BATCHES} batches of repeats"
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
