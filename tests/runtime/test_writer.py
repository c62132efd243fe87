"""The writer with a real SQLite ledger and a world that answers at once: durability, grouping, failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest

from rm.core.effects import Effect, Release, Reserve, Run
from rm.core.events import (
    HoldChanged,
    NodeCordoned,
    NodeJoined,
    NodeLost,
    NodeUncordoned,
    PlacementReady,
    PlacementReleased,
    RunExited,
    RunStarted,
    StopRequested,
)
from rm.core.model import Cordon, Gang, Kind, Outcome, Status, StopCause
from rm.core.policy import Policy, QueuePolicy
from rm.core.resources import GPU_UNIT, Bundle
from rm.errors import Busy, LedgerUnavailable
from rm.ledger import Batch, Ledger
from rm.runtime import writer as writer_module
from rm.runtime.clock import Clock
from rm.runtime.writer import Writer
from rm.spec import JobSpec, build_spec


class Flaky:
    """A ledger whose commits fail on demand, before or after they were made."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.fail: list[str] = []
        self.commits = 0

    def commit(self, batch: Batch) -> None:
        fate = self.fail.pop(0) if self.fail else "ok"
        if fate == "before":
            raise LedgerUnavailable("disk full")
        self.ledger.commit(batch)
        self.commits += 1
        if fate == "after":
            raise LedgerUnavailable("connection lost")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ledger, name)


class World:
    """Answers every effect with its event, at once, and counts how often each was asked for."""

    def __init__(self) -> None:
        self.writer: Writer | None = None
        self.hold_runs = False
        self.fate = Status.SUCCEEDED
        self.asked: list[tuple[str, str, int]] = []
        self.clock: Callable[[], float] | None = None
        """What stamps the answers; without one they have numbers."""

    def at(self, number: float) -> float:
        return number if self.clock is None else self.clock()

    def execute(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self.asked.append((type(effect).__name__, effect.job_id, effect.attempt))
            asyncio.get_running_loop().call_soon(self.answer, effect)

    def answer(self, effect: Effect) -> None:
        assert self.writer is not None
        key = effect.job_id, effect.attempt
        if isinstance(effect, Reserve):
            self.writer.post(PlacementReady(self.at(1), *key))
        elif isinstance(effect, Run):
            self.writer.post(RunStarted(self.at(1), *key))
            if not self.hold_runs:
                self.writer.post(RunExited(self.at(2), *key, Outcome(self.fate)))
        elif isinstance(effect, Release):
            self.writer.post(PlacementReleased(self.at(3), *key))


def draft(key: str, gpus: int = 1, **fields: Any) -> tuple[JobSpec, str, Any]:
    spec = build_spec(
        **{"kind": Kind.COMMAND, "command": ("true",), "num_gpus": gpus, "owner": "a", **fields}
    )
    gang = Gang(Bundle(gpus * GPU_UNIT))
    return spec, key, lambda job_id, seq: spec.job(job_id, seq, gang, 0.0)


async def until(condition: Any, timeout_s: float = 60) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), timeout_s)


def with_writer(
    tmp_path: Path, body: Any, gpus: int = 4, clock: Callable[[], float] | None = None, **options: Any
) -> None:
    """Run `body(writer, world, ledger)` in a loop with a started writer."""

    async def main() -> None:
        ledger = Flaky(Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite"))
        world = World()
        world.clock = clock
        writer = Writer(
            ledger,  # type: ignore[arg-type]
            clock=clock or (lambda: 0.0),
            execute=world.execute,
            check=True,
            **options,
        )
        world.writer = writer
        writer.recover()
        writer.post(NodeJoined(world.at(0), "n", "n", gpus, 8000, 2**30))
        writer.start_scheduling()
        task = asyncio.create_task(writer.run())
        try:
            await body(writer, world, ledger)
        finally:
            writer.stop()
            await asyncio.wait_for(task, 10)
            ledger.close()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_S", 0.02)


def test_jobs_run_to_their_end_and_the_ledger_agrees(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        ids = await writer.submit([draft(f"k{i}") for i in range(50)])
        await until(lambda: len(writer.view().ended) == 50)
        assert [ledger.job(i).job.status for i in ids] == [Status.SUCCEEDED] * 50
        assert ledger.load().jobs == []
        assert writer.state.totals().charged == 0

    with_writer(tmp_path, body)


def test_what_comes_while_a_commit_is_under_way_is_grouped(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        await asyncio.gather(*(writer.submit([draft(f"k{i}", 100)]) for i in range(200)))
        assert ledger.commits < 20

    with_writer(tmp_path, body)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_commit_is_no_acknowledgement_and_loses_no_fact(tmp_path: Path, when: str) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        (first,) = await writer.submit([draft("a")])
        await until(lambda: first in writer.view().ended)
        ledger.fail = [when]
        with pytest.raises(LedgerUnavailable):
            await writer.submit([draft("b")])
        made = ledger.submitted(["b"])
        assert bool(made) == (when == "after")
        if made:  # the commit had been made: the job runs all the same, and the key finds it
            await until(lambda: made["b"] in writer.view().ended)
        (third,) = await writer.submit([draft("c")])
        await until(lambda: third in writer.view().ended)
        assert writer.broken is None

    with_writer(tmp_path, body)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("good", [1, 2, 3, 4])
def test_the_ledger_fails_at_any_point_of_a_job_and_it_still_ends_once(
    tmp_path: Path, good: int, when: str
) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        ledger.fail = ["ok"] * good + [when] * 3
        (job,) = await writer.submit([draft("a")])
        await until(lambda: job in writer.view().ended)
        assert writer.view().ended[job].status is Status.SUCCEEDED
        assert writer.view().ended[job].attempts == 1
        kinds = [event.kind for event in ledger.events(job)]
        assert kinds.count("RunExited") == kinds.count("PlacementReleased") == kinds.count("JobAdmitted") == 1

    with_writer(tmp_path, body)


def ready_at_once(effect: Effect) -> PlacementReady | None:
    return PlacementReady(1, effect.job_id, effect.attempt, "j9.1") if isinstance(effect, Reserve) else None


def test_what_can_be_foreseen_is_decided_in_the_same_commit(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Any) -> None:
        world.hold_runs = True
        await until(lambda: writer.view().nodes)
        before = ledger.commits
        (job,) = await writer.submit([draft("k")])
        assert ledger.commits == before + 1
        assert world.asked == [("Run", job, 1)], "and nothing is left to be reserved"
        kinds = [event.kind for event in ledger.events(job)]
        assert kinds == ["JobSubmitted", "AvailabilityChecked", "JobAdmitted", "PlacementReady"]
        assert ledger.job(job).job.attempt.stand == "j9.1"

    with_writer(tmp_path, body, foresee=ready_at_once)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_foreseen_is_reconsidered_by_what_was_committed(tmp_path: Path, when: str) -> None:
    told: list[list[tuple[str, int]]] = []

    async def body(writer: Writer, world: World, ledger: Any) -> None:
        await until(lambda: writer.view().nodes)
        ledger.fail = [when]
        with pytest.raises(LedgerUnavailable):
            await writer.submit([draft("k")])
        assert world.asked == []
        await until(lambda: told)
        assert told == [[("j1", 1)] if when == "after" else []]
        if when == "after":
            await until(lambda: world.asked == [("Run", "j1", 1), ("Release", "j1", 1)])

    def reconsider(jobs: Any) -> None:
        told.append([(each.id, each.attempt.number) for each in jobs.values() if each.attempt])

    with_writer(tmp_path, body, foresee=ready_at_once, reconsider=reconsider)


def test_a_restart_resumes_what_was_under_way(tmp_path: Path) -> None:
    async def first(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        await writer.submit([draft("a", 4), draft("b", 4)])
        await until(lambda: any(j.status is Status.RUNNING for j in writer.view().jobs.values()))

    async def second(writer: Writer, world: World, ledger: Flaky) -> None:
        assert world.asked[0] == ("Run", "j1", 1), "the run is adopted, not started anew"
        await until(lambda: len(writer.view().ended) == 2)
        assert [j.attempts for j in writer.view().ended.values()] == [1, 1]

    with_writer(tmp_path, first)
    with_writer(tmp_path, second)


def test_a_bound_on_what_waits(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        await writer.submit([draft(f"k{i}", 100) for i in range(10)])
        with pytest.raises(Busy, match="RM_MAX_PENDING"):
            await writer.submit([draft("more", 100)])

    with_writer(tmp_path, body, max_pending=10)


def test_one_owner_can_not_take_up_everybodys_place(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        await writer.submit([draft(f"k{i}", 100) for i in range(3)])
        # What is on its way counts: neither call has been decided on when the other is made.
        both = await asyncio.gather(
            writer.submit([draft("b1", 100), draft("b2", 100)]),
            writer.submit([draft("c1", 100)]),
            return_exceptions=True,
        )
        assert both[0] == ["j4", "j5"]
        assert isinstance(both[1], Busy)
        assert str(both[1]).startswith(
            "5 jobs of a are waiting, and with 1 more they would exceed the 5 that one owner"
        )
        assert "RM_MAX_PENDING_PER_OWNER" in str(both[1]), "the way out"
        await writer.submit([draft("d", 100, owner="b")])
        with pytest.raises(Busy):
            await writer.submit([draft("array", 100, array=5, owner="b")])
        await writer.request(StopRequested(0.0, "j1", StopCause.CANCELLED))
        await writer.submit([draft("e", 100)])

    with_writer(tmp_path, body, max_pending_per_owner=5)


def test_a_job_that_is_being_committed_is_counted_once(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        first = asyncio.create_task(writer.submit([draft(f"k{i}", 100) for i in range(3)]))
        while not len(writer.state.pending):
            await asyncio.sleep(0)
        assert not first.done(), "its commit is under way"
        await writer.submit([draft("more", 100), draft("and more", 100)])
        await first

    with_writer(tmp_path, body, max_pending=5, max_pending_per_owner=5)


def test_no_commit_waits_for_readers(tmp_path: Path) -> None:
    """However many read the ledger or make estimates: the threads that they share are not the writer's."""

    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        over = threading.Event()
        readers = [asyncio.create_task(asyncio.to_thread(over.wait, 60)) for _ in range(100)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(writer.submit([draft("a")]), 20) == ["j1"]
        finally:
            over.set()
            await asyncio.gather(*readers)

    with_writer(tmp_path, body)


def test_a_broken_event_does_not_stop_the_writer(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        writer.post(object())  # type: ignore[arg-type]
        (job,) = await writer.submit([draft("a")])
        await until(lambda: job in writer.view().ended)

    async def retried(writer: Writer, world: World, ledger: Flaky) -> None:
        try:
            await body(writer, world, ledger)
        except Exception:  # the submission shared its batch with the broken event: nothing was accepted
            assert ledger.submitted(["a"]) == {}
            (job,) = await writer.submit([draft("a")])
            await until(lambda: job in writer.view().ended)

    with_writer(tmp_path, retried)


def test_watchers_are_told_of_commits(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        (job,) = await writer.submit([draft("a")])
        await until(lambda: writer.view().jobs[job].status is Status.RUNNING)
        waiting: list[Coroutine[Any, Any, None]] = [writer.changed(job, 10) for _ in range(3)]
        tasks = [asyncio.create_task(each) for each in waiting]
        await asyncio.sleep(0)
        await writer.request(StopRequested(5, job, StopCause.CANCELLED, "me"))
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert writer.view().jobs[job].status is Status.STOPPING
        writer.post(RunExited(6, job, 1, Outcome(Status.FAILED, "stopped", signal=15)))
        await until(lambda: job in writer.view().ended)
        assert writer.view().ended[job].status is Status.CANCELLED

    with_writer(tmp_path, body)


LAB = Policy({"lab": QueuePolicy("lab", nominal={"*": 2 * GPU_UNIT})}, default_queue="lab")


def test_the_rules_in_force_and_the_usage_survive_a_restart(tmp_path: Path) -> None:
    async def first(writer: Writer, world: World, ledger: Flaky) -> None:
        await writer.apply_policy(LAB, "queues: …", "root")
        assert writer.policy.text == "queues: …"
        (job,) = await writer.submit([draft("a", queue="lab")])
        await until(lambda: job in writer.view().ended)
        writer.state.books.usage["lab", "a"].average = 7.5  # the clock of these tests stands still
        (job,) = await writer.submit([draft("b", queue="lab")])
        await until(lambda: job in writer.view().ended)

    async def second(writer: Writer, world: World, ledger: Flaky) -> None:
        assert writer.state.policy == writer.policy.policy == LAB
        assert writer.policy.by == "root"
        assert writer.state.books.usage["lab", "a"].average == 7.5

    with_writer(tmp_path, first)
    with_writer(tmp_path, second)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_policy_whose_commit_fails_is_in_force_only_if_it_was_made(tmp_path: Path, when: str) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        await writer.apply_policy(LAB, "first", "root")
        ledger.fail = [when]
        with pytest.raises(LedgerUnavailable):
            await writer.apply_policy(Policy(), "second", "root")
        (job,) = await writer.submit([draft("a", queue="lab")])  # answered once the state is read anew
        expected = ("first", LAB) if when == "before" else ("second", Policy())
        assert (writer.policy.text, writer.state.policy) == expected
        assert ledger.policy() == writer.policy
        writer.post(StopRequested(1, job, StopCause.CANCELLED))

    with_writer(tmp_path, body)


def test_cordons_and_drains_survive_a_restart(tmp_path: Path) -> None:
    async def first(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        (job,) = await writer.submit([draft("k")])
        await until(lambda: writer.view().jobs[job].status is Status.RUNNING)
        await writer.request(NodeCordoned(0, "n", "ada", "a fan", True, 1e9))
        ledger.fail = ["before"]
        with pytest.raises(LedgerUnavailable):
            await writer.request(NodeUncordoned(0, "n"))
        await until(lambda: writer.broken is None and "n" in writer.view().nodes)
        assert writer.state.cordons["n"].deadline == 1e9, "what was not committed has not happened"
        assert writer.view().nodes["n"].cordoned

    async def second(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        (job,) = writer.state.jobs
        await until(lambda: "n" in writer.view().nodes)
        assert writer.state.cordons == {"n": Cordon("n", 0, "ada", "a fan", True, 1e9, "n")}
        (waiting,) = await writer.submit([draft("k2")])
        assert writer.view().jobs[waiting].status is Status.QUEUED
        await writer.request(NodeCordoned(0, "n", "ada", "a fan", True, 0.0))
        assert writer.view().jobs[job].status is Status.STOPPING, "in the turn in which it was asked for"
        await writer.request(NodeUncordoned(0, "n"))
        assert ledger.load().cordons == []
        await until(lambda: writer.view().jobs[waiting].status is Status.RUNNING)

    with_writer(tmp_path, first)
    with_writer(tmp_path, second)


def test_a_node_joins_once_and_one_that_went_meanwhile_is_lost_once(tmp_path: Path) -> None:
    def told(ledger: Flaky) -> list[tuple[str, str]]:
        events = ledger.events()
        return [(each.kind, each.body["node_id"]) for each in events if each.kind.startswith("Node")]

    async def first(writer: Writer, world: World, ledger: Flaky) -> None:
        ledger.fail = ["before", "after"]
        writer.post(NodeJoined(world.at(0), "m", "m", 1, 0, 0))
        await until(lambda: writer.broken is None and "m" in writer.view().nodes)
        assert sorted(told(ledger)) == [("NodeJoined", "m"), ("NodeJoined", "n")]

    async def second(writer: Writer, world: World, ledger: Flaky) -> None:
        assert sorted(writer.recorded) == ["m", "n"]
        await until(lambda: "n" in writer.view().nodes)
        writer.post(NodeLost(world.at(0), "m"))
        writer.post(NodeLost(world.at(0), "m"))
        await writer.request(NodeCordoned(0, "n"))
        await writer.request(NodeUncordoned(0, "n"))
        assert told(ledger)[2:] == [("NodeLost", "m"), ("NodeCordoned", "n"), ("NodeUncordoned", "n")]
        writer.post(NodeJoined(world.at(0), "n", "n", 8, 8000, 2**30))
        await until(lambda: writer.view().nodes["n"].gpu_slots == 8)
        assert told(ledger)[5:] == [("NodeJoined", "n")], "that is another node"

    async def third(writer: Writer, world: World, ledger: Flaky) -> None:
        await until(lambda: "n" in writer.view().nodes)
        assert len(told(ledger)) == 6

    with_writer(tmp_path, first)
    with_writer(tmp_path, second)
    with_writer(tmp_path, third, gpus=8)


def test_durations_are_learnt_again_after_a_restart(tmp_path: Path) -> None:
    async def first(writer: Writer, world: World, ledger: Flaky) -> None:
        ids = await writer.submit([draft(f"k{i}", name="train") for i in range(6)])
        await until(lambda: all(job in writer.view().ended for job in ids))

    async def second(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        (job,) = await writer.submit([draft("k", name="train")])
        prediction = writer.state.predictor.predict(writer.state.jobs[job])
        assert prediction is not None
        assert prediction.basis == "6 runs of a's train on as many GPUs"
        await until(lambda: writer.view().jobs[job].status is Status.RUNNING)
        writer.post(RunExited(6, job, 1, Outcome(Status.SUCCEEDED)))
        await until(lambda: job in writer.view().ended)

    with_writer(tmp_path, first)
    with_writer(tmp_path, second)


def test_an_array_is_one_step_and_many_jobs(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        commits = ledger.commits
        ids = await writer.submit([draft("x", 1), draft("a", 1, array=5), draft("y", 1)])
        assert ids == ["j1", "j2", "j7"], "each job has a number of its own"
        assert ledger.commits == commits + 1
        await until(lambda: len(writer.view().ended) == 7)
        jobs = [each.job for each in ledger.members("j2")]
        assert [(job.id, job.array_index, job.seq) for job in jobs] == [
            (f"j2_{i}", i, 2 + i) for i in range(5)
        ]
        assert ledger.submitted(["a", "y"]) == {"a": "j2_0", "y": "j7"}

    with_writer(tmp_path, body)


def test_who_waits_for_an_array_hears_of_its_jobs(tmp_path: Path) -> None:
    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        world.hold_runs = True
        (array,) = await writer.submit([draft("a", 1, array=2, hold=True)])
        heard = asyncio.create_task(writer.changed(array, 10))
        await asyncio.sleep(0)
        await writer.request(HoldChanged(1, f"{array}_1", False, "me"))
        await asyncio.wait_for(heard, 5)
        await until(lambda: writer.view().jobs[f"{array}_1"].status is Status.RUNNING)
        assert writer.view().jobs[f"{array}_0"].held
        await writer.request_all([StopRequested(2, f"{array}_{i}", StopCause.CANCELLED) for i in range(2)])
        writer.post(RunExited(6, f"{array}_1", 1, Outcome(Status.FAILED, "stopped", signal=15)))
        await until(lambda: len(writer.view().ended) == 2)

    with_writer(tmp_path, body)


@pytest.mark.parametrize("step_s", [86_400.0, -86_400.0])
def test_a_time_limit_is_over_after_its_real_duration_whatever_becomes_of_the_wall(
    tmp_path: Path, step_s: float
) -> None:
    now = {"wall": 1.7e9, "monotonic": 50.0}
    clock = Clock(wall=lambda: now["wall"], monotonic=lambda: now["monotonic"])

    async def body(writer: Writer, world: World, ledger: Flaky) -> None:
        async def after(seconds: int) -> set[Status]:
            """Time passes, with a look at the clock every second, and then the writer has a turn."""
            for _ in range(seconds):
                now["wall"] += 1.0
                now["monotonic"] += 1.0
                clock()
            await writer.request(NodeUncordoned(clock(), "n", "me"))
            return {job.status for job in writer.view().jobs.values()}

        world.hold_runs = True
        await writer.submit([draft(f"k{number}", time_limit_s=600) for number in range(4)])
        await until(lambda: all(job.status is Status.RUNNING for job in writer.view().jobs.values()))
        assert await after(60) == {Status.RUNNING}
        now["wall"] += step_s
        assert await after(0) == {Status.RUNNING}
        assert await after(533) == {Status.RUNNING}, "594 s of 600"
        assert await after(14) == {Status.STOPPING}, "607 s of 600"
        ats = [event.at for event in ledger.events()]
        assert ats == sorted(ats)
        assert ledger.newest() == ats[-1] == clock()

    with_writer(tmp_path, body, clock=clock)
