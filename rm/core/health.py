"""Which nodes fail more than their part: infrastructure failures per node in a sliding window, and broken GPUs.

What counts is what a node did to an attempt: its runner or its processes were lost or could not be started, or its
part of a placement group never came although its GPUs were free. A job's own exit code never counts, nor does
anything that happened to an attempt that was already told to stop. One job can't condemn a node: failures of at
least two are needed, since a job that brings down each node it runs on looks the same from there. What the driver
says of a GPU (`rm.core.gpu_errors`) needs no second witness.

A cache of recent facts: it is not stored, and a restart of the allocator begins with an empty one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from rm.core.model import attempt_key
from rm.core.policy import Policy

BY = "health"
"""In whose name nodes are cordoned that fail too often."""
NAMED = 5
"""Failures that a reason lists, the latest."""
MOST_KEPT = 1_000
"""Failures remembered of one node."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that a node failed."""

    at: float
    job_id: str
    attempt: int
    why: str


class Health:
    """The failures of each node. `ClusterState` tells it of every one."""

    def __init__(self) -> None:
        self._failures: dict[str, deque[Failure]] = {}
        self._broken: dict[str, str] = {}
        """Nodes with GPUs that can't go on, and what the driver says."""

    def note(self, node_id: str, failure: Failure) -> None:
        self._failures.setdefault(node_id, deque(maxlen=MOST_KEPT)).append(failure)

    def condemn(self, node_id: str, why: str) -> None:
        """A GPU of the node is broken: it is to take nothing new."""
        self._broken[node_id] = why

    def forget(self, node_id: str) -> None:
        self._failures.pop(node_id, None)
        self._broken.pop(node_id, None)

    def failing(self, policy: Policy, now: float) -> Iterator[tuple[str, str]]:
        """The nodes with broken GPUs, and those that have reached the policy's limit, each with a reason in words."""
        if not policy.node_failure_limit:
            return
        yield from sorted(self._broken.items())
        for node_id in sorted(self._failures):
            recent = self._failures[node_id]
            while recent and recent[0].at <= now - policy.node_failure_window_s:
                recent.popleft()
            if not recent:
                del self._failures[node_id]
            elif len(recent) >= policy.node_failure_limit and len({each.job_id for each in recent}) > 1:
                yield node_id, _reason(recent, policy)


def _reason(recent: deque[Failure], policy: Policy) -> str:
    listed = [f"{attempt_key(each.job_id, each.attempt)} ({each.why})" for each in list(recent)[-NAMED:]]
    more = "… " if len(recent) > NAMED else ""
    return (
        f"{len(recent)} infrastructure failures within {policy.node_failure_window_s:g} s: "
        f"{more}{'; '.join(listed)}"
    )
