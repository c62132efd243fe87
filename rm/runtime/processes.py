"""The runner's side of the keeper: start the ranks of an attempt, wait for them, stop them.

`Launched` is the only way in which user code is started. Its promise: when `wait` returns, no process of the
attempt is alive on this machine, and no zombie and no file descriptor is left in the runner, however the
attempt ended. `rm.runtime.keeper` explains how.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rm.runtime import keeper
from rm.runtime.nursery import Nursery, Talk

ATTEMPT_KEY = keeper.ATTEMPT_KEY
"""The environment variable that marks every process of an attempt; `sweep` finds them by it."""

SWEEP_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class RankProcess:
    """What to run as one rank. `env` is the whole environment, with ATTEMPT_KEY; paths are absolute.

    `stdout` and `stderr` are appended to and may be one file. `argv[0]` is looked up on the PATH of `env`.
    """

    rank: int
    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)  # may hold secrets
    cwd: str
    stdout: str
    stderr: str
    entry: tuple[str, str] | None = None
    """The arguments of `rm.runtime.entry`, where `argv` is nothing but that: its keeper may be able to do without a new
    interpreter."""
    direct: tuple[str, ...] = ()
    """What `argv`, a shell's, comes to without the shell, a program's path and its words: tried first."""
    checkpoint_dir: str = ""
    """Made by the rank itself, since it may be on a disk of the network that nobody else is to wait for."""


_ORDERED = tuple(each.name for each in fields(RankProcess))


@dataclass(frozen=True, slots=True)
class RankExit:
    """How one rank ended, at unix time `at`: exit code, or signal, or the error that kept it from running.

    `error` is for the user and names what to fix. `error_kind`: command_not_found, bad_interpreter,
    permission, bad_format, bad_cwd, bad_output, bad_checkpoint_dir, too_large, no_process, not_started;
    stuck (it does not die: the node needs attention); keeper_lost (how it ended is unknown, and not the
    fault of user code).
    """

    rank: int
    code: int | None
    signal: int | None
    error: str | None
    error_kind: str | None
    at: float

    @property
    def failed(self) -> bool:
        """Whether this is anything but a clean exit with 0."""
        return self.code != 0

    @property
    def signal_name(self) -> str | None:
        """The signal as people write it, "SIGKILL", or None."""
        if self.signal is None:
            return None
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            return f"signal {self.signal}"  # real-time signals have no names of their own


@dataclass(frozen=True, slots=True)
class LaunchOutcome:
    """How the ranks of one bundle ended, in the order of `procs`.

    `first_failed` is the rank that failed first by itself: None if all went well, if they were stopped or
    killed, or if the keeper was lost. `leftovers_killed` counts processes that were killed besides the ranks.
    `stuck` are the pids that did not die of SIGKILL in time: they may still hold the GPU.
    """

    exits: tuple[RankExit, ...]
    first_failed: int | None
    leftovers_killed: int
    stuck: tuple[int, ...] = ()


class Launched:
    """The ranks of one attempt on one node, alive or ended. Made by `start`; used by one event loop.

    If the runner dies, or just drops its end of the pipe, everything that was started is killed at once.
    """

    def __init__(self, attempt: str, procs: Sequence[RankProcess], nursery: Nursery, talk: Talk) -> None:
        self.attempt = attempt
        self._procs = tuple(procs)
        self._nursery = nursery
        self._talk = talk
        self._pids: dict[int, int] = {}
        self._exits: dict[int, RankExit] = {}
        self._ready: dict[str, Any] = {}
        self._unborn = 0
        """The errno with which no keeper could be made."""
        self._all_reported = asyncio.Event()
        self._following = asyncio.create_task(self._follow(), name=f"follow keeper of {attempt}")

    @classmethod
    async def start(
        cls,
        attempt: str,
        procs: Sequence[RankProcess],
        grace_s: float,
        nursery: Nursery,
        scratch: Sequence[str] = (),
    ) -> Launched:
        """Start all ranks and return once each has begun to run user code or has failed to.

        Failures are told by `wait` and not raised here, except: ValueError if `procs` breaks its contract,
        OSError if this machine cannot start one more process. Cancelled, it kills what it has started.
        `scratch`: directories that the keeper removes where the caller's process dies, now or while the keeper waits.
        """
        _check(procs)
        launched = cls(attempt, procs, nursery, await nursery.keeper(attempt))
        # Not `asdict`, which copies all of an environment that is only to be written down.
        ranks = [{name: getattr(each, name) for name in _ORDERED} for each in procs]
        launched._send({"grace_s": grace_s, "scratch": scratch, "stay": True, "procs": ranks})
        try:
            await launched._all_reported.wait()
        except asyncio.CancelledError:
            launched.kill()
            raise
        if launched._unborn:
            raise OSError(launched._unborn, os.strerror(launched._unborn))
        return launched

    @property
    def pids(self) -> dict[int, int]:
        """Process id by rank, of the ranks that did start."""
        return dict(self._pids)

    @property
    def keeper_pids(self) -> tuple[int, ...]:
        """The keeper and its guard, for diagnosis and for tests. Empty if they never came up."""
        return (self._ready["keeper"], self._ready["guard"]) if self._ready else ()

    async def wait(self) -> LaunchOutcome:
        """Wait until nothing of the attempt is left. May be called by many, and be cancelled."""
        return await asyncio.shield(self._following)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to each rank's process group, SIGKILL to all that is left after `grace_s`. Does not wait.

        Again: nothing new, but a shorter grace counts. After the end: nothing.
        """
        self._send({"do": "stop", "grace_s": grace_s})

    def kill(self) -> None:
        """SIGKILL to every process of the attempt, at once. Does not wait; after the end: nothing."""
        self._send({"do": "kill"})

    def _send(self, message: dict[str, Any]) -> None:
        if not self._following.done():
            self._talk.tell(json.dumps({"attempt": self.attempt, **message}).encode() + b"\n")

    async def _follow(self) -> LaunchOutcome:
        """Turn the keeper's lines into the outcome. Runs as a task of its own for as long as the attempt."""
        last: dict[str, Any] = {}
        wanted = False
        try:
            while not last.get("waits") and (line := await self._talk.line()):
                last = self._take(json.loads(line))
            wanted = "waits" in last and self._nursery.take_back(self._talk)
        finally:
            if not wanted:
                self._talk.close()  # also when this event loop ends early: the keeper then kills all
            self._all_reported.set()
        swept = 0
        if last.get("event") != "done" or not self._ready.get("subreaper"):
            keys = {each.env[ATTEMPT_KEY] for each in self._procs}
            swept = sum([await asyncio.to_thread(sweep, key) for key in keys])
        return LaunchOutcome(
            exits=tuple(self._exits.get(each.rank) or _never_told(each.rank, last) for each in self._procs),
            first_failed=last.get("first_failed"),
            leftovers_killed=last.get("leftovers_killed", 0) + swept,
            stuck=tuple(last.get("stuck", ())),
        )

    def _take(self, event: dict[str, Any]) -> dict[str, Any]:
        """Note what one line of the keeper says."""
        match event["event"]:
            case "unborn":
                self._unborn = event["errno"]
            case "ready":
                self._ready = event
            case "started":
                self._pids[event["rank"]] = event["pid"]
            case "exited":
                rank = next(each for each in self._procs if each.rank == event["rank"])
                error = event["error"]
                kind, text = _explain(rank, error["step"], error["errno"]) if error else (None, None)
                self._exits[rank.rank] = RankExit(
                    rank.rank, event["code"], event["signal"], text, kind, event["at"]
                )
        if len(self._pids.keys() | self._exits.keys()) == len(self._procs):
            self._all_reported.set()
        return event


def sweep(key: str) -> int:
    """SIGKILL every process here whose environment has RM_ATTEMPT_KEY=key, except the caller; say how many.

    The backstop for when keeper and guard were both killed: it knows processes by their mark, not by descent,
    and repeats until none is found. Blocks for milliseconds, SWEEP_LIMIT_S at most. A process that has
    overwritten its environment, or that this user may not read, is not seen.
    """
    if not key:
        raise ValueError("sweep: the key is empty, which would match processes of nobody's attempt")
    killed: dict[int, keeper.Process] = {}
    give_up = time.monotonic() + SWEEP_LIMIT_S
    while True:
        found = [pid for pid in keeper.all_pids() if pid != os.getpid() and _carries(pid, key)]
        for pid in found:
            process = keeper.read_process(pid)
            if process and keeper.signal_exactly(pid, signal.SIGKILL, _still_carries(pid, key)):
                killed[pid] = process
        # A dying process loses its environment before it lets go of its GPU: wait for the whole of its death.
        if not found and not any(keeper.lives_on(process) for process in killed.values()):
            return len(killed)
        if time.monotonic() >= give_up:
            return len(killed)
        time.sleep(0.005)  # then look again for what was forked meanwhile


def _carries(pid: int, key: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"\0" + f"{ATTEMPT_KEY}={key}".encode() + b"\0" in b"\0" + environment + b"\0"


def _still_carries(pid: int, key: str) -> Callable[[], bool]:
    return lambda: _carries(pid, key)


def _check(procs: Sequence[RankProcess]) -> None:
    """Hold the caller to `RankProcess`, where a breach would fail later and less clearly."""
    if not procs:
        raise ValueError("procs: empty, there is nothing to start")
    if len({each.rank for each in procs}) != len(procs):
        raise ValueError(f"procs: a rank is named twice in {[each.rank for each in procs]}")
    for each in procs:
        if not each.argv:
            raise ValueError(f"procs[rank {each.rank}].argv: empty, there is no command to run")
        if not each.env.get(ATTEMPT_KEY):
            raise ValueError(
                f"procs[rank {each.rank}].env: {ATTEMPT_KEY} is missing, sweep could not find it"
            )
        for name in ("cwd", "stdout", "stderr"):
            path = getattr(each, name)
            if not Path(path).is_absolute():
                raise ValueError(f"procs[rank {each.rank}].{name}: {path!r} is not an absolute path")


def _never_told(rank: int, last: dict[str, Any]) -> RankExit:
    """The exit of a rank of which the keeper said nothing."""
    if last.get("event") == "done":
        text = f"rank {rank}: stopped before it was started"
        return RankExit(rank, None, None, text, "not_started", time.time())
    how = "ended unexpectedly"
    if last.get("signal"):
        how = f"was killed by signal {last['signal']}"
    elif last.get("code"):
        how = f"failed with exit code {last['code']}"
    text = (
        f"rank {rank}: the process that watches it {how}, so this rank was killed as well. A signal 9 "
        "that nobody sent is mostly the kernel short of memory: see `dmesg` on the node."
    )
    return RankExit(rank, None, None, text, "keeper_lost", time.time())


def _explain(rank: RankProcess, step: str, number: int) -> tuple[str, str]:
    """Kind and message for a rank that never ran user code, or that cannot be ended; it names what to fix."""
    why = os.strerror(number)
    match step:
        case "exec":
            kind, text = _explain_exec(rank, number)
        case "cwd":
            kind = "bad_cwd"
            text = f"cannot enter the working directory {rank.cwd!r} on this node: {why}. "
            text += "Create it on every node, or ship it with runtime_env working_dir."
        case "output":
            kind = "bad_output"
            text = f"cannot open its log files {rank.stdout!r} and {rank.stderr!r}: {why}. "
            text += "Check the directory's owner and the free space on this node."
        case "checkpoint":
            kind = "bad_checkpoint_dir"
            text = f"cannot make the checkpoint directory {rank.checkpoint_dir!r} on this node: "
            if number == errno.ELOOP:
                text += "it is a link, and checkpoints stay below RM_CHECKPOINT_ROOT: remove it."
            else:
                text += f"{why}. RM_CHECKPOINT_ROOT has to be a directory that every node can write to."
        case "kill":
            kind = "stuck"
            text = (
                f"it did not die within {keeper.REAP_LIMIT_S:.0f} s of SIGKILL: it hangs in the kernel, in a "
            )
            text += "driver or a file system. Drain this node and look at `dmesg`."
        case _:
            kind = "no_process"
            text = f"no process could be made: {why}. This node lacks memory or processes (`ulimit -u`)."
    return kind, f"rank {rank.rank}: {text}"


def _explain_exec(rank: RankProcess, number: int) -> tuple[str, str]:
    """What exec's errno means for the user's command."""
    name = rank.argv[0]
    run_it = f"start it through its interpreter, as in `python {name}`."
    if number in {errno.ENOENT, errno.ENOTDIR}:
        if "/" not in name:
            text = (
                f"command {name!r} was not found on PATH ({rank.env.get('PATH', os.defpath)}). Install it on "
            )
            return (
                "command_not_found",
                text + "the node or in the job's runtime_env, or give its absolute path.",
            )
        if Path(rank.cwd, name).exists():
            text = f"{name!r} exists, but the interpreter in its '#!' line does not. Mend that line."
            return "bad_interpreter", text
        text = f"{name!r} does not exist on this node (working directory {rank.cwd!r}). "
        return "command_not_found", text + "Check the path, or ship the file with runtime_env working_dir."
    if number == errno.EACCES:
        return "permission", f"{name!r} may not be executed. Run `chmod +x` on it, or {run_it}"
    if number == errno.ENOEXEC:
        return (
            "bad_format",
            f"{name!r} is no program of this machine and has no '#!' line. Add one, or {run_it}",
        )
    if number == errno.E2BIG:
        return (
            "too_large",
            "its arguments and environment exceed the system's limit. Pass the data in a file.",
        )
    text = f"{name!r} could not be started: {os.strerror(number)}. "
    return "not_started", text + "Check the job's command and env for characters such as NUL."
