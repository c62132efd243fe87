"""A Ray cluster on this machine for `rmctl demo`, `rmctl start --local` and the tests, and its complete end.

    starter ── launcher ── gcs_server, dashboard, monitor, raylet ── agents, workers ── whatever they start

The *launcher* (`rm.runtime.local_launcher`) is a process of its own because Ray reads its environment at import, and
because it is the watchdog: with `fate_share` it ends the cluster as soon as the starter is gone, however that died,
and if the launcher itself is killed, the kernel kills Ray's own processes (PR_SET_PDEATHSIG). Without `fate_share` it
leaves once Ray is up.

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from rm.errors import ClusterError, InvalidSpec
from rm.runtime.default_cluster import default_name, forget_default
from rm.runtime.local_processes import KILL_S, end, environment, members

READY = "ready.json"
OBJECT_STORE_BYTES = 512 * 2**20
FRESH_S = 5.0
"""A record of this age may well have no launcher yet."""
_RECORD = "local-ray.json"
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
_SOCKET_LIMIT = 107


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

    @property
    def ray_address(self) -> str:
        """What to set RAY_ADDRESS to for programs that use Ray without this package; see `default_name`."""
        return default_name(self.address)

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
        dashboard: bool = True,
        dashboard_port: int = 0,
        timeout_s: float = 60.0,
    ) -> Self:
        """Start a head and `nodes - 1` more nodes; return when they are up (6 s, and 2 s for each further node).

        `num_gpus`, `num_cpus`: per node; None: the machine's own, divided among the nodes, or 4 logical GPUs each.
        `labels`: of every node, or one mapping per node. `object_store_bytes`: per node. `dashboard`: without it there
        is no `ray job submit` and no web page, and a dozen processes less. `dashboard_port`: taken if it is free, else
        another. `fate_share`: the cluster ends with this process, and when this object is dropped;
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
            raise ClusterError(f"a local Ray runs already at {running.address}; end it with `rmctl stop`")
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
                "dashboard": dashboard,
                "dashboard_port": dashboard_port,
                "fate_share": fate_share,
                "starter": os.getpid(),
            }
            local._launch(order, timeout_s)
        except BaseException:
            local.stop()
            raise
        return local

    def _claim(self, path: Path) -> None:
        """Record the cluster before there is one, so that none can ever be without a record."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
                env=environment(self.key),
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
            # A clock that was set back must not make it fresh for as long as that.
            fresh = abs(time.time() - path.stat().st_mtime) < FRESH_S
            local = cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"{path} can't be read ({error}); remove it") from error
        local.record = str(path)
        alive = members(local.key)
        if local.address and {"gcs_server", "raylet"} <= {process.info["name"] for process in alive}:
            return local
        if not local.address and (fresh or any(_is_launcher(process) for process in alive)):
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
        forget_default(self.address, self.default_file)
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


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any("rm.runtime.local_launcher" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _new_directory(temp_dir: str | Path) -> str:
    """A directory that only this user can enter; what Ray makes in it is open to all."""
    directory = tempfile.mkdtemp(prefix="rm-ray-", dir=temp_dir)
    if len(os.fsencode(directory + _SOCKET)) > _SOCKET_LIMIT:
        Path(directory).rmdir()
        raise InvalidSpec(
            f"temp_dir: {temp_dir} is too long for the names of sockets; use /tmp", field="temp_dir"
        )
    return directory
