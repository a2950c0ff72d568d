"""The border: what YAML may say, and the sentences that bad input gets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from space.errors import ConfigError
from space.records import (
    apply_overrides,
    build,
    dump_yaml,
    find_config,
    load_yaml,
    parse_yaml,
    record,
    shipped_names,
    to_plain,
)


@record
class Cosine:
    name: Literal["cosine"]
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be > 0, but got {self.learning_rate!r}")


@record
class Step:
    name: Literal["step"]
    epochs: tuple[int, ...] = ()


@record
class Training:
    schedule: Annotated[Cosine | Step, Field(discriminator="name")]
    epochs: int
    augment: bool = False
    size: int | tuple[int, ...] = 3
    limit: float | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", 1e-4),
        ("a: 1.5E+3", 1500.0),
        ("a: .5", 0.5),
        ("a: 0x1F", 31),
        ("a: 0o17", 15),
        ("a: yes", "yes"),
        ("a: off", "off"),
        ("a: 2020-01-01", "2020-01-01"),
        ("a: '1e-4'", "1e-4"),
        ("a: true", True),
        ("a: ~", None),
        ("a: 1_000", "1_000"),
        ("a: 012", 12),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(text, where="x") == {"a": value}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\na: 2", "line 2: duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "duplicate key 'b'"),
        ("a: .inf", "must be finite"),
        ("a: -.INF", "must be finite"),
        ("a: .nan", "must be finite"),
        ("a: 1e999", "must be finite"),
        ("1: a", "keys must be strings"),
        ("a: &x {b: *x}", "alias refers to the value that contains it"),
        ("a: !!python/name:os.system x", "python/name"),
        ("a: [", "line 1"),
        ("a: 1\n---\nb: 2", "document"),
        ("a: " + "[" * 3000, "nested more than 50 deep"),
        ("a: " + "9" * 5000, "digits"),
    ],
)
def test_what_yaml_may_not_say_gets_one_sentence(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="x.yaml")
    assert part in str(caught.value)
    assert str(caught.value).startswith("x.yaml:")
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_is_refused_before_it_goes_off() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="aliases expand"):
        parse_yaml("\n".join(lines), where="x")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"schedule": {"name": "cosine"}, "epochs": 1, "epoch": 2},
            "x.yaml: unknown key 'epoch'; did you mean 'epochs'?",
        ),
        (
            {"schedule": {"name": "cosine", "lerning_rate": 1.0}, "epochs": 1},
            "x.yaml: unknown key 'schedule.lerning_rate'; did you mean 'learning_rate'?",
        ),
        (
            {"schedule": {"name": "cosin"}, "epochs": 1},
            "x.yaml: schedule has the unknown name 'cosin'; did you mean 'cosine'?",
        ),
        (
            {"schedule": {"epochs": [1]}, "epochs": 1},
            "x.yaml: schedule must have the key 'name'.",
        ),
        (
            {"schedule": {"name": "cosine", "learning_rate": "1e-4"}, "epochs": 1},
            "x.yaml: schedule.learning_rate must be a number, but got '1e-4'.",
        ),
        (
            {"schedule": {"name": "cosine", "learning_rate": True}, "epochs": 1},
            "x.yaml: schedule.learning_rate must be a number, but got True.",
        ),
        (
            {"schedule": {"name": "cosine", "learning_rate": -1.0}, "epochs": 1},
            "x.yaml: schedule.learning_rate must be > 0, but got -1.0.",
        ),
        (
            {"schedule": {"name": "step", "epochs": [1, "2"]}, "epochs": 1},
            "x.yaml: schedule.epochs.1 must be an integer, but got '2'.",
        ),
        (
            {"schedule": {"name": "step"}, "epochs": True},
            "x.yaml: epochs must be an integer, but got True.",
        ),
        (
            {"schedule": {"name": "step"}, "epochs": 1.0},
            "x.yaml: epochs must be an integer, but got 1.0.",
        ),
        (
            {"schedule": {"name": "step"}, "epochs": 1, "augment": "yes"},
            "x.yaml: augment must be true or false, but got 'yes'.",
        ),
        ({"schedule": {"name": "step"}}, "x.yaml: epochs is missing."),
        (
            {"schedule": {"name": "step"}, "epochs": 1, "size": "3"},
            "x.yaml: size must be an integer or a list, but got '3'.",
        ),
        ([], "x.yaml: must be a mapping, but got a list."),
        (None, "x.yaml: must be a mapping, but got None."),
    ],
)
def test_bad_values_get_a_sentence_with_place_rule_and_value(values: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Training, values, where="x.yaml")
    assert str(caught.value) == sentence


def test_every_offending_item_is_listed_up_to_five() -> None:
    values = {"schedule": {"name": "step"}, "epochs": 1, **{f"key{i}": 0 for i in range(8)}}
    with pytest.raises(ConfigError) as caught:
        build(Training, values, where="x.yaml")
    assert len(str(caught.value).splitlines()) == 6
    assert "and 3 more" in str(caught.value)


def test_records_come_back_from_plain_values_and_from_yaml() -> None:
    training = Training(Step("step", (3, 5)), epochs=7, size=(1, 2), limit=1e-4)
    assert build(Training, to_plain(training), where="x") == training
    assert build(Training, parse_yaml(dump_yaml(training), where="x"), where="x") == training


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**12), 10**12)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text("abyno0123 :#-", max_size=6), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_plain_values_survive_yaml(value: Any) -> None:
    assert parse_yaml(dump_yaml({"value": value}), where="x") == {"value": value}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_a_sentence(text: str) -> None:
    refused = ""
    try:
        parse_yaml(text, where="x.yaml")
    except ConfigError as error:
        refused = str(error)
    assert not refused or refused.startswith("x.yaml:")


def test_overrides_replace_nested_values_without_touching_the_original() -> None:
    values = {"stop": {"trials": 1}, "seed": 0}
    changed = apply_overrides(values, ["stop.trials=8", "stop.hours=1e-1", "name=x"])
    assert changed == {"stop": {"trials": 8, "hours": 0.1}, "seed": 0, "name": "x"}
    assert values == {"stop": {"trials": 1}, "seed": 0}


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "seed.x=1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="command line"):
        apply_overrides({"seed": 0}, [override])


def test_missing_empty_binary_and_folder_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("  \n")
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x00\xff")
    (tmp_path / "nul.yaml").write_bytes(b"a: \x00")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, part in (
        ("none.yaml", "no such file"),
        ("empty.yaml", "is empty"),
        ("binary.yaml", "binary"),
        ("nul.yaml", "binary"),
        ("list.yaml", "must hold keys and values"),
        (".", "folder"),
    ):
        with pytest.raises(ConfigError, match=part):
            load_yaml(tmp_path / name)


def test_shipped_configurations_are_found_by_name_and_misspelt_ones_get_a_hint() -> None:
    assert "mnasnet" in shipped_names("space")
    for name in ("mnasnet", "mnasnet.yaml", "configs/space/mnasnet.yaml"):
        assert find_config(name, "space").name == "mnasnet.yaml"
    with pytest.raises(ConfigError, match="did you mean 'mnasnet'"):
        find_config("mnasnett", "space")
