"""Placeholders such as {model} within the arguments of a command: checked, then filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from space.records import did_you_mean

if TYPE_CHECKING:
    from latency.command_config import CommandConfig

PLACEHOLDERS = (
    "model", "folder", "converted", "remote_model", "remote_result", "id", "threads", "runs",
    "warmup", "batch", "input_shape", "address",
)  # fmt: skip

#: `{{word}}` is the text `{word}`, for programs that have braces of their own.
_PATTERN = re.compile(r"\{\{([A-Za-z_]+)\}\}|\{([A-Za-z_]+)\}")


def fill_in(arguments: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Return the arguments with placeholders replaced; an argument stays one argument."""

    def value(match: re.Match[str]) -> str:
        literal, name = match.groups()
        return values[name] if literal is None else f"{{{literal}}}"

    return [_PATTERN.sub(value, argument) for argument in arguments]


def check_commands(config: CommandConfig) -> None:
    """Check the commands of a latency.command_config.CommandConfig.

    Raises:
        ValueError: One is empty, or has an unknown placeholder or one that stands for nothing.
    """
    named = {
        "run": (config.run,),
        "fetch": () if config.fetch is None else (config.fetch,),
        **{key: getattr(config, key) for key in ("convert", "push", "cleanup", "identify")},
    }
    for key, commands in named.items():
        for command in commands:
            if not command or not command[0].strip():
                raise ValueError(f"{key} must start with a program, but got {list(command)}")
            if any("\0" in argument for argument in command):
                raise ValueError(f"{key} must hold no zero bytes, but got {list(command)}")
            _check_placeholders(key, command, config)
    if config.converted is not None:
        _check_placeholders("converted", (config.converted,), config)


def _check_placeholders(key: str, command: Sequence[str], config: CommandConfig) -> None:
    used = [name for argument in command for _, name in _PATTERN.findall(argument) if name]
    # A device has one identity, whatever the network; {converted} cannot stand for itself.
    allowed = {"identify": ("threads", "address"), "converted": ("folder", "id")}.get(
        key, PLACEHOLDERS
    )
    for name in used:
        if name not in allowed:
            hint = did_you_mean(name, allowed) or f"; known are {', '.join(allowed)}"
            raise ValueError(f"{key} must use known placeholders, but got {{{name}}}{hint}")
        if name.startswith("remote_") and config.remote_folder is None:
            raise ValueError(f"{key} must use {{{name}}} only with a remote_folder, but got none")
        if name == "converted" and config.converted is None:
            raise ValueError(f"{key} must use {{converted}} only with convert, but got none")
        if name == "address" and config.address is None:
            raise ValueError(f"{key} must use {{address}} only with an address, but got none")
