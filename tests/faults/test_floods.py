"""Floods by one user on the shared cluster: what they may take is bounded, and others are served meanwhile.

The same at full size, with times, is `benchmarks/floods.py`; `make long` runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from probes import wait_until

from rm.errors import Busy, InvalidSpec, PayloadTooLarge
from rm.ledger.codec import encode_spec

REPO = Path(__file__).resolve().parents[2]
PAYLOAD_BYTES = 10 * 10**6


@pytest.mark.ray
def test_a_fork_bomb_of_submissions_leaves_room_for_others(client) -> None:
    import ray

    submit = client._actors.allocator.submit
    draft = client._draft(
        ["true"], (), {}, False, {"num_gpus": 8, "hold": True, "owner": "flood", "array": 500}
    )
    floods = [
        submit.remote(([encode_spec(draft.spec)], [f"flood-{os.getpid()}-{number}"], ""))
        for number in range(4)
    ]
    job = client.submit("echo served", num_gpus=1)
    assert job.wait(120).status == "SUCCEEDED"
    arrays = [ids[0] for ids in ray.get(floods)]
    try:
        assert len(client.jobs(owner="flood", limit=10_000)) == 2_000
        newest = max(arrays, key=lambda array: int(array[1:]))  # Ray doesn't say in which order it calls
        assert client.jobs(owner="flood", limit=1)[0].id.startswith(f"{newest}_"), "newest first"
        with pytest.raises(InvalidSpec, match="limit: at most 10000 jobs are listed at once"):
            client.jobs(limit=10_001)
        # More than one owner may have, in steps that one transaction may hold.
        with pytest.raises(
            Busy, match=r"2000 jobs of flood are waiting, and with 1000 more .* the 2500 that one"
        ):
            client.submit_many(["true"] * 1_000, num_gpus=8, hold=True, owner="flood")
        with pytest.raises(InvalidSpec, match="entries: 5001 jobs in one step, and at most 5000 can be"):
            client.submit_many(["true"] * 5_001, num_gpus=8, hold=True)
        assert client.submit("true", num_gpus=1).wait(120).status == "SUCCEEDED", "others have their place"
    finally:
        assert client.cancel_all("flood") == 2_000
        assert client.jobs(owner="flood") == []


@pytest.mark.ray
def test_arguments_travel_once_and_go_when_nobody_needs_them(client, ray_cluster: Any) -> None:
    data = os.urandom(16) * (PAYLOAD_BYTES // 16)
    blobs = ray_cluster.home / "blobs"

    def weigh(given: bytes) -> int:
        return len(given)

    def kept() -> set[Path]:
        return {path for path in blobs.glob("*/*") if path.stat().st_size > PAYLOAD_BYTES}

    before = kept()
    job = client.submit(weigh, data, num_gpus=1)
    again = client.submit(weigh, data, num_gpus=1, hold=True)
    (blob,) = kept() - before
    assert job.result(timeout=60) == PAYLOAD_BYTES
    os.utime(blob, (time.time() - 30 * 86_400,) * 2)
    client._allocator("tidy")
    assert blob.exists(), "a job that waits needs it"
    again.cancel()
    again.wait(120)
    client._allocator("tidy")
    assert not blob.exists()
    with pytest.raises(PayloadTooLarge, match="at most 16 MiB travel by value"):
        client.submit(weigh, data * 2, num_gpus=1)
    with pytest.raises(PayloadTooLarge, match="command: the request takes .* at most 256 KiB"):
        client.submit(["echo", "x" * PAYLOAD_BYTES], num_gpus=1)


@pytest.mark.ray
def test_a_rank_that_prints_without_end_is_bounded_and_goes_on(client, ray_cluster: Any) -> None:
    code = (
        "import os\nos.write(1, b'the first line\\n')\n"
        "for _ in range(120): os.write(1, (b'x' * 1023 + b'\\n') * 1024)\n"
        "os.write(1, b'the last line\\n')"
    )
    job = client.submit([sys.executable, "-c", code], num_gpus=1)
    assert job.wait(120).status == "SUCCEEDED"
    client._allocator("settled", job.id)
    files = list((ray_cluster.home / "logs").glob(f"*-{job.id}/1/0.out"))
    on_disk = sum(path.stat().st_blocks * 512 for path in files)
    assert files
    assert on_disk <= ray_cluster.max_log_bytes * 17 // 16 + 2**20 + 3 * 4096
    text = job.logs()
    assert text.startswith("the first line\n")
    assert text.endswith("the last line\n")
    assert "bytes of output were cut out here" in text
    assert "\0" not in text


@pytest.mark.ray
def test_ten_thousand_reports_a_second_change_nothing_in_the_ledger(client) -> None:
    code = (
        "import time, rm\nbegan, step = time.monotonic(), 0\n"
        "while time.monotonic() - began < 1.5:\n"
        "    step += 1; rm.report(step=step); rm.checkpointed()\n"
        "rm.report(last=step)"
    )
    job = client.submit([sys.executable, "-c", code], num_gpus=1)
    assert job.wait(120).status == "SUCCEEDED"
    assert job.progress["last"] > 1_000
    kinds = [each.kind for each in job.events()]
    assert len(kinds) <= 7, kinds


@pytest.mark.ray
def test_a_thousand_waits_at_once_keep_nobody_out(client) -> None:
    """The allocator takes 1,000 calls at a time: half of them stay free."""
    import ray

    held = client.submit("true", num_gpus=1, hold=True)
    waits = [client._actors.allocator.wait.remote(held.id, 25.0, None) for _ in range(1_100)]
    early, _ = ray.wait(waits, num_returns=600, timeout=20)
    assert len(early) == 600, "those who find no room are told at once"
    assert client.submit("true", num_gpus=1).wait(120).status == "SUCCEEDED"
    held.cancel()
    assert {each.status for each in ray.get(waits)} == {"QUEUED", "CANCELLED"}
    wait_until(lambda: client.hello()["live_jobs"] == 0, 30, "all have ended")


@pytest.mark.long
@pytest.mark.own_ray
@pytest.mark.timeout(900)
def test_the_floods_at_full_size() -> None:
    """Each figure within its bound, the second that others may be held up included."""
    done = subprocess.run(
        [sys.executable, "benchmarks/floods.py"], cwd=REPO, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
