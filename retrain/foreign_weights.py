"""Weights of timm, torchvision and MindCV read as checkpoints.

Every array of the source finds its place or is named: one that is missing, unknown, misshapen or
of another type ends the reading with a list; what is no weight (counters, the state of an
optimizer) is reported with the reason why it was left. Padding and batch norm are those of the
framework that trained the weights, and stay with them. The names are in retrain/frameworks.py.
"""

from __future__ import annotations

import dataclasses
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
)
from retrain.data import Normalisation
from retrain.frameworks import (
    FRAMEWORKS,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Framework,
    known_network,
    model_name,
    name_map,
)
from retrain.weight_files import Entries, WeightFile, read_weight_file
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

#: The key of the metadata of safetensors under which a Note lies.
NOTE = "mnas"


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
            require_name("from", self.framework, list(FRAMEWORKS))
        if self.padding is not None:
            require_name("padding", self.padding, ["same", "symmetric"])
        if self.batch_norm_epsilon is not None and not 1e-12 <= self.batch_norm_epsilon <= 1:
            raise ConfigError(
                "--batch_norm_epsilon: must be in [1e-12, 1], but got"
                f" {self.batch_norm_epsilon!r}."
            )
        if self.model is not None and self.arch is not None:
            raise ConfigError("--model: cannot stand beside --arch; give one of them.")
        if self.width is not None and self.arch is None:
            raise ConfigError("--width: is the multiplier of --arch; give --arch too.")
        if (self.mean is None) != (self.deviation is None):
            raise ConfigError("--mean: must stand beside --std; give both or neither.")


@record
class Note:
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


@dataclasses.dataclass
class Reading:
    """What is learned of the source on the way to a checkpoint.

    Attributes:
        sha256: Of the file, hexadecimal.
        framework: Whose weights they are.
        model: That framework's name of the network, if it has one.
        recognised: Whether the network was told from the arrays.
        ignored: What was left, and why.
        notes: What else was done, a sentence each.
    """

    sha256: str
    framework: str = OURS
    model: str | None = None
    recognised: bool = False
    ignored: list[Ignored] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


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
        return read_foreign(path, file, Origin(), Reading(file.sha256))


def require_name(option: str, given: str, known: list[str]) -> None:
    """Raise ConfigError unless what an option was given is known."""
    if given not in known:
        hint = did_you_mean(given, known) or f"; known are {', '.join(known)}."
        raise ConfigError(f"--{option}: unknown name {given!r}{hint}")


# ---------------------------------------------------------------------------- the file


def read_foreign(source: Path, file: WeightFile, origin: Origin, reading: Reading) -> Checkpoint:
    """Return another framework's weights as a checkpoint; `reading` is told how that was done.

    Raises:
        ConfigError: The network is not recognised, or the arrays are not exactly those of the
            network.
    """
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
    source: Path, file: WeightFile, origin: Origin, reading: Reading
) -> tuple[Origin, tuple[str, ...]]:
    """What this project once wrote into the file, where the user says nothing else.

    Returns:
        The origin with it, and the classes' names.
    """
    if NOTE not in file.metadata or origin.arch is not None or origin.model is not None:
        return origin, ()
    note = build(Note, parse_yaml(file.metadata[NOTE], where=str(source)), where=str(source))
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


def _chosen_set(source: Path, file: WeightFile, key: str | None, reading: Reading) -> Entries:
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


def _without_prefixes(source: Path, entries: Entries, reading: Reading) -> Entries:
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


def _without_ignored(framework: Framework, entries: Entries, reading: Reading) -> Entries:
    kept = dict(entries)
    for pattern, reason in framework.ignored:
        names = tuple(name for name in kept if pattern.fullmatch(name))
        if names:
            reading.ignored.append(Ignored(names, reason))
            kept = {name: entry for name, entry in kept.items() if name not in names}
    return kept


# ---------------------------------------------------------------------------- the network


def _network_of(
    source: Path, framework: Framework, entries: Entries, origin: Origin, reading: Reading
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
        require_name("model", reading.model, list(framework.models))
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
    reading: Reading,
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
