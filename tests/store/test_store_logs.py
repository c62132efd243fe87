"""Logs: every byte once, in order; what is missing is said to be."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm import holes
from rm.store import FileStore, LogChunk, LogFile

LOG = ("j1", 1, 0, "out")
LIMIT = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> FileStore:
    return FileStore(root, LIMIT)


def kept(store: FileStore) -> bytes:
    """The log as a reader gets it, in small pieces."""
    offset, pieces = 0, []
    while (chunk := store.read_log(*LOG, offset, 7)).data:
        pieces.append(chunk.data)
        offset = chunk.next_offset
    return b"".join(pieces)


def kept_in_large_pieces(store: FileStore) -> bytes:
    offset, pieces = 0, []
    while (chunk := store.read_log(*LOG, offset, 2**20)).data:
        pieces.append(chunk.data)
        offset = chunk.next_offset
    return b"".join(pieces)


def closed(store: FileStore) -> bool:
    return store.read_log(*LOG, 0, 1).closed


def position_path(root: Path) -> Path:
    return root / "logs" / "j1" / "1" / "0.out.json"


def log_path(root: Path) -> Path:
    return root / "logs" / "j1" / "1" / "0.out"


# --- every byte once ---------------------------------------------------------------------------------------


def test_batches_follow_each_other(store: FileStore) -> None:
    assert store.append_log(*LOG, 0, b"one\n") == 4
    assert store.append_log(*LOG, 4, b"two\n") == 8
    assert kept(store) == b"one\ntwo\n"


def test_a_batch_that_comes_again_changes_nothing(store: FileStore) -> None:
    store.append_log(*LOG, 0, b"one\n")
    store.append_log(*LOG, 4, b"two\n")
    assert store.append_log(*LOG, 0, b"one\n") == 8
    assert store.append_log(*LOG, 4, b"two\n") == 8
    assert store.append_log(*LOG, 8, b"") == 8
    assert kept(store) == b"one\ntwo\n"


def test_a_batch_that_comes_again_with_more_adds_only_that(store: FileStore) -> None:
    store.append_log(*LOG, 0, b"one\n")
    assert store.append_log(*LOG, 0, b"one\ntwo\n") == 8
    assert kept(store) == b"one\ntwo\n"


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 60), st.integers(-20, 60)), max_size=12))
def test_however_a_sender_repeats_itself_the_log_is_what_was_printed(
    printed: bytes, batches: list[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        sent = 0
        for back, ahead in [*batches, (len(printed), len(printed))]:
            begin, end = max(0, sent - back), max(0, sent + ahead)
            # A new store each time: nothing is remembered outside the files.
            sent = FileStore(Path(directory), LIMIT).append_log(*LOG, begin, printed[begin:end])
        assert kept(FileStore(Path(directory), LIMIT)) == printed


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=60)), max_size=12),
    st.integers(20, 400),
)
def test_whatever_is_lost_or_too_much_is_said_to_be(batches: list[tuple[int, bytes]], limit: int) -> None:
    """Batches with gaps before them, each sent twice: kept, lost and dropped bytes add up to what was printed."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(holes, "works", lambda _: False)
        store = FileStore(Path(directory), limit)
        offset = 0
        for gap, printed in batches:
            data = printed.replace(b"[", b"(")
            offset += gap
            for _ in range(2):
                assert store.append_log(*LOG, offset, data) == offset + len(data)
            offset += len(data)
        store.close_log(*LOG)
        store.close_log(*LOG)
        log = FileStore(Path(directory), limit).read_log(*LOG, 0, 10**6)
        assert log.closed
        lost = sum(map(int, re.findall(rb"\[rm: (\d+) bytes of output were lost here\]\n", log.data)))
        dropped = re.findall(rb"\[rm: (\d+) bytes more were printed and not kept: [^\n]*\]\n\Z", log.data)
        own = re.sub(rb"\[rm: [^\n]*\]\n", b"", log.data)
        newlines = len(re.findall(rb"\n\[rm:", log.data))  # ours, or the output's own
        assert 0 <= len(own) + lost + sum(map(int, dropped)) - offset <= newlines
        assert len(log.data) <= limit + 200


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(min_size=1, max_size=90), max_size=30), st.integers(20, 400))
def test_of_a_long_log_the_beginning_and_the_end_are_kept(batches: list[bytes], limit: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        printed = b""
        for batch in batches:
            data = batch.replace(b"[", b"(")
            for _ in range(2):
                # A new store each time: nothing is remembered outside the files.
                FileStore(Path(directory), limit).append_log(*LOG, len(printed), data)
            printed += data
        store = FileStore(Path(directory), limit)
        log = kept(store)
        if len(printed) <= limit:
            assert log == printed
            return
        note = re.search(rb"\n?\[rm: (\d+) bytes of output were cut out here: [^\n]*\]\n", log)
        if note is None:
            assert log == printed, "what is cut is said"
            assert len(log) <= limit + limit // 16, "it is cut soon"
            return
        head, cut, tail = log[: note.start()], int(note[1]), log[note.end() :]
        assert len(head) in (limit // 2, limit // 2 - 1), "a newline at its end is the note's"
        assert printed.startswith(head)
        assert printed.endswith(tail)
        assert limit // 2 + cut + len(tail) == len(printed)
        assert limit - limit // 2 <= len(tail) <= limit - limit // 2 + limit // 16
        (listed,) = store.logs("j1")
        assert listed.size == limit // 2 + len(tail)


# --- gaps --------------------------------------------------------------------------------------------------


def test_a_gap_is_marked(store: FileStore) -> None:
    store.append_log(*LOG, 0, b"one\ntw")
    assert store.append_log(*LOG, 100, b"three\n") == 106
    assert store.append_log(*LOG, 106, b"four\n") == 111
    assert kept(store) == b"one\ntw\n[rm: 94 bytes of output were lost here]\nthree\nfour\n"


def test_a_gap_at_the_very_beginning(store: FileStore) -> None:
    store.append_log(*LOG, 10, b"two\n")
    assert kept(store) == b"[rm: 10 bytes of output were lost here]\ntwo\n"


def test_batches_after_a_gap_may_come_again_too(store: FileStore, root: Path) -> None:
    store.append_log(*LOG, 0, b"one\n")
    store.append_log(*LOG, 100, b"three\n")
    before = kept(store)
    again = FileStore(root, LIMIT)
    assert again.append_log(*LOG, 100, b"three\n") == 106
    assert again.append_log(*LOG, 0, b"one\n") == 106
    assert again.append_log(*LOG, 4, b"two\n") == 106  # too late: the gap is marked
    assert kept(again) == before
    assert again.append_log(*LOG, 103, b"ee\nfour\n") == 111
    assert kept(again) == before + b"four\n"


def test_a_crash_right_before_a_gap_is_marked(store: FileStore, root: Path) -> None:
    store.append_log(*LOG, 0, b"one\n")
    store.append_log(*LOG, 100, b"three\n")
    os.truncate(log_path(root), 4)  # the position was written, the line was not
    assert store.append_log(*LOG, 100, b"three\n") == 106
    assert kept(store) == b"one\n[rm: output was lost here in a crash]\nthree\n"
    assert store.append_log(*LOG, 106, b"four\n") == 111
    assert kept(store).endswith(b"\nthree\nfour\n")


def test_the_end_of_a_file_that_a_crash_took_along_is_a_gap(store: FileStore, root: Path) -> None:
    store.append_log(*LOG, 0, b"one\ntwo\n")
    os.truncate(log_path(root), 4)
    assert store.append_log(*LOG, 8, b"three\n") == 14
    assert kept(store) == b"one\n[rm: 4 bytes of output were lost here]\nthree\n"


def test_a_position_that_a_crash_cut_off_is_done_without(store: FileStore, root: Path) -> None:
    store.append_log(*LOG, 0, b"one\n")
    position_path(root).write_bytes(b"")
    assert store.append_log(*LOG, 4, b"two\n") == 8
    assert kept(store) == b"one\ntwo\n"


# --- the limit ---------------------------------------------------------------------------------------------


def test_what_is_cut_out_takes_no_space(root: Path) -> None:
    limit = 2**20
    store = FileStore(root, limit)
    batch = b"x" * 1023 + b"\n"
    for number in range(16):
        store.append_log(*LOG, number * limit, batch * 1024)
    store.append_log(*LOG, 16 * limit, b"the last line\n")
    on_disk = log_path(root).stat().st_blocks * 512
    assert on_disk <= limit + limit // 16 + 3 * 4096, "head, tail and what waits to be cut"
    text = kept_in_large_pieces(store)
    assert text.endswith(b"the last line\n")
    assert b"bytes of output were cut out here" in text
    assert b"\0" not in text, "no hole is ever read"


def test_a_reader_in_the_midst_of_a_log_that_is_being_cut_gets_no_zeros(root: Path) -> None:
    limit = 64 * 1024
    store = FileStore(root, limit)
    over = threading.Event()

    def write() -> None:
        for number in range(400):
            store.append_log(*LOG, number * 8192, b"y" * 8191 + b"\n")
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    offset = 0
    while True:
        done = over.is_set()
        chunk = store.read_log(*LOG, offset, 16 * 1024)
        assert b"\0" not in chunk.data
        offset = chunk.next_offset
        if done and not chunk.data:
            break
    writer.join()


def test_without_holes_output_beyond_the_limit_is_counted_and_not_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes, "works", lambda _: False)
    store = FileStore(root, LIMIT)
    assert store.append_log(*LOG, 0, b"x" * 999) == 999
    assert store.append_log(*LOG, 999, b"yz\n") == 1002
    assert store.append_log(*LOG, 999, b"yz\n") == 1002
    assert FileStore(root, LIMIT).append_log(*LOG, 1002, b"a" * 500) == 1502
    assert store.append_log(*LOG, 2000, b"b" * 100) == 2100
    assert kept(store) == b"x" * 999 + b"y"
    store.close_log(*LOG)
    last = "1100 bytes more were printed and not kept: a log keeps 1000 bytes (RM_MAX_LOG_BYTES)"
    assert kept(store) == b"x" * 999 + f"y\n[rm: {last}]\n".encode()


def test_a_log_that_just_fills_its_limit_lacks_nothing(store: FileStore) -> None:
    store.append_log(*LOG, 0, b"x" * LIMIT)
    store.close_log(*LOG)
    assert kept(store) == b"x" * LIMIT


def test_gaps_without_end_stay_within_the_limit(store: FileStore) -> None:
    for offset in range(1, 400, 2):
        store.append_log(*LOG, offset, b"x")
    store.close_log(*LOG)
    assert len(kept(store)) < LIMIT + LIMIT // 16 + 300


# --- the end -----------------------------------------------------------------------------------------------


def test_a_closed_log_says_so_and_stays_as_it_is(store: FileStore, root: Path) -> None:
    store.append_log(*LOG, 0, b"one\n")
    assert not closed(store)
    store.close_log(*LOG)
    store.close_log(*LOG)
    assert closed(store)
    assert store.append_log(*LOG, 4, b"two\n") == 8
    assert kept(FileStore(root, LIMIT)) == b"one\n"


def test_a_rank_that_printed_nothing_has_an_empty_log(store: FileStore) -> None:
    assert store.read_log(*LOG, 0, 10) == LogChunk(b"", 0, closed=False)
    store.close_log(*LOG)
    assert store.read_log(*LOG, 0, 10) == LogChunk(b"", 0, closed=True)
    assert store.logs("j1") == [LogFile(1, 0, "out", 0, closed=True)]


def test_reading_goes_on_where_it_stopped(store: FileStore) -> None:
    store.append_log(*LOG, 0, b"one\ntwo\n")
    assert store.read_log(*LOG, 0, 5) == LogChunk(b"one\nt", 5, closed=False)
    assert store.read_log(*LOG, 5, 2**62) == LogChunk(b"wo\n", 8, closed=False)
    assert store.read_log(*LOG, 8, 5) == LogChunk(b"", 8, closed=False)
    assert store.read_log(*LOG, 2**62, 5) == LogChunk(b"", 2**62, closed=False)


def test_logs_are_listed_in_order(store: FileStore) -> None:
    assert store.logs("j1") == []
    for attempt, rank, stream in [(2, 0, "out"), (1, 10, "err"), (1, 2, "out"), (1, 2, "err")]:
        store.append_log("j1", attempt, rank, stream, 0, b"x" * (rank + 1))
    store.append_log("j1", 1, 2, "out", 50, b"after a gap\n")
    store.close_log("j1", 1, 10, "err")
    store.append_log("j11", 1, 0, "out", 0, b"another job's\n")
    found = store.logs("j1")
    assert [(each.attempt, each.rank, each.stream) for each in found] == [
        (1, 2, "err"),
        (1, 2, "out"),
        (1, 10, "err"),
        (2, 0, "out"),
    ]
    assert [each.closed for each in found] == [False, False, True, False]
    assert [each.size for each in found] == [
        3,
        len("xxx\n[rm: 47 bytes of output were lost here]\nafter a gap\n"),
        11,
        1,
    ]


# --- at the same time --------------------------------------------------------------------------------------


def test_the_same_batches_sent_by_several_threads(root: Path) -> None:
    store = FileStore(root, 10**6)
    lines = [b"line %d\n" % i for i in range(300)]

    def send() -> None:
        offset = 0
        for line in lines:
            store.append_log(*LOG, offset, line)
            offset += len(line)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read_log(*LOG, 0, 10**6).data == b"".join(lines)


def test_a_reader_that_sees_the_end_has_everything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holes, "works", lambda _: False)
    for _ in range(50):
        store = FileStore(root, 100)
        log = ("j1", _, 0, "out")

        def write(store: FileStore = store, log: tuple[str, int, int, str] = log) -> None:
            store.append_log(*log, 0, b"x" * 150)
            store.close_log(*log)

        writer = threading.Thread(target=write)
        writer.start()
        offset, seen = 0, b""
        while True:
            chunk = store.read_log(*log, offset, 64)
            seen, offset = seen + chunk.data, chunk.next_offset
            if chunk.closed and not chunk.data:
                break
        writer.join()
        assert seen.endswith(b"[rm: 50 bytes more were printed and not kept: "
                             b"a log keeps 100 bytes (RM_MAX_LOG_BYTES)]\n")  # fmt: skip


def test_a_full_disk_costs_nothing_that_is_sent_again(root: Path, run_child: Callable[..., str]) -> None:
    run_child(
        """
import resource, sys
from pathlib import Path
from rm.store import FileStore
store = FileStore(Path(sys.argv[1]), 2**20)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
data = bytes(range(200)) * 500
for _ in range(3):
    try:
        store.append_log("j1", 1, 0, "out", 0, data)
    except OSError:
        pass
    else:
        raise AssertionError("there was no room")
resource.setrlimit(resource.RLIMIT_FSIZE, before)
assert store.append_log("j1", 1, 0, "out", 0, data) == len(data)
assert store.read_log("j1", 1, 0, "out", 0, 2**20).data == data
""",
        str(root),
    )


def test_one_end_that_can_not_be_written_keeps_none_of_the_others(store: FileStore, root: Path) -> None:
    (root / "logs").mkdir()
    (root / "logs" / "j1").write_text("in the way")
    ends = [(job, 1, [(0, "out", 0, b"one\n")]) for job in ("j1", "j2")]
    failed = store.end_all_logs(ends)
    assert list(failed) == [0]
    assert "j1" in failed[0]
    assert store.read_log("j2", 1, 0, "out", 0, 100) == LogChunk(b"one\n", 4, True)
