"""What Ray itself demands of a cluster file: its JSON schema, its defaults, and its own checks.

Ray is imported when a file is checked, and only the part that reads such files. What it would say in the words of a
JSON schema is said with the field, its line and the nearest name that exists; what its checks find beyond that is
passed on as they say it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from rm.cluster_files.file import ClusterFile
from rm.cluster_files.findings import Finding
from rm.spec import did_you_mean
from rm.yaml_text import Path

EXTERNAL_FIELDS: Mapping[str, str] = {
    "max_workers": "the most nodes beside the head",
    "idle_timeout_minutes": "without it an idle node is never removed",
    "available_node_types": "the kinds of nodes, the head's included",
    "head_node_type": "the name of the head's",
    "upscaling_speed": "1.0",
    "auth": "{}",
    "docker": "{}",
    "file_mounts": "{}",
    "cluster_synced_files": "[]",
    "file_mounts_sync_continuously": "false",
    "rsync_exclude": "[]",
    "rsync_filter": "[]",
    "initialization_commands": "[]",
    "setup_commands": "[]",
    "head_setup_commands": "[]",
    "worker_setup_commands": "[]",
    "head_start_ray_commands": "what starts Ray on the head",
    "worker_start_ray_commands": "what starts Ray on the others",
}
"""What Ray reads from every file and fills in for its own providers alone, with what to write."""
_OPTIONAL_EXTERNAL = frozenset({"auth", "docker", "rsync_exclude", "rsync_filter", "upscaling_speed",
                                "file_mounts_sync_continuously"})  # fmt: skip
"""Those that Ray 2.60 can do without."""
_LEGACY = {
    "head_node": "describe the head in `available_node_types` and name it in `head_node_type`",
    "worker_nodes": "describe the nodes in `available_node_types`",
    "min_workers": "set `min_workers` of each node type",
    "initial_workers": "set `min_workers` of each node type",
}


def ray_errors(file: ClusterFile) -> Iterator[Finding]:
    """Everything without which `ray up` refuses the file, or breaks on it later."""
    found = list(_written(file))
    yield from found
    if not found:
        # Ray's own run over the file, with its defaults. It stops at the first fault.
        yield from _prepared(file)


def _written(file: ClusterFile) -> Iterator[Finding]:
    yield from _provider(file)
    schema = _schema()
    for error in _validator(schema).iter_errors(_without_local_fields(file)):
        path = tuple(str(each) for each in error.absolute_path)
        if error.validator == "additionalProperties":
            for name in sorted(set(error.instance) - set(error.schema["properties"]), key=str):
                yield _unknown(file, path, str(name), set(error.schema["properties"]))
        elif error.validator == "required":
            missing = [each for each in error.validator_value if each not in error.instance]
            # The schema reports each missing name alone.
            name = next(each for each in missing if repr(each) in error.message)
            yield file.error("missing", (*path, name), "is missing", f"add `{name}:`")
        elif error.validator == "type":
            kinds = error.validator_value
            wanted = " or ".join(kinds if isinstance(kinds, list) else [kinds])
            yield file.error(
                "type", path, f"must be of type {wanted}, not {_shown(error.instance)}", "mend it"
            )
        else:
            yield file.error("schema", path, error.message, "mend it")
    yield from _untyped(file, schema)


def _provider(file: ClusterFile) -> Iterator[Finding]:
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    if file.provider and file.provider not in _NODE_PROVIDERS:
        yield file.error(
            "provider",
            ("provider", "type"),
            f"Ray has no provider {file.provider!r}",
            did_you_mean(file.provider, set(_NODE_PROVIDERS)),
        )
    provider = file.part("provider")
    if file.provider == "external":
        if not provider.get("module"):
            yield file.error(
                "missing",
                ("provider", "module"),
                "is missing: an external provider is a class of yours",
                "add `module: package.module.Class`, importable on this machine and on the head",
            )
        for name, what in EXTERNAL_FIELDS.items():
            if name not in file.value:
                report = file.warning if name in _OPTIONAL_EXTERNAL else file.error
                advice = f"add `{name}: {what}`" if len(what) < 6 else f"add `{name}:`, {what}"
                yield report(
                    "missing", (name,), "is missing, and an external provider gets no defaults", advice
                )
    if file.provider == "local" and "coordinator_address" not in provider:
        for name in ("head_ip", "worker_ips"):
            if name not in provider:
                yield file.error(
                    "missing",
                    ("provider", name),
                    "is missing",
                    "name your machines, or a `coordinator_address`",
                )
        for name in ("available_node_types", "head_node_type"):
            if file.value.get(name):
                yield file.error(
                    "provider",
                    (name,),
                    "can't be chosen for machines of one's own",
                    "leave it out, or use a provider with node types",
                )


def _unknown(file: ClusterFile, path: Path, name: str, known: set[str]) -> Finding:
    advice = _LEGACY.get(name) if not path else None
    return file.error("unknown", (*path, name), "unknown field", advice or did_you_mean(name, known))


def _untyped(file: ClusterFile, schema: dict[str, Any]) -> Iterator[Finding]:
    """The provider takes any field, so a slip there is silent: near misses are told."""
    import difflib

    known = set(schema["properties"]["provider"]["properties"]) | {
        "key_pair",
        "aws_credentials",
        "worker_ips",
    }
    for name in file.part("provider"):
        near = difflib.get_close_matches(str(name), known, 1, 0.8)
        if name not in known and near:
            yield file.warning(
                "unknown", ("provider", str(name)), "unknown field", f"did you mean {near[0]!r}?"
            )


def _prepared(file: ClusterFile) -> Iterator[Finding]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    try:
        with _quiet(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(file.value)))
    except Exception as error:
        if isinstance(error, KeyError):
            yield file.error(
                "missing", (str(error.args[0]),), "is missing, and Ray has no default for it", "add it"
            )
        else:
            words = " ".join((str(error) or said.getvalue()).split()) or type(error).__name__
            yield file.error("ray", _blamed(words), f"Ray refuses the file: {words}", "mend what it names")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray tells about each default that it fills in."""
    log = logging.getLogger("ray.autoscaler._private.util")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _blamed(words: str) -> Path:
    """The first field that a sentence of Ray's names in backquotes."""
    parts = words.split("`")
    return (parts[1],) if len(parts) > 2 and parts[1].isidentifier() else ()


def _without_local_fields(file: ClusterFile) -> dict[str, Any]:
    """Machines of one's own are the one kind for which Ray still reads `min_workers` at the top."""
    if file.provider != "local":
        return file.value
    return {name: each for name, each in file.value.items() if name != "min_workers"}


def _schema() -> dict[str, Any]:
    import ray.autoscaler

    found: dict[str, Any] = json.loads(
        (FilePath(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()
    )
    return found


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema.validators import validator_for

    return validator_for(schema)(schema)


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
