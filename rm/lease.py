"""A lease: GPUs for the user's own Ray tasks and actors, as long as the holder lives and wants them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rm.errors import AllocatorUnavailable, JobNotFinished, LeaseLost
from rm.job import TERMINAL, WAIT_SLICE_S, Job

LAST_WORD_S = 2.0
"""How long an allocator is asked that does not answer any more."""

if TYPE_CHECKING:
    from rm.client import Client


class Lease:
    """Use as a context manager:

        with client.lease(num_gpus=1) as lease:
            ray.get(train.options(**lease.options()).remote())

    The GPUs come back when the block ends, when this process dies, or after `end()`.
    """

    def __init__(self, client: Client, job: Job, timeout: float | None, ttl_s: float) -> None:
        self._client = client
        self._job = job
        self._timeout = timeout
        self._ttl_s = ttl_s
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
        """For `fn.options(**lease.options())`: all GPUs of one bundle.

        Raises LeaseLost when it is over, also where the allocator has not answered for as long as it lives by itself.
        """
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
        left_s = self._ttl_s - self._client._heartbeat.silence_s
        try:
            self._group = self._client._allocator("lease", self.id, timeout_s=max(LAST_WORD_S, left_s))
        except AllocatorUnavailable as error:
            if not self._lost:
                raise
            raise LeaseLost(
                f"lease {self.id}: the allocator has not answered for {self._client._heartbeat.silence_s:.0f} s. It "
                f"ends a lease whose holder it does not hear for {self._ttl_s:g} s, and so does a new head: {error}",
                job=self.id,
            ) from error
        bundles = self._group["bundles"]
        return PlacementGroup(PlacementGroupID(bytes.fromhex(self._group["group_id"])), bundles)

    def end(self) -> None:
        """Give the GPUs back. Waits until they are free; ending twice is harmless.

        Where the allocator has been silent for as long as the lease lives by itself, it has nothing to give back.
        """
        self._group = None
        try:
            timeout_s = LAST_WORD_S if self._lost else 60
            self._client._allocator("cancel", self.id, self._job.by, released=True, timeout_s=timeout_s)
            self._job.wait(60)
        except AllocatorUnavailable:
            if not self._lost:
                raise
            self._client._heartbeat.drop(self.id)

    @property
    def _lost(self) -> bool:
        """Whether nobody has answered for as long as it lives without us."""
        return self._client._heartbeat.silence_s >= self._ttl_s

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
