"""Nodes that are machines you own, reached over ssh, so many of each type.

Ray's `type: local` does not know what its machines have, and so never starts one for a request that waits. Here the
machines are listed by node type: a launch takes a free machine of the type, and the end of a node ends on its machine
what carries the node's mark, and nothing else.

The roster is kept where nodes are launched: the head's entry beside whoever ran `ray up`, the workers' on the head. So
`ray down` does not rely on it; it goes to every machine that the YAML names.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
)

from rm.errors import ClusterError, InvalidSpec
from rm.providers.commands import RAYS_FILES, MarkedSSHCommandRunner
from rm.providers.options import NO_CAPACITY, Options, check_name
from rm.providers.roster import Node, Roster, RosterFile
from rm.providers.rostered import RosteredProvider, is_head, refuse

log = logging.getLogger("rm.providers.onprem")

SSH_PORT = 22
REACH_S = 3.0
"""How long a machine may take to answer before it passes for down."""
STOP_S = 60.0
WHOLE_MACHINE = "machine/"
"""How the id of what `ray down` ends on one machine begins: whatever is there of the cluster."""
HEAD, HEAD_TYPE, AUTH = "_head", "_head_type", "_auth"
"""Fields of the `provider` section that tell the provider on the head who it is and how to reach the others."""


class OnPremOptions(Options):
    """`machines`: node type → its machines, as HOST or HOST:PORT of sshd; the head's type has one.

    `stop_command`: the shell command that ends a node on its machine. `directory`: of the rosters.
    """

    machines: dict[str, Annotated[list[str], Field(min_length=1)]]
    stop_command: str = "python3 -m rm.providers.stop"
    directory: str = "~/.ray-rm/clusters"

    def check_machines(self, config: Mapping[str, Any]) -> None:
        """InvalidSpec where the machines don't fit the node types: each of its own type, one head."""
        types, head = config["available_node_types"], config["head_node_type"]
        self.check_types(types)
        listed: set[str] = set()
        for name, machines in self.machines.items():
            field = f"provider.machines.{name}"
            if name not in types:
                raise InvalidSpec(
                    f"{field}: no such node type; known are {', '.join(sorted(types))}", field=field
                )
            for machine in machines:
                if machine in listed:
                    raise InvalidSpec(f"{field}: {machine} is listed twice", field=field)
                listed.add(machine)
                parse_machine(machine, field)
        for name in types:
            if name not in self.machines:
                field = f"provider.machines.{name}"
                raise InvalidSpec(
                    f"{field}: missing; list the machines of this node type, or remove the type", field=field
                )
        if len(self.machines[head]) != 1:
            raise InvalidSpec(
                f"provider.machines.{head}: one machine, for the head", field=f"provider.machines.{head}"
            )


def parse_machine(machine: str, field: str = "provider.machines") -> tuple[str, int]:
    """Host and port of a machine's sshd. InvalidSpec: it is neither HOST nor HOST:PORT."""
    host, colon, port = machine.partition(":")
    if not host or host.startswith("-") or "/" in machine or (colon and not port.isdecimal()):
        raise InvalidSpec(f"{field}: {machine!r} must be HOST or HOST:PORT", field=field)
    return host, int(port) if colon else SSH_PORT


class OnPremNodeProvider(RosteredProvider):
    """`provider: {type: external, module: rm.providers.onprem.OnPremNodeProvider}`."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        options = OnPremOptions.of(provider_config)
        check_name(cluster_name)
        directory = Path(options.directory).expanduser() / cluster_name
        super().__init__(provider_config, cluster_name, options, RosterFile(directory))
        self._machines = options.machines
        self._stop_command = options.stop_command
        self._given_directory = options.directory
        self._auth: dict[str, Any] = provider_config.get(AUTH, {})
        self._ended: set[str] = set()
        if head := provider_config.get(HEAD):
            with self._file.changing(make=True) as roster:
                roster.nodes = {name: node for name, node in roster.nodes.items() if not is_head(node)}
                roster.nodes[head["id"]] = Node(**head["node"])

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Refuse at once what would fail later, and let no type have more nodes than machines."""
        options = OnPremOptions.of(cluster_config["provider"])
        options.check_machines(cluster_config)
        if not cluster_config["auth"].get("ssh_user"):
            raise InvalidSpec(
                "auth.ssh_user: missing; it must be the same on all machines", field="auth.ssh_user"
            )
        for name, each in cluster_config["available_node_types"].items():
            if name != cluster_config["head_node_type"]:
                each["max_workers"] = min(each["max_workers"], len(options.machines[name]))
        cluster_config["provider"] |= {
            AUTH: cluster_config["auth"],
            HEAD_TYPE: cluster_config["head_node_type"],
        }
        return cluster_config

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Tell the provider on the head which node it is on, and where its key is."""
        cluster_config["provider"][AUTH] = cluster_config["auth"]
        for name, node in self._file.read().nodes.items():
            if is_head(node):
                tags = {**node.tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
                head = {"type": node.type, "tags": tags, "machine": node.machine}
                cluster_config["provider"][HEAD] = {"id": name, "node": head}
        return cluster_config

    # --- nodes ---------------------------------------------------------------------------------------------------

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:  # noqa: ARG002
        """Take `count` free machines, or none. NodeLaunchException: there aren't so many that answer."""
        kind = self._new_node(tags)[1].type
        silent = [each for each in self._machines[kind] if not answers(each)]
        with self._file.changing(make=True) as roster:
            refusal = self._options.refusal(kind, count, roster)
            free = [each for each in self._free(kind, roster) if each not in silent]
            if not refusal and len(free) < count:
                note = f"; no answer from {', '.join(silent)}" if silent else ""
                every = len(self._machines[kind])
                refusal = (
                    NO_CAPACITY,
                    f"{kind}: {count} asked for, {len(free)} of {every} machines are free{note}",
                )
            taken = [] if refusal else free[:count]
            new = [self._new_node(tags, machine) for machine in taken]
            roster.nodes.update(new)
            unclean = {machine: roster.unclean.pop(machine) for machine in taken if machine in roster.unclean}
            self._keep_files(roster)
        if refusal:
            refuse(*refusal)
        for machine, mark in unclean.items():
            self._clean(machine, mark)
        return {name: {} for name, _ in new}

    def _free(self, kind: str, roster: Roster) -> list[str]:
        """Machines of this type that no node is on; those last on which something may be left."""
        used = {node.machine for node in roster.nodes.values()}
        return sorted(
            (each for each in self._machines[kind] if each not in used),
            key=lambda each: each in roster.unclean,
        )

    def terminate_nodes(self, node_ids: Sequence[str]) -> None:
        """End the nodes' processes on their machines, the head's first: it would start others meanwhile."""
        marks: dict[str, tuple[str, str]] = {}
        with suppress(FileNotFoundError), self._file.changing() as roster:
            for name in node_ids:
                if name in roster.nodes:
                    roster.nodes[name].ending = True
                    marks[name] = (roster.nodes[name].machine, self._mark(name))
        whole = [name for name in node_ids if name.startswith(WHOLE_MACHINE)]
        marks |= {name: (name.removeprefix(WHOLE_MACHINE), self._cluster_mark()) for name in whole}
        heads = {machine for kind in self._head_types() for machine in self._machines[kind]}
        with ThreadPoolExecutor() as pool:
            for first in (True, False):
                now = [name for name, (machine, _) in marks.items() if (machine in heads) == first]
                list(pool.map(lambda name: self._clean(*marks[name], files=name in whole), now))
        with suppress(FileNotFoundError), self._file.changing() as roster:
            for name in marks:
                roster.nodes.pop(name, None)
        self._ended.update(whole)

    def _clean(self, machine: str, mark: str, *, files: bool = False) -> None:
        """End what carries the mark on a machine. If that fails, it is noted, and tried again before the next use.

        `files`: remove what the cluster keeps there too; it ends for good.
        """
        command = f"{self._stop_command} --mark {shlex.quote(mark)}"
        if files:
            kept = f"{self._remote_directory()} {RAYS_FILES}config.yaml {RAYS_FILES}key.pem"
            command += f"; code=$?; rm -rf {kept}; exit $code"
        try:
            self._over_ssh(machine, command)
        except (OSError, subprocess.SubprocessError) as error:
            output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            said = f"{error} {output.splitlines()[-1] if output else ''}"
            if files:
                click.echo(f"{machine} could not be cleaned: {said}\nRun this there: {command}", err=True)
                return
            log.warning("%s: what is left there of %s could not be ended: %s", machine, mark, said)
            with suppress(FileNotFoundError), self._file.changing() as roster:
                roster.unclean[machine] = mark

    def nodes_for_teardown(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Every machine of that kind of node, until it has been ended once by this process."""
        kind = tag_filters.get(TAG_RAY_NODE_KIND)
        heads = self._head_types()
        names = [
            f"{WHOLE_MACHINE}{machine}"
            for node_type, machines in self._machines.items()
            for machine in machines
            if kind is None or kind == (NODE_KIND_HEAD if node_type in heads else NODE_KIND_WORKER)
        ]
        return [name for name in names if name not in self._ended]

    def cleanup_cluster_resources(self) -> None:
        """What `ray down` calls last: remove the files that are here."""
        for file in {*self._file.read().files, *self._files}:
            Path(file).unlink(missing_ok=True)
        self._file.remove()
        with suppress(OSError):
            self._file.directory.parent.rmdir()
        runner = self._runner("", self._auth)
        if runner.ssh_control_path:
            shutil.rmtree(runner.ssh_control_path, ignore_errors=True)
            with suppress(OSError):  # another cluster's are in it
                Path(runner.ssh_control_path).parent.rmdir()

    # --- reaching them -------------------------------------------------------------------------------------------

    def external_ip(self, node_id: str) -> str:
        return parse_machine(self._machine(node_id))[0]

    def internal_ip(self, node_id: str) -> str:
        return self.external_ip(node_id)

    def get_command_runner(
        self, log_prefix: str, node_id: str, auth_config: Mapping[str, Any], *_: Any, **__: Any
    ) -> CommandRunnerInterface:
        return self._runner(node_id, auth_config, log_prefix)

    def _runner(self, node_id: str, auth: Mapping[str, Any], log_prefix: str = "") -> MarkedSSHCommandRunner:
        port = parse_machine(self._machine(node_id))[1] if node_id else SSH_PORT
        if key := auth.get(
            "ssh_private_key"
        ):  # for ssh itself "~" is not HOME but what the user database says
            auth = {**auth, "ssh_private_key": str(Path(key).expanduser())}
        return MarkedSSHCommandRunner(
            mark=self._mark(node_id),
            stop=self._stop_command,
            ssh_options={"Port": str(port), "LogLevel": "ERROR"},
            log_prefix=log_prefix,
            node_id=node_id,
            provider=self,
            auth_config=auth,
            cluster_name=self.cluster_name,
            process_runner=subprocess,
            use_internal_ip=False,
        )

    def _over_ssh(self, machine: str, command: str) -> None:
        """Run a command as Ray's runner does, but quietly and within a time limit."""
        runner = self._runner(f"{WHOLE_MACHINE}{machine}", self._auth)
        runner.ssh_options.arg_dict.update(BatchMode="yes", ControlMaster="no", ControlPath="none")
        options = runner.ssh_options.to_ssh_options_list(timeout=10)
        words = [
            "ssh",
            *options,
            f"{runner.ssh_user}@{parse_machine(machine)[0]}",
            *_with_interactive(command),
        ]
        subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=STOP_S, check=True)

    def _machine(self, node_id: str) -> str:
        if node_id.startswith(WHOLE_MACHINE):
            return node_id.removeprefix(WHOLE_MACHINE)
        node = self._file.read().nodes.get(node_id)
        if node is None:
            raise ClusterError(f"node {node_id} is gone")
        return node.machine

    def _head_types(self) -> set[str]:
        return {self.provider_config[HEAD_TYPE]}

    def _cluster_mark(self) -> str:
        return f"onprem/{self.cluster_name}"

    def _mark(self, node_id: str) -> str:
        return f"{self._cluster_mark()}/{node_id}"

    def _remote_directory(self) -> str:
        """The roster's directory on another machine, for a shell there."""
        given = self._given_directory
        quoted = f"~/{shlex.quote(given[2:])}" if given.startswith("~/") else shlex.quote(given)
        return f"{quoted}/{shlex.quote(self.cluster_name)}"


def answers(machine: str) -> bool:
    """Whether something listens where the machine's sshd should."""
    try:
        socket.create_connection(parse_machine(machine), REACH_S).close()
    except OSError:
        return False
    return True
