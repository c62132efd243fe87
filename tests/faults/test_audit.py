"""The audit of a busy cluster: what somebody else breaks is found and mended, what is healthy is left alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from probes import cold_groups, wait_until

pytestmark = pytest.mark.ray


def group_named(name: str) -> Any:
    """A handle of the group, as anybody on the cluster can have one."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table

    (entry,) = [
        each
        for each in placement_group_table().values()
        if each["name"] == name and each["state"] != "REMOVED"
    ]
    return PlacementGroup(PlacementGroupID(bytes.fromhex(entry["placement_group_id"])))


def made(name: str, gpus: int = 1) -> Any:
    import ray
    from ray.util.placement_group import placement_group

    group = placement_group([{"GPU": gpus}], name=name, lifetime="detached")
    ray.get(group.ready(), timeout=30)
    return group


def charged(client: Any) -> float:
    return sum(node.charged_gpus for node in client.nodes())


def found_since(client: Any, began: float) -> dict[tuple[str, str], Any]:
    """What audits have found since, whether they were asked for or not: by kind and the first word of `what`."""
    recent = client.audit().recent
    return {(each.kind, each.what.split()[0]): each for each in recent if each.at > began}


def test_a_job_whose_group_somebody_removes_is_tried_again(client, tmp_path: Path) -> None:
    from ray.util import remove_placement_group

    job = client.submit("[ $RM_ATTEMPT = $RM_JOB_ID.2 ] || sleep 1000", nodes=2, gpus_per_node=4)
    wait_until(lambda: job.status == "RUNNING", what="it runs")
    remove_placement_group(group_named(f"rm/{client.ledger_key}/{job.view().stand}"))
    audit = client.audit()
    assert all(each.repaired for each in audit.findings), audit
    view = job.wait(120)
    assert (view.status, view.attempts, view.infra_failures) == ("SUCCEEDED", 2, 1), "lost once"
    wait_until(lambda: charged(client) == 0, 20, "nothing is charged")
    assert client.audit().findings == ()


def test_a_lease_whose_group_somebody_removes_is_lost(client) -> None:
    """Nothing of ours runs in it: without the audit nobody would ever know."""
    from ray.util import remove_placement_group

    from rm.errors import LeaseLost

    with client.lease(num_gpus=2) as lease:
        job_id, began = lease.job.id, time.time()
        remove_placement_group(group_named(f"rm/{client.ledger_key}/{client.job(job_id).view().stand}"))
        (found,) = wait_until(lambda: found_since(client, began).items(), 30, "it is found")
        finding = found[1]
        assert (finding.kind, finding.what, finding.repaired) == ("lost_group", f"{job_id}.1", True)
        assert finding.evidence["state"] == "REMOVED"
        assert finding in client.audit(look=False).recent
        wait_until(lambda: client.job(job_id).status == "FAILED", 20, "the lease has ended")
        with pytest.raises(LeaseLost):
            lease.options()
    assert charged(client) == 0
    assert any(
        event.kind == "RunLost" and event.job_id == job_id for event in client.events(limit=100_000)
    ), "it went through the ledger"


def test_the_allocator_audits_itself(client) -> None:
    began = time.time()
    made(f"rm/{client.ledger_key}/j999999.1")
    wait_until(
        lambda: [
            each
            for each in client.audit(look=False).recent
            if each.at > began and each.what.startswith("j999999.1") and each.repaired
        ],
        60,
        "found without being asked",
    )
    assert cold_groups(client) == []


def test_a_group_of_ours_that_nobody_owns_is_removed_and_a_strangers_is_not(client) -> None:
    import ray
    from ray.util import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=0)
    class Anybody:
        def here(self) -> bool:
            return True

    began = time.time()
    orphan = made(f"rm/{client.ledger_key}/j999999.1")
    theirs, others = made("theirs"), made("rm/another/j1.1")
    stray = Anybody.options(
        name=f"rm/{client.ledger_key}/j999999.1/0",
        namespace="rm",
        lifetime="detached",
        scheduling_strategy=PlacementGroupSchedulingStrategy(orphan, 0),
    ).remote()
    free = Anybody.options(
        name=f"rm/{client.ledger_key}/j999998.1/0", namespace="rm", lifetime="detached"
    ).remote()
    foreign = Anybody.options(name="rm/another/j1.1/0", namespace="rm", lifetime="detached").remote()
    try:
        ray.wait([each.here.remote() for each in (stray, free, foreign)], num_returns=3)
        expected = {("orphan_group", "j999999.1"), ("orphan_runner", "j999998.1/0")}
        wait_until(lambda: found_since(client, began).keys() >= expected, 30, "both are found")
        found = found_since(client, began)
        # With its group goes its runner: in time for an audit to see both, or not.
        assert found.keys() - {("orphan_runner", "j999999.1/0")} == expected
        assert all(each.repaired for each in found.values()), found
        assert cold_groups(client) == ["rm/another/j1.1"]
        group_named("theirs")
        assert ray.get(foreign.here.remote())
        assert client.audit().findings == ()
    finally:
        ray.kill(foreign)
        for group in (theirs, others):
            remove_placement_group(group)
        wait_until(lambda: sum(node.free_gpus for node in client.nodes()) == 24, 20, "all is free again")


def test_a_healthy_busy_cluster_has_no_findings(client) -> None:
    audits = []
    while len(audits) < 4:
        jobs = client.submit_many(["sleep 0.3"] * 10, num_gpus=8)
        while any(job.status != "SUCCEEDED" for job in jobs):
            audits.append(client.audit())
    assert [each.findings for each in audits] == [()] * len(audits)
    assert max(each.checked["groups"] for each in audits) > 0, "it saw them at work"
    assert audits[-1].checked["nodes"] == 3
