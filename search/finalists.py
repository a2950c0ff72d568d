"""The hand-over: the best networks are fully retrained, one is named, tested once and exported.

Which networks are the best is the controller's to say, if it models the noise: the highest reward
observed is often a lucky one. Each is measured anew and trained with a new seed.

Each full training is a process of its own, `python -m retrain`, in a folder of its own below
finalists/, so that it can be killed, resumed and repeated by hand. The winner is chosen on images
held out from the training set; only then is the test set used, once.

Where a device computes in int8, each finalist is quantized after its training, and its reward is
of the int8 accuracy: a network is chosen for what it does on the device.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from search.campaign import Campaign
from search.campaign_log import tell_end
from search.loop import FULL_TRAINING, MEAN_METRICS, trial_seed
from search.measuring import INT8_ACCURACY, in_int8
from search.objective import Objective
from search.pareto import best_networks
from search.parts import Parts
from search.retrain_command import SILENCE_LIMIT_S, run_retrain
from search.store import FULL_TRAININGS, Store
from search.trial import Failure, Trial, is_infrastructure
from space.errors import ConfigError, MeasurementError, TrialFailed
from space.files import write_atomically
from space.records import dump_yaml

#: A finalist's quantized file, in its folder and, the winner's, in export/.
_INT8_FILE = "model_int8.onnx"

#: Of a full training's result.json, what the database has too: the report is made from that alone.
_FIGURES = (
    "accuracies", "losses", "epochs", "seconds", "images_per_s", "workers", "global_batch",
    "resumed_at_epoch",
)  # fmt: skip


class LineWatcher(Protocol):
    """Who is told what a training prints."""

    def line(self, text: str) -> None:
        """The process printed a line."""


def hand_over(
    campaign: Campaign,
    parts: Parts,
    watcher: LineWatcher,
    *,
    top: int | None = None,
    silence_limit_s: float = SILENCE_LIMIT_S,
) -> dict[str, Any] | None:
    """Retrain the best networks of a campaign whose search has been run before.

    Args:
        campaign: Open for writing.
        parts: Made from its configuration.
        watcher: Is shown the trainings' progress.
        top: How many networks; None takes the configuration's.
        silence_limit_s: A command of the retrain room that prints nothing for so long is killed.

    Raises:
        ConfigError: The campaign's configuration has no recipe for a full training.
    """
    config = campaign.config.retrain
    if config is None:
        raise ConfigError(
            f"{campaign.folder}: its configuration has no recipe for full trainings; give one,"
            f" `mnas retrain --campaign {campaign.folder} --config RECIPE`."
        )
    target_ms = campaign.store.meta("target_ms")
    if target_ms is None:
        raise ConfigError(f"{campaign.folder}: its search has not begun; nothing to retrain.")
    objective = Objective(campaign.config.objective, target_ms)
    return HandOver(
        campaign, parts, objective, watcher, top=top or config.top, silence_limit_s=silence_limit_s
    ).run()


def candidates(store: Store, count: int) -> list[Trial]:
    """Return the networks to hand over, best first.

    The controller's recommendations come first, then the highest observed rewards.
    """
    recommended = store.trials_by_id(ids := store.meta("recommended", []))
    chosen: dict[str, Trial] = {}
    for trial in [*sorted(recommended, key=lambda t: ids.index(t.id)), *store.best(count)]:
        chosen.setdefault(trial.architecture_hash, trial)
    return list(chosen.values())[:count]


def weights_of(folder: Path) -> Path:
    """Return the weights file of a finished full training's folder."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return folder / str(result["weights"])


class HandOver:
    """Retrains the best networks of a finished search.

    Args:
        campaign: Open for writing; its search is done.
        parts: Made from its configuration.
        objective: Ranks the retrained networks.
        watcher: Is shown the trainings' progress.
        top: How many networks.
        silence_limit_s: A command of the retrain room that prints nothing for so long is killed.
    """

    def __init__(
        self,
        campaign: Campaign,
        parts: Parts,
        objective: Objective,
        watcher: LineWatcher,
        *,
        top: int,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        assert campaign.config.retrain is not None  # asked for by the caller
        self._campaign = campaign
        self._config = campaign.config.retrain
        self._store = campaign.store
        self._latencies = parts.latencies(campaign.store, full=True)
        self._objective = objective
        self._watcher = watcher
        self._top = top
        self._silence_limit_s = silence_limit_s

    def run(self) -> dict[str, Any] | None:
        """Retrain, choose, test and export; return what is known of the winner.

        It is chosen among all that were ever trained in full, not only those of this call.

        Returns:
            None if no network has a reward or every training failed.
        """
        for trial in candidates(self._store, self._top):
            self._retrain(trial)
        ranked = best_networks(self._store.trials(role="finalist"), 1)
        if not ranked:
            return None
        winner = self._winner(ranked[0])
        self._store.set_meta("winner", winner)
        return winner

    def _retrain(self, trial: Trial) -> None:
        """See to it that a trial's network is trained in full, or that its failure is recorded."""
        # Ids count down: of several the last one made comes first.
        rows = reversed(self._store.trials(role="finalist"))
        known = {t.architecture_hash: t for t in rows}.get(trial.architecture_hash)
        if known is not None and known.outcome is not None:
            if not is_infrastructure(known):
                return
            known = None  # the machine's fault: it is trained again
        finalist = known or self._new_finalist(trial)
        started = time.monotonic()
        try:
            finalist = self._measured(finalist)
            accuracy = self._train(finalist)
            finalist = self._quantized(finalist)
        except MeasurementError as error:
            failure = Failure(f"measuring failed: {error}", error.cause)
            done = replace(finalist, outcome="failed", failure=failure)
        except TrialFailed as error:
            failure = Failure(error.reason, error.cause, error.detail)
            done = replace(finalist, outcome="failed", failure=failure)
        else:
            metrics = finalist.metrics or {}
            reward, parts = self._objective.reward(metrics.get(INT8_ACCURACY, accuracy), metrics)
            done = replace(
                finalist, outcome="completed", accuracy=accuracy, reward=reward, parts=parts
            )
        done = replace(
            done, finished_at=time.time(), timings={"train_s": time.monotonic() - started}
        )
        self._store.finish_trial(done)
        tell_end(done)

    def _new_finalist(self, trial: Trial) -> Trial:
        finalist = replace(
            trial,
            id=self._store.next_other_id(),
            batch=-1,
            role="finalist",
            proposal_id=None,
            finalist_of=trial.id,
            seed=trial_seed(self._campaign.config.seed, trial.id, FULL_TRAINING),
            epochs=float(self._config.recipe.epochs),
            outcome=None,
            reused_from=None,
            accuracy=None,
            metrics={k: v for k, v in (trial.metrics or {}).items() if k not in MEAN_METRICS},
            reward=None,
            parts=None,
            timings=None,
            failure=None,
            created_at=time.time(),
            finished_at=None,
        )
        self._store.add_trials([finalist])
        return finalist

    def _measured(self, finalist: Trial) -> Trial:
        """The finalist with a latency of its own, measured anew where there is a device."""
        ((_, figures),) = self._latencies.measure([finalist.network()], anew=True)
        if isinstance(figures, MeasurementError):
            raise figures
        metrics = {**(finalist.metrics or {}), **figures.metrics}
        return replace(finalist, metrics=metrics, measurement_ids=figures.measurement_ids)

    def _folder(self, finalist: Trial) -> Path:
        """Where its full training is: named after the search's trial."""
        assert finalist.finalist_of is not None  # set by _new_finalist
        return self._campaign.folder / "finalists" / f"trial_{finalist.finalist_of}"

    def _train(self, finalist: Trial) -> float:
        """Train it, or go on where that was stopped; return its validation accuracy."""
        folder = self._folder(finalist)
        folder.parent.mkdir(exist_ok=True)
        recipe = folder.with_name(f"{folder.name}.yaml")
        write_atomically(recipe, dump_yaml(self._config.recipe).encode())
        command = [
            "train", "--config", str(recipe), "--arch", finalist.architecture,
            "--out", str(folder), "--seed", str(finalist.seed), "--resume",
        ]  # fmt: skip
        workers, threads = self._config.workers, self._config.threads
        if workers is not None:
            command += ["--workers", str(workers)]
        else:
            threads = threads or os.cpu_count() or 1
        if threads is not None:
            command += ["--threads", str(threads)]
        self._run(command)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        figures = {name: result[name] for name in _FIGURES}
        known = self._store.meta(FULL_TRAININGS, {})
        self._store.set_meta(FULL_TRAININGS, {**known, str(finalist.id): figures})
        return float(result["validation_accuracy"])

    def _quantized(self, finalist: Trial) -> Trial:
        """The finalist with the accuracy of its int8 file, if a device computes in int8."""
        if not in_int8(self._store, [finalist]):
            return finalist
        folder = self._folder(finalist)
        # Whatever int8 costs: it is in the reward.
        exported = self._json(
            "export", "--ckpt_path", str(weights_of(folder)), "--int8", "--max_drop", "1",
            "--out", str(folder / _INT8_FILE), "--overwrite",
        )  # fmt: skip
        metrics = {**(finalist.metrics or {}), INT8_ACCURACY: float(exported["exported_top1"])}
        return replace(finalist, metrics=metrics)

    def _winner(self, finalist: Trial) -> dict[str, Any]:
        """Test once, in each precision that there is, export, and collect what a user needs."""
        known = self._store.meta("winner")
        if known is not None and known["trial"] == finalist.finalist_of:
            return dict(known)
        weights = weights_of(self._folder(finalist))
        export = self._campaign.folder / "export"
        export.mkdir(exist_ok=True)
        tested = self._json("validate", "--ckpt_path", str(weights), "--split", "test")
        exported = self._json(
            "export", "--ckpt_path", str(weights), "--out", str(export / "model.onnx"),
            "--overwrite",
        )  # fmt: skip
        write_atomically(export / "architecture.txt", (finalist.architecture + "\n").encode())
        winner = {
            "trial": finalist.finalist_of,
            "architecture": finalist.architecture,
            "architecture_hash": finalist.architecture_hash,
            "latency_ms": finalist.latency_ms,
            "validation_accuracy": finalist.accuracy,
            "test_accuracy": tested["top1"],
            "test_images": tested["images"],
            "weights": str(weights.relative_to(self._campaign.folder)),
            "onnx": "export/model.onnx",
            "onnx_max_abs_difference": exported["max_abs_difference"],
        }
        int8_accuracy = (finalist.metrics or {}).get(INT8_ACCURACY)
        if int8_accuracy is None:
            return winner
        quantized = self._folder(finalist) / _INT8_FILE
        tested = self._json(
            "validate", "--ckpt_path", str(weights), "--onnx", str(quantized), "--split", "test"
        )
        write_atomically(export / _INT8_FILE, quantized.read_bytes())
        return winner | {
            "int8_validation_accuracy": int8_accuracy,
            "int8_test_accuracy": tested["top1"],
            "onnx_int8": f"export/{_INT8_FILE}",
        }

    def _json(self, *arguments: str) -> dict[str, Any]:
        """Run a command and return the object that it printed; a framework may warn after it."""
        lines = self._run([*arguments, "--json"])
        found: dict[str, Any] = json.loads(next(x for x in reversed(lines) if x.startswith("{")))
        return found

    def _run(self, arguments: Sequence[str]) -> list[str]:
        """Run a command of the retrain room to its end and return the lines that it printed.

        Raises:
            TrialFailed: It ended with an error, or it hung.
        """
        return run_retrain(arguments, self._watcher.line, silence_limit_s=self._silence_limit_s)
