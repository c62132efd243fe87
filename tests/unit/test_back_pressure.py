"""What a client does when the allocator or the store can't hold its call: it asks again later, and not at once."""

from __future__ import annotations

from typing import Any

import pytest

from rm import job as job_module
from rm import logs as logs_module
from rm.core.model import Gang, Kind
from rm.core.resources import GPU_UNIT, Bundle
from rm.job import Job
from rm.spec import build_spec
from rm.views import JobView, job_view


def view(**changes: Any) -> JobView:
    spec = build_spec(kind=Kind.COMMAND, command=("true",), num_gpus=1, owner="ada")
    return job_view(spec.job("j1", 1, Gang(Bundle(GPU_UNIT)), 0.0), **changes)


class Answers:
    """A client whose allocator and store answer at once, from a list."""

    owner, ledger_key = "ada", "abc123"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def _allocator(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(method)
        return self.answers.pop(0)

    _store = _allocator


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses, instead of making them."""
    pauses: list[float] = []
    monkeypatch.setattr(job_module.time, "sleep", pauses.append)
    return pauses


def test_a_wait_that_was_not_held_is_asked_again_later(slept: list[float]) -> None:
    job = Job(Answers(view()), "j1")  # type: ignore[arg-type]
    assert job.changed("QUEUED", 20.0).status == "QUEUED"
    (pause,) = slept
    assert 1.0 <= pause <= 3.0


def test_news_is_passed_on_at_once(slept: list[float]) -> None:
    job = Job(Answers(view(), view(), view()), "j1")  # type: ignore[arg-type]
    job.changed("RUNNING", 20.0)
    job.changed("QUEUED", 0.1)
    job.changed("QUEUED", 0.0)
    assert slept == [], "another status, and waits that were hardly any"


def test_a_follower_that_was_not_held_looks_again_later(slept: list[float]) -> None:
    client = Answers(view(), [], False, view(), [], True, view(), [], False)
    lines = Job(client, "j1").logs(follow=True, rank=0)  # type: ignore[arg-type]
    client.answers.insert(0, view())  # whether it is an array
    with pytest.raises(IndexError):
        next(lines)  # type: ignore[call-overload]
    assert slept == [logs_module.PAUSE_S] * 2
