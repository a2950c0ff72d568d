"""The border: YAML or JSON text becomes frozen records here, once, strictly, or is refused.

A record is a frozen dataclass marked with `@record`; its fields' types are the schema and its
defaults are the only defaults. `load_yaml` reads YAML 1.2 scalars (`1e-4` is a number; `yes`,
`no`, `on` and `off` are strings) and refuses duplicate keys, alias bombs and numbers that are
not finite. `build` turns plain values into a record and raises ConfigError with the file, the
dotted path, the rule, the value given and, for a misspelt key, the nearest name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from space.errors import ConfigError

T = TypeVar("T")

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_NODES = 100_000
MAX_CONFIG_DEPTH = 50


@dataclass_transform(frozen_default=True, kw_only_default=False)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass with slots that `build` validates strictly.

    `__post_init__` raises ValueError with a sentence that starts with the field's name:
    `learning_rate must be > 0, but got -1.0`.
    """
    made = dataclasses.dataclass(frozen=True, slots=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return made


# ---------------------------------------------------------------------------- YAML


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars, no silent overwriting of keys, and a depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a value; its nesting is bounded."""
        self._depth += 1
        if self._depth > MAX_CONFIG_DEPTH:
            raise ConfigError(f"values are nested more than {MAX_CONFIG_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    if len(text) > 30:
        raise yaml.constructor.ConstructorError(
            None, None, f"the number {text[:12]}... has {len(text)} digits", node.start_mark
        )
    return int(text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise yaml.constructor.ConstructorError(
            None, None, f"numbers must be finite, but got {text}", node.start_mark
        )
    return value


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"keys must be strings, but got {key!r}", key_node.start_mark
            )
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {key!r}; keep one of the two", key_node.start_mark
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _expanded_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of nodes after every alias is written out; cycles are refused."""
    if id(node) in sizes:
        if sizes[id(node)] < 0:
            raise ConfigError("an alias refers to the value that contains it")
        return sizes[id(node)]
    sizes[id(node)] = -1
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_expanded_nodes(child, sizes) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_expanded_nodes(k, sizes) + _expanded_nodes(v, sizes) for k, v in node.value)
    sizes[id(node)] = total
    return total


def parse_yaml(text: str, *, where: str) -> Any:
    """Return the plain value (dict, list, str, int, float, bool, None) of one YAML document.

    Raises:
        ConfigError: The text is not one YAML document under this module's rules.
    """
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_nodes(node, {}) > MAX_CONFIG_NODES:
            raise ConfigError(f"aliases expand it to more than {MAX_CONFIG_NODES} values")
        return loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{where}:{line} {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{where}: not YAML: {first_line}.") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a configuration file.

    Raises:
        ConfigError: The file is missing, empty, too large, not text, or not readable.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ConfigError(f"{path}: must be a file, but it is a folder.")
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path}: a configuration must be under {MAX_CONFIG_BYTES:,} bytes,"
                f" but it has {size:,}."
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be UTF-8 text, but it is binary.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if "\x00" in text:
        raise ConfigError(f"{path}: must be UTF-8 text, but it is binary.")
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty.")
    return text


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: See `read_text` and `parse_yaml`; or the document is not a mapping.
    """
    value = parse_yaml(read_text(path), where=str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold keys and values, but it holds {_describe(value)}.")
    return value


def shipped_names(room: str) -> list[str]:
    """Names of the configurations shipped in configs/<room>/, without their ending."""
    folder = importlib.resources.files("configs") / room
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def find_config(name_or_path: str, room: str, *, relative_to: Path | None = None) -> Path:
    """Return the path of a configuration given by path or, if shipped, by name.

    Args:
        name_or_path: `digits`, `digits.yaml`, `configs/search/digits.yaml` or any path.
        room: Folder below configs/ in which names are looked up.
        relative_to: Folder against which a relative path is tried after the current one.

    Raises:
        ConfigError: Neither a file nor a shipped name; names the nearest one.
    """
    candidates = [Path(name_or_path)]
    if relative_to is not None:
        candidates.append(relative_to / name_or_path)
    for candidate in candidates:
        if os.path.isfile(candidate):  # False for a name that is too long, where Path raises
            return candidate
    shipped = shipped_names(room)
    name = Path(name_or_path).name.removesuffix(".yaml")
    is_name = name_or_path in (name, f"{name}.yaml", f"configs/{room}/{name}.yaml")
    if is_name and name in shipped:
        return Path(str(importlib.resources.files("configs") / room / f"{name}.yaml"))
    hint = did_you_mean(name, shipped) or f"; shipped are {', '.join(shipped)}."
    shown = name_or_path or "''"
    raise ConfigError(f"{shown}: no such file or shipped {room} configuration{hint}")


# ---------------------------------------------------------------------------- records


def build(cls: type[T], values: object, *, where: str) -> T:
    """Return a record (or any annotated type) made from plain values, strictly.

    Args:
        cls: A `@record` class or a type that pydantic knows.
        values: Plain values as `load_yaml` returns them.
        where: File or source that a message starts with.

    Raises:
        ConfigError: Unknown, missing or misshapen values: the first five, each with its path.
    """
    try:
        # Through JSON, so that lists become tuples while nested objects stay strict.
        made: T = _adapter(cast(Any, cls)).validate_json(json.dumps(values, allow_nan=False))
        return made
    except ValidationError as error:
        raise ConfigError(_sentences(cls, values, error, where)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}.") from None


@functools.lru_cache(maxsize=256)
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


_PLAIN = frozenset({str, int, float, bool, type(None)})


def to_plain(value: object) -> Any:
    """Return plain JSON values (dict, list, str, int, float, bool, None) of a record."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if dataclasses.is_dataclass(kind):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(kind)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def dump_yaml(value: object) -> str:
    """Return YAML text that `parse_yaml` reads back as the same plain values."""
    text: str = yaml.dump(
        to_plain(value), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=99
    )
    return text


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose scalars read the same under YAML 1.2's rules."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    # A string is quoted where either YAML 1.1 or 1.2 would read it as something else.
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_StrictLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {
        *yaml.SafeDumper.yaml_implicit_resolvers,
        *_StrictLoader.yaml_implicit_resolvers,
    }
}


def apply_overrides(
    values: dict[str, Any], overrides: Iterable[str], *, where: str = "command line"
) -> dict[str, Any]:
    """Return a copy of `values` with each `dotted.key=value` put in; values are YAML.

    Raises:
        ConfigError: An override has no `=`, an empty key, or steps into something that is not a
            mapping. Unknown keys are found later, by `build`.
    """
    result: dict[str, Any] = json.loads(json.dumps(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{where}: an override must read key=value, but got {override!r}.")
        target: dict[str, Any] = result
        for part in parts[:-1]:
            if target.get(part) is None:
                target[part] = {}
            if not isinstance(target[part], dict):
                raise ConfigError(
                    f"{where}: {override!r} steps into {part!r}, which holds"
                    f" {_describe(target[part])} and has no keys."
                )
            target = target[part]
        target[parts[-1]] = parse_yaml(text, where=f"{where}: {key}")
    return result


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


# ---------------------------------------------------------------------------- messages


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_RULES = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "dict_type": "must be a mapping",
    "dataclass_type": "must be a mapping",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "none_required": "must be null",
    "finite_number": "must be finite",
    "dataclass_exact_type": "must be a mapping",
}


def _sentences(cls: Any, values: object, error: ValidationError, where: str) -> str:
    rules: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False, include_context=True):
        path = _plain_path(values, problem)
        dotted, rule = ".".join(path), _rule(problem)
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = sorted(_known_keys(cls, path[:-1], values))
            hint = did_you_mean(path[-1], known) or f"; known are {', '.join(known)}."
            dotted, rule = "", f"unknown key {dotted!r}{hint}"
        if problem["type"] == "value_error" and dotted:
            # A record's own check starts its message with the name of the field.
            field, _, rule = rule.partition(" ")
            dotted = f"{dotted}.{field}"
        rules.setdefault(dotted, []).append(rule)
    sentences: list[str] = []
    for dotted, alternatives in rules.items():
        merged = alternatives if not dotted else [_merge(alternatives)]
        sentences.extend(f"{where}: {dotted} {rule}".replace(":  ", ": ") for rule in merged)
    if len(sentences) > 5:
        sentences[5:] = [f"{where}: and {len(sentences) - 5} more."]
    return "\n".join(sentences)


def _merge(alternatives: Sequence[str]) -> str:
    """One rule for a value that no member of a union accepts."""
    unique = list(dict.fromkeys(alternatives))
    heads = [rule.rpartition(", but got ")[0] for rule in unique]
    if len(unique) == 1 or not all(heads):
        return unique[0]
    joined = heads[0] + "".join(f" or {head.removeprefix('must be ')}" for head in heads[1:])
    return f"{joined}, but got {unique[0].rpartition(', but got ')[2]}"


def _plain_path(values: object, problem: Any) -> list[str]:
    """The problem's place without the tags and type names that pydantic puts in for unions."""
    path: list[str] = []
    current = values
    names_a_key = problem["type"] in ("unexpected_keyword_argument", "extra_forbidden", "missing")
    for index, part in enumerate(problem["loc"]):
        last = index == len(problem["loc"]) - 1
        if isinstance(part, int) and isinstance(current, list):
            path.append(str(part))
            current = current[part] if part < len(current) else None
        elif isinstance(current, dict) and (part in current or (last and names_a_key)):
            path.append(str(part))
            current = current.get(part)
    return path


def _rule(problem: Any) -> str:
    kind, given = problem["type"], problem.get("input")
    context = problem.get("ctx", {})
    if kind == "missing":
        return "is missing."
    if kind in ("value_error", "assertion_error"):
        message = str(context.get("error", problem["msg"]))
        return message if message.endswith((".", "?")) else message + "."
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        hint = did_you_mean(str(given), known) or "."
        return f"must be one of {', '.join(known)}, but got {_describe(given)}{hint}"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        hint = did_you_mean(str(context["tag"]), tags) or f"; known are {', '.join(tags)}."
        return f"has the unknown {key} {context['tag']!r}{hint}"
    if kind == "union_tag_not_found":
        return f"must have the key {context['discriminator']}."
    rule = _RULES.get(kind) or problem["msg"].replace("Input should be", "must be")
    return f"{rule}, but got {_describe(given)}."


def _known_keys(cls: Any, path: Sequence[str], values: object) -> set[str]:
    """Field names of the record at `path` below `cls` (all members of a union)."""
    candidates = _records_in(cls)
    current = values
    for part in path:
        current = (
            current.get(part)
            if isinstance(current, dict)
            else current[int(part)]
            if isinstance(current, list)
            else None
        )
        if part.isdigit():
            continue
        found: list[Any] = []
        for candidate in candidates:
            hints = typing.get_type_hints(candidate, include_extras=True)
            if part in hints:
                found.extend(_records_in(hints[part]))
        candidates = found
    candidates = _matching(candidates, current)
    return {f.name for candidate in candidates for f in dataclasses.fields(candidate)}


def _matching(candidates: list[Any], values: object) -> list[Any]:
    """The members of a union whose tag is the one given, else all of them."""
    if not isinstance(values, dict):
        return candidates
    chosen = []
    for candidate in candidates:
        hints = typing.get_type_hints(candidate)
        tags = [
            (key, typing.get_args(hint))
            for key, hint in hints.items()
            if typing.get_origin(hint) is typing.Literal and len(typing.get_args(hint)) == 1
        ]
        if tags and all(values.get(key) in allowed for key, allowed in tags):
            chosen.append(candidate)
    return chosen or candidates


def _records_in(hint: Any) -> list[Any]:
    # An Annotated's metadata may be dataclasses' instances: pydantic's Discriminator is one.
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, list, dict):
        return [r for argument in typing.get_args(hint) for r in _records_in(argument)]
    return []
