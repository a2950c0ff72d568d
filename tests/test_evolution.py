"""Regularized evolution: who becomes a parent, who dies, what is never proposed, and the bar."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binom
from toy_spaces import best_of_seeds, completed, toy_space

from controller.base import Outcome, Proposal, Result
from controller.evolution import Evolution, EvolutionConfig
from controller.random_search import RandomConfig
from controller.seen import Seen
from space.errors import ConfigError
from space.records import build
from space.tokens import Tokens

#: So many neighbours that no child is found twice, in the few proposals of these tests.
CHOICES = (100,) * 60


def make_evolution(
    population: int = 10, sample_size: int = 4, *, num_choices: tuple[int, ...] = CHOICES
) -> Evolution:
    config = EvolutionConfig(population=population, sample_size=sample_size)
    return Evolution(config, num_choices, np.random.default_rng(0))


def teach(evolution: Evolution, rewards: Sequence[float]) -> list[Proposal]:
    """Propose as many as there are rewards, and give these to them in order."""
    made = evolution.propose(len(rewards))
    evolution.update([completed(p, r) for p, r in zip(made, rewards, strict=True)])
    return made


def distance(a: Tokens, b: Tokens) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def members(evolution: Evolution) -> list[Tokens]:
    """The population, oldest first."""
    return [tuple(row) for row in evolution.state_dict()["members"].tolist()]


def without_reward(proposal: Proposal, outcome: Outcome) -> Result:
    return Result(proposal, outcome, None, None, {})


def test_children_differ_in_one_decision_from_the_population_before_their_batch() -> None:
    evolution = make_evolution()
    teach(evolution, [0.1 * k for k in range(10)])
    for _ in range(5):
        before = members(evolution)
        children = teach(evolution, [0.5] * 7)
        assert all(min(distance(c.tokens, m) for m in before) == 1 for c in children)


def test_as_many_random_proposals_come_first_as_the_population_has_members() -> None:
    evolution = make_evolution()
    made = [p.tokens for p in teach(evolution, [0.5] * 4) + evolution.propose(6)]
    assert min(distance(a, b) for a in made for b in made if a != b) > 40


def test_the_oldest_dies_however_good_it_is() -> None:
    evolution = make_evolution(population=3, sample_size=1)
    made = teach(evolution, [0.99, 0.1, 0.2]) + teach(evolution, [0.3])
    assert members(evolution) == [p.tokens for p in made[1:]]


def test_members_age_in_the_order_in_which_their_results_arrive() -> None:
    evolution = make_evolution(population=3, sample_size=1)
    early, late = evolution.propose(2), evolution.propose(2)
    for batch in (late, early):
        evolution.update([completed(p, 0.5) for p in batch])
    assert members(evolution) == [late[1].tokens, early[0].tokens, early[1].tokens]


def test_the_best_of_a_sample_with_replacement_becomes_the_parent() -> None:
    evolution = make_evolution(population=10, sample_size=4)
    made = teach(evolution, [0.01 * k for k in range(10)])
    children = evolution.propose(3000)
    parents = Counter(
        min(range(10), key=lambda k: distance(made[k].tokens, child.tokens)) for child in children
    )
    for rank in range(10):  # the k-th worst wins if no better one is in the sample and it is
        share = ((rank + 1) / 10) ** 4 - (rank / 10) ** 4
        # Each bound fails by chance with a probability of 5e-8, all twenty with 1e-6.
        low, high = binom.ppf([5e-8, 1 - 5e-8], 3000, share)
        assert low <= parents[rank] <= high, rank


@pytest.mark.parametrize("outcome", ["failed", "rejected", "stopped"])
def test_what_has_no_reward_is_never_a_parent_and_never_proposed_again(outcome: Outcome) -> None:
    evolution = make_evolution()
    made = evolution.propose(10)
    evolution.update([completed(made[0], 0.1)] + [without_reward(p, outcome) for p in made[1:]])
    children = [p.tokens for p in evolution.propose(20)]
    assert members(evolution) == [made[0].tokens]
    assert all(distance(child, made[0].tokens) == 1 for child in children)


def test_where_all_children_were_proposed_grandchildren_are() -> None:
    evolution = make_evolution(population=1, sample_size=1, num_choices=(3,) * 6)
    (parent,) = teach(evolution, [0.5])
    distances = Counter(distance(p.tokens, parent.tokens) for p in evolution.propose(100))
    assert distances[1] == 12  # all that there are
    assert distances[2] > distances[3]


def test_a_reused_result_joins_like_a_completed_one() -> None:
    evolution = make_evolution()
    made = evolution.propose(2)
    evolution.update([completed(made[0], 0.5), Result(made[1], "reused", 0.5, 0.5, {})])
    assert members(evolution) == [p.tokens for p in made]


def test_observed_trials_join_and_stand_for_random_proposals() -> None:
    evolution = make_evolution(population=2, sample_size=1)
    known = [Proposal(0, (k,) * 60, 0.0) for k in range(2)]
    evolution.observe([completed(p, 0.5) for p in known])
    assert members(evolution) == [p.tokens for p in known]
    children = evolution.propose(10)
    assert all(min(distance(c.tokens, p.tokens) for p in known) == 1 for c in children)


def test_an_observed_failure_is_not_proposed() -> None:
    evolution = make_evolution(num_choices=(2, 2))
    evolution.observe([without_reward(Proposal(0, (1, 1), 0.0), "failed")])
    assert (1, 1) not in {p.tokens for p in evolution.propose(3)}


def test_results_that_never_arrive_leave_no_gap() -> None:
    # The infrastructure's failures are withheld from a controller.
    evolution = make_evolution()
    made = evolution.propose(10)
    evolution.update([completed(p, 0.5) for p in made[::2]])
    assert members(evolution) == [p.tokens for p in made[::2]]
    children = evolution.propose(4)
    assert [c.id for c in children] == [10, 11, 12, 13]
    evolution.update([])
    assert len(evolution.propose(4)) == 4


def test_diagnostics_describe_the_population() -> None:
    evolution = make_evolution(num_choices=(2, 2))
    evolution.observe([completed(Proposal(0, tokens, 0.0), 0.5) for tokens in ((0, 0), (0, 1))])
    evolution.update([])
    found = evolution.diagnostics()
    assert found == {
        "members": 2,
        "population_reward": 0.5,
        "entropy": pytest.approx(
            np.log(2) / 2
        ),  # none in the first decision, one bit in the other
    }


@pytest.mark.parametrize(
    ("key", "value"), [("population", 0), ("sample_size", 0), ("sample_size", 101)]
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be in"):
        build(EvolutionConfig, {key: value}, where="test")


def test_evolution_beats_random_search_and_comes_near_the_optimum() -> None:
    space = toy_space(0)
    evolution = best_of_seeds(EvolutionConfig(), space, 20)
    random = best_of_seeds(RandomConfig(), space, 20)
    assert (evolution > random).sum() >= 18
    assert (evolution >= 0.95).sum() >= 14


def test_the_last_tokens_of_a_small_space_are_found() -> None:
    num_choices = (10, 10, 10, 10)
    seen, rng = Seen(num_choices), np.random.default_rng(0)
    every = list(itertools.product(*map(range, num_choices)))
    left = {every[k] for k in rng.choice(len(every), 5, replace=False)}
    seen.add(tokens for tokens in every if tokens not in left)
    assert {seen.fresh(every[0], rng) for _ in range(5)} == left
    assert seen.is_whole_space
