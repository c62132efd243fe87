"""A lease: GPUs for the user's own Ray tasks and actors, as long as the holder lives and wants them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rm.errors import JobNotFinished, LeaseLost
from rm.job import TERMINAL, WAIT_SLICE_S, Job

if TYPE_CHECKING:
    from rm.client import Client


class Lease:
    """Use as a context manager:

        with client.lease(num_gpus=1) as lease:
            ray.get(train.options(**lease.options()).remote())

    The GPUs come back when the block ends, when this process dies, or after `end()`.
    """

    def __init__(self, client: Client, job: Job, timeout: float | None) -> None:
        self._client = client
        self._job = job
        self._timeout = timeout
        self._group: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        """The lease's job id: it is listed, shown and cancelled like any job."""
        return self._job.id

    @property
    def job(self) -> Job:
        return self._job

    def acquire(self) -> Self:
        """Wait for the GPUs. Raises JobNotFinished after the timeout, which gives the request up; LeaseLost."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        view = self._job.view()
        while view.status != "RUNNING":
            if view.status in TERMINAL:
                message = (view.outcome or {}).get("message", "")
                raise LeaseLost(f"lease {self.id} {view.status}: {message}", job=self.id)
            left = WAIT_SLICE_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                why = self._job.why()
                self.end()
                raise JobNotFinished(f"no GPUs for the lease within {self._timeout:g} s. {why}", job=self.id)
            view = self._job.changed(view.status, min(left, WAIT_SLICE_S))
        self._group = self._client._allocator("lease", self.id)
        return self

    def options(self, bundle: int = 0) -> dict[str, Any]:
        """For `fn.options(**lease.options())`: all GPUs of one bundle. Raises LeaseLost when it is over."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self.placement_group()
        assert self._group is not None
        resources = self._group["bundles"][bundle]
        return {
            "num_gpus": resources["GPU"],
            "num_cpus": resources.get("CPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
        }

    def placement_group(self) -> Any:
        """Ray's own handle of the reserved group, for libraries that take one."""
        from ray._raylet import PlacementGroupID
        from ray.util.placement_group import PlacementGroup

        if self._group is None:
            raise LeaseLost(f"lease {self.id} is not held: use it inside its with block", job=self.id)
        # Asked each time: a time limit or a dead node ends a lease behind its holder's back.
        self._group = self._client._allocator("lease", self.id)
        bundles = self._group["bundles"]
        return PlacementGroup(PlacementGroupID(bytes.fromhex(self._group["group_id"])), bundles)

    def end(self) -> None:
        """Give the GPUs back. Waits until they are free; ending twice is harmless."""
        self._group = None
        self._client._allocator("cancel", self.id, self._job.by, released=True)
        self._job.wait(60)

    def __enter__(self) -> Self:
        try:
            return self.acquire()
        except BaseException:
            self.end()
            raise

    def __exit__(self, *_: object) -> None:
        self.end()

    def __repr__(self) -> str:
        return f"<rm.Lease {self.id} {self._job.last.status}>"
