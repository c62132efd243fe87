"""How jobs, nodes and events look on a terminal: Rich tables of the views, for `rmctl` and the demo.

Names, commands and messages are written by anybody, so nothing of them may reach the terminal as an instruction:
`rm.plain` shows control characters as escapes, and every console here takes text literally, without markup. On a
terminal tables fit its width; anywhere else they are as wide as their content, so that nothing is cut off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rm.plain import plain

if TYPE_CHECKING:
    from rm.views import AuditView, EventView, FindingView, JobView, NodeView, QueueView

PIPED_WIDTH = 100_000
"""Columns of a console that is no terminal: more than any table has."""
LONGEST_METRIC = 60
FOLDING = frozenset({"NAME", "QUEUE", "OWNER", "NOTE", "NODE", "TYPE", "JOBS", "WHAT", "DONE", "STATUS"})
"""Columns that give way on a narrow terminal, down to NARROWEST, by folding; the others keep their width."""
NARROWEST = 10
BAR_CELLS = 16
STRAYS_NAMED = 3
"""Processes that a node's status names; it counts the others."""
STYLES = {
    "QUEUED": "yellow",
    "RESERVING": "cyan",
    "RUNNING": "bold blue",
    "STOPPING": "magenta",
    "SUCCEEDED": "green",
    "FAILED": "bold red",
    "TIMED_OUT": "bold red",
    "CANCELLED": "dim",
}


def console(file: IO[str] | None = None) -> Console:
    """A console that shows text as it is: no markup, no emoji codes, no guessed colours."""
    file = file or sys.stdout
    width = None if file.isatty() else PIPED_WIDTH
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def write(screen: Console, what: RenderableType) -> None:
    """Print it. In a pipe without the blanks that fill up a table's last column."""
    if screen.is_terminal:
        screen.print(what)
        return
    with screen.capture() as captured:
        screen.print(what)
    screen.file.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
    screen.file.flush()


# --- amounts -----------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """A duration as people say it: "0.3 s", "4 min 05 s", "2 h 10 min", "3 d 4 h"."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def moment(at: float | None) -> str:
    """A point in time, local: "2026-03-01 14:05:09"; "" where there is none."""
    return "" if at is None else datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def gpus(view: JobView) -> str:
    """ "2", "0.5", "8 (2 × 4)", "1 A100/H100"."""
    kind = f" {'/'.join(view.gpu_types)}" if view.gpu_types else ""
    count = (
        f"{view.least_bundles} to {view.bundles}"
        if 0 < view.least_bundles < view.bundles
        else f"{view.bundles}"
    )
    shape = f" ({count} × {view.gpus_per_bundle:g})" if view.bundles > 1 else ""
    return plain(f"{view.gpus:g}{kind}{shape}")


def times(view: JobView, now: float | None = None) -> str:
    """How long it has waited, or runs, or ran."""
    end = view.ended_at or now or view.as_of or time.time()
    if view.started_at is None:
        return f"{'waited' if view.ended_at else 'waits'} {span(end - view.submitted_at)}"
    return f"{'ran' if view.ended_at else 'runs'} {span(end - view.started_at)}"


def progress(view: JobView) -> str:
    """What the job reported last: "60/100 loss 0.2"; "" where it said nothing."""
    metrics = dict((view.progress or {}).get("metrics") or {})
    step, total = metrics.pop("step", None), metrics.pop("total", None)
    words = [f"{step}/{total}" if total is not None else f"step {step}"] if step is not None else []
    words += [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"[:LONGEST_METRIC]
        for name, value in metrics.items()
    ]
    return " ".join(words)


def share_done(view: JobView) -> float | None:
    """From 0 to 1, out of the reported `step` and `total`; None where the job did not report them."""
    metrics = (view.progress or {}).get("metrics") or {}
    step, total = metrics.get("step"), metrics.get("total")
    if isinstance(step, int | float) and isinstance(total, int | float) and total > 0:
        return max(0.0, min(1.0, step / total))
    return None


def reason(why: dict[str, Any] | None) -> str:
    """A reason's code and sentence."""
    return f"{why['code']}: {why['message']}" if why else ""


def status(word: str) -> Text:
    return Text(word, style=STYLES.get(word, ""))


# --- tables ------------------------------------------------------------------------------------------------


def jobs_table(views: Iterable[JobView], now: float | None = None) -> Table:
    """One row per job; the last column says why it waits, how far it is, or how it ended."""
    rows = [
        (
            view.id,
            plain(view.name),
            plain(view.owner),
            status(view.status),
            gpus(view),
            times(view, now),
            plain(_note(view)),
        )
        for view in views
    ]
    return grid(("ID", "NAME", "OWNER", "STATUS", "GPUS", "TIME", "NOTE"), rows, numbers={"GPUS"})


def _note(view: JobView) -> str:
    if view.ended_at is not None or view.status == "STOPPING":
        outcome = view.outcome or {}
        return "" if view.status == "SUCCEEDED" else str(outcome.get("message") or "")
    if view.array_counts is not None:
        return ", ".join(f"{count} {status}" for status, count in view.array_counts.items())
    if view.status == "QUEUED":
        return reason(view.reason)
    where = f"on {', '.join(view.nodes)}" if view.nodes else ""
    return ", ".join(filter(None, [progress(view), where]))


def scale_table(scale: Mapping[str, Any]) -> Table:
    """One row per node type: how many nodes are up, boot and are wanted, for whom, and what failed.

    PRICE, in an hour, is left out where no type has one.
    """
    priced = any(each["price"] is not None for each in scale["types"].values())
    rows = []
    for name, each in scale["types"].items():
        jobs = [job for ask in scale["asks"] if name in ask["node_types"] for job in ask["jobs"]]
        more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
        note = _failed_launch(each["failed"], scale["at"]) if each["failed"] else ""
        numbers = (str(each[count]) for count in ("gpus", "up", "booting", "wanted", "most"))
        price = ["–" if each["price"] is None else f"{each['price']:g}"] if priced else []
        for_whom = plain(", ".join(jobs[:5]) + more) or "–"
        rows.append((plain(name), plain(each["gpu_type"] or "–"), *numbers, *price, for_whom, plain(note)))
    names = ("NODE TYPE", "TYPE", "GPUS", "UP", "BOOTING", "WANTED", "MOST", *(["PRICE"] if priced else []))
    return grid((*names, "FOR", "NOTE"), rows, {"GPUS", "UP", "BOOTING", "WANTED", "MOST", "PRICE"})


def _failed_launch(failed: Mapping[str, Any], now: float) -> str:
    return f"failed, again in {span(max(0.0, failed['until'] - now))}: {failed['message']}"


def nodes_table(views: Sequence[NodeView], ascii_only: bool = False) -> Table:
    """One row per node: GPUs in all, a bar, what rm's jobs, other work and nobody has of them.

    STATUS is left out where all are ready and none is idle.
    """
    rows = [
        (
            plain(view.name),
            plain(view.gpu_type or "–"),
            f"{view.gpus:g}",
            gpu_bar(view, ascii_only),
            f"{view.charged_gpus:g}",
            f"{view.foreign_gpus:g}",
            f"{view.free_gpus:g}",
            f"{view.cpus:g}",
            f"{view.memory_bytes / 2**30:.1f} GiB",
            plain(", ".join(view.jobs)) or "–",
            plain(node_status(view)),
        )
        for view in views
    ]
    numbers = {"GPUS", "RM", "OTHERS", "FREE", "CPUS", "MEMORY"}
    names = ("NODE", "TYPE", "GPUS", "", "RM", "OTHERS", "FREE", "CPUS", "MEMORY", "JOBS", "STATUS")
    shown = len(names) - all(node_status(view) == "ready" for view in views)
    return grid(names[:shown], [row[:shown] for row in rows], numbers)


def node_status(view: NodeView) -> str:
    """ "ready", "idle since 2026-03-01 14:05:09", "cordoned by ada since 2026-03-01 14:05:09: a fan is loud".

    And what is in quarantine there.
    """
    status = _own_status(view)
    if not view.quarantined_gpus:
        return status
    on = ", ".join(stray(each) for each in view.strays[:STRAYS_NAMED])
    more = f" and {len(view.strays) - STRAYS_NAMED} more" if len(view.strays) > STRAYS_NAMED else ""
    return f"{status}; {view.quarantined_gpus:g} in quarantine{f': {on}{more}' if on else ''}"


def stray(told: Mapping[str, Any]) -> str:
    """ "GPU 3 is used by pid 4711 (python) of ada, 2048 MiB"."""
    whose = f" of {told['user']}" if told["user"] else ""
    return f"GPU {told['gpu']} is used by pid {told['pid']} ({told['name']}){whose}, {told['memory_bytes'] >> 20} MiB"


def _own_status(view: NodeView) -> str:
    if view.booting_since is not None:
        return f"{view.status} since {moment(view.booting_since)}"
    if view.cordon is None:
        return view.status if view.idle_since is None else f"idle since {moment(view.idle_since)}"
    said = view.cordon
    deadline = said["deadline"] if view.status == "draining" else None
    until = "" if deadline is None else f" until {moment(deadline)}"
    what = view.status
    if view.status == "gone":
        left = "" if said.get("gone_at") is None else f" since {moment(said['gone_at'])}"
        what = f"gone{left}, cordoned"
    by = f" by {said['by']}" if said["by"] else ""
    why = f": {said['reason']}" if said["reason"] else ""
    return f"{what}{until}{by} since {moment(said['at'])}{why}"


def queues_table(views: Sequence[QueueView]) -> Table:
    """One row per queue, those below a queue indented under it. Amounts without a type: all types no quota names."""
    depths: dict[str | None, int] = {None: -1}
    rows = []
    for view in views:
        depth = depths[view.name] = depths.get(view.parent, -1) + 1
        rows.append(
            (
                "  " * depth + plain(view.name),
                by_kind(view.nominal),
                by_kind(view.used),
                by_kind(view.borrowed),
                by_kind(view.lent),
                f"{view.share:.0f}" if view.share >= 1 or not view.share else f"{view.share:.2g}",
                str(view.running),
                str(view.pending),
                Text("stopped", style="yellow") if view.stopped else "",
            )
        )
    numbers = {"NOMINAL", "USED", "BORROWED", "LENT", "SHARE", "RUNNING", "PENDING"}
    names = ("QUEUE", "NOMINAL", "USED", "BORROWED", "LENT", "SHARE", "RUNNING", "PENDING", "")
    return grid(names, rows, numbers)


def by_kind(amounts: dict[str, float]) -> str:
    """GPUs by kind: "8", "4 A100, 2 others", "–" for none."""
    words = [f"{count:g} {plain(kind)}" for kind, count in sorted(amounts.items()) if kind != "*"]
    others = amounts.get("*")
    if others is not None:
        words.append(f"{others:g} others" if words else f"{others:g}")
    return ", ".join(words) or "–"


def gpu_bar(view: NodeView, ascii_only: bool = False) -> Text:
    """A cell per GPU, up to BAR_CELLS: held by rm's jobs, held by other work, free, or not to be had."""
    cells = min(view.gpus, BAR_CELLS)
    ours = round(view.charged_gpus / view.gpus * cells) if view.gpus else 0
    others = min(cells - ours, round(view.foreign_gpus / view.gpus * cells)) if view.gpus else 0
    full, foreign, free, closed = "#x.-" if ascii_only else "█▒░╌"
    rest = cells - ours - others
    kept = rest
    if view.status == "ready":
        kept = min(rest, round(view.quarantined_gpus / view.gpus * cells)) if view.gpus else 0
    return Text.assemble(
        (full * ours, "blue"),
        (foreign * others, "magenta"),
        (free * (rest - kept), "green"),
        (closed * kept, "dim"),
    )


def events_table(views: Sequence[EventView], began: float | None = None) -> Table:
    """A timeline. Each row shows the GPUs of the whole cluster right before and after the event.

    JOB is left out where all rows have the same: the width is needed for WHAT.
    """
    rows = []
    for view in views:
        began = view.at if began is None else began
        rows.append(
            (
                f"{datetime.fromtimestamp(view.at).astimezone():%H:%M:%S}",
                f"{view.at - began:.3f} s",
                view.kind,
                plain(view.job_id or "–") + (f".{view.attempt}" if view.attempt else ""),
                change(view.free_before, view.free_after),
                change(view.charged_before, view.charged_after),
                plain(sentence(view)),
            )
        )
    names = ("TIME", "AFTER", "EVENT", "JOB", "FREE", "CHARGED", "WHAT")
    whose = len({view.job_id for view in views}) > 1 or any((view.attempt or 0) > 1 for view in views)
    shown = [place for place, name in enumerate(names) if whose or name != "JOB"]
    return grid([names[each] for each in shown], [[row[each] for each in shown] for row in rows], {"AFTER"})


def change(before: float, after: float) -> str:
    return f"{before:g} → {after:g}" if before != after else f"{after:g}"


def sentence(view: EventView) -> str:
    """An event in a few words, from its body."""
    body = view.body
    match view.kind:
        case "JobSubmitted":
            return f"{body.get('name')} by {body.get('owner')}: {_gang(body)}"
        case "GangCut":
            return f"the node types are known: {_gang(body)}"
        case "AvailabilityChecked":
            return reason(body.get("reason")) or "fits"
        case "JobAdmitted":
            return "; ".join(_place(each) for each in body.get("placed") or ())
        case "RunStarted":
            ids = [",".join(each) for each in body.get("gpu_ids") or ()]
            hosts = body.get("hosts") or ()
            return f"on {', '.join(hosts)}" + (f" GPU {'; '.join(ids)}" if any(ids) else "")
        case "RunExited":
            outcome = body.get("outcome") or {}
            return f"{outcome.get('status')} {outcome.get('message') or ''}".strip()
        case "StopRequested":
            if body.get("cause") == "drained":
                return f"{body.get('by')} is drained"
            return f"{body.get('cause')}" + (f" by {body['by']}" if body.get("by") else "")
        case "NodeCordoned" | "NodeUncordoned":
            return _cordon_sentence(view.kind, body)
        case "CordonInherited":
            new, old = str(body.get("node_id"))[:8], str(body.get("old_id"))[:8]
            return f"node {new} is cordoned as {old} was, which had its name"
        case "GpusQuarantined":
            return _quarantine_sentence(body)
        case "HoldChanged":
            by = f" by {body['by']}" if body.get("by") else ""
            return f"{'held' if body.get('held') else 'released'}{by}"
        case "PolicyChanged":
            queues = (body.get("policy") or {}).get("queues") or {}
            by = f" by {body['by']}" if body.get("by") else ""
            return f"{len(queues)} queues{by}"
        case "NodeJoined":
            return f"{body.get('name')} with {body.get('gpu_slots')} GPUs"
        case _:
            return str(body.get("why") or body.get("node_id") or "")


def findings_table(views: Sequence[FindingView]) -> Table:
    """One row per difference that an audit found, and what was done about it."""
    rows = [
        (
            moment(view.at),
            view.kind,
            plain(view.message),
            Text(plain(view.repair), style="" if view.repaired else "bold red"),
        )
        for view in views
    ]
    return grid(("TIME", "FINDING", "WHAT", "DONE"), rows, set())


def audited(view: AuditView) -> str:
    """An audit in one line: what was compared, and whether it agrees."""
    counts = view.checked
    drivers = " and the GPUs' drivers" if counts["drivers"] else ""
    compared = ", ".join(
        f"{counts[name]} {name[:-1] if counts[name] == 1 else name}"
        for name in ("attempts", "groups", "runners", "nodes", "drivers")
        if name != "drivers" or counts[name]
    )
    sides = "ledger, Ray" + drivers if drivers else "ledger and Ray"
    if not view.findings:
        return f"{sides} agree: {compared}"
    left = sum(not each.repaired for each in view.findings)
    return f"{sides} differed in {len(view.findings)}, {left} of them not repaired: {compared}"


def _gang(body: dict[str, Any]) -> str:
    """ "2 × 4 GPU"."""
    gang = body.get("gang") or {}
    units = (gang.get("bundle") or {}).get("gpu_units", 0)
    count = f"{gang['count']} × " if gang.get("count", 1) > 1 else ""
    return f"{count}{units / 10_000:g} GPU"


def _cordon_sentence(kind: str, body: dict[str, Any]) -> str:
    by = f" by {body['by']}" if body.get("by") else ""
    if kind == "NodeUncordoned":
        return f"node {str(body.get('node_id'))[:8]} uncordoned{by}"
    deadline = f" until {moment(body['deadline'])}" if body.get("deadline") is not None else ""
    what = f"drains{deadline}" if body.get("draining") else "cordoned"
    why = f": {body['reason']}" if body.get("reason") else ""
    return f"node {str(body.get('node_id'))[:8]} {what}{by}{why}"


def _quarantine_sentence(body: dict[str, Any]) -> str:
    node, units = f"node {str(body.get('node_id'))[:8]}", body.get("units") or 0
    if not units:
        return f"{node}: nothing is in quarantine any more"
    on = ", ".join(stray(each) for each in body.get("strays") or ())
    return f"{node}: {units / 10_000:g} GPUs in quarantine{f': {on}' if on else ''}"


def _place(placed: dict[str, Any]) -> str:
    slots = ", ".join(str(slot) for slot in placed.get("slots") or ())
    return f"node {str(placed['node_id'])[:8]} GPU {slots}".rstrip()


def facts_table(rows: Iterable[tuple[str, object]]) -> Table:
    """Name and value, one pair a line; pairs without a value are left out. Escapes what is not a Text."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value not in ("", None):
            table.add_row(plain(name), value if isinstance(value, Text) else plain(value))
    return table


def grid(names: Sequence[str], rows: Sequence[Sequence[str | Text]], numbers: set[str]) -> Table:
    """A table without lines. Columns in `numbers` stand to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for place, name in enumerate(names):
        longest = max([len(name), *(cell_len(str(row[place])) for row in rows)])
        folds = name in FOLDING
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            no_wrap=not folds,
            overflow="fold",
            min_width=min(longest, NARROWEST) if folds else longest,
        )
    for row in rows:
        table.add_row(*row)
    return table
