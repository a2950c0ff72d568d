"""10,000 broken configurations: each is accepted or refused in one sentence, at once."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latency.device import DeviceConfig
from retrain.config import Recipe
from search.config import campaign_config
from space.errors import ConfigError
from space.records import build, find_config, load_yaml, parse_yaml, shipped_names
from space.search_space import SpaceConfig

FOLDER = Path(__file__).parent
KINDS = ("search", "space", "device", "retrain")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**30, -(10**18), 0.0, 0.5, -1e-300, 1e300, "", "x", "0",
    "null", "ppo", "../../etc/passwd", "a" * 5000, "\u0000", "\ud7ff🦀", [], [[]], [1, "x"], {},
    {"": 1}, {"name": "random"}, {"name": 3}, {"class": "os:system"}, {"class": ":"}, [{}] * 50,
)  # fmt: skip
LETTERS = "{}[]:,&*!|>'\"%@`#- \n\t~?0eE.+xya\u0085\u2028\ufeff\x00"


def accept(kind: str, values: Any) -> None:
    """What reading a file of this kind does with its values."""
    if kind == "search":
        campaign_config(values, where="fuzz", folder=FOLDER)
    elif kind == "space":
        build(SpaceConfig, values, where="fuzz")
    elif kind == "device":
        build(DeviceConfig, values, where="fuzz")
    else:
        build(Recipe, values, where="fuzz")


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside."""
    inside = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def mutate(values: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Change, remove, rename, add or move one to three things."""
    made = copy.deepcopy(values)
    for _ in range(rng.integers(1, 4)):
        found = list(places(made))
        if not found:
            break
        *path, key = found[rng.integers(len(found))]
        parent: Any = made
        for step in path:
            parent = parent[step]
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        match rng.integers(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[f"{key}x" if rng.random() < 0.5 else str(key)[:-1]] = parent.pop(key)
            case 2 if isinstance(parent, dict):
                parent[str(rng.integers(100))] = value
            case 3:
                *other, last = found[rng.integers(len(found))]
                target: Any = made
                try:
                    for step in other:
                        target = target[step]
                    parent[key] = copy.deepcopy(target[last])
                except (KeyError, IndexError, TypeError):
                    continue
            case _:
                parent[key] = value
    return made


def garble(text: str, rng: np.random.Generator) -> str:
    """Insert, remove or double a few letters or lines."""
    letters = list(text)
    for _ in range(rng.integers(1, 6)):
        at, length = int(rng.integers(len(letters) + 1)), int(rng.integers(1, 30))
        match rng.integers(3):
            case 0:
                letters[at:at] = LETTERS[rng.integers(len(LETTERS))]
            case 1:
                del letters[at : at + length]
            case _:
                letters[at:at] = letters[at : at + length]
    return "".join(letters)


def check(kind: str, make: Any, shown: object) -> bool:
    """Whether it was accepted; refused it must be in one sentence, and at once."""
    started = time.monotonic()
    try:
        accept(kind, make())
    except ConfigError as error:
        faults = str(error).split("\n")
        # One line, which is one sentence, for each thing that is wrong.
        assert all(re.fullmatch(r".+: .+[.?]", fault) for fault in faults), (shown, faults)
        assert max(map(len, faults)) < 1000, (shown, faults)
        accepted = False
    else:
        accepted = True
    # Generous: the machine may be busy, but nothing may hang.
    assert time.monotonic() - started < 20, shown
    return accepted


@pytest.mark.parametrize("kind", KINDS)
def test_changed_values_are_accepted_or_refused_in_one_sentence(kind: str) -> None:
    rng = np.random.default_rng(1)
    files = [load_yaml(find_config(name, kind)) for name in shipped_names(kind)]
    accepted = 0
    for _ in range(1500):
        values = mutate(files[rng.integers(len(files))], rng)
        accepted += check(kind, lambda values=values: values, values)
    assert 0 < accepted < 1500


@pytest.mark.parametrize("kind", KINDS)
def test_garbled_text_is_accepted_or_refused_in_one_sentence(kind: str) -> None:
    rng = np.random.default_rng(2)
    texts = [find_config(name, kind).read_text() for name in shipped_names(kind)]
    accepted = 0
    for _ in range(1000):
        text = garble(texts[rng.integers(len(texts))], rng)
        accepted += check(kind, lambda text=text: parse_yaml(text, where="fuzz"), text)
    assert 0 < accepted < 1000
