"""A Ray cluster on this machine for `rmctl demo`, `rmctl start --local` and the tests, and its complete end.

    starter ── launcher ── gcs_server, dashboard, monitor, raylet ── agents, workers ── whatever they start

The *launcher* is a process of its own because Ray reads its environment at import, and because it is the watchdog: with
`fate_share` it ends the cluster as soon as the starter is gone, however that died, and if the launcher itself is
killed, the kernel kills Ray's own processes (PR_SET_PDEATHSIG). Without `fate_share` it leaves once Ray is up.

Every process of the cluster inherits MARK from it, and what carries the mark or descends from a carrier is ended. That
needs SPT_NOENV: Ray renames its workers, and a renamed process would otherwise have overwritten its environment.

Nothing listens beyond loopback. Ray binds to loopback alone if the node's address is 127.0.0.1 to the letter, which
`ray start` never lets it be on Linux; so nodes are started through `ray.cluster_utils`.

Authentication is off unless RAY_AUTH_MODE=token is set for the starter. With a token, `ray job submit` in the same shell
would fail until that variable is set there too (Ray 2.60), and a new user has no reason to know it; nobody from
another machine can connect anyhow. Users of the same machine can: where they aren't trusted, set RAY_AUTH_MODE=token.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
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
LOGICAL_GPUS = 4
"""How many GPUs a node pretends to have if the machine has none and no number is asked for."""
OBJECT_STORE_BYTES = 512 * 2**20
REPORT_PERIOD_MS = 20
"""How often a raylet tells the GCS what is free. Ray's 100 ms delay the next placement group by as much."""
DASHBOARD_PORT = 8265
PARENT_CHECK_S = 0.5
TERM_S, KILL_S = 3.0, 10.0
_RECORD = "local-ray.json"
_LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_", "RAY_JOB_")


@dataclass
class LocalRay:
    """One cluster that `start` started or `find` found. A context manager: leaving it stops the cluster.

    `address`: of the GCS, for `rm.connect` and `attach`. `directory`: everything it writes; removed by `stop`.
    `gpus_found`: how many GPUs the machine has; `real_gpus`: whether those of the cluster are real.
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
    """The file that names this machine's default cluster, where it names this one."""

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
        timeout_s: float = 60.0,
    ) -> Self:
        """Start a head and `nodes - 1` more nodes, and return when they are up (about 6 s, and 2 s per further node).

        `num_gpus` and `num_cpus` are per node; None: what the machine has, divided among the nodes, or LOGICAL_GPUS
        each. `labels`: of every node, or one mapping per node. `fate_share`: the cluster ends with this process, or
        when this object is dropped; without it, the cluster lives on, becomes the machine's default if there is
        none that runs, takes port 8265 for its dashboard if that is free, and is recorded in `home` for `find`.

        Raises InvalidSpec (an argument) and ClusterError (one runs in `home` already; Ray did not start).
        """
        each = [labels] * nodes if isinstance(labels, Mapping) or labels is None else list(labels)
        for name, value, least in (("num_gpus", num_gpus, 0), ("num_cpus", num_cpus, 1), ("nodes", nodes, 1)):
            if value is not None and value < least:
                raise InvalidSpec(f"{name}: must be at least {least}, not {value}", field=name)
        if len(each) != nodes:
            raise InvalidSpec(f"labels: {len(each)} mappings for nodes={nodes}; give one per node", field="labels")
        if not fate_share and home is None:
            raise InvalidSpec("home: needed without fate_share, to find the cluster again", field="home")
        if home is not None and (running := cls.find(home)):
            raise ClusterError(f"A local Ray runs already at {running.address}; end it with `rmctl stop --local`.")
        directory = tempfile.mkdtemp(prefix="rm-ray-", dir=temp_dir)  # for this user alone; Ray's own is for all
        local = cls(key=secrets.token_hex(8), directory=directory)
        order = {
            **asdict(local),
            "num_gpus": num_gpus,
            "num_cpus": num_cpus,
            "labels": [dict(one or {}) for one in each],
            "fate_share": fate_share,
            "object_store_bytes": object_store_bytes,
            "record": str(Path(home, _RECORD).absolute()) if home is not None and not fate_share else "",
        }
        try:
            if len(directory + _LONGEST_SOCKET) > 107:
                raise InvalidSpec(
                    f"temp_dir: {temp_dir} is too long for the names of sockets (107 bytes); use /tmp", field="temp_dir"
                )
            local._launch(order, timeout_s)
        except BaseException:
            local.stop()
            raise
        return local

    def _launch(self, order: dict[str, Any], timeout_s: float) -> None:
        """Run the launcher and take over what it reports. ClusterError: it ended, or took too long."""
        package = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {package!r}); from rm.runtime.local import launch; launch(sys.argv[1])"
        ready, log = Path(self.directory, "ready.json"), Path(self.directory, "launch.log")
        with log.open("wb") as output:
            self._launcher = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(order)],
                stdin=subprocess.PIPE if order["fate_share"] else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(self.key, self.directory),
                start_new_session=True,  # Ctrl-C is for the starter, who then stops the cluster in order
            )
        deadline = time.monotonic() + timeout_s
        while not ready.exists():
            if self._launcher.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()[-3:]
                ended = "ended" if self._launcher.returncode is not None else f"is not up after {timeout_s:g} s"
                raise ClusterError(f"Ray did not start: its launcher {ended}. It last said: {' | '.join(said)}")
            time.sleep(0.02)
        vars(self).update(json.loads(ready.read_bytes()))
        if not order["fate_share"]:
            self._launcher.wait()

    @classmethod
    def find(cls, home: str | Path) -> Self | None:
        """The cluster that was started for `home` and still runs. The remains of one that is gone are removed."""
        try:
            local = cls(**json.loads(Path(home, _RECORD).read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"{Path(home, _RECORD)} can't be read: {error}. Remove it.") from error
        if any(_is(process, "gcs_server") for process in members(local.key)):
            return local
        local.stop()
        return None

    def stop(self) -> None:
        """End every process of the cluster, running jobs included, and remove what it wrote. Idempotent; about 0.2 s.

        Raises ClusterError naming the processes that SIGKILL did not end.
        """
        self._detach()
        try:
            end(self.key)
        finally:
            if self._launcher is not None:
                if self._launcher.stdin:
                    self._launcher.stdin.close()
                self._launcher.wait(KILL_S)
        self._remove_files()

    def _detach(self) -> None:
        """Ray ends a driver whose raylet dies; this process is not to be ended."""
        ray = sys.modules.get("ray")
        if ray is not None and self.address and ray.is_initialized():
            port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
            if port == self.address.rpartition(":")[2]:
                ray.shutdown()

    def _remove_files(self) -> None:
        with suppress(OSError):
            if self.default_file and Path(self.default_file).read_text() == _default_name(self.address):
                Path(self.default_file).unlink()
        if self.record:
            Path(self.record).unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def describe_gpus(self) -> str:
        """One sentence on what the GPUs of this cluster are."""
        spread = f"{self.gpus_per_node[0]}" if len(self.gpus_per_node) == 1 else f"{self.num_gpus}"
        on_nodes = "" if len(self.gpus_per_node) == 1 else f" on {len(self.gpus_per_node)} nodes"
        if self.real_gpus:
            return f"{spread} of {self.gpus_found} real GPUs ({self.gpu_type or 'unknown type'}){on_nodes}"
        found = "no GPU found" if not self.gpus_found else f"only {self.gpus_found} GPU found"
        return f"{found}: {spread} logical GPUs{on_nodes}, accounting only"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
