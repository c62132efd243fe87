"""The keeper: starts the ranks of one attempt on one node, signals them, and leaves nothing of them behind.

Run by path as `python -I -S keeper.py ATTEMPT` by `rm.runtime.processes.Launched`. Standard library only,
one file and few imports, because its start-up can be part of a job's start-up. Each attempt has two
processes of it:

    runner ── guard ── keeper ── rank 0, rank 1, … ── whatever user code forks

A Python takes longer to start than most else between two jobs. So a runner starts one *nursery*, `python -I -S
keeper.py --nursery`, which forks a guard for each attempt (`rm.runtime.nursery` is the runner's side). It is the
runner's child in the guards' place, and nothing depends on its life: guards and keepers are told of the runner's
own death, and go on without a nursery.

The *keeper* does the work. The *guard* only waits for it: if the keeper is killed, the guard inherits every
descendant and kills it. The keeper is not the runner's direct child, because Ray kills an actor's direct
children, and only those, when it ends the actor: that ends the guard, while the keeper sees its runner go
and cleans up. Both are child subreapers: a daemonised grandchild is re-parented to them and stays findable.
So whichever one of runner, guard and keeper is killed, nothing of the attempt outlives it by more than a
moment. If guard and keeper are killed at once, the ranks die by PR_SET_PDEATHSIG and `processes.sweep`
finds the rest.

Where prctl fails (no Linux, a seccomp filter) ranks run all the same; a daemonised grandchild then escapes
to init, `ready` says `"subreaper": false`, and `Launched` sweeps by environment mark at the end.

JSON lines in: first {"attempt", "grace_s", "scratch", "stay", "procs": [a `processes.RankProcess` each]},
then {"do": "stop", "grace_s"} or {"do": "kill"}. {"do": "mind", "directories"}: what else to remove when the runner has
died. End of input means that it has, or, after {"do": "leave"}, that it needs this keeper no more: kill at once.
JSON lines out: ready (or unborn), started, exited, and last `done` (by the keeper) or `lost` (by the guard: the keeper
was killed). `error` in exited is the step and the errno that kept user code from starting; `processes`
words them.

An order with "stay" asks guard and keeper to wait for another one where nothing of this one is left: three forks of a
Python in advance of each attempt would cost more than all that the attempt itself needs of us. `done` then has "waits".
What is meant for an attempt can come when it is over: "attempt" in stop and kill says for which one it is.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # importing typing would cost milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

ATTEMPT_KEY = "RM_ATTEMPT_KEY"  # the environment variable that marks every process of an attempt
IDLE_NAME = b"rm-keeper"  # as ps shows a keeper that has no attempt at present
RUNNER_ENDS_S = 1.0
REAP_LIMIT_S = 10.0  # how long a SIGKILLed process may take to die before it is reported as stuck
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ALL_SIGNALS = frozenset(
    map(int, signal.valid_signals())
)  # as plain numbers: each look at an enum costs a fork's pages


def _load_prctl() -> Callable[..., int] | None:
    """libc's prctl, or None where there is none. Loaded before any fork: a forked child only calls it."""
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    return prctl


_prctl = _load_prctl()


def set_process_option(option: int, value: int) -> bool:
    """prctl(option, value). False where the system refuses it: the caller does without."""
    return _prctl is not None and _prctl(option, value, 0, 0, 0) == 0


def call_oneself(name: bytes) -> None:
    """Be shown under this name, of 15 bytes at most, by ps and top."""
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:  # noqa: PTH123 - pathlib is a slow import
            file.write(name[:15])
    except OSError:
        pass  # a convenience


class Process:
    """One process as /proc shows it. `pid` and `started` (clock ticks since boot) name it for good."""

    __slots__ = ("group", "parent", "pid", "started", "state", "threads")

    def __init__(self, pid: int, stat: bytes) -> None:
        fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
        self.pid, self.state = pid, fields[0].decode()
        self.parent, self.group = int(fields[1]), int(fields[2])
        self.threads, self.started = int(fields[17]), int(fields[19])

    @property
    def alive(self) -> bool:
        """Whether any thread of it still runs. A mere zombie holds neither memory nor a GPU."""
        return self.state not in "ZX" or self.threads > 1


def read_process(pid: int) -> Process | None:
    """The process that has this pid now, or None."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib is a slow import
            return Process(pid, file.read())
    except (OSError, ValueError):
        return None


def all_pids() -> list[int]:
    """Every process id of this pid namespace."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - as above


def descendants(root: int) -> list[Process]:
    """Children, grandchildren and so on of `root`, zombies included. A snapshot: callers repeat it."""
    children: dict[int, list[Process]] = {}
    for pid in all_pids():
        process = read_process(pid)
        if process is not None:
            children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    ahead = [root]
    while ahead:
        below = children.pop(ahead.pop(), [])
        found += below
        ahead += [process.pid for process in below]
    return found


def signal_exactly(pid: int, number: int, is_still_meant: Callable[[], bool]) -> bool:
    """Signal `pid` if `is_still_meant()` holds while a pidfd holds the process: safe against reused pids.

    Without pidfds (old kernel, gVisor) the check comes right before the signal. False: gone, or not meant.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except (OSError, AttributeError):
        handle = -1
    try:
        if not is_still_meant():
            return False
        if handle >= 0:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
        return True
    except OSError:
        return False
    finally:
        if handle >= 0:
            os.close(handle)


def lives_on(found: Process) -> bool:
    """Whether the process that was found is still alive, and not another that got its pid since."""
    now = read_process(found.pid)
    return now is not None and now.started == found.started and now.alive


def signal_process(found: Process, number: int) -> bool:
    """Signal the process that was found, and no other that got its pid since."""
    return signal_exactly(found.pid, number, lambda: lives_on(found))


def kill_descendants(
    reap: Callable[[], bool], leaders: Iterable[int] = (), *, subreaper: bool
) -> tuple[int, list[int]]:
    """SIGKILL and reap until this process has no child left. The last act of keeper and guard.

    `reap()` reaps what has ended and says whether children remain; to a subreaper, no child means no
    descendant. Takes REAP_LIMIT_S at most. Returns how many processes besides `leaders` were killed, and the
    pids that did not die in time.
    """
    ranks, killed = set(leaders), set()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # from here on it is waited for, not handled
    if subreaper and not reap():
        return 0, []  # as mostly: and /proc, which is long on a busy node, need not be read
    give_up, pause_s = time.monotonic() + REAP_LIMIT_S, 0.01
    while True:
        living = [process for process in descendants(os.getpid()) if process.alive]
        for process in living:
            if signal_process(process, signal.SIGKILL) and process.pid not in ranks:
                killed.add((process.pid, process.started))
        if not reap():
            return len(killed), []
        if time.monotonic() >= give_up:
            return len(killed), [process.pid for process in living]
        signal.sigtimedwait({signal.SIGCHLD}, pause_s)
        pause_s = min(2 * pause_s, 0.5)


def make_checkpoint_dir(path: str) -> None:
    """Make it, unless it is there. Others may have been first on a shared disk: a link leads files elsewhere."""
    try:
        os.mkdir(path)  # noqa: PTH102 - pathlib is a slow import
    except FileExistsError:
        if os.path.islink(path):  # noqa: PTH114 - as above
            raise OSError(errno.ELOOP, "a link", path) from None
        os.makedirs(path, exist_ok=True)  # noqa: PTH103 - as above
    except FileNotFoundError:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103 - as above


class Entered(BaseException):
    """Raised in a rank whose code this interpreter is to run: up through the frames of its keeper, which end here."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments)
        self.arguments = arguments


enter: Callable[[dict[str, Any]], bool] | None = None
"""In an interpreter that has preloaded what user code imports (`preloaded`): take on the order's environment. False
where that can't be done, and a new interpreter has to be started."""


class Rank:
    """One rank of the order: what to run, and how far it has come. `Keeper` alone uses it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.number: int = order["rank"]
        self.order = order
        self.pid = 0
        self.running = False  # forked and not yet reaped: so long its pid and group id are surely its own
        self.exec_pipe = -1  # end of file on it means that exec succeeded; -1 once that is known
        self.error: dict[str, Any] | None = None  # the step and errno that kept user code from starting
        self.keeps_grace = False  # SIGTERM ended the leader, a shell say, but maybe not its children

    def fork(self, handled: Iterable[int]) -> None:
        """Start the rank; how exec went arrives on `exec_pipe`. OSError: no process could be made.

        `handled`: the signals that are handled or ignored here, and are not to be there.
        """
        exec_pipe, report = os.pipe()
        keeper = os.getpid()
        # Blocked, so that a signal to the child before exec meets default handlers and not a copy of ours.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(keeper, report, handled)
        except OSError:
            os.close(exec_pipe)
            raise
        finally:
            os.close(report)  # at once: held by a later child, it would delay the end of file
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.exec_pipe, self.running = exec_pipe, True

    def _become(self, keeper: int, report: int, handled: Iterable[int]) -> NoReturn:
        """In the child: turn into user code, or report the step at which that failed. Never returns.

        Raises Entered where user code is to run in this very interpreter.
        """
        step, order = "fork", self.order
        try:
            os.setsid()
            set_process_option(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(1)  # the keeper died before PDEATHSIG was set: nobody would ever stop this rank
            for number in handled:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            step = "output"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            out = os.open(order["stdout"], flags, 0o644)
            err = out if order["stderr"] == order["stdout"] else os.open(order["stderr"], flags, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(err, 2)
            step = "checkpoint"
            if order.get("checkpoint_dir"):
                make_checkpoint_dir(order["checkpoint_dir"])
            step = "cwd"
            os.chdir(order["cwd"])
            step = "exec"
            if order.get("entry") and enter is not None and enter(order):
                raise Entered(order["entry"])
            if order.get("direct"):
                try:
                    os.execve(order["direct"][0], order["direct"][1:], order["env"])  # noqa: S606 - as below
                except OSError:
                    pass  # the shell is to say why
            os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606 - this is what was asked for
        except Entered:
            raise
        except BaseException as error:
            try:
                os.write(report, f"{step} {getattr(error, 'errno', None) or errno.EINVAL}".encode())
            finally:
                os._exit(127)

    def signal_group(self, number: int) -> None:
        """Signal the rank's whole process group, also if its leader has ended."""
        if not self.running:
            for process in descendants(os.getpid()):
                if process.group == self.pid and process.alive:
                    signal_process(process, number)
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            os.kill(self.pid, number)  # forked a moment ago: it has not made its group yet
        except PermissionError:
            pass  # the whole group has changed its user; kill_descendants will meet the same limit


class Runner:
    """The process that all this is done for: whether it lives, which an end of its lines does not tell."""

    def __init__(self) -> None:
        """Made by its child."""
        self.process = read_process(os.getppid())
        try:
            self.pidfd = os.pidfd_open(
                os.getppid()
            )  # tells of its death even if a fork of it holds our input open
        except (OSError, AttributeError):
            self.pidfd = -1

    def is_gone(self) -> bool:
        """Whether it has died, or does so within RUNNER_ENDS_S: its files are closed a moment before."""
        if self.process is None:
            return False
        give_up = time.monotonic() + RUNNER_ENDS_S
        while lives_on(self.process):
            if time.monotonic() >= give_up:
                return False
            time.sleep(0.005)
        return True


class Keeper:
    """The event loop: one thread, woken by the runner's lines, by signals and by reports of exec.

    `run` serves until all ranks have ended, the grace is over, a kill was ordered or the runner died,
    whichever comes first. When it returns, nothing of the attempt is alive, except for what it reported as
    stuck in the kernel.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.forget()
        # Directories to remove if the runner does not live to do it, also while we wait: the last attempt's, others.
        self.scratch: list[str] = []
        self.minded: list[str] = []
        self.guard = os.getppid()
        self.orphaned = False
        self.leaving = False  # asked to end by a signal
        self.inbox = b""
        self.heard_all = False
        self.wake, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *END_SIGNALS):
            signal.signal(number, lambda *_: None)  # what it carries comes through the wake-up pipe
        # Few of sixty, and the same for all ranks.
        self.handled = [
            number for number in ALL_SIGNALS if signal.getsignal(number) not in (signal.SIG_DFL, None)
        ]
        self.poll = select.poll()
        self.poll.register(self.wake, select.POLLIN)
        self.lifelines = {1, runner.pidfd} - {-1}  # these say nothing but that the runner is gone
        for fd in self.lifelines:
            self.poll.register(fd, select.POLLIN if fd == runner.pidfd else 0)
        self.poll.register(0, select.POLLIN)  # after them: an order of a runner that is gone is not begun

    def forget(self) -> None:
        """As before any order."""
        self.attempt = ""
        self.ranks: list[Rank] | None = None  # None until the order has come
        self.by_pid: dict[int, Rank] = {}
        self.starting: dict[int, Rank] = {}  # by exec_pipe
        self.grace_s = 0.0
        self.kill_at: float | None = None  # set: stopping; SIGKILL for all at this monotonic time
        self.first_failed: int | None = None
        self.stay = False

    def run(self) -> None:
        """One attempt, or one after the other."""
        subreaper = set_process_option(PR_SET_CHILD_SUBREAPER, 1)
        self.emit({"event": "ready", "keeper": os.getpid(), "guard": self.guard, "subreaper": subreaper})
        while self.serve(subreaper=subreaper):
            self.forget()
            call_oneself(IDLE_NAME)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # as `kill_descendants` leaves it

    def serve(self, *, subreaper: bool) -> bool:
        """Serve until only killing is left to do, then do that and say `done`. Whether another attempt may follow."""
        while not self.is_over():
            left_s = None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())
            for fd, _ in self.poll.poll(None if left_s is None else int(left_s * 1000) + 1):
                if fd == self.wake:
                    self.on_signals()
                elif fd == 0:
                    self.on_input()
                elif fd in self.starting:
                    self.on_exec(self.starting[fd])
                elif fd in self.lifelines:  # anything else is an exec_pipe that was dealt with in this round
                    self.orphaned = True
                    self.kill()
        self.kill_at = self.kill_at or 0.0  # whatever ends from now on did not fail by itself
        ranks = self.ranks or []
        killed, stuck = kill_descendants(self.reap, [rank.pid for rank in ranks], subreaper=subreaper)
        for rank in ranks:
            if rank.running:
                rank.error = {"step": "kill", "errno": 0}
                self.emit_exit(rank, None, None)
        if self.orphaned and self.may_remove():
            import shutil  # slow to import, and seldom needed

            for directory in [*self.scratch, *self.minded]:
                shutil.rmtree(directory, ignore_errors=True)
        done = {
            "event": "done",
            "first_failed": self.first_failed,
            "leftovers_killed": killed,
            "stuck": stuck,
        }
        unfit = stuck or self.starting or self.orphaned or self.leaving or os.getppid() != self.guard
        waits = self.stay and subreaper and not unfit
        self.emit(done | {"waits": True} if waits else done)
        return waits

    def may_remove(self) -> bool:
        """Whether nobody else will remove the directories: a living runner may have given them to an attempt."""
        while not self.heard_all and select.select([0], [], [], 0)[0]:
            self.on_input()  # it said that it leaves before it did
        return bool(self.scratch or self.minded) and self.runner.is_gone()

    def is_over(self) -> bool:
        """Whether only killing is left to do."""
        if self.kill_at is not None and (self.ranks is None or time.monotonic() >= self.kill_at):
            return True
        if self.ranks is None or any(rank.running for rank in self.ranks):
            return False
        groups = {rank.pid for rank in self.ranks if rank.keeps_grace}
        if not groups:
            return True
        return not any(found.group in groups and found.alive for found in descendants(os.getpid()))

    def emit(self, event: dict[str, Any]) -> None:
        """One line to the runner. All lines together fit the pipe's 64 KiB: a busy runner never blocks us."""
        try:
            os.write(1, json.dumps(event).encode() + b"\n")
        except OSError:
            self.orphaned = True
            self.kill()

    def on_input(self) -> None:
        """Lines from the runner; end of file means that it is dead."""
        try:
            got = os.read(0, 1 << 16)
        except OSError:
            got = b""
        if not got:
            self.heard_all = self.orphaned = True
            self.kill()
        *lines, self.inbox = (self.inbox + got).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "procs" in message and self.orphaned:
                self.scratch = message.get("scratch", [])  # what is left of an order that nobody waits for
            elif "procs" in message:
                self.start(message)
            elif message["do"] == "leave":
                self.scratch = self.minded = []
            elif message["do"] == "mind":
                self.minded = message["directories"]
            elif message.get("attempt", self.attempt) != self.attempt:
                continue
            elif message["do"] == "stop":
                self.stop(float(message["grace_s"]))
            else:
                self.kill()

    def on_signals(self) -> None:
        """SIGCHLD: reap. A signal that asks the keeper to end: stop the ranks with the order's grace."""
        if set(os.read(self.wake, 1 << 12)) - {signal.SIGCHLD}:
            self.leaving = True
            self.stop(self.grace_s)
        self.reap()

    def on_exec(self, rank: Rank) -> None:
        """Exec has succeeded, which is end of file, or failed at some step; then the exit follows."""
        report = os.read(rank.exec_pipe, 100)
        self.poll.unregister(rank.exec_pipe)
        del self.starting[rank.exec_pipe]
        os.close(rank.exec_pipe)
        rank.exec_pipe = -1
        if report:
            step, number = report.decode().split()
            rank.error = {"step": step, "errno": int(number)}
        else:
            self.emit({"event": "started", "rank": rank.number, "pid": rank.pid})

    def start(self, message: dict[str, Any]) -> None:
        """Fork every rank; their execs go on in parallel. One that cannot be forked fails like any other."""
        self.grace_s = float(message["grace_s"])
        self.scratch = message.get("scratch", [])
        self.stay = message.get("stay", False)
        self.attempt = message["attempt"]
        call_oneself(self.attempt.encode())
        self.ranks = [Rank(order) for order in message["procs"]]
        unborn: list[Rank] = []
        for rank in self.ranks:
            try:
                rank.fork(self.handled)
            except OSError as error:
                rank.error = {"step": "fork", "errno": error.errno}
                unborn.append(rank)
                continue
            self.by_pid[rank.pid] = self.starting[rank.exec_pipe] = rank
            self.poll.register(rank.exec_pipe, select.POLLIN)
        for rank in unborn:
            self.ended(rank, 0)

    def stop(self, grace_s: float) -> None:
        """SIGTERM to every group, once; SIGKILL after the grace. Asked again, only a shorter grace counts."""
        kill_at = time.monotonic() + grace_s
        if self.kill_at is not None:
            self.kill_at = min(self.kill_at, kill_at)
            return
        self.kill_at = kill_at
        for rank in self.ranks or []:
            if rank.pid:
                rank.signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """End the event loop at its next turn; `run` then kills all."""
        self.kill_at = 0.0

    def reap(self) -> bool:
        """Reap all that have ended: ranks, and orphans handed to us. False when no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            rank = self.by_pid.pop(pid, None)
            if rank is not None:
                self.ended(rank, status)

    def ended(self, rank: Rank, status: int) -> None:
        """Report a rank's end. The first that fails while nobody is stopping it takes its gang along."""
        rank.running = False
        if rank.exec_pipe in self.starting:
            self.on_exec(rank)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        rank.keeps_grace = self.kill_at is not None and number == signal.SIGTERM
        if rank.error:
            code = number = None
        self.emit_exit(rank, code, number)
        if code != 0 and self.kill_at is None:
            self.first_failed = rank.number
            self.stop(self.grace_s)

    def emit_exit(self, rank: Rank, code: int | None, number: int | None) -> None:
        self.emit(
            {
                "event": "exited",
                "rank": rank.number,
                "code": code,
                "signal": number,
                "at": time.time(),
                "error": rank.error,
            }
        )


def guard(keeper: int) -> None:
    """Wait for the keeper. If it did not end well, kill what it left, then tell the runner with `lost`."""
    os.close(0)
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: os.kill(keeper, signal.SIGTERM))
    subreaper = set_process_option(PR_SET_CHILD_SUBREAPER, 1)
    pid, status = os.wait()
    while pid != keeper:
        pid, status = os.wait()
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if status == 0:
        return

    def reap() -> bool:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True

    killed, stuck = kill_descendants(reap, subreaper=subreaper)
    event = {
        "event": "lost",
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "leftovers_killed": killed,
        "stuck": stuck,
    }
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except OSError:
        pass  # the runner is gone as well


def attend(runner: Runner) -> NoReturn:
    """Become guard and keeper of one attempt, input and output being 0 and 1."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, children would vanish unreaped
    os.setsid()  # out of the runner's session: what is sent to its terminal or its group is not for us
    keeper = os.fork()
    if keeper:
        guard(keeper)
    else:
        os.setsid()
        Keeper(runner).run()
    os._exit(0)  # nothing is buffered; tearing the interpreter down would only delay the next job


def nursery(runner: Runner) -> NoReturn:
    """Fork a guard for each attempt that the runner names on the socket 0. With the name come its input and output.

    Ends with the runner, whose end of the socket nobody else has. A guard that can't be forked is told of in that
    output, as `unborn`.
    """
    import socket

    requests = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # /dev/null, as the runner has made 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # guards that end are nobody's business
    os.setsid()
    while True:
        attempt, ends, _, _ = socket.recv_fds(requests, 256, 2)
        if len(ends) != 2:
            os._exit(0)
        try:
            forked = os.fork()
        except OSError as error:
            os.write(ends[1], json.dumps({"event": "unborn", "errno": error.errno}).encode() + b"\n")
        else:
            if not forked:
                requests.close()
                os.dup2(ends[0], 0)
                os.dup2(ends[1], 1)
                os.close(ends[0])
                os.close(ends[1])
                call_oneself(attempt)
                attend(runner)
        os.close(ends[0])
        os.close(ends[1])


def main(*, as_nursery: bool) -> NoReturn:
    """Become guard and keeper, or the nursery of both."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it was inherited closed: no later file may land on 0, 1 or 2
    os.close(spare)
    runner = Runner()
    if as_nursery:
        nursery(runner)
    attend(runner)


if __name__ == "__main__":
    main(as_nursery=sys.argv[1:] == ["--nursery"])
