"""A client without a cluster: the real `Client`, `Job` and `LogReader`, asking this instead of Ray's actors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from rm.client import Client
from rm.errors import UnknownJob, UnknownNode
from rm.ledger.codec import decode_spec
from rm.spec import JobSpec
from rm.views import AuditView, EventView, JobView, NodeView, QueueView

HOSTILE = "[red]x[/red] \x1b[2J\x1b]0;gotcha\x07 [/] \u202egnp.exe \x9b31m"
"""Rich markup, escape sequences, a broken closing tag, a right-to-left override and a C1 control."""


def view(job_id: str, status: str = "RUNNING", **fields: Any) -> JobView:
    ended = status in ("SUCCEEDED", "FAILED", "CANCELLED", "TIMED_OUT")
    values: dict[str, Any] = {
        "id": job_id, "name": "train.py", "owner": "ada", "kind": "command", "queue": "default", "priority": 0,
        "status": status, "gpus": 2, "bundles": 1, "gpus_per_bundle": 2, "ranks": 1, "gpu_types": (), "attempts": 1,
        "failures": 0, "infra_failures": 0, "submitted_at": 1_700_000_000.0,
        "started_at": None if status == "QUEUED" else 1_700_000_010.0,
        "ended_at": 1_700_000_100.0 if ended else None, "time_limit_s": None, "command": "python train.py",
    }  # fmt: skip
    return JobView(**{**values, **fields})


def node(name: str, gpus: int, charged: float = 0, foreign: float = 0, **fields: Any) -> NodeView:
    values: dict[str, Any] = {
        "id": "ab" * 28, "name": name, "gpu_type": None, "gpus": gpus, "charged_gpus": charged,
        "foreign_gpus": foreign, "free_gpus": gpus - charged - foreign, "cpus": 8, "memory_bytes": 2**35, "jobs": (),
    }  # fmt: skip
    return NodeView(**{**values, **fields})


def queue(name: str, parent: str | None = None, **fields: Any) -> QueueView:
    values: dict[str, Any] = {
        "nominal": {}, "used": {}, "borrowed": {}, "lent": {}, "share": 0.0, "weight": 1.0, "running": 0,
        "pending": 0, "stopped": False, "preempt": "never", "reclaim": "any",
    }  # fmt: skip
    return QueueView(name=name, parent=parent, **{**values, **fields})


def event(seq: int, kind: str, job_id: str | None = "j1", at: float = 0.0, **fields: Any) -> EventView:
    values: dict[str, Any] = {
        "attempt": None, "body": {}, "free_before": 2, "free_after": 2, "charged_before": 0, "charged_after": 0,
    }  # fmt: skip
    return EventView(seq=seq, at=1_700_000_000.0 + at, kind=kind, job_id=job_id, **{**values, **fields})


@dataclass
class Chunk:
    data: bytes
    next_offset: int


class FakeClient(Client):
    """What the allocator and the store would answer is in plain attributes."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(hello={"ledger_key": "k", "home": "/nowhere"}))
        self.owner = "ada"
        self.views: dict[str, JobView] = {}
        self.node_views: list[NodeView] = []
        self.event_views: list[EventView] = []
        self.queue_views: list[QueueView] = []
        self.applied: list[tuple[str, bool, bool]] = []
        """Text, `dry_run` and `force` of each rm.yaml that was to be applied."""
        self.warnings: list[str] = []
        self.consequences: list[str] = []
        self.audits: list[AuditView] = []
        """The answers to `audit`, in order."""
        self.audits_asked: list[bool] = []
        """`look` of each time that an audit was asked for."""
        self.cordoned: list[tuple[list[str], str, bool, float | None]] = []
        """Nodes, reason, whether to drain and the deadline of each cordon that was asked for."""
        self.reasons: dict[str, dict[str, Any]] = {}
        self.output: dict[tuple[int, str], bytes] = {}
        self.submitted: list[JobSpec] = []
        self.keeps: dict[str, float] = {"store_keep_days": 30.0, "store_keep_bytes": 50 * 2**30}
        """What `hello` tells of the store's limits."""
        self.stopped: list[tuple[bool, bool]] = []
        """`cancel_jobs` and `keep_jobs` of each time that the allocator was to end."""
        self.connected: list[tuple[str | None, bool]] = []
        """Address and `start` of each connection that a command made."""

    def add(self, *views: JobView) -> None:
        self.views |= {each.id: each for each in views}

    def _allocator(self, method: str, *args: Any, timeout_s: float = 60.0, **kwargs: Any) -> Any:
        return getattr(self, f"on_{method}")(*args, **kwargs)

    def _store(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        return getattr(self, f"on_{method}")(*args)

    def stop_allocator(self, *, cancel_jobs: bool = False, keep_jobs: bool = False) -> None:
        self.stopped.append((cancel_jobs, keep_jobs))

    def apply(self, text: str, *, dry_run: bool = False, force: bool = False) -> dict[str, Any]:
        self.applied.append((text, dry_run, force))
        return {"applied": not dry_run, "warnings": self.warnings, "consequences": self.consequences}

    def queues(self) -> list[QueueView]:
        return self.queue_views

    # --- the allocator's answers ---------------------------------------------------------------------------

    def on_hello(self) -> dict[str, Any]:
        return self._actors.hello | self.keeps

    def on_settled(self, _job_id: str) -> None:
        """All logs are whole."""

    def on_submit(self, submission: tuple[list[str], list[str], str]) -> list[str]:
        texts, _, _ = submission
        self.submitted += map(decode_spec, texts)
        return [f"j{number}" for number in range(1, len(texts) + 1)]

    def on_job(self, job_id: str) -> JobView:
        if job_id not in self.views:
            raise UnknownJob(f"no job {job_id!r} in this ledger; `rmctl ls --all` lists them", job=job_id)
        return self.views[job_id]

    def on_jobs(self, *, live_only: bool, owner: str | None, name: str | None, limit: int) -> list[JobView]:
        found = [each for each in self.views.values() if owner in (None, each.owner)]
        return [each for each in found if not (live_only and each.ended)][:limit]

    def on_wait(self, job_id: str, _timeout_s: float, _seen: str | None) -> JobView:
        return self.on_job(job_id)

    def on_cancel(self, job_id: str, _by: str, *, released: bool = False) -> JobView:
        self.views[job_id] = replace(self.on_job(job_id), status="CANCELLED", ended_at=1_700_000_200.0)
        return self.views[job_id]

    def on_cancel_all(self, owner: str, _by: str) -> int:
        theirs = [each.id for each in self.views.values() if each.owner == owner]
        for job_id in theirs:
            self.on_cancel(job_id, _by)
        return len(theirs)

    def on_hold(self, job_id: str, by: str, *, held: bool) -> JobView:
        self.views[job_id] = replace(self.on_job(job_id), held=held, held_by=by if held else "")
        return self.views[job_id]

    def on_array(self, array_id: str) -> list[JobView]:
        return [each for each in self.views.values() if each.array == array_id and each.array_counts is None]

    def on_why(self, job_id: str) -> dict[str, Any]:
        return self.reasons.get(job_id, {"code": "NotWaiting", "message": ""})

    def on_nodes(self, *, gone: bool = False, booting: bool = False) -> list[NodeView]:
        unasked = ([] if gone else ["gone"]) + ([] if booting else ["booting"])
        return [each for each in self.node_views if each.status not in unasked]

    def on_audit(self, *, look: bool) -> AuditView:
        self.audits_asked.append(look)
        return self.audits.pop(0)

    def on_cordon(
        self,
        nodes: list[str],
        by: str,
        reason: str = "",
        *,
        drain: bool = False,
        deadline_s: float | None = None,
    ) -> list[NodeView]:
        deadline = None if deadline_s is None else 1_700_000_000.0 + deadline_s
        cordon = {"by": by, "reason": reason, "at": 1_700_000_000.0, "deadline": deadline}
        found = self._named(nodes)
        self.cordoned.append((nodes, reason, drain, deadline_s))
        for each in found:
            status = ("draining" if each.jobs else "drained") if drain else "cordoned"
            self._put(replace(each, status=status, free_gpus=0, cordon=cordon))
        return self._named(nodes)

    def on_uncordon(self, nodes: list[str], by: str) -> list[NodeView]:
        for each in self._named(nodes):
            self._put(replace(each, status="ready", cordon=None))
        return self._named(nodes)

    def _named(self, nodes: list[str]) -> list[NodeView]:
        there = {each.name: each for each in self.node_views}
        for name in nodes:
            if name not in there:
                raise UnknownNode(f"there is no node {name!r}; there are {', '.join(there)}", field="node")
        return [there[name] for name in nodes]

    def _put(self, view: NodeView) -> None:
        self.node_views = [view if each.id == view.id else each for each in self.node_views]

    def on_events(self, job_id: str | None = None, after: int = 0, limit: int = 1000) -> list[EventView]:
        found = [each for each in self.event_views if each.seq > after and job_id in (None, each.job_id)]
        return found[:limit]

    # --- the store's answers -------------------------------------------------------------------------------

    def on_has_blobs(self, sha256s: list[str]) -> set[str]:
        return set(sha256s)

    def on_logs(self, _job_id: str) -> list[Any]:
        return [
            SimpleNamespace(attempt=1, rank=rank, stream=stream, closed=True) for rank, stream in self.output
        ]

    def on_read_log(
        self, _job_id: str, _attempt: int, rank: int, stream: str, offset: int, most: int
    ) -> Chunk:
        data = self.output[rank, stream][offset : offset + most]
        return Chunk(data, offset + len(data))
