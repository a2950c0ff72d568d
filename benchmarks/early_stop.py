"""What an early stop would have saved and cost: replays the rule on a campaign with curves.

    mnas search digits evaluator.recipe.epochs=4 'early_stop={quantile: 0}' --out DIR
    python benchmarks/early_stop.py DIR [--quantiles .25 .5 .75] [--min_trials 16] [--top 1 5 10]

The campaign has trained every child to its end and recorded its accuracy after each epoch. For
every quantile the trials are gone through in their order, batch by batch as the engine does; a
trial that the rule stops gives the rule its accuracies up to there. Printed are the share of the
epochs that are saved and how many of the networks with the highest final rewards would have been
stopped. The proposals stay those of the campaign: what the controller would have proposed instead
is not known.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from search.early_stop import EarlyStop, EarlyStopConfig
from search.evaluation import curve_of
from search.objective import Objective, ObjectiveConfig
from search.store import Store
from search.trial import Trial
from space.records import build, load_yaml


def replay(trials: list[Trial], rule: EarlyStop) -> dict[int, int]:
    """Return id -> epochs trained, of the trials that the rule stops."""
    stopped: dict[int, int] = {}
    for _, batch in itertools.groupby(trials, key=lambda trial: trial.batch):
        learned = []
        for trial in batch:
            metrics = dict(trial.metrics or {})
            curve, bars = curve_of(metrics), rule.bars(metrics)
            ended = next((e for e in sorted(curve) if curve[e] < bars.get(e, 0.0)), None)
            if ended is not None:
                stopped[trial.id] = ended
                later = {f"accuracy@epoch{epoch}" for epoch in curve if epoch > ended}
                metrics = {name: metrics[name] for name in metrics if name not in later}
            learned.append(replace(trial, metrics=metrics))
        rule.note(learned)
    return stopped


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("campaign", type=Path, metavar="DIR")
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--min_trials", type=int, default=16)
    parser.add_argument("--top", type=int, nargs="+", default=[1, 5, 10])
    arguments = parser.parse_args()
    store = Store(arguments.campaign / "campaign.db", read_only=True)
    values = load_yaml(arguments.campaign / "config.yaml")["objective"]
    objective = Objective(
        build(ObjectiveConfig, values, where="config.yaml"), store.meta("target_ms")
    )
    trials = [
        trial for trial in store.trials()
        if trial.outcome == "completed" and curve_of(trial.metrics or {})
    ]  # fmt: skip
    if not trials:
        parser.error(f"{arguments.campaign}: no trial has accuracies after its epochs; see above")
    epochs = trials[0].epochs
    best = sorted(trials, key=lambda trial: -(trial.reward or 0.0))
    print(
        f"{len(trials)} networks, {epochs:g} epochs each, {arguments.min_trials} before any stop"
    )
    for quantile in arguments.quantiles:
        config = EarlyStopConfig(quantile, min_trials=arguments.min_trials)
        stopped = replay(trials, EarlyStop(config, objective, epochs))
        saved = sum(epochs - done for done in stopped.values()) / (epochs * len(trials))
        wrong = ", ".join(
            f"{sum(trial.id in stopped for trial in best[:top])} of the best {top}"
            for top in arguments.top
        )
        print(
            f"  quantile {quantile:4.2f}: {len(stopped):4} stopped, {100 * saved:4.1f} % of the"
            f" epochs saved; stopped are {wrong}"
        )


if __name__ == "__main__":
    main()
