"""Checkpoints: weights, and the state that a killed training goes on from, without pickle.

Both are safetensors files whose metadata says everything that is needed to use them again; weights
may be a MindSpore .ckpt file with the same metadata. They are written under a temporary name,
flushed to disk and renamed: a reader sees all or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from retrain.config import Recipe
from retrain.data import Normalisation
from retrain.data_config import IMAGE_FILES
from space.architecture import Architecture, NetworkStyle, parse_architecture
from space.errors import ConfigError
from space.files import write_atomically
from space.parameters import parameter_shapes
from space.records import build, record, to_plain

logger = logging.getLogger(__name__)

Weights = dict[str, NDArray[np.float32]]

WEIGHTS_FORMAT = "mnas weights 2"
_STATE_FORMAT = "mnas training state 3"


class NotACheckpointError(ConfigError):
    """A file that is no checkpoint of ours; it may hold weights of another framework."""


@record
class Training:
    """How weights were trained.

    Attributes:
        recipe: Everything that decided it.
        seed: Of the training.
        epochs: Trained for so many.
        validation_accuracy: Top-1 on the images held out from the training set, fraction.
    """

    recipe: Recipe
    seed: int
    epochs: int
    validation_accuracy: float


@record
class Checkpoint:
    """A network with weights, ready to be evaluated, exported or trained on.

    Attributes:
        architecture: The network.
        style: Padding and batch norm that the weights are for.
        normalisation: What the pixels are to be normalised with.
        classes: Names in the order of the logits; empty where they are not known.
        versions: Package -> version that wrote it.
        weights: Name -> float32 array, as space/parameters.py names them: those that were
            evaluated (averaged ones if the recipe averages).
        training: How they were trained; None for weights from elsewhere.
        source: Where weights from elsewhere come from: framework, model, file, SHA-256.
        crop: `crop_pct` and interpolation of the image files that it is evaluated on here; None:
            as its training had them. It is not saved.
    """

    architecture: Architecture
    style: NetworkStyle
    normalisation: Normalisation
    classes: tuple[str, ...]
    versions: dict[str, str]
    weights: dict[str, Any]
    training: Training | None = None
    source: str | None = None
    crop: tuple[float, str] | None = None

    @property
    def evaluation_crop(self) -> tuple[float, str]:
        """How an image file is cut to be evaluated: `crop_pct` and interpolation.

        As the training's data were: small sets' images, and those of an unknown training, whole.
        """
        if self.crop is not None:
            return self.crop
        if self.training is None or self.training.recipe.data.name not in IMAGE_FILES:
            return 1.0, "bilinear"
        augment = self.training.recipe.augment
        return augment.crop_pct, augment.interpolation


@record
class TrainState:
    """What a training goes on from.

    Attributes:
        step: Optimizer steps done.
        epoch: Whole epochs done.
        losses: Mean training loss of each of them.
        accuracies: Validation accuracy after each of them.
        global_batch: Images of one of these steps, of all workers.
        train_images: Images trained on.
        arrays: Name -> array: the weights; the optimizer's state under `optimizer.`, averages
            under `ema.`; `loss_scale`; `epoch_losses` of the steps since the last whole epoch.
    """

    step: int
    epoch: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    global_batch: int
    train_images: int
    arrays: dict[str, Any]

    def evaluated_weights(self, architecture: Architecture) -> Weights:
        """Return the weights that are evaluated: the averages, where there are any."""
        names = parameter_shapes(architecture)
        return {name: self.arrays.get(f"ema.{name}", self.arrays[name]) for name in names}


def steps_done(state: TrainState | None, global_batch: int) -> int:
    """Return how many steps of so many images a training is past."""
    if state is None:
        return 0
    if state.global_batch == global_batch:
        return state.step
    return state.epoch * (state.train_images // global_batch)


@record
class SavedState:
    """Where a killed training goes on, and which training it is.

    Attributes:
        architecture: The network's text.
        recipe: As it was.
        seed: As it was.
        start: SHA-256 of the checkpoint that it started from; None for random weights.
        state: Where it was.
    """

    architecture: str
    recipe: Recipe
    seed: int
    start: str | None
    state: TrainState


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, replacing what is there.

    Raises:
        ConfigError: The weights are not the network's.
    """
    check_weights(checkpoint.architecture, checkpoint.weights, where=str(path))
    metadata = {"format": WEIGHTS_FORMAT, "architecture": checkpoint.architecture.text}
    for key in _CHECKPOINT_KEYS:
        metadata[key] = json.dumps(to_plain(getattr(checkpoint, key)))
    if path.suffix == ".ckpt":
        from retrain.weight_files import mindspore_bytes

        write_atomically(path, mindspore_bytes(_contiguous(checkpoint.weights), metadata))
    else:
        write_atomically(path, save(_contiguous(checkpoint.weights), metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint that a file holds.

    Raises:
        ConfigError: The file is missing, damaged or something else, or its weights are not exactly
            those of its network; all faults are listed.
    """
    metadata, arrays = _read(path, WEIGHTS_FORMAT)
    architecture = parse_architecture(metadata["architecture"])
    check_weights(architecture, arrays, where=str(path))
    values = {key: _json(metadata, key, path) for key in _CHECKPOINT_KEYS}
    training = values["training"]
    return Checkpoint(
        architecture=architecture,
        style=build(NetworkStyle, values["style"], where=f"{path}: style"),
        normalisation=build(Normalisation, values["normalisation"], where=str(path)),
        classes=tuple(values["classes"]),
        versions=values["versions"],
        weights=arrays,
        training=build(Training, training, where=f"{path}: training") if training else None,
        source=values["source"],
    )


_CHECKPOINT_KEYS = ("style", "normalisation", "classes", "versions", "training", "source")
_STATE_KEYS = ("recipe", "seed", "start")
_PROGRESS_KEYS = ("step", "epoch", "losses", "accuracies", "global_batch", "train_images")


def save_state(path: Path, saved: SavedState) -> None:
    """Write a training's state, replacing the one before."""
    metadata = {"format": _STATE_FORMAT, "architecture": saved.architecture}
    metadata.update({key: json.dumps(to_plain(getattr(saved, key))) for key in _STATE_KEYS})
    metadata.update({key: json.dumps(getattr(saved.state, key)) for key in _PROGRESS_KEYS})
    write_atomically(path, save(_contiguous(saved.state.arrays), metadata))


def load_state(path: Path) -> SavedState:
    """Return the state that a file holds.

    Raises:
        ConfigError: The file is missing, damaged or something else.
    """
    metadata, arrays = _read(path, _STATE_FORMAT)
    values = {key: _json(metadata, key, path) for key in (*_STATE_KEYS, *_PROGRESS_KEYS)}
    return SavedState(
        architecture=metadata["architecture"],
        recipe=build(Recipe, values["recipe"], where=f"{path}: recipe"),
        seed=values["seed"],
        start=values["start"],
        state=TrainState(
            step=values["step"],
            epoch=values["epoch"],
            losses=tuple(values["losses"]),
            accuracies=tuple(values["accuracies"]),
            global_batch=values["global_batch"],
            train_images=values["train_images"],
            arrays=arrays,
        ),
    )


class KeptState:
    """The state of one training in a file: what a later process goes on from.

    A file that cannot be written is worth a warning: the training does not depend on it.

    Args:
        folder: Of the file; it is made.
        architecture: The network.
        recipe: Of the training.
        seed: Of the training.
    """

    def __init__(
        self, folder: Path, architecture: Architecture, recipe: Recipe, seed: int
    ) -> None:
        # Trainings of other recipes may keep their states in the same folder.
        digest = hashlib.sha256(json.dumps(to_plain(recipe)).encode()).hexdigest()[:8]
        self._path = folder / f"{architecture.hash}-{digest}-{seed}.safetensors"
        self._architecture = architecture
        self._recipe = recipe
        self._seed = seed

    def load(self) -> TrainState | None:
        """Return the state; None if there is none, it is damaged or another training's."""
        try:
            saved = load_state(self._path)
        except ConfigError:
            return None
        this = (self._architecture.text, self._recipe, self._seed)
        return saved.state if (saved.architecture, saved.recipe, saved.seed) == this else None

    def save(self, state: TrainState) -> None:
        """Write the state, replacing the one before."""
        saved = SavedState(self._architecture.text, self._recipe, self._seed, None, state)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_state(self._path, saved)
        except OSError as error:
            logger.warning("%s: the state is not kept: %s", self._path, error)

    def remove(self) -> None:
        """Remove the file, if it is there."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def check_weights(
    architecture: Architecture, weights: Mapping[str, NDArray[Any]], *, where: str
) -> None:
    """Raise unless the weights are exactly the network's, by name, shape and type.

    Raises:
        ConfigError: Lists what is missing, unexpected, misshapen or not finite: the first five of
            each, and how many more.
    """
    shapes = parameter_shapes(architecture)
    common = [name for name in shapes if name in weights]
    faults = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in weights if name not in shapes],
        "misshapen": [
            f"{name} (must be {shapes[name]}, but is {weights[name].shape})"
            for name in common
            if weights[name].shape != shapes[name]
        ],
        "not float32": [name for name in common if weights[name].dtype != np.float32],
        "not finite": [name for name in common if not np.isfinite(weights[name]).all()],
    }
    listed = list_faults(faults, limit=5)
    if listed:
        raise ConfigError(
            f"{where}: the weights do not fit the network {architecture.hash}; {listed}."
        )


def list_faults(faults: Mapping[str, list[str]], *, limit: int) -> str:
    """Return `kind: a, b and 3 more; ...`: the first `limit` of each kind; empty for no faults."""
    return "; ".join(
        f"{kind}: {', '.join(found[:limit])}"
        + (f" and {len(found) - limit} more" if len(found) > limit else "")
        for kind, found in faults.items()
        if found
    )


def _contiguous(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    # safetensors writes an array's buffer as it lies in memory; ascontiguousarray would make
    # a scalar one-dimensional.
    return {name: np.array(value, order="C") for name, value in arrays.items()}


def _read(path: Path, expected: str) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint file.")
    if path.suffix == ".ckpt":
        from retrain.weight_files import read_mindspore

        try:
            metadata, arrays = read_mindspore(path)
        except ConfigError as error:
            raise NotACheckpointError(str(error)) from None
    else:
        metadata, arrays = _read_safetensors(path)
    found = metadata.get("format", "an unnamed one")
    if found != expected and found.startswith(expected.rstrip("0123456789")):
        raise ConfigError(
            f"{path}: was written by another version, as {found!r} where this one has"
            f" {expected!r}; use that version, or train anew into another folder."
        )
    if found != expected or "architecture" not in metadata:
        raise NotACheckpointError(
            f"{path}: must be in the format {expected!r}, but is in {found!r}; `mnas convert`"
            " reads weights of other frameworks."
        )
    return metadata, arrays


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            return dict(file.metadata() or {}), arrays
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise NotACheckpointError(
            f"{path}: must be a safetensors file, but is something else or damaged: {error};"
            " `mnas convert` reads weights of other frameworks."
        ) from None


def _json(metadata: Mapping[str, str], key: str, path: Path) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError):
        raise ConfigError(f"{path}: the metadata {key!r} is missing or damaged.") from None
