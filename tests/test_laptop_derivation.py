"""configs/search/mnasnet_a1_laptop.yaml: its target is A1 as near as the space comes to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from campaigns import write_synthetic
from derivation.laptop import by_accuracy, near_target

from search.campaign import open_to_read
from search.config import load_campaign_config
from search.engine import start
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


def test_what_is_judged_is_accurate_and_near_the_target_and_comes_once(tmp_path: Path) -> None:
    config = load_campaign_config(str(write_synthetic(tmp_path, controller="random", trials=64)))
    start(config, tmp_path / "run")
    store = open_to_read(tmp_path / "run")
    ranked = by_accuracy(store)
    store.close()
    assert len({trial.architecture_hash for trial in ranked}) == len(ranked) > 40
    accuracies = [trial.accuracy or 0.0 for trial in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    target_ms = ranked[20].latency_ms or 0.0
    near = near_target(ranked, target_ms, 5)
    assert len(near) == 5
    width = max(abs((trial.latency_ms or 0.0) / target_ms - 1) for trial in near)
    passed_over = ranked[: ranked.index(near[-1])]
    # None that is more accurate was as near.
    assert all(
        trial in near or abs((trial.latency_ms or 0.0) / target_ms - 1) >= width
        for trial in passed_over
    )
    assert near_target(ranked[:3], target_ms, 5) == sorted(
        ranked[:3], key=lambda trial: -(trial.accuracy or 0.0)
    )
