"""Plays the scenario files beside it: jobs, nodes and ends in, exact decisions and reasons out.

README.md has the format. Each file ends with a steady round in which time passes and nothing may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from stage import Stage, describe, read_policy, request_of

from rm.core import reasons
from rm.core.cycle import why
from rm.core.shapes import resolve
from rm.errors import RmError

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.yaml"))
EXPECTED = {"decisions", "wanted", "stay", "waiting", "ended", "refused", "cut", "due"}
STIMULI = {
    "now", "note", "rank", "learn", "policy", "nodes", "launchable", "lose", "foreign", "release", "finish", "fail",
    "lost", "unready", "checkpoint", "broken", "cancel", "hold", "unhold", "submit", "steady",
    "cordon", "quarantine", "drain", "uncordon", "launches", "launch_failed",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    story = yaml.safe_load(path.read_text())
    stage = Stage(policy=read_policy(story.get("policy", {})))
    rounds = story["rounds"]
    assert "steady" in rounds[-1], "a scenario ends with a steady round"
    for number, words in enumerate(rounds, 1):
        where = f"{path.name}, round {number}"
        assert not set(words) - EXPECTED - STIMULI, f"{where}: {set(words) - EXPECTED - STIMULI}"
        if "steady" in words:
            _steady(stage, words["steady"], where)
            continue
        stage.now = float(words.get("now", stage.now))
        before = set(stage.ended)
        stage.play(words)
        assert stage.decisions() == words.get("decisions", []), where
        ended = {job_id: str(stage.ended[job_id].status) for job_id in stage.ended if job_id not in before}
        assert ended == words.get("ended", {}), where
        assert stage.wanted() == words.get("wanted", []), where
        assert list(stage.state.launches.wanted.stay) == words.get("stay", []), where
        _compare_waiting(stage, words.get("waiting", {}), where)
        if "due" in words:
            assert stage.state.next_due(stage.now) == words["due"], where
        _requests(stage, words, where)


def _compare_waiting(stage: Stage, expected: dict[str, Any], where: str) -> None:
    """Every waiting job is listed, with its code, and the evidence that matters."""
    found = waiting(stage)
    wanted = {name: ([said] if isinstance(said, str) else said) for name, said in expected.items()}
    assert {name: reason.code for name, reason in found.items()} == {
        name: code for name, (code, *_) in wanted.items()
    }, f"{where}: {dict(found)}"
    for name, (_, *evidence) in wanted.items():
        for key, value in (evidence[0] if evidence else {}).items():
            assert found[name].evidence.get(key) == value, f"{where}: {name}: {key} in {found[name]}"
        assert found[name].message


def waiting(stage: Stage) -> dict[str, reasons.Reason]:
    queued = sorted(
        (job for job in stage.state.jobs.values() if job.attempt is None), key=lambda job: job.seq
    )
    return {job.id: why(stage.state, job, stage.now) for job in queued}


def _requests(stage: Stage, words: dict[str, Any], where: str) -> None:
    """`cut`: how a request is cut. `refused`: what a refusal says."""
    for asked, gang in words.get("cut", []):
        assert describe(resolve(request_of(dict(asked)), stage.state.node_shapes())) == gang, (where, asked)
    for asked, message in words.get("refused", []):
        with pytest.raises(RmError) as caught:
            resolve(request_of(dict(asked)), stage.state.node_shapes())
        assert message in str(caught.value), (where, asked)


def _steady(stage: Stage, seconds: float, where: str) -> None:
    """Time passes, nothing happens: nothing is decided, no record changes, no reason changes."""
    jobs, codes = dict(stage.state.jobs), {name: reason.code for name, reason in waiting(stage).items()}
    until = stage.now + seconds
    while stage.now < until:
        # A cycle may ask to be called again, as long as nothing comes of it.
        due = stage.state.next_due(stage.now)
        stage.now = until if due is None else min(due, until)
        stage.play({})
        assert stage.decisions() == [], f"{where}: at {stage.now}: not steady"
    assert stage.state.jobs == jobs, where
    assert {name: reason.code for name, reason in waiting(stage).items()} == codes, where


def test_every_reason_that_the_core_gives_is_in_some_scenario() -> None:
    given = set()
    for path in FILES:
        for words in yaml.safe_load(path.read_text())["rounds"]:
            for said in words.get("waiting", {}).values():
                given.add(said if isinstance(said, str) else said[0])
    every = {value for name, value in vars(reasons).items() if name.isupper()}
    assert given == every
