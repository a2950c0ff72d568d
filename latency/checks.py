"""What a device has and what it lacks for measuring, line by line."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any, Literal

from latency.command_config import CommandConfig
from latency.config import AscendConfig, OnnxRuntimeConfig, SshConfig
from latency.device import DeviceConfig, PoolConfig
from space.errors import ConfigError, MeasurementError
from space.records import record

State = Literal["ok", "lacks", "unknown"]


@record
class Finding:
    """One line of a check.

    Attributes:
        name: What was looked at.
        state: `ok`; `lacks`: without it nothing can be measured; `unknown`: it could not be seen.
        text: What was found.
    """

    name: str
    state: State
    text: str


def check_device(config: DeviceConfig) -> list[Finding]:
    """Return what a device has and lacks; nothing is measured."""
    if isinstance(config, SshConfig):
        return _check_ssh(config)
    if isinstance(config, CommandConfig):
        return _check_command(config)
    if isinstance(config, AscendConfig):
        return _check_ascend(config)
    if isinstance(config, PoolConfig):
        return _check_pool(config)
    return _check_this_host(config)


def _check_this_host(config: OnnxRuntimeConfig) -> list[Finding]:
    from latency.device import make_meter
    from latency.host import describe

    findings = _machine(describe(), config)
    try:
        make_meter(config)
    except ConfigError as error:
        return [*findings, Finding("settings", "lacks", str(error))]
    return [*findings, Finding("settings", "ok", "this host can be used as they say")]


#: What is looked at on the way to a machine elsewhere, in this order.
_WAY = ("ssh client", "reachable", "host key", "login", "python")


def _check_ssh(config: SshConfig) -> list[Finding]:
    from latency.remote import SshMeter
    from latency.reports import DeviceFault

    place = config.host if config.port is None else f"{config.host}, port {config.port}"
    found_there = (shutil.which("ssh") or "", place, "known", "by key, no password", "")
    texts = dict(zip(_WAY, found_there, strict=True))
    try:
        found = SshMeter(config).describe()
    except DeviceFault as fault:
        stage = {"ssh": "ssh client", "answer": "python"}.get(fault.stage, fault.stage)
        reached = _WAY.index(stage)
        return [
            *(Finding(name, "ok", texts[name]) for name in _WAY[:reached]),
            Finding(stage, "lacks", str(fault)),
            *(Finding(name, "unknown", "not reached") for name in _WAY[reached + 1 :]),
        ]
    return [
        *(Finding(name, "ok", texts[name]) for name in _WAY[:-1]),
        *_machine(found, config),
    ]


def _machine(found: dict[str, Any], config: OnnxRuntimeConfig | SshConfig) -> list[Finding]:
    """What a machine says about itself (latency.host.describe), against what is needed."""
    problems = found["problems"]
    packages = [
        Finding(name, "lacks", problems[name])
        if name in problems
        else Finding(name, "ok", str(found[name]))
        for name in ("numpy", "onnxruntime")
    ]
    providers, cores = found["providers"], found["cores"]
    enough = set(config.cores or ()) <= set(cores) and config.threads <= len(cores)
    return [
        Finding("python", "ok", f"{found['python']}, {found['executable']}"),
        *packages,
        _provider(config.provider, providers),
        Finding("cores", "ok" if enough else "lacks", ", ".join(map(str, cores))),
        _seen("memory", found["memory_bytes"], "{:,} bytes"),
        _seen("free disk", found["free_bytes"], "{:,} bytes for temporary files"),
        _seen("governor", found["governor"], "{}"),
        _seen("load", found["load_average"], "{} in the last minute"),
        _seen("temperature", found["temperature_c"], "{:.0f} degrees Celsius"),
        _seen("processor", found["processor"], "{}, " + str(found["machine"])),
    ]


def _provider(wanted: str, available: list[str]) -> Finding:
    if not available:
        return Finding("provider", "unknown", "onnxruntime would say")
    state: State = "ok" if wanted in available else "lacks"
    return Finding("provider", state, f"{wanted}, of {', '.join(available)}")


def _seen(name: str, value: Any, form: str) -> Finding:
    if value is None:
        return Finding(name, "unknown", "the machine does not say")
    return Finding(name, "ok", form.format(value))


def _check_command(config: CommandConfig) -> list[Finding]:
    from latency.command import CommandMeter

    commands = [*config.convert, *config.push, config.run, *config.cleanup, *config.identify]
    if config.fetch is not None:
        commands.append(config.fetch)
    path = config.env.get("PATH")
    findings = []
    for name in dict.fromkeys(command[0] for command in commands):
        found = shutil.which(name, path=path)
        state: State = "ok" if found else "lacks"
        findings.append(Finding(name, state, found or "no such program on this host"))
    if not config.identify:
        return [*findings, Finding("identity", "unknown", "the configuration has no `identify`")]
    try:
        said = CommandMeter(config).identify()
    except MeasurementError as error:
        return [*findings, Finding("identity", "lacks", str(error))]
    return [*findings, Finding("identity", "ok", "; ".join(said))]


def _check_ascend(config: AscendConfig) -> list[Finding]:
    from latency.ascend import AscendMeter

    try:
        identity = AscendMeter(config).identity()
    except MeasurementError as error:
        return [Finding("mindspore", "lacks", str(error))]
    return [
        Finding("mindspore", "ok", identity["runtime"]),
        Finding("processor", "ok", identity["processor"]),
    ]


def _check_pool(config: PoolConfig) -> list[Finding]:
    from latency.device import make_meter

    findings = [
        dataclasses.replace(finding, name=f"{device.name}: {finding.name}")
        for device in config.devices
        for finding in check_device(device)
    ]
    try:
        make_meter(config).identity()
    except MeasurementError as error:
        return [*findings, Finding("identical", "lacks", str(error))]
    return [*findings, Finding("identical", "ok", "but for names and addresses")]
