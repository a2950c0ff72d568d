"""Device configurations: the shipped ones load, wrong ones get a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latency.device import CommandConfig, DeviceConfig, SshConfig, in_full, load_device, make_meter
from search.config import campaign_config, config_to_plain, load_campaign_config
from space.errors import ConfigError
from space.records import build, shipped_names, to_plain

GOOD = {"name": "here", "kind": "onnxruntime"}


@pytest.mark.parametrize("name", shipped_names("device"))
def test_every_shipped_device_loads_and_is_called_like_its_file(name: str) -> None:
    config = load_device(name)
    assert config.name == name
    assert build(DeviceConfig, to_plain(config), where="again") == config


def test_the_paper_s_conditions_are_the_defaults() -> None:
    config = build(DeviceConfig, GOOD, where="test")
    assert (config.threads, config.batch, config.precision) == (1, 1, "float32")
    assert config.provider == "CPUExecutionProvider"
    assert config.shares_cores


@pytest.mark.parametrize(
    "values",
    [
        {**GOOD, "effort": "quick"},
        {**GOOD, "kind": "ssh", "host": "a", "python": "python3", "effort": "quick"},
        {**GOOD, "kind": "ascend", "effort": "quick"},
        {
            "name": "two",
            "kind": "pool",
            "devices": [
                {"name": name, "kind": "ssh", "host": name, "effort": "quick"} for name in "ab"
            ],
        },
    ],
)
def test_what_is_handed_over_is_never_measured_quickly(values: dict[str, object]) -> None:
    config = build(DeviceConfig, values, where="test")
    assert '"quick"' in json.dumps(to_plain(config))
    full = in_full(config)
    assert '"quick"' not in json.dumps(to_plain(full))
    assert in_full(full) == full


def test_a_device_loads_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nkind: onnxruntime\nthreads: 2\ncores: [3, 1]\n")
    config = load_device(str(path))
    assert config.cores == (3, 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "onnxruntim"}, "has the unknown kind 'onnxruntim'; did you mean 'onnxruntime'?"),
        ({"name": " "}, "name must be printable text, but got ' '"),
        ({"name": "a\nb"}, "name must be printable text"),
        ({"provider": ""}, "provider must be an execution provider"),
        ({"threads": 0}, "threads must be in [1, 1024], but got 0"),
        ({"threads": True}, "threads must be an integer, but got True"),
        ({"threads": "1"}, "threads must be an integer, but got '1'"),
        ({"threads": 1.5}, "threads must be an integer, but got 1.5"),
        ({"batch": -1}, "batch must be in [1, 4096], but got -1"),
        ({"attempts": 0}, "attempts must be in [1, 20], but got 0"),
        ({"cores": []}, "cores must list one core per thread (1), but got []"),
        ({"cores": [0, 1]}, "cores must list one core per thread (1), but got [0, 1]"),
        ({"cores": [-1]}, "cores must be different numbers >= 0, but got [-1]"),
        ({"cores": [1, 1], "threads": 2}, "cores must be different numbers >= 0"),
        ({"precision": "int4"}, "precision must be one of float32, int8, but got 'int4'"),
        ({"calibration": "a.npy"}, "calibration must be given with precision int8 only, but got"),
        ({"drift": {"every": 0}}, "drift.every must be in [1, 100000], but got 0"),
        ({"drift": {"bound": 1.0}}, "drift.bound must be in (0, 1), but got 1.0"),
        ({"drift": {"pause_s": -1}}, "drift.pause_s must be in [0, 86400], but got -1"),
        ({"drift": {"reference": "mnasnet-smal"}}, "did you mean 'mnasnet-small'?"),
        ({"effort": "ful"}, "effort must be one of quick, full, but got 'ful'; did you mean"),
        ({"shares_cores": "yes"}, "shares_cores must be true or false, but got 'yes'"),
        ({"time_limit_s": 0}, "time_limit_s must be > 0, but got 0"),
        ({"lock_timeout_s": -1}, "lock_timeout_s must be >= 0, but got -1"),
        ({"thread": 1}, "unknown key 'thread'; did you mean 'threads'?"),
    ],
)
def test_a_wrong_value_gets_a_sentence_with_the_rule(
    changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(DeviceConfig, {**GOOD, **changes}, where="device.yaml")
    assert str(caught.value).startswith("device.yaml: ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("key", ["name", "kind"])
def test_a_missing_key_is_named(key: str) -> None:
    values = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(
        ConfigError, match=f"device.yaml: ({key} is missing|must have the key .{key}.)"
    ):
        build(DeviceConfig, values, where="device.yaml")


def test_a_campaign_takes_every_kind_and_names_a_misspelt_key() -> None:
    chosen = load_campaign_config("digits", ["device={name: b, kind: ssh, host: board}"])
    assert isinstance(chosen.device, SshConfig)
    shipped = load_campaign_config("digits", ["device=android_tflite"])
    assert isinstance(shipped.device, CommandConfig)
    again = campaign_config(config_to_plain(shipped), where="again", folder=Path())
    assert again.device == shipped.device
    with pytest.raises(ConfigError, match=r"unknown key 'device.hots'; did you mean 'host'"):
        load_campaign_config("digits", ["device={name: b, kind: ssh, host: b, hots: c}"])


def test_a_misspelt_device_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'host'"):
        load_device("hots")


def test_an_unknown_provider_is_refused_with_those_that_exist() -> None:
    config = build(DeviceConfig, {**GOOD, "provider": "CPUExecutionProvide"}, where="test")
    with pytest.raises(ConfigError, match=r"CPUExecutionProvider.*did you mean"):
        make_meter(config)


def test_more_threads_than_cores_are_refused() -> None:
    config = build(DeviceConfig, {**GOOD, "threads": 1024}, where="test")
    with pytest.raises(ConfigError, match="threads must be at most"):
        make_meter(config)


def test_a_core_that_this_process_may_not_use_is_refused() -> None:
    config = build(DeviceConfig, {**GOOD, "cores": [100_000]}, where="test")
    with pytest.raises(ConfigError, match=r"cores must be among .* but got 100000"):
        make_meter(config)


def test_reading_a_configuration_loads_no_runtime() -> None:
    program = (
        "import sys\n"
        "from latency.device import load_device\n"
        "load_device('host')\n"
        "print(sorted({'onnxruntime', 'onnx', 'mindspore', 'ray'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
