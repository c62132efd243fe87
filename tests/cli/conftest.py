"""`rmctl` in this process, on a client that needs no cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_client import FakeClient

from rm import cli, client
from rm.sim.trace import TraceJob, write_trace


@dataclass
class Ran:
    """What one command line gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()

    def connect(
        address: str | None = None, *, config: Any = None, start: bool = True, **_: Any
    ) -> FakeClient:
        fake.connected.append((address, start))
        return fake

    monkeypatch.setattr(client, "connect", connect)
    return fake


@pytest.fixture
def rmctl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def rmctl(*words: str) -> Ran:
        code = cli.run(words)
        shown = capsys.readouterr()
        return Ran(code, shown.out, shown.err)

    return rmctl


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """80 jobs of two queues, of up to 16 GPUs."""
    jobs = [
        TraceJob(f"j{each}", 7 * each, 60 + each, (1, 2, 8, 16)[each % 4], queue="ab"[each % 2])
        for each in range(80)
    ]
    write_trace(tmp_path / "trace.csv.gz", jobs)
    return tmp_path / "trace.csv.gz"
