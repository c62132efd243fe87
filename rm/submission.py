"""What a job takes over from its submitter: runtime_env, working directory, environment variables.

The submitter may be a notebook, a script, or a driver under `ray job submit`; there the driver's own runtime_env
is taken unless the call says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rm.errors import InvalidSpec

_BY_US = {"working_dir", "env_vars"}
"""Parts of a runtime_env that we carry ourselves; what is left is Ray's to set up."""
_KNOWN_TO_RAY = {"pip", "uv", "conda", "container", "image_uri", "py_executable", "config", "nsight", "mpi",
                 "py_modules", "rocprof_sys", "worker_process_setup_hook", "ld_preload"}  # fmt: skip


@dataclass
class Environment:
    """A submitter's environment, as a job will have it. `working_dir`: a local path, or a Ray package URI."""

    working_dir: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    runtime_env: dict[str, Any] = field(default_factory=dict, repr=False)
    cwd: str = ""

    def archive(self, pack: Callable[[str], bytes]) -> bytes:
        """The working directory's zip. Raises InvalidSpec where it can't be had."""
        assert self.working_dir is not None
        if self.working_dir.startswith("gcs://"):
            return _ray_package(self.working_dir)
        if "://" in self.working_dir:
            raise InvalidSpec(
                f"working_dir: {self.working_dir} is a remote URI; give a local directory, or fetch it in the job",
                field="working_dir",
            )
        return pack(self.working_dir)


def submitter_environment(options: dict[str, Any]) -> Environment:
    """Take `runtime_env`, `working_dir` and `env` out of `options` and merge them over the driver's own."""
    own = _driver_runtime_env()
    given = options.pop("runtime_env", None) or {}
    if not isinstance(given, dict):
        raise InvalidSpec(f"runtime_env: must be a dict, not {type(given).__name__}", field="runtime_env")
    if given.get("excludes"):
        raise InvalidSpec(
            "runtime_env.excludes: name what need not travel in a .rayignore file of the working directory",
            field="runtime_env.excludes",
        )
    unknown = set(given) - _BY_US - _KNOWN_TO_RAY
    if unknown:
        raise InvalidSpec(
            f"runtime_env.{min(unknown)}: unknown; known are {', '.join(sorted(_BY_US | _KNOWN_TO_RAY))}",
            field=f"runtime_env.{min(unknown)}",
        )
    merged = {**own, **given}
    env = {
        **own.get("env_vars", {}),
        **_variables("runtime_env.env_vars", given.get("env_vars")),
        **_variables("env", options.pop("env", None)),
    }
    working_dir = options.pop("working_dir", None) or merged.get("working_dir")
    _refuse_local_modules(merged.get("py_modules"))
    return Environment(
        working_dir=os.fspath(working_dir) if working_dir else None,
        env={str(key): str(value) for key, value in env.items()},
        runtime_env={key: value for key, value in merged.items() if key in _KNOWN_TO_RAY},
        cwd=str(Path.cwd()),
    )


def _variables(field: str, given: Any) -> Mapping[Any, Any]:
    """Environment variables as given. The message does not quote them: they may be secrets."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidSpec(
            f"{field}: must be a dict of names and values, not {type(given).__name__}", field=field
        )
    return given


def _driver_runtime_env() -> dict[str, Any]:
    import ray

    if not ray.is_initialized():
        return {}
    own = dict(ray.get_runtime_context().runtime_env or {})
    return {key: value for key, value in own.items() if key in _BY_US | _KNOWN_TO_RAY}


def _ray_package(uri: str) -> bytes:
    """The package that the driver's `ray job submit` uploaded, by value: Ray drops it with the driver."""
    from ray.experimental.internal_kv import _internal_kv_get

    data = _internal_kv_get(uri.encode())
    if data is None:
        raise InvalidSpec(
            f"working_dir: the package {uri} is no longer in the cluster; submit again with --working-dir",
            field="working_dir",
        )
    return bytes(data)


def _refuse_local_modules(modules: Any) -> None:
    for each in modules or []:
        if "://" not in str(each) or str(each).startswith("gcs://"):
            raise InvalidSpec(
                f"runtime_env.py_modules: {each} would be gone when the job starts; "
                "put the module into the working_dir",
                field="runtime_env.py_modules",
            )
