"""The SQLite file: its rights, and what is left of it after crashes, full disks and other people's mistakes."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger_batches import admission, make_job, submission
from sqlalchemy import text

from rm.errors import LedgerUnavailable
from rm.ledger import Ledger

Open = Callable[[str], Ledger]
Child = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.sqlite"


@pytest.fixture
def filled(opened: Open, sqlite_url: str) -> str:
    """The URL of a closed ledger with 300 jobs."""
    ledger = opened(sqlite_url)
    for first in range(1, 300, 100):
        ledger.commit(submission(*range(first, first + 100)))
    ledger.close()
    return sqlite_url


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def test_only_the_owner_may_read_it(opened: Open, sqlite_url: str, path: Path) -> None:
    before = os.umask(0o022)
    try:
        ledger = opened(sqlite_url)
        ledger.commit(submission(1))
    finally:
        os.umask(before)
    assert mode(path.parent) == "0o700"
    assert [mode(each) for each in path.parent.iterdir()] == ["0o600"] * 3
    ledger.close()
    assert names(path.parent) == ["ledger.sqlite"]


def test_every_commit_is_forced_to_disk_and_no_reader_can_write(opened: Open, sqlite_url: str) -> None:
    ledger = opened(sqlite_url)
    with ledger._database.transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000
    with pytest.raises(LedgerUnavailable, match="readonly"), ledger._database.reading() as connection:
        connection.execute(text("DELETE FROM jobs"))


KILLED = """
import sys
from ledger_batches import admission, make_job, submission
from rm.ledger import Ledger
ledger = Ledger.open(sys.argv[1])
for seq in range(1, 100_000, 3):
    ledger.commit(submission(seq, seq + 1, seq + 2))
    ledger.commit(admission(make_job(seq)))
    print(seq + 2, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 30, 120])
def test_what_was_acknowledged_outlives_a_kill(
    opened: Open, sqlite_url: str, child: Child, acknowledged: int
) -> None:
    writer = child(KILLED, sqlite_url)
    assert writer.stdout is not None
    last = 0
    for _ in range(acknowledged):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    ledger = opened(sqlite_url)
    jobs = [each.job for each in ledger.jobs(limit=10**6, newest_first=False)]
    assert [job.seq for job in jobs] == list(range(1, len(jobs) + 1))
    assert len(jobs) >= last
    assert len(jobs) % 3 == 0  # no batch is there in part
    admissions = [each for each in ledger.events(limit=10**6) if each.kind == "JobAdmitted"]
    assert len(admissions) == sum(job.attempt is not None for job in jobs) >= last // 3
    assert ledger.count_events() == len(jobs) + len(admissions)
    ledger.commit(submission(ledger.load().next_seq))


FULL = """
import os, resource, sys
from ledger_batches import submission
from rm.errors import LedgerUnavailable
from rm.ledger import Ledger
ledger = Ledger.open(sys.argv[1])
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
done = 0
try:
    for seq in range(1, 10_000, 20):
        ledger.commit(submission(*range(seq, seq + 20)))
        done = seq + 19
except LedgerUnavailable as error:
    print(error)
assert len(ledger.load().jobs) == ledger.count_events() == done, "it is still read, and holds whole batches"
for _ in range(3):
    try:
        ledger.commit(submission(*range(done + 1, done + 200)))
    except LedgerUnavailable:
        pass
    else:
        raise AssertionError("there was no room")
resource.setrlimit(resource.RLIMIT_FSIZE, before)
ledger.commit(submission(*range(done + 1, done + 201)))
print(done + 200)
os._exit(0)
"""


def test_a_full_disk_is_an_error_until_there_is_room_again(
    opened: Open, sqlite_url: str, child: Child
) -> None:
    message, total = (child(FULL, sqlite_url).communicate(timeout=30)[0]).splitlines()
    assert "can't be written: disk I/O error; check that the disk of" in message
    ledger = opened(sqlite_url)
    assert [job.seq for job in ledger.load().jobs] == list(range(1, int(total) + 1))


def test_a_creation_that_fails_leaves_nothing_behind(sqlite_url: str, path: Path, child: Child) -> None:
    code = """
import resource, sys
from rm.errors import LedgerUnavailable
from rm.ledger import Ledger
before = resource.getrlimit(resource.RLIMIT_FSIZE)
import alembic.command, rm.ledger.sqlite
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
try:
    Ledger.open(sys.argv[1])
except LedgerUnavailable as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""
    told = child(code, sqlite_url).communicate(timeout=30)[0]
    assert "can't be created: disk I/O error" in told
    assert names(path.parent) == []


# --- files that are no ledger, or no longer ----------------------------------------------------------------


def refused(url: str, words: str) -> None:
    """Opening fails with these words and leaves every file as it was."""
    directory = Path(url.removeprefix("sqlite:///")).parent
    before = {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()}
    with pytest.raises(LedgerUnavailable, match=words):
        Ledger.open(url)
    assert {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()} == before


def test_a_file_that_is_no_database(sqlite_url: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text("Dear diary, this is no database.\n" * 100)
    refused(sqlite_url, "file is not a database")


def test_an_empty_file(sqlite_url: str, path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    refused(sqlite_url, "is empty")


def test_a_directory(sqlite_url: str, path: Path) -> None:
    path.mkdir(parents=True)
    refused(sqlite_url, "unable to open database file")


def test_a_database_without_tables(sqlite_url: str, path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE gone (id INTEGER)")
    connection.execute("DROP TABLE gone")
    connection.close()
    with pytest.raises(LedgerUnavailable, match="it holds no table"):
        Ledger.open(sqlite_url)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off(filled: str, path: Path, kept: float) -> None:
    os.truncate(path, int(path.stat().st_size * kept))
    refused(filled, "malformed|damaged")


def test_a_file_with_a_bad_header(filled: str, path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 100)
    refused(filled, "not a database")


def test_a_file_with_bad_pages(filled: str, path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(8192))
    refused(filled, "malformed|damaged")


def test_a_file_that_is_gone_while_its_log_is_still_there(filled: str, path: Path) -> None:
    wal = path.with_name("ledger.sqlite-wal")
    path.rename(wal)
    refused(filled, "is gone but .*ledger.sqlite-wal is still there")


def test_damage_that_comes_later_is_an_error_too(opened: Open, filled: str, path: Path) -> None:
    ledger = opened(filled)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(LedgerUnavailable, match="can't be read: database disk image is malformed"):
        ledger.jobs()


# --- other people ------------------------------------------------------------------------------------------


def test_a_lock_that_somebody_else_holds(opened: Open, sqlite_url: str, path: Path) -> None:
    ledger = opened(f"{sqlite_url}?timeout=0.2")
    ledger.commit(submission(1))
    console = sqlite3.connect(path, isolation_level=None)
    console.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable, match="database is locked"):
        ledger.commit(submission(2))
    with pytest.raises(LedgerUnavailable, match="database is locked"):
        ledger.load()  # it might miss what the other one is about to commit
    assert [each.job.id for each in ledger.jobs()] == ["j1"]
    console.execute("ROLLBACK")
    console.close()
    ledger.commit(submission(2))
    assert [each.job.id for each in ledger.jobs()] == ["j2", "j1"]


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that anybody may enter; pytest's are root's alone where root runs the tests."""
    directory = Path(tempfile.mkdtemp(prefix="rm-ledger-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


READ_ONLY = """
import os, pwd, sys
from rm.errors import LedgerUnavailable
from rm.ledger import Ledger
Ledger.open("sqlite:///" + sys.argv[2]).close()  # everything is imported now
if os.geteuid() == 0:  # root may write anything: go on as somebody else
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
try:
    Ledger.open(sys.argv[1])
except LedgerUnavailable as error:
    print(error)
"""


def test_a_ledger_that_may_only_be_read(
    opened: Open, open_directory: Path, tmp_path: Path, child: Child
) -> None:
    url = f"sqlite:///{open_directory / 'ledger.sqlite'}"
    ledger = opened(url)
    ledger.commit(submission(1))
    ledger.close()
    (open_directory / "ledger.sqlite").chmod(0o444)
    open_directory.chmod(0o555)
    told = child(READ_ONLY, url, str(tmp_path / "other.sqlite")).communicate(timeout=30)[0]
    open_directory.chmod(0o755)
    assert "readonly database; check that" in told
    assert "user may write there" in told
    assert [each.job.id for each in opened(url).jobs()] == ["j1"]


def test_a_row_that_was_taken_away(opened: Open, sqlite_url: str, path: Path) -> None:
    ledger = opened(sqlite_url)
    ledger.commit(submission(1, 2))
    console = sqlite3.connect(path)
    console.execute("DELETE FROM jobs WHERE id = 'j2'")
    console.commit()
    console.close()
    with pytest.raises(LedgerUnavailable, match="lacks 1 of the jobs j1, j2"):
        ledger.commit(admission(make_job(1), make_job(2)))
    assert ledger.load().jobs == [make_job(1)]
