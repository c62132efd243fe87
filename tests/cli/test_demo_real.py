"""`rmctl demo` for real, as a process of its own: what it tells, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.own_ray

REPOSITORY = Path(__file__).resolve().parents[2]
REAPER = str(REPOSITORY / "rm" / "demo" / "reaper.py")
RMCTL = [sys.executable, "-c", "from rm.cli import main; main()"]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts one demo. Afterwards no process of it may be left, nor its directory; other demos may well be running."""
    mark = uuid.uuid4().hex
    directories: list[Path] = []

    def start(*words: str) -> subprocess.Popen[str]:
        env = {**os.environ, "RM_TEST_DEMO": mark, "PYTHONPATH": str(REPOSITORY)}
        demo = subprocess.Popen(
            [*RMCTL, "demo", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        while not directories and demo.poll() is None:
            directories.extend(Path(words[-1]) for words in processes(mark).values() if REAPER in words)
        return demo

    yield start
    deadline = time.monotonic() + 15
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}
    assert directories
    assert not directories[0].exists()


def processes(mark: str) -> dict[int, list[str]]:
    """The processes that have the mark in their environment: pid → command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"RM_TEST_DEMO={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (
                    (entry / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
                )
        except OSError:
            continue
    return found


@pytest.mark.timeout(400)  # half a minute; a busy machine takes its time
def test_the_main_job_as_the_ledger_has_it(start: Callable[..., subprocess.Popen[str]]) -> None:
    demo = start("--json")
    out, err = demo.communicate(timeout=360)
    assert demo.returncode == 0, err
    story = json.loads(out)
    gpus = story["gpus"]
    assert gpus > 0
    assert story["statuses"] == {"first": "SUCCEEDED", "second": "SUCCEEDED"}
    assert (story["free_gpus"], story["charged_gpus"]) == (gpus, 0)
    found: list[dict[str, Any]] = story["steps"]
    assert [each["at"] for each in found] == sorted(each["at"] for each in found)
    assert [each["step"] for each in found if each["name"] == "first"] == [
        "request", "check", "allocate", "run", "release"
    ]  # fmt: skip
    assert [each["step"] for each in found if each["name"] == "second"] == [
        "request", "check", "wait, check", "allocate", "run", "release"
    ]  # fmt: skip
    of = {(each["name"], each["step"]): each for each in found}
    for name in ("first", "second"):
        assert numbers(of[name, "allocate"]) == (gpus, 0, 0, gpus)
        assert numbers(of[name, "run"]) == (0, 0, gpus, gpus)
        assert numbers(of[name, "release"]) == (0, gpus, gpus, 0)
    assert of["second", "check"]["what"].startswith("WaitingForCapacity")
    assert numbers(of["second", "check"]) == (0, 0, gpus, gpus)
    released, admitted = of["first", "release"], of["second", "allocate"]
    assert admitted["events"][0] > released["events"][-1], "allocated only after the first release was seen"
    assert admitted["at"] - released["at"] < 2.0
    for measured in story["measured"].values():
        assert measured.get("test_accuracy", 1.0) > 0.9
        assert measured.get("final_loss", 0.0) < 3.0
        assert measured
    assert "WaitingForCapacity" in err, "what happens is told beside the JSON"


def numbers(step: dict[str, Any]) -> tuple[float, float, float, float]:
    return step["free_before"], step["free_after"], step["charged_before"], step["charged_after"]


@pytest.mark.long
def test_killed_outright_it_leaves_nothing(start: Callable[..., subprocess.Popen[str]]) -> None:
    demo = start("-g", "1")
    assert demo.stdout is not None
    assert demo.stderr is not None
    with demo.stdout, demo.stderr:
        if not any("RunStarted" in line for line in demo.stdout):
            pytest.fail(f"the demo ended before its first job ran: {demo.stderr.read()}")
        assert demo.poll() is None
        demo.send_signal(signal.SIGKILL)
        assert demo.wait(120) == -signal.SIGKILL
