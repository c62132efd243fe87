"""The processes of a local Ray: how they are marked, found, and ended, every one.

Every process of the cluster inherits a variable, MARK unless told otherwise; what carries it, or descends from a
carrier, belongs to the cluster. That needs SPT_NOENV: Ray renames its workers, and a renamed process otherwise
overwrites the environment that /proc shows. Its value is a key, and a key may have parts: "a/b" belongs to "a". What
carries the variable with another key belongs elsewhere, whoever started it.
Called by `rm.runtime.local` and its launcher, and by `rm.providers`; nothing here needs Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

from rm.errors import ClusterError

MARK = "RM_LOCAL_RAY"
TERM_S, KILL_S = 3.0, 10.0
_DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_", "RAY_JOB_")


def environment(key: str, mark: str = MARK) -> dict[str, str]:
    """The environment of whatever starts the cluster, and so that of every process of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        **kept,
        mark: key,
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


def is_free(port: int) -> bool:
    """Whether a server of this machine can listen on the port, on loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def members(key: str, mark: str = MARK) -> set[psutil.Process]:
    """The living processes of the cluster `key`, except the caller: who carries the mark, and their descendants.

    `.info["name"]` of each is what it was called at that moment.
    """
    living = {
        process.pid: process
        for process in psutil.process_iter(["name", "ppid", "status", "environ"])
        if process.info["status"] not in _DEAD
    }
    carried = {pid: (process.info["environ"] or {}).get(mark) for pid, process in living.items()}
    found = {pid for pid, value in carried.items() if value and belongs(value, key)}
    size = -1
    while size != len(found):
        size = len(found)
        found |= {
            pid for pid, process in living.items() if process.info["ppid"] in found and not carried[pid]
        }
    return {living[pid] for pid in found - {os.getpid()}}


def belongs(value: str, key: str) -> bool:
    """Whether who carries `value` is part of `key`."""
    return value == key or value.startswith(key + "/")


def end(key: str, mark: str = MARK, *, spared: Collection[psutil.Process] = ()) -> None:
    """SIGTERM to the raylets, which end their workers; then SIGKILL to all that is left, until nothing is.

    The order matters: a raylet whose agent got SIGTERM too takes 10 s to end, and a GCS may not heed it at all. What
    was a descendant at first is remembered, since it may have lost its parent by the time that it is looked for again.
    `spared` live on. ClusterError names the processes that do not end.
    """
    left = members(key, mark).difference(spared)
    raylets = {process for process in left if process.info["name"] == "raylet"}
    _signal(raylets, signal.SIGTERM)
    deadline = time.monotonic() + TERM_S
    while time.monotonic() < deadline and any(map(_lives, raylets)):
        time.sleep(0.02)
    deadline = time.monotonic() + KILL_S
    while left := {process for process in (left | members(key, mark)).difference(spared) if _lives(process)}:
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
