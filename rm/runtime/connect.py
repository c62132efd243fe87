"""Finding the allocator, or starting it: the only door from a client's process to the cluster's actors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

import rm
from rm.errors import AllocatorUnavailable, RmError
from rm.runtime.allocator import Allocator
from rm.runtime.archive import Store
from rm.runtime.attach import attach
from rm.spec import Config

NAMESPACE = "rm"
ON_HEAD = {"node:__internal_head__": 0.001}
"""Ray marks the head with this resource: whatever asks for a crumb of it starts, and restarts, there."""
CALLS = 1_000
HELLO_TIMEOUT_S = 60.0


class Actors:
    """Handles of the allocator and the store of the cluster that this process is attached to."""

    def __init__(self, allocator: Any, store: Any, hello: dict[str, Any]) -> None:
        self.allocator = allocator
        self.store = store
        self.hello = hello


def connect_actors(address: str | None = None, *, config: Config | None = None, start: bool = True) -> Actors:
    """Attach to the cluster, find the actors or start them, and hear that the allocator is up.

    Two processes that start it at once get the same one: Ray makes named actors unique. `config` counts only for
    the one that starts it. Raises NoCluster, AuthenticationFailed, AllocatorUnavailable, LedgerUnavailable.
    """
    attach(address)
    try:
        allocator = ray.get_actor("allocator", namespace=NAMESPACE)
        store = ray.get_actor("store", namespace=NAMESPACE)
    except ValueError:
        if not start:
            raise AllocatorUnavailable(
                "no allocator runs on this cluster; start it with `rmctl start`"
            ) from None
        allocator, store = _start((config or Config()).resolved())
    return Actors(allocator, store, _hello(allocator))


def _start(config: Config) -> tuple[Any, Any]:
    """Create both actors from a driver that has no runtime_env of its own.

    Detached actors keep the runtime_env of the driver that made them, and so do the runners they start: one
    user's environment variables would reach everybody's jobs.
    """
    if ray.get_runtime_context().runtime_env:
        _start_from_clean_process(config)
        return (
            ray.get_actor("allocator", namespace=NAMESPACE),
            ray.get_actor("store", namespace=NAMESPACE),
        )
    return create_actors(config)


def create_actors(config: Config) -> tuple[Any, Any]:
    """The two detached actors on the head node; the ones that exist already are taken as they are."""
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": ON_HEAD,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": CALLS,
    }
    store = ray.remote(Store).options(name="store", **common).remote(str(config.home), config.max_log_bytes)
    allocator = ray.remote(Allocator).options(name="allocator", **common).remote(config)
    return allocator, store


def _start_from_clean_process(config: Config) -> None:
    code = (
        "import sys; from rm.runtime.connect import create_actors, _hello; from rm.runtime.attach import attach; "
        "from rm.spec import Config; attach(sys.argv[1]); "
        "_hello(create_actors(Config.model_validate_json(sys.argv[2]))[0])"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_JOB")}
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", code, address, config.model_dump_json()]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=HELLO_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise AllocatorUnavailable(f"the allocator could not be started: {last[0]}")


def _hello(allocator: Any) -> dict[str, Any]:
    """Wait until the allocator answers, and check that it speaks our version."""
    hello: dict[str, Any] = call(allocator.hello.remote(), HELLO_TIMEOUT_S)
    if hello["version"] != rm.__version__:
        raise AllocatorUnavailable(
            f"the allocator runs ray-rm {hello['version']}, this is {rm.__version__}: install the same version, "
            "or restart the allocator with `rmctl stop --keep-jobs` and `rmctl start`"
        )
    return hello


def call(ref: Any, timeout_s: float = 30.0) -> Any:
    """The result of a call to one of our actors, its errors as they were raised there."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except RmError:
        raise
    except GetTimeoutError:
        raise AllocatorUnavailable(
            f"the allocator did not answer within {timeout_s:g} s; `ray list actors` shows whether it restarts"
        ) from None
    except ActorDiedError as error:
        raise AllocatorUnavailable(f"the allocator was stopped: {_first_line(error)}") from None
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RmError):
            raise cause from None
        raise AllocatorUnavailable(f"the call failed: {_first_line(error)}") from error


def stop_actors(actors: Actors, *, timeout_s: float = 10.0) -> None:
    """End both actors for good. What runs in runners goes on if the allocator was not asked to cancel it."""
    for handle in (actors.allocator, actors.store):
        ray.kill(handle, no_restart=True)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        names = {
            each["name"]
            for each in ray.util.list_named_actors(all_namespaces=True)
            if each["namespace"] == NAMESPACE
        }
        if not names & {"allocator", "store"}:
            return
        time.sleep(0.05)
    raise AllocatorUnavailable(f"the actors did not end within {timeout_s:g} s")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
