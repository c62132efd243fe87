"""What really happened, read back from the ledger: a job's events as the steps of the main job.

    request ─► check (─► wait ─► check) ─► allocate ─► run ─► release

Every step begins and ends with an event; its GPUs are those of the cluster right before its first event and right
after its last, as the ledger recorded them. Times come from the events alone, never from a clock of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rm import tables
from rm.plain import plain

if TYPE_CHECKING:
    from rm.views import EventView


NAMES = ("first", "second")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one job. `at`: its last event, seconds since the first request. `events`: their ledger numbers."""

    step: str
    job: str
    at: float
    took_s: float
    free_before: float
    free_after: float
    charged_before: float
    charged_after: float
    what: str
    events: tuple[int, ...]


@dataclass
class Story:
    """What a demo found out. `names`: job id → name; `statuses`, `measured` and `failures` by name."""

    gpus: float
    trained: str
    names: dict[str, str]
    steps: list[Step]
    statuses: dict[str, str]
    measured: dict[str, dict[str, float]]
    failures: dict[str, str]
    free_gpus: float
    charged_gpus: float
    took_s: float = 0.0

    @property
    def succeeded(self) -> bool:
        """Both trained, and every GPU is free again."""
        both = [self.statuses.get(name) for name in NAMES] == ["SUCCEEDED"] * len(NAMES)
        return both and self.free_gpus == self.gpus and self.charged_gpus == 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "succeeded": self.succeeded,
            "gpus": self.gpus,
            "trained": self.trained,
            "statuses": self.statuses,
            "measured": self.measured,
            "free_gpus": self.free_gpus,
            "charged_gpus": self.charged_gpus,
            "took_s": self.took_s,
            "steps": [{**asdict(step), "name": self.names.get(step.job, "")} for step in self.steps],
        }


def steps(events: Iterable[EventView]) -> list[Step]:
    """The steps of all jobs among `events` (oldest first), in the order in which they ended."""
    of_jobs: dict[str, list[EventView]] = {}
    for event in events:
        if event.job_id is not None:
            of_jobs.setdefault(event.job_id, []).append(event)
    began = min((story[0].at for story in of_jobs.values()), default=0.0)
    found = [step for story in of_jobs.values() for step in _story(story, began)]
    return sorted(found, key=lambda step: step.events[-1])


def _story(story: list[EventView], began: float) -> Iterator[Step]:
    """One job's steps. A second attempt begins with its admission, so that it is told like the first."""
    last: dict[str, EventView] = {}
    for event in story:
        match event.kind:
            case "JobSubmitted":
                yield _step("request", event, event, began)
            case "AvailabilityChecked":
                earlier = last.get("AvailabilityChecked")
                start = earlier or last.get("JobSubmitted", event)
                yield _step("wait, check" if earlier else "check", start, event, began, whole=False)
            case "PlacementReady":
                yield _step("allocate", last.get("JobAdmitted", event), event, began)
            case "RunExited" | "RunLost":
                yield _step("run", last.get("RunStarted", event), event, began)
            case "PlacementReleased":
                start = last.get("RunExited") or last.get("RunLost") or event
                yield _step("release", start, event, began, whole=False)
        last[event.kind] = event


def _step(name: str, first: EventView, last: EventView, began: float, whole: bool = True) -> Step:
    """From `first` to `last`. `whole`: the first event is part of the step, and not only the moment it begins."""
    before = first if whole else last
    return Step(
        step=name,
        job=last.job_id or "",
        at=last.at - began,
        took_s=last.at - first.at,
        free_before=before.free_before,
        free_after=last.free_after,
        charged_before=before.charged_before,
        charged_after=last.charged_after,
        what=_what(name, first, last),
        events=(first.seq, last.seq) if whole and first is not last else (last.seq,),
    )


def _what(name: str, first: EventView, last: EventView) -> str:
    if name == "run" and first is not last:
        return f"{tables.sentence(first)}: {tables.sentence(last)}"
    return tables.sentence(first if name == "allocate" else last)


def steps_table(found: Iterable[Step], names: dict[str, str]) -> Table:
    """The steps for people. `names`: job id → what to call it."""
    rows = [
        (
            f"{each.at:.3f} s",
            plain(names.get(each.job, each.job)),
            each.step,
            f"{each.took_s:.3f} s" if each.step != "request" else "",
            tables.change(each.free_before, each.free_after),
            tables.change(each.charged_before, each.charged_after),
            plain(each.what),
        )
        for each in found
    ]
    return tables.grid(
        ("AT", "JOB", "STEP", "TOOK", "FREE", "ALLOCATED", "WHAT"), rows, numbers={"AT", "TOOK"}
    )
