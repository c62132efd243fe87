"""The nodes that boot, as one cycle plans with them: for whom they are, and who is served before others for it.

For whom they boot was worked out by the last look at what is wanted (`scaleup`), in the order and under the quotas of
that moment. A gang that waits for several of them gets each as it comes (`backfill`), unless somebody who comes
before it takes it first. Where a node is on its way for him as well, that costs the gang much and gains him little.
So a gang that waits for several nodes is served before the jobs of one bundle in its queue that wait for one, unless
their priority is higher. They wait for their own node, and no longer than the gang waits for its others: when the
gang has started, or a boot has failed, they take what there is like anybody.
"""

from __future__ import annotations

from collections.abc import Iterator

from rm.core.capacity import matches
from rm.core.keeping import Kept
from rm.core.launches import Boot, Want
from rm.core.model import Job, NodeShape
from rm.core.options import Option
from rm.core.resources import GPU_UNIT
from rm.core.state import ClusterState


class Boots:
    """What boots during one cycle."""

    def __init__(self, state: ClusterState, now: float, kept: Kept) -> None:
        self._state = state
        self._now = now
        self._kept = kept

    def expected(self, job: Job) -> bool:
        """Whether nodes were wanted for the job before this moment."""
        return job.id in self._state.launches.wanted_before(self._now)

    def of(self, job: Job, option: Option) -> list[Boot]:
        """The nodes that boot for the job and count under this option."""
        launches, found = self._state.launches, list[Boot]()
        want = launches.wanted_before(self._now).get(job.id)
        if want is None:
            return found
        left = list(want.node_types)
        others = {each.node_id for one in self._kept.reservations.values() for each in one.boots}
        for boot in launches.boots(self._state.policy, self._now):
            name = boot.shape.name
            if name in left and boot.node_id not in others and self._counts(boot.shape, job, option):
                left.remove(name)
                found.append(boot)
        return found

    def before(self, job: Job) -> Iterator[Job]:
        """The gangs that are served before the job since a node is on its way for it too."""
        state = self._state
        wants = state.launches.wanted_before(self._now)
        if job.id not in wants or job.gang.count > 1:
            return
        for job_id, want in wants.items():
            gang = state.jobs.get(job_id)
            if gang is None or gang.queue != job.queue or gang.priority < job.priority:
                continue
            if gang.gang.count > 1 and self._needs_several(gang, want):
                yield gang

    def _needs_several(self, job: Job, want: Want) -> bool:
        """Whether it needs more than one node, be it that others are up."""
        types = self._state.launches.types
        first = types.get(want.node_types[0])
        return len(want.node_types) > 1 or (
            first is not None and first.gpu_slots * GPU_UNIT < job.gang.least_units
        )

    def _counts(self, shape: NodeShape, job: Job, option: Option) -> bool:
        """Whether nodes of this shape would be among the option's."""
        rules = self._state.policy.queues[job.queue]
        kind = self._state.books.quota.kind(shape.gpu_type)
        one_type = not job.gang.gpu_types or shape.gpu_type == option.gpu_type
        return kind == option.kind and one_type and matches(job.gang.on(rules.labels), shape.labels)
