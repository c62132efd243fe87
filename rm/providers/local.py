"""Nodes that are processes of this machine: `ray up` and the real autoscaler without a cloud, ssh or credentials.

A node is an entry in the roster and a directory. What makes it a Ray node is what makes one in a cloud: Ray's updater
runs the setup and start commands of the YAML on it. Its resources are logical, whatever the YAML says.

    <directory>/<cluster>/            roster.json; Ray's and the jobs' files; the allocator's home
    <directory>/<cluster>/<node id>   the node's own directory; its path is the mark of the node's processes

Whoever is killed at whatever moment, this holds: a process of a node carries the mark of a node in the roster, or at
least that of the cluster, and `ray down` ends both.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field
from ray._common.utils import get_ray_address_file
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.tags import NODE_KIND_HEAD, STATUS_UP_TO_DATE, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

from rm.errors import ClusterError, InvalidSpec
from rm.providers.commands import ProcessCommandRunner
from rm.providers.options import Options, check_name
from rm.providers.roster import FILE, RosterFile, locked
from rm.providers.rostered import RosteredProvider, is_head, refuse
from rm.providers.surroundings import NODE, node_environment
from rm.runtime.default_cluster import become_default, default_name, forget_default
from rm.runtime.local_processes import end, free_port, is_free

ADDRESS = "127.0.0.1"
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
"""What the head listens on, and the port where people look for it; another one where that is taken."""
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
_SOCKET_LIMIT = 107
Port = Annotated[int, Field(gt=0, lt=65536)]


class LocalOptions(Options):
    """`directory`: of all local clusters of this user. `gcs_port`, `dashboard_port`: of the head, if they are free."""

    directory: str = ""
    gcs_port: Port = PORTS["gcs"]
    dashboard_port: Port = PORTS["dashboard"]


class LocalNodeProvider(RosteredProvider):
    """`provider: {type: external, module: rm.providers.local.LocalNodeProvider}`."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        options = LocalOptions.of(provider_config)
        self._base = base_directory(options.directory)
        self._directory = cluster_directory(self._base, cluster_name)
        super().__init__(provider_config, cluster_name, options, RosterFile(self._directory))
        self._wanted = {**PORTS, "gcs": options.gcs_port, "dashboard": options.dashboard_port}

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Refuse at once what would fail later. InvalidSpec: it names the field."""
        options = LocalOptions.of(cluster_config["provider"])
        options.check_types(cluster_config["available_node_types"])
        cluster_directory(base_directory(options.directory), cluster_config["cluster_name"])
        return cluster_config

    # --- nodes ---------------------------------------------------------------------------------------------------

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:  # noqa: ARG002
        """Enter `count` nodes in the roster, or none. NodeLaunchException: `capacity` or `fail_types` forbid it."""
        private(self._base)
        with locked(self._base, make=True), self._file.changing(make=True) as roster:
            new = [self._new_node(tags) for _ in range(count)]
            refusal = self._options.refusal(new[0][1].type, count, roster)
            if not refusal:
                if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
                    roster.ports = self._choose_ports()
                for name, node in new:
                    (self._directory / name).mkdir()
                    roster.nodes[name] = node
                (self._directory / "tmp").mkdir(exist_ok=True)
            self._keep_files(roster)
        if refusal:
            refuse(*refusal)
        return {name: {} for name, _ in new}

    def terminate_nodes(self, node_ids: Sequence[str]) -> None:
        """End all processes of the nodes, then strike them off. With the head go all: their Ray can't outlive it."""
        if not self._directory.exists():
            return
        with self._file.changing() as roster:
            going = {name for name in node_ids if name in roster.nodes}
            if any(is_head(roster.nodes[name]) for name in going):
                going = set(roster.nodes)
            for name in going:
                roster.nodes[name].ending = True
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._end, going))
        with self._file.changing() as roster:
            for name in going:
                roster.nodes.pop(name, None)

    def _end(self, node_id: str) -> None:
        end(self._mark(node_id), NODE)
        shutil.rmtree(self._directory / node_id, ignore_errors=True)

    def cleanup_cluster_resources(self) -> None:
        """What `ray down` calls last: end what still carries the cluster's mark, and remove all files."""
        end(str(self._directory), NODE)
        roster = self._file.read()
        forget_default(f"{ADDRESS}:{roster.ports.get('gcs')}", roster.default_file)
        for file in {*roster.files, *self._files}:
            Path(file).unlink(missing_ok=True)
        with suppress(FileNotFoundError), locked(self._base):
            self._file.remove()
            with suppress(OSError):  # other clusters are in it
                self._base.rmdir()

    # --- what they are like --------------------------------------------------------------------------------------

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        super().set_node_tags(node_id, tags)
        if tags.get(TAG_RAY_NODE_STATUS) == STATUS_UP_TO_DATE and self._is_head(node_id):
            self._announce()

    def external_ip(self, node_id: str) -> str:  # noqa: ARG002
        return ADDRESS

    def internal_ip(self, node_id: str) -> str:  # noqa: ARG002
        return ADDRESS

    def get_command_runner(self, log_prefix: str, node_id: str, *_: Any, **__: Any) -> CommandRunnerInterface:  # noqa: ARG002
        """What workers print goes to Ray's logs: the autoscaler, which runs their commands, has no terminal."""
        logs = self._directory / "ray" / "session_latest" / "logs"
        own_log = None if self._is_head(node_id) or not logs.exists() else logs / f"node-{node_id}.log"
        return ProcessCommandRunner(
            node_id, partial(self._surroundings, node_id), partial(self._while_present, node_id), own_log
        )

    def _surroundings(self, node_id: str) -> dict[str, str]:
        roster = self._file.read()
        if node_id in roster.nodes and self._boots(roster.nodes[node_id]):
            raise ClusterError(f"node {node_id} boots (provider.boot_delay_s)")
        return node_environment(self._mark(node_id), self._directory, self._directory / node_id, roster.ports)

    def _mark(self, node_id: str) -> str:
        return str(self._directory / node_id)

    def _is_head(self, node_id: str) -> bool:
        node = self._file.read().nodes.get(node_id)
        return node is not None and is_head(node)

    def _announce(self) -> None:
        """Make this the machine's default cluster, unless another one runs; and say how to use it in any case."""
        file = Path(get_ray_address_file(None))
        with self._file.changing() as roster:
            address = f"{ADDRESS}:{roster.ports['gcs']}"
            roster.default_file = become_default(address, file) or roster.default_file
        click.echo(
            "\nIn every shell that is to use this cluster, if others run on this machine:\n"
            f"  export RAY_ADDRESS={default_name(address)}\n"
            f"  export RAY_API_SERVER_ADDRESS=http://{ADDRESS}:{roster.ports['dashboard']}"
        )

    def _choose_ports(self) -> dict[str, int]:
        """Ports for the head that nothing listens on and no other cluster of this user has. Under the base's lock."""
        taken: set[int] = set()
        for file in self._base.glob(f"*/{FILE}"):
            if file.parent != self._directory:
                taken.update(RosterFile(file.parent).read().ports.values())
        chosen: dict[str, int] = {}
        for use, port in self._wanted.items():
            while port in taken or not is_free(port):
                port = free_port()  # noqa: PLW2901
            chosen[use] = port
            taken.add(port)
        return chosen


def base_directory(given: str) -> Path:
    """Where the clusters of this user are. Short, because of the names of sockets in it."""
    return Path(given).expanduser().absolute() if given else Path("/tmp", f"rm-{os.getuid()}")


def cluster_directory(base: Path, name: str) -> Path:
    """The directory of one cluster. InvalidSpec: `name` is no name for one, or too long."""
    check_name(name)
    room = _SOCKET_LIMIT - len(os.fsencode(f"{base}/{_SOCKET}"))
    if len(name) > room:
        raise InvalidSpec(
            f"cluster_name: {name!r} is too long for the names of sockets in {base}: {max(room, 0)} characters "
            "are left; shorten it, or set provider.directory to a shorter path",
            field="cluster_name",
        )
    return base / name


def private(directory: Path) -> None:
    """Make sure that nobody else can write where the roster is. ClusterError: somebody could."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ClusterError(
            f"{directory} must be a directory that belongs to you and that others can't write; "
            "remove it, or set provider.directory"
        )
