"""Nodes that boot, come, fail and go in any order: the books balance, and nothing is kept for nobody.

The fake cluster checks after every event that a second decision at the same moment is empty and wants the same.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rm.core.cycle import Cycle, Notes
from rm.core.events import LaunchesObserved, LaunchFailed, NodeTypesObserved
from rm.core.model import GPU_TYPE, NodeShape
from rm.core.policy import Policy
from rm.testing import Behaviour, FakeCluster

TYPES = {"t1": ("A", 1, 3), "t4": ("A", 4, 2), "t8": ("B", 8, 2)}
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), st.sampled_from([0.5, 1, 2, 4, 4, 8]), st.integers(1, 3),
            st.sampled_from([(), (), ("A",), ("B", "A")]), st.sampled_from([20.0, 200.0, 2000.0]),
            st.integers(-1, 1),
        ),
        st.tuples(st.just("launch"), st.sampled_from(sorted(TYPES)), st.integers(1, 2)),
        st.tuples(st.just("join"), st.sampled_from(sorted(TYPES)), st.booleans()),
        st.tuples(st.just("fail"), st.sampled_from(sorted(TYPES))),
        st.tuples(st.just("go"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("time"), st.sampled_from([1, 7, 50])),
    ),
    min_size=5,
    max_size=40,
)  # fmt: skip


class Autoscaled(FakeCluster):
    """With an autoscaler that does what an action says."""

    def begin(self) -> None:
        self.booting: Counter[str] = Counter()
        self.there: dict[str, str] = {}
        self.joined = 0
        self.add_node("head", 0)
        shapes = tuple(
            NodeShape(gpus, 64_000, 2**38, ((GPU_TYPE, kind),), most, name)
            for name, (kind, gpus, most) in TYPES.items()
        )
        self.happen(NodeTypesObserved(self.now, shapes))

    def launch(self, name: str, most: int) -> None:
        """So many of what is wanted as an autoscaler that is slow gets."""
        wanted = self.state.launches.wanted.nodes().get(name, 0)
        room = TYPES[name][2] - self.booting[name] - sum(each == name for each in self.there.values())
        self.booting[name] += max(0, min(wanted - self.booting[name], room, most))
        self.observe()

    def join(self, name: str, *, seen_first: bool) -> None:
        """A node comes; the autoscaler says so a moment later, or not before its next look."""
        if not self.booting[name]:
            return
        self.joined += 1
        self.booting[name] -= 1
        node_id = f"{name}-{self.joined}"
        kind, gpus, _ = TYPES[name]
        self.there[node_id] = name
        self.add_node(node_id, gpus, **{GPU_TYPE: kind})
        if seen_first:
            self.observe()

    def fail(self, name: str) -> None:
        self.booting[name] = 0
        self.happen(LaunchFailed(self.now, name, "none left"))
        self.observe()

    def go(self, number: int) -> None:
        """The autoscaler takes an idle node away, if it may."""
        kept = {node_id for ask in self.state.launches.wanted.asks for node_id, _ in ask.kept}
        stay = {*kept, *self.state.launches.wanted.stay}
        idle = sorted(each for each in self.state.idle_since if each in self.there and each not in stay)
        if idle:
            node_id = idle[number % len(idle)]
            del self.there[node_id]
            self.lose_node(node_id)
            self.observe()

    def observe(self) -> None:
        up = tuple(sorted(Counter(self.there.values()).items()))
        booting = tuple(sorted((name, count) for name, count in self.booting.items() if count))
        self.happen(LaunchesObserved(self.now, up, booting, returnable=tuple(sorted(self.there))))

    def check(self) -> None:
        super().check()
        notes = self.state.plans.get("cycle")
        reservations = notes.reservations if isinstance(notes, Notes) else {}
        needed = {node_id for each in reservations.values() for node_id in each.need}
        for node_id in self.state.launches.wanted.stay:
            assert node_id in needed, "it stays for nobody"
            assert node_id in self.state.idle_since
        for each in reservations.values():
            for place in each.boots:
                _, name, _ = place.node_id.split("/")
                assert self.state.launches.booting[name], "nothing boots for it"
                assert not self.state.launches.paused(name, self.now)


def some(gpus: float, count: int = 1, priority: int = 0) -> tuple:
    return "submit", gpus, count, (), 2000.0, priority


BURSTS = st.permutations([some(1), some(1), some(2), some(8, 2), some(4, 3), some(8), some(1, 1, 1)])
"""With gangs that wait for several nodes among jobs that wait for one."""


@settings(max_examples=250, deadline=None)
@given(BURSTS, ACTIONS, st.sampled_from([0.0, 0.0, 30.0]))
def test_whatever_boots_the_books_balance_and_all_that_can_run_has_run(burst, actions, patience) -> None:
    fake = Autoscaled(policy=Policy(boot_s=5.0, boot_timeout_s=60.0, patience_s=patience))
    fake.begin()
    launches = [("time", 1), *(("launch", name, 4) for name in TYPES), ("time", 1)]
    for kind, *rest in [*burst, *launches, *actions]:
        if kind == "submit":
            gpus, count, kinds, limit, priority = rest
            fake.submit(
                gpus,
                count=1 if gpus < 1 else count,
                gpu_types=kinds,
                time_limit_s=limit,
                priority=priority,
                behaviour=Behaviour(15.0),
                grace_s=0.0,
            )
        elif kind == "join":
            fake.join(rest[0], seen_first=rest[1])
        elif kind == "cancel" and fake.state.jobs:
            ids = sorted(fake.state.jobs)
            fake.cancel(ids[rest[0] % len(ids)])
        elif kind == "step":
            for _ in range(rest[0]):
                fake.step()
        elif kind == "time":
            until = fake.now + rest[0]
            while (due := fake.next_due()) is not None and due <= until:
                fake.step()
            fake.now = until
        elif kind in ("launch", "fail", "go"):
            getattr(fake, kind)(*rest)
    for name, (_, _, most) in TYPES.items():
        fake.booting[name] = most - sum(each == name for each in fake.there.values())
    fake.observe()
    for name in TYPES:
        while fake.booting[name]:
            fake.join(name, seen_first=False)
    fake.observe()
    fake.run()
    with Cycle(fake.state, fake.now) as cycle:
        left = [job.id for job in fake.state.jobs.values() if cycle.feasible(job)]
    assert not left, "all nodes are there, and who fits on them has run"
    assert not fake.state.launches.wanted.stay
