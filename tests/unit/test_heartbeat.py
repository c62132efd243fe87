"""A holder that nobody answers learns in time that it has nothing any more."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from probes import wait_until

from rm.errors import AllocatorUnavailable, LeaseLost
from rm.heartbeat import Heartbeat
from rm.lease import Lease


class Allocator:
    """Answers, or not; remembers what it was told."""

    def __init__(self) -> None:
        self.there = True
        self.told: list[list[str]] = []
        self.status = "RUNNING"
        self.waited: list[float] = []

    def heard(self, ids: list[str], timeout_s: float) -> dict[str, str]:
        self.waited.append(timeout_s)
        self.ask("heard", ids)
        self.told.append(ids)
        return dict.fromkeys(ids, self.status)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not self.there:
            threading.Event().wait(0.002)
            raise AllocatorUnavailable("it did not answer")
        return {"group_id": "ab" * 18, "bundles": [{"GPU": 1}]}


@pytest.fixture
def allocator() -> Any:
    return Allocator()


@pytest.fixture
def heartbeat(allocator: Allocator) -> Any:
    made = Heartbeat(allocator.heard, every_s=0.01)
    yield made
    made.stop()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_silence_for_as_long_as_a_job_lives_is_told_once_and_so_is_its_end(
    allocator: Allocator, heartbeat: Heartbeat, caplog: pytest.LogCaptureFixture
) -> None:
    heartbeat.add({"j1": 0.1, "j2": 1e6})
    wait_until(lambda: len(allocator.told) > 3, 5, "it says that it is alive")
    assert warnings(caplog) == []
    allocator.there = False
    wait_until(lambda: warnings(caplog), 5, "it is told of")
    before = len(allocator.waited)
    wait_until(lambda: len(allocator.waited) > before + 3, 5, "it goes on asking")
    (said,) = warnings(caplog)
    assert "j1, which this process holds, is ended" in said
    assert max(allocator.waited) <= 0.02, "no call outlasts the moment at which there is something to say"
    allocator.status, allocator.there = "CANCELLED", True
    wait_until(lambda: len(warnings(caplog)) == 2, 5, "it answers again")
    assert warnings(caplog)[1].endswith("answers again: j1 is CANCELLED")
    assert not heartbeat._ttl_s, "what has ended needs nobody to hold it"


def test_a_lease_whose_allocator_is_gone_for_its_ttl_is_lost_and_ends_without_it(
    allocator: Allocator,
) -> None:
    dropped: list[str] = []
    silent = SimpleNamespace(silence_s=14.0, drop=dropped.append)
    client: Any = SimpleNamespace(_allocator=allocator.ask, _heartbeat=silent)
    job: Any = SimpleNamespace(id="j1", by="ada", view=lambda: SimpleNamespace(status="RUNNING"))
    lease = Lease(client, job, None, 15.0).acquire()
    allocator.there = False
    with pytest.raises(AllocatorUnavailable, match="did not answer"):
        lease.placement_group()  # it may be back in a moment
    with pytest.raises(AllocatorUnavailable, match="did not answer"):
        lease.end()
    assert dropped == []
    allocator.there = True
    lease.acquire()
    allocator.there = False
    silent.silence_s = 15.0
    with pytest.raises(LeaseLost, match="j1: the allocator has not answered for 15 s"):
        lease.options()
    lease.end()
    assert dropped == ["j1"], "no heartbeat keeps it from ending"
