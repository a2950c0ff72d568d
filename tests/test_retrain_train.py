"""The training loop: repeatable, resumable, and honest about failures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from retrain_parts import TINY, TINY_RECIPE, TINY_TEXT

from retrain import train as loop
from retrain.checkpoint import TrainState, steps_done
from retrain.config import (
    AugmentConfig,
    DataConfig,
    OptimizerConfig,
    PrecisionConfig,
    Recipe,
    ScheduleConfig,
)
from retrain.data import DataSet, Split, load_data, train_batches
from retrain.drop_path import DropPathFeatures
from retrain.dropout import drop_path_mask, drop_path_rates, dropout_mask
from retrain.evaluate import evaluate, evaluation_of, logits_of
from retrain.loss_scale import LossScale
from retrain.progress import TrainProgress
from retrain.train import Trainer, train
from space.architecture import parse_architecture
from space.errors import ConfigError, Diverged, TrialFailed
from space.network import build_network
from space.parameters import initial_parameters
from space.records import build, parse_yaml

RECIPE = build(Recipe, parse_yaml(TINY_RECIPE, where="tiny"), where="tiny")
TESTS = Path(__file__).parent

IN_ANOTHER_PROCESS = """
import hashlib, json, sys
from retrain_parts import TINY, TINY_RECIPE
from retrain.config import Recipe
from retrain.train import train
from space.network import build_network
from space.parameters import initial_parameters
from space.records import build, parse_yaml

recipe = build(Recipe, parse_yaml(TINY_RECIPE, where="tiny"), where="tiny")
result = train(TINY, recipe, seed=int(sys.argv[1]), threads=1)
weights = b"".join(result.weights[name].tobytes() for name in sorted(result.weights))
digest = hashlib.sha256(weights).hexdigest()
print(json.dumps([result.accuracy, result.losses, digest]))
"""


INTERRUPTED = """
import os, signal, time
import space.depthwise
from retrain import train
from retrain.config import Recipe
from retrain_parts import TINY, TINY_RECIPE
from space.records import build, parse_yaml

# The third step's gradients are still computed while the exception passes.
convolve, steps = space.depthwise.convolve, []

def slow(*arguments, **settings):
    time.sleep(1.0 if len(steps) > 1 else 0.0)
    return convolve(*arguments, **settings)

def update(self, gradients):
    steps.append(self.step)
    if len(steps) == 3:
        raise KeyboardInterrupt
    whole(self, gradients)

space.depthwise.convolve = slow
whole, train.Trainer._update = train.Trainer._update, update
recipe = build(Recipe, parse_yaml(TINY_RECIPE, where="tiny"), where="tiny")
try:
    train.train(TINY, recipe, seed=0, threads=1)
except KeyboardInterrupt:
    print("let MindSpore end its step")
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("has Ctrl-C back")
"""


def elsewhere(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=TESTS,
        check=True,
    )
    return done.stdout


def trained_elsewhere(seed: int) -> list[object]:
    found: list[object] = json.loads(
        elsewhere(IN_ANOTHER_PROCESS, str(seed)).strip().splitlines()[-1]
    )
    return found


@pytest.mark.slow
def test_an_exception_amid_a_step_lets_mindspore_end_it_before_the_network_goes() -> None:
    told = elsewhere(INTERRUPTED).splitlines()
    # MindSpore takes SIGINT, too, and would end a notebook that has trained something.
    assert told[-2:] == ["let MindSpore end its step", "has Ctrl-C back"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_network_in_another_process_and_another_seed_does_not() -> (
    None
):
    first, again, other = (trained_elsewhere(seed) for seed in (7, 7, 8))
    assert first == again
    assert first[1] != other[1]


@dataclasses.dataclass
class Watched:
    """A whole training with everything that it told."""

    result: loop.TrainResult
    states: list[TrainState]
    progress: list[TrainProgress]


@pytest.fixture(scope="module")
def watched() -> Watched:
    states: list[TrainState] = []
    progress: list[TrainProgress] = []
    result = train(
        TINY, RECIPE, seed=3, threads=1, on_progress=progress.append, on_state=states.append
    )
    return Watched(result, states, progress)


def test_a_training_learns_and_reports_every_epoch(watched: Watched) -> None:
    result = watched.result
    assert result.steps == 105
    assert len(result.losses) == len(result.accuracies) == 3
    assert result.losses[-1] < result.losses[0]
    assert result.accuracy == result.accuracies[-1] == result.validation.top1
    assert result.accuracy > 0.3
    assert result.validation.images == len(result.data.validation)
    assert result.images_per_s > 0


def test_validating_after_every_epoch_does_not_change_the_training(watched: Watched) -> None:
    plain = train(TINY, RECIPE, seed=3, threads=1)
    assert plain.losses == watched.result.losses
    assert plain.accuracies == watched.result.accuracies[-1:]
    for name, value in watched.result.weights.items():
        assert np.array_equal(plain.weights[name], value)


def test_progress_counts_steps_to_the_last_and_estimates_the_rest(watched: Watched) -> None:
    steps = [p.step for p in watched.progress]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1], watched.progress[-1].steps) == (1, 105, 105)
    assert [p.accuracy for p in watched.progress if p.accuracy is not None] == (
        watched.result.accuracies
    )
    assert watched.progress[-1].seconds_left == 0


def test_the_kept_weights_are_those_that_were_evaluated(watched: Watched) -> None:
    result = watched.result
    held = {p.name: p.asnumpy() for p in result.network.get_parameters()}
    assert held.keys() == result.weights.keys()
    assert all(np.array_equal(held[name], result.weights[name]) for name in held)
    again = evaluate(result.network, result.data, result.data.validation, 64)
    assert again.top1 == result.accuracy


def test_at_an_epochs_end_a_training_goes_on_with_another_global_batch(watched: Watched) -> None:
    state = watched.states[1]
    assert (state.step, state.global_batch, state.train_images) == (70, 32, 1146)
    halved = dataclasses.replace(RECIPE, batch_size=16)
    resumed = train(TINY, halved, seed=3, threads=1, state=state)
    # 71 steps an epoch: the third one is trained, all of it and nothing else.
    assert steps_done(state, 16) == 142
    assert resumed.steps == 213
    assert resumed.losses[:2] == watched.result.losses[:2]
    assert len(resumed.losses) == len(resumed.accuracies) == 3


def test_within_an_epoch_the_global_batch_must_stay_and_the_images_always(
    watched: Watched,
) -> None:
    state = watched.states[0]
    begun = dataclasses.replace(
        state, step=40, arrays={**state.arrays, "epoch_losses": np.ones(5)}
    )
    with pytest.raises(ConfigError, match=r"global batch must be 32, for .* but got 16"):
        train(TINY, dataclasses.replace(RECIPE, batch_size=16), seed=3, threads=1, state=begun)
    fewer = dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, train_images=1000))
    with pytest.raises(ConfigError, match=r"must hold the 1,146 training images .* holds 1,000"):
        train(TINY, fewer, seed=3, threads=1, state=state)


def test_a_resumed_training_ends_where_the_whole_one_did(watched: Watched) -> None:
    resumed = train(TINY, RECIPE, seed=3, threads=1, state=watched.states[1])
    whole = watched.result
    assert resumed.losses[:2] == whole.losses[:2]
    # Not bit-equal: MindSpore's RMSProp on a CPU takes the root to 1e-3 or to 1e-7, depending on
    # how it divides the work, and looks for a better division in its first five steps.
    assert resumed.losses[2] == pytest.approx(whole.losses[2], rel=0.15)
    assert resumed.accuracy == pytest.approx(whole.accuracy, abs=0.2)


def test_with_sgd_a_resumed_training_is_the_whole_one_bit_by_bit() -> None:
    sgd = dataclasses.replace(
        RECIPE,
        epochs=2,
        optimizer=OptimizerConfig(name="sgd"),
        schedule=ScheduleConfig(learning_rate=0.1),
    )
    states: list[TrainState] = []
    whole = train(TINY, sgd, seed=3, threads=1, on_state=states.append)
    resumed = train(TINY, sgd, seed=3, threads=1, state=states[0])
    assert resumed.losses == whole.losses
    for name, value in whole.weights.items():
        assert np.array_equal(resumed.weights[name], value)


def test_resuming_a_finished_training_only_evaluates_it(watched: Watched) -> None:
    resumed = train(TINY, RECIPE, seed=3, threads=1, state=watched.states[-1])
    assert resumed.accuracies == watched.result.accuracies
    assert resumed.accuracy == watched.result.accuracy


def test_images_that_are_no_numbers_fail_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: object, **names: object) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, (images, labels) in enumerate(train_batches(*arguments, **names)):  # type: ignore[arg-type]
            yield (images * np.float32(np.nan) if number == 2 else images), labels

    once = dataclasses.replace(RECIPE, epochs=1)
    monkeypatch.setattr(loop, "train_batches", broken)
    with pytest.raises(
        Diverged, match=r"diverged: stem\.\S+ was not finite after epoch 1"
    ) as caught:
        train(TINY, once, seed=0, threads=1)
    assert caught.value.cause == "architecture"


def test_a_loss_that_is_no_number_fails_the_trial_and_names_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(rate: float, shape: tuple[int, int], *, seed: int, step: int) -> np.ndarray:
        return np.full(shape, np.nan if step == 2 else 1, np.float32)

    monkeypatch.setattr(loop, "dropout_mask", broken)
    with pytest.raises(Diverged, match="diverged: the loss was nan at step 3"):
        train(TINY, RECIPE, seed=0, threads=1)


def test_a_passed_deadline_fails_the_trial() -> None:
    with pytest.raises(TrialFailed, match="time limit reached at step 0 of 105"):
        train(TINY, RECIPE, seed=0, threads=1, deadline=time.monotonic() - 1)


def test_what_mindspore_cannot_compute_fails_the_trial_with_its_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **names: object) -> None:
        raise RuntimeError("no such kernel\nand much more")

    monkeypatch.setattr(loop, "build_network", fail)
    with pytest.raises(TrialFailed, match=r"^MindSpore failed: no such kernel$") as caught:
        train(TINY, RECIPE, seed=0, threads=1)
    assert "and much more" in caught.value.detail


def test_a_network_for_other_classes_is_refused() -> None:
    other = parse_architecture(TINY_TEXT.replace("c10", "c12"))
    with pytest.raises(ConfigError, match="classes: the network has 12, but the data set digits"):
        train(other, RECIPE, seed=0, threads=1)


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers\) must be at most the 1146 training images"):
        train(TINY, dataclasses.replace(RECIPE, batch_size=1147), seed=0, threads=1)


def test_preparing_a_process_twice_is_harmless() -> None:
    loop.warm_up(RECIPE, threads=1)
    loop.warm_up(RECIPE, threads=2)
    loop.prepare_process(1)


SGD = dataclasses.replace(
    RECIPE,
    epochs=1,
    optimizer=OptimizerConfig(name="sgd"),
    schedule=ScheduleConfig(learning_rate=0.1),
    batch_norm="frozen",
    ema_decay=None,
)


def steps_of(recipe: Recipe, count: int = 3) -> dict[str, np.ndarray]:
    """The weights after some steps."""
    data = load_data(recipe.data, TINY.resolution, TINY.input_channels, recipe.augment)
    trainer = Trainer(TINY, recipe, data, seed=1, threads=1)
    for _ in range(count):
        trainer.take_step()
    return trainer.arrays()


def test_on_an_npu_the_device_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in: MindSpore for CPUs says that it is for NPUs, and takes none.
    chosen: list[str] = []
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend")
    monkeypatch.setattr(ms, "set_device", chosen.append)
    loop._take_device.cache_clear()
    loop.prepare_process(1)
    loop.prepare_process(1)
    loop._take_device.cache_clear()
    assert chosen == ["Ascend"]


def test_accumulated_passes_are_one_large_batch_and_a_loss_scale_leaves_no_trace() -> None:
    plain = dataclasses.replace(SGD, augment=AugmentConfig())
    changes = {"batch_size": 16, "accumulate": 2, "precision": PrecisionConfig(loss_scale=256.0)}
    whole, parts = steps_of(plain), steps_of(dataclasses.replace(plain, **changes))  # type: ignore[arg-type]
    for name in initial_parameters(TINY, 0):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_frozen_stages_keep_weights_and_statistics_and_the_rest_is_trained() -> None:
    start = initial_parameters(TINY, 1)
    arrays = steps_of(dataclasses.replace(SGD, batch_norm="train", frozen_stages=2))
    moved = {name for name in start if not np.array_equal(arrays[name], start[name])}
    assert moved == {n for n in start if n.startswith(("head.", "classifier."))}


def test_more_frozen_stages_than_there_are_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match="frozen_stages must be at most 3, the stem, 1 blocks"):
        steps_of(dataclasses.replace(SGD, frozen_stages=4))


@pytest.mark.slow
def test_in_float16_a_scale_that_is_too_large_is_halved_until_steps_are_taken() -> None:
    precision = PrecisionConfig("O2", loss_scale=2.0**24, dynamic=True, growth_steps=1000)
    arrays = steps_of(dataclasses.replace(SGD, batch_norm="train", precision=precision), 20)
    scale, good_steps = arrays["loss_scale"]
    assert 1 <= scale < 2.0**24
    assert good_steps > 0
    assert all(np.isfinite(arrays[name]).all() for name in initial_parameters(TINY, 0))


# ---------------------------------------------------------------------------- parts


def test_a_dynamic_loss_scale_halves_doubles_and_gives_up_at_one() -> None:
    scale = LossScale(PrecisionConfig(loss_scale=4.0, dynamic=True, growth_steps=2))
    seen = []
    for finite in (True, True, True, False, True, True, False, False, False):
        scale.update(finite=finite)
        seen.append(scale.value)
    assert seen == [4, 8, 8, 4, 4, 8, 4, 2, 1]
    with pytest.raises(Diverged, match="not finite with a loss scale of 1"):
        scale.update(finite=False)


def test_drop_path_leaves_out_later_layers_more_often_and_is_drawn_again_alike() -> None:
    network = parse_architecture("stem8_s11 | r3_k3_s11_e3_i8_o8 | head16 | r8 | c10 | in1")
    rates = drop_path_rates(0.3, network)
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2], rtol=1e-6)
    mask = drop_path_mask(rates, 20_000, seed=1, step=2)
    # Six standard deviations of a mean of 20,000 draws are passed with a probability below 1e-8.
    np.testing.assert_allclose((mask == 0).mean(axis=0), rates, atol=0.017)
    np.testing.assert_allclose(mask.max(axis=0), 1 / (1 - rates), rtol=1e-6)
    assert np.array_equal(mask, drop_path_mask(rates, 20_000, seed=1, step=2))
    assert not np.array_equal(mask, drop_path_mask(rates, 20_000, seed=1, step=3))


def test_features_with_all_paths_are_the_networks_and_without_them_the_skips_alone() -> None:
    text = "stem8_s11 | r2_k3_s11_e3_i8_o8 | r1_k3_s11_e3_i8_o8_pool | head16 | r8 | c10 | in1"
    network = build_network(parse_architecture(text), seed=0).set_train(False)
    images = ms.Tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32))
    features = DropPathFeatures(network)
    found = features(images, ms.Tensor(np.ones((2, 3), np.float32)))
    np.testing.assert_allclose(found.asnumpy(), network.features(images).asnumpy(), atol=1e-6)
    skipped = features(images, ms.Tensor(np.zeros((2, 3), np.float32)))
    pooled = network.blocks[1][0].pool_skip(network.stem(images))
    expected = network.head(pooled).mean((2, 3))
    np.testing.assert_allclose(skipped.asnumpy(), expected.asnumpy(), atol=1e-6)


def test_dropouts_mask_keeps_its_share_scaled_up_and_is_drawn_again_alike() -> None:
    mask = dropout_mask(0.2, (100, 100), seed=1, step=5)
    assert set(np.unique(mask)) == {0, np.float32(1.25)}
    # 10,000 draws: six standard deviations (0.024) are passed with a probability below 1e-8.
    assert abs((mask == 0).mean() - 0.2) < 0.024
    assert np.array_equal(mask, dropout_mask(0.2, (100, 100), seed=1, step=5))
    assert not np.array_equal(mask, dropout_mask(0.2, (100, 100), seed=1, step=6))
    assert dropout_mask(0.0, (100, 100), seed=1, step=5).tolist() == [[1.0]]


class Given(nn.Cell):  # type: ignore[misc]
    """Stands for a network whose logits are its input."""

    def features(self, x: ms.Tensor) -> ms.Tensor:
        """The input."""
        return x

    def classify(self, x: ms.Tensor) -> ms.Tensor:
        """The input."""
        return x


def test_the_loss_is_the_cross_entropy_with_smoothed_labels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 1, 1], np.int32)
    mask = rng.uniform(0.5, 1.5, (6, 4)).astype(np.float32)
    loss = loop._Loss(Given(), 0.3)
    found = loss(ms.Tensor(logits), ms.Tensor(labels), ms.Tensor(mask)).asnumpy()
    masked = (logits * mask).astype(np.float64)
    log_probabilities = masked - np.log(np.exp(masked).sum(axis=1, keepdims=True))
    targets = np.full((6, 4), 0.3 / 4) + 0.7 * np.eye(4)[labels]
    assert found == pytest.approx(-(targets * log_probabilities).sum(axis=1).mean(), rel=1e-5)


def test_gradients_are_unscaled_then_clipped_to_their_norm_and_small_ones_left_alone() -> None:
    finish = loop._Finish(1.0)
    half = ms.Tensor(0.5, ms.float32)
    large = (ms.Tensor(np.array([6.0], np.float32)), ms.Tensor(np.array([8.0], np.float32)))
    clipped, square = finish(large, half)
    np.testing.assert_allclose([g.asnumpy()[0] for g in clipped], [0.6, 0.8], rtol=1e-5)
    assert float(square) == pytest.approx(25.0)
    small = (ms.Tensor(np.array([0.6], np.float32)), ms.Tensor(np.array([0.8], np.float32)))
    left, _ = finish(small, half)
    np.testing.assert_allclose([g.asnumpy()[0] for g in left], [0.3, 0.4], rtol=1e-5)


def test_an_evaluations_figures_are_those_counted_by_hand() -> None:
    logits = np.array(
        [[5, 1, 0, 0, 0, 0], [1, 5, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1], [0, 0, 9, 0, 0, 0]],
        np.float32,
    )
    found = evaluation_of(logits, np.array([0, 1, 5, 1], np.int32))
    assert found.top1 == 0.5
    assert found.images == 4
    # The third image's class is the sixth; the fourth's ties for the second place.
    assert found.top5 == 0.75
    assert found.per_class_top1 == (1.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(probabilities[np.arange(4), [0, 1, 5, 1]]).mean()
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_infinite_logits_show_in_the_loss() -> None:
    logits = np.array([[np.inf, 0], [0, 1]], np.float32)
    assert np.isnan(evaluation_of(logits, np.array([1, 1], np.int32)).loss)


class Mean(nn.Cell):  # type: ignore[misc]
    """Two logits: the mean of the image and its opposite."""

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(n, channels, size, size) -> (n, 2)."""
        mean = x.mean((1, 2, 3))
        return ms.ops.stack((mean, -mean), 1)


def test_every_image_is_evaluated_once_though_the_last_batch_is_filled_up() -> None:
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1) * 20
    split = Split(images, np.zeros(10, np.int32))
    data = DataSet(("a", "b"), split, split, split)
    for batch_size in (1, 4, 10, 64):
        logits = logits_of(Mean(), data, split, batch_size)
        np.testing.assert_allclose(logits[:, 0], data.normalise(images)[:, 0, 0, 0], rtol=1e-6)


def test_reading_the_data_ahead_of_need_needs_a_recipe_only() -> None:
    loop.warm_up(Recipe(DataConfig("digits"), 1), threads=1)
