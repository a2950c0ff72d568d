"""Weight files of other tools as named arrays: safetensors, PyTorch's pickles, MindSpore's .ckpt.

The content tells the format, not the name. A pickle is read with PyTorch's `weights_only`: nothing
in it is run. torch is imported here alone, and only for its own files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from space.errors import ConfigError
from space.files import write_atomically
from space.records import record

Kind = Literal["safetensors", "PyTorch", "MindSpore"]

#: How each kind of file may be called when it is written.
ENDINGS: dict[str, Kind] = {
    ".safetensors": "safetensors",
    ".pth": "PyTorch",
    ".pt": "PyTorch",
    ".bin": "PyTorch",
    ".ckpt": "MindSpore",
}

#: Types of safetensors as numpy calls them, all little-endian; bfloat16 is made of its bits.
_SAFETENSORS_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

#: MindCV keeps the moving averages of the weights beside them, under names that begin so.
_AVERAGED = "ema."


class Entry(NamedTuple):
    """One named entry of a file.

    Attributes:
        dtype: Its type there: `float32`, `bfloat16`, `int64`, ..., or what it is in place of an
            array.
        values: The array in that type (bfloat16 as float32); None if it is no array of numbers.
    """

    dtype: str
    values: NDArray[Any] | None


Entries = dict[str, Entry]


@record
class WeightFile:
    """What a file holds.

    Attributes:
        kind: Its format.
        sha256: Of the whole file, hexadecimal.
        sets: Key -> the weights that lie under it; the key is empty where they lie bare.
        aside: Keys of what else lies beside them, such as an optimizer's state.
        metadata: Texts that lie beside the weights, of safetensors and of MindSpore's files.
    """

    kind: Kind
    sha256: str
    sets: dict[str, Any]
    aside: tuple[str, ...]
    metadata: dict[str, str]


def read_weight_file(path: Path) -> WeightFile:
    """Return what a weight file holds.

    Raises:
        ConfigError: The file is missing, damaged or of another format, holds no weights, or needs
            a package that is not installed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such weight file.")
    raw = path.read_bytes()
    kind = _kind(raw)
    if kind is None:
        raise ConfigError(
            f"{path}: must be a file of safetensors, PyTorch or MindSpore, but is something else"
            " or damaged."
        )
    metadata: dict[str, str] = {}
    if kind == "safetensors":
        metadata, loaded = _read_safetensors(path, raw)
    elif kind == "MindSpore":
        metadata, loaded = _read_mindspore(path)
    else:
        loaded = _read_torch(path, raw)
    sets, aside = _sets(loaded)
    if not sets:
        raise ConfigError(
            f"{path}: must hold named weights, but holds"
            f" {', '.join(map(repr, aside[:5])) or 'none'}."
        )
    return WeightFile(kind, hashlib.sha256(raw).hexdigest(), sets, tuple(aside), metadata)


def _kind(raw: bytes) -> Kind | None:
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= len(raw) - 8:
        return "safetensors"
    if raw[:4] == b"PK\x03\x04" or raw[:2] == b"\x80\x02":  # a zip archive, or an old pickle
        return "PyTorch"
    if raw[:1] == b"\n":  # the first field of a protocol buffer
        return "MindSpore"
    return None


def _sets(loaded: Any) -> tuple[dict[str, Entries], list[str]]:
    """The sets of weights in what a file held, and the keys of what is none."""
    if not isinstance(loaded, Mapping):
        return {}, [type(loaded).__name__]
    sets = {str(key): dict(value) for key, value in loaded.items() if _is_set(value)}
    if sets or not _is_set(loaded):
        return sets, [str(key) for key in loaded if str(key) not in sets]
    averaged = {name: entry for name, entry in loaded.items() if name.startswith(_AVERAGED)}
    if not averaged:
        return {"": dict(loaded)}, []
    found = {
        "network": {name: entry for name, entry in loaded.items() if name not in averaged},
        "ema": {name.removeprefix(_AVERAGED): entry for name, entry in averaged.items()},
    }
    return {key: entries for key, entries in found.items() if entries}, []


def _is_set(value: Any) -> bool:
    """Whether a value is a set of weights: by far most of its entries are named arrays."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    arrays = sum(isinstance(entry, Entry) and entry.values is not None for entry in value.values())
    return arrays > len(value) / 2


# ---------------------------------------------------------------------------- reading


def _read_safetensors(path: Path, raw: bytes) -> tuple[dict[str, str], Entries]:
    try:
        found = deserialize(raw)  # type: ignore[no-untyped-call]  # its stub has no types
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path}: is a damaged safetensors file: {error}.") from None
    entries = {}
    for name, tensor in found:
        dtype = _SAFETENSORS_TYPES.get(tensor["dtype"], tensor["dtype"])
        entries[name] = Entry(dtype, _array(dtype, tensor["data"], tensor["shape"]))
    return dict(header.get("__metadata__", {})), entries


def _array(dtype: str, data: bytes, shape: list[int]) -> NDArray[Any] | None:
    if dtype == "bfloat16":
        # The upper half of a float32's bits.
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if dtype not in _SAFETENSORS_TYPES.values():
        return None
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


def _read_torch(path: Path, raw: bytes) -> Any:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path}: is a PyTorch file, which takes torch to read; call `pip install torch`, or"
            " save the weights as .safetensors."
        ) from None
    try:
        # timm's and torchvision's training files hold their arguments as such a bare record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path}: must hold nothing but weights, but holds more, which is not run ({what});"
            " save model.state_dict() alone."
        ) from None
    except Exception as error:  # a damaged file makes it raise whatever comes
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: is a damaged PyTorch file: {what}.") from None
    return _torch_entries(loaded)


def _torch_entries(loaded: Any) -> Any:
    """The same mappings with an Entry in the place of whatever is none, down to the second."""
    if not isinstance(loaded, Mapping):
        return loaded
    return {
        key: {k: _torch_entry(v) for k, v in value.items()}
        if isinstance(value, Mapping)
        else _torch_entry(value)
        for key, value in loaded.items()
    }


def _torch_entry(value: Any) -> Entry:
    import torch

    if not isinstance(value, torch.Tensor):
        return Entry(type(value).__name__, None)
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.is_quantized:
        return Entry(f"{dtype}, not dense", None)
    value = value.detach()
    try:
        values = value.float().numpy() if dtype == "bfloat16" else value.numpy()
    except TypeError:  # a type that numpy does not have
        return Entry(dtype, None)
    return Entry(dtype, np.array(values))


def read_mindspore(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return the texts and the arrays of a MindSpore .ckpt file, by name.

    Raises:
        ConfigError: The file is damaged or something else.
    """
    loaded = _load_mindspore(path)
    texts = {name: str(value) for name, value in loaded.items() if isinstance(value, str)}
    return texts, {n: np.array(v.asnumpy()) for n, v in loaded.items() if n not in texts}


def _load_mindspore(path: Path) -> dict[str, Any]:
    import mindspore as ms

    if path.suffix != ".ckpt":
        raise ConfigError(f"{path}: must end in .ckpt to be read by MindSpore; rename it.")
    try:
        return dict(ms.load_checkpoint(str(path)))
    except (ValueError, TypeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: is a damaged MindSpore file: {what}") from None


def _read_mindspore(path: Path) -> tuple[dict[str, str], Entries]:
    import mindspore as ms

    metadata, entries = {}, {}
    for name, parameter in _load_mindspore(path).items():
        if isinstance(parameter, str):
            metadata[name] = parameter
        if not isinstance(parameter, ms.Tensor):
            entries[name] = Entry(type(parameter).__name__, None)
            continue
        dtype = str(parameter.dtype).lower()
        wide = parameter.astype(ms.float32) if dtype == "bfloat16" else parameter
        entries[name] = Entry(dtype, np.array(wide.asnumpy()))
    return metadata, entries


# ---------------------------------------------------------------------------- writing


def write_weight_file(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str],
    module_version: int,
) -> int:
    """Write named arrays in the format of the path's ending, whole or not at all; return its size.

    Args:
        path: Where; what is there is replaced.
        arrays: Name -> float32 or int64.
        metadata: Text that safetensors files carry.
        module_version: Of the module that PyTorch's `load_state_dict` is to find.

    Raises:
        ConfigError: The ending is unknown, the folder cannot be written to, or a package is
            missing.
    """
    kind = kind_to_write(path)
    contiguous = {name: np.array(value, order="C") for name, value in arrays.items()}
    if kind == "safetensors":
        content = save(contiguous, dict(metadata))
    elif kind == "PyTorch":
        content = _torch_bytes(path, contiguous, module_version)
    else:
        content = mindspore_bytes(contiguous, {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}.") from None
    return len(content)


def kind_to_write(path: Path) -> Kind:
    """Return the format that a file's ending asks for.

    Raises:
        ConfigError: The ending is unknown.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(
            f"{path}: must end in {', '.join(ENDINGS)}, which says the format, but ends in"
            f" {path.suffix!r}."
        )
    return ENDINGS[path.suffix]


def _torch_bytes(path: Path, arrays: Mapping[str, NDArray[Any]], version: int) -> bytes:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path}: is to be a PyTorch file, which takes torch to write; call `pip install"
            " torch`, or choose a name that ends in .safetensors."
        ) from None
    state: Any = OrderedDict((n, torch.from_numpy(value)) for n, value in arrays.items())
    # As nn.Module.state_dict() leaves it: torchvision's MNASNet refuses a file without a version.
    state._metadata = OrderedDict({"": {"version": version}})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def mindspore_bytes(arrays: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> bytes:
    """Return a MindSpore .ckpt file of named arrays and named texts."""
    import mindspore as ms

    entries = [{"name": name, "data": ms.Tensor(value)} for name, value in arrays.items()]
    # MindSpore writes to a path only, and makes the file read-only.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.ckpt"
        ms.save_checkpoint(entries, str(path), append_dict=dict(texts))
        return path.read_bytes()
