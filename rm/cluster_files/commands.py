"""What the commands of a cluster file start, and whether strangers could use it: Ray, its token, the allocator."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rm.cluster_files.file import ClusterFile, Commands
from rm.cluster_files.findings import Finding

_HEAD = ("initialization_commands", "setup_commands", "head_setup_commands", "head_start_ray_commands")
_WORKER = ("initialization_commands", "setup_commands", "worker_setup_commands", "worker_start_ray_commands")
_TOKEN_ON = re.compile(r"\bRAY_AUTH_MODE=[\"']?token\b")
_TOKEN_HERE = re.compile(r"\bRAY_AUTH_TOKEN=[\"']?(?![\"'$\s]|\()([^\s\"';&|]+)")
"""A token written out. `RAY_AUTH_TOKEN=$…` takes it from elsewhere."""
_OPEN_DASHBOARD = re.compile(r"--dashboard-host[= ][\"']?(0\.0\.0\.0|::)(?![\w.:])")
_KEEPS = re.compile(r"\bRM_(HOME|LEDGER_URL)=")


def command_doubts(file: ClusterFile) -> Iterator[Finding]:
    """In the order in which the commands run."""
    for fields, start in ((_HEAD, "head_start_ray_commands"), (_WORKER, "worker_start_ray_commands")):
        starts = file.commands(start)
        if start in file.value:
            yield from _ray_start(file, start, starts)
            yield from _token_mode(file, fields, start)
        elif file.is_cloud:
            yield file.error(
                "token-missing",
                (start,),
                "is left to Ray, whose commands start it without a token: whoever reaches a port can run code",
                "write the commands, with `export RAY_AUTH_MODE=token` in each",
            )
    yield from _token_file(file)
    yield from _allocator(file)
    for path, command in file.commands(*dict.fromkeys((*_HEAD, *_WORKER))):
        if _TOKEN_HERE.search(command):
            yield file.error(
                "token-written",
                path,
                "has the token in it, and with it everybody who sees this file, or a process list",
                "copy a file with `file_mounts: {~/.ray/auth_token: ~/.ray/auth_token}` instead",
            )
        if _OPEN_DASHBOARD.search(command):
            yield file.warning(
                "dashboard",
                path,
                "the dashboard listens on all addresses, and its job API runs commands",
                "say --dashboard-host=127.0.0.1 and reach it with `ray dashboard FILE`",
            )


def _ray_start(file: ClusterFile, field: str, commands: Commands) -> Iterator[Finding]:
    starts = [(path, command) for path, command in commands if re.search(r"\bray\s+start\b", command)]
    if not starts:
        yield file.error("ray-start", (field,), "no command here starts Ray", "add a `ray start …`")
    for path, command in starts:
        if field.startswith("worker"):
            continue
        if "--head" not in command:
            yield file.error("ray-start", path, "starts a Ray that is no head", "add --head")
        if "--autoscaling-config" not in command:
            yield file.error(
                "ray-start",
                path,
                "starts Ray without an autoscaler: no node is ever added",
                "add --autoscaling-config=~/ray_bootstrap_config.yaml",
            )


def _token_mode(file: ClusterFile, fields: tuple[str, ...], start: str) -> Iterator[Finding]:
    docker = file.part("docker")
    kind = "head" if start.startswith("head") else "worker"
    options = [*(docker.get("run_options") or []), *(docker.get(f"{kind}_run_options") or [])]
    said = [command for _, command in file.commands(*fields)] + [str(each) for each in options]
    if any(_TOKEN_ON.search(each) for each in said):
        return
    report = file.error if file.is_cloud or file.provider == "local" else file.warning
    yield report(
        "token-missing",
        (start,),
        "starts Ray without asking for a token: whoever reaches a port of it can run code",
        "put `export RAY_AUTH_MODE=token;` before `ray start`",
    )


def _token_file(file: ClusterFile) -> Iterator[Finding]:
    """Machines must get the token from somewhere; processes on this one read it where it is."""
    if not (file.is_cloud or file.provider == "local"):
        return
    commands = [command for _, command in file.commands(*dict.fromkeys((*_HEAD, *_WORKER)))]
    brought = any(
        str(target).rstrip("/").endswith((".ray", "auth_token")) for target in file.part("file_mounts")
    )
    if brought or any("RAY_AUTH_TOKEN" in each or "auth_token" in each for each in commands):
        return
    yield file.error(
        "token-file",
        ("file_mounts",),
        "brings no token to the nodes, and all of them need the same one",
        "make one with `ray get-auth-token --generate`, and add `~/.ray/auth_token: ~/.ray/auth_token`",
    )


def _allocator(file: ClusterFile) -> Iterator[Finding]:
    commands = file.commands(*_HEAD)
    if not any(re.search(r"\brmctl\s+start\b|-m rm\.cli\s+start\b", command) for _, command in commands):
        yield file.warning(
            "allocator",
            ("head_start_ray_commands",),
            "does not start the allocator: the first to submit would, with the settings of his own environment",
            "end with `rmctl start`, and RM_HOME and RM_CHECKPOINT_ROOT set",
        )
    elif file.is_cloud and not any(_KEEPS.search(command) for _, command in commands):
        yield file.warning(
            "ledger",
            ("head_start_ray_commands",),
            "starts the allocator without RM_HOME and RM_LEDGER_URL: the ledger is lost with the head's disk",
            "set RM_HOME to a volume that outlives the head, or RM_LEDGER_URL to a PostgreSQL (docs/cluster.md)",
        )
