"""Learning rates by their closed forms."""

from __future__ import annotations

import math

import pytest

from retrain.config import ScheduleConfig
from retrain.schedule import learning_rate, warmup_note


def rates(config: ScheduleConfig, *, steps_per_epoch: int = 10, epochs: int = 5) -> list[float]:
    return [
        learning_rate(config, step, steps_per_epoch=steps_per_epoch, epochs=epochs)
        for step in range(steps_per_epoch * epochs)
    ]


@pytest.mark.parametrize("name", ["cosine", "exponential", "constant"])
def test_the_warm_up_is_linear_and_ends_at_the_peak(name: str) -> None:
    config = ScheduleConfig(name=name, learning_rate=0.8, warmup_epochs=1.0)  # type: ignore[arg-type]
    assert rates(config)[:11] == pytest.approx([0.08 * (s + 1) for s in range(10)] + [0.8])


def test_the_cosine_falls_from_the_peak_to_the_minimum() -> None:
    config = ScheduleConfig(
        name="cosine", learning_rate=1.0, warmup_epochs=1.0, min_learning_rate=0.2
    )
    found = rates(config)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * s / 40)) / 2 for s in range(40)]
    assert found[10:] == pytest.approx(expected)
    assert found[30] == pytest.approx(0.6)
    assert 0.2 < found[-1] < 0.202


def test_the_exponential_falls_in_stairs_as_the_paper_has_it() -> None:
    config = ScheduleConfig(
        name="exponential", learning_rate=0.256, warmup_epochs=5, decay_rate=0.97, decay_epochs=2.4
    )
    found = rates(config, steps_per_epoch=10, epochs=30)
    assert found[49] == found[50] == found[73] == pytest.approx(0.256)
    assert found[74] == pytest.approx(0.256 * 0.97)
    assert found[98] == pytest.approx(0.256 * 0.97**2)


def test_the_exponential_stays_above_its_floor() -> None:
    config = ScheduleConfig(
        name="exponential",
        learning_rate=1.0,
        decay_rate=0.1,
        decay_epochs=1,
        min_learning_rate=0.05,
    )
    assert rates(config)[-1] == 0.05


def test_the_constant_is_constant() -> None:
    config = ScheduleConfig(name="constant", learning_rate=0.3)
    assert set(rates(config)) == {0.3}


def test_a_warm_up_as_long_as_the_training_is_all_there_is() -> None:
    config = ScheduleConfig(name="cosine", learning_rate=1.0, warmup_epochs=5)
    assert rates(config)[-1] == pytest.approx(1.0)
    assert rates(config)[0] == pytest.approx(0.02)


def test_a_training_that_ends_within_its_warm_up_is_warned_of() -> None:
    config = ScheduleConfig(warmup_epochs=2.5)
    assert warmup_note(config, epochs=3) is None
    assert (warmup_note(config, epochs=2) or "").startswith(
        "warning: schedule.warmup_epochs is 2.5 and epochs 2: the learning rate rises to the end"
    )
