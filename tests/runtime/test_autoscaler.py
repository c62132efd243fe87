"""What is concluded from what Ray's autoscaler says: its own tables and its file, without an autoscaler."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.v2.schema import ClusterStatus, NodeInfo, NodeUsage, ResourceUsage

from rm.core.events import Event, LaunchesObserved, NodeCordoned, NodeTypesObserved, NodeUncordoned
from rm.runtime import autoscaler
from rm.runtime.autoscaler import Autoscaler

FILE = {
    "max_workers": 9,
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "a8": {"resources": {"CPU": 8, "GPU": 8}, "min_workers": 1, "max_workers": 4},
        "b1": {"resources": {"GPU": 1}, "max_workers": 4},
    },
}


def node(node_type: str, node_id: str | None, gpus: float | None = None) -> NodeInfo:
    usage = (
        None
        if gpus is None
        else NodeUsage([ResourceUsage("GPU", gpus)] if gpus else [ResourceUsage("CPU", 1)], 0)
    )
    return NodeInfo("", node_type, "", "", "RUNNING", node_id, usage)


class Look:
    """One autoscaler that looks at `published` (None: nothing; an exception: the GCS is away) and at `status`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        self.published: Exception | None = None
        self.status = ClusterStatus()
        self.told: list[Event] = []
        monkeypatch.setattr("ray._private.state.state.get_cluster_config", self._config)
        monkeypatch.setattr(autoscaler, "_read_status", lambda: self.status)
        self._autoscaler = Autoscaler(
            self.told.append, clock=lambda: 7.0, busy=lambda: False, config_file=file
        )

    def _config(self) -> None:
        if self.published is not None:
            raise self.published

    def __call__(self, *up: NodeInfo) -> list[Event]:
        """What one look posts."""
        self.status = ClusterStatus(active_nodes=list(up))
        self.told.clear()
        asyncio.run(self._autoscaler.look())
        return list(self.told)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, file: Path) -> Look:
    return Look(monkeypatch, file)


def awaited(events: list[Event]) -> list[bool]:
    return [each.awaited for each in events if isinstance(each, NodeTypesObserved)]


def test_without_an_autoscaler_nothing_is_awaited_and_nothing_told(look: Look) -> None:
    assert look() == []


def test_a_file_that_cannot_be_read_yet_is_awaited(look: Look, file: Path) -> None:
    file.write_text("available_node_types: {a8: ")
    assert awaited(look()) == [True]
    assert look() == [], "told once"
    file.write_text(json.dumps(FILE))
    types, launches = look()
    assert isinstance(types, NodeTypesObserved)
    assert ([each.name for each in types.shapes], types.most_in_all, types.awaited) == (
        ["a8", "b1"],
        9,
        False,
    )
    assert launches == LaunchesObserved(7.0, (), ())


def test_it_is_awaited_for_a_minute_at_most(look: Look, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("")
    assert awaited(look()) == [True]
    monkeypatch.setattr(autoscaler, "TYPES_S", 0.0)
    assert awaited(look()) == [False]


def test_beside_kuberay_the_types_are_awaited(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoscaler.KUBERAY_COMMAND, "ray start --head  --num-cpus=0")
    assert look() == [], "a RayCluster without autoscaling"
    monkeypatch.setenv(autoscaler.KUBERAY_COMMAND, "ray start --head  --no-monitor  --num-cpus=0")
    assert awaited(look()) == [True]


def test_a_gcs_that_does_not_answer_leaves_open_what_there_is(look: Look, file: Path) -> None:
    file.write_text(json.dumps(FILE))
    look.published = RuntimeError("the GCS is away")
    with pytest.raises(RuntimeError):
        look()
    assert awaited(look.told) == [True]
    look.published = None
    assert awaited(look()) == [False]


def test_nodes_that_come_smaller_than_declared_are_told_of(look: Look, file: Path) -> None:
    file.write_text(json.dumps(FILE))
    look(node("a8", "n1", 8), node("b1", "n2", 1))
    (told,) = look(node("a8", "n1", 8), node("b1", "n2", 1), node("a8", "n3", 4), node("b1", "n4", 0))
    assert isinstance(told, LaunchesObserved)
    assert told.short == (("a8", 1, 4), ("b1", 1, 0))
    (told,) = look(node("a8", "n1", 8), node("a8", "n3", None))
    assert isinstance(told, LaunchesObserved)
    assert told.short == (), "n3 has not said what it has"


def test_who_stays_and_who_is_given_back(look: Look, file: Path) -> None:
    file.write_text(json.dumps(FILE))

    def returnable(*up: NodeInfo) -> tuple[str, ...]:
        told: Any = look(*up)[-1]
        return told.returnable

    assert returnable(node("a8", "n5", 8), node("b1", "n2", 1), node("head", "n0", 0)) == ("n2",)
    assert returnable(node("a8", "n1", 8), node("a8", "n5", 8)) == ("n1",), "n5 stays, as before"
    assert returnable(node("a8", "n1", 8), node("a8", "n3", 8)) == ("n3",)


def test_a_node_that_ray_takes_away_is_cordoned_whether_or_not_an_autoscaler_runs(look: Look) -> None:
    there, leaves = node("", "n1", 8), node("", "n2", 8)
    assert look(there, leaves) == []
    leaves.node_status = "DRAINING"
    (told,) = look(there, leaves)
    assert told == NodeCordoned(7.0, "n2", "autoscaler", "Ray takes the node away", True, 7.0)
    assert look(there, leaves) == [], "told once"
    assert look(there) == [NodeUncordoned(7.0, "n2", "autoscaler")]
