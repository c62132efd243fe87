"""What a gang's end is called when several of its bundles failed."""

from __future__ import annotations

from rm.core.gpu_errors import Xid
from rm.core.model import Kind, Outcome, Status
from rm.runtime.gangs import _outcome
from rm.runtime.orders import RunOrder, RunResult, Seat


def outcome(*results: RunResult) -> Outcome:
    seats = [Seat(f"n{number}", "10.0.0.1", 1, ("0",), "3.11") for number in range(len(results))]
    orders = [order(bundle, len(results)) for bundle in range(len(results))]
    return _outcome(list(results), seats, orders)


def order(bundle: int, world: int) -> RunOrder:
    return RunOrder(
        job_id="j1", attempt=1, ledger_key="k", node_name="n", bundle=bundle, bundles=world, first_rank=bundle,
        local_world=1, world=world, master_address="", master_port=1, kind=Kind.COMMAND, command=("true",),
        payload_sha256="", working_dir_sha256="", cwd="", env={}, python="", cpus=1.0, checkpoint_dir="", grace_s=1.0,
    )  # fmt: skip


def failed(
    rank: int, at: float, stopped: bool = False, lost: bool = False, xids: tuple[Xid, ...] = ()
) -> RunResult:
    return RunResult(
        ok=False,
        rank=rank,
        exit_code=1,
        message=f"rank {rank}",
        failed_at=at,
        stopped=stopped,
        lost=lost,
        xids=xids,
    )


def test_the_first_that_failed_by_itself_is_the_cause() -> None:
    found = outcome(failed(0, 1.0, stopped=True), failed(1, 3.0), failed(2, 2.0))
    assert (found.status, found.rank, found.node_id, found.infra) == (Status.FAILED, 2, "n2", False)


def test_a_rank_whose_gpu_broke_is_the_cause_though_others_gave_up_first() -> None:
    broken = failed(1, 9.0, lost=True, xids=(Xid("3", 79),))
    found = outcome(failed(0, 1.0), broken, failed(2, 2.0))
    assert (found.node_id, found.infra, found.message) == ("n1", True, "rank 1")


def test_an_error_of_the_program_does_not_make_a_rank_the_cause() -> None:
    found = outcome(failed(0, 1.0), failed(1, 2.0, xids=(Xid("3", 31),)))
    assert (found.node_id, found.infra) == ("n0", False)
