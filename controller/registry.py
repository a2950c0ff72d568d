"""The controllers that ship, by name: their configurations as one union, and the factory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from controller.base import Controller, MetricsOf, Score
from controller.evolution import Evolution, EvolutionConfig
from controller.guided import Guided, GuidedConfig
from controller.local_search import LocalSearch, LocalSearchConfig
from controller.pareto_evolution import Pareto, ParetoConfig
from controller.ppo import PPO, PPOConfig
from controller.random_search import RandomConfig, RandomSearch
from controller.reinforce import Reinforce, ReinforceConfig

#: The union itself, for those who add members of their own before they discriminate.
BuiltInControllerConfig = (
    RandomConfig
    | PPOConfig
    | ReinforceConfig
    | EvolutionConfig
    | LocalSearchConfig
    | GuidedConfig
    | ParetoConfig
)

#: What YAML reads as `controller: {name: ppo, learning_rate: 1e-3}`.
ControllerConfig = Annotated[BuiltInControllerConfig, Field(discriminator="name")]

#: Every class takes (config, num_choices, rng, *, score=None, metrics_of=None).
CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "random": RandomSearch,
    "ppo": PPO,
    "reinforce": Reinforce,
    "evolution": Evolution,
    "local": LocalSearch,
    "guided": Guided,
    "pareto": Pareto,
}


def make_controller(
    config: BuiltInControllerConfig,
    num_choices: tuple[int, ...],
    rng: np.random.Generator,
    *,
    score: Score | None = None,
    metrics_of: MetricsOf | None = None,
) -> Controller:
    """Return the controller that a configuration stands for.

    Args:
        config: Its `name` picks the class.
        num_choices: Number of choices of each decision.
        rng: Taken over by the controller.
        score: Accuracy and metrics -> reward, for controllers that re-score past results.
        metrics_of: Tokens -> metrics that cost nothing.
    """
    return CONTROLLERS[config.name](config, num_choices, rng, score=score, metrics_of=metrics_of)
