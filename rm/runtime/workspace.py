"""What a bundle's processes find around them: a scratch directory, their code, their environment.

No Ray here: the runner fetches the blobs and hands them in. The scratch directory is removed when the run ends, or
emptied for the runner's next one (`Spare`); if the runner is killed before that, its keeper removes it, or a later run
on the node (`clear_stale`).
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from rm.core.model import Kind
from rm.errors import ClusterError
from rm.plain import plain
from rm.runtime.orders import RunOrder
from rm.runtime.processes import ATTEMPT_KEY, RankProcess
from rm.runtime.simple_commands import without_shell

OWNER_FILE = "runner.pid"
WORK = "work"
EMPTIED_BYTES = 1 << 20
"""A file that is longer is removed in a thread."""
_LOG = re.compile(r"rank-[0-9]+\.(out|err)")
_OURS = ("payload.pkl", "result.pkl", "report-", "stop")
NAMELESS_S = 3_600.0
"""A directory that names no owner for so long is nobody's."""
STALE_LOOK_S = 10.0
"""Between two looks of a runner for what others have left."""
_HOME = Path(__file__).resolve().parents[2]
_SHIPPED = not {"site-packages", "dist-packages"}.intersection(_HOME.parts)
_RAY_WORKER_VARIABLES = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "RAY_LD_PRELOAD_ON_WORKERS",
                         "RAY_JOB_CONFIG_JSON_ENV_VAR")  # fmt: skip
"""Set by Ray for its own worker. A training script that starts Ray itself must not inherit them."""


def scratch_root() -> Path:
    return Path(tempfile.gettempdir()) / f"ray-rm-{os.getuid()}"


class Spare:
    """A runner's scratch directory that is empty at present, with the empty logs of the last attempt.

    Files and directories that are made and removed again and again are among the slowest things that a runner does: a
    file system looks long for a number that was not in use a moment ago.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def take(self, path: Path) -> bool:
        """Make it the directory `path`. False where there is none."""
        spare, self._path = self._path, None
        if spare is None:
            return False
        try:
            spare.rename(path)
        except OSError:
            shutil.rmtree(spare, ignore_errors=True)
            return False
        return True

    def keep(self, path: Path) -> bool:
        """Empty the directory `path` and keep it. False where it has to be removed: one is enough, or it holds more.

        Nobody may be left who could write there.
        """
        if self._path is not None:
            return False
        spare = spare_path(path.parent)
        try:
            if not _emptied(path):
                return False
            path.rename(spare)
        except OSError:
            return False
        self._path = spare
        return True


def spare_path(root: Path) -> Path:
    """Where this process keeps its spare."""
    return root / f"spare-{os.getpid()}"


def _emptied(path: Path) -> bool:
    """Empty an attempt's logs, and remove small files of ours. False where it is not as it was made, or holds much."""
    if not _is_private_directory(path.lstat()):
        return False
    missing, logs, others = {WORK, OWNER_FILE}, [], []
    with os.scandir(path) as entries:
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            missing.discard(entry.name)
            if entry.name == WORK:
                if not _is_private_directory(found) or os.listdir(entry.path):  # noqa: PTH208 - names will do
                    return False
                continue
            ours = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.getuid()
            if not ours or found.st_size > EMPTIED_BYTES:
                return False
            if entry.name == OWNER_FILE:
                if Path(entry.path).read_bytes() != _owner():
                    return False
            elif _LOG.fullmatch(entry.name):
                if found.st_mode & 0o7133 or found.st_mode & 0o600 != 0o600 or _is_held(entry.path):
                    return False
                logs.append((entry.path, found.st_size))
            elif entry.name.startswith(_OURS):
                others.append(entry.path)
            else:
                return False
    if missing:
        return False
    for log, size in logs:
        if size:
            os.truncate(log, 0)
    for other in others:
        os.unlink(other)  # noqa: PTH108 - as above
    return True


def _is_private_directory(found: os.stat_result) -> bool:
    return found.st_mode == stat.S_IFDIR | 0o700 and found.st_uid == os.getuid()


def _is_held(log: str) -> bool:
    """Whether somebody can still write to the file: the kernel grants no lease for reading then."""
    handle = os.open(log, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Whoever opens it in this very moment would have SIGIO sent, which kills.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True  # or there are no leases here, and it can't be told
    finally:
        os.close(handle)
    return False


def _owner() -> bytes:
    return str(os.getpid()).encode()


class Workspace:
    """The files of one bundle of one attempt on one node."""

    _look_at = 0.0
    """When this process looks again for what others have left: for each attempt it would take too long."""

    def __init__(self, order: RunOrder, root: Path | None = None, spare: Spare | None = None) -> None:
        self.order = order
        self._spare = spare or Spare()
        self.path = (root or scratch_root()) / order.key
        self.stop_file = self.path / "stop"
        self.payload = self.path / "payload.pkl"
        self.result = self.path / "result.pkl"
        self._code = self.path / WORK

    def create(self, payload: bytes | None, working_dir: bytes | None) -> None:
        """Lay the files out. Raises ClusterError where this node can't give what was asked."""
        require_own(self.path.parent)
        if not self._spare.take(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            for directory in (self.path, self._code):
                directory.mkdir(mode=0o700)
            (self.path / OWNER_FILE).write_bytes(_owner())
        if payload is not None:
            self.payload.write_bytes(payload)
        if working_dir is not None:
            unpack(working_dir, self._code)

    def give_back(self) -> bool:
        """Empty it for the next, where that takes no time. False: it has to be removed."""
        return self._spare.keep(self.path)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def is_look_due(self) -> bool:
        """Whether it is time for `clear_stale` again. Says so once for each time."""
        if time.monotonic() < Workspace._look_at:
            return False
        Workspace._look_at = time.monotonic() + STALE_LOOK_S
        return True

    def ask_to_stop(self) -> None:
        """Make `rm.should_stop()` true for every rank."""
        if self.path.is_dir():
            self.stop_file.touch()

    def directory(self) -> str:
        """Where the processes start: the shipped working directory, else the submitter's own, else scratch."""
        order = self.order
        if order.working_dir_sha256 or not order.cwd:
            return str(self._code)
        if Path(order.cwd).is_dir():
            return order.cwd
        if order.kind is Kind.FUNCTION:
            return str(self._code)  # a function by value needs no files
        raise ClusterError(
            f"the directory {order.cwd} of the submitter does not exist on this node: "
            'ship it with working_dir="." (rmctl: --working-dir .), or keep it on a shared file system',
            field="working_dir",
        )

    def log_path(self, rank: int, stream: str) -> Path:
        return self.path / f"rank-{rank}.{stream}"

    def report_path(self, rank: int) -> Path:
        return self.path / f"report-{rank}.json"

    def processes(self) -> list[RankProcess]:
        order, cwd, argv = self.order, self.directory(), self._argv()
        envs = [self._environment(local, cwd) for local in range(order.local_world)]
        return [
            RankProcess(
                rank=order.first_rank + local,
                argv=argv,
                env=env,
                cwd=cwd,
                stdout=str(self.log_path(order.first_rank + local, "out")),
                stderr=str(self.log_path(order.first_rank + local, "err")),
                entry=(str(self.payload), str(self.result)) if order.kind is Kind.FUNCTION else None,
                direct=without_shell(argv, env),
                checkpoint_dir=order.checkpoint_dir,
            )
            for local, env in enumerate(envs)
        ]

    def _argv(self) -> tuple[str, ...]:
        if self.order.kind is Kind.FUNCTION:
            return (sys.executable, "-m", "rm.runtime.entry", str(self.payload), str(self.result))
        return self.order.command

    def _environment(self, local: int, cwd: str) -> dict[str, str]:
        """A fresh environment: the node's own, what torchrun would set, what `rm.context` reads, the user's."""
        order = self.order
        rank = order.first_rank + local
        env = {key: value for key, value in os.environ.items() if key not in _RAY_WORKER_VARIABLES}
        env.pop("OMP_NUM_THREADS", None)  # Ray's guess from num_cpus, not the user's
        if threads := _threads(order):
            env["OMP_NUM_THREADS"] = str(threads)
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [_own_code(cwd), env.get("PYTHONPATH", "")]))
        env["PYTHONUNBUFFERED"] = "1"  # a log that lags behind by a buffer helps nobody
        env |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(order.world),
            "LOCAL_WORLD_SIZE": str(order.local_world),
            "GROUP_RANK": str(order.bundle),
            "GROUP_WORLD_SIZE": str(order.bundles),
            "MASTER_ADDR": order.master_address,
            "MASTER_PORT": str(order.master_port),
        }
        env["PWD"] = cwd
        env |= order.env
        env |= {
            ATTEMPT_KEY: order.key,
            "RM_JOB_ID": order.job_id,
            "RM_ATTEMPT": f"{order.job_id}.{order.attempt}",
            "RM_CHECKPOINT_DIR": order.checkpoint_dir,
            "RM_STOP_FILE": str(self.stop_file),
            "RM_REPORT_FILE": str(self.report_path(rank)),
        }
        if order.array_index is not None:
            env |= {"RM_ARRAY_INDEX": str(order.array_index), "RM_ARRAY_SIZE": str(order.array_size)}
        if not env["PYTHONPATH"]:
            del env["PYTHONPATH"]
        return env


def unpack(archive: bytes, into: Path) -> None:
    """Unpack a zipped directory, keeping permissions. Only files and directories below `into`; all else is an error."""
    root = into.resolve()
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for member in files.infolist():
            target = (root / member.filename).resolve()
            if not target.is_relative_to(root):
                raise ClusterError(
                    f"the working directory's archive holds a path outside it: {plain(member.filename)}"
                )
            # 0 is what archives say that know no kinds. We never pack a link: what it points to travels.
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ClusterError(
                    "the working directory's archive holds a link or a device, which it may not: "
                    f"{plain(member.filename)}"
                )
            files.extract(member, root)
            mode = (member.external_attr >> 16) & 0o777
            if mode and not member.is_dir():
                target.chmod(mode | 0o600)


def require_own(root: Path) -> None:
    """Make the directory, and be sure that it is ours. Raises ClusterError."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        # Its name is known beforehand, and the temporary directory is everybody's.
        raise ClusterError(
            f"{root} is a link or another user's, who could then change what jobs run: remove it, or set TMPDIR "
            "where Ray is started"
        )


def clear_stale(root: Path) -> None:
    """Remove scratch directories whose runner is gone: it was killed before it could."""
    for path in root.iterdir():
        try:
            owner = int((path / OWNER_FILE).read_text())
        except (OSError, ValueError):
            if _is_old(path):  # else it may be being made this moment
                shutil.rmtree(path, ignore_errors=True)
            continue
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _is_old(path: Path) -> bool:
    try:
        return path.lstat().st_mtime < time.time() - NAMELESS_S
    except OSError:
        return False  # gone


def _threads(order: RunOrder) -> int | None:
    """OMP threads per rank: the bundle's CPUs shared out; 1 for several ranks, as torchrun; else the default."""
    if order.cpus:
        return max(1, int(order.cpus / order.local_world))
    return 1 if order.local_world > 1 else None


def _own_code(cwd: str) -> str:
    """The directory to import `rm` from, where it is not installed but was shipped; else ''."""
    return str(_HOME) if _SHIPPED and str(_HOME) != cwd else ""
