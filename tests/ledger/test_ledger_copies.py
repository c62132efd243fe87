"""Backup and restoration of a ledger: of one in use, onto one that is damaged or gone, and what is refused."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger_batches import admission, make_job, submission, told_story
from ledger_server import Server
from sqlalchemy import make_url

from rm.errors import InvalidSpec, LedgerUnavailable, RequestError
from rm.ledger import Ledger, back_up, check, restore
from rm.ledger.copies import SKIPPED, dump_command, restore_command

Open = Callable[[str], Ledger]
Child = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.sqlite"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "ledger.backup"


@pytest.fixture
def filled(opened: Open, sqlite_url: str) -> str:
    """The URL of a closed ledger with the jobs j1 to j8 of `told_story`."""
    ledger = opened(sqlite_url)
    ledger.commit(told_story().batch())
    ledger.close()
    return sqlite_url


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def ids(file: Path) -> list[str]:
    """The jobs in a file, by SQLite alone."""
    connection = sqlite3.connect(file)
    found = [row[0] for row in connection.execute("SELECT id FROM jobs ORDER BY seq")]
    connection.close()
    return found


# --- backup ------------------------------------------------------------------------------------------------

WRITES = """
import sys
from ledger_batches import admission, make_job, submission
from rm.ledger import Ledger
ledger = Ledger.open(sys.argv[1])
for seq in range(1, 1_000_000, 3):
    ledger.commit(submission(seq, seq + 1, seq + 2))
    ledger.commit(admission(make_job(seq), make_job(seq + 1)))
    print(seq + 2, flush=True)
"""


def test_a_backup_while_a_process_writes_holds_whole_batches(
    sqlite_url: str, copy: Path, child: Child
) -> None:
    writer = child(WRITES, sqlite_url)
    assert writer.stdout is not None
    sizes = []
    for _ in range(5):
        acknowledged = int([writer.stdout.readline() for _ in range(20)][-1])
        made = back_up(sqlite_url, copy, force=True)
        report = check(copy)
        assert (report.findings, report.summary) == ([], made)
        assert made.jobs >= acknowledged
        admitted = made.events - made.jobs
        assert (made.jobs % 3, admitted - 2 * (made.jobs // 3)) in ((0, 0), (0, -2)), (
            "no batch is there in part"
        )
        sizes.append(made.jobs)
        assert names(copy.parent) == ["ledger.backup"]
    assert writer.poll() is None
    assert sizes == sorted(set(sizes)), "it went on writing meanwhile"


def test_a_backup_is_for_its_owner_only_and_one_file(filled: str, copy: Path) -> None:
    before = os.umask(0)
    try:
        back_up(filled, copy)
    finally:
        os.umask(before)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert names(copy.parent) == ["ledger.backup"]
    assert ids(copy) == [f"j{seq}" for seq in range(1, 9)]


def test_a_backup_includes_the_log_of_a_killed_writer(
    sqlite_url: str, copy: Path, path: Path, child: Child
) -> None:
    writer = child(WRITES, sqlite_url)
    assert writer.stdout is not None
    acknowledged = int([writer.stdout.readline() for _ in range(10)][-1])
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.with_name("ledger.sqlite-wal").stat().st_size > 0
    assert back_up(sqlite_url, copy).jobs >= acknowledged


def test_an_existing_file_is_replaced_only_by_force(filled: str, copy: Path) -> None:
    copy.write_text("precious")
    with pytest.raises(InvalidSpec, match=r"file: .*ledger\.backup exists; .*--force"):
        back_up(filled, copy)
    assert copy.read_text() == "precious"
    assert back_up(filled, copy, force=True).jobs == 8
    assert names(copy.parent) == ["ledger.backup"]


@pytest.mark.parametrize("force", [False, True])
def test_a_backup_never_goes_over_the_ledger_itself(filled: str, path: Path, copy: Path, force: bool) -> None:
    copy.symlink_to(path)
    before = path.read_bytes()
    for file in (path, path.parent / "." / path.name, copy):
        with pytest.raises(InvalidSpec, match="is the ledger itself"):
            back_up(filled, file, force=force)
    assert path.read_bytes() == before


def test_a_backup_never_goes_over_a_database_in_use(filled: str, copy: Path) -> None:
    copy.with_name("ledger.backup-wal").write_text("somebody's log")
    with pytest.raises(InvalidSpec, match="is in use: ledger.backup-wal is beside it"):
        back_up(filled, copy, force=True)


@pytest.mark.parametrize("where, words", [("no/such/file", "can't be written"), (".", "is a directory")])
def test_a_place_that_is_none(filled: str, tmp_path: Path, where: str, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        back_up(filled, tmp_path / where)


def test_no_ledger_is_made_in_order_to_be_copied(sqlite_url: str, copy: Path, path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="there is no ledger at"):
        back_up(sqlite_url, copy)
    assert not path.parent.exists()
    assert names(copy.parent) == []


def test_a_damaged_ledger_makes_no_backup(filled: str, path: Path, copy: Path) -> None:
    copy.write_text("the last good one")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, 'owner, seq', 'name, seq') WHERE type = 'index'"
    )
    connection.commit()
    connection.close()
    with pytest.raises(LedgerUnavailable, match="is damaged, and so is every copy"):
        back_up(filled, copy, force=True)
    assert copy.read_text() == "the last good one"
    assert names(copy.parent) == ["ledger.backup"]


NO_ROOM = """
import resource, sys
from pathlib import Path
from rm.errors import LedgerUnavailable
from rm.ledger import back_up, check
check(sys.argv[1])  # everything is imported now
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
try:
    back_up(sys.argv[1], Path(sys.argv[2]), force=True)
except LedgerUnavailable as error:
    print(error)
"""


def test_a_disk_without_room_for_the_copy(filled: str, copy: Path, child: Child) -> None:
    copy.write_text("the last good one")
    told = child(NO_ROOM, filled, str(copy)).communicate(timeout=30)[0]
    assert "can't be copied" in told
    assert f"check that the disk of {copy.parent} has room" in told
    assert copy.read_text() == "the last good one"
    assert names(copy.parent) == ["ledger.backup"]


# --- restore -----------------------------------------------------------------------------------------------


def test_a_backup_is_put_back_and_what_was_there_is_kept(
    opened: Open, filled: str, path: Path, copy: Path
) -> None:
    back_up(filled, copy)
    ledger = opened(filled)
    key = ledger.key
    ledger.commit(submission(9, 10))
    ledger.close()
    done = restore(filled, copy)
    (kept,) = done.kept
    assert Path(kept).name.startswith("ledger.sqlite.replaced-")
    assert ids(Path(kept))[-1] == "j10"
    assert ids(path)[-1] == "j8"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(path.parent) == ["ledger.sqlite", Path(kept).name]
    again = opened(filled)
    assert again.key == key
    assert [job.id for job in again.load().jobs] == ["j6", "j7", "j8"]
    assert again.load().next_seq == done.next_job == 11, "the files of j9 and j10 are still there"
    assert check(filled).findings == []


def test_numbers_stay_given_over_two_restorations(opened: Open, filled: str, copy: Path) -> None:
    back_up(filled, copy)
    ledger = opened(filled)
    ledger.commit(submission(*range(9, 31)))
    ledger.close()
    assert restore(filled, copy).next_job == 31
    assert restore(filled, copy).next_job == 31
    ledger = opened(filled)
    assert ledger.load().next_seq == 31
    ledger.commit(submission(31))
    assert ledger.load().next_seq == 32


@pytest.mark.parametrize("there", ["nothing", "rubbish", "half of it"])
def test_where_the_ledger_can_not_be_read_numbers_are_skipped(
    opened: Open, filled: str, path: Path, copy: Path, there: str
) -> None:
    back_up(filled, copy)
    if there == "nothing":
        shutil.rmtree(path.parent)
    elif there == "rubbish":
        path.write_bytes(b"\0" * 10_000)
    else:
        os.truncate(path, path.stat().st_size // 3)
    damaged = path.read_bytes() if path.exists() else None
    done = restore(filled, copy)
    assert done.next_job == 9 + SKIPPED
    assert opened(filled).load().next_seq == 9 + SKIPPED
    assert [Path(each).read_bytes() for each in done.kept] == ([] if damaged is None else [damaged])


def test_what_was_kept_is_whole_with_the_log_of_a_killed_writer(
    sqlite_url: str, path: Path, copy: Path, child: Child
) -> None:
    writer = child(WRITES, sqlite_url)
    assert writer.stdout is not None
    writer.stdout.readline()
    back_up(sqlite_url, copy)
    last = int([writer.stdout.readline() for _ in range(20)][-1])
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    done = restore(sqlite_url, copy)
    assert [each.rpartition("-")[2] for each in done.kept[1:]] == ["wal", "shm"]
    assert names(path.parent) == sorted(["ledger.sqlite", *(Path(each).name for each in done.kept)])
    kept = check(Path(done.kept[0]))
    assert kept.findings == []
    assert kept.summary.jobs >= last
    assert check(path).summary.jobs == done.backup.jobs
    assert done.next_job >= last + 1


OPEN = """
import sys
from rm.ledger import Ledger
ledger = Ledger.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_ledger_in_use_is_not_replaced(
    filled: str, path: Path, copy: Path, child: Child, damaged: bool
) -> None:
    back_up(filled, copy)
    holder = child(OPEN, filled, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    if damaged:
        with path.open("r+b") as file:
            file.write(b"\0" * 4096)
    before = path.read_bytes()
    with pytest.raises(LedgerUnavailable, match=f"in use by process {holder.pid}.*rmctl stop --keep-jobs"):
        restore(filled, copy, force=True)
    assert path.read_bytes() == before
    assert [each for each in names(path.parent) if "replaced" in each or each.startswith(".")] == []
    holder.communicate("")
    assert restore(filled, copy, force=True).backup.jobs == 8


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda file: os.truncate(file, file.stat().st_size // 2), "malformed|not sound"),
        (lambda file: os.truncate(file, 0), "is empty"),
        (lambda file: file.write_bytes(b"\0" * 10_000), "not a database"),
        (lambda file: file.unlink(), "there is no ledger at"),
    ],
)
def test_a_bad_backup_is_not_put_back_even_by_force(
    filled: str, path: Path, copy: Path, damage: Callable[[Path], object], words: str
) -> None:
    back_up(filled, copy)
    damage(copy)
    before = path.read_bytes()
    with pytest.raises(LedgerUnavailable, match=words):
        restore(filled, copy)
    with pytest.raises(LedgerUnavailable):
        restore(filled, copy, force=True)
    assert path.read_bytes() == before
    assert names(path.parent) == ["ledger.sqlite"]


def change(file: Path, statement: str) -> None:
    connection = sqlite3.connect(file)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_backup_with_findings_needs_force(filled: str, path: Path, copy: Path) -> None:
    back_up(filled, copy)
    change(copy, "UPDATE events SET free_before = -1 WHERE seq = 5")
    with pytest.raises(LedgerUnavailable, match=r"not sound, 1 findings \(gpus: j1 event 5: .*--force"):
        restore(filled, copy)
    assert names(path.parent) == ["ledger.sqlite"]
    assert restore(filled, copy, force=True).backup.jobs == 8


def test_a_backup_of_another_ledger_needs_force(
    opened: Open, filled: str, tmp_path: Path, copy: Path
) -> None:
    other = f"sqlite:///{tmp_path / 'other.sqlite'}"
    opened(other).close()
    back_up(other, copy)
    with pytest.raises(LedgerUnavailable, match="is a backup of another ledger: its key is .*--force"):
        restore(filled, copy)
    assert restore(filled, copy, force=True).backup.jobs == 0


def test_a_backup_of_a_newer_version_is_refused(filled: str, path: Path, copy: Path) -> None:
    back_up(filled, copy)
    change(copy, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerUnavailable, match="newer version of ray-rm"):
        restore(filled, copy, force=True)
    change(path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerUnavailable, match="newer version of ray-rm"):
        back_up(filled, copy, force=True)


def test_the_ledger_is_not_restored_from_itself(filled: str, path: Path) -> None:
    with pytest.raises(InvalidSpec, match="is the ledger itself"):
        restore(filled, path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_restores_it_for_its_owner(filled: str, path: Path, copy: Path) -> None:
    back_up(filled, copy)
    os.chown(path, 65534, 65534)
    restore(filled, copy)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


# --- PostgreSQL --------------------------------------------------------------------------------------------


def test_the_commands_for_postgres_hold_no_password() -> None:
    url = "postgresql+psycopg://ann:hunter2@db.example.com/rm?options=-csearch_path%3Dlab"
    with pytest.raises(RequestError, match="pg_dump --format=custom .*--schema=lab .*PGPASSWORD") as caught:
        back_up(url, Path("/backup/rm dump"))
    with pytest.raises(RequestError, match="rmctl stop --keep-jobs.*pg_restore --clean") as again:
        restore(url, Path("/backup/rm dump"))
    for error in (caught, again):
        assert "hunter2" not in str(error.value)
        assert "postgresql://ann@db.example.com/rm" in str(error.value)
        assert "'/backup/rm dump'" in str(error.value) or "'--file=/backup/rm dump'" in str(error.value)


@pytest.mark.postgres
def test_the_commands_for_postgres_work(
    server: Server, postgres_url: str, opened: Open, tmp_path: Path
) -> None:
    ledger = opened(postgres_url)
    ledger.commit(told_story().batch())
    ledger.close()
    before, file = check(postgres_url), tmp_path / "ledger.dump"
    parsed = make_url(postgres_url)
    subprocess.run(_words(server, dump_command(parsed, file)), check=True)
    ledger = opened(postgres_url)
    ledger.commit(submission(9))
    ledger.commit(admission(make_job(9)))
    ledger.close()
    assert check(postgres_url).summary != before.summary
    subprocess.run(_words(server, restore_command(parsed, file)), check=True)
    assert check(postgres_url) == before


def _words(server: Server, command: str) -> list[str]:
    program, *words = shlex.split(command)
    return [str(server.binaries / program), *words]
