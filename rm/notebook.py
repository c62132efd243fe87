"""How a job looks in a notebook. Everything that users wrote is escaped: names come from anywhere."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from rm.plain import plain
from rm.views import JobView, NodeView

_COLOURS = {
    "QUEUED": "#8a6d00",
    "RESERVING": "#0b62a3",
    "RUNNING": "#0b62a3",
    "STOPPING": "#666",
    "SUCCEEDED": "#1a7f37",
    "FAILED": "#b3261e",
    "TIMED_OUT": "#b3261e",
    "CANCELLED": "#666",
}


def job_card(view: JobView, why: Any = None) -> str:
    """One job: what it is, where it stands, how far it is, and why it waits or failed."""
    rows = [
        ("job", f"<b>{_text(view.id)}</b> {_text(view.name)}"),
        ("status", _badge(view.status)),
        ("GPUs", _text(_gpus(view))),
    ]
    if view.nodes:
        rows.append(("on", _text(", ".join(view.nodes))))
    rows.append(("time", _text(_times(view))))
    if view.progress:
        rows.append(("progress", _progress(view.progress.get("metrics", {}))))
    if why:
        rows.append(("waits", _text(str(why))))
    if view.outcome and view.outcome.get("message") and view.status != "SUCCEEDED":
        tail = "\n".join(_text(line) for line in view.outcome.get("tail") or ())
        rows.append(("because", _text(view.outcome["message"]) + (f"<pre>{tail}</pre>" if tail else "")))
    body = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{name}</th>'
        f'<td style="text-align:left">{value}</td></tr>'
        for name, value in rows
    )
    return f"<table>{body}</table>"


def jobs_table(views: Sequence[JobView]) -> str:
    """Many jobs, one row each."""
    return _table(
        ("job", "name", "owner", "status", "GPUs", "time"),
        [
            (
                _text(v.id),
                _text(v.name),
                _text(v.owner),
                _badge(v.status),
                _text(_gpus(v)),
                _text(_times(v)),
            )
            for v in views
        ],
    )


def nodes_table(views: Sequence[NodeView]) -> str:
    """The nodes, one row each: how many GPUs, and who has them."""
    return _table(
        ("node", "type", "GPUs", "rm", "others", "free", "jobs", "status"),
        [
            (
                _text(v.name),
                _text(v.gpu_type or "–"),
                *(f"{count:g}" for count in (v.gpus, v.charged_gpus, v.foreign_gpus, v.free_gpus)),
                _text(", ".join(v.jobs) or "–"),
                _text(v.status),
            )
            for v in views
        ],
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`rows` are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{each}</td>' for each in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(words: str) -> str:
    """As HTML that shows it: neither a tag, nor an invisible mark that turns what follows around."""
    return html.escape(plain(words))


def _badge(status: str) -> str:
    return f'<b style="color:{_COLOURS.get(status, "#000")}">{_text(status)}</b>'


def _gpus(view: JobView) -> str:
    kind = f" {'/'.join(view.gpu_types)}" if view.gpu_types else ""
    shape = f" ({view.bundles} × {view.gpus_per_bundle:g})" if view.bundles > 1 else ""
    return f"{view.gpus:g}{kind}{shape}"


def _times(view: JobView) -> str:
    end = view.ended_at or view.as_of or time.time()
    if view.started_at is None:
        return f"waited {_span(end - view.submitted_at)}"
    ran, waited = _span(end - view.started_at), _span(view.started_at - view.submitted_at)
    return f"{'ran' if view.ended_at else 'runs'} {ran}, waited {waited}"


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _progress(metrics: dict[str, Any]) -> str:
    step, total = metrics.get("step"), metrics.get("total")
    bar = ""
    if isinstance(step, int | float) and isinstance(total, int | float) and total > 0:
        bar = f'<progress value="{min(step, total):g}" max="{total:g}"></progress> '
    rest = ", ".join(f"{key} {value}" for key, value in metrics.items())
    return bar + _text(rest)
