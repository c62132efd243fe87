"""What the audit says about looks at the world: every kind of finding, and what must not be one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rm.core.audit import (
    RAY,
    BookedNode,
    EndProcesses,
    Fault,
    Finding,
    GpuProcess,
    KeepFromUse,
    KillRunner,
    LedgerLook,
    LiveAttempt,
    LoseAttempt,
    RayGroup,
    RayLook,
    RayNode,
    RemoveGroup,
    confirmed,
    differences,
    doubtful,
    gpus_in_use,
    left_behind,
    still_in_use,
    without_kept,
)
from rm.core.model import Phase, PlacedBundle

UNIT = 10_000
A, B = "a" * 56, "b" * 56


def attempt(
    job: str = "j1", phase: Phase = Phase.RUNNING, nodes: tuple[str, ...] = (A, B), **fields: Any
) -> LiveAttempt:
    placed = tuple(PlacedBundle(each, (0, 1)) for each in nodes)
    return LiveAttempt(job, 1, phase, placed, 2 * UNIT, **{"group_id": f"g-{job}", **fields})


def ledger(*attempts: LiveAttempt, nodes: tuple[str, ...] = (A, B)) -> LedgerLook:
    """The books as they follow from the attempts, on nodes of 8 GPUs."""
    charged = {each: sum(one.planned()[each] for one in attempts) for each in nodes}
    return LedgerLook(
        {each.key: each for each in attempts},
        {each: BookedNode(each[0], 8 * UNIT, charged[each]) for each in nodes},
    )


def ray(
    *attempts: LiveAttempt, groups: dict[str, RayGroup] | None = None, nodes: tuple[str, ...] = (A, B)
) -> RayLook:
    """Ray as it has to be for these attempts, with all their runners."""
    held = {
        each: {one.group_id or "": one.planned()[each] for one in attempts if one.planned()[each]}
        for each in nodes
    }
    return RayLook(
        {each: RayNode(each[0], 8 * UNIT, 8 * UNIT - sum(held[each].values()), held[each]) for each in nodes},
        groups or {},
        frozenset(
            f"{one.key}/{bundle}" for one in attempts if one.has_runners for bundle in range(len(one.placed))
        ),
    )


def found(before: LedgerLook, look: RayLook, after: LedgerLook | None = None) -> list[tuple[Fault, str]]:
    return [(each.kind, each.what) for each in differences(before, look, after or before)]


def only(before: LedgerLook, look: RayLook) -> Finding:
    (finding,) = differences(before, look, before)
    return finding


# --- agreement -----------------------------------------------------------------------------------------------


def test_what_agrees_has_no_findings() -> None:
    one, two = attempt(), attempt("j2", nodes=(A, A))
    lease = attempt("j3", nodes=(B,), has_runners=False)
    assert found(ledger(one, two, lease), ray(one, two, lease)) == []
    assert doubtful(ledger(one, two, lease), ray(one, two, lease).nodes) == set()


def test_strangers_groups_are_nobodys_business() -> None:
    look = ray()
    nodes = {**look.nodes, A: replace(look.nodes[A], free_units=0, groups={"theirs": 8 * UNIT})}
    assert doubtful(ledger(), nodes) == {"theirs"}, "asked whose it is"
    assert found(ledger(), replace(look, nodes=nodes)) == []


@pytest.mark.parametrize("phase", [Phase.RESERVING, Phase.RELEASING])
def test_in_transition_a_group_may_be_there_or_not(phase: Phase) -> None:
    one = attempt(phase=phase)
    assert found(ledger(one), ray(one)) == []
    assert found(ledger(one), replace(ray(), groups={"g-j1": RayGroup("j1.1", "REMOVED")})) == []
    unknown = replace(one, group_id=None)
    mine = {"new": RayGroup("j1.1", "CREATED", (A, B))}
    assert found(ledger(unknown), ray(replace(one, group_id="new"), groups=mine)) == []


def test_what_changes_during_the_look_is_no_finding() -> None:
    running, releasing = attempt(), attempt(phase=Phase.RELEASING)
    assert found(ledger(running), ray(), ledger(releasing)) == []
    assert (
        found(ledger(releasing), ray(running, groups={"g-j1": RayGroup("j1.1", "CREATED")}), ledger()) == []
    )
    assert found(ledger(), ray(running, groups={"g-j1": RayGroup("j1.1", "CREATED")}), ledger(running)) == []


def test_an_attempt_that_is_being_stopped_is_left_to_those_who_stop_it() -> None:
    """A gang that lost one runner gives the others their grace: nobody may cut that off."""
    one = attempt(followed=False)
    assert found(ledger(one), replace(ray(one), runners=frozenset({"j1.1/0"}))) == []


# --- groups --------------------------------------------------------------------------------------------------


def test_a_group_that_no_live_attempt_owns_is_removed() -> None:
    orphan = attempt("j9", nodes=(A,))
    look = ray(orphan, groups={"g-j9": RayGroup("j9.1", "CREATED", (A,))})
    finding = only(ledger(), replace(look, runners=frozenset()))
    assert (finding.kind, finding.what, finding.repair) == (
        Fault.ORPHAN_GROUP,
        "j9.1 g-j9",
        RemoveGroup("g-j9"),
    )
    assert finding.evidence["gpus"] == {"a": 2}


def test_a_second_group_under_a_live_attempts_name_is_an_orphan() -> None:
    one = attempt()
    look = ray(
        one, replace(attempt(nodes=(A,)), group_id="twin"), groups={"twin": RayGroup("j1.1", "CREATED", (A,))}
    )
    assert found(ledger(one), look) == [(Fault.ORPHAN_GROUP, "j1.1 twin")]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RUNNING])
@pytest.mark.parametrize("table", [{}, {"g-j1": RayGroup("j1.1", "REMOVED")}])
def test_an_attempt_whose_group_is_gone_is_lost(phase: Phase, table: dict[str, RayGroup]) -> None:
    one = attempt(phase=phase)
    finding = only(ledger(one), replace(ray(one), nodes=ray().nodes, groups=table))
    assert (finding.kind, finding.what) == (Fault.LOST_GROUP, "j1.1")
    assert isinstance(finding.repair, LoseAttempt)
    assert (finding.repair.job_id, finding.repair.attempt) == ("j1", 1)


def test_an_attempt_that_has_lost_its_group_over_a_restart_is_lost() -> None:
    lease = attempt(group_id=None, has_runners=False)
    assert found(ledger(lease), ray()) == [(Fault.LOST_GROUP, "j1.1")]


def test_bundles_on_other_nodes_than_planned_are_a_lost_attempt() -> None:
    one = attempt(nodes=(A, B))
    elsewhere = attempt(nodes=(A, A))
    look = ray(elsewhere, groups={"g-j1": RayGroup("j1.1", "CREATED", (A, A))})
    assert doubtful(ledger(one), look.nodes) == {"g-j1"}
    finding = only(ledger(one), look)
    assert (finding.kind, finding.evidence["nodes"]) == (Fault.MOVED_GROUP, [A, A])
    assert isinstance(finding.repair, LoseAttempt)


# --- runners -------------------------------------------------------------------------------------------------


def test_a_runner_without_a_live_attempt_is_killed() -> None:
    one = attempt()
    look = replace(ray(one), runners=ray(one).runners | {"j1.2/0"})
    assert only(ledger(one), look).repair == KillRunner("j1.2/0")
    assert found(ledger(), look, ledger(one)) == [(Fault.ORPHAN_RUNNER, "j1.2/0")]


def test_a_running_attempt_without_one_of_its_runners_is_lost() -> None:
    one = attempt()
    finding = only(ledger(one), replace(ray(one), runners=frozenset({"j1.1/0"})))
    assert (finding.kind, finding.evidence["bundles"]) == (Fault.DEAD_RUNNER, [1])
    assert isinstance(finding.repair, LoseAttempt)


def test_runners_that_still_start_are_not_missed() -> None:
    one = attempt(phase=Phase.STARTING)
    assert found(ledger(one), replace(ray(one), runners=frozenset())) == []


# --- charges and nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [-UNIT, +UNIT])
def test_charges_that_differ_from_what_the_groups_hold_are_reported(off: int) -> None:
    one, moving = attempt(), attempt("j2", Phase.RELEASING, nodes=(A,))
    books = ledger(one, moving)
    nodes = {**books.nodes, A: replace(books.nodes[A], charged_units=4 * UNIT + off)}
    finding = only(replace(books, nodes=nodes), ray(one))
    assert (finding.kind, finding.what, finding.repair) == (Fault.CHARGES, "a", None)
    assert (finding.evidence["charged_gpus"], finding.evidence["held_gpus"]) == (2 + off / UNIT, 2)


def test_a_group_that_holds_less_than_planned_on_the_right_nodes_is_reported() -> None:
    one = attempt()
    look = ray(one, groups={"g-j1": RayGroup("j1.1", "CREATED", (A, B))})
    nodes = {**look.nodes, B: replace(look.nodes[B], groups={"g-j1": UNIT})}
    assert found(ledger(one), replace(look, nodes=nodes)) == [(Fault.CHARGES, "b")]


def test_nodes_that_one_side_does_not_know_are_reported() -> None:
    assert found(ledger(nodes=(A,)), ray()) == [(Fault.NODE, "b bbbbbbbb")]
    assert found(ledger(), ray(nodes=(A,))) == [(Fault.NODE, "b bbbbbbbb")]
    assert found(ledger(nodes=(A,)), ray(), ledger()) == [], "it joined meanwhile"
    assert found(ledger(), ray(nodes=(A,)), ledger(nodes=(A,))) == [], "it left meanwhile"
    assert found(ledger(), replace(ray(nodes=(A,)), unheard=frozenset({B}))) == [], "it has not reported yet"
    look = ray()
    smaller = {**look.nodes, A: replace(look.nodes[A], gpu_units=4 * UNIT)}
    assert found(ledger(), replace(look, nodes=smaller)) == [(Fault.NODE, "a aaaaaaaa")]


# --- two looks -----------------------------------------------------------------------------------------------


def test_a_finding_counts_when_two_looks_in_a_row_make_it() -> None:
    one, two = Finding(Fault.DEAD_RUNNER, "j1.1", "", {}), Finding(Fault.DEAD_RUNNER, "j2.1", "", {})
    assert confirmed([one], [two]) == []
    assert confirmed([one, two], [replace(two, message="other words")]) == [
        replace(two, message="other words")
    ]
    charges = Finding(Fault.CHARGES, "a", "2 where 3", {})
    assert confirmed([charges], [replace(charges, message="5 where 4")]) == [], "other jobs come and go"
    assert confirmed([charges], [charges]) == [charges]


# --- GPUs ----------------------------------------------------------------------------------------------------

MINE = {"k-j1.1-0"}
GIB = 2**30


def node(gpus: int = 4, free: float = 4, **groups: int) -> RayNode:
    return RayNode("a", gpus * UNIT, round(free * UNIT), groups)


def process(gpu: int, owner: str = "", memory: int = 2 * GIB, pid: int = 7) -> GpuProcess:
    return GpuProcess(gpu, pid, "python", memory, owner, "ada")


def test_a_stray_on_an_idle_node_is_reported_with_pid_and_name() -> None:
    (finding,) = gpus_in_use(A, node(), [process(3)], MINE)
    assert (finding.kind, finding.what, finding.repair) == (
        Fault.GPU_IN_USE,
        "a GPU 3 pid 7",
        KeepFromUse(A, (3,)),
    )
    assert (finding.evidence["pid"], finding.evidence["name"], finding.evidence["user"]) == (
        7,
        "python",
        "ada",
    )
    assert "process 7 (python) of ada holds 2048 MiB" in finding.message


def test_what_an_ended_attempt_left_behind_is_a_stray() -> None:
    (finding,) = gpus_in_use(A, node(), [process(0, "k-j0.1-0")], MINE)
    assert finding.evidence["left_by"] == "k-j0.1-0"


def test_small_contexts_and_rightful_processes_are_none() -> None:
    rightful = [process(0, "k-j1.1-0"), process(1, RAY), process(2, "", memory=499 * 2**20)]
    assert gpus_in_use(A, node(free=2, mine=UNIT, theirs=UNIT), rightful, MINE) == []


def test_a_stray_counts_only_beyond_the_devices_that_ray_may_have_given_away() -> None:
    given = node(free=3, mine=UNIT)
    assert gpus_in_use(A, given, [process(0)], MINE) == [], "it may well be the device that was given"
    both = gpus_in_use(A, given, [process(0), process(1)], MINE)
    assert len(both) == 2
    assert "at least 1 of GPUs 0, 1" in both[0].message
    assert {each.repair for each in both} == {KeepFromUse(A, (0, 1))}, "which of them is free is found out"
    assert len(gpus_in_use(A, given, [process(0, "k-j1.1-0"), process(1)], MINE)) == 1, (
        "the given one is known"
    )
    assert gpus_in_use(A, node(free=0, mine=4 * UNIT), [process(0)], MINE) == []


def test_shares_of_devices_may_lie_on_any() -> None:
    assert gpus_in_use(A, node(free=3.5, mine=UNIT // 2), [process(0), process(1)], MINE) == []
    assert gpus_in_use(A, node(free=3.5, mine=UNIT // 2), [process(0), process(1), process(2)], MINE)
    assert gpus_in_use(A, node(free=3), [process(0)], MINE) == [], "a stranger's actor without a group"


def test_what_an_ended_attempt_of_ours_has_on_any_gpu_is_to_be_ended() -> None:
    processes = [
        process(0, "k-j1.1-0", pid=1),
        process(0, "k-j0.1-0", pid=2, memory=1),
        process(1, "other-j0.1-0", pid=3),
        process(2, RAY, pid=4),
        process(3, pid=5),
    ]
    (finding,) = left_behind(A, node(free=0, mine=4 * UNIT), processes, MINE, "k")
    assert (finding.kind, finding.what) == (Fault.LEFT_BEHIND, "a pid 2")
    assert finding.repair == EndProcesses(A, "k-j0.1-0")
    assert left_behind(A, node(), processes, {"k-j0.1-0", *MINE}, "k") == []


def test_a_gpu_in_quarantine_is_in_use_as_long_as_its_stray_is_there() -> None:
    strays = [process(1), process(2, pid=8), process(3, RAY, pid=9), process(1, pid=10, memory=GIB // 4)]
    (finding,) = still_in_use(A, node(free=3), strays, MINE, {1, 3})
    assert (finding.what, finding.repair) == ("a GPU 1 pid 7", KeepFromUse(A, (1,)))
    # What is kept from use is neither free nor given away: the stray on GPU 2 is found beside it.
    rest = without_kept(node(free=3), 1)
    (other,) = gpus_in_use(A, rest, [each for each in strays if each.gpu != 1], MINE)
    assert other.what == "a GPU 2 pid 8"
    assert gpus_in_use(A, rest, [], MINE) == []
