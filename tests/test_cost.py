"""Counts equal the figures computed from the published definitions, to the unit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from space.cost import count, stage_table
from space.mnasnet import published, scale_width
from space.parameters import initial_parameters, parameter_shapes
from space.search_space import load_space

#: network, width, trainable parameters, with batch-norm statistics, multiply-adds at 224 x 224
TABLE = [
    ("mnasnet-b1", 0.35, 1_788_232, 1_803_208, 58_878_912),
    ("mnasnet-b1", 0.5, 2_218_512, 2_239_136, 104_455_968),
    ("mnasnet-b1", 0.75, 3_170_208, 3_200_016, 215_493_104),
    ("mnasnet-b1", 1.0, 4_383_312, 4_421_232, 314_415_872),
    ("mnasnet-b1", 1.3, 6_282_256, 6_331_072, 526_362_432),
    ("mnasnet-b1", 1.4, 7_115_728, 7_168_176, 588_799_408),
    ("mnasnet-a1", 0.35, 1_747_018, 1_761_034, 61_681_920),
    ("mnasnet-a1", 0.5, 2_082_006, 2_100_406, 103_162_992),
    ("mnasnet-a1", 0.75, 2_912_278, 2_939_110, 223_448_480),
    ("mnasnet-a1", 1.0, 3_887_038, 3_920_526, 311_579_072),
    ("mnasnet-a1", 1.3, 5_468_486, 5_511_494, 525_980_736),
    ("mnasnet-a1", 1.4, 6_105_992, 6_152_008, 586_317_952),
    ("mnasnet-small", 1.0, 2_030_264, 2_047_192, 68_339_184),
]


@pytest.mark.parametrize(("name", "width", "parameters", "with_statistics", "macs"), TABLE)
def test_counts_equal_the_published_definitions(
    name: str, width: float, parameters: int, with_statistics: int, macs: int
) -> None:
    cost = count(scale_width(published(name), width))
    assert cost.parameters == parameters
    assert cost.parameters_with_statistics == with_statistics
    assert cost.macs == macs


@pytest.mark.parametrize("space_name", ["mnasnet", "small_image"])
def test_counts_agree_with_the_parameters_themselves(space_name: str) -> None:
    space = load_space(space_name)
    rng = np.random.default_rng(3)
    for _ in range(30):
        architecture = space.decode(space.sample(rng))
        cost = count(architecture)
        sizes = {n: int(np.prod(shape)) for n, shape in parameter_shapes(architecture).items()}
        assert cost.parameters_with_statistics == sum(sizes.values())
        assert cost.parameters == sum(v for n, v in sizes.items() if ".moving_" not in n)
        assert cost.macs == sum(stage.macs for stage in stage_table(architecture))


def test_the_stages_hand_their_shapes_on() -> None:
    stages = stage_table(published("mnasnet-a1"))
    assert [stage.name for stage in stages][:2] == ["stem", "block 0"]
    for before, after in itertools.pairwise(stages[:-1]):
        assert before.output_shape == after.input_shape
    assert stages[-2].output_shape == (1280, 7, 7)
    assert stages[-1].output_shape == (1000,)


def test_the_same_seed_gives_the_same_initial_weights_and_another_does_not() -> None:
    architecture = published("mnasnet-small")
    first, again = initial_parameters(architecture, 1), initial_parameters(architecture, 1)
    other = initial_parameters(architecture, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["stem.conv.weight"], other["stem.conv.weight"])
    # Variance 2 / fan-out; 1,280 x 144 samples put the estimate within 2 % (6 sigma).
    assert first["head.conv.weight"].var() == pytest.approx(2 / 1280, rel=0.02)
