"""The random work of the fault machine: submits, holds, releases, cancels, and keeps a `Story` of each job."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fault_story import SCRIPT, Story
from fault_world import World

from rm.errors import ClusterError, Infeasible, JobNotFinished, LeaseLost, RequestError, RmError

MOST_LIVE = 24
CLIENT_S = 20
HERE = Path(__file__).resolve().parent


class Holder:
    """A client process that holds one job."""

    def __init__(
        self, story: Story, process: subprocess.Popen[str], acknowledged: Callable[[Story, str], None]
    ) -> None:
        self.story, self.process, self._acknowledged = story, process, acknowledged
        self.node_id = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, _, value = line.strip().partition(" ")
            if word == "job":
                self._acknowledged(self.story, value)
            elif word == "node":
                self.node_id = value


class Work:
    """Keeps the cluster busy until `stop()`. `stories`: one for each submission, by name; an array is one."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.client = world, world.client
        self.rng = random.Random(f"work {seed}")
        self.stories: dict[str, Story] = {}
        self.acked: dict[str, Story] = {}
        """By the id that was acknowledged."""
        self.unsure: set[str] = set()
        """Names of submissions whose answer was an error of the cluster's: they may exist, or not."""
        self.refused = 0
        self.errors: Counter[str] = Counter()
        """What calls of clients ended in while faults were injected."""
        self.holders: list[Holder] = []
        self.threads: list[threading.Thread] = []
        self.results: dict[str, str] = {}
        self.diaries = world.home / "diaries"
        self.diaries.mkdir()
        self.script = world.home / "work.sh"
        self.script.write_text(SCRIPT)
        self._stop = threading.Event()
        self._later: list[tuple[float, str, Any]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more submissions; what is held is released, clients come to their end."""
        self._stop.set()
        self._thread.join(120)
        for _, what, job in self._later:
            self._do(what, job)

    def wait_for_clients(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        for holder in self.holders:
            with suppress(subprocess.TimeoutExpired):
                holder.process.wait(max(0.1, deadline - time.monotonic()))

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.15):
            try:
                live = len(self.client.jobs(limit=1000))
            except RmError as error:
                self.errors[type(error).__name__] += 1
                continue
            due = [each for each in self._later if each[0] <= time.monotonic()]
            for each in due:
                self._later.remove(each)
                self._do(*each[1:])
            if live < MOST_LIVE:
                number += 1
                self.submit_one(number)

    def submit_plain(self, name: str, gpus: int) -> Any:
        """A command of half a second. Returns its handle, or None where it was not acknowledged."""
        story = self.stories[name] = Story(name, "ok")
        command = ["bash", str(self.script), str(self.diaries / name), "0.5", "0"]
        return self._submit(
            story, command, {"name": name, "num_gpus": gpus, "grace": 1, "max_infra_retries": 1000}
        )

    def submit_one(self, number: int) -> None:
        """One random submission."""
        rng = self.rng
        name = f"w{number}"
        kind = rng.choices(["command", "gang", "function", "array", "lease", "client"], [50, 18, 8, 8, 8, 8])[
            0
        ]
        fate = rng.choices(["ok", "fail", "endless"], [80, 14, 6])[0]
        seconds = (
            1000.0
            if fate == "endless"
            else round(rng.choices([0.1, 2, 6], [2, 4, 3])[0] * rng.uniform(0.5, 1.5), 2)
        )
        gpus = rng.choice([1, 1, 2, 2, 3, 4, 4, 5, 6, 8])
        story = Story(name, fate, kind, max_infra_retries=rng.choices([1000, 0, 1], [85, 8, 7])[0])
        options: dict[str, Any] = {"name": name, "grace": 1, "max_infra_retries": story.max_infra_retries}
        if fate == "endless":
            options["time_limit"] = 2
        if kind == "gang":
            options |= {"nodes": rng.randint(2, 3), "gpus_per_node": rng.choice([1, 2, 4, 5])}
        else:
            options["num_gpus"] = min(gpus, 2) if kind == "array" else gpus
        if kind == "array":
            options["array"] = rng.randint(2, 4)
        held = kind not in ("lease", "client") and rng.random() < 0.1
        # At once, now and then: while its placement group is made.
        cancel_after = max(0.0, rng.uniform(-3, 6)) if rng.random() < 0.15 else None
        if held:
            options["hold"] = True
        command = [
            "bash",
            str(self.script),
            str(self.diaries / name),
            str(seconds),
            "3" if fate == "fail" else "0",
        ]
        if kind in ("lease", "client") and sum(h.process.poll() is None for h in self.holders) > 1:
            kind = story.kind = "command"
        self.stories[name] = story
        if kind == "lease":
            story.fate = "ok"
            self._in_thread(self._hold_lease, story, min(gpus, 4), rng.uniform(1, 5))
            return
        if kind == "client":
            self._start_client(story, min(gpus, 4))
            return
        entry: Any = _function(command, name) if kind == "function" else command
        job = self._submit(story, entry, options)
        if job is not None and held:
            self._later.append((time.monotonic() + rng.uniform(1, 5), "release", job))
        if job is not None and cancel_after == 0 and kind != "array":
            self._do("cancel", job)
        elif job is not None and cancel_after is not None and kind != "array":
            self._later.append((time.monotonic() + cancel_after, "cancel", job))

    def _submit(self, story: Story, entry: Any, options: dict[str, Any]) -> Any:
        try:
            job = self.client.submit(entry, **options)
        except Infeasible:
            self.refused += 1  # a node is missing
            del self.stories[story.name]
            return None
        except ClusterError as error:
            self.errors[f"submit: {type(error).__name__}"] += 1
            self.unsure.add(story.name)
            return None
        self._acknowledged(story, job.id)
        return job

    def _acknowledged(self, story: Story, job_id: str) -> None:
        story.job_id = job_id
        self.acked[job_id] = story
        self.unsure.discard(story.name)

    def _do(self, what: str, job: Any) -> None:
        """Release or cancel, asked again until it is acknowledged."""
        for _ in range(10):
            try:
                view = job.release() if what == "release" else job.cancel()
            except RequestError:
                return  # it had been cancelled while it was held
            except ClusterError as error:
                self.errors[f"{what}: {type(error).__name__}"] += 1
                continue
            if what == "cancel" and view.status in (
                "QUEUED",
                "RESERVING",
                "RUNNING",
                "STOPPING",
                "CANCELLED",
            ):
                self.acked[job.id].cancelled = True
            return

    def _hold_lease(self, story: Story, gpus: int, seconds: float) -> None:
        try:
            lease = self.client.lease(name=story.name, num_gpus=gpus, timeout=60)
            self._acknowledged(story, lease.id)
            with lease:
                time.sleep(seconds)
                lease.options()
        except LeaseLost:
            pass  # whether it may have been lost is judged in the end
        except JobNotFinished as error:
            self.errors[f"lease: {type(error).__name__}"] += 1
        except ClusterError as error:
            self.errors[f"lease: {type(error).__name__}"] += 1
            if not story.job_id:
                self.unsure.add(story.name)

    def _start_client(self, story: Story, gpus: int) -> None:
        story.fate, story.max_infra_retries = "ok", 1000
        story.kind = kind = self.rng.choice(["lease", "attached"])
        command = ["bash", str(self.script), str(self.diaries / story.name), str(CLIENT_S), "0"]
        words = [self.world.address, kind, story.name, str(gpus), str(CLIENT_S)]
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_client.py"), *words, *(command if kind == "attached" else [])],
            stdout=subprocess.PIPE,
            stderr=(self.world.home / f"client-{story.name}.err").open("w"),
            text=True,
            env=dict(os.environ),
        )
        self.unsure.add(story.name)  # until it says its job's id
        self.holders.append(Holder(story, process, self._acknowledged))

    def _in_thread(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()


def _function(command: list[str], name: str) -> Any:
    def work() -> str:
        import subprocess

        subprocess.run(command, check=True)
        return name

    return work
