"""Runner actors: started in an attempt's placement group, found again by name, ended.

A runner's name is `rm/<ledger key>/<stand>/<bundle>` in namespace "rm", where the stand is the attempt that it was
started for. Names are unique in Ray: a second runner for the same bundle of the same attempt can't exist, which is the
fence against running twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import ray
from ray.util import list_named_actors
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rm.core.model import Gang
from rm.core.resources import GPU_UNIT
from rm.runtime.runner import Runner

NAMESPACE = "rm"
CONCURRENT_CALLS = 16


class Runners:
    """The runners of one ledger's attempts."""

    def __init__(self, ledger_key: str) -> None:
        self._prefix = f"rm/{ledger_key}/"

    async def start(
        self, attempt: str, gang: Gang, group: PlacementGroup, runtime_env: dict[str, Any]
    ) -> list[Any]:
        """One handle per bundle; runners that exist already are taken as they are."""
        return await asyncio.to_thread(self._start, attempt, gang, group, runtime_env)

    def _start(
        self, attempt: str, gang: Gang, group: PlacementGroup, runtime_env: dict[str, Any]
    ) -> list[Any]:
        actor = ray.remote(Runner)
        return [
            actor.options(
                name=self._name(attempt, bundle),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_gpus=gang.bundle.gpu_units / GPU_UNIT,
                num_cpus=gang.bundle.cpu_milli / 1000,
                max_restarts=0,
                enable_task_events=False,
                max_concurrency=CONCURRENT_CALLS,
                runtime_env=runtime_env or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
            ).remote()
            for bundle in range(gang.count)
        ]

    async def find(self, attempt: str, count: int) -> list[Any]:
        """One handle per bundle, None where there is no such runner."""
        return await asyncio.to_thread(lambda: [self._find(attempt, bundle) for bundle in range(count)])

    def _find(self, attempt: str, bundle: int) -> Any:
        with contextlib.suppress(ValueError):
            return ray.get_actor(self._name(attempt, bundle), namespace=NAMESPACE)
        return None

    async def kill(self, attempt: str, count: int) -> None:
        """End the attempt's runners, if there are any. Their keepers end what is left of user code."""
        await asyncio.to_thread(self._kill, attempt, count)

    def _kill(self, attempt: str, count: int) -> None:
        for bundle in range(count):
            self._kill_one(f"{attempt}/{bundle}")

    def list_names(self) -> frozenset[str]:
        """The runners that Ray has, starting or alive, as "j17.1/0". Blocks for a call to the GCS."""
        return frozenset(
            str(each["name"]).removeprefix(self._prefix)
            for each in list_named_actors(all_namespaces=True)
            if each["namespace"] == NAMESPACE and str(each["name"]).startswith(self._prefix)
        )

    async def kill_one(self, name: str) -> None:
        """End one runner, named as `list_names` does, if it is there."""
        await asyncio.to_thread(self._kill_one, name)

    def _kill_one(self, name: str) -> None:
        with contextlib.suppress(ValueError):  # no actor of this name: never started, or gone already
            ray.kill(ray.get_actor(self._prefix + name, namespace=NAMESPACE), no_restart=True)

    def _name(self, attempt: str, bundle: int) -> str:
        return f"{self._prefix}{attempt}/{bundle}"
