"""Search spaces: sizes, tokens, membership, sampling."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from space.errors import ConfigError
from space.mnasnet import published
from space.records import shipped_names
from space.search_space import BlockConfig, ChoicesConfig, SearchSpace, SpaceConfig, load_space

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


SHIPPED = {name: load_space(name) for name in shipped_names("space")}

#: Blocks with every kind of redundancy: two names of one operation, widths that round to the same
#: number, depths that clamp at 1, skips that no layer can carry.
BLOCKS = st.builds(
    BlockConfig,
    filters=st.sampled_from([8, 16, 24, (8, 16)]),
    layers=st.sampled_from([1, 2, (1, 3)]),
    stride=st.sampled_from([1, 2]),
    choices=st.builds(
        ChoicesConfig,
        op=st.sampled_from([("dconv", "mbconv1"), ("conv", "mbconv3"), ("mbconv6",)]),
        kernel_size=st.sampled_from([(3,), (3, 5)]),
        se_ratio=st.sampled_from([(0.0,), (0.0, 0.25)]),
        skip=st.sampled_from([("identity", "none"), ("pool", "identity", "none"), ("none",)]),
        filters_scale=st.sampled_from([(1.0,), (0.75, 1.0, 1.25)]),
        layers_offset=st.sampled_from([(0,), (-1, 0), (-1, 0, 1)]),
    ),
)


@st.composite
def small_spaces(draw: st.DrawFn) -> SearchSpace:
    """A space of up to three blocks and 2,000 token vectors."""
    last = BlockConfig(filters=16, layers=(1, 2), stride=1)  # something to decide in any case
    drawn = draw(st.lists(BLOCKS, min_size=1, max_size=2))
    made = [SearchSpace(SpaceConfig("small", 8, 16, 32, 2, (*drawn[:n], last))) for n in range(3)]
    return max((space for space in made if space.size <= 2000), key=lambda space: space.size)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    path: Path = tmp_path_factory.mktemp("space") / "tiny.yaml"
    path.write_text(TINY)
    return load_space(str(path))


def test_the_papers_space_has_432_choices_in_each_of_seven_blocks() -> None:
    space = SHIPPED["mnasnet"]
    sizes = [1] * 7
    for decision, n in zip(space.decisions, space.num_choices, strict=True):
        sizes[decision.block_index] *= n
    assert sizes == [432] * 7
    assert space.size == 432**7


@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("mnasnet", 342_378_257_213_030_400),
        ("mnasnet_derivation", 608_672_457_267_609_600),
        ("accel_nasbench", 104_485_552_128),
        ("small_image", 1_469_684_121_600),
    ],
)
def test_the_number_of_networks_is_exact(name: str, networks: int) -> None:
    assert SHIPPED[name].distinct_size == networks


@settings(max_examples=40, deadline=None)
@given(small_spaces())
def test_counts_and_encodings_agree_with_listing_a_whole_space(space: SearchSpace) -> None:
    lowest: dict[str, tuple[int, ...]] = {}
    for tokens in space.all_tokens():
        network = space.decode(tokens)
        assert space.encode(network) == lowest.setdefault(network.hash, tokens)
    assert space.size == sum(1 for _ in space.all_tokens())
    assert space.distinct_size == len(lowest)


def test_accel_nasbench_has_its_published_size() -> None:
    assert SHIPPED["accel_nasbench"].size == 36**6 * 48 == 104_485_552_128


def test_a1_and_b1_are_members_of_the_derivation_space_and_not_of_the_literal_one() -> None:
    derivation, literal = SHIPPED["mnasnet_derivation"], SHIPPED["mnasnet"]
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
    space = SHIPPED["small_image"]
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


@pytest.mark.parametrize("name", SHIPPED)
def test_every_choice_changes_some_network(name: str) -> None:
    space = SHIPPED[name]
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


#: The probability with which one of the statistical tests below fails by chance, had its seed not
#: been fixed: each divides it by its number of comparisons.
FALSE_ALARM = 1e-6


def chi_square_excess(counts: np.ndarray, *, comparisons: int) -> float:
    """How far counts lie from equal ones, in units of what chance allows: above 1 is a fault."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return statistic / float(chi2.isf(FALSE_ALARM / comparisons, counts.size - 1))


@pytest.mark.parametrize("name", ["mnasnet", "small_image"])
def test_sampling_is_uniform_over_tokens_and_over_all_pairs_of_them(name: str) -> None:
    space = SHIPPED[name]
    rng = np.random.default_rng(1)
    drawn = np.array([space.sample(rng) for _ in range(10_000)]).T
    pairs = list(itertools.combinations(range(len(drawn)), 2))
    comparisons = len(pairs) + len(drawn)
    for position, n in enumerate(space.num_choices):
        counts = np.bincount(drawn[position], minlength=n)
        assert chi_square_excess(counts, comparisons=comparisons) < 1, position
    for a, b in pairs:
        n = space.num_choices[b]
        counts = np.bincount(drawn[a] * n + drawn[b], minlength=n * space.num_choices[a])
        assert chi_square_excess(counts, comparisons=comparisons) < 1, (a, b)


def test_the_statistic_finds_a_bias_of_an_eighth() -> None:
    rng = np.random.default_rng(1)
    biased = np.bincount(rng.choice(3, size=10_000, p=[0.375, 0.3125, 0.3125]))
    assert chi_square_excess(biased, comparisons=1000) > 1


def test_the_same_generator_state_gives_the_same_sample() -> None:
    space = SHIPPED["mnasnet"]
    assert space.sample(np.random.default_rng(5)) == space.sample(np.random.default_rng(5))
    assert space.sample(np.random.default_rng(5)) != space.sample(np.random.default_rng(6))


def test_neighbours_differ_in_one_decision_and_are_all_there(tiny: SearchSpace) -> None:
    tokens = tiny.sample(np.random.default_rng(0))
    found = list(tiny.neighbours(tokens))
    assert len(found) == len(set(found)) == sum(n - 1 for n in tiny.num_choices)
    assert all(sum(a != b for a, b in zip(tokens, n, strict=True)) == 1 for n in found)


@pytest.mark.parametrize("name", SHIPPED)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), changes=st.integers(1, 9))
def test_a_mutation_changes_exactly_the_number_of_decisions_asked_for(
    name: str, seed: int, changes: int
) -> None:
    space, rng = SHIPPED[name], np.random.default_rng(seed)
    tokens = space.sample(rng)
    made = space.mutate(tokens, rng, changes=changes)
    assert space.check(made) == made
    assert sum(a != b for a, b in zip(tokens, made, strict=True)) == changes


def test_mutations_are_uniform_over_decisions_and_over_their_other_choices() -> None:
    space = SHIPPED["mnasnet"]
    rng = np.random.default_rng(2)
    tokens = space.sample(rng)
    made = np.array([space.mutate(tokens, rng) for _ in range(20_000)])
    changed = made != np.array(tokens)
    assert chi_square_excess(changed.sum(axis=0), comparisons=43) < 1
    for position in [k for k, n in enumerate(space.num_choices) if n > 2]:
        counts = np.bincount(
            made[changed[:, position], position], minlength=space.num_choices[position]
        )
        others = np.delete(counts, tokens[position])
        assert chi_square_excess(others, comparisons=43) < 1


def test_pairs_of_mutated_decisions_are_uniform_over_all_pairs() -> None:
    space = SHIPPED["accel_nasbench"]
    rng = np.random.default_rng(3)
    tokens = np.array(space.sample(rng))
    made = np.array([space.mutate(tokens, rng, changes=2) for _ in range(20_000)])
    first, second = np.nonzero(made != tokens)[1].reshape(-1, 2).T
    counts = np.bincount(first * 28 + second, minlength=28 * 28).reshape(28, 28)
    assert chi_square_excess(counts[np.triu_indices(28, k=1)], comparisons=1) < 1


@pytest.mark.parametrize("name", SHIPPED)
def test_a_mutation_can_be_made_to_change_the_network(name: str) -> None:
    space = SHIPPED[name]
    rng = np.random.default_rng(4)
    for _ in range(200):
        tokens = space.sample(rng)
        made = space.mutate(tokens, rng, different_network=True)
        assert space.decode(made) != space.decode(tokens)


def test_where_no_mutation_changes_the_network_that_is_said() -> None:
    fixed = ChoicesConfig(layers_offset=(-1, 0))  # both give one layer
    space = SearchSpace(SpaceConfig("same", 8, 8, 8, 2, (BlockConfig(8, 1, 1, fixed),)))
    rng = np.random.default_rng(0)
    assert space.mutate((0,), rng) == (1,)
    with pytest.raises(ValueError, match="must have mutations that stand for another network"):
        space.mutate((0,), rng, different_network=True)


@pytest.mark.parametrize("changes", [0, -1, 43])
def test_an_impossible_number_of_changes_is_refused(changes: int) -> None:
    space = SHIPPED["mnasnet"]
    with pytest.raises(ValueError, match=rf"changes must be in \[1, 42\].*got {changes}"):
        space.mutate([0] * 42, np.random.default_rng(0), changes=changes)


def test_a_child_takes_each_block_whole_from_a_parent_drawn_evenly_and_independently() -> None:
    space = SHIPPED["mnasnet"]
    rng = np.random.default_rng(5)
    n = len(space.decisions)
    low, high = (0,) * n, tuple(k - 1 for k in space.num_choices)
    block_of = [decision.block_index for decision in space.decisions]
    counts = np.zeros(2**7, dtype=int)
    for _ in range(20_000):
        child = space.crossover(low, high, rng)
        blocks = [child[block_of.index(b)] > 0 for b in range(7)]
        assert all((token > 0) == blocks[b] for token, b in zip(child, block_of, strict=True))
        counts[sum(2**k for k, taken in enumerate(blocks) if taken)] += 1
    assert chi_square_excess(counts, comparisons=1) < 1


@pytest.mark.parametrize("name", SHIPPED)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_decision_of_a_child_is_a_parents(name: str, seed: int) -> None:
    space, rng = SHIPPED[name], np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    assert all(c in (x, y) for c, x, y in zip(child, a, b, strict=True))
    assert space.crossover(a, a, rng) == a


@settings(max_examples=100, deadline=None)
@given(st.data(), small_spaces())
def test_the_edit_distance_is_a_metric_on_networks(
    data: st.DataObject, space: SearchSpace
) -> None:
    any_tokens = st.tuples(*(st.integers(0, n - 1) for n in space.num_choices))
    a, b, c = (space.decode(data.draw(any_tokens)) for _ in range(3))
    distance = space.edit_distance
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a) >= 0
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@pytest.mark.parametrize("name", SHIPPED)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), changes=st.integers(1, 4))
def test_a_changed_decision_moves_at_most_three_positions_of_an_encoding(
    name: str, seed: int, changes: int
) -> None:
    space, rng = SHIPPED[name], np.random.default_rng(seed)
    tokens = space.sample(rng)
    made = space.mutate(tokens, rng, changes=changes)
    assert space.edit_distance(space.decode(tokens), space.decode(made)) <= 3 * changes


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
        ("resolution: 8", "resolution: 1", "resolution must be at least 2"),
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
