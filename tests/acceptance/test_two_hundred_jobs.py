"""200 random jobs on 24 GPUs: the ledger's charges against Ray's own table, at every moment and at the end."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
from probes import groups, wait_until

from rm.job import TERMINAL

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

JOBS = 200
TOTAL_GPUS = 24
SHAPES = (1, 2, 4, 8)
"""Few, as on real clusters, so that stands are handed on, and enough that they must make room for each other."""
IN_A_ROW = 3
"""A stand may change hands twice within one sample, and be charged at none of its readings. Not so often in a row."""


class Auditor(threading.Thread):
    """Compares ten times a second what the allocator charges with what our groups hold in Ray's table.

    Faster, it would take a good part of the two cores from what it watches.

    One sample is charges, Ray's table, charges. A stand that Ray shows must be charged, or idle, in one of the two
    readings around it. One on which jobs run in both must be in the table: a name never comes back.
    """

    def __init__(self, client) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.stop = threading.Event()
        self.samples = self.settled = self.most = 0
        self.doubtful: dict[str, int] = {}
        """By group, how many samples in a row have not seen its charge."""
        self.violations: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            # A stand that goes from one hand into the other between two calls is seen on either side of Ray's table.
            before, warm = self.charged(), self.warm()
            held = {name.rsplit("/", 1)[1] for name in groups()}
            warm |= self.warm()
            after = self.charged()
            self.samples += 1
            self.most = max(self.most, *(sum(gpus for _, gpus in each.values()) for each in (before, after)))
            uncharged = held - before.keys() - after.keys() - warm
            self.doubtful = {name: self.doubtful.get(name, 0) + 1 for name in uncharged}
            if long := {name for name, count in self.doubtful.items() if count >= IN_A_ROW}:
                self.violations.append(f"held in Ray and not charged: {long}")
            if self.most > TOTAL_GPUS:
                self.violations.append(f"charged more than there is: {self.most}")
            running = {
                name for name in before.keys() & after.keys() if _runs(before[name]) and _runs(after[name])
            }
            self.settled += len(running)
            if running - held:
                self.violations.append(f"jobs run on them, and Ray has not got them: {running - held}")
            if not uncharged:
                time.sleep(0.1)

    def charged(self) -> dict[str, tuple[str, float]]:
        views = [job.last for job in self.client.jobs(limit=1000)]
        return {v.stand or f"{v.id}.{v.attempts}": (v.status, v.gpus) for v in views if v.status != "QUEUED"}

    def warm(self) -> set[str]:
        nodes = self.client.nodes()
        self.most = max(self.most, sum(node.charged_gpus for node in nodes))
        return {name for node in nodes for name in node.warm}


def _runs(charge: tuple[str, float]) -> bool:
    return charge[0] == "RUNNING"


def test_two_hundred_random_jobs(client) -> None:
    rng = random.Random(7)
    auditor = Auditor(client)
    auditor.start()
    entries, fates = [], []
    for _ in range(JOBS):
        fate = rng.choices(["ok", "fail", "cancel"], [7, 2, 1])[0]
        seconds = "1000" if fate == "cancel" else f"{rng.uniform(0, 0.4):.2f}"
        entries.append(
            {"entry": f"sleep {seconds}; exit {3 if fate == 'fail' else 0}", "num_gpus": rng.choice(SHAPES)}
        )
        fates.append(fate)
    jobs = client.submit_many(entries[:100], grace=1) + client.submit_many(entries[100:], grace=1)
    waiting = {job.id for job, fate in zip(jobs, fates, strict=True) if fate == "cancel"}
    late = {job_id for job_id in waiting if rng.random() < 0.7}
    for job_id in waiting - late:
        client.job(job_id).cancel()
    deadline = time.monotonic() + 360
    while live := [job.last for job in client.jobs(limit=1000)]:
        for view in live:
            if view.id in late and view.status == "RUNNING":
                client.job(view.id).cancel()
                late.discard(view.id)
        assert time.monotonic() < deadline, f"{len(live)} jobs still live"
        time.sleep(0.25)
    auditor.stop.set()
    auditor.join(30)
    expected = {"ok": "SUCCEEDED", "fail": "FAILED", "cancel": "CANCELLED"}
    ended = [job.view() for job in jobs]
    wrong = [
        (v.id, v.status, fate) for v, fate in zip(ended, fates, strict=True) if v.status != expected[fate]
    ]
    assert not wrong
    assert all(view.status in TERMINAL for view in ended)
    again = {view.id: client.job(view.id).events() for view in ended if view.attempts > 1}
    assert not again, "nobody ran twice"
    assert auditor.violations == []
    assert auditor.samples > 30
    assert auditor.settled > 10, "and saw jobs run"
    assert auditor.most > TOTAL_GPUS / 2, "the cluster was used"
    wait_until(lambda: not groups(), 5, "no group is left in Ray's table")
    nodes = client.nodes()
    assert sum(node.charged_gpus for node in nodes) == 0
    assert sum(node.free_gpus for node in nodes) == TOTAL_GPUS
    print(f"{auditor.samples} samples, {auditor.settled} seen running, {Counter(v.status for v in ended)}")
