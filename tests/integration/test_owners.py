"""Whose job it is, on a real Ray: owners and admins may change it, others are refused, and what ends by itself ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from probes import wait_until

import rm
from rm.core.policy import Policy
from rm.errors import InvalidSpec, NotAllowed
from rm.job import Job

pytestmark = pytest.mark.ray

RULES = "admins: [carl]\n"


@pytest.fixture
def as_(ray_cluster, client) -> Iterator[Callable[[str], Any]]:
    """Clients of different people, with carl administering."""

    def connected(owner: str) -> Any:
        one = rm.connect(ray_cluster.address)
        one.owner = owner
        return one

    carl = connected("carl")
    answer = carl.apply(RULES)
    assert (answer["applied"], answer["warnings"]) == (True, [])
    try:
        yield connected
    finally:
        for job in carl.jobs():
            job.cancel()
        carl._allocator("apply_policy", Policy(), "", "carl")


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises(NotAllowed) as caught:
        act()
    assert type(caught.value) is NotAllowed, "our own error, not Ray's mixture of one"
    return str(caught.value)


def test_only_owner_and_admins_change_a_job(as_) -> None:
    ada, bob, carl = as_("ada"), as_("bob"), as_("carl")
    first, second = (ada.submit("sleep 1000", num_gpus=1, hold=True) for _ in range(2))
    theirs = bob.job(first.id)
    said = f"{first.id} belongs to ada; you are bob: ask ada, or an admin (carl)"
    assert refused(theirs.cancel) == refused(theirs.hold) == refused(theirs.release) == said
    view = theirs.view()
    assert (view.status, view.held, view.held_by) == ("QUEUED", True, "ada"), "reading is everybody's"
    kinds = [each.kind for each in theirs.events()]
    assert not {"StopRequested", "HoldChanged"} & set(kinds), "a refusal leaves no trace"
    assert not first.release().held
    assert first.cancel().id == first.id
    assert carl.job(second.id).cancel().status in ("CANCELLED", "STOPPING")
    assert second.wait(120).outcome["message"] == "cancelled by carl while it was queued"
    assert "belongs to ada" in refused(bob.job(second.id).cancel), "ended jobs are no exception"
    assert second.cancel().status == "CANCELLED"


def test_arrays_belong_to_somebody_too(as_) -> None:
    ada, bob = as_("ada"), as_("bob")
    array = ada.submit("sleep 1000", num_gpus=1, array=3, hold=True)
    for each in (array.id, f"{array.id}_1"):
        assert refused(bob.job(each).cancel).startswith(f"{each} belongs to ada")
        assert refused(bob.job(each).release).startswith(f"{each} belongs to ada")
    assert {job.last.status for job in array.jobs()} == {"QUEUED"}
    array.jobs()[1].cancel()
    array.cancel()
    assert array.wait(120).status == "CANCELLED"


def test_only_admins_apply_rules_and_stop_the_allocator(as_) -> None:
    bob, carl = as_("bob"), as_("carl")
    for force in (False, True):
        assert "only admins may apply rules; you are bob" in refused(
            lambda force=force: bob.apply("admins: [bob]", force=force)
        )
    assert "only admins may apply rules" in refused(
        lambda: bob._allocator("apply_policy", Policy(), "", "bob")
    )
    tried = bob.apply("admins: [bob]", dry_run=True)
    assert (tried["applied"], tried["warnings"]) == (
        False,
        ["admins: only carl may apply this; you are bob"],
    )
    for options in ({}, {"cancel_jobs": True}, {"keep_jobs": True}):
        assert "only admins may stop the allocator; you are bob" in refused(
            lambda options=options: bob.stop_allocator(**options)
        )
    node = carl.nodes()[0]
    for act, what in ((bob.cordon, "cordon"), (bob.drain, "cordon"), (bob.uncordon, "uncordon")):
        assert f"only admins may {what} nodes; you are bob" in refused(lambda act=act: act(node.id))
    assert carl.nodes()[0].status == "ready"
    assert bob.hello()["broken"] is None, "it goes on"
    assert bob.policy()["text"] == RULES
    with pytest.raises(InvalidSpec, match="admins: does not name you"):
        carl.apply("admins: [bob]")
    assert carl.policy()["policy"].admins == ("carl",)
    assert "--force" in carl.apply("admins: [bob]", dry_run=True)["warnings"][0]
    assert carl.apply("admins: [bob]", force=True)["applied"]
    refused(lambda: carl.apply(RULES))
    assert bob.apply(RULES, force=True)["applied"]


def test_without_admins_everybody_may_and_a_warning_says_so(client, as_) -> None:
    bob, carl = as_("bob"), as_("carl")
    job = as_("ada").submit("sleep 1000", num_gpus=1, hold=True)
    (warning,) = carl.apply("order: fair")["warnings"]
    assert warning.startswith("admins: names nobody, so everybody may")
    bob.job(job.id).cancel()
    assert job.wait(120).outcome["message"] == "cancelled by bob while it was queued"


def test_what_ends_by_itself_is_nobodys_wish(as_) -> None:
    ada = as_("ada")
    limited = ada.submit("sleep 1000", num_gpus=1, time_limit=0.5)
    silent = ada.lease(num_gpus=1, ttl=1)  # its holder speaks every 2 s
    assert limited.wait(120).status == "TIMED_OUT"
    assert silent.job.wait(120).status == "CANCELLED"
    assert "went away" in silent.job.last.outcome["message"]


def test_who_hands_in_as_somebody_goes_on_as_that_one(as_) -> None:
    """`owner=` of a lease or an attached job: its holder must be able to end it."""
    bob = as_("bob")
    with bob.lease(num_gpus=1, timeout=30, owner="team") as lease:
        assert lease.job.last.owner == "team"
    assert lease.job.status == "SUCCEEDED"
    job = bob.submit("sleep 1000", num_gpus=1, owner="team", attach=True)
    array = bob.submit("sleep 1000", num_gpus=1, owner="team", array=2)
    assert refused(bob.job(job.id).cancel).startswith(f"{job.id} belongs to team")
    job.cancel()
    array.jobs()[0].cancel()
    array.cancel()
    assert job.wait(120).status == "CANCELLED"


def test_the_rules_outlive_the_allocator(as_) -> None:
    bob = as_("bob")
    job = as_("ada").submit("sleep 1000", num_gpus=1, hold=True)
    pid = bob.hello()["pid"]
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    wait_until(lambda: bob.hello()["pid"] != pid, 60, "Ray restarts it")
    assert "belongs to ada" in refused(Job(bob, job.id).cancel)


def test_rmctl_says_it_in_one_line_and_exits_with_2(ray_cluster, as_) -> None:
    job = as_("ada").submit("sleep 1000", num_gpus=1, hold=True)

    def rmctl(*words: str, owner: str) -> subprocess.CompletedProcess[str]:
        code = f"import os, sys; os.environ['RM_OWNER'] = {owner!r}; from rm.cli import main; main()"
        command = [sys.executable, "-c", code, "--address", ray_cluster.address, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = rmctl("cancel", job.id, owner="bob")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {job.id} belongs to ada; you are bob: ask ada, or an admin (carl)\n"
    assert rmctl("cancel", "--wait", job.id, owner="ada").returncode == 0


@pytest.mark.parametrize("by", ["a\nb", "\x1b]0;x\x07", "a\u202eb", "x" * 201])
def test_who_calls_himself_something_odd_is_refused(client, by: str) -> None:
    job = client.submit("sleep 1000", num_gpus=1, hold=True)
    for method, options in (("cancel", {}), ("hold", {"held": False})):
        with pytest.raises(InvalidSpec, match="owner: must be at most 200 printable"):
            client._allocator(method, job.id, by, **options)
    with pytest.raises(InvalidSpec, match="owner: must be"):
        client._allocator("apply", "order: fair", by)
    with pytest.raises(InvalidSpec, match="owner: must be"):
        client._allocator("shutdown", cancel=True, by=by)
    assert job.view().held
