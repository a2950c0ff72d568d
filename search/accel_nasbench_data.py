"""Accel-NASBench's networks as numbers: upstream's archive, its files, or one table.

Upstream (github.com/afzalxo/Accel-NASBench) publishes one `result_N.json` for each network:

    {"architecture": {"block0_e": 6, "block0_k": 3, "block0_l": 1, "block0_se": false, ...},
     "metrics": {"val_top1": 59.4, ...},
     "platform_perf": {"throughput_a100": {"throughput_mean": 7034.9, ...},
                       "latency_zcu102": {"latency_mean": 5.02, ...}, ...}}

Accuracies are percent, throughputs images per second, latencies ms. A table holds the same in
columns `b0_e`, ..., `b6_se`, `top1`, `throughput_a100`, `latency_zcu102`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.errors import ConfigError

#: The table that a folder may hold in place of upstream's files.
TABLE = "anb_dev.csv.gz"
_RESULTS = "result_*.json"
_BLOCKS = 7

#: Device -> what was recorded of it. A throughput's latency is its reciprocal: ms per image.
RECORDED = {
    "a100": "throughput",
    "3090": "throughput",
    "tpuv2": "throughput",
    "tpuv3": "throughput",
    "zcu102": "latency",
    "vck190": "latency",
}


def _levels(block: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A block's decisions and their choices, in the order of the space `accel_nasbench`."""
    layers = (1, 2, 3, 4) if block == 5 else (1, 2, 3)
    return ("e", (1, 4, 6)), ("k", (3, 5)), ("se", (0, 1)), ("l", layers)


@dataclass(frozen=True, slots=True)
class Networks:
    """What is known of the networks; those that were trained more than once are averaged.

    Attributes:
        tokens: int64, (n, 28): in the space `accel_nasbench`, no row twice, in order.
        accuracy: float64, (n,): fractions; nan where one is missing.
        latency_ms: Device -> float64, (n,): ms per image; nan where one is missing.
    """

    tokens: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    latency_ms: dict[str, NDArray[np.float64]]


def data_files(path: Path) -> list[Path]:
    """Return the files that hold the networks: an archive or a table, or upstream's files.

    Raises:
        ConfigError: There are none.
    """
    if path.is_file():
        return [path]
    if (path / TABLE).is_file():
        return [path / TABLE]
    files = sorted(path.rglob(_RESULTS))
    if not files:
        raise ConfigError(
            f"evaluator.data: must be anb_dataset_jsons.tar.gz, or a folder of its {_RESULTS} or"
            f" with {TABLE}, but got {str(path)!r}; docs/accel-nasbench.md says where to get it."
        )
    return files


def sha256(files: Sequence[Path], folder: Path) -> str:
    """Return a file's SHA-256, or that of the lines which `sha256sum FILES` prints in `folder`."""
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if len(files) == 1:
        return sums[0]
    names = [file.relative_to(folder).as_posix() for file in files]
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_networks(path: Path, devices: Sequence[str]) -> Networks:
    """Read the networks with their accuracy and their latency on the devices.

    Raises:
        ConfigError: The data cannot be read, or know nothing of a device.
    """
    rows: list[tuple[int, ...]] = []
    figures: list[list[float]] = []
    devices = tuple(dict.fromkeys(devices))
    for where, row in _rows(data_files(path)):
        try:
            rows.append(_tokens(row))
            figures.append([_number(row, "top1") / 100, *(_latency(row, d) for d in devices)])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: is no network of Accel-NASBench: {error}.") from error
    if not rows:
        raise ConfigError(f"{path}: must hold {_RESULTS} or rows of a table, but holds none.")
    tokens, index, counts = np.unique(
        np.array(rows, np.int64), axis=0, return_inverse=True, return_counts=True
    )
    columns = [
        np.bincount(index.ravel(), weights=column) / counts for column in np.array(figures).T
    ]
    for device, column in zip(devices, columns[1:], strict=True):
        if not np.isfinite(column).any():
            raise ConfigError(f"{path}: must know device {device}, but has no figure of it.")
    return Networks(tokens, columns[0], dict(zip(devices, columns[1:], strict=True)))


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a network stands, and its values by the table's names."""
    where = str(files[0])
    try:
        if files[0].name.endswith((".csv", ".csv.gz")):
            opener = gzip.open if files[0].suffix == ".gz" else open
            with opener(files[0], "rt", newline="") as file:
                for number, row in enumerate(csv.DictReader(file), start=2):
                    yield f"{where}: line {number}", row
        elif files[0].suffix == ".json":
            for path in files:
                where = str(path)
                yield where, _flat(json.loads(path.read_bytes()))
        else:
            with tarfile.open(files[0], "r:gz") as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    if content is not None and PurePath(member.name).match(_RESULTS):
                        where = f"{files[0]}: {member.name}"
                        yield where, _flat(json.load(content))
    except (OSError, EOFError, tarfile.TarError, zlib.error, csv.Error, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}; download it again.") from error


def _flat(result: Any) -> dict[str, Any]:
    """Upstream's values of a network by the table's names."""
    if not isinstance(result, dict) or not {"architecture", "metrics"} <= set(result):
        raise ValueError("it has no architecture and metrics")
    row = {key.replace("block", "b", 1): value for key, value in result["architecture"].items()}
    row["top1"] = result["metrics"].get("val_top1")
    for name, figures in (result.get("platform_perf") or {}).items():
        row[name] = (figures or {}).get(f"{name.partition('_')[0]}_mean")
    return row


def _tokens(row: Mapping[str, Any]) -> tuple[int, ...]:
    tokens = []
    for block in range(_BLOCKS):
        for field, levels in _levels(block):
            name = f"b{block}_{field}"
            text = str(row[name])
            value = {"True": 1, "False": 0}.get(text)
            value = int(text) if value is None else value
            if value not in levels:
                raise ValueError(f"{name} must be one of {list(levels)}, but got {value}")
            tokens.append(levels.index(value))
    return tuple(tokens)


def _number(row: Mapping[str, Any], name: str) -> float:
    """A figure, or nan where it is missing."""
    value = row.get(name)
    return math.nan if value in (None, "") else float(value)


def _latency(row: Mapping[str, Any], device: str) -> float:
    recorded = RECORDED[device]
    value = _number(row, f"{recorded}_{device}")
    if value <= 0:
        raise ValueError(f"{recorded}_{device} must be > 0, but got {value}")
    return 1000 / value if recorded == "throughput" else value
