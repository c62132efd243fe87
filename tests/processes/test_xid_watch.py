# ruff: noqa: N802, N815 - as pynvml has them
"""Hearing the errors that the driver reports, from a driver that is played."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest
from probes import wait_until

from rm.core.gpu_errors import Xid
from rm.runtime.xid_watch import XidWatch


class Failed(Exception):
    def __init__(self, value: int) -> None:
        self.value = value


class Driver:
    """As `pynvml`, for devices 0 to 7: "GPU-x" is another name of 5. Events come as (index, number) or as errors."""

    NVMLError, NVML_ERROR_TIMEOUT, nvmlEventTypeXidCriticalError = Failed, 10, 8

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[int, int] | Failed] = queue.Queue()
        self.watched: list[int] = []

    def nvmlInit(self) -> None: ...

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 7:
            raise Failed(2)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-x": 5}[uuid]

    def nvmlDeviceGetIndex(self, device: int) -> int:
        return device

    def nvmlDeviceRegisterEvents(self, device: int, kind: int, events: str) -> None:
        assert (kind, events) == (8, "events")
        self.watched.append(device)

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> SimpleNamespace:
        event = self.events.get()
        if isinstance(event, Failed):
            raise event
        return SimpleNamespace(device=event[0], eventData=event[1])


def watch(driver: Driver, *gpu_ids: str) -> XidWatch:
    watch = XidWatch(())
    watch._gpu_ids = gpu_ids
    watch.listen(driver)
    return watch


def test_errors_are_heard_once_by_the_names_that_jobs_know() -> None:
    driver = Driver()
    heard = watch(driver, "2", "GPU-x")
    wait_until(lambda: driver.watched == [2, 5], what="it watches both")
    assert heard.take() == ()
    for event in ((5, 79), Failed(10), (2, 31), (5, 79)):
        driver.events.put(event)
    wait_until(driver.events.empty)
    wait_until(lambda: len(heard._heard) == 3)
    assert heard.take(60) == (Xid("GPU-x", 79), Xid("2", 31))
    assert heard.take() == ()
    driver.events.put((2, 13))
    assert heard.take(60) == (Xid("2", 13),)
    driver.events.put(Failed(999))


def test_who_can_hear_nothing_does_not_wait_for_it() -> None:
    assert XidWatch(("0",)).take() == ()
    driver = Driver()
    deaf = watch(driver, "9")
    assert deaf._thread is not None
    deaf._thread.join(60)
    assert deaf.take(1000) == ()
    gone = watch(driver, "1")
    driver.events.put(Failed(999))
    assert gone._thread is not None
    gone._thread.join(60)
    assert gone.take(1000) == ()


@pytest.mark.parametrize(
    ("number", "infra", "broken", "words"),
    [
        (31, False, False, "GPU 0 reported Xid 31 (a memory page fault)"),
        (94, True, False, "GPU 0 reported Xid 94 (an uncorrectable memory error, contained)"),
        (79, True, True, "GPU 0 reported Xid 79 (it has fallen off the bus)"),
        (999, False, False, "GPU 0 reported Xid 999"),
    ],
)
def test_whose_fault_an_error_is(number: int, infra: bool, broken: bool, words: str) -> None:
    xid = Xid("0", number)
    assert (xid.infra, xid.broken, str(xid)) == (infra, broken, words)
