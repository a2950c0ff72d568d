"""The command line: bad input gets one sentence and status 2; JSON has the documented keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from campaigns import mnas, mnas_here, write_synthetic

from space.cost import count
from space.mnasnet import published


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished campaign."""
    folder = tmp_path_factory.mktemp("cli")
    config = write_synthetic(folder, trials=16)
    done = mnas("search", str(config), "--out", str(folder / "run"), "--json")
    assert done.returncode == 0, done.stderr
    outcome = one_object(done.stdout)
    assert set(outcome) == {
        "folder", "stop_reason", "trials", "completed", "target_ms", "best", "winner", "report",
    }  # fmt: skip
    return folder / "run"


def one_object(stdout: str) -> dict[str, Any]:
    lines = stdout.strip().splitlines()
    assert len(lines) == 1, stdout
    value: dict[str, Any] = json.loads(lines[0])
    return value


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("mnas: ")
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("name: ppo", "name: pppo", ["controller", "'pppo'", "did you mean 'ppo'"]),
        ("batch_size:", "batch_sise:", ["unknown key 'batch_sise'", "did you mean 'batch_size'"]),
        ("seed: 0", "seed: 0\nseed: 1", ["line", "duplicate key 'seed'"]),
        ("target_ms: 3.0", 'target_ms: "1e-4"', ["target_ms must be a number", "'1e-4'"]),
        ("target_ms: 3.0", "target_ms: true", ["objective.target_ms must be a number", "True"]),
        ("target_ms: 3.0", "target_ms: 0", ["objective.target_ms must be > 0", "0.0"]),
        ("target_ms: 3.0", "target_ms: -5", ["objective.target_ms must be > 0", "-5.0"]),
        ("target_ms: 3.0", "target_ms: .nan", ["line", "finite"]),
        ("trials: 64", "trials: 0", ["stop.trials must be > 0"]),
        ("trials: 64", "trials: 1.5", ["stop.trials must be an integer"]),
        ("name: small_image", "name: smal_image", ["did you mean 'small_image'"]),
        ("name: serial", "name: serial, workers: 2", ["unknown key 'executor.workers'"]),
        ("name: synthetic, ", "name: train, ", ["evaluator.recipe is missing"]),
        ("space:", "space: 3 #", ["space must be a mapping, but got 3"]),
        ("name: synthetic\n", "name: ../up\n", ["name must be usable as a folder's name"]),
        ("{name: synthetic,", "{class: nowhere:Thing, x: 1,", ["beside class"]),
        ("name: ppo", "class: nowhere.at_all:Thing", ["cannot import 'nowhere.at_all'"]),
        ("name: ppo", "class: plugin_parts:NotAControler", ["did you mean 'NotAController'"]),
        ("name: ppo", "class: plugin_parts:NotAController", ["must be a subclass of"]),
    ],
)  # fmt: skip
def test_a_wrong_configuration_gets_one_sentence(
    tmp_path: Path, old: str, new: str, parts: list[str]
) -> None:
    config = write_synthetic(tmp_path)
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))
    done = mnas_here("search", str(config), "--out", str(tmp_path / "run"))
    assert_one_sentence(done, *parts)
    assert not (tmp_path / "run" / "campaign.db").exists()


def test_missing_empty_and_binary_configurations_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    assert_one_sentence(mnas_here("search", str(tmp_path / "none.yaml")), "no such file")
    assert_one_sentence(mnas_here("search", str(tmp_path / "empty.yaml")), "is empty")
    assert_one_sentence(mnas_here("search", str(tmp_path / "binary.yaml")), "binary")
    assert_one_sentence(mnas_here("search", "digitz"), "did you mean 'digits'")


def test_wrong_flags_and_commands_get_one_sentence(tmp_path: Path) -> None:
    assert_one_sentence(mnas_here("serch"), "serch")
    assert_one_sentence(mnas_here("search"), "CONFIG")
    assert_one_sentence(mnas_here("top", str(tmp_path), "--count", "none"), "'--count'")
    assert_one_sentence(mnas_here("status", str(tmp_path / "nowhere")), "no such folder")
    assert_one_sentence(mnas_here("status", str(tmp_path)), "holds no campaign")
    assert_one_sentence(mnas_here("resume", str(tmp_path)), "holds no campaign")
    assert_one_sentence(mnas_here("space", "show", "mnasnet-a2"), "did you mean 'mnasnet-a1'")
    assert_one_sentence(mnas_here("space", "show", "stem8 | r1 | head1 | r8 | c2"), "k<number>")
    assert_one_sentence(mnas_here("check-plugin", "divice", "a:B"), "did you mean 'device'")


def test_search_resume_demands_the_saved_configuration(campaign: Path, tmp_path: Path) -> None:
    config = write_synthetic(tmp_path, trials=16, seed=9)
    done = mnas("search", str(config), "--resume", "--out", str(campaign))
    assert_one_sentence(done, "seed is 0, given 9")
    same = write_synthetic(tmp_path, trials=16)
    done = mnas("search", str(same), "--resume", "--out", str(campaign))
    assert done.returncode == 0, done.stderr


def test_an_existing_campaign_is_not_overwritten_and_the_default_folder_is_a_new_one(
    tmp_path: Path,
) -> None:
    config = write_synthetic(tmp_path, trials=8)
    for folder in ("synthetic", "synthetic-2"):
        done = mnas("search", str(config), "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert one_object(done.stdout)["folder"] == f"runs/{folder}"
    done = mnas_here("search", str(config), "--out", "runs/synthetic", cwd=tmp_path)
    assert_one_sentence(done, "holds a campaign already", "mnas resume runs/synthetic")


def test_status_top_and_report_speak_json(campaign: Path) -> None:
    status = one_object(mnas_here("status", str(campaign), "--json").stdout)
    assert status["state"] == "finished"
    assert status["trials"] == status["trials_total"] == 16
    assert status["trials_pending"] == 0
    assert status["target_ms"] == 3.0
    top = one_object(mnas_here("top", str(campaign), "-n", "3", "--json").stdout)
    assert len(top["trials"]) == 3
    best = top["trials"][0]
    assert best == status["best"]
    assert {"trial", "reward", "accuracy", "latency_ms", "parameters", "macs"} <= set(best)
    rewards = [trial["reward"] for trial in top["trials"]]
    assert rewards == sorted(rewards, reverse=True)
    front = one_object(mnas_here("top", str(campaign), "--front", "--json").stdout)["trials"]
    latencies = [trial["latency_ms"] for trial in front]
    assert latencies == sorted(latencies)
    report = one_object(mnas_here("report", str(campaign), "--json").stdout)
    assert Path(report["report"]).read_text().startswith("<!DOCTYPE html>")


def test_tables_for_people_print_counts_in_full(campaign: Path) -> None:
    done = mnas_here("top", str(campaign), "-n", "1")
    best = one_object(mnas_here("top", str(campaign), "-n", "1", "--json").stdout)["trials"][0]
    assert f"{best['macs']:,}" in done.stdout
    assert f"{best['parameters']:,}" in done.stdout
    shown = mnas_here("space", "show", "mnasnet-a1", "--width", "0.75").stdout
    assert "2,912,278" in shown
    assert "223,448,480" in shown


def test_space_commands_speak_json(campaign: Path) -> None:
    shown = one_object(mnas_here("space", "show", "mnasnet-a1", "--json").stdout)
    cost = count(published("mnasnet-a1"))
    assert shown["parameters"] == cost.parameters == 3_887_038
    assert shown["macs"] == sum(stage["macs"] for stage in shown["stages"])
    trial = one_object(mnas_here("space", "show", f"{campaign}:0", "--json").stdout)
    assert trial["architecture"].startswith("stem8_s11")
    first = mnas_here("space", "sample", "mnasnet", "-n", "2", "--seed", "1", "--json").stdout
    assert (
        first == mnas_here("space", "sample", "mnasnet", "-n", "2", "--seed", "1", "--json").stdout
    )
    assert len(one_object(first)["samples"]) == 2
    member = mnas_here("space", "check", "mnasnet_derivation", "mnasnet-a1", "--json")
    assert one_object(member.stdout)["member"] is True
    stranger = mnas_here("space", "check", "mnasnet", "mnasnet-a1", "--json")
    assert stranger.returncode == 1
    assert "block 4" in one_object(stranger.stdout)["why_not"]


def test_latency_measure_speaks_json_with_units() -> None:
    done = mnas("latency", "measure", "mnasnet-small", "--resolution", "64", "--json")
    assert done.returncode == 0, done.stderr
    figures = one_object(done.stdout)
    assert figures["median_ms"] > 0
    assert figures["iqr_ms"] >= 0
    assert figures["verdict"] in ("ok", "noisy")
    assert figures["architecture"].endswith("| r64 | c1000")


def test_help_loads_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['mnas', '--help']\n"
        "from search.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'mindspore', 'ray', 'onnx', 'onnxruntime', 'numba', 'sklearn', 'plotly'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "search" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("room", ["space", "controller", "latency", "search"])
def test_importing_a_room_loads_neither_mindspore_nor_ray(room: str) -> None:
    code = f"import sys, {room}; sys.exit('mindspore' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_plugin_that_breaks_the_contract_is_told_what() -> None:
    good = mnas(
        "check-plugin", "evaluator", "plugin_parts:FaultyEvaluator", "--space", "small_image",
        "--json",
    )  # fmt: skip
    assert good.returncode == 0, good.stdout + good.stderr
    assert all(check["passed"] for check in one_object(good.stdout)["checks"])
    bad = mnas("check-plugin", "controller", "plugin_parts:ForgetfulController")
    assert bad.returncode == 1
    assert "FAILED" in bad.stdout
