"""The judge of `benchmarks/faults.py`: it lets pass what may be, and finds what may not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pytest
from fault_story import SCRIPT, USER_KILL, Story, judge
from fault_watch import Watch


def story(
    status: str = "SUCCEEDED", *, hits: dict[str, int] | None = None, infra_failures: int = 0, **fields
) -> Story:
    outcome = {
        "status": status,
        "infra": False,
        "exit_code": 3 if status == "FAILED" else None,
        "signal": None,
    }
    view = SimpleNamespace(
        status=status,
        ended_at=fields.pop("ended_at", 100.0),
        outcome=outcome | fields.pop("outcome", {}),
        attempts=fields.pop("attempts", 1),
        ranks=1,
        infra_failures=infra_failures,
    )
    fields.setdefault("diary", ["begin j1.1 0 10", "end j1.1 0 11"])
    return Story(
        **{"name": "w1", "fate": "ok", "job_id": "j1", "hits": Counter(hits or {}), "view": view} | fields
    )


def test_what_may_be() -> None:
    again = ["begin j1.1 0 10", "begin j1.2 0 20", "end j1.2 0 21"]
    for each in (
        story(),
        story("FAILED", fate="fail"),
        story("CANCELLED", cancelled=True, diary=[]),
        story(
            "FAILED", hits={USER_KILL: 1}, outcome={"exit_code": None, "signal": 9}, diary=["begin j1.1 0 10"]
        ),
        story(hits={"runner": 1}, infra_failures=1, attempts=2, diary=again),
        story(moved=True, attempts=2, diary=again),
        story(
            "FAILED",
            hits={"node": 1},
            max_infra_retries=0,
            outcome={"infra": True},
            diary=[],
        ),
    ):
        assert judge(each) == []


def test_what_may_not_be() -> None:
    again = ["begin j1.1 0 10", "begin j1.2 0 20", "end j1.2 0 21"]
    for each, word in (
        (story("FAILED"), "only ['SUCCEEDED'] would be right"),
        (story("FAILED", fate="fail", outcome={"exit_code": 1}), "exit code 1"),
        (story(cancelled=True), "only ['CANCELLED'] would be right"),
        (story(infra_failures=1), "was hit 0 times"),
        (
            story("FAILED", hits={"node": 1}, infra_failures=1, max_infra_retries=2, outcome={"infra": True}),
            "1 of its 2 tries",
        ),
        (story(attempts=2, diary=again), "nothing was done to it"),
        (story(diary=["begin j1.1 0 10"]), "0 of 1 ranks"),
        (story(diary=["begin j1.1 0 10", "begin j1.1 0 10.5", "end j1.1 0 11"]), "ran 2 times"),
        (story(diary=["begin j1.1 0 10", "end j1.1 0 100.5"]), "0.500 s after the job had ended"),
    ):
        assert any(word in sentence for sentence in judge(each)), (word, judge(each))


def test_overlapping_attempts_are_found(tmp_path: Path) -> None:
    (tmp_path / "work.sh").write_text(SCRIPT)

    def attempt(number: int, rank: int, seconds: str) -> subprocess.Popen[bytes]:
        env = os.environ | {"RM_JOB_ID": "j1", "RM_ATTEMPT": f"j1.{number}", "RANK": str(rank)}
        words = ["bash", str(tmp_path / "work.sh"), str(tmp_path / "w1"), seconds, "0"]
        return subprocess.Popen(words, env=env)

    for each in [attempt(1, 0, "0"), attempt(1, 1, "0")]:
        assert each.wait() == 0
    first = attempt(2, 0, "100")
    diary = tmp_path / "w1.j1"
    while "begin j1.2" not in diary.read_text():
        pass
    assert "overlap" not in diary.read_text(), "one after the other, and ranks beside each other, are right"
    # The shell is gone, and what it started lives on.
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text
    while not (left := children().split()):
        pass
    first.kill()
    first.wait()
    try:
        assert attempt(3, 1, "0").wait() == 0
    finally:
        os.kill(int(left[0]), 9)
    lines = diary.read_text().splitlines()
    who = "j1 (w1, ok, SUCCEEDED, hit by {'runner': 2})"
    assert judge(story(ended_at=9e9, attempts=3, hits={"runner": 2}, diary=lines)) == [
        f"{who}: rank 1 of attempt j1.3 began while a process that holds w1.j1.j1.2.0.lock lived"
    ]


@pytest.mark.parametrize(
    ("admitted", "released", "charged"),
    [
        (101.0, 109.0, True),
        (105.5, None, True),
        (101.0, 105.2, True),
        (101.0, 104.0, True),  # and was kept for the next
        (107.0, 109.0, False),
        (1.0, 4.0, False),
        (None, None, False),
    ],
)
@pytest.mark.parametrize("stand", ["", "j0.1"])
def test_what_looked_uncharged_is_asked_of_the_ledger(admitted, released, charged, stand) -> None:
    events = [
        SimpleNamespace(kind=kind, job_id="j1", attempt=1, at=at, body={"stand": stand})
        for kind, at in (
            ("JobAdmitted", admitted),
            ("PlacementReady", admitted),
            ("PlacementReleased", released),
        )
        if at is not None
    ]
    said: list[str] = []
    watch = Watch(None, None, said.append)
    watch.doubts[stand or "j1.1"] = (105.0, 106.0)
    watch.settle(events)
    assert (not said) is charged
