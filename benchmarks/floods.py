"""What one user can do to all others: floods against a real Ray, the real allocator and the real store.

    python benchmarks/floods.py [--jobs 100000] [--seconds 60] [--log-mb 1024] [--only FLOODS]

Starts a Ray of its own with three nodes of 8 logical GPUs below a temporary directory, and ends it. While a flood goes
on, somebody else submits a job ten times a second; what is measured is his time from `submit` to the job's id, by when
it is durable and has been decided on.

submit   four processes of one owner submit `--jobs` jobs: two one by one for `--seconds`, two in batches of 1,000, the
         rest then in batches; and one more than the owner may have
array    arrays of 5,000 jobs, one after the other
list     a client that lists 1,000 and 10,000 jobs, and asks why, in a loop
cancel   all of the first owner's jobs, with one call
payload  100 jobs with 10 MB of arguments each
logs     a rank that prints `--log-mb` MB as fast as it can
report   a rank that calls `rm.report` 10,000 times a second
wait     a client with 1,000 waits at once

Exit code 1 where a bound is broken, which the table names.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fault_world import NODE, REPO, actor_pids
from rich.console import Console
from rich.table import Table

ALL = ("submit", "array", "list", "cancel", "payload", "logs", "report", "wait")
DELAY_S = 1.0
"""What others may be held up."""
MEMORY_MB = 400
LOG_LIMIT = 64 * 2**20
"""RM_MAX_LOG_BYTES here: small beside what is printed."""
NODE_LOG_LIMIT = 64 * 2**20
PAYLOAD_BYTES = 10 * 10**6

SINGLES = """
import sys, time, rm
client = rm.connect(sys.argv[1]); client.owner = "flood"
began, count = time.monotonic(), 0
while time.monotonic() - began < float(sys.argv[2]):
    client.submit(["sleep", "1000"], num_gpus=8, name=f"single-{count}"); count += 1
print(count)
"""
BATCHES = """
import sys, rm
client = rm.connect(sys.argv[1]); client.owner = "flood"
left = int(sys.argv[2])
while left > 0:
    client.submit_many([["sleep", "1000"]] * min(left, 1000), num_gpus=8); left -= 1000
"""
WAITS = """
import sys, threading, time, rm
client = rm.connect(sys.argv[1])
job = client.job(sys.argv[2])
threads = [threading.Thread(target=lambda: job.wait(), daemon=True) for _ in range(1000)]
[each.start() for each in threads]
print("waiting", flush=True)
[each.join() for each in threads]
"""
LISTS = """
import sys, time, rm
client = rm.connect(sys.argv[1])
began = time.monotonic()
jobs = client.jobs(limit=1)
while time.monotonic() - began < float(sys.argv[2]):
    client.jobs(limit=int(sys.argv[3])); jobs[0].why()
"""


class Scene:
    """The Ray, its allocator, and the lines of the table."""

    def __init__(self, home: Path) -> None:
        os.environ |= {
            "RAY_TMPDIR": str(home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "REPORTER_UPDATE_INTERVAL_MS": "60000",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        from ray.cluster_utils import Cluster

        import rm
        from rm.spec import Config

        self.home = home
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "_system_config": {"raylet_report_resources_period_milliseconds": 50}},
        )
        for _ in range(2):
            self.cluster.add_node(**NODE)
        config = Config(
            home=home / "rm",
            checkpoint_root=str(home / "checkpoints"),
            max_pending=250_000,
            max_pending_per_owner=100_000,
            max_log_bytes=LOG_LIMIT,
        )
        self.client = rm.connect(self.cluster.address, config=config)
        self.lines: list[tuple[str, str, str, str, bool]] = []

    def close(self) -> None:
        import ray

        ray.shutdown()
        with suppress(Exception):
            self.cluster.shutdown()

    # --- looking -------------------------------------------------------------------------------------------

    def memory_mb(self, actor: str) -> float:
        """Resident memory of the actor's process, less what it shares with others."""
        words = Path(f"/proc/{actor_pids()[actor]}/smaps_rollup").read_text().split()
        private = sum(
            int(words[at + 1])
            for at, word in enumerate(words)
            if word in ("Private_Clean:", "Private_Dirty:")
        )
        return private / 1024

    def ledger_bytes(self) -> int:
        files = (self.home / "rm").glob("ledger.sqlite*")
        return sum(each.stat().st_size for each in files if not each.name.endswith("-shm"))

    def disk_mb(self, *below: str) -> float:
        """What files take on the disk, holes not counted."""
        total = 0
        for each in (self.home / "rm").joinpath(*below).rglob("*"):
            with suppress(OSError):
                total += each.stat().st_blocks * 512 if each.is_file() else 0
        return total / 2**20

    def say(self, flood: str, what: str, measured: str, bound: str = "", *, kept: bool = True) -> None:
        self.lines.append((flood, what, measured, bound, kept))
        print(f"{flood}: {what}: {measured}" + (f" (bound {bound})" if bound else ""), flush=True)

    @contextmanager
    def somebody_else(self, flood: str) -> Iterator[None]:
        """Another user at work meanwhile; says how long his submissions took."""
        import rm

        took: list[float] = []
        over = threading.Event()

        def work() -> None:
            client = rm.connect(self.cluster.address)
            client.owner = "else"
            while not over.wait(0.1):
                began = time.monotonic()
                client.submit(["true"], num_gpus=1, hold=True)
                took.append(time.monotonic() - began)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        took.sort()
        p50, p99 = statistics.median(took), took[int(len(took) * 0.99)]
        self.say(
            flood,
            f"somebody else's submission to decision, {len(took)} times",
            f"P50 {p50 * 1000:.0f} ms, P99 {p99 * 1000:.0f} ms, longest {took[-1] * 1000:.0f} ms",
            f"{DELAY_S:g} s",
            kept=took[-1] <= DELAY_S,
        )

    def bounded(self, flood: str, what: str, value: float, bound: float, unit: str) -> None:
        self.say(flood, what, f"{value:,.1f} {unit}", f"{bound:,.0f} {unit}", kept=value <= bound)

    def start(self, code: str, *args: object) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", code, self.cluster.address, *map(str, args)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


# --- the floods --------------------------------------------------------------------------------------------


def submit(scene: Scene, options: argparse.Namespace) -> None:
    before_bytes, before_mb = scene.ledger_bytes(), scene.memory_mb("allocator")
    pending = waiting(scene)
    began = time.monotonic()
    with scene.somebody_else("submit"):
        singles = [scene.start(SINGLES, options.seconds) for _ in range(2)]
        part = options.jobs // 4
        batches = [scene.start(BATCHES, part) for _ in range(2)]
        for each in batches:
            each.wait()
        took = time.monotonic() - began
        scene.say(
            "submit",
            f"in batches of 1,000, two processes: {2 * part:,} jobs",
            f"{2 * part / took:,.0f} a second",
        )
        counts = [int(each.communicate()[0]) for each in singles]
        scene.say("submit", "one by one, two processes", f"{sum(counts) / options.seconds:,.0f} a second")
        left = options.jobs - 2 * part - sum(counts)
        rest = [scene.start(BATCHES, left // 2), scene.start(BATCHES, left - left // 2)]
        for each in rest:
            each.wait()
    count = waiting(scene) - pending
    scene.say("submit", "jobs that wait now", f"{waiting(scene):,}")
    scene.bounded("submit", "the allocator's memory", scene.memory_mb("allocator"), MEMORY_MB, "MiB")
    scene.say(
        "submit",
        "memory per waiting job",
        f"{(scene.memory_mb('allocator') - before_mb) * 1024 / count:.2f} KiB",
    )
    time.sleep(5)  # reasons are still being written down
    scene.bounded(
        "submit",
        "the ledger's growth per job",
        (scene.ledger_bytes() - before_bytes) / 1024 / count,
        6,
        "KiB",
    )
    if options.jobs < 100_000:
        return
    from rm.errors import Busy

    scene.client.owner = "flood"
    try:
        scene.client.submit_many(["true"] * 2_000, num_gpus=8)
    except Busy as error:
        scene.say("submit", "more than one owner may have", f"Busy: {error}", "Busy")
    else:
        scene.say("submit", "more than one owner may have", "accepted", "Busy", kept=False)
    scene.client.owner = "ada"
    began = time.monotonic()
    scene.client.audit()
    scene.bounded("submit", "an audit", time.monotonic() - began, 10, "s")


def array(scene: Scene, _options: argparse.Namespace) -> None:
    scene.client.owner = "arrays"
    with scene.somebody_else("array"):
        for _ in range(3):
            began = time.monotonic()
            scene.client.submit(["true"], num_gpus=8, array=5_000, hold=True)
            scene.say("array", "5,000 jobs in one step", f"{time.monotonic() - began:.2f} s")
            time.sleep(1)
    scene.client.owner = "ada"


def payload(scene: Scene, _options: argparse.Namespace) -> None:
    before_mb = scene.memory_mb("allocator")
    before_bytes = scene.ledger_bytes()

    def weigh(data: bytes) -> int:
        return len(data)

    with scene.somebody_else("payload"):
        jobs = []
        for number in range(100):
            data = number.to_bytes(4, "big") * (PAYLOAD_BYTES // 4)
            jobs.append(scene.client.submit(weigh, data, num_gpus=8, hold=number > 0, priority="high"))
        again = scene.client.submit(weigh, data, num_gpus=8, hold=True)
    scene.bounded("payload", "blobs of 101 jobs, two of them alike", scene.disk_mb("blobs"), 100 * 10, "MiB")
    scene.bounded(
        "payload", "the allocator's memory grew by", scene.memory_mb("allocator") - before_mb, 30, "MiB"
    )
    scene.bounded("payload", "the ledger grew by", (scene.ledger_bytes() - before_bytes) / 2**20, 10, "MiB")
    scene.say("payload", "the store's memory", f"{scene.memory_mb('store'):,.0f} MiB")
    for each in (*jobs, again):
        each.cancel()


def logs(scene: Scene, options: argparse.Namespace) -> None:
    code = f"""
import os
line = b"x" * 1023 + b"\\n"
os.write(1, b"the first line\\n")
for _ in range({options.log_mb}):
    os.write(1, line * 1024)
os.write(1, b"the last line\\n")
"""
    peaks = {"store": 0.0, "runner": 0.0, "scratch": 0.0}
    with scene.somebody_else("logs"):
        began = time.monotonic()
        job = scene.client.submit([sys.executable, "-c", code], num_gpus=1, priority=100_000)
        prefix = f"rm/{scene.client.ledger_key}/{job.id}."
        while not job.view().ended:
            with suppress(OSError, KeyError):
                peaks["store"] = max(peaks["store"], scene.memory_mb("store"))
                runner = next((name for name in actor_pids() if name.startswith(prefix)), None)
                if runner:
                    peaks["runner"] = max(peaks["runner"], scene.memory_mb(runner))
            peaks["scratch"] = max(peaks["scratch"], scratch_mb(scene, job.id))
            time.sleep(0.05)
        took = time.monotonic() - began
    scene.say(
        "logs",
        f"{options.log_mb} MB printed, job took",
        f"{took:.1f} s, {job.status}",
        "SUCCEEDED",
        kept=job.status == "SUCCEEDED",
    )
    scene.bounded("logs", "kept in the store", scene.disk_mb("logs"), LOG_LIMIT / 2**20 + 4, "MiB")
    scene.bounded("logs", "the store's memory", peaks["store"], 200, "MiB")
    scene.bounded("logs", "the runner's memory", peaks["runner"], 200, "MiB")
    scene.say("logs", "scratch disk of the node at most", f"{peaks['scratch']:,.0f} MiB")
    text = job.logs()
    both = text.startswith("the first line\n") and text.endswith("the last line\n")
    said = next((line for line in text.splitlines() if line.startswith("[rm:")), "nothing")
    scene.say("logs", "head and tail are there", f"{both}; {said}", kept=both and said != "nothing")


def report(scene: Scene, _options: argparse.Namespace) -> None:
    code = """
import time, rm
began, step = time.monotonic(), 0
while time.monotonic() - began < 15:
    for _ in range(100):
        step += 1
        rm.report(step=step, loss=1 / step); rm.checkpointed()
    time.sleep(max(0, began + step / 10_000 - time.monotonic()))
print(step / (time.monotonic() - began))
"""
    job = scene.client.submit([sys.executable, "-c", code], num_gpus=1, priority=100_000)
    while job.status in ("QUEUED", "RESERVING"):
        time.sleep(0.05)
    before, cpu, began = scene.ledger_bytes(), cpu_s(), time.monotonic()
    job.wait()
    took, used = time.monotonic() - began, cpu_s() - cpu
    scene.say("report", "reports and checkpoints a second", job.logs().strip()[:8])
    scene.bounded("report", "the allocator's CPU meanwhile", 100 * used / took, 20, "%")
    scene.bounded("report", "the ledger grew by", (scene.ledger_bytes() - before) / 2**20, 5, "MiB")
    events = [each.kind for each in job.events()]
    scene.bounded("report", "events of the job", len(events), 10, "")


def wait(scene: Scene, _options: argparse.Namespace) -> None:
    job = scene.client.submit(["sleep", "30"], num_gpus=1, priority=100_000)
    flood = scene.start(WAITS, job.id)
    assert flood.stdout is not None
    flood.stdout.readline()
    with scene.somebody_else("wait"):
        job.wait()
        ended = time.monotonic()
        flood.wait()
    scene.bounded("wait", "1,000 waits returned after the end within", time.monotonic() - ended, 10, "s")


def list_(scene: Scene, _options: argparse.Namespace) -> None:
    for limit in (1_000, 10_000):
        with scene.somebody_else(f"list {limit}"):
            scene.start(LISTS, 20, limit).wait()


def cancel(scene: Scene, _options: argparse.Namespace) -> None:
    for owner in ("flood", "arrays"):
        with scene.somebody_else(f"cancel {owner}"):
            began = time.monotonic()
            count = scene.client.cancel_all(owner)
            scene.say(f"cancel {owner}", f"{count:,} jobs", f"{time.monotonic() - began:.1f} s")


def waiting(scene: Scene) -> int:
    return sum(queue.pending for queue in scene.client.queues() if queue.parent is None)


def cpu_s() -> float:
    fields = Path(f"/proc/{actor_pids()['allocator']}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scratch_mb(scene: Scene, job_id: str) -> float:
    from rm.runtime.workspace import scratch_root

    total = 0
    for each in scratch_root().glob(f"{scene.client.ledger_key}-{job_id}.*/rank-*"):
        with suppress(OSError):
            total += each.stat().st_blocks * 512
    return total / 2**20


FLOODS: dict[str, Callable[[Scene, argparse.Namespace], None]] = {
    "submit": submit, "array": array, "list": list_, "cancel": cancel, "payload": payload, "logs": logs,
    "report": report, "wait": wait,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--log-mb", type=int, default=1024)
    parser.add_argument("--only", default=",".join(ALL), help=f"of {','.join(ALL)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rm-floods-", ignore_cleanup_errors=True) as home:
        scene = Scene(Path(home))
        try:
            for name in options.only.split(","):
                FLOODS[name](scene, options)
        finally:
            scene.close()
    table = Table("flood", "what", "measured", "bound", "kept")
    for *words, kept in scene.lines:
        table.add_row(*words, "" if not words[-1] and kept else "yes" if kept else "NO")
    Console(width=160).print(table)
    return 0 if all(line[-1] for line in scene.lines) else 1


if __name__ == "__main__":
    sys.exit(main())
