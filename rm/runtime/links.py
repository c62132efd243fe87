"""Calling the cluster's named actors from a runner: found by name, and found again when they were replaced."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayActorError

NAMESPACE = "rm"
LOOK_AGAIN_S = 0.5
GIVE_UP_S = 60.0
"""How long a call may wait for an actor that is not there. Restarts take a second."""


class Link:
    """One named actor. A handle dies with its actor; the name finds the next one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: Any = None

    async def call(self, method: str, *args: Any, give_up_s: float = GIVE_UP_S) -> Any:
        """The method's result. Its methods are idempotent, so a call whose answer was lost is made again.

        Raises RayActorError or ValueError where there is no such actor for `give_up_s`.
        """
        deadline = time.monotonic() + give_up_s
        while True:
            try:
                if self._handle is None:
                    self._handle = await asyncio.to_thread(ray.get_actor, self._name, namespace=NAMESPACE)
                return await getattr(self._handle, method).remote(*args)
            except (RayActorError, ValueError):
                self._handle = None
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(LOOK_AGAIN_S)
