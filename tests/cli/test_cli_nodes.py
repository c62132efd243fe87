"""`rmctl cordon`, `drain`, `uncordon`, and how `rmctl nodes` shows what they did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_client import HOSTILE, FakeClient, event, node

from rm.core.launches import Coming
from rm.core.model import GPU_TYPE, Cordon, NodeShape
from rm.tables import moment
from rm.views import booting_node_view, gone_node_view

SINCE = 1_700_000_000.0
AGE = {"by": "ada", "reason": "a fan is loud", "at": SINCE, "deadline": None}


@pytest.fixture
def two_nodes(fake: FakeClient) -> FakeClient:
    fake.node_views = [
        node("big", 8, charged=4, jobs=("j1", "j2"), id="ab" * 28),
        node("small", 2, id="cd" * 28),
    ]
    return fake


def test_cordon_says_what_goes_on_there(rmctl: Any, two_nodes: FakeClient) -> None:
    ran = rmctl("cordon", "big", "small", "--reason", "a fan is loud")
    assert ran.code == 0
    since = f"by ada since {moment(SINCE)}: a fan is loud"
    assert ran.out.splitlines() == [
        f"big (abababab) cordoned {since}; j1, j2 there",
        f"small (cdcdcdcd) cordoned {since}; nothing of ours runs there",
    ]
    assert two_nodes.cordoned == [(["big", "small"], "a fan is loud", False, None)]
    assert two_nodes.connected == [(None, False)], "no allocator is started for it"


def test_drain_with_and_without_a_deadline(rmctl: Any, two_nodes: FakeClient) -> None:
    big = rmctl("drain", "big", "--deadline", "10m").out
    assert big.startswith(f"big (abababab) draining until {moment(SINCE + 600)} by ada since ")
    assert rmctl("drain", "small").out.startswith("small (cdcdcdcd) drained by ada since ")
    assert rmctl("drain", "big", "--deadline", "0").code == 0
    assert [each[2:] for each in two_nodes.cordoned] == [(True, 600.0), (True, None), (True, 0.0)]


def test_a_deadline_that_is_none_is_refused(rmctl: Any, two_nodes: FakeClient) -> None:
    ran = rmctl("drain", "big", "--deadline", "soon")
    assert (ran.code, ran.out, two_nodes.cordoned) == (2, "", [])
    assert ran.err.startswith("error: deadline: must be a duration such as 90, '15m', '2h'")


def test_an_unknown_node_is_told_which_there_are(rmctl: Any, two_nodes: FakeClient) -> None:
    for command in ("cordon", "drain", "uncordon"):
        ran = rmctl(command, "huge")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == "error: there is no node 'huge'; there are big, small\n"


def test_uncordon(rmctl: Any, two_nodes: FakeClient) -> None:
    rmctl("cordon", "small")
    assert rmctl("uncordon", "small").out == "small (cdcdcdcd) ready; nothing of ours runs there\n"
    assert rmctl("uncordon", "small", "--json").json[0]["status"] == "ready"


def test_a_node_must_be_named(rmctl: Any, two_nodes: FakeClient) -> None:
    assert rmctl("cordon").code == 2
    assert two_nodes.cordoned == []


def test_nodes_shows_who_cordoned_what_and_why(rmctl: Any, two_nodes: FakeClient) -> None:
    assert "STATUS" not in rmctl("nodes").out
    rmctl("cordon", "big", "--reason", "a fan is loud")
    header, big, small = rmctl("nodes").out.splitlines()
    assert header.split()[-1] == "STATUS"
    assert big.split()[3:7] == ["████╌╌╌╌", "4", "0", "0"], "nothing there is free"
    assert big.endswith(f"j1, j2  cordoned by ada since {moment(SINCE)}: a fan is loud")
    assert small.endswith("ready")
    found = rmctl("nodes", "--json").json
    assert (found[0]["status"], found[0]["cordon"]) == ("cordoned", AGE)
    assert (found[1]["status"], found[1]["cordon"]) == ("ready", None)


def test_a_reason_reaches_the_terminal_as_text(rmctl: Any, two_nodes: FakeClient) -> None:
    out = rmctl("cordon", "big", "--reason", HOSTILE).out + rmctl("nodes").out
    assert "\x1b" not in out
    assert "[red]x[/red]" in out


def test_events_tell_of_cordons(rmctl: Any, fake: FakeClient) -> None:
    body = {"node_id": "ab" * 28, "by": "ada", "reason": "a fan", "draining": False, "deadline": None}
    fake.event_views = [
        event(1, "NodeCordoned", None, body=body),
        event(2, "NodeCordoned", None, body={**body, "draining": True, "deadline": SINCE}),
        event(3, "StopRequested", "j1", body={"cause": "drained", "by": "node big"}),
        event(4, "NodeUncordoned", None, body={"node_id": "ab" * 28, "by": "ada"}),
        event(5, "CordonInherited", None, body={"node_id": "cd" * 28, "old_id": "ab" * 28}),
    ]
    _, *rows = rmctl("events").out.splitlines()
    assert rows[0].endswith("node abababab cordoned by ada: a fan")
    assert rows[1].endswith(f"node abababab drains until {moment(SINCE)} by ada: a fan")
    assert rows[2].endswith("node big is drained")
    assert rows[3].endswith("node abababab uncordoned by ada")
    assert rows[4].endswith("node cdcdcdcd is cordoned as abababab was, which had its name")


def test_a_cordoned_node_that_is_gone_is_listed_last(rmctl: Any, two_nodes: FakeClient) -> None:
    two_nodes.node_views.append(gone_node_view(Cordon("ef" * 28, SINCE, "ada", "a fan", gone_at=SINCE)))
    row = rmctl("nodes").out.splitlines()[-1]
    assert row.startswith("efefefef"), "its name is not known"
    assert row.endswith(f"gone since {moment(SINCE)}, cordoned by ada since {moment(SINCE)}: a fan")
    assert [each["status"] for each in rmctl("nodes", "--json").json] == ["ready", "ready", "gone"]


def test_gpus_in_quarantine_are_told_with_the_processes_on_them(rmctl: Any, fake: FakeClient) -> None:
    stray = {"gpu": 5, "pid": 4711, "name": HOSTILE, "user": "ada", "memory_bytes": 20 * 2**30}
    nameless = {**stray, "gpu": 6, "pid": 4712, "name": "python", "user": ""}
    fake.node_views = [
        node("big", 8, charged=3, free_gpus=3, quarantined_gpus=2, strays=(stray, nameless)),
        node("small", 2, id="cd" * 28),
    ]
    out = rmctl("nodes").out
    assert "\x1b" not in out
    assert "2 in quarantine: GPU 5 is used by pid 4711" in out
    assert out.splitlines()[-1].endswith("ready")
    assert "GPU 6 is used by pid 4712 (python), 20480 MiB" in out
    assert rmctl("nodes", "--json").json[0]["strays"][0]["pid"] == 4711
    body = {"node_id": "ab" * 28, "units": 20_000, "strays": [nameless]}
    fake.event_views = [
        event(1, "GpusQuarantined", None, body=body),
        event(2, "GpusQuarantined", None, body={**body, "units": 0, "strays": []}),
    ]
    _, *rows = rmctl("events").out.splitlines()
    said = "node abababab: 2 GPUs in quarantine: GPU 6 is used by pid 4712 (python), 20480 MiB"
    assert rows[0].endswith(said)
    assert rows[1].endswith("node abababab: nothing is in quarantine any more")


def test_nodes_that_boot_and_nodes_that_are_idle(rmctl: Any, two_nodes: FakeClient) -> None:
    shape = NodeShape(4, 16_000, 2**36, ((GPU_TYPE, "A10G"),), 2, "g5.12xlarge")
    two_nodes.node_views[1] = replace(two_nodes.node_views[1], idle_since=SINCE)
    two_nodes.node_views.append(booting_node_view(Coming(shape, SINCE + 60, True, ("j3", "j4"))))
    header, big, small, boots = rmctl("nodes").out.splitlines()
    assert header.split()[-1] == "STATUS"
    assert big.endswith("ready")
    assert small.endswith(f"idle since {moment(SINCE)}")
    assert boots.split()[:7] == ["g5.12xlarge", "A10G", "4", "╌╌╌╌", "0", "0", "0"], "nothing there is free"
    assert boots.endswith(f"j3, j4  booting since {moment(SINCE + 60)}")
    assert [each.name for each in two_nodes.nodes()] == ["big", "small"], (
        "who counts GPUs counts those that are there"
    )
    found = rmctl("nodes", "--json").json
    assert [each["idle_since"] for each in found] == [None, SINCE, None]
    assert (found[2]["status"], found[2]["booting_since"], found[2]["id"]) == ("booting", SINCE + 60, "")
