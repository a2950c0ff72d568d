"""Weights from timm, torchvision and MindCV to checkpoints, and back.

Every array of the source finds its place or is named: one that is missing, unknown, misshapen or
of another type ends the conversion with a list; what is no weight (counters, the state of an
optimizer) is reported with the reason why it was left. Padding and batch norm are those of the
framework that trained the weights, and stay with them. The names are in retrain/frameworks.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrain.checkpoint import (
    Checkpoint,
    NotACheckpointError,
    Weights,
    list_faults,
    load_checkpoint,
    save_checkpoint,
)
from retrain.data import Normalisation
from retrain.frameworks import (
    FRAMEWORKS,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Framework,
    counter_names,
    known_network,
    model_name,
    name_map,
)
from retrain.weight_files import (
    Entries,
    WeightFile,
    kind_to_write,
    read_weight_file,
    write_weight_file,
)
from space.architecture import Architecture, NetworkStyle
from space.errors import ConfigError
from space.files import versions
from space.mnasnet import adapt, find_architecture
from space.parameters import Shape, parameter_shapes
from space.records import build, did_you_mean, parse_yaml, record, to_plain

#: What wrappers put before every name: data parallelism, torch.compile, training modules.
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")

#: Floating-point types, and what becomes of them.
_FLOATS = {
    "float32": None,
    "float16": "widened from float16 to float32",
    "bfloat16": "widened from bfloat16 to float32",
    "float64": "rounded from float64 to float32",
}

#: A network is taken for a damaged or changed form of a known one if so few of its arrays differ.
_NEAR = 0.5

OURS = "mnas"

#: The key of the metadata of safetensors under which a _Note lies.
_NOTE = "mnas"


@record
class Origin:
    """What a user says about weights from elsewhere; what is None is recognised or as usual.

    Attributes:
        framework: `timm`, `torchvision` or `mindcv`.
        model: The framework's name of the network.
        arch: The network by published name, which takes classes and channels from the arrays, or
            text form, which is taken as it is.
        width: Multiplier of `arch`'s stem and blocks.
        key: Which of several sets of weights in the file.
        resolution: Input pixels.
        classes: A text file with the classes' names, one a line.
        mean: Of the pixels, of 1, one number per channel; None is ImageNet's.
        deviation: Likewise.
        padding: `same` or `symmetric`, if the network was built with another than usual.
        batch_norm_epsilon: Likewise.
    """

    framework: str | None = None
    model: str | None = None
    arch: str | None = None
    width: float | None = None
    key: str | None = None
    resolution: int | None = None
    classes: str | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None
    padding: str | None = None
    batch_norm_epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.framework is not None:
            _require_name("from", self.framework, list(FRAMEWORKS))
        if self.padding is not None:
            _require_name("padding", self.padding, ["same", "symmetric"])
        if self.batch_norm_epsilon is not None and not 1e-12 <= self.batch_norm_epsilon <= 1:
            raise ConfigError(
                "--batch-norm-epsilon: must be in [1e-12, 1], but got"
                f" {self.batch_norm_epsilon!r}."
            )
        if self.model is not None and self.arch is not None:
            raise ConfigError("--model: cannot stand beside --arch; give one of them.")
        if self.width is not None and self.arch is None:
            raise ConfigError("--width: is the multiplier of --arch; give --arch too.")
        if (self.mean is None) != (self.deviation is None):
            raise ConfigError("--mean: must stand beside --std; give both or neither.")


#: How the command line calls the fields whose options have other names.
_OPTIONS = {
    "framework": "--from",
    "deviation": "--std",
    "batch_norm_epsilon": "--batch-norm-epsilon",
}


@record
class _Note:
    """What no framework's arrays say: safetensors written for them carry it.

    Attributes:
        architecture: The network's text.
        padding: Of its convolutions.
        normalisation: Of the pixels.
        classes: Their names, or none.
    """

    architecture: str
    padding: str
    normalisation: Normalisation
    classes: tuple[str, ...]


@record
class Ignored:
    """Entries of a file that are no weights.

    Attributes:
        names: As the file names them.
        reason: Why they may be left.
    """

    names: tuple[str, ...]
    reason: str


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


@dataclasses.dataclass
class _Reading:
    """What was learned of the source on the way to a checkpoint."""

    sha256: str
    framework: str = OURS
    model: str | None = None
    recognised: bool = False
    ignored: list[Ignored] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


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
    reading = _Reading(file.sha256)
    if file.metadata.get("format", "").startswith(OURS):
        checkpoint = _own(source, to, origin)
    else:
        checkpoint = _foreign(source, file, origin or Origin(), reading)
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


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint that a file holds: one of ours, or weights of another framework.

    Those are recognised from their arrays, as `convert` does it without being told anything.

    Raises:
        ConfigError: The file is missing, damaged or something else, or its network is not one that
            is recognised: `convert` can be told which it is.
    """
    try:
        return load_checkpoint(path)
    except NotACheckpointError:
        file = read_weight_file(path)
        if file.metadata.get("format", "").startswith(OURS):
            raise
        return _foreign(path, file, Origin(), _Reading(file.sha256))


def _check_target(out: Path, to: str, *, overwrite: bool) -> None:
    _require_name("to", to, [OURS, *FRAMEWORKS])
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


def _require_name(option: str, given: str, known: list[str]) -> None:
    if given not in known:
        hint = did_you_mean(given, known) or f"; known are {', '.join(known)}."
        raise ConfigError(f"--{option}: unknown name {given!r}{hint}")


# ---------------------------------------------------------------------------- reading


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


def _foreign(source: Path, file: WeightFile, origin: Origin, reading: _Reading) -> Checkpoint:
    origin, classes = _remembered(source, file, origin, reading)
    entries = _chosen_set(source, file, origin.key, reading)
    entries = _without_prefixes(source, entries, reading)
    reading.framework = _framework_of(source, entries, origin.framework)
    framework = FRAMEWORKS[reading.framework]
    entries = _without_ignored(framework, entries, reading)
    architecture = _network_of(source, framework, entries, origin, reading)
    said = {"padding": origin.padding, "batch_norm_epsilon": origin.batch_norm_epsilon}
    changes = {key: value for key, value in said.items() if value is not None}
    style = build(NetworkStyle, {**to_plain(framework.style), **changes}, where=str(source))
    refusal = framework.refusal(architecture, style)
    if refusal is not None:
        raise ConfigError(f"{source}: cannot be this network of {framework.title}: {refusal}.")
    return Checkpoint(
        architecture=architecture,
        style=style,
        normalisation=_normalisation(architecture, origin),
        classes=_class_names(architecture, origin.classes) if origin.classes else classes,
        versions=versions(),
        weights=_renamed(source, framework, architecture, entries, reading),
        source=f"{framework.title} {reading.model or architecture.hash}, {source.name},"
        f" sha256 {file.sha256}",
    )


def _remembered(
    source: Path, file: WeightFile, origin: Origin, reading: _Reading
) -> tuple[Origin, tuple[str, ...]]:
    """What this project once wrote into the file, where the user says nothing else.

    Returns:
        The origin with it, and the classes' names.
    """
    if _NOTE not in file.metadata or origin.arch is not None or origin.model is not None:
        return origin, ()
    note = build(_Note, parse_yaml(file.metadata[_NOTE], where=str(source)), where=str(source))
    reading.notes.append(
        "The network, its padding, normalisation and classes are as noted in the file by mnas."
    )
    unsaid = origin.mean is None
    filled = dataclasses.replace(
        origin,
        arch=note.architecture,
        padding=note.padding if origin.padding is None else origin.padding,
        mean=note.normalisation.mean if unsaid else origin.mean,
        deviation=note.normalisation.deviation if unsaid else origin.deviation,
    )
    return filled, note.classes


def _chosen_set(source: Path, file: WeightFile, key: str | None, reading: _Reading) -> Entries:
    keys = list(file.sets)
    if key is None and len(keys) > 1:
        raise ConfigError(
            f"{source}: holds several sets of weights, {', '.join(keys)}; choose one with --key."
        )
    chosen = keys[0] if key is None else key
    if chosen not in file.sets:
        listed = ", ".join(map(repr, keys))
        raise ConfigError(f"--key: {source} has no set of weights {key!r}, but {listed}.")
    if chosen:
        left = [k for k in (*keys, *file.aside) if k != chosen]
        beside = f"; beside it lie {', '.join(left)}" if left else ""
        reading.notes.append(f"The weights are those under {chosen!r}{beside}.")
    entries: Entries = file.sets[chosen]
    return entries


def _without_prefixes(source: Path, entries: Entries, reading: _Reading) -> Entries:
    """Cut what wrappers put before the names, as long as most names begin with it."""
    while True:
        for prefix in _PREFIXES:
            wrapped = [name for name in entries if name.startswith(prefix)]
            if len(wrapped) > len(entries) / 2:
                break
        else:
            return entries
        clashing = [name for name in wrapped if name.removeprefix(prefix) in entries]
        if clashing:
            raise ConfigError(
                f"{source}: holds two arrays for one name, with and without {prefix!r}:"
                f" {', '.join(clashing[:5])}."
            )
        entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
        reading.notes.append(f"{prefix!r} was cut from the names.")


def _framework_of(source: Path, entries: Entries, given: str | None) -> str:
    """The framework whose names these are.

    Raises:
        ConfigError: No framework's, or not the given one's.
    """
    shares = {name: _share(framework, entries) for name, framework in FRAMEWORKS.items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] <= 0.5:
        raise ConfigError(
            f"{source}: holds names of no known framework ({', '.join(list(entries)[:3])}, ...);"
            f" it must be a MnasNet of {', '.join(FRAMEWORKS)}."
        )
    if given is not None and given != best:
        raise ConfigError(
            f"--from: says {given}, but {source} holds names of {best}"
            f" ({', '.join(list(entries)[:3])}, ...)."
        )
    return best


def _share(framework: Framework, entries: Entries) -> float:
    """The share of names that are the framework's, of those that it would not ignore."""
    names = [
        name
        for name in entries
        if not any(pattern.fullmatch(name) for pattern, _ in framework.ignored)
    ]
    return sum(framework.known_by.fullmatch(n) is not None for n in names) / max(1, len(names))


def _without_ignored(framework: Framework, entries: Entries, reading: _Reading) -> Entries:
    kept = dict(entries)
    for pattern, reason in framework.ignored:
        names = tuple(name for name in kept if pattern.fullmatch(name))
        if names:
            reading.ignored.append(Ignored(names, reason))
            kept = {name: entry for name, entry in kept.items() if name not in names}
    return kept


# ---------------------------------------------------------------------------- the network


def _network_of(
    source: Path, framework: Framework, entries: Entries, origin: Origin, reading: _Reading
) -> Architecture:
    """The network that the user names, or the known one whose arrays these are."""
    shapes = _shapes(entries)
    if origin.arch is not None:
        architecture = find_architecture(origin.arch)
        if "|" not in origin.arch:
            architecture = _fitted(framework, architecture, shapes)
        architecture = adapt(architecture, width=origin.width or 1.0, resolution=origin.resolution)
        reading.model = model_name(framework, architecture)
        return architecture
    if origin.model is not None:
        # timm adds the weights' tag to the name: semnasnet_100.rmsp_in1k
        reading.model = origin.model.partition(".")[0]
        _require_name("model", reading.model, list(framework.models))
    else:
        reading.model = _recognised(source, framework, shapes)
        reading.recognised = True
    known = _fitted(framework, known_network(framework, reading.model), shapes)
    return adapt(known, resolution=origin.resolution)


def _shapes(entries: Entries) -> dict[str, Shape]:
    return {n: entry.values.shape for n, entry in entries.items() if entry.values is not None}


def _fitted(
    framework: Framework, architecture: Architecture, shapes: Mapping[str, Shape]
) -> Architecture:
    """The network with the classes and the input channels that the arrays have."""
    modules = framework.modules(architecture)
    classifier = shapes.get(f"{modules['classifier']}.weight", ())
    stem = shapes.get(f"{modules['stem.conv']}.weight", ())
    return adapt(
        architecture,
        classes=classifier[0] if len(classifier) == 2 else None,
        input_channels=stem[1] if len(stem) == 4 else None,
    )


def _recognised(source: Path, framework: Framework, shapes: Mapping[str, Shape]) -> str:
    """The framework's network whose arrays have these names and shapes."""
    differing: dict[str, int] = {}
    for model in framework.models:
        network = _fitted(framework, known_network(framework, model), shapes)
        expected = _expected_shapes(framework, network)
        names = expected.keys() | shapes.keys()
        differing[model] = sum(expected.get(name) != shapes.get(name) for name in names)
    nearest = min(differing, key=lambda model: differing[model])
    if differing[nearest] > _NEAR * len(shapes):
        raise ConfigError(
            f"{source}: holds none of {framework.title}'s known MnasNets; the nearest,"
            f" {nearest}, differs in {differing[nearest]} of {len(shapes)} arrays; say which"
            " network it is with --arch."
        )
    # The few arrays that may differ are listed when they are renamed.
    return nearest


def _expected_shapes(framework: Framework, architecture: Architecture) -> dict[str, Shape]:
    names = name_map(framework, architecture)
    return {names[ours]: shape for ours, shape in parameter_shapes(architecture).items()}


def _renamed(
    source: Path,
    framework: Framework,
    architecture: Architecture,
    entries: Entries,
    reading: _Reading,
) -> Weights:
    """The arrays under our names, float32.

    Raises:
        ConfigError: They are not exactly the network's.
    """
    names = name_map(framework, architecture)
    expected = _expected_shapes(framework, architecture)
    common = [name for name in expected if name in entries]
    arrays = {n: entries[n].values for n in common if entries[n].dtype in _FLOATS}
    faults = {
        "missing": [name for name in expected if name not in entries],
        "unknown": [name for name in entries if name not in expected],
        "misshapen": [
            f"{name} (must be {expected[name]}, but is {values.shape})"
            for name, values in _arrays(entries, common).items()
            if values.shape != expected[name]
        ],
        "of another type": [
            f"{name} ({entries[name].dtype})" for name in common if arrays.get(name) is None
        ],
        "not finite": [
            name
            for name, values in arrays.items()
            if values is not None and not np.isfinite(_float32(values)).all()
        ],
    }
    listed = list_faults(faults, limit=10)
    if listed:
        called = reading.model or "the network given"
        raise ConfigError(
            f"{source}: does not hold exactly the weights of {framework.title}'s {called};"
            f" {listed}."
        )
    for dtype, note in _FLOATS.items():
        number = sum(entries[name].dtype == dtype for name in common)
        if note and number:
            reading.notes.append(f"{number} arrays were {note}.")
    found = _arrays(entries, common)
    return {ours: _float32(found[theirs]) for ours, theirs in names.items()}


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows is found to be infinite
        return values.astype(np.float32)


def _arrays(entries: Entries, names: list[str]) -> dict[str, NDArray[Any]]:
    found = {}
    for name in names:
        values = entries[name].values
        if values is not None:
            found[name] = values
    return found


def _normalisation(architecture: Architecture, origin: Origin) -> Normalisation:
    channels = architecture.input_channels
    if origin.mean is None or origin.deviation is None:
        if channels != 3:
            raise ConfigError(
                f"--mean: must be given with --std for images of {channels} channels; ImageNet's"
                " are for 3."
            )
        return Normalisation(IMAGENET_MEAN, IMAGENET_DEVIATION)
    for option, given in (("mean", origin.mean), ("std", origin.deviation)):
        if len(given) != channels:
            raise ConfigError(
                f"--{option}: must be {channels} numbers, one per input channel, but got"
                f" {len(given)}."
            )
    try:
        return Normalisation(origin.mean, origin.deviation)
    except ValueError as error:
        raise ConfigError(f"--std: {error}.") from None


def _class_names(architecture: Architecture, path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes: {path} cannot be read: {error}.") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != architecture.classes or len(set(names)) != len(names):
        raise ConfigError(
            f"--classes: {path} must hold {architecture.classes} different names, one a line, but"
            f" holds {len(names)}, {len(set(names))} of them different."
        )
    return names


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
        metadata={"format": "pt", _NOTE: json.dumps(to_plain(_note_of(checkpoint)))},
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


def _note_of(checkpoint: Checkpoint) -> _Note:
    return _Note(
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
