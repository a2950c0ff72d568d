"""What `mnas search` and `mnas check` say of a campaign before it begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from campaigns import mnas_here, write_synthetic

from search.config import load_campaign_config
from search.launch_text import launch_lines


def launch(name: str, *overrides: str) -> dict[str, str]:
    return dict(launch_lines(load_campaign_config(name, overrides)))


def test_a_device_that_shares_cores_waits_for_idle_workers() -> None:
    lines = launch("digits")
    assert lines["workers"] == "2 Ray workers x 1 thread"
    assert lines["device"] == "host_quick: ONNX Runtime, 1 thread, effort quick, float32"
    assert lines["waiting"] == (
        "measuring waits for idle workers, because they share cores; a worker that is done waits"
        " for the rest of its batch"
    )
    assert lines["trials"] == "24, sync, in batches of 4; ends sooner at 5 batches of repeats"


def test_an_asynchronous_campaign_on_a_cluster_with_npus() -> None:
    lines = launch("mnasnet_a1", "stop.hours=2.5", "stop.trained=1000")
    assert lines["workers"] == "Ray workers x 8 threads and 1 NPU, as many as there is room for"
    assert lines["device"] == "android_onnxruntime: adb, 1 thread, float32"
    assert lines["waiting"] == (
        "a network is measured before a worker gets it, while others train; a worker that is done"
        " gets the next network at once"
    )
    assert lines["trials"] == (
        "8,000, async, in batches of 16; ends sooner at 1,000 networks trained, 2.5 hours,"
        " 5 batches of repeats"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("device=board_pool", "board_pool: shared among board_1, board_2"),
        (
            "device={name: far, kind: ssh, host: board, threads: 2, drift: {}}",
            "far: ONNX Runtime on board, 2 threads, effort full, float32, with a drift guard",
        ),
        (
            "device={name: npu, kind: ascend, precision: float16}",
            "npu: MindSpore on Ascend 0, effort full, float16",
        ),
        ("device={class: 'plugin_parts:FaultyDevice'}", "plugin_parts:FaultyDevice"),
    ],
)
def test_each_kind_of_device_says_how_it_is_measured(override: str, says: str) -> None:
    assert launch("digits", override)["device"] == says


def test_a_device_at_a_node_is_said_to_be_there() -> None:
    lines = launch("digits", "executor.address=auto", "executor.devices=[host_quick]")
    assert lines["device"].endswith(", at its node of Ray's cluster")


def test_search_prints_the_plan_before_its_first_trial(tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=8)
    done = mnas_here("search", str(config), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    launched, _, _ = done.stdout.partition("trial 0")
    assert "workers    1, this process\n" in launched
    assert "device     none: the evaluator gives the latency\n" in launched
    assert "waiting    one network is evaluated after another\n" in launched
    assert "trials     8, sync, in batches of 8; ends sooner at 5 batches of repeats\n" in launched


def test_the_stop_rules_that_are_told_are_fields_of_the_configuration() -> None:
    from search.launch_text import _ENDS

    stop = load_campaign_config("digits").stop
    told = {field.name for field in dataclasses.fields(stop)} - {"trials", "failed_in_a_row"}
    assert set(_ENDS) == told
