"""The faults: each is a method that does the harm and returns how to see that it is over, or None without a victim."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fault_story import CLIENT_KILL, USER_KILL
from fault_watch import Watch
from fault_work import Work
from fault_world import GPUS, World, actor_pids, group_handle, group_table, kill, leaders, until

from rm.errors import RmError
from rm.job import TERMINAL

LONGEST_RECOVERY_S = 180.0
TRANSITION_S = 6.0
Recovered = Callable[[], Any]


@dataclass
class Fault:
    """One that was injected, `at` seconds after the start. `took_s` is None until the system has recovered from it."""

    kind: str
    what: str
    at: float
    took_s: float | None = None


class Faults:
    """Draws and injects faults, and times what the system needs to recover, each in a thread of its own."""

    def __init__(
        self, world: World, work: Work, watch: Watch, seed: int, violation: Callable[[str], None]
    ) -> None:
        self.world, self.work, self.watch, self.violation = world, work, watch, violation
        self.client = world.client
        self.rng = random.Random(f"faults {seed}")
        self.began = time.monotonic()
        self.done: list[Fault] = []
        self._deck: list[str] = []
        self.missed: Counter[str] = Counter()
        self.health_cordons = 0
        self.lost_nodes: dict[str, float] = {}
        self.warm_killed: dict[str, float] = {}
        """Stands without a job of which a runner was killed, and when: whoever takes one at that very moment is hit."""
        self.drained = False
        self._then: Callable[[], None] | None = None
        """What is to be done by this thread once the recovery is being timed."""
        self._threads: list[threading.Thread] = []
        self._numbers = iter(range(1, 1_000_000))
        self._kinds: dict[str, tuple[int, Callable[[], tuple[str, Recovered] | None]]] = {
            "allocator": (3, self._allocator),
            "allocator after submit": (3, self._allocator_after_submit),
            "allocator in transition": (4, self._allocator_in_transition),
            "runner": (4, self._runner),
            "warm runner": (3, self._warm_runner),
            "user process": (4, self._user_process),
            "store": (2, self._store),
            "raylet": (1, lambda: self._node(whole=False)),
            "node": (1, lambda: self._node(whole=True)),
            "client": (3, self._client),
            "group removed": (3, self._group_removed),
            "orphan group": (2, self._orphan_group),
            "drain": (2, self._drain),
        }

    def inject(self) -> None:
        """One random fault, from a shuffled deck that holds every kind as often as its weight says."""
        if not self._deck:
            self._deck = [kind for kind, (weight, _) in self._kinds.items() for _ in range(weight)]
            self.rng.shuffle(self._deck)
        kind = self._deck.pop()
        began = time.monotonic()
        try:
            injected = self._kinds[kind][1]()
        except RmError as error:
            self.work.errors[f"{kind}: {type(error).__name__}"] += 1
            injected = None
        if injected is None:
            self.missed[kind] += 1
            return
        what, recovered = injected
        fault = Fault(kind, what, round(began - self.began, 1))
        self.done.append(fault)
        self._in_thread(self._follow, fault, recovered)
        then, self._then = self._then, None
        if then is not None:
            then()

    def settle(self) -> None:
        """Wait until all have been recovered from."""
        for thread in self._threads:
            thread.join(LONGEST_RECOVERY_S + 60)

    def mend_health(self) -> None:
        """What an administrator would do with nodes that failed because we broke what ran on them."""
        with contextlib.suppress(RmError):
            bad = [n.id for n in self.client.nodes() if n.cordon and n.cordon["by"] == "health"]
            if bad:
                self.health_cordons += len(bad)
                self.client.uncordon(*bad)

    def _follow(self, fault: Fault, recovered: Recovered) -> None:
        began = time.monotonic()
        if until(recovered, LONGEST_RECOVERY_S):
            fault.took_s = round(time.monotonic() - began, 2)
        else:
            self.violation(f"{fault.kind} ({fault.what}): not recovered after {LONGEST_RECOVERY_S:g} s")

    def _in_thread(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- the allocator and the store -----------------------------------------------------------------------

    def _allocator(self) -> tuple[str, Recovered] | None:
        pid = self.client.hello()["pid"]
        kill(pid)
        return f"pid {pid}", lambda: self.client.hello()["pid"] != pid

    def _allocator_after_submit(self) -> tuple[str, Recovered] | None:
        pid = self.client.hello()["pid"]
        job = self.work.submit_plain(f"f{next(self._numbers)}", self.rng.randint(1, GPUS))
        kill(pid)
        if job is None:
            return None
        return f"pid {pid} after {job.id}", lambda: self.client.hello()["pid"] != pid and job.view()

    def _allocator_in_transition(self) -> tuple[str, Recovered] | None:
        pid, wanted = self.client.hello()["pid"], self.rng.choice(["RESERVING", "STOPPING"])
        began = time.monotonic()
        while time.monotonic() < began + TRANSITION_S:
            # With stands that are handed on a transition is short, and may not be met: then the other kind will do.
            statuses = {wanted} if time.monotonic() < began + TRANSITION_S / 2 else {"RESERVING", "STOPPING"}
            for job in self.client.jobs(limit=1000):
                if (status := job.last.status) in statuses:
                    kill(pid)
                    return f"pid {pid} while {job.id} is {status}", lambda: self.client.hello()["pid"] != pid
            time.sleep(0.02)
        return None

    def _store(self) -> tuple[str, Recovered] | None:
        pid = actor_pids()["store"]
        kill(pid)

        def back() -> bool:
            self.client._store("has_blobs", [])
            return actor_pids().get("store", pid) != pid

        return f"pid {pid}", back

    # --- what runs -----------------------------------------------------------------------------------------

    def _victim(self, *kinds: str) -> Any:
        """The view of a random job that runs, None where none does. `kinds`: command, function, lease."""
        running = [
            view
            for view in self.watch.live.values()
            if view.status == "RUNNING" and view.kind in kinds and self._story(view) is not None
        ]
        return self.rng.choice(sorted(running, key=lambda view: view.submitted_at)) if running else None

    def _story(self, view: Any) -> Any:
        return self.work.stories.get(view.name)

    def _hit(self, view: Any, kind: str) -> None:
        self._story(view).hits[kind] += 1
        self._story(view).victims[view.id][kind] += 1

    def _again(self, view: Any) -> Recovered:
        """It runs in another attempt, or has ended."""

        def again() -> bool:
            now = self.client.job(view.id).last
            return now.status in TERMINAL or (now.attempts > view.attempts and now.status == "RUNNING")

        return again

    def _runner(self) -> tuple[str, Recovered] | None:
        view = self._victim("command", "function")
        if view is None:
            return None
        bundle = self.rng.randrange(view.bundles)
        name = f"{view.stand}/{bundle}"
        pid = actor_pids().get(f"rm/{self.client.ledger_key}/{name}")
        if pid is None:
            return None
        self._hit(view, "runner")
        kill(pid)
        return name, self._again(view)

    def _warm_runner(self) -> tuple[str, Recovered] | None:
        """One that is kept for the next job. It costs nobody anything."""
        warm = sorted({name for node in self.client.nodes() for name in node.warm})
        if not warm:
            return None
        stand = self.rng.choice(warm)
        pid = actor_pids().get(f"rm/{self.client.ledger_key}/{stand}/0")
        if pid is None:
            return None
        self.warm_killed[stand] = time.time()
        kill(pid)
        group = f"rm/{self.client.ledger_key}/{stand}"
        return stand, lambda: group not in {each["name"] for each in group_table()}

    def _user_process(self) -> tuple[str, Recovered] | None:
        view = self._victim("command", "function")
        pids = leaders(view.id) if view else []
        if not pids:
            return None
        pid = self.rng.choice(pids)
        self._hit(view, USER_KILL)
        kill(pid)
        return f"pid {pid} of {view.id}", self._again(view)

    def _client(self) -> tuple[str, Recovered] | None:
        chosen = [h for h in self.work.holders if h.process.poll() is None and h.story.job_id]
        if not chosen:
            return None
        holder = self.rng.choice(chosen)
        holder.story.hits[CLIENT_KILL] += 1
        holder.process.kill()
        job_id = holder.story.job_id
        return f"client of {job_id}", lambda: self.client.job(job_id).last.status in TERMINAL

    # --- groups and nodes ----------------------------------------------------------------------------------

    def _group_removed(self) -> tuple[str, Recovered] | None:
        from ray.util import remove_placement_group

        view = self._victim("command", "function", "lease")
        if view is None:
            return None
        name = f"rm/{self.client.ledger_key}/{view.stand}"
        found = [each["id"] for each in group_table() if each["name"] == name]
        if not found:
            return None
        self._hit(view, "group removed")
        remove_placement_group(group_handle(found[0]))
        return name, self._again(view)

    def _orphan_group(self) -> tuple[str, Recovered] | None:
        from ray.util.placement_group import placement_group

        name = f"rm/{self.client.ledger_key}/j{900_000 + next(self._numbers)}.1"
        self.watch.ours.add(name)
        group = placement_group([{"GPU": 1}], name=name, lifetime="detached")
        # One that waits holds nothing yet, and nobody has to find it.
        if not group.wait(10):
            from ray.util import remove_placement_group

            remove_placement_group(group)
            return None
        return name, lambda: name not in {each["name"] for each in group_table()}

    def _node(self, *, whole: bool) -> tuple[str, Recovered] | None:
        nodes = self.world.killable_nodes()
        if not nodes:
            return None
        node = self.rng.choice(nodes)
        node_id = node.node_id
        self.lost_nodes[node_id] = time.time()
        on = [view for view in self.client.nodes() if view.id == node_id]
        views = [self.watch.live[each] for view in on for each in view.jobs if each in self.watch.live]
        again = [self._again(view) for view in views]

        self.world.kill_node(node, whole=whole)
        self._then = lambda: self.world.replace(node)

        def recovered() -> bool:
            return node_id not in {each.id for each in self.client.nodes()} and all(each() for each in again)

        return f"{node_id[:8]} with {len(views)} jobs", recovered

    def _drain(self) -> tuple[str, Recovered] | None:
        nodes = [each for each in self.client.nodes() if each.status == "ready"]
        if len(nodes) < self.world.size:
            return None
        node, cordon_only = self.rng.choice(nodes), self.rng.random() < 0.3
        pause = self.rng.uniform(2, 6)
        if cordon_only:
            self.client.cordon(node.id, reason="faults.py")
        else:
            self.drained = True
            self.client.drain(node.id, deadline=1, reason="faults.py")

        def back() -> None:
            time.sleep(pause)
            with contextlib.suppress(RmError):  # it may have been killed meanwhile
                self.client.uncordon(node.id)

        def seen() -> bool:
            now = {each.id: each.status for each in self.client.nodes()}.get(node.id)
            if now is None:
                return True
            if now not in (("cordoned",) if cordon_only else ("drained",)):
                return False
            self._in_thread(back)
            return True

        return f"{node.id[:8]}{' cordoned' if cordon_only else ''}", seen
