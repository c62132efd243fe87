"""Which ranks may come from an interpreter that has preloaded what they import, and when there is one.

What a function imported is known when it has ended (`entry` leaves a list). If it was something large, the runner then
starts a nursery that has imported the same (`preloaded`), with the environment that the function had, and the next
function with that environment comes from there. Everything else gets a new interpreter, as does a function that
might find other modules than were preloaded.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rm.runtime.entry import LARGE
from rm.runtime.nursery import Nursery
from rm.runtime.preloaded import MARK, ROOM
from rm.runtime.processes import RankProcess

IDLE_S = 60.0
"""After this long without a function the preloaded interpreter goes: it holds some hundred MiB."""
ORIGINS_BYTES = 1 << 18
OWN = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "MASTER_PORT",
        "PWD",
        MARK,
        "RM_JOB_ID",
        "RM_ATTEMPT",
        "RM_CHECKPOINT_DIR",
    }
    | {"RM_STOP_FILE", "RM_REPORT_FILE", "RM_ARRAY_INDEX", "RM_ARRAY_SIZE"}
)
"""Variables in which two attempts differ by their nature. No module looks at them when it is imported."""


class Preloading:
    """One runner's. Used by its event loop."""

    def __init__(self, minds: Sequence[str] = ()) -> None:
        """`minds`: as for `Nursery`."""
        self._minds = minds
        self._nursery: Nursery | None = None
        self._env: dict[str, str] = {}
        self._modules: tuple[str, ...] = ()
        self._origins: dict[str, str] = {}
        """The top-level modules that it has, with their files; empty until it has told."""
        self._expiry: asyncio.TimerHandle | None = None

    def nursery(self, processes: Sequence[RankProcess]) -> Nursery | None:
        """The nursery that these ranks may come from, if there is one."""
        if self._nursery is None or not self._nursery.alive:
            return None
        if not self._origins:
            said = self._nursery.said(ORIGINS_BYTES)
            self._origins = json.loads(said) if said else {}
        fits = self._origins and all(each.entry and _shared(each.env) == self._env for each in processes)
        if not fits or shadowed(self._origins, processes[0].cwd):
            return None
        self._postpone()
        return self._nursery

    def learn(self, process: RankProcess, modules: Collection[str]) -> None:
        """A function with this environment has imported these: preload what is large of them."""
        wanted, env = tuple(name for name in LARGE if name in modules), _shared(process.env)
        if not wanted or (
            self._nursery is not None and env == self._env and set(wanted) <= set(self._modules)
        ):
            return
        self.close()
        self._env, self._modules = env, wanted
        command = (sys.executable, "-m", "rm.runtime.preloaded", *wanted)
        self._nursery = Nursery(command, env | {MARK: "-" * (ROOM - 1)}, minds=self._minds)
        self._nursery.start()
        self._postpone()

    def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if self._nursery is not None:
            self._nursery.close()
        self._nursery, self._origins, self._expiry = None, {}, None

    def _postpone(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(IDLE_S, self.close)


def _shared(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in OWN}


def shadowed(origins: Mapping[str, str], directory: str) -> bool:
    """Whether the directory, which comes first on the path, has another module of a name that is loaded already."""
    try:
        found = os.listdir(directory)  # noqa: PTH208 - names are enough
    except OSError:
        return True
    ours = [(name, origins[stem]) for name in found if (stem := name.partition(".")[0]) in origins]
    return any(not Path(origin).is_relative_to(Path(directory, name)) for name, origin in ours)
