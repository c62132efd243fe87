"""What was asked for: from memory where it is, else from a real ledger in one reading."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rm.core.model import Gang, Kind
from rm.core.resources import GPU_UNIT, Bundle
from rm.ledger import Accepted, Batch, Ledger
from rm.runtime import requests
from rm.runtime.requests import Requests
from rm.spec import JobSpec, build_spec


def spec(name: str) -> JobSpec:
    return build_spec(kind=Kind.COMMAND, command=("true",), num_gpus=1, owner="a", name=name)


class Counted:
    """A ledger, and how often it was read."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger.open(f"sqlite:///{path}/ledger.sqlite")
        self.read: list[list[str]] = []

    def accept(self, *names: str) -> None:
        gang = Gang(Bundle(GPU_UNIT))
        rows = [
            Accepted((each := spec(name)).job(f"j{seq}", seq, gang, 0.0), each, f"key {seq}")
            for seq, name in enumerate(names, 1)
        ]
        self.ledger.commit(Batch(rows, []))

    def specs(self, job_ids: list[str]) -> Any:
        self.read.append(list(job_ids))
        return self.ledger.specs(job_ids)


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    counted = Counted(tmp_path)
    yield counted
    counted.ledger.close()


def of(kept: Requests, *job_ids: str) -> list[str | None]:
    return [each.name for each in asyncio.run(kept.of(job_ids))]


def test_what_is_not_at_hand_is_read_once_for_all(ledger: Any) -> None:
    ledger.accept("a", "b", "c")
    kept = Requests(ledger)
    kept.keep("j2", spec("b"), 100)
    assert of(kept, "j3", "j2", "j1") == ["c", "b", "a"]
    assert ledger.read == [["j3", "j1"]]
    assert kept.at_hand("j1") is None, "what was read may be much, and is not kept"
    with pytest.raises(KeyError):
        of(kept, "j4")


def test_the_jobs_of_an_array_share_what_was_asked_for(ledger: Any) -> None:
    kept = Requests(ledger)
    kept.keep("j1", spec("a"), 100)
    assert of(kept, "j1_0", "j1_17") == ["a", "a"]
    assert ledger.read == []


def test_memory_is_bounded(ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "KEPT", 2)
    kept = Requests(ledger)
    kept.keep("j9", spec("large"), requests.KEPT_BYTES + 1)
    assert kept.at_hand("j9") is None
    for number in (1, 2, 3):
        kept.keep(f"j{number}", spec("small"), requests.KEPT_BYTES)
    assert [kept.at_hand(f"j{number}") is not None for number in (1, 2, 3)] == [False, True, True]
