"""The extended surrogate by which the factorized and the flat space are compared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from derivation.flat_space import PerLayer, write_spaces

from search.accel_nasbench import AccelNasBenchConfig, AccelNasBenchEvaluator
from space.search_space import load_space

needs_data = pytest.mark.skipif(
    "MNAS_ACCEL_NASBENCH" not in os.environ, reason="MNAS_ACCEL_NASBENCH is not set"
)


def test_the_spaces_have_one_depth_and_the_sizes_that_are_said(tmp_path: Path) -> None:
    files = write_spaces(tmp_path)
    factorized, flat = (load_space(str(files[name])) for name in ("factorized", "flat"))
    assert (factorized.size, flat.size) == (12**7, 12**15)
    rng = np.random.default_rng(0)
    for space in (factorized, flat):
        network = space.decode(space.sample(rng))
        assert sum(block.layers for block in network.blocks) == 15


@needs_data
def test_on_the_factorized_space_the_extension_is_the_surrogate_itself(tmp_path: Path) -> None:
    files = write_spaces(tmp_path)
    means, surrogate = PerLayer({}), AccelNasBenchEvaluator(AccelNasBenchConfig("accel_nasbench"))
    space, rng = load_space(str(files["factorized"])), np.random.default_rng(0)
    for _ in range(20):
        network = space.decode(space.sample(rng))
        ours = means.evaluate(network, seed=0, time_limit_s=60).accuracy
        assert ours == pytest.approx(
            surrogate.evaluate(network, seed=0, time_limit_s=60).accuracy, abs=1e-12
        )


@needs_data
def test_layers_of_a_block_that_differ_give_what_lies_between(tmp_path: Path) -> None:
    """The second block has two layers: one of each kind is worth the mean of both kinds twice."""
    files = write_spaces(tmp_path)
    means, space = PerLayer({}), load_space(str(files["flat"]))
    one, other, mixed = ([0] * len(space.decisions) for _ in range(3))
    second = [d.name for d in space.decisions].index("block1.op")
    third = [d.name for d in space.decisions].index("block2.op")
    other[second] = other[third] = mixed[third] = 2
    low, high, middle = (
        means.evaluate(space.decode(tokens), seed=0, time_limit_s=60).accuracy
        for tokens in (one, other, mixed)
    )
    assert middle == pytest.approx((low + high) / 2, abs=1e-12)
    assert low != high
