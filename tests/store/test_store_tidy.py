"""What the store is rid of, and what stays whatever its age."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rm.store import BLOB_IDLE_S, TOUCHED_S, FileStore

NOW = time.time()
DAY_S = 86_400.0
PLENTY = 2**40
KIB_64 = b"x" * 65_536


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> FileStore:
    return FileStore(root, 2**20)


def add(store: FileStore, root: Path, job_id: str, age_s: float) -> None:
    """A job with 64 KiB of output and as large a result, written so long ago."""
    store.append_log(job_id, 1, 0, "out", 0, KIB_64)
    store.close_log(job_id, 1, 0, "out")
    store.put_result(job_id, 1, KIB_64)
    for kind in ("logs", "results"):
        for path in (root / kind / job_id, *(root / kind / job_id).rglob("*")):
            os.utime(path, (NOW - age_s, NOW - age_s))


def there(root: Path) -> set[str]:
    return {path.name for kind in ("logs", "results") for path in (root / kind).iterdir()}


def test_what_is_old_goes_and_what_lives_stays(store: FileStore, root: Path) -> None:
    add(store, root, "old", 31 * DAY_S)
    add(store, root, "alive", 31 * DAY_S)
    add(store, root, "young", 29 * DAY_S)
    tidied = store.tidy({"alive"}, set(), NOW, 30 * DAY_S, PLENTY)
    assert there(root) == {"alive", "young"}
    assert (tidied.jobs, tidied.blobs) == (1, 0)
    assert 2 * 65_536 <= tidied.freed_bytes < 2 * 65_536 + 10 * 4096
    again = store.tidy({"alive"}, set(), NOW, 30 * DAY_S, PLENTY)
    assert (again.jobs, again.freed_bytes, again.kept_bytes) == (0, 0, tidied.kept_bytes)
    assert store.logs("old") == []
    assert store.get_result("old") is None
    assert store.get_result("young") == KIB_64


def test_where_all_takes_too_much_the_oldest_go_first(store: FileStore, root: Path) -> None:
    for number in range(1, 6):
        add(store, root, f"j{number}", (10 - number) * DAY_S)
    whole = store.tidy(set(), set(), NOW, 30 * DAY_S, PLENTY).kept_bytes
    tidied = store.tidy({"j1"}, set(), NOW, 30 * DAY_S, whole * 7 // 10)
    assert there(root) == {"j1", "j4", "j5"}, "j2 and j3 are the oldest that may go"
    assert tidied.kept_bytes <= whole * 7 // 10


def test_what_was_written_within_the_hour_stays_however_much_it_is(store: FileStore, root: Path) -> None:
    add(store, root, "new", TOUCHED_S - 1)
    add(store, root, "less-new", TOUCHED_S + 1)
    assert store.tidy(set(), set(), NOW, 30 * DAY_S, 1).jobs == 1
    assert there(root) == {"new"}


def test_one_file_that_is_written_keeps_the_whole_job(store: FileStore, root: Path) -> None:
    add(store, root, "j1", 31 * DAY_S)
    os.utime(root / "logs" / "j1" / "1" / "0.out", (NOW - DAY_S, NOW - DAY_S))
    assert store.tidy(set(), set(), NOW, 30 * DAY_S, PLENTY).jobs == 0


def dated(store: FileStore, root: Path, data: bytes, age_s: float) -> str:
    digest = store.put_blob(data)
    os.utime(root / "blobs" / digest[:2] / digest, (NOW - age_s, NOW - age_s))
    return digest


def test_blobs_go_a_week_after_the_last_job_that_needs_them(store: FileStore, root: Path) -> None:
    needed = dated(store, root, b"needed", BLOB_IDLE_S + 1)
    idle = dated(store, root, b"idle", BLOB_IDLE_S + 1)
    young = dated(store, root, b"young", BLOB_IDLE_S - 1)
    tidied = store.tidy(set(), {needed}, NOW, 30 * DAY_S, PLENTY)
    assert (tidied.jobs, tidied.blobs) == (0, 1)
    assert store.has_blobs([needed, idle, young]) == {needed, young}
    assert store.tidy(set(), set(), NOW, 30 * DAY_S, 1).blobs == 0, "they were asked for: somebody submits"


def test_a_submission_that_asks_for_a_blob_or_brings_it_again_keeps_it(store: FileStore, root: Path) -> None:
    asked = dated(store, root, b"asked", BLOB_IDLE_S + 1)
    brought = dated(store, root, b"brought", BLOB_IDLE_S + 1)
    store.has_blobs([asked])
    store.put_blob(b"brought")
    assert store.tidy(set(), set(), NOW, 30 * DAY_S, PLENTY).blobs == 0
    assert store.get_blob(asked) == b"asked"
    assert store.get_blob(brought) == b"brought"


def test_an_empty_store_has_nothing_to_tidy(store: FileStore) -> None:
    tidied = store.tidy(set(), set(), NOW, 30 * DAY_S, PLENTY)
    assert (tidied.jobs, tidied.blobs, tidied.freed_bytes, tidied.kept_bytes) == (0, 0, 0, 0)
