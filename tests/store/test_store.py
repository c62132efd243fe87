"""Blobs and results: whole or not there, under their own names only, and nobody else's to read."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rm.errors import InvalidSpec
from rm.store import FileStore

MIB = 2**20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "store"


@pytest.fixture
def store(root: Path) -> FileStore:
    return FileStore(root, MIB)


def files(root: Path) -> list[Path]:
    return [each for each in root.rglob("*") if each.is_file()]


# --- blobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"a function", os.urandom(3 * MIB)], ids=["empty", "small", "large"])
def test_a_blob_comes_back_by_its_content(store: FileStore, data: bytes) -> None:
    digest = store.put_blob(data)
    assert digest == hashlib.sha256(data).hexdigest()
    assert store.get_blob(digest) == data
    assert store.put_blob(data) == digest


def test_blobs_outlive_the_store(store: FileStore, root: Path) -> None:
    digest = store.put_blob(b"a function")
    assert FileStore(root, MIB).get_blob(digest) == b"a function"


def test_which_blobs_are_there(store: FileStore) -> None:
    kept = {store.put_blob(bytes([each])) for each in range(5)}
    absent = hashlib.sha256(b"never put").hexdigest()
    assert store.has_blobs([*kept, absent]) == kept
    assert store.has_blobs([]) == set()
    with pytest.raises(FileNotFoundError):
        store.get_blob(absent)


def test_a_blob_that_the_disk_changed_is_found_out_and_mended(store: FileStore, root: Path) -> None:
    digest = store.put_blob(b"a function")
    next(path for path in files(root) if path.name == digest).write_bytes(b"b function")
    with pytest.raises(OSError, match="damaged on disk"):
        store.get_blob(digest)
    assert store.has_blobs([digest]) == set()
    store.put_blob(b"a function")
    assert store.get_blob(digest) == b"a function"


def test_a_blob_that_was_cut_off_is_mended_by_the_next_upload(store: FileStore, root: Path) -> None:
    digest = store.put_blob(b"a function")
    next(path for path in files(root) if path.name == digest).write_bytes(b"a func")
    store.put_blob(b"a function")
    assert store.get_blob(digest) == b"a function"


def test_many_put_the_same_blob_at_once(store: FileStore, root: Path) -> None:
    data = os.urandom(MIB)
    threads = [threading.Thread(target=store.put_blob, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in files(root)] == [hashlib.sha256(data).hexdigest()]


def test_a_full_disk_leaves_no_half_blob(root: Path, run_child: Callable[..., str]) -> None:
    told = run_child(
        """
import resource, sys
from pathlib import Path
from rm.store import FileStore
store = FileStore(Path(sys.argv[1]), 2**20)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
for put in (lambda: store.put_blob(b"x" * 100_000), lambda: store.put_result("j1", 1, b"x" * 100_000)):
    try:
        put()
    except OSError as error:
        print(error.strerror)
print(sum(each.is_file() for each in Path(sys.argv[1]).rglob("*")), store.get_result("j1"))
resource.setrlimit(resource.RLIMIT_FSIZE, before)
store.get_blob(store.put_blob(b"x" * 100_000))
""",
        str(root),
    )
    assert told.splitlines() == ["File too large", "File too large", "0 None"]


def test_what_a_crash_left_half_written_is_cleared(store: FileStore, root: Path) -> None:
    digest = store.put_blob(b"a function")
    (root / "drafts" / "0123456789abcdef").write_bytes(b"half of a fu")
    again = FileStore(root, MIB)
    assert again.get_blob(digest) == b"a function"
    assert [path.name for path in files(root)] == [digest]


# --- results -----------------------------------------------------------------------------------------------


def test_the_result_of_the_last_attempt_counts(store: FileStore) -> None:
    assert store.get_result("j1") is None
    store.put_result("j1", 2, b"second")
    store.put_result("j1", 1, b"first, late")
    assert store.get_result("j1") == b"second"
    store.put_result("j1", 10, b"tenth")
    store.put_result("j1", 10, b"tenth")
    assert store.get_result("j1") == b"tenth"
    assert store.get_result("j2") is None


# --- names and rights --------------------------------------------------------------------------------------

BAD_IDS = [
    "",
    ".",
    "..",
    "../j1",
    "j1/../..",
    "/etc",
    "j1/",
    "j1\0",
    "j1\n",
    "J1",
    "j.1",
    "j1" * 40,
    "jé",
    None,
    7,
]


@pytest.mark.parametrize("job_id", BAD_IDS, ids=repr)
def test_no_job_id_leads_out_of_the_root(store: FileStore, root: Path, job_id: str) -> None:
    calls = [
        lambda: store.append_log(job_id, 1, 0, "out", 0, b"x"),
        lambda: store.read_log(job_id, 1, 0, "out", 0, 1),
        lambda: store.close_log(job_id, 1, 0, "out"),
        lambda: store.logs(job_id),
        lambda: store.put_result(job_id, 1, b"x"),
        lambda: store.get_result(job_id),
    ]
    for call in calls:
        with pytest.raises(InvalidSpec, match="job_id"):
            call()
    assert files(root.parent) == []


@pytest.mark.parametrize("stream", ["", "..", "../out", "out/x", "out.json", "OUT", "o\0", "out\n", None])
def test_no_stream_leads_out_of_the_root(store: FileStore, root: Path, stream: str) -> None:
    for call in (
        lambda: store.append_log("j1", 1, 0, stream, 0, b"x"),
        lambda: store.read_log("j1", 1, 0, stream, 0, 1),
        lambda: store.close_log("j1", 1, 0, stream),
    ):
        with pytest.raises(InvalidSpec, match="stream"):
            call()
    assert files(root) == []


@pytest.mark.parametrize("number", [-1, 10**10, 1.0, True, "1", "../1", None], ids=repr)
def test_numbers_are_numbers(store: FileStore, root: Path, number: int) -> None:
    for call in (
        lambda: store.append_log("j1", number, 0, "out", 0, b"x"),
        lambda: store.append_log("j1", 1, number, "out", 0, b"x"),
        lambda: store.put_result("j1", number, b"x"),
    ):
        with pytest.raises(InvalidSpec):
            call()
    assert files(root) == []


@pytest.mark.parametrize(
    "digest", ["", "..", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "../" + "0" * 61, None]
)
def test_no_digest_leads_out_of_the_root(store: FileStore, digest: str) -> None:
    for call in (lambda: store.get_blob(digest), lambda: store.has_blobs([digest])):
        with pytest.raises(InvalidSpec, match="sha256"):
            call()


def test_only_the_owner_may_read(store: FileStore, root: Path) -> None:
    before = os.umask(0)
    try:
        store.put_blob(b"a function")
        store.put_result("j1", 1, b"a result")
        store.append_log("j1", 1, 0, "out", 0, b"a line\n")
        store.close_log("j1", 1, 0, "out")
    finally:
        os.umask(before)
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700), path


def test_no_file_stays_open(store: FileStore) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for rank in range(40):
        store.append_log("j1", 1, rank, "out", 0, b"a line\n")
        store.read_log("j1", 1, rank, "out", 0, 100)
        store.put_blob(bytes([rank]))
    assert count() == before
