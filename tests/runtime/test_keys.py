"""What was accepted before: from memory for this life's keys, else from the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rm.runtime import keys as module
from rm.runtime.keys import FEW, Keys
from rm.spec import JobSpec, build_spec


class FakeLedger:
    """Key → first job; counts how often it is asked."""

    def __init__(self, **known: str) -> None:
        self.known = known
        self.asked = 0

    def submitted(self, keys: Sequence[str]) -> dict[str, str]:
        self.asked += 1
        return {key: self.known[key] for key in keys if key in self.known}


def spec(**fields: Any) -> JobSpec:
    return build_spec(kind="command", command=("true",), num_gpus=1, owner="ada", **fields)


def made(ledger: FakeLedger) -> Keys:
    it: Any = ledger
    return Keys(it)


def test_keys_of_this_life_are_known_without_the_ledger() -> None:
    ledger = FakeLedger()
    keys = made(ledger)
    assert asyncio.run(keys.known([spec()], ["a"], keys.life)) == {}
    keys.accepted(["a"], ["j1"])
    assert asyncio.run(keys.known([spec()] * 2, ["a", "b"], keys.life)) == {"a": "j1"}
    assert not ledger.asked


def test_keys_of_another_life_are_looked_up() -> None:
    ledger = FakeLedger(a="j1", b="j2_0")
    keys = made(ledger)
    known = keys.known([spec(), spec(array=3), spec()], ["a", "b", "c"], made(ledger).life)
    assert asyncio.run(known) == {"a": "j1", "b": "j2"}, "an array has the name of all its jobs"
    assert asyncio.run(keys.known([spec()], ["a"], "")) == {"a": "j1"}
    assert ledger.asked == 2


def test_many_are_looked_up_whatever_they_were_drawn_for() -> None:
    ledger = FakeLedger(k0="j1")
    keys = made(ledger)
    many = [f"k{number}" for number in range(FEW + 1)]
    assert asyncio.run(keys.known([spec()] * len(many), many, keys.life)) == {"k0": "j1"}


def test_the_oldest_are_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    keys = made(FakeLedger(a="j1"))
    for number, key in enumerate("abc", 1):
        keys.accepted([key], [f"j{number}"])
    many = [f"k{number}" for number in range(FEW + 1)]
    keys.accepted(many, many)
    assert asyncio.run(keys.known([spec()] * 3, ["a", "b", "c"], keys.life)) == {"b": "j2", "c": "j3"}
    assert asyncio.run(keys.stored([spec()], ["a"])) == {"a": "j1"}
