"""The demo's parts, without Ray: the steps out of a history, what is shown of it, and the cleaning up."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_client import event, node, view
from probes import wait_until

from rm.demo import reaper
from rm.demo.sandbox import private_directory, training, training_scripts
from rm.demo.stage import Stage
from rm.demo.steps import Story, steps, steps_table
from rm.tables import write

WAITS = {"reason": {"code": "WaitingForCapacity", "message": "needs 2 GPUs, 0 are free"}}
PLACED = {"placed": [{"node_id": "0123456789", "slots": [0, 1]}]}
ENDED = {"outcome": {"status": "SUCCEEDED"}}
USED = {"free_before": 0, "free_after": 0, "charged_before": 2, "charged_after": 2}
TAKEN = {"free_before": 2, "free_after": 0, "charged_before": 0, "charged_after": 2}
GIVEN = {"free_before": 0, "free_after": 2, "charged_before": 2, "charged_after": 0}
HISTORY = [
    event(1, "NodeJoined", None),
    event(2, "JobSubmitted", "j1", 1.0),
    event(3, "AvailabilityChecked", "j1", 1.0),
    event(4, "JobAdmitted", "j1", 1.0, body=PLACED, attempt=1, **TAKEN),
    event(5, "PlacementReady", "j1", 1.5, attempt=1, **USED),
    event(6, "JobSubmitted", "j2", 1.6, **USED),
    event(7, "AvailabilityChecked", "j2", 1.6, body=WAITS, **USED),
    event(8, "RunStarted", "j1", 2.0, attempt=1, **USED),
    event(9, "RunExited", "j1", 12.0, body=ENDED, attempt=1, **USED),
    event(10, "PlacementReleased", "j1", 12.1, attempt=1, **GIVEN),
    event(11, "AvailabilityChecked", "j2", 12.1),
    event(12, "JobAdmitted", "j2", 12.1, body=PLACED, attempt=1, **TAKEN),
    event(13, "PlacementReady", "j2", 12.2, attempt=1, **USED),
    event(14, "RunLost", "j2", 13.0, body={"why": "the runner died"}, attempt=1, **USED),
    event(15, "PlacementReleased", "j2", 13.5, attempt=1, **GIVEN),
]


def test_a_history_becomes_steps_with_the_ledgers_numbers() -> None:
    found = steps(HISTORY)
    assert [(each.job, each.step) for each in found] == [
        ("j1", "request"), ("j1", "check"), ("j1", "allocate"), ("j2", "request"), ("j2", "check"), ("j1", "run"),
        ("j1", "release"), ("j2", "wait, check"), ("j2", "allocate"), ("j2", "run"), ("j2", "release"),
    ]  # fmt: skip
    allocate, run, release, wait = found[2], found[5], found[6], found[7]
    assert (allocate.events, allocate.took_s) == ((4, 5), pytest.approx(0.5))
    assert (allocate.free_before, allocate.free_after, allocate.charged_after) == (2, 0, 2)
    assert (run.events, run.took_s, run.at) == ((8, 9), pytest.approx(10.0), pytest.approx(11.0))
    assert (release.free_before, release.free_after, release.took_s) == (0, 2, pytest.approx(0.1))
    assert (wait.took_s, wait.free_before) == (pytest.approx(10.5), 2)
    assert found[4].what == "WaitingForCapacity: needs 2 GPUs, 0 are free"
    assert found[9].what == "the runner died"


def test_the_table_of_steps_for_people() -> None:
    file = io.StringIO()
    write(Stage(file).console, steps_table(steps(HISTORY), {"j1": "first", "j2": "[b]second"}))
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["AT", "JOB", "STEP", "TOOK", "FREE", "ALLOCATED", "WHAT"]
    assert "2 → 0" in lines[3]
    assert "[b]second" in lines[4]


@pytest.mark.parametrize(
    ("statuses", "free", "charged", "succeeded"),
    [
        (("SUCCEEDED", "SUCCEEDED"), 2, 0, True),
        (("SUCCEEDED", "FAILED"), 2, 0, False),
        (("SUCCEEDED", "SUCCEEDED"), 1, 0, False),
        (("SUCCEEDED", "SUCCEEDED"), 2, 1, False),
    ],
)
def test_only_two_successes_and_all_gpus_free_are_a_success(
    statuses: tuple[str, str], free: float, charged: float, succeeded: bool
) -> None:
    named = dict(zip(("first", "second"), statuses, strict=True))
    story = Story(2, "digits", {}, [], named, {}, {}, free, charged)
    assert story.succeeded is succeeded
    assert story.to_dict()["succeeded"] is succeeded


def test_without_a_terminal_progress_is_a_line_at_each_quarter() -> None:
    file = io.StringIO()
    with Stage(file) as stage:
        stage.names = {"j1": "first"}
        stage.happened(HISTORY)
        for step in range(101):
            now = view("j1", progress={"metrics": {"step": step, "total": 100, "loss": 0.5}})
            stage.update([now], [node("here", 2, charged=2)])
    shown = file.getvalue()
    assert [line.split()[1] for line in shown.splitlines() if "/100" in line] == [
        "25/100",
        "50/100",
        "75/100",
        "100/100",
    ]
    assert "NodeJoined" not in shown
    assert "\x1b" not in shown


def test_the_scripts_are_found_and_the_batch_suits_any_number_of_gpus() -> None:
    assert (training_scripts() / "train_chars.py").is_file()
    for gpus in (1, 2, 3, 7, 8, 100):
        command, _processes, _sentence = training(gpus)
        if "--batch-size" in command:
            assert int(command[command.index("--batch-size") + 1]) % gpus == 0


def test_without_torch_it_trains_in_python_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm.demo.sandbox.find_spec", lambda name: None)
    command, processes, sentence = training(2)
    assert command[1] == "train_chars.py"
    assert processes == 1
    assert "torch and scikit-learn are not installed" in sentence


STARTER = """
import subprocess, sys, time
from rm.demo.sandbox import private_directory
with private_directory() as directory:
    # Deaf to what ends it, and out of its parent's session.
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    (directory / "file").write_text("something")
    print(directory, child.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_whatever_ends_the_demo_its_processes_and_files_go(how: signal.Signals) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert starter.stdout is not None
    with starter.stdout:
        directory, pid = starter.stdout.readline().split()
        assert Path(directory, "file").exists()
        starter.send_signal(how)
        starter.wait(120)
    deadline = time.monotonic() + 20
    while Path(directory).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(directory).exists()
    assert not Path("/proc", pid).exists() or Path("/proc", pid, "stat").read_text().split()[2] == "Z"


def test_the_reaper_ends_nobody_elses_processes() -> None:
    with private_directory():
        mark = os.environ[reaper.VARIABLE]
        child = subprocess.Popen(["sleep", "600"])
        try:
            # In the middle of exec a process has no environment to read; Popen may return just then.
            wait_until(Path(f"/proc/{child.pid}/environ").read_bytes, 5, "the child has become sleep")
            assert reaper.marked(mark) == [child.pid]
            assert reaper.marked("another") == []
        finally:
            child.kill()
            child.wait()
