"""A Ray cluster on this machine for `rmctl demo`, `rmctl start --local` and the tests, and its complete end.

    starter ── launcher ── gcs_server, dashboard, monitor, raylet ── agents, workers ── whatever they start

The *launcher* (`rm.runtime.local_launcher`) is a process of its own because Ray reads its environment at import, and
because it is the watchdog: with `fate_share` it ends the cluster as soon as the starter is gone, however that died,
and if the launcher itself is killed, the kernel kills Ray's own processes (PR_SET_PDEATHSIG). Without `fate_share` it
leaves once Ray is up.

Every process of the cluster inherits MARK; what carries it, or descends from a carrier, is what `end` ends. That needs
SPT_NOENV: Ray renames its workers, and a renamed process otherwise overwrites the environment that /proc shows.

Nothing listens beyond loopback. Ray binds to loopback alone if a node's address is 127.0.0.1 to the letter, which
`ray start` never lets it be on Linux; so nodes are started through `ray.cluster_utils`.

Authentication is off unless RAY_AUTH_MODE=token is set for the starter. With a token, `ray job submit` in the same
shell would fail until that variable is set there too (Ray 2.60), which a new user can't know, and nobody from another
machine can connect anyhow. Users of the same machine can: where they aren't trusted, set RAY_AUTH_MODE=token.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from rm.errors import ClusterError, InvalidSpec

MARK = "RM_LOCAL_RAY"
READY = "ready.json"
OBJECT_STORE_BYTES = 512 * 2**20
TERM_S, KILL_S = 3.0, 10.0
_DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_RECORD = "local-ray.json"
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
_SOCKET_LIMIT = 107
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_", "RAY_JOB_")


@dataclass
class LocalRay:
    """One cluster that `start` started or `find` found. A context manager: leaving it stops the cluster.

    `address`: of the GCS, for `rm.connect`. `directory`: all that it writes; removed by `stop`. `real_gpus`: whether
    its GPUs are devices or only numbers. `record`, `default_file`: files elsewhere that name it, "" if none does.
    """

    key: str
    directory: str
    address: str = ""
    dashboard_url: str = ""
    gpus_per_node: list[int] = field(default_factory=list)
    gpus_found: int = 0
    gpu_type: str = ""
    real_gpus: bool = False
    record: str = ""
    default_file: str = ""

    def __post_init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(self.gpus_per_node)

    @classmethod
    def start(
        cls,
        num_gpus: int | None = None,
        num_cpus: int | None = None,
        nodes: int = 1,
        labels: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        *,
        temp_dir: str | Path = "/tmp",
        fate_share: bool = True,
        home: str | Path | None = None,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        dashboard_port: int = 0,
        timeout_s: float = 60.0,
    ) -> Self:
        """Start a head and `nodes - 1` more nodes; return when they are up (6 s, and 2 s for each further node).

        `num_gpus`, `num_cpus`: per node; None: the machine's own, divided among the nodes, or 4 logical GPUs each.
        `labels`: of every node, or one mapping per node. `object_store_bytes`: per node. `dashboard_port`: taken if it
        is free, else another. `fate_share`: the cluster ends with this process, and when this object is dropped;
        without it, it lives on, is recorded in `home` for `find`, and becomes the machine's default cluster (what
        `ray.init()`, `ray status` and `ray job submit` find) unless another one that runs is.

        Raises InvalidSpec (an argument) and ClusterError (one runs for `home` already; Ray did not start).
        """
        each = [labels or {}] * nodes if isinstance(labels, Mapping | None) else list(labels)
        for name, value, least in (("num_gpus", num_gpus, 0), ("num_cpus", num_cpus, 1), ("nodes", nodes, 1)):
            if value is not None and value < least:
                raise InvalidSpec(f"{name}: must be at least {least}, not {value}", field=name)
        if len(each) != nodes:
            raise InvalidSpec(
                f"labels: {len(each)} mappings for nodes={nodes}; give one each", field="labels"
            )
        if not fate_share and home is None:
            raise InvalidSpec("home: needed without fate_share, to find the cluster again", field="home")
        if home is not None and not fate_share and (running := cls.find(home)):
            raise ClusterError(
                f"a local Ray runs already at {running.address}; end it with `rmctl stop --local`"
            )
        local = cls(key=secrets.token_hex(8), directory=_new_directory(temp_dir))
        try:
            if home is not None and not fate_share:
                local._claim(Path(home, _RECORD).absolute())
            order = {
                **asdict(local),
                "num_gpus": num_gpus,
                "num_cpus": num_cpus,
                "labels": [dict(one) for one in each],
                "object_store_bytes": object_store_bytes,
                "dashboard_port": dashboard_port,
                "fate_share": fate_share,
            }
            local._launch(order, timeout_s)
        except BaseException:
            local.stop()
            raise
        return local

    def _claim(self, path: Path) -> None:
        """Record the cluster before there is one, so that none can ever be without a record."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x") as file:
                json.dump(asdict(self), file)
        except FileExistsError:
            raise ClusterError(f"another process is starting a local Ray for {path.parent}") from None
        self.record = str(path)

    def _launch(self, order: dict[str, Any], timeout_s: float) -> None:
        """Run the launcher and take over what it reports. ClusterError: it ended, or took too long."""
        package = str(Path(__file__).resolve().parents[2])
        code = (
            f"import sys; sys.path.insert(0, {package!r}); from rm.runtime.local_launcher import main; main()"
        )
        log, ready = Path(self.directory, "launcher.log"), Path(self.directory, READY)
        with log.open("wb") as output:
            self._launcher = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(order)],
                stdin=subprocess.PIPE if order["fate_share"] else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(self.key),
                start_new_session=True,  # Ctrl-C is for the starter, who then stops the cluster in order
            )
        deadline = time.monotonic() + timeout_s
        while not ready.exists():
            ended = self._launcher.poll() is not None
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"did not finish within {timeout_s:g} s"
                said = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
                raise ClusterError(f"Ray did not start: its launcher {why}, and said last: {said}")
            time.sleep(0.02)
        vars(self).update(json.loads(ready.read_bytes()))
        if not order["fate_share"]:
            self._launcher.wait()

    @classmethod
    def find(cls, home: str | Path) -> Self | None:
        """The cluster that was started for `home` and still runs. The remains of one that is gone are removed."""
        path = Path(home, _RECORD).absolute()
        try:
            local = cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"{path} can't be read ({error}); remove it") from error
        local.record = str(path)
        names = {process.info["name"] for process in members(local.key)}
        if local.address and {"gcs_server", "raylet"} <= names:
            return local
        if names and not local.address:
            raise ClusterError(
                f"another process is starting a local Ray for {home}; try again in a few seconds"
            )
        local.stop()
        return None

    def stop(self) -> None:
        """End every process of the cluster, and remove what it wrote. About 0.3 s; again: nothing happens.

        What runs in jobs is cut off: stop the allocator first to let it end. Raises ClusterError naming the processes
        that SIGKILL did not end.
        """
        self._detach()
        try:
            end(self.key)
        finally:
            if self._launcher is not None:
                if self._launcher.stdin:
                    self._launcher.stdin.close()
                self._launcher.wait(KILL_S)
        self.remove_files()

    def _detach(self) -> None:
        """Disconnect this process, since Ray would end a driver whose raylet dies."""
        ray = sys.modules.get("ray")
        if ray is not None and self.address and ray.is_initialized():
            port = self.address.rpartition(":")[2]
            if ray.get_runtime_context().gcs_address.endswith(f":{port}"):
                ray.shutdown()

    def remove_files(self) -> None:
        """Remove what the cluster wrote, and what names it. Called when no process of it is left."""
        with suppress(OSError):
            if self.default_file and Path(self.default_file).read_text() == default_name(self.address):
                Path(self.default_file).unlink()
        if self.record:
            Path(self.record).unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def describe_gpus(self) -> str:
        """What the GPUs of this cluster are, in one sentence."""
        where = "" if len(self.gpus_per_node) == 1 else f" on {len(self.gpus_per_node)} nodes"
        if self.real_gpus:
            return (
                f"{self.num_gpus} of {self.gpus_found} real GPUs ({self.gpu_type or 'type unknown'}){where}"
            )
        found = f"only {self.gpus_found} found" if self.gpus_found else "no GPU found"
        return f"{found}: {self.num_gpus} logical GPUs{where}, accounting only"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def default_name(address: str) -> str:
    """How the machine's default cluster is named in Ray's file, for a cluster that is bound to loopback.

    Ray replaces "127.0.0.1" and "localhost" by the machine's outward address before it connects, and would find nothing
    there. It leaves the name in capitals alone.
    """
    return address.replace("127.0.0.1", "LOCALHOST")


def _environment(key: str) -> dict[str, str]:
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
        "AUTOSCALER_METRIC_PORT": str(_free_port()),
        "DASHBOARD_METRIC_PORT": str(_free_port()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _new_directory(temp_dir: str | Path) -> str:
    """A directory that only this user can enter; what Ray makes in it is open to all."""
    directory = tempfile.mkdtemp(prefix="rm-ray-", dir=temp_dir)
    if len(os.fsencode(directory + _SOCKET)) > _SOCKET_LIMIT:
        Path(directory).rmdir()
        raise InvalidSpec(
            f"temp_dir: {temp_dir} is too long for the names of sockets; use /tmp", field="temp_dir"
        )
    return directory


# --- the end ---------------------------------------------------------------------------------------------------


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
