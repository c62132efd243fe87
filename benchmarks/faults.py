"""Random work on a real Ray of several nodes, while whatever can die is killed. Then: was every promise kept?

    python benchmarks/faults.py [--seed 1] [--minutes 2] [--nodes 3] [--json]

It starts a Ray of its own with logical GPUs, and kills nothing else. The seed fixes which work and which faults are
drawn, not the moments at which they meet: those depend on the machine. Exit code 1 if a promise was broken.

fault_world   the cluster, Ray's tables, /proc           fault_kinds   the faults, and when each is over
fault_work    the work                                   fault_watch   compares charges with Ray's table all the while
fault_story   what a job must have done, from outside    fault_client  a client to be killed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fault_kinds import Faults
from fault_story import CLIENT_KILL, Story, judge
from fault_watch import Watch
from fault_work import Work
from fault_world import GPUS, World, group_table, until, user_processes
from rich.console import Console
from rich.table import Table

from rm.ledger import check

PROGRESS_S = 10.0
BETWEEN_FAULTS_S = (1.5, 4.0)
END_S = 180.0
MOST_LISTED = 50


class Run:
    """One run of the machine."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.client = world, world.client
        self.violations: list[str] = []
        self.began = time.monotonic()
        self.work = Work(world, seed)
        self.watch = Watch(world, self.work, self.violation)
        self.faults = Faults(world, self.work, self.watch, seed, self.violation)
        self.rng = random.Random(f"pauses {seed}")
        self.ended: list[Any] = []
        self.handed_on = 0
        """Attempts that took over the group and the runners of another."""
        self._said = 0.0

    def violation(self, sentence: str) -> None:
        if sentence not in self.violations:
            self.violations.append(sentence)
            self.say(f"VIOLATION: {sentence}")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", file=sys.stderr, flush=True)

    def progress(self) -> None:
        if time.monotonic() - self._said < PROGRESS_S:
            return
        self._said = time.monotonic()
        live = Counter(view.status for view in self.watch.live.values())
        going_on = sum(each.took_s is None for each in self.faults.done)
        self.say(
            f"{len(self.work.acked)} accepted, live: {', '.join(f'{n} {s}' for s, n in sorted(live.items()))}; "
            f"{len(self.faults.done)} faults, {going_on} not over; {len(self.violations)} violations"
        )

    def play(self, minutes: float) -> None:
        """Work and faults for so long."""
        self.work.start()
        self.watch.start()
        end = time.monotonic() + minutes * 60
        next_fault = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.2)
            self.progress()
            if time.monotonic() >= next_fault:
                self.faults.mend_health()
                self.faults.inject()
                next_fault = time.monotonic() + self.rng.uniform(*BETWEEN_FAULTS_S)

    def finish(self) -> None:
        """Let everything go, wait for the end of all jobs, and judge."""
        self.work.stop()
        self.say("no more work and no more faults; waiting for the end of all jobs")
        self.faults.settle()

        def over() -> bool:
            self.progress()
            self.faults.mend_health()
            cordoned = [node.id for node in self.client.nodes() if node.status != "ready"]
            if cordoned:
                self.client.uncordon(*cordoned)
            return not self.client.jobs(limit=1)

        if not until(over, END_S):
            left = [(job.id, job.last.status) for job in self.client.jobs(limit=1000)]
            self.violation(f"not ended {END_S:g} s after the last fault: {left}")
        self.work.wait_for_clients(60)
        self.watch.stop.set()
        self.watch.join(60)
        self._judge_jobs()
        self._judge_leftovers()

    def _judge_jobs(self) -> None:
        events = self._events()
        self.watch.settle(events)
        self.handed_on = sum(
            each.kind == "PlacementReady" and bool(each.body.get("stand")) for each in events
        )
        self.ended = [job.view() for job in self.client.jobs(all=True, limit=10_000)]
        by_name: dict[str, list[Any]] = {}
        for view in self.ended:
            by_name.setdefault(view.name, []).append(view)
        for name in by_name.keys() - self.work.stories.keys():
            self.violation(f"{by_name[name][0].id} is a job that nobody submitted")
        hits, lost_holders = (
            self._node_hits(events) + self._warm_hits(events),
            {h.story.name for h in self.work.holders if self._lost(h)},
        )
        for name, story in self.work.stories.items():
            views = by_name.get(name, [])
            if not views and name not in self.work.unsure:
                self.violation(f"{story.job_id} ({name}) was acknowledged and is not in the ledger")
            if len(views) > 1 and len({view.array or view.id for view in views}) > 1:
                self.violation(f"{name} was submitted once and is {[view.id for view in views]}")
            if story.job_id and any((view.array or view.id) != story.job_id for view in views):
                self.violation(
                    f"{name} was acknowledged as {story.job_id} and is {[view.id for view in views]}"
                )
            if name in lost_holders:
                story.hits[CLIENT_KILL] += 1
            for view in views:
                self._judge_job(story, view, hits.get(view.id, 0))
        for job_id in self.work.acked:
            self.watch.look_up(job_id)

    def _judge_job(self, story: Story, view: Any, node_hits: int) -> None:
        hits = story.victims[view.id] + Counter({CLIENT_KILL: story.hits[CLIENT_KILL], "node": node_hits})
        diary = self.work.diaries / f"{story.name}.{view.id}"
        own = replace(
            story,
            job_id=view.id,
            hits=hits,
            view=view,
            moved=self.faults.drained and view.evictions > 0,
            diary=diary.read_text().splitlines() if diary.exists() else [],
        )
        for sentence in judge(own):
            self.violation(sentence)
        if view.evictions and not self.faults.drained:
            self.violation(f"{view.id} was evicted and no node was drained")
        if story.kind == "function" and view.status == "SUCCEEDED":
            try:
                result = self.client.job(view.id).result(60)
            except Exception as error:
                self.violation(f"{view.id} succeeded, and its result can't be had: {error!r}")
            else:
                if result != story.name:
                    self.violation(f"{view.id} returned {result!r}")

    def _judge_leftovers(self) -> None:
        client = self.client
        # Diaries are read before: what writes from now on was not ended.
        charged = {node.id[:8]: node.charged_gpus for node in client.nodes() if node.charged_gpus}
        if charged:
            self.violation(f"GPUs are still charged: {charged}")
        if not until(lambda: not group_table(), 20):
            self.violation(f"groups are left in Ray's table: {[each['name'] for each in group_table()]}")
        if not until(lambda: not user_processes(), 5):
            self.violation(f"user processes are left: {sorted(user_processes())}")
        size = self.world.size * GPUS
        if not until(lambda: sum(node.free_gpus for node in client.nodes()) == size, 20):
            nodes = [(node.id[:8], node.status, node.foreign_gpus, node.free_gpus) for node in client.nodes()]
            self.violation(f"not all {size} GPUs are free again: {nodes}")
        for finding in client.audit().findings:
            self.violation(f"the last audit found {finding.kind}: {finding.message}")
        for finding in check(client.hello()["ledger_url"]).findings:
            self.violation(f"rmctl ledger check: {finding}")

    def _events(self) -> list[Any]:
        events: list[Any] = []
        while page := self.client.events(after=events[-1].seq if events else 0, limit=10_000):
            events += page
        return events

    def _node_hits(self, events: list[Any]) -> Counter[str]:
        """How many attempts of each job held GPUs of a node when that was killed."""
        placed: dict[tuple[str, int], list[float]] = {}
        for event in events:
            key = (event.job_id, event.attempt)
            if event.kind == "JobAdmitted":
                nodes = {bundle["node_id"] for bundle in event.body["placed"]}
                placed[key] = [
                    self.faults.lost_nodes[each] for each in nodes if each in self.faults.lost_nodes
                ]
            elif event.kind == "PlacementReleased":
                placed[key] = [killed for killed in placed[key] if event.at >= killed]
        return Counter(job_id for (job_id, _), killed in placed.items() if killed)

    def _warm_hits(self, events: list[Any]) -> Counter[str]:
        """How many attempts of each job took over a stand whose runner was killed, before that was known."""
        taken = (each for each in events if each.kind == "PlacementReady" and each.body.get("stand"))
        killed = self.faults.warm_killed
        # A clock that is read here and one that is slewed there: a second is more than lies between them.
        return Counter(
            each.job_id for each in taken if each.at >= killed.get(each.body["stand"], float("inf")) - 1
        )

    def _lost(self, holder: Any) -> bool:
        return holder.node_id in self.faults.lost_nodes

    def report(self, seed: int, minutes: float, seconds: float) -> dict[str, Any]:
        faults = []
        for kind in sorted({each.kind for each in self.faults.done} | set(self.faults.missed)):
            took = [each.took_s for each in self.faults.done if each.kind == kind and each.took_s is not None]
            faults.append(
                {
                    "kind": kind,
                    "injected": sum(each.kind == kind for each in self.faults.done),
                    "no_victim": self.faults.missed[kind],
                    "p50_s": round(statistics.median(took), 2) if took else None,
                    "p90_s": round(statistics.quantiles(took, n=10, method="inclusive")[8], 2)
                    if len(took) > 1
                    else None,
                    "max_s": max(took, default=None),
                }
            )
        return {
            "seed": seed,
            "minutes": minutes,
            "took_s": round(seconds, 1),
            "nodes": self.world.size,
            "faults": faults,
            "jobs": dict(Counter(view.status for view in self.ended)),
            "attempts": sum(view.attempts for view in self.ended),
            "handed_on": self.handed_on,
            "evictions": sum(view.evictions for view in self.ended),
            "infra_failures": sum(view.infra_failures for view in self.ended),
            "refused": self.work.refused,
            "samples": self.watch.samples,
            "most_charged_gpus": self.watch.most,
            "health_cordons": self.faults.health_cordons,
            "client_errors": dict(self.work.errors),
            "violations": self.violations,
            "history": [asdict(each) for each in self.faults.done],
        }


def show(report: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("fault", "injected", "no victim", "P50 s", "P90 s", "max s", title="Faults and recovery")
    for each in report["faults"]:
        table.add_row(*("–" if value is None else str(value) for value in each.values()))
    console.print(table)
    jobs = Table("state", "jobs", title="Jobs")
    for status, number in sorted(report["jobs"].items()):
        jobs.add_row(status, str(number))
    console.print(jobs)
    console.print(
        f"seed {report['seed']}, {report['minutes']:g} min of faults, {report['took_s']:.0f} s in all, "
        f"{report['nodes']} nodes of {GPUS} GPUs. {report['attempts']} attempts, {report['infra_failures']} lost, "
        f"{report['evictions']} evicted, {report['handed_on']} in the stand of another. "
        f"{report['samples']} comparisons with Ray's table. "
        f"{report['health_cordons']} cordons by health, undone. "
        f"{report['refused']} requests refused while a node was missing. Errors that clients saw: "
        f"{report['client_errors'] or 'none'}."
    )
    for sentence in report["violations"][:MOST_LISTED]:
        console.print(f"violation: {sentence}", style="red", markup=False)
    console.print(f"{len(report['violations'])} violations")


def play(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run on a Ray of its own, which is gone afterwards."""
    began = time.monotonic()
    world = World(home, options.nodes)
    try:
        run = Run(world, options.seed)
        run.play(options.minutes)
        run.finish()
        return run.report(options.seed, options.minutes, time.monotonic() - began)
    finally:
        world.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long faults are injected")
    parser.add_argument("--nodes", type=int, default=3, help="nodes of 8 logical GPUs, at least 2")
    parser.add_argument("--json", action="store_true", help="the report as JSON, with each fault")
    parser.add_argument(
        "--keep", action="store_true", help="keep the directory with the ledger and the diaries"
    )
    options = parser.parse_args()
    if options.nodes < 2 or options.minutes <= 0:
        parser.error("--nodes must be at least 2, --minutes more than 0")
    home = Path(tempfile.mkdtemp(prefix="rm-faults-"))
    # Ray prints on stdout what it thinks of each death.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            report = play(home, options)
        finally:
            if options.keep:
                print(f"kept: {home}", file=sys.stderr)
            else:
                shutil.rmtree(home, ignore_errors=True)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
