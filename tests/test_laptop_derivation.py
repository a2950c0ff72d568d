"""configs/search/mnasnet_a1_laptop.yaml: its target is A1 as near as the space comes to it."""

from __future__ import annotations

import dataclasses

from search.config import load_campaign_config
from space.cost import count
from space.mnasnet import find_architecture, published
from space.search_space import load_space


def test_the_reference_is_a1_with_three_stated_changes_and_a_member_of_the_space() -> None:
    config = load_campaign_config("mnasnet_a1_laptop")
    assert config.objective.target is not None
    reference = find_architecture(config.objective.target.reference)
    a1 = published("mnasnet-a1")
    blocks = list(a1.blocks)
    blocks[2] = dataclasses.replace(blocks[2], expand_ratio=4)
    blocks[3] = dataclasses.replace(blocks[3], layers=3)
    blocks[5] = dataclasses.replace(blocks[5], filters=192)
    assert reference == dataclasses.replace(a1, blocks=tuple(blocks))
    assert reference in load_space(config.space.name)
    assert a1 not in load_space(config.space.name)
    assert 1.0 < count(reference).macs / count(a1).macs < 1.1
