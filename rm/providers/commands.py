"""How a node's commands run: as processes of this machine, or over ssh.

All that they start carries the node's mark. `ray stop` would end every Ray of the machine, and `ray down` sends it in
any case; it is replaced by what ends this node's Ray only.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import click
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler.command_runner import CommandRunnerInterface

from rm.providers.surroundings import DIRECTORY, NODE, without_ray_stop

RAYS_FILES = "~/ray_bootstrap_"
"""How the files begin that `ray up` brings to a head on its own account."""


class ProcessCommandRunner(CommandRunnerInterface):  # type: ignore[misc]
    """Runs the commands of one node as processes of this machine.

    `surroundings()` is the environment of a command; it raises if no command can run yet. `while_present()` holds off
    the end of the node until the command has been started, and raises when the node is gone: whatever is started is
    found when it ends. `log`: where to append what commands print; None: to our own output.
    """

    def __init__(
        self,
        node_id: str,
        surroundings: Callable[[], dict[str, str]],
        while_present: Callable[[], AbstractContextManager[object]],
        log: Path | None = None,
    ) -> None:
        self._node_id = node_id
        self._surroundings = surroundings
        self._while_present = while_present
        self._log = log

    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,  # noqa: ARG002  for a connection, and there is none
        exit_on_fail: bool = False,  # noqa: ARG002  what is raised ends the process that asked for it
        port_forward: object = None,
        with_output: bool = False,
        environment_variables: Mapping[str, object] | None = None,
        run_env: str = "auto",  # noqa: ARG002
        ssh_options_override_ssh_key: str = "",  # noqa: ARG002
        shutdown_after_run: bool = False,
        **_: object,
    ) -> str:
        """Run a shell command to its end; what it printed, if `with_output`. ClickException: it failed."""
        surroundings = self._surroundings()
        if shutdown_after_run:
            raise click.ClickException(
                "this node is a part of your machine, which is not shut down; use `ray down`"
            )
        if cmd is None:
            if port_forward:
                click.echo("The ports of this node are ports of this machine already.")
            return ""
        if (
            "/tmp/ray/session_latest" in cmd
        ):  # `ray monitor` supposes that Ray's files are where they are by default
            cmd = cmd.replace("/tmp/ray/session_latest", "$RAY_TMPDIR/ray/session_latest")
        if cmd == "uptime":  # the question whether the node has booted
            return ""
        given = {
            name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            for name, value in (environment_variables or {}).items()
        }
        command = without_ray_stop(cmd, f"{shlex.quote(sys.executable)} -m rm.providers.stop")
        interactive = (
            sys.stdin is not None and sys.stdin.isatty() and cmd.startswith(("$SHELL", "tmux", "screen"))
        )
        with ExitStack() as opened, self._while_present():
            log = opened.enter_context(self._log.open("ab")) if self._log else None
            process = subprocess.Popen(
                ["bash", "-c", command],
                env={**surroundings, **given},
                cwd=None if interactive else surroundings[DIRECTORY],
                stdin=None if interactive else subprocess.DEVNULL,
                stdout=subprocess.PIPE if with_output else log,
                stderr=log,
                start_new_session=not interactive,  # a Ctrl-C later on must not reach what it leaves running
            )
        try:
            output = process.communicate()[0]
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode:
            see = f", see {self._log}" if self._log else ""
            raise click.ClickException(f"on node {self._node_id}, exit code {process.returncode}{see}: {cmd}")
        return (output or b"").decode(errors="replace")

    def run_rsync_up(self, source: str, target: str, options: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Copy to the node. What already lies where it belongs, on this one machine, stays untouched."""
        self._copy(source, self._place(target))

    def run_rsync_down(self, source: str, target: str, options: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        self._copy(self._place(source), target)

    def remote_shell_command_str(self) -> str:
        return "bash"

    def _place(self, path: str) -> str:
        """Where a path of the node is. Ray's own files are kept apart, since all nodes share one home directory."""
        if path.startswith(RAYS_FILES):
            return str(Path(self._surroundings()[DIRECTORY], path.removeprefix("~/")))
        return path

    def _copy(self, source: str, target: str) -> None:
        origin, place = Path(source).expanduser(), Path(target).expanduser()
        if place.exists() and origin.samefile(place):
            return
        with self._while_present():
            place.parent.mkdir(parents=True, exist_ok=True)
            if origin.is_dir():
                shutil.copytree(origin, place, dirs_exist_ok=True, symlinks=True)
            else:
                shutil.copy2(origin, place)


class MarkedSSHCommandRunner(SSHCommandRunner):  # type: ignore[misc]
    """Ray's own runner over ssh, with the node's mark on all that it starts, and without `ray stop`.

    `stop`: the shell command that ends the node's Ray, whose mark is in its environment.
    """

    def __init__(self, *, mark: str, stop: str, ssh_options: Mapping[str, str], **common: Any) -> None:
        super().__init__(**common)
        self._mark, self._stop = mark, stop
        self.ssh_options.arg_dict.update(ssh_options)

    def run(self, cmd: str | None = None, *args: Any, **options: Any) -> Any:
        """Run a shell command on the machine to its end."""
        if cmd:
            marks = f"export {NODE}={shlex.quote(self._mark)} SPT_NOENV=1; "
            cmd = marks + without_ray_stop(cmd, self._stop)
        return super().run(cmd, *args, **options)
