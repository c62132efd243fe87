"""What there is and what becomes of it: ls, show, logs, why, wait, hold, release, cancel."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from rm import tables
from rm.cli.screen import exit_code, note, say_error, show, show_json
from rm.cli.session import AsJson, JobId, JobIds, connect
from rm.errors import InvalidSpec, RmError
from rm.plain import plain

if TYPE_CHECKING:
    from rm.client import Client
    from rm.job import Job, Why
    from rm.views import EventView, JobView

WATCH_S = 1.0


def list_jobs(
    ctx: typer.Context,
    job_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The jobs of this array.")] = None,
    all_: Annotated[bool, typer.Option("--all", "-a", help="Ended jobs too.")] = False,
    owner: Annotated[str | None, typer.Option(help="Only this person's.")] = None,
    mine: Annotated[bool, typer.Option("--mine", "-m", help="Only yours.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 100,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep looking until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> int:
    """List the jobs that live, newest first: what runs, what waits, and why."""
    if watch and as_json:
        raise InvalidSpec(
            "watch: it is for people; call `rmctl ls --json` as often as you need", field="watch"
        )
    client = connect(ctx)
    owner = client.owner if mine else owner

    def read() -> list[JobView]:
        if job_id is not None:
            return [job.last for job in client.job(job_id).jobs()]
        return [job.last for job in client.jobs(all=all_, owner=owner, limit=limit)]

    if watch:
        return _watch(read)
    views = read()
    if as_json:
        show_json([view.to_dict() for view in views])
    elif views:
        show(tables.jobs_table(views))
        if job_id is None and len(views) == limit:
            note(f"only the newest {limit} are listed; --limit shows more")
    else:
        note(_nothing(client, all_, owner))
    return 0


def _nothing(client: Client, all_: bool, owner: str | None) -> str:
    """An empty list, and the way on."""
    nodes = client.nodes()
    free, total = sum(node.free_gpus for node in nodes), sum(node.gpus for node in nodes)
    whose = f" of {owner}" if owner else ""
    none = f"no jobs{whose}" if all_ else f"no live jobs{whose} (rmctl ls --all lists ended ones)"
    return f"{none}; {free:g} of {total:g} GPUs are free. Run something: rmctl run -g 1 -- python train.py"


def _watch(read: Callable[[], list[JobView]]) -> int:
    """Show the list anew every second on a terminal; elsewhere print it whenever something has changed."""
    screen = tables.console()
    shown: Any = None
    try:
        if not screen.is_terminal:
            while True:
                views = read()
                state = [(view.id, view.status, view.attempts) for view in views]
                if state != shown:
                    show(tables.jobs_table(views), "")
                shown = state
                time.sleep(WATCH_S)
        from rich.live import Live

        with Live(console=screen, screen=True, auto_refresh=False) as live:
            while True:
                live.update(tables.jobs_table(read()), refresh=True)
                time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return 0


def show_job(ctx: typer.Context, job_id: JobId, as_json: AsJson = False) -> int:
    """Everything about one job or array, and what happened to it."""
    job = connect(ctx).job(job_id)
    view, events = job.last, job.events()
    if as_json:
        show_json({**view.to_dict(), "events": [each.to_dict() for each in events]})
        return 0
    why = job.why() if view.status == "QUEUED" else None
    show(tables.facts_table(_facts(view, why.start if why is not None and why.estimated else "")))
    tail = (view.outcome or {}).get("tail") or ()
    if tail and view.status != "SUCCEEDED":
        show("", Text("Its last lines", style="bold"))
        show(*(Padding(Text(plain(line)), (0, 0, 0, 2)) for line in tail))
    show("", Text("What happened", style="bold"), tables.events_table(events, view.submitted_at))
    return 0


def _facts(view: JobView, start: str) -> Iterable[tuple[str, object]]:
    waits = (view.reason or {}) if view.status == "QUEUED" else {}
    yield "job", f"{view.id} {view.name}"
    yield "status", tables.status(view.status)
    yield "command", view.command
    yield "owner", view.owner
    yield "queue", f"{view.queue}, priority {view.priority}"
    yield "array", _array(view)
    yield "held by", view.held_by if view.held else ""
    yield "after", ", ".join(view.after)
    yield "GPUs", tables.gpus(view)
    yield "holds", f"{view.held_gpus:g} GPUs" if 0 < view.held_gpus < view.gpus else ""
    yield "processes", view.ranks if view.ranks > 1 else ""
    yield "nodes", ", ".join(view.nodes)
    yield "submitted", tables.moment(view.submitted_at)
    yield "started", tables.moment(view.started_at)
    yield "ended", tables.moment(view.ended_at)
    yield "time", tables.times(view)
    yield "time limit", tables.span(view.time_limit_s) if view.time_limit_s else ""
    yield "attempts", _attempts(view)
    yield "spared", _spared(view)
    yield "checkpoint", tables.moment(view.checkpoint_at)
    yield "progress", tables.progress(view)
    yield "waits", tables.reason(waits)
    yield "advice", waits.get("advice")
    yield "start", start
    yield "outcome", (view.outcome or {}).get("message")


def _attempts(view: JobView) -> str:
    if view.attempts < 2 and not view.evictions:
        return ""
    why = [f"{view.failures} failed", f"{view.infra_failures} lost with a node or runner"]
    if view.evictions:
        why.append(f"{view.evictions} evicted for others")
    return f"{view.attempts} ({', '.join(why)})"


def _array(view: JobView) -> str:
    if view.array_counts is not None:
        counts = ", ".join(f"{count} {status}" for status, count in view.array_counts.items())
        return f"{sum(view.array_counts.values())} jobs: {counts}"
    return f"number {view.array_index} of {view.array}" if view.array else ""


def _spared(view: JobView) -> str:
    """Whether others may take its GPUs."""
    if not view.preemptible:
        return "it is never stopped for others"
    return (
        f"not stopped for others in its first {tables.span(view.min_runtime_s)}" if view.min_runtime_s else ""
    )


def logs(
    ctx: typer.Context,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only this process.")] = None,
    out: Annotated[bool, typer.Option("--stdout", help="Only its stdout.")] = False,
    err: Annotated[bool, typer.Option("--stderr", help="Only its stderr.")] = False,
) -> int:
    """What the job has printed, as it printed it."""
    job = connect(ctx).job(job_id)
    ranks = job.last.ranks
    if rank is not None and rank >= ranks:
        there_are = f"they go from 0 to {ranks - 1}" if ranks > 1 else "it has one process, rank 0"
        raise InvalidSpec(f"rank: {job.id} has no rank {rank}; {there_are}", field="rank")
    stream = None if out == err else "out" if out else "err"
    printed = False
    if follow:
        for line in job.logs(follow=True, rank=rank, stream=stream):
            printed = True
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    else:
        text = job.logs(rank=rank, stream=stream)
        printed = bool(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    if not printed:
        nothing = f"{job.id} has printed nothing{'' if job.last.ended else ' yet'}: it is {job.last.status}"
        note(job.logs_removed() or nothing)
    return 0


def why(ctx: typer.Context, job_id: JobId, as_json: AsJson = False) -> int:
    """Why a job does not run yet, with the evidence."""
    answer: Why = connect(ctx).job(job_id).why()
    if as_json:
        show_json(answer)
        return 0
    show(plain(tables.reason(answer)))
    evidence = answer.get("evidence") or {}
    if evidence:
        show(Padding(tables.facts_table(evidence.items()), (0, 0, 0, 2)))
    if answer.get("advice"):
        show(plain(answer["advice"]))
    if answer.start:
        show(plain(answer.start))
    return 0


def cancel(
    ctx: typer.Context,
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]", help="j17, or just 17.")] = None,
    owner: Annotated[
        str | None, typer.Option("--all-of", metavar="OWNER", help="All that OWNER has.")
    ] = None,
    wait_: Annotated[bool, typer.Option("--wait", help="Until their GPUs are free.")] = False,
    as_json: AsJson = False,
) -> int:
    """End jobs.

    SIGTERM, then their grace, then SIGKILL. One that has ended already is left as it is. Where the rules name admins,
    only they and a job's owner may.
    """
    if (owner is None) == (not job_ids):
        raise typer.BadParameter("name the jobs, or whose with --all-of OWNER")
    if owner is not None:
        if wait_:
            raise typer.BadParameter("--wait is for jobs that are named; rmctl ls shows what is left")
        count = connect(ctx).cancel_all(owner)
        if as_json:
            show_json({"owner": owner, "cancelled": count})
        else:
            show(plain(f"{count} jobs of {owner} were told to end"))
        return 0
    assert job_ids is not None
    jobs, failed = _each(connect(ctx), job_ids, lambda job: job.cancel())
    if wait_:
        for job in jobs:
            job.wait()
    _report(jobs, as_json)
    return failed


def hold(ctx: typer.Context, job_ids: JobIds, as_json: AsJson = False) -> int:
    """Keep queued jobs from starting until they are released."""
    jobs, failed = _each(connect(ctx), job_ids, lambda job: job.hold())
    _report(jobs, as_json)
    return failed


def release(ctx: typer.Context, job_ids: JobIds, as_json: AsJson = False) -> int:
    """Let held jobs go."""
    jobs, failed = _each(connect(ctx), job_ids, lambda job: job.release())
    _report(jobs, as_json)
    return failed


def wait_for(
    ctx: typer.Context,
    job_ids: JobIds,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after so long.")] = None,
    as_json: AsJson = False,
) -> int:
    """Wait until jobs have ended and their GPUs are free.

    The exit code is 0 only if all of them succeeded.
    """
    jobs, failed = _each(connect(ctx), job_ids, lambda job: job.last)
    deadline = None if timeout is None else time.monotonic() + timeout
    for job in jobs:
        job.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not as_json:
            _report([job], as_json=False)
    if as_json:
        _report(jobs, as_json)
    return failed or int(any(job.last.status != "SUCCEEDED" for job in jobs))


def _each(client: Client, job_ids: list[str], act: Callable[[Job], object]) -> tuple[list[Job], int]:
    """Do it to every job, the wrong ids notwithstanding. The jobs that it was done to, and the first error's code."""
    jobs: list[Job] = []
    failed = 0
    for job_id in dict.fromkeys(job_ids):
        try:
            job = client.job(job_id)
            act(job)
        except RmError as error:
            say_error(error)
            failed = failed or exit_code(error)
        else:
            jobs.append(job)
    return jobs, failed


def _report(jobs: list[Job], as_json: bool) -> None:
    if as_json:
        show_json([job.last.to_dict() for job in jobs])
        return
    for job in jobs:
        view = job.last
        message = (view.outcome or {}).get("message") if view.status != "SUCCEEDED" else ""
        show(
            Text.assemble(f"{view.id} ", tables.status(view.status), plain(f": {message}" if message else ""))
        )


def events(
    ctx: typer.Context,
    job_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this job's.")] = None,
    after: Annotated[int, typer.Option(metavar="SEQ", help="Only those with a larger number.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest.")] = None,
    as_json: AsJson = False,
) -> int:
    """The history: what happened, with the GPUs around each event.

    From the ledger, oldest first. FREE and CHARGED are the cluster's GPUs right before and right after.
    """
    client = connect(ctx)
    found: list[EventView] = []
    if job_id is not None:
        found = [each for each in client.job(job_id).events() if each.seq > after][:limit]
    else:
        while limit is None or len(found) < limit:
            page = client.events(after=found[-1].seq if found else after, limit=min(limit or 1000, 1000))
            found += page
            if not page:
                break
        found = found[:limit]
    if as_json:
        show_json([each.to_dict() for each in found])
    elif found:
        show(tables.events_table(found))
    else:
        note("nothing has happened yet")
    return 0
