"""What tests look at from outside: Ray's own table, /proc, the scratch directory. And waiting for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MARK = "RM_TEST_RUN"
"""Inherited by every process of this test run, so that leftovers can be told from strangers."""


PATIENCE = 3
"""So many times longer than on a quiet machine may what is waited for take: that is no fault of ours."""


def wait_until(condition: Callable[[], Any], timeout_s: float = 30.0, what: str = "") -> Any:
    """The first true value of `condition`. Fails the test, naming what was waited for.

    `timeout_s` is what it may take where nothing else runs.
    """
    deadline = time.monotonic() + PATIENCE * timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what or condition}")
        time.sleep(0.05)


def assert_nothing_left(client: Any) -> None:
    """No GPU charged, no placement group of ours in Ray's table, no user process, no scratch directory.

    But for stands that are warm yet: they are for the next test, and the end of the session waits for their end.
    """
    charged = {node.name: node.charged_gpus for node in client.nodes() if node.charged_gpus}
    assert not charged, f"charged: {charged}"
    wait_until(lambda: not cold_groups(client), 5, "no placement groups are left")
    wait_until(lambda: not user_processes(), 5, f"user processes gone, left: {user_processes()}")
    wait_until(
        lambda: not scratch(client.ledger_key), 5, f"scratch directories: {scratch(client.ledger_key)}"
    )


def scratch(ledger_key: str) -> list[str]:
    """The scratch directories of a ledger's attempts on this machine. They go a moment after the attempt has ended."""
    return [name for name in scratch_names() if name.startswith(ledger_key)]


def scratch_names() -> list[str]:
    """All that there is on this machine, of whatever ledger or run."""
    from rm.runtime.workspace import scratch_root

    return [path.name for path in scratch_root().iterdir()] if scratch_root().exists() else []


def warm_groups(client: Any) -> set[str]:
    """The names of the groups that are kept for the next job, as Ray has them."""
    return {f"rm/{client.ledger_key}/{name}" for node in client.nodes() for name in node.warm}


def cold_groups(client: Any) -> list[str]:
    """Our groups that are not kept for the next job."""
    before = warm_groups(client)
    held = groups()
    return sorted(set(held) - before - warm_groups(client))


def runner_pid(client: Any, job: Any, bundle: int = 0) -> int:
    """The process of the runner that has the job's bundle."""
    return actor_pids()[f"rm/{client.ledger_key}/{job.view().stand}/{bundle}"]


def groups() -> list[str]:
    """The names of our placement groups that Ray's own table holds as not removed."""
    from ray.util.placement_group import placement_group_table

    return sorted(
        entry["name"]
        for entry in placement_group_table().values()
        if entry["name"].startswith("rm/") and entry["state"] != "REMOVED"
    )


def user_processes() -> dict[int, str]:
    """Processes of this test run that belong to an attempt: pid → command line."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{MARK}={os.environ[MARK]}".encode() not in environ:
            continue
        # A preloaded interpreter, of which ranks are forked, keeps room for their mark.
        marks = [each for each in environ if each.startswith(b"RM_ATTEMPT_KEY=") and b"=---" not in each]
        if marks and command:
            found[pid] = command
    return found


def actor_pids() -> dict[str, int]:
    """Live actors by name, from the GCS's own table: "store", "rm/<ledger>/<attempt>/<bundle>", … → pid."""
    from ray._private.state import actors

    return {each["Name"]: each["Pid"] for each in actors().values() if each["State"] == "ALIVE"}


def processes_with(variable: str, *marks: str, command: str = "") -> list[int]:
    """Processes whose environment has `variable` ("": any) and whose command line holds `command`: pids."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if (
            (not variable or f"{variable}=" in environ)
            and command in line
            and all(mark in environ for mark in marks)
        ):
            found.append(pid)
    return found


def leads(pid: int) -> bool:
    """Whether it leads a session. One that has just ended, like a `sleep` of a shell's, leads none."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False
