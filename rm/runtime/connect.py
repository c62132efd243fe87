"""Finding the allocator, or starting it: the only door from a client's process to the cluster's actors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

import rm
from rm.errors import AllocatorUnavailable, InvalidSpec, NoAllocator, RmError
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

    def ask(self, name: str, method: str, /, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Call a method of "allocator" or "store". All are idempotent: an actor that was replaced is asked again."""
        try:
            return call(getattr(getattr(self, name), method).remote(*args, **kwargs), timeout_s)
        except ActorReplaced:
            try:
                setattr(self, name, ray.get_actor(name, namespace=NAMESPACE))
            except ValueError:
                raise NoAllocator(f"the {name} was stopped; start it again with `rmctl start`") from None
            return call(getattr(getattr(self, name), method).remote(*args, **kwargs), timeout_s)


class ActorReplaced(AllocatorUnavailable):
    """The actor behind a handle is gone for good; another may have its name."""


def connect_actors(
    address: str | None = None,
    *,
    config: Config | None = None,
    start: bool = True,
    any_version: bool = False,
) -> Actors:
    """Attach to the cluster, find the actors or start them, and hear that the allocator is up.

    Two processes that start it at once get the same one: Ray makes named actors unique. `config` counts only for
    the one that starts it. `any_version`: also take an allocator of another version, to stop it.
    Raises NoCluster, AuthenticationFailed, AllocatorUnavailable, LedgerUnavailable.
    """
    attach(address)
    try:
        allocator = ray.get_actor("allocator", namespace=NAMESPACE)
        store = ray.get_actor("store", namespace=NAMESPACE)
    except ValueError:
        if not start:
            raise NoAllocator("no allocator runs on this cluster; start it with `rmctl start`") from None
        allocator, store = _start((config or _config()).resolved())
    return Actors(allocator, store, _hello(allocator, any_version))


def _config() -> Config:
    """The settings in the environment. Raises InvalidSpec naming the variable."""
    try:
        return Config()
    except ValidationError as error:
        lines = [f"RM_{'.'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in error.errors()]
        raise InvalidSpec("; ".join(lines)) from None


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
    store = (
        ray.remote(Store)
        .options(name="store", enable_task_events=False, **common)
        .remote(str(config.home), config.max_log_bytes)
    )
    allocator = (
        ray.remote(Allocator).options(name="allocator", enable_task_events=False, **common).remote(config)
    )
    return allocator, store


def _start_from_clean_process(config: Config) -> None:
    code = (
        "import sys; from rm.runtime.connect import create_actors, _hello; from rm.runtime.attach import attach; "
        "from rm.spec import Config; attach(sys.argv[1]); "
        "_hello(create_actors(Config.model_validate_json(sys.stdin.read()))[0])"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_JOB")}
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", code, address]
    order = (
        config.model_dump_json()
    )  # by stdin: the ledger's URL may hold a password, and command lines are public
    done = subprocess.run(
        command, env=env, input=order, capture_output=True, text=True, timeout=HELLO_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise AllocatorUnavailable(f"the allocator could not be started: {last[0]}")


def _hello(allocator: Any, any_version: bool = False) -> dict[str, Any]:
    """Wait until the allocator answers, and check that it speaks our version."""
    hello: dict[str, Any] = call(allocator.hello.remote(), HELLO_TIMEOUT_S)
    if hello["version"] != rm.__version__ and not any_version:
        raise AllocatorUnavailable(
            f"the allocator runs ray-rm {hello['version']}, this is {rm.__version__}: install the same version, "
            "or restart the allocator with `rmctl stop --keep-jobs` and `rmctl start`"
        )
    return hello


def call(ref: Any, timeout_s: float = 30.0) -> Any:
    """The result of a call to one of our actors, its errors as they were raised there."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except RmError as error:
        # Ray raises a mixture of its own error and ours, whose text is a traceback: ours alone is for people.
        raise getattr(error, "cause", None) or error from None
    except GetTimeoutError:
        raise AllocatorUnavailable(
            f"the allocator did not answer within {timeout_s:g} s; `ray list actors` shows whether it restarts"
        ) from None
    except ActorDiedError as error:
        raise ActorReplaced(f"the actor was stopped: {_first_line(error)}") from None
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RmError):
            raise cause from None
        raise AllocatorUnavailable(f"the call failed: {_first_line(error)}") from error


def stop_actors(*, store_too: bool, timeout_s: float = 10.0) -> None:
    """End the allocator for good, and the store. Runners go on if the allocator was not asked to cancel them."""
    ending = {"allocator", "store"} if store_too else {"allocator"}
    for name in ending:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        names = {
            each["name"]
            for each in ray.util.list_named_actors(all_namespaces=True)
            if each["namespace"] == NAMESPACE
        }
        if not names & ending:
            return
        time.sleep(0.05)
    raise AllocatorUnavailable(f"the actors did not end within {timeout_s:g} s")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
