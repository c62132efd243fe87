"""Logs from a node's files to a real store: what is sent takes no space any more, what comes too fast is given up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rm.core.model import Kind
from rm.runtime import shipping
from rm.runtime.orders import RunOrder
from rm.runtime.processes import RankProcess
from rm.runtime.shipping import LogShipper
from rm.store import FileStore


class Direct:
    """A link to a store in this process."""

    def __init__(self, store: FileStore) -> None:
        self.store = store

    async def call(self, method: str, *args: Any, give_up_s: float = 0.0) -> Any:
        return getattr(self.store, method)(*args)


ORDER = RunOrder(
    job_id="j1", attempt=1, ledger_key="abc123", node_name="n", bundle=0, bundles=1, first_rank=0, local_world=1,
    world=1, master_address="", master_port=0, kind=Kind.COMMAND, command=("true",), payload_sha256="",
    working_dir_sha256="", cwd="", env={}, python="", cpus=0, checkpoint_dir="", grace_s=1.0,
)  # fmt: skip
LOG = (ORDER.archive_id, 1, 0, "out")


def shipper(tmp_path: Path, store: FileStore) -> tuple[LogShipper, Path]:
    out = tmp_path / "rank-0.out"
    process = RankProcess(
        rank=0, argv=("true",), env={}, cwd="/", stdout=str(out), stderr=str(tmp_path / "rank-0.err")
    )
    return LogShipper(Direct(store), ORDER, [process]), out  # type: ignore[arg-type]


def finish(ship: LogShipper, store: FileStore) -> None:
    end = asyncio.run(ship.finish())
    if end is not None:
        store.end_all_logs([end])


def whole(store: FileStore) -> bytes:
    offset, pieces = 0, []
    while (chunk := store.read_log(*LOG, offset, 2**20)).data:
        pieces.append(chunk.data)
        offset = chunk.next_offset
    assert chunk.closed
    return b"".join(pieces)


def test_what_was_sent_takes_no_space_on_the_node(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store", 2**30)
    ship, out = shipper(tmp_path, store)
    content = b"".join(b"%0127d\n" % number for number in range(200_000))
    out.write_bytes(content)
    assert asyncio.run(ship.finish()) is None
    assert whole(store) == content
    most = shipping.KEPT_BYTES + shipping.FORGET_BYTES + shipping.BATCH_BYTES
    assert out.stat().st_blocks * 512 <= most < len(content)
    assert out.read_bytes().endswith(content[-shipping.KEPT_BYTES :]), "the last lines explain a failure"


def test_of_a_backlog_the_older_half_is_given_up_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "BEHIND_MOST_BYTES", 1_000)
    monkeypatch.setattr(shipping, "BATCH_BYTES", 100)
    store = FileStore(tmp_path / "store", 2**30)
    ship, out = shipper(tmp_path, store)
    out.write_bytes(b"the first\n")
    asyncio.run(ship._pass())
    with out.open("ab") as file:
        file.write(b"x" * 5_000 + b"\nthe last\n")
    finish(ship, store)
    lost = 5_010 - 500
    rest = b"x" * 490 + b"\nthe last\n"
    assert whole(store) == b"the first\n[rm: %d bytes of output were lost here]\n" % lost + rest


def test_a_backlog_that_is_no_flood_is_sent_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "BEHIND_MOST_BYTES", 1_000)
    monkeypatch.setattr(shipping, "BATCH_BYTES", 100)
    store = FileStore(tmp_path / "store", 2**30)
    ship, out = shipper(tmp_path, store)
    out.write_bytes(b"x" * 999 + b"\n")
    finish(ship, store)
    assert whole(store) == b"x" * 999 + b"\n"


def test_a_short_end_is_handed_out_and_not_sent(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store", 2**30)
    ship, out = shipper(tmp_path, store)
    out.write_bytes(b"a line\n")
    end = asyncio.run(ship.finish())
    assert end == (ORDER.archive_id, 1, [(0, "out", 0, b"a line\n"), (0, "err", 0, b"")])
    assert store.logs(ORDER.archive_id) == []
    store.end_all_logs([end, end])
    assert whole(store) == b"a line\n", "twice is once"
