"""What the person sees while the demo runs: each event as it is committed, and below it GPUs and progress, live.

On a terminal the lower part is redrawn in place. Anywhere else there is none: progress becomes a line at each quarter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rm import tables
from rm.plain import plain

if TYPE_CHECKING:
    from rm.views import EventView, JobView, NodeView

BAR_COLUMNS = 30
QUARTERS = 4
SHOWN = frozenset(
    {
        "JobSubmitted",
        "AvailabilityChecked",
        "JobAdmitted",
        "PlacementReady",
        "ReserveFailed",
        "RunStarted",
        "RunExited",
        "RunLost",
        "PlacementReleased",
    }
)


class Stage:
    """A context manager around one demo. `names`: job id → what to call it, filled in as jobs come into being."""

    def __init__(self, file: IO[str]) -> None:
        self.console = tables.console(file)
        self.names: dict[str, str] = {}
        self._live = Live(console=self.console, auto_refresh=True, refresh_per_second=8, transient=True)
        self._began: float | None = None
        self._quarters: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: RenderableType) -> None:
        """Above the moving part, to stay."""
        tables.write(self.console, text)

    def wait_for(self, what: str) -> None:
        """Something takes a while that has no progress to show."""
        if self.console.is_terminal:
            self._live.update(Spinner("dots", Text(f"{what} …")))
        else:
            self.say(f"{what} …")

    def happened(self, events: Iterable[EventView]) -> None:
        """Show news from the ledger."""
        for event in events:
            if event.kind not in SHOWN or event.job_id is None:
                continue
            self._began = event.at if self._began is None else self._began
            name = self.names.get(event.job_id, event.job_id)
            line = f"{event.at - self._began:8.3f} s  {plain(name):<8} {event.kind:<20} "
            gpus = tables.change(event.free_before, event.free_after)
            self.say(f"{line}free {gpus:<8} {plain(tables.sentence(event))}".rstrip())

    def update(self, views: Sequence[JobView], nodes: Sequence[NodeView]) -> None:
        """Show where the jobs and the GPUs stand."""
        if self.console.is_terminal:
            self._live.update(Group("", _gpus(nodes), _jobs(views, self.names), ""))
            return
        for view in views:
            quarter = int((tables.share_done(view) or 0.0) * QUARTERS)
            if view.ended_at is None and quarter > self._quarters.get(view.id, 0):
                self._quarters[view.id] = quarter
                self.say(f"            {self.names.get(view.id, view.id):<8} {plain(tables.progress(view))}")

    def clear(self) -> None:
        """Take the moving part away."""
        self._live.update("")


def _gpus(nodes: Sequence[NodeView]) -> Text:
    line = Text("GPUs  ")
    for node in nodes:
        line.append_text(tables.gpu_bar(node))
        line.append(" ")
    charged, free = sum(node.charged_gpus for node in nodes), sum(node.free_gpus for node in nodes)
    return line.append(f" {charged:g} allocated, {free:g} free")


def _jobs(views: Sequence[JobView], names: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for view in views:
        done = 1.0 if view.status == "SUCCEEDED" else tables.share_done(view) or 0.0
        note = tables.reason(view.reason) if view.status == "QUEUED" else tables.progress(view)
        table.add_row(
            f"{view.id} {plain(names.get(view.id, view.name))}",
            tables.status(view.status),
            ProgressBar(total=1.0, completed=done, width=BAR_COLUMNS),
            Text(plain(note), overflow="ellipsis", no_wrap=True),
        )
    return table
