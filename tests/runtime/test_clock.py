"""The allocator's clock, told by a machine whose wall clock can be set."""

from __future__ import annotations

import logging
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm.runtime.bundle_run import _aged
from rm.runtime.clock import SLEW, Anchor, Clock, boot_id

NOON = 1_700_000_000.0
HOUR = 3600.0


class Machine:
    """A wall and a monotonic clock."""

    def __init__(self) -> None:
        self.wall = NOON
        self.monotonic = 50.0

    def clock(self, newest: float = 0.0, anchor: Anchor | None = None) -> Clock:
        return Clock(newest, anchor, wall=lambda: self.wall, monotonic=lambda: self.monotonic)

    def go_on(self, clock: Clock, seconds: float) -> float:
        """Time passes, and the clock is looked at every second, as the watch of the nodes does."""
        for _ in range(int(seconds)):
            self.pause(1.0)
            clock()
        self.pause(seconds % 1.0)
        return clock()

    def pause(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_where_nobody_sets_the_wall_it_is_the_wall(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    clock = machine.clock(NOON - 5)
    assert clock() == NOON
    assert machine.go_on(clock, 500.0) == pytest.approx(NOON + 500, abs=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("step_s", [HOUR, -HOUR, 5.0, -5.0])
def test_a_step_moves_it_by_a_hundredth_of_what_passes_and_is_told_once(
    step_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.go_on(clock, 10)
    before = clock()
    machine.wall += step_s
    assert clock() == before
    passed = machine.go_on(clock, 300) - before
    assert passed == pytest.approx(300 + (SLEW * 300 if step_s > 0 else -SLEW * 300), abs=1e-3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{step_s:+.1f} s" in caplog.text


@pytest.mark.parametrize("step_s", [8.0, -8.0])
def test_it_catches_up_with_the_wall_and_then_is_the_wall(step_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.wall += step_s
    machine.go_on(clock, abs(step_s) / SLEW - 20)
    assert abs(clock() - machine.wall) > 0.1
    assert machine.go_on(clock, 30) == pytest.approx(machine.wall, abs=1e-5)


def test_a_wall_that_is_slewed_is_followed_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    clock = machine.clock()
    for _ in range(20_000):
        machine.pause(1.0)
        machine.wall -= 0.0005  # what ntpd does
        assert abs(clock() - machine.wall) < 0.001
    assert not caplog.records


def test_a_long_pause_between_two_looks_does_not_end_in_a_jump() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.pause(10 * HOUR)
    machine.wall += HOUR
    assert clock() == pytest.approx(NOON + 10 * HOUR, abs=0.2)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e5), st.one_of(st.just(0.0), st.floats(-1e9, 1e9), st.floats(-3, 3))),
        max_size=40,
    )
)
def test_it_never_goes_backwards_and_no_span_is_wrong_by_more_than_the_slew(
    looks: list[tuple[float, float]],
) -> None:
    machine = Machine()
    clock = machine.clock()
    told = [(machine.monotonic, clock())]
    for pause_s, step_s in looks:
        machine.pause(pause_s)
        machine.wall += step_s
        told.append((machine.monotonic, clock()))
    for (began, first), (ended, last) in pairwise(told):
        assert last >= first
        assert abs((last - first) - (ended - began)) <= SLEW * (ended - began) + 1e-5


def test_a_restart_begins_with_the_wall_but_never_before_the_ledger(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    clock = machine.clock(NOON - HOUR)
    assert clock() == NOON
    assert not caplog.records
    later = machine.clock(NOON + HOUR)  # the wall was set back while the allocator was down
    assert later() == NOON + HOUR
    assert machine.go_on(later, 100) == pytest.approx(NOON + HOUR + 100 * (1 - SLEW), abs=1e-3)
    assert len(caplog.records) == 1
    assert f"{-HOUR:+.1f} s from the newest time in the ledger" in caplog.text


def test_after_a_crash_it_goes_on_and_a_new_start_takes_the_wall(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine, path = Machine(), tmp_path / "clock.json"
    clock = machine.clock(anchor=Anchor(path, "a life"))
    machine.wall += 24 * HOUR
    before = machine.go_on(clock, 1000)
    machine.pause(100)
    assert machine.clock(anchor=Anchor(path, "another life"))() == machine.wall
    clock = machine.clock(anchor=Anchor(path, "a life"))
    assert clock() == machine.wall, "whoever begins a life writes over the one before"
    machine.wall += 24 * HOUR
    before = machine.go_on(clock, 1000)
    machine.pause(100)  # it is down
    caplog.clear()
    after = machine.clock(before, Anchor(path, "a life"))
    assert after() == pytest.approx(before + 100, abs=1)
    assert "before it crashed" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"life": "a life", "ahead_s": null}', '{"life": "a life", "ahead_s": NaN}']
)
def test_an_anchor_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    machine, path = Machine(), tmp_path / "clock.json"
    assert machine.clock(anchor=Anchor(path, "a life"))() == NOON
    path.write_text(text)
    assert machine.clock(anchor=Anchor(path, "a life"))() == NOON
    assert machine.clock(anchor=Anchor(tmp_path / "no" / "clock.json", "a life"))() == NOON
    assert len(boot_id()) == 36


def test_the_age_of_a_checkpoint_is_not_measured_by_the_wall() -> None:
    report = {
        "at": NOON,
        "metrics": {},
        "checkpoint_at": NOON,
        "checkpoint_monotonic": time.monotonic() - 100,
    }
    aged = _aged(report)
    assert 100 <= aged.pop("checkpoint_age_s") < 160
    assert aged == {"at": NOON, "metrics": {}, "checkpoint_at": NOON}
    assert _aged({"at": NOON, "metrics": {}}) == {"at": NOON, "metrics": {}}
