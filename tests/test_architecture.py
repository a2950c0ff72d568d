"""Architectures: canonical identity, text, JSON, and what makes a network impossible."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from space.architecture import (
    Architecture,
    BlockSpec,
    NetworkStyle,
    architecture_from_json,
    architecture_to_json,
    format_block,
    graph_hash,
    parse_architecture,
    parse_block,
)
from space.errors import ConfigError
from space.mnasnet import PUBLISHED, adapt, published, round_filters, scale_width
from space.records import shipped_names
from space.search_space import load_space

SPACES = {name: load_space(name) for name in shipped_names("space")}

PUBLISHED_BLOCKS = [
    part.strip()
    for text in PUBLISHED.values()
    for part in text.split("|")
    if part.strip().startswith("r") and "_" in part
]


@pytest.mark.parametrize(
    "text",
    [
        *PUBLISHED_BLOCKS,
        "r2_k7_s22_e9_i16_o24_se0.5_noskip",
        "r1_k3_s11_e1_i8_o8_pool_conv",
        "r1_k5_s22_e1_i8_o8_se0.25_conv",
        "r12_k15_s22_e12_i160_o320_se1_pool",
        "r1_k3_s11_e1_i8_o8_se0.0000000001",
    ],
)
def test_block_notation_prints_back_the_same(text: str) -> None:
    assert format_block(*parse_block(text)) == text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("r1_k3_s12_e1_i32_o16", "s12"),
        ("r1_k3_s11_e1_i32", "o<number>"),
        ("r1_k3_s11_e1_i32_o16_foo", "'foo'"),
        ("r1_k3_s11_e1_i32_o16_noskip_se0.25", "'se0.25'"),
        ("r1_k4_s11_e1_i32_o16", "kernel_size"),
        ("r1_k3_s33_e1_i32_o16", "stride"),
        ("r0_k3_s11_e1_i32_o16", "'r0'"),
        ("r1_k3_s11_e3_i32_o16_conv", "expand_ratio"),
        ("r1_k3_s11_e1_i32_o16_se0.250", "se0.25"),
        ("r1_k3_s11_e1_i32_o16_se1.5", "'se1.5'"),
        ("r1_k3_s11_e1_i32_o16_se0.00000000001", "se_ratio"),
        ("r1_k3_s11_e1_i٣_o16", "i٣"),
        ("ir_r1_k3", "'ir'"),
        ("", "''"),
    ],
)
def test_a_wrong_token_is_an_error_that_names_it(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block(text)
    assert part in str(caught.value)


@settings(max_examples=400, deadline=None)
@given(st.text("rksieo_0123456789.x|nspcvl ", max_size=50) | st.text(max_size=30))
def test_any_string_prints_back_the_same_or_is_refused(text: str) -> None:
    try:
        block, filters = parse_block(text)
    except ConfigError:
        return
    assert format_block(block, filters) == text


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PUBLISHED)), st.integers(0, 300), st.text(max_size=3))
def test_a_damaged_text_is_refused_or_reads_back_the_same(
    name: str, position: int, patch: str
) -> None:
    text = published(name).text
    damaged = text[:position] + patch + text[position + 1 :]
    try:
        architecture = parse_architecture(damaged)
    except ConfigError:
        return
    assert parse_architecture(architecture.text) == architecture


@settings(max_examples=300, deadline=None)
@given(st.text("stemhadrc|_iok0123456789. ", max_size=60) | st.text(max_size=30))
def test_any_line_prints_back_its_canonical_text_or_is_refused(text: str) -> None:
    try:
        architecture = parse_architecture(text)
    except ConfigError:
        return
    assert architecture.text == " | ".join(part.strip() for part in text.split("|"))


#: What no token can be, without the characters that separate tokens and those that repr() changes.
JUNK = st.text(st.characters(exclude_characters="_|'\"\\", exclude_categories=["C", "Z"])).map(
    lambda text: f"?{text}"
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PUBLISHED)), st.data(), JUNK)
def test_the_message_names_the_token_that_is_wrong(
    name: str, data: st.DataObject, junk: str
) -> None:
    parts = published(name).text.split(" | ")
    index = data.draw(st.integers(0, len(parts) - 1))
    tokens = parts[index].split("_")
    tokens[data.draw(st.integers(0, len(tokens) - 1))] = junk
    parts[index] = "_".join(tokens)
    with pytest.raises(ConfigError) as caught:
        parse_architecture(" | ".join(parts))
    assert junk in str(caught.value)


@pytest.mark.parametrize("space_name", SPACES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_members_survive_tokens_text_and_json(space_name: str, seed: int) -> None:
    space = SPACES[space_name]
    architecture = space.decode(space.sample(np.random.default_rng(seed)))
    assert space.decode(space.encode(architecture)) == architecture
    assert parse_architecture(architecture.text) == architecture
    as_json = json.loads(json.dumps(architecture_to_json(architecture)))
    assert architecture_from_json(as_json) == architecture
    assert parse_architecture(architecture.text).hash == architecture.hash


@pytest.mark.parametrize("space_name", SPACES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_networks_are_equal_exactly_if_their_hashes_texts_and_encodings_are(
    space_name: str, seed: int
) -> None:
    space = SPACES[space_name]
    tokens = space.sample(np.random.default_rng(seed))
    network = space.decode(tokens)
    for others in (tokens, *space.neighbours(tokens)):
        other = space.decode(others)
        same = other == network
        assert (hash(other) == hash(network)) == same
        assert (other.hash == network.hash) == same
        assert (other.text == network.text) == same
        assert (space.encode(other) == space.encode(network)) == same


def test_two_descriptions_of_one_network_are_equal_and_have_one_hash() -> None:
    base = published("mnasnet-a1")
    blocks = list(base.blocks)
    assert blocks[-1].skip == "none"  # 160 -> 320 in one layer: nothing could carry an identity
    blocks[-1] = dataclasses.replace(blocks[-1], skip="identity")
    blocks[0] = BlockSpec("mbconv", 3, 1, 0, "none", 16, 1, 1)  # an expansion of 1 is a dconv
    same = dataclasses.replace(base, blocks=tuple(blocks))
    assert same == base
    assert same.hash == base.hash
    assert {same, base} == {base}


def test_the_first_block_may_name_another_input_than_the_stem() -> None:
    small = published("mnasnet-small")
    assert small.stem_filters == 8
    assert small.text.startswith("stem8 | r1_k3_s11_e1_i8_o8 | ")
    assert small.layers()[0].skip == "identity"


def test_a_break_in_the_chain_of_channels_is_an_error() -> None:
    text = published("mnasnet-a1").text.replace("i40_o80", "i48_o80")
    with pytest.raises(ConfigError, match=r"i must be 40.*but got 48"):
        parse_architecture(text)


def test_a_network_whose_strides_exceed_its_image_is_impossible() -> None:
    with pytest.raises(ConfigError, match=r"resolution must be at least 17, .* but got 16"):
        adapt(published("mnasnet-a1"), resolution=16)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 2), st.lists(st.integers(1, 2), min_size=1, max_size=6))
def test_a_network_is_possible_exactly_if_no_stride_exceeds_its_map(
    resolution: int, stem_stride: int, strides: list[int]
) -> None:
    size, fits = resolution, True
    for stride in (stem_stride, *strides):
        fits = fits and stride <= size
        size = -(-size // stride)
    blocks = tuple(BlockSpec("dconv", 3, 1, 0, "none", 8, 1, stride) for stride in strides)
    try:
        network = Architecture(8, blocks, 8, resolution, 2, stem_stride=stem_stride)
    except ValueError as error:
        assert not fits
        least = int(str(error).split("at least ")[1].split(",")[0])
        assert Architecture(8, blocks, 8, least, 2, stem_stride=stem_stride).resolution == least
        assert resolution < least
    else:
        assert fits
        assert all(layer.output_size >= 1 for layer in network.layers())


@pytest.mark.parametrize("ratio", [1 / 3, 1e-12])
def test_a_ratio_that_the_text_form_cannot_write_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="se_ratio must have at most 10 decimals"):
        BlockSpec("dconv", 3, 1, ratio, "none", 8, 1, 1)


def test_layers_carry_the_stride_once_and_the_skip_where_it_fits() -> None:
    layers = published("mnasnet-a1").layers()
    assert [layer.stride for layer in layers if layer.block_index == 3] == [2, 1, 1, 1]
    assert [layer.skip for layer in layers if layer.block_index == 3] == ["none"] + [
        "identity"
    ] * 3
    assert layers[-1].output_size == 7
    # Squeeze-and-excitation is reduced from the layer's input, not from its expanded width.
    assert [layer.se_filters for layer in layers if layer.block_index == 2] == [6, 10, 10]


def test_an_odd_image_shrinks_to_the_ceiling() -> None:
    sizes = [
        layer.output_size for layer in adapt(published("mnasnet-a1"), resolution=225).layers()
    ]
    assert sizes[0] == 113
    assert sizes[-1] == 8


@pytest.mark.parametrize(
    ("filters", "multiplier", "rounded"),
    [(16, 0.75, 16), (16, 1.25, 24), (32, 0.35, 16), (160, 1.25, 200), (24, 1.4, 32)],
)  # fmt: skip
def test_widths_round_as_the_published_code_rounds(
    filters: int, multiplier: float, rounded: int
) -> None:
    assert round_filters(filters, multiplier) == rounded


def test_width_scales_stem_and_blocks_but_not_the_head() -> None:
    scaled = scale_width(published("mnasnet-b1"), 0.5)
    assert scaled.stem_filters == 16
    assert [block.filters for block in scaled.blocks] == [8, 16, 24, 40, 48, 96, 160]
    assert scaled.head_filters == 1280


def test_the_graph_hash_depends_on_style_and_network_but_not_on_momentum() -> None:
    a1 = published("mnasnet-a1")
    hashes = {
        graph_hash(a1),
        graph_hash(a1, NetworkStyle(padding="symmetric")),
        graph_hash(a1, NetworkStyle(batch_norm_epsilon=1e-5)),
        graph_hash(published("mnasnet-b1")),
    }
    assert len(hashes) == 4
    assert graph_hash(a1, NetworkStyle(batch_norm_momentum=0.9)) == graph_hash(a1)


def test_hashes_stay_the_same_from_release_to_release() -> None:
    # They are keys in users' databases and caches.
    assert published("mnasnet-a1").hash == "803f39f196126f96"
    assert graph_hash(published("mnasnet-a1")) == "7821c6ae389f4b33"


def test_an_unknown_network_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mnasnet-a1'"):
        published("mnasnet-a")


def test_json_with_a_strange_key_is_refused() -> None:
    values = architecture_to_json(published("mnasnet-a1"))
    with pytest.raises(ConfigError, match="unknown key 'width'"):
        architecture_from_json({**values, "width": 1})


def test_architectures_are_frozen() -> None:
    architecture: Architecture = published("mnasnet-a1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.stem_filters = 3  # type: ignore[misc]
