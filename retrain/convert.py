"""Weights from timm, torchvision and MindCV to checkpoints, and back, as files.

Reading is in retrain/foreign_weights.py, the names are in retrain/frameworks.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrain.checkpoint import Checkpoint, Weights, load_checkpoint, save_checkpoint
from retrain.data import Normalisation
from retrain.foreign_weights import (
    NOTE,
    OURS,
    Ignored,
    Note,
    Origin,
    Reading,
    read_foreign,
    require_name,
)
from retrain.frameworks import (
    FRAMEWORKS,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Framework,
    counter_names,
    model_name,
    name_map,
)
from retrain.weight_files import kind_to_write, read_weight_file, write_weight_file
from space.errors import ConfigError
from space.records import record, to_plain

#: How the command line calls the fields whose options have other names.
_OPTIONS = {
    "framework": "--from",
    "deviation": "--std",
    "batch_norm_epsilon": "--batch_norm_epsilon",
}


@record
class ConvertReport:
    """What was converted into what.

    Attributes:
        source: The file that was read.
        sha256: Of that file, hexadecimal.
        source_framework: `timm`, `torchvision`, `mindcv` or `mnas`.
        model: That framework's name of the network, if it has one.
        recognised: Whether the network was told from the arrays rather than said by the user.
        architecture: The network's text.
        architecture_hash: Its identity.
        arrays: How many were converted.
        ignored: What was left, and why.
        notes: What else was done to get there, a sentence each.
        out: The file that was written.
        to: Whose it is: a framework as above.
        size_bytes: Of that file.
        load: Python lines that load it there; None if it is ours, or the framework has no function
            that builds the network.
    """

    source: str
    sha256: str
    source_framework: str
    model: str | None
    recognised: bool
    architecture: str
    architecture_hash: str
    arrays: int
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]
    out: str
    to: str
    size_bytes: int
    load: str | None


def convert(
    source: Path,
    out: Path,
    *,
    to: str = OURS,
    origin: Origin | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Convert a file of weights; what is written is whole or not there.

    Args:
        source: A checkpoint of ours, or weights of timm, torchvision or MindCV in a safetensors,
            PyTorch or MindSpore file.
        out: The file to write; its ending says the format.
        to: `mnas`, `timm`, `torchvision` or `mindcv`.
        origin: What is known of weights from elsewhere.
        overwrite: Replace `out` if it is there.

    Raises:
        ConfigError: `source` cannot be read or understood, its arrays are not exactly those of the
            network (all faults are listed), or `to` cannot have such a network.
    """
    _check_target(out, to, overwrite=overwrite)
    file = read_weight_file(source)
    reading = Reading(file.sha256)
    if file.metadata.get("format", "").startswith(OURS):
        checkpoint = _own(source, to, origin)
    else:
        checkpoint = read_foreign(source, file, origin or Origin(), reading)
    size, load = _write(checkpoint, out, to, reading.notes)
    return ConvertReport(
        source=str(source),
        sha256=file.sha256,
        source_framework=reading.framework,
        model=reading.model,
        recognised=reading.recognised,
        architecture=checkpoint.architecture.text,
        architecture_hash=checkpoint.architecture.hash,
        arrays=len(checkpoint.weights),
        ignored=tuple(reading.ignored),
        notes=tuple(reading.notes),
        out=str(out),
        to=to,
        size_bytes=size,
        load=load,
    )


def _check_target(out: Path, to: str, *, overwrite: bool) -> None:
    require_name("to", to, [OURS, *FRAMEWORKS])
    kind_to_write(out)
    endings = (".safetensors",) if to == OURS else FRAMEWORKS[to].endings
    if out.suffix not in endings:
        raise ConfigError(
            f"{out}: must end in {' or '.join(endings)} for {to}, but ends in {out.suffix!r}."
        )
    if out.is_dir():
        raise ConfigError(f"{out}: must be a file, but it is a folder.")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: is there already; choose another name, or give --overwrite.")


def _own(source: Path, to: str, origin: Origin | None) -> Checkpoint:
    if to == OURS:
        raise ConfigError(
            f"{source}: is a checkpoint of mnas already; say with --to what it is to become."
        )
    said = {} if origin is None else to_plain(origin)
    given = [_OPTIONS.get(key, f"--{key}") for key, value in said.items() if value is not None]
    if given:
        raise ConfigError(
            f"{source}: is a checkpoint of mnas, which says all about itself, but"
            f" {', '.join(given)} was given; leave it out."
        )
    return load_checkpoint(source)


# ---------------------------------------------------------------------------- writing


def _write(checkpoint: Checkpoint, out: Path, to: str, notes: list[str]) -> tuple[int, str | None]:
    """Write the checkpoint as a framework's; return the size and how to load it there."""
    if to == OURS:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(out, checkpoint)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error.strerror or error}.") from None
        return out.stat().st_size, None
    framework, architecture = FRAMEWORKS[to], checkpoint.architecture
    refusal = framework.refusal(architecture, checkpoint.style)
    if refusal is not None:
        other = "" if to == "timm" else "; --to timm has more blocks"
        raise ConfigError(
            f"--to {to}: {framework.title}'s MnasNet cannot be this network: {refusal}{other}."
        )
    size = write_weight_file(
        out,
        to_framework(framework, checkpoint, notes),
        # The format is what PyTorch's and Hugging Face's readers look for.
        metadata={"format": "pt", NOTE: json.dumps(to_plain(_note_of(checkpoint)))},
        module_version=framework.module_version,
    )
    model = model_name(framework, architecture)
    if model is None and to != "timm":
        notes.append(
            f"No function of {framework.title} builds this network; a module of your own must,"
            " with the same names."
        )
    usual = Normalisation(IMAGENET_MEAN, IMAGENET_DEVIATION)
    if checkpoint.normalisation != usual:
        mean, deviation = checkpoint.normalisation.mean, checkpoint.normalisation.deviation
        notes.append(
            f"The pixels (of 1) want mean {mean} and deviation {deviation}, not ImageNet's."
        )
    return size, framework.loading(architecture, checkpoint.style, model, out)


def _note_of(checkpoint: Checkpoint) -> Note:
    return Note(
        checkpoint.architecture.text,
        checkpoint.style.padding,
        checkpoint.normalisation,
        checkpoint.classes,
    )


def to_framework(
    framework: Framework, checkpoint: Checkpoint, notes: list[str]
) -> dict[str, NDArray[Any]]:
    """Return a checkpoint's arrays under a framework's names, float32, and its counters, int64.

    Where the framework's batch norms add another epsilon, their scales (gamma) are changed such
    that the outputs are the same; `notes` is told.
    """
    weights = checkpoint.weights
    own, theirs = checkpoint.style.batch_norm_epsilon, framework.style.batch_norm_epsilon
    if own != theirs:
        weights = _with_epsilon(weights, own, theirs)
        notes.append(
            f"The batch norms' scales were changed for {framework.title}'s epsilon, {theirs:g} in"
            f" place of {own:g}; the outputs stay the same."
        )
    names = name_map(framework, checkpoint.architecture)
    arrays: dict[str, NDArray[Any]] = {names[ours]: weights[ours] for ours in names}
    for name in counter_names(framework, checkpoint.architecture):
        arrays[name] = np.zeros((), np.int64)
    return arrays


def _with_epsilon(weights: Weights, own: float, theirs: float) -> Weights:
    """gamma / sqrt(variance + epsilon) is what counts: gamma takes up another epsilon."""
    changed = dict(weights)
    for name, gamma in weights.items():
        if re.fullmatch(r".+\.norm\.gamma", name):
            variance = weights[name.replace(".gamma", ".moving_variance")].astype(np.float64)
            factor = np.sqrt((variance + theirs) / (variance + own))
            changed[name] = (gamma * factor).astype(np.float32)
    return changed
