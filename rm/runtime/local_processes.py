"""The processes of a local Ray: how they are marked, found, and ended, every one.

Every process of the cluster inherits MARK; what carries it, or descends from a carrier, belongs to it. That needs
SPT_NOENV: Ray renames its workers, and a renamed process otherwise overwrites the environment that /proc shows.
Called by `rm.runtime.local` and its launcher; nothing here needs Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress

import psutil

from rm.errors import ClusterError

MARK = "RM_LOCAL_RAY"
TERM_S, KILL_S = 3.0, 10.0
_DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_", "RAY_JOB_")


def environment(key: str) -> dict[str, str]:
    """The launcher's environment, and so that of every process of the cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        **kept,
        MARK: key,
        "SPT_NOENV": "1",
        "RAY_AUTH_MODE": kept.get("RAY_AUTH_MODE") or "disabled",
        # All that this does on Linux: drivers take 127.0.0.1 at its word. Jobs inherit it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def members(key: str) -> set[psutil.Process]:
    """The living processes of the cluster `key`, except the caller: who carries the mark, and their descendants.

    `.info["name"]` of each is what it was called at that moment.
    """
    living = {
        process.pid: process
        for process in psutil.process_iter(["name", "ppid", "status", "environ"])
        if process.info["status"] not in _DEAD
    }
    found = {pid for pid, process in living.items() if (process.info["environ"] or {}).get(MARK) == key}
    size = -1
    while size != len(found):
        size = len(found)
        found |= {pid for pid, process in living.items() if process.info["ppid"] in found}
    return {living[pid] for pid in found - {os.getpid()}}


def end(key: str) -> None:
    """SIGTERM to the raylets, which end their workers; then SIGKILL to all that is left, until nothing is.

    The order matters: a raylet whose agent got SIGTERM too takes 10 s to end, and a GCS may not heed it at all. What
    was a descendant at first is remembered, since it may have lost its parent by the time that it is looked for again.
    """
    left = members(key)
    raylets = {process for process in left if process.info["name"] == "raylet"}
    _signal(raylets, signal.SIGTERM)
    deadline = time.monotonic() + TERM_S
    while time.monotonic() < deadline and any(map(_lives, raylets)):
        time.sleep(0.02)
    deadline = time.monotonic() + KILL_S
    while left := {process for process in left | members(key) if _lives(process)}:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"processes {sorted(process.pid for process in left)} of a local Ray do not end"
            )
        _signal(left, signal.SIGKILL)
        time.sleep(0.02)


def _signal(processes: set[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):  # gone; psutil has made sure that its pid is still its own
            process.send_signal(number)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in _DEAD
    except psutil.Error:
        return False
