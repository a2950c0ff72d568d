"""Local search: where it climbs from, when it gives up, what it makes of noise, and the bar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from toy_spaces import best_of_seeds, completed, rewards_of, toy_space

from controller.base import Outcome, Proposal, Result
from controller.local_search import LocalSearch, LocalSearchConfig
from controller.random_search import RandomConfig
from space.errors import ConfigError
from space.records import build
from space.tokens import neighbours_of

CHOICES = (3,) * 6
NEIGHBOURS = 12  # of any tokens


def make_search(starts: int, *, patience: int | None = 1) -> LocalSearch:
    config = LocalSearchConfig(starts=starts, patience=patience)
    return LocalSearch(config, CHOICES, np.random.default_rng(0))


def teach(search: LocalSearch, rewards: Sequence[float]) -> list[Proposal]:
    """Propose as many as there are rewards, and give these to them in order."""
    made = search.propose(len(rewards))
    search.update([completed(p, r) for p, r in zip(made, rewards, strict=True)])
    return made


def are_neighbours(made: Sequence[Proposal], base: Proposal) -> bool:
    return {p.tokens for p in made} <= set(neighbours_of(base.tokens, CHOICES))


def test_a_climb_begins_at_the_best_of_the_starts() -> None:
    search = make_search(4)
    starts = teach(search, [0.2, 0.9, 0.1, 0.3])
    assert are_neighbours(search.propose(5), starts[1])


def test_starts_may_come_in_several_batches() -> None:
    search = make_search(4)
    starts = teach(search, [0.2, 0.9]) + teach(search, [0.1, 0.3])
    assert not are_neighbours(starts[2:], starts[1])
    assert are_neighbours(search.propose(5), starts[1])


def test_the_climb_goes_on_from_the_first_batch_that_shows_something_better() -> None:
    search = make_search(1)
    teach(search, [0.5])
    made = teach(search, [0.4, 0.6, 0.7])
    assert are_neighbours(search.propose(3), made[2])


def test_it_finds_the_optimum_where_there_are_no_local_optima() -> None:
    search = make_search(1)
    rewards = rewards_of(search, lambda tokens: sum(tokens) / 12, trials=80, batch=1)
    assert max(rewards) == 1


def test_a_local_optimum_ends_the_climb_and_the_next_begins_at_random() -> None:
    search = make_search(2)
    teach(search, [0.9, 0.8])
    for _ in range(NEIGHBOURS):
        teach(search, [0.1])
    starts = teach(search, [0.3, 0.4])
    assert search.diagnostics()["restarts"] == 1
    assert search.diagnostics()["climb_reward"] == 0.4  # 0.9 is the last climb's
    assert are_neighbours(search.propose(5), starts[1])


def test_lucky_tokens_do_not_end_a_climb_of_patience() -> None:
    search = make_search(1, patience=2)
    (lucky,) = teach(search, [0.99])
    made = teach(search, [0.5 + 0.01 * k for k in range(NEIGHBOURS)])
    assert are_neighbours(made, lucky)
    assert are_neighbours(teach(search, [0.1] * 3), made[-1])
    assert search.diagnostics()["restarts"] == 0


def test_something_better_renews_the_patience() -> None:
    search = make_search(1, patience=2)
    teach(search, [0.5])
    teach(search, [0.4] * (NEIGHBOURS - 1) + [0.6])
    (better,) = teach(search, [0.7])
    for k in range(NEIGHBOURS - 2):  # of all its neighbours but the two it has in common
        assert are_neighbours(teach(search, [0.3 + 0.001 * k]), better)
    teach(search, [0.2])
    assert search.diagnostics()["restarts"] == 0


def test_a_batch_larger_than_a_neighbourhood_goes_on_with_the_next_best() -> None:
    search = make_search(3)
    starts = teach(search, [0.9, 0.1, 0.5])
    made = search.propose(NEIGHBOURS + 4)
    assert are_neighbours(made[:NEIGHBOURS], starts[0])
    assert are_neighbours(made[NEIGHBOURS:], starts[2])


@pytest.mark.parametrize("outcome", ["failed", "rejected", "stopped"])
def test_what_has_no_reward_is_not_climbed_from_and_not_proposed_again(outcome: Outcome) -> None:
    search = make_search(2)
    good, bad = search.propose(2)
    search.update([completed(good, 0.1), Result(bad, outcome, None, None, {})])
    made = search.propose(NEIGHBOURS)
    assert are_neighbours(made, good)
    assert bad.tokens not in {p.tokens for p in made}


def test_a_reused_result_is_not_climbed_from() -> None:
    search = make_search(2)
    good, same = search.propose(2)
    search.update([completed(good, 0.1), Result(same, "reused", 0.9, 0.9, {})])
    assert are_neighbours(search.propose(5), good)


def test_without_any_reward_it_draws_at_random() -> None:
    search = make_search(1)
    search.update([Result(p, "failed", None, None, {}) for p in search.propose(4)])
    search.update([])
    assert len({p.tokens for p in search.propose(20)}) == 20


def test_an_observed_trial_is_climbed_from() -> None:
    search = make_search(1)
    baseline = Proposal(0, (1,) * 6, 0.0)
    search.observe([completed(baseline, 0.9)])
    teach(search, [0.5])
    assert are_neighbours(search.propose(5), baseline)


def test_a_part_of_a_batch_is_enough_to_go_on() -> None:
    search = make_search(1)
    teach(search, [0.5])
    made = search.propose(4)
    search.update([completed(made[2], 0.8)])
    following = search.propose(4)
    assert are_neighbours(following, made[2])
    assert {p.tokens for p in made}.isdisjoint(p.tokens for p in following)


@pytest.mark.parametrize(("key", "value"), [("starts", 0), ("patience", 0)])
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be"):
        build(LocalSearchConfig, {key: value}, where="test")


def test_local_search_beats_random_search_and_comes_near_the_optimum() -> None:
    space = toy_space(0)
    local = best_of_seeds(LocalSearchConfig(), space, 20)
    random = best_of_seeds(RandomConfig(), space, 20)
    assert (local > random).sum() >= 18
    assert (local >= 0.95).sum() >= 10
