"""Search spaces: sizes, tokens, membership, sampling."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from space.errors import ConfigError
from space.mnasnet import published
from space.records import shipped_names
from space.search_space import SearchSpace, load_space

TINY = """
name: tiny
stem: 8
stem_stride: 1
head: 32
resolution: 8
classes: 4
choices:
  op: [conv, dconv, mbconv3]
  kernel_size: [3, 5]
  se_ratio: [0, 0.25]
  skip: [pool, identity, none]
  filters_scale: [0.75, 1.0, 1.25]
  layers_offset: [-1, 0]
blocks:
  - {filters: 8, layers: 1, stride: 1}
  - {filters: 16, layers: 2, stride: 2}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    path: Path = tmp_path_factory.mktemp("space") / "tiny.yaml"
    path.write_text(TINY)
    return load_space(str(path))


def test_the_papers_space_has_432_choices_in_each_of_seven_blocks() -> None:
    assert load_space("mnasnet").size == 432**7


def test_accel_nasbench_has_its_published_size() -> None:
    assert load_space("accel_nasbench").size == 36**6 * 48 == 104_485_552_128


def test_a1_and_b1_are_members_of_the_derivation_space_and_not_of_the_literal_one() -> None:
    derivation, literal = load_space("mnasnet_derivation"), load_space("mnasnet")
    for name in ("mnasnet-a1", "mnasnet-b1"):
        network = published(name)
        tokens = derivation.encode(network)
        assert derivation.decode(tokens) == network
        assert network not in literal
    with pytest.raises(ValueError, match="block 4 is not in space mnasnet"):
        literal.encode(published("mnasnet-a1"))


def test_decode_of_encode_is_the_identity_over_a_whole_small_space(tiny: SearchSpace) -> None:
    networks: dict[str, tuple[int, ...]] = {}
    for tokens in tiny.all_tokens():
        network = tiny.decode(tokens)
        lowest = networks.setdefault(network.hash, tokens)
        assert tiny.encode(network) == lowest
        assert tiny.decode(lowest) == network
    assert tiny.size == (3 * 2 * 2 * 3 * 3 * 2) ** 2
    assert tiny.distinct_size == len(networks)


def test_every_block_of_the_small_image_space_survives_tokens_in_every_context() -> None:
    # Blocks interact only through the channels handed on: this covers the whole space.
    space = load_space("small_image")
    base = space.decode((0,) * len(space.decisions))
    per_block = len(space.decisions) // len(base.blocks)
    for index, previous in itertools.product(range(1, len(base.blocks)), range(3)):
        start = per_block * index
        tokens = [0] * len(space.decisions)
        tokens[start - 2] = previous  # the width of the block before
        ranges = [range(n) for n in space.num_choices[start : start + per_block]]
        for picked in itertools.product(*ranges):
            tokens[start : start + per_block] = picked
            network = space.decode(tokens)
            assert space.decode(space.encode(network)) == network


@pytest.mark.parametrize("name", shipped_names("space"))
def test_every_choice_changes_some_network(name: str) -> None:
    space = load_space(name)
    rng = np.random.default_rng(0)
    samples = [space.sample(rng) for _ in range(30)]
    for position, count in enumerate(space.num_choices):
        for choice in range(count):
            others = [c for c in range(count) if c != choice]
            assert any(
                space.decode((*t[:position], choice, *t[position + 1 :]))
                != space.decode((*t[:position], other, *t[position + 1 :]))
                for t in samples
                for other in others
            ), f"{space.decisions[position].name} = {choice}"


def test_sampling_is_uniform_over_tokens() -> None:
    space = load_space("small_image")
    rng = np.random.default_rng(1)
    n = 20_000
    drawn = np.array([space.sample(rng) for _ in range(n)])
    for position, count in enumerate(space.num_choices):
        observed = np.bincount(drawn[:, position], minlength=count)
        chi_square = float(((observed - n / count) ** 2 / (n / count)).sum())
        # Degrees of freedom 1 to 3: a value above 40 has probability < 1.1e-8, for 30 decisions
        # < 4e-7 in all.
        assert chi_square < 40, space.decisions[position].name


def test_the_same_generator_state_gives_the_same_sample() -> None:
    space = load_space("mnasnet")
    assert space.sample(np.random.default_rng(5)) == space.sample(np.random.default_rng(5))
    assert space.sample(np.random.default_rng(5)) != space.sample(np.random.default_rng(6))


def test_neighbours_differ_in_one_decision_and_are_all_there(tiny: SearchSpace) -> None:
    tokens = tiny.sample(np.random.default_rng(0))
    found = list(tiny.neighbours(tokens))
    assert len(found) == len(set(found)) == sum(n - 1 for n in tiny.num_choices)
    assert all(sum(a != b for a, b in zip(tokens, n, strict=True)) == 1 for n in found)


@pytest.mark.parametrize(
    ("tokens", "part"),
    [([0] * 11, "12 entries"), ([0] * 11 + [9], "block1.layers"), ([-1] + [0] * 11, "block0.op")],
)
def test_tokens_out_of_range_are_refused(tiny: SearchSpace, tokens: list[int], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        tiny.decode(tokens)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("[3, 5]", "[3, 4]", "kernel_size must be odd"),
        ("[3, 5]", "[]", "at least one choice"),
        ("[3, 5]", "[3, 3]", "different choices"),
        ("mbconv3", "mbconv", "op must hold"),
        ("resolution: 8", "resolution: 1", "resolution must be at least"),
        ("stride: 2", "stride: 3", "stride must be in"),
        ("head: 32", "haed: 32", "unknown key 'haed'"),
        ("filters: 16", "filters: 0", "filters must be at least 1"),
    ],
)
def test_a_wrong_space_gets_a_sentence(tmp_path: Path, old: str, new: str, part: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigError, match=part):
        load_space(str(path))
