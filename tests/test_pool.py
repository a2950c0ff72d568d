"""A pool of stand-ins: who measures what, who is retired, and what counts as identical."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latency.checks import check_device
from latency.config import DriftConfig
from latency.contract import check_meter
from latency.device import (
    DeviceConfig,
    LatencyMeter,
    PoolConfig,
    load_device,
    make_meter,
    resolve_members,
)
from latency.drift import DriftGuard
from latency.lock import device_lock
from latency.measurement import Measurement
from latency.pool import Member, PoolMeter
from latency.processes import BrokenOff, breaking_off, run_to_end
from space.architecture import (
    PAPER_STYLE,
    Architecture,
    NetworkStyle,
    graph_hash,
    parse_architecture,
)
from space.errors import ConfigError, MeasurementError
from space.records import build

NETWORKS = [
    parse_architecture(f"stem{w} | r1_k3_s11_e1_i{w}_o8 | head16 | r16 | c10 | in1")
    for w in range(8, 80, 8)
]


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class StandInBoard(LatencyMeter):
    """A board: it fails where the list `faults` says so, call by call, and works afterwards."""

    def __init__(self, name: str, faults: list[str] | None = None, **identity: Any) -> None:
        self.name = name
        self.faults = faults or []
        self.facts = {"kind": "ssh", "processor": "A53", **identity}
        self.measured: list[Architecture] = []
        self.before: Callable[[], object] = lambda: None

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "host": f"{self.name}.local", **self.facts}

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        self.before()
        self.measured.append(architecture)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "network":
            raise MeasurementError("no such operator", cause="architecture")
        if fault:
            raise MeasurementError(f"{self.name} is {fault}")
        hash_ = graph_hash(architecture, style)
        return Measurement((1.0, 1.0), 1, 0, 1, hash_, self.identity(), {}, {})


class BusyBoard(StandInBoard):
    """One whose tool takes its time."""

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        self.before()
        done = run_to_end(["sleep", "600"], timeout_s=600.0)
        raise MeasurementError(f"status {done.status}")


def pool(*boards: StandInBoard, retire_after: int = 2) -> PoolMeter:
    members = [Member(board.name, board) for board in boards]
    return PoolMeter("rack", members, retire_after=retire_after)


def outcomes(meter: LatencyMeter) -> dict[Architecture, Measurement | MeasurementError]:
    found = list(meter.measure_all(NETWORKS))
    assert len(found) == len(NETWORKS)
    return dict(found)


def test_every_network_is_measured_once_on_some_board() -> None:
    boards = [StandInBoard("a"), StandInBoard("b"), StandInBoard("c")]
    found = outcomes(pool(*boards))
    assert set(found) == set(NETWORKS)
    taken = [architecture for board in boards for architecture in board.measured]
    assert sorted(taken, key=NETWORKS.index) == NETWORKS
    for board in boards:
        for architecture in board.measured:
            assert found[architecture].environment["member"] == board.name  # type: ignore[union-attr]


def test_boards_measure_at_the_same_time() -> None:
    # Each waits until the other is measuring as well; alone it would wait for ever.
    boards = [StandInBoard("a"), StandInBoard("b")]
    barrier = threading.Barrier(2)
    for board in boards:
        board.before = lambda: barrier.wait(30)
    found = list(pool(*boards).measure_all(NETWORKS[:2]))
    assert [len(board.measured) for board in boards] == [1, 1]
    assert all(isinstance(outcome, Measurement) for _, outcome in found)


def test_a_board_that_keeps_failing_is_retired_and_its_work_goes_to_the_others() -> None:
    broken, good = StandInBoard("broken", ["unplugged"] * 99), StandInBoard("good")
    # The good one begins when the broken one is at its second network.
    twice = threading.Event()
    broken.before = lambda: twice.set() if broken.measured else None
    good.before = lambda: twice.wait(30)
    meter = pool(broken, good, retire_after=2)
    assert all(isinstance(outcome, Measurement) for outcome in outcomes(meter).values())
    assert len(broken.measured) == 2
    assert len(good.measured) == len(NETWORKS)
    outcomes(meter)
    assert len(broken.measured) == 2


def test_one_failure_that_a_whole_group_shares_counts_once() -> None:
    # The guard's reference fails at its start: none of the group can be measured then.
    board = StandInBoard("a", ["busy"])
    guarded = DriftGuard(board, DriftConfig(every=4))
    meter = PoolMeter("rack", [Member("a", guarded)], retire_after=2)
    found = list(outcomes(meter).values())
    assert sum(isinstance(outcome, MeasurementError) for outcome in found) == 4
    assert sum(isinstance(outcome, Measurement) for outcome in found) == len(NETWORKS) - 4


def test_a_retired_board_stays_so() -> None:
    board = StandInBoard("a", ["busy", "busy"])
    meter = pool(board, retire_after=2)
    assert all(isinstance(outcome, MeasurementError) for outcome in outcomes(meter).values())
    again = list(outcomes(meter).values())
    assert all("every device of rack is retired" in str(outcome) for outcome in again)
    assert len(board.measured) == 2


def test_failures_that_are_not_in_a_row_retire_nobody() -> None:
    meter = pool(StandInBoard("flaky", ["busy", "", "busy", "", "busy", "", "busy", ""]))
    found = outcomes(meter)
    assert sum(isinstance(outcome, MeasurementError) for outcome in found.values()) == 4


def test_a_network_s_own_fault_is_an_answer_and_no_other_board_is_asked() -> None:
    boards = [StandInBoard("a", ["network"]), StandInBoard("b")]
    found = outcomes(pool(*boards, retire_after=1))
    errors = [outcome for outcome in found.values() if isinstance(outcome, MeasurementError)]
    assert [(str(error), error.cause) for error in errors] == [
        ("no such operator", "architecture")
    ]
    assert sum(len(board.measured) for board in boards) == len(NETWORKS)


def test_a_network_that_no_board_could_measure_says_why() -> None:
    meter = pool(StandInBoard("a", ["busy"]), StandInBoard("b", ["unplugged"]), retire_after=5)
    with pytest.raises(
        MeasurementError, match=r"no device of rack is left for the network; [ab]: [ab] is \w+"
    ) as caught:
        meter.measure(NETWORKS[0])
    assert caught.value.cause == "infrastructure"
    assert meter.measure(NETWORKS[0]).median_ms == 1.0


def test_a_pool_whose_boards_are_all_retired_says_so() -> None:
    meter = pool(StandInBoard("a", ["off"] * 9), StandInBoard("b", ["off"] * 9), retire_after=1)
    errors = [str(outcome) for outcome in outcomes(meter).values()]
    assert "every device of rack is retired" in errors
    assert all("rack" in error for error in errors)


# ---------------------------------------------------------------------------- identity


def test_the_pool_s_identity_is_its_members_without_names_and_addresses() -> None:
    meter = pool(StandInBoard("a"), StandInBoard("b"))
    expected = {"name": "rack", "kind": "pool", "member": "ssh", "processor": "A53"}
    assert meter.identity() == expected
    assert meter.measure(NETWORKS[0]).device == expected


def test_boards_that_differ_are_no_pool() -> None:
    meter = pool(StandInBoard("a"), StandInBoard("b", processor="A72"))
    sentence = "the devices of rack must be identical, but a and b have processor 'A53' and 'A72'"
    with pytest.raises(MeasurementError, match=sentence):
        meter.identity()
    assert {str(outcome) for outcome in outcomes(meter).values()} == {sentence}


class LateBoard(StandInBoard):
    """Does not answer when it is asked who it is, at first."""

    asked = 0

    def identity(self) -> dict[str, Any]:
        self.asked += 1
        if self.asked == 1:
            raise MeasurementError("starting up")
        return super().identity()


def test_a_board_that_answers_late_is_compared_by_its_first_figure() -> None:
    late = LateBoard("late", processor="A72")
    meter = pool(StandInBoard("a"), late, retire_after=1)
    found = outcomes(meter)
    assert all(o.environment["member"] == "a" for o in found.values())  # type: ignore[union-attr]
    assert len(late.measured) == 1


def test_a_pool_of_which_nobody_answers_says_so() -> None:
    with pytest.raises(MeasurementError, match=r"no device of rack answers \(late: starting up\)"):
        pool(LateBoard("late")).identity()


def test_a_pool_keeps_the_contract() -> None:
    results = check_meter(pool(StandInBoard("a"), StandInBoard("b")), NETWORKS[0])
    assert [result for result in results if not result.passed] == []


def test_a_guarded_board_is_given_its_fair_share_at_a_time() -> None:
    boards = [StandInBoard("a"), StandInBoard("b")]
    config = DriftConfig(every=20, reference=NETWORKS[0].text)
    members = [Member(board.name, DriftGuard(board, config)) for board in boards]
    meter = PoolMeter("rack", members, retire_after=2)
    found = list(meter.measure_all(NETWORKS[1:]))
    assert all(o.environment["drift"]["change"] == 0 for _, o in found)  # type: ignore[union-attr]
    # Two measurements of the reference at the start, and one after each share.
    for board in boards:
        assert 3 <= board.measured.count(NETWORKS[0]) < len(board.measured)


# ---------------------------------------------------------------------------- configuration

PRINT = "import sys; print('\\n'.join('t=' + str(2.5) for _ in range(10)))"


def stand_in_phone(serial: str) -> dict[str, Any]:
    return {
        "name": f"phone-{serial}",
        "kind": "command",
        "address": serial,
        "run": [sys.executable, "-c", PRINT, "-s", "{address}"],
        "identify": [["echo", "a phone"]],
        "parse": {"kind": "regex", "pattern": "t=(?P<value>.*)", "unit": "ms", "each": "sample"},
    }


def test_stand_in_phones_in_files_make_a_pool(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(json.dumps(stand_in_phone("1111")))
    rack = {"name": "rack", "kind": "pool", "devices": ["one.yaml", stand_in_phone("2222")]}
    (tmp_path / "rack.yaml").write_text(json.dumps(rack))
    config = load_device(str(tmp_path / "rack.yaml"))
    assert isinstance(config, PoolConfig)
    assert [device.name for device in config.devices] == ["phone-1111", "phone-2222"]
    assert not config.shares_cores
    meter = make_meter(config)
    found = list(meter.measure_all(NETWORKS[:4]))
    assert all(o.median_ms == 2.5 for _, o in found)  # type: ignore[union-attr]
    assert meter.identity()["run"][-1] == "{address}"
    assert "1111" not in json.dumps(meter.identity())
    findings = {finding.name: finding.state for finding in check_device(config)}
    assert findings["phone-1111: identity"] == findings["identical"] == "ok"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"devices": []}, "devices must be one or more with names of their own, got []"),
        ({"devices": [stand_in_phone("1")] * 2}, "names of their own, got ['phone-1', 'phone-1']"),
        ({"devices": [{"name": "h", "kind": "onnxruntime"}]}, "unknown kind 'onnxruntime'"),
        ({"retire_after": 0}, "retire_after must be in [1, 1000], but got 0"),
        ({"devices": [{**stand_in_phone("1"), "address": "a b"}]}, "address must be a serial"),
        ({"devices": [{**stand_in_phone("1"), "address": "-x"}]}, "address must be a serial"),
    ],
)
def test_a_wrong_pool_gets_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    values = {"name": "rack", "kind": "pool", "devices": [stand_in_phone("1")], **changes}
    with pytest.raises(ConfigError) as caught:
        build(DeviceConfig, values, where="test")  # type: ignore[arg-type]
    assert sentence in str(caught.value)


def test_a_member_that_has_no_file_is_named() -> None:
    values = {"kind": "pool", "devices": ["no_such_board"]}
    with pytest.raises(ConfigError, match="no_such_board: no such file"):
        resolve_members(values, Path())


@pytest.mark.timeout(60)
def test_who_no_longer_wants_figures_waits_for_no_device_and_no_rest() -> None:
    resting, busy = threading.Event(), threading.Event()
    slow, shifting = BusyBoard("slow"), StandInBoard("shifting", ["", "", "", "away"])
    slow.before = busy.set
    guard = DriftGuard(shifting, DriftConfig(every=1, pause_s=600.0))
    shifting.before = lambda: resting.set() if len(shifting.measured) == 3 else None
    members = [
        Member("slow", slow),
        Member("shifting", guard),
        Member("quick", quick := StandInBoard("quick")),
    ]
    outcomes = PoolMeter("rack", members, retire_after=2).measure_all(NETWORKS)
    assert next(iter(outcomes))[0] in NETWORKS
    assert quick.measured
    assert busy.wait(30)
    assert resting.wait(30)
    outcomes.close()  # type: ignore[attr-defined]  # as Ctrl-C and the end of a search do


@pytest.mark.timeout(60)
def test_nobody_waits_for_a_locked_device_any_more() -> None:
    waiting = threading.Event()
    ended: list[type[BaseException]] = []

    def wait() -> None:
        waiting.set()
        try:
            with device_lock("rack", "on the rack", 600.0):
                pass
        except BrokenOff as end:
            ended.append(type(end))

    with device_lock("rack", "on the rack", 0.0):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(30)
        with breaking_off():
            thread.join(30)
    assert ended == [BrokenOff]
