"""One job as its submitter sees it: a handle that asks the allocator, and the store for logs and results."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import cloudpickle

from rm.errors import JobFailed, JobNotFinished, RequestError
from rm.logs import LogReader
from rm.runtime.entry import load_error
from rm.views import EventView, JobView

if TYPE_CHECKING:
    from rm.client import Client

WAIT_SLICE_S = 20.0
EARLY_S = 0.5
"""An answer without news that comes so much before its time was not waited for."""
PAUSE_S = 1.0, 3.0
MOST_NAMED = 3
"""Nodes whose names stand in an estimate."""
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "TIMED_OUT"})


class Why(dict[str, Any]):
    """A reason: a dict (code, message, evidence, advice) that prints as a sentence."""

    def __str__(self) -> str:
        advice = f" ({self['advice']})" if self.get("advice") else ""
        start = f"; {self.start}" if self.start else ""
        return f"{self['code']}: {self['message']}{advice}{start}"

    __repr__ = __str__

    @property
    def estimated(self) -> bool:
        """Whether there is an estimate of its start."""
        return (self.get("start") or {}).get("p50_s") is not None

    @property
    def start(self) -> str:
        """When it will start, in words; empty where it does not wait for GPUs."""
        forecast = self.get("start")
        if not forecast:
            return ""
        p50_s, p90_s = forecast["p50_s"], forecast["p90_s"]
        if p50_s is None:
            return f"no estimate of its start: {forecast['basis']}"
        late = "later than can be told" if p90_s is None else f"{about(p90_s)} in the worst of ten cases"
        on_type = f" on {forecast['gpu_type']}" if forecast.get("gpu_type") else ""
        nodes, new, price = (forecast.get(name) for name in ("nodes", "new_nodes", "price"))
        wait_s = forecast.get("wait_s")
        wait = (
            f"; without it in about {about(wait_s)}{_on(forecast['wait_nodes'])}"
            if wait_s is not None
            else ""
        )
        where = _on(nodes or (), new or (), price)
        return f"it will start{on_type} in about {about(p50_s)}{where}, {late}{wait} (estimated)"


def _on(nodes: Sequence[str], new: Sequence[str] = (), price: float | None = None) -> str:
    """ " on a100-1 and a new g5.12xlarge (5.67 an hour)"; of many nodes the first and how many more."""
    words = (
        list(nodes) if len(nodes) <= MOST_NAMED else [*nodes[:MOST_NAMED], f"{len(nodes) - MOST_NAMED} more"]
    )
    words += [
        f"a new {name}" if count == 1 else f"{count} new {name}"
        for name, count in sorted(Counter(new).items())
    ]
    if new and price is not None:
        words[-1] += f" ({price:.4g} an hour)"
    if not words:
        return ""
    return f" on {', '.join(words[:-1])} and {words[-1]}" if words[1:] else f" on {words[0]}"


def about(seconds: float) -> str:
    """A duration as people say it: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for unit, size, least in (("days", 86_400, 2), ("h", 3_600, 2), ("min", 60, 2)):
        if seconds >= least * size:
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 10 or unit == "min" else f"{count:.1f} {unit}"
    return f"{seconds:.0f} s"


class Job:
    """A handle. It holds nothing but the id: any process that can connect can make one with `client.job(id)`.

    That of an array stands for all its jobs: its status is RUNNING while any runs and SUCCEEDED when all have; wait,
    cancel, hold and release concern all of them, and `jobs()` gives each.
    """

    def __init__(
        self, client: Client, job_id: str, view: JobView | None = None, *, by: str | None = None
    ) -> None:
        self._client = client
        self._view = view
        self._by = by
        self.id = job_id

    @property
    def by(self) -> str:
        """In whose name this handle changes the job: its submitter's `owner=`, else the client's owner."""
        return self._client.owner if self._by is None else self._by

    # --- state -------------------------------------------------------------------------------------------

    def view(self) -> JobView:
        """Everything about the job, read now."""
        self._view = self._client._allocator("job", self.id)
        return self._view

    @property
    def last(self) -> JobView:
        """What was last read, without asking again."""
        return self._view or self.view()

    @property
    def status(self) -> str:
        """QUEUED, RESERVING, RUNNING, STOPPING, SUCCEEDED, FAILED, CANCELLED or TIMED_OUT, read now."""
        return self.view().status

    @property
    def progress(self) -> dict[str, Any]:
        """The metrics that the job's rank 0 reported last, {} if none."""
        return dict((self.view().progress or {}).get("metrics", {}))

    @property
    def name(self) -> str:
        return self.last.name

    def why(self) -> Why:
        """Why it does not run yet, with evidence and what could be changed."""
        return Why(self._client._allocator("why", self.id))

    def events(self) -> list[EventView]:
        """What happened to it, oldest first, from the ledger."""
        events: list[EventView] = []
        while True:
            after = events[-1].seq if events else 0
            page: list[EventView] = self._client._allocator("events", self.id, after)
            events += page
            if not page:
                return events

    def jobs(self) -> list[Job]:
        """The jobs of this array, by index; the job itself where it is none."""
        if self.last.array_counts is None:
            return [self]
        views: list[JobView] = self._client._allocator("array", self.id)
        return [Job(self._client, view.id, view, by=self._by) for view in views]

    # --- waiting -----------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> JobView:
        """Wait until the job has ended and its GPUs are free again. Raises JobNotFinished after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = WAIT_SLICE_S if deadline is None else deadline - time.monotonic()
            view = self.changed(None, max(0.0, min(left, WAIT_SLICE_S)))
            if view.status in TERMINAL:
                return view
            if deadline is not None and time.monotonic() >= deadline:
                raise JobNotFinished(
                    f"{self.id} is still {view.status} after {timeout:g} s; it goes on", job=self.id
                )

    def changed(self, status: str | None, timeout: float = WAIT_SLICE_S) -> JobView:
        """The job once its status differs from `status`, or it has ended, or `timeout` seconds have passed."""
        began = time.monotonic()
        self._view = self._client._allocator("wait", self.id, timeout, status, timeout_s=timeout + 60)
        left = timeout - (time.monotonic() - began)
        if left > EARLY_S and self._view.status not in TERMINAL and status in (None, self._view.status):
            # Too many wait: the allocator did not keep us, so that others get through. A while later, then.
            time.sleep(min(left, random.uniform(*PAUSE_S)))  # noqa: S311
        return self._view

    def result(self, timeout: float | None = None) -> Any:
        """What the function returned (None for a command), for an array the list of what each job returned.

        Raises JobFailed, from its own exception if it had one.
        """
        view = self.wait(timeout)
        if view.array_counts is not None:
            return [job.result() for job in self.jobs()]
        data = self._store("get_result") if view.kind == "function" else None
        payload = cloudpickle.loads(data) if data else {}
        if view.status == "SUCCEEDED":
            if view.kind == "function" and "ok" not in payload:
                raise RequestError(
                    f"{self.id} succeeded, and its result is no longer in the store: for how long and how much is kept "
                    "there is set by RM_STORE_KEEP_DAYS and RM_STORE_KEEP_BYTES where the allocator is started",
                    job=self.id,
                )
            return payload.get("ok")
        raise self._failure(view) from _own_exception(payload)

    def _failure(self, view: JobView) -> JobFailed:
        outcome = view.outcome or {}
        tail = list(outcome.get("tail") or ())
        text = f"{self.id} {view.status}: {outcome.get('message') or 'no reason was recorded'}"
        if tail:
            text += "\n  last lines:\n" + "\n".join(f"    {line}" for line in tail[-10:])
        return JobFailed(
            text,
            job=self.id,
            status=view.status,
            rank=outcome.get("rank"),
            exit_code=outcome.get("exit_code"),
            signal=outcome.get("signal"),
            tail=tail,
        )

    def cancel(self) -> JobView:
        """Ask the job to end: SIGTERM, its grace, SIGKILL. Returns at once; `wait()` for the end.

        Raises NotAllowed, as `hold` and `release`, for somebody else's job where the rules name admins.
        """
        self._view = self._client._allocator("cancel", self.id, self.by)
        return self._view

    def hold(self) -> JobView:
        """Keep it from starting, as long as it is still queued. Raises RequestError for a job that is not."""
        self._view = self._client._allocator("hold", self.id, self.by, held=True)
        return self._view

    def release(self) -> JobView:
        """Let a held job go."""
        self._view = self._client._allocator("hold", self.id, self.by, held=False)
        return self._view

    # --- logs --------------------------------------------------------------------------------------------

    @overload
    def logs(
        self, *, follow: Literal[False] = False, rank: int | None = None, stream: str | None = None
    ) -> str: ...

    @overload
    def logs(
        self, *, follow: Literal[True], rank: int | None = None, stream: str | None = None
    ) -> Iterator[str]: ...

    def logs(
        self, *, follow: bool = False, rank: int | None = None, stream: str | None = None
    ) -> str | Iterator[str]:
        """The last attempt's output as text; with `follow` an iterator of lines that ends when the job does.

        `rank`: only that one. `stream`: "out" or "err", default both. With several ranks lines begin with
        "[rank N]".
        """
        if (size := sum((self.view().array_counts or {}).values())) > 0:
            raise RequestError(
                f"{self.id} is an array; its jobs print for themselves: {self.id}_0 to {self.id}_{size - 1}",
                job=self.id,
            )
        reader = LogReader(self, rank=rank, stream=stream)
        return reader.follow() if follow else "".join(line + "\n" for line in reader.read())

    def logs_removed(self) -> str:
        """Why there are no logs any more of a job that has long ended, by which setting; "" where none were removed."""
        return LogReader(self, rank=None, stream=None).removed()

    def _store(self, method: str, *args: Any) -> Any:
        """Ask the store about this job, by the name that the job has there."""
        from rm.runtime.orders import archive_id

        ledger_key = self._client.ledger_key
        return self._client._store(method, archive_id(ledger_key, self.id), *args)

    # --- showing -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        view = self.last
        return f"<rm.Job {self.id} {view.name!r} {view.status} {view.gpus:g} GPU>"

    def _repr_html_(self) -> str:
        from rm.notebook import job_card

        view = self.view()
        return job_card(view, self.why() if view.status == "QUEUED" else None)


def _own_exception(payload: dict[str, Any]) -> BaseException | None:
    """The exception that the function raised, where it travelled."""
    error = payload.get("error")
    return load_error(error) if error else None
