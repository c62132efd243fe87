"""`rm.ledger.check`: silent about what is sound, and each kind of damage is found by the check that is there for it."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger_batches import admission, array_of, make_job, submission, told_story
from sqlalchemy import text

from rm.errors import LedgerUnavailable
from rm.ledger import AppliedPolicy, Batch, Ledger, Report, check
from rm.ledger.tables import metadata

Open = Callable[[str], Ledger]


@pytest.fixture
def story(opened: Open, url: str) -> str:
    """A closed ledger with the jobs of `told_story` and, from j9 on, an array of three."""
    ledger = opened(url)
    ledger.commit(told_story().batch())
    ledger.commit(array_of(3, 9))
    ledger.close()
    return url


@pytest.fixture
def file(opened: Open, sqlite_url: str) -> Path:
    """The same as a SQLite file."""
    ledger = opened(sqlite_url)
    ledger.commit(told_story().batch())
    ledger.commit(array_of(3, 9))
    ledger.commit(Batch(policy=AppliedPolicy(told_story().policy)))
    ledger.close()
    return Path(sqlite_url.removeprefix("sqlite:///"))


def damage(file: Path, *statements: str) -> None:
    connection = sqlite3.connect(file)
    for each in statements:
        connection.execute(each)
    connection.commit()
    connection.close()


def told(report: Report) -> list[tuple[str, str | None, int]]:
    return [(each.what, each.job_id, each.seq) for each in report.findings]


def test_a_sound_ledger_has_no_findings_and_is_counted(story: str) -> None:
    report = check(story)
    assert report.findings == []
    found = report.summary
    assert (found.jobs, found.live, found.events, found.next_job) == (11, 6, 58, 12)
    assert found.schema == report.newest
    assert report.to_dict()["key"] == found.key != ""


def test_a_ledger_in_use_is_read_at_one_moment(opened: Open, url: str) -> None:
    ledger = opened(url)
    ledger.commit(submission(1, 2, 3))
    ledger.commit(admission(make_job(2)))
    assert check(url).findings == []
    ledger.commit(submission(4))
    assert check(url).summary.jobs == 4


def test_an_empty_ledger_is_sound(opened: Open, url: str) -> None:
    opened(url)
    report = check(url)
    assert (report.findings, report.summary.last_at, report.summary.next_job) == ([], None, 1)


def test_reading_changes_nothing(file: Path) -> None:
    before = {each.name: each.read_bytes() for each in file.parent.iterdir()}
    assert check(file).findings == []
    assert {each.name: each.read_bytes() for each in file.parent.iterdir()} == before


SETS = "UPDATE jobs SET {0} = '{2}', record = json_set(record, '$.{0}', '{2}') WHERE id = '{1}'"
FIRST = "(SELECT min(seq) FROM events)"
RENUMBER = "UPDATE {0} SET seq = seq + 100, record = json_set(record, '$.seq', seq + 100) WHERE id = '{1}'"


@pytest.mark.parametrize(
    "statements, expected, words",
    [
        # records and requests
        (["UPDATE jobs SET record = '{' WHERE id = 'j1'"], [("record", "j1", 0)], "the record can't be read"),
        (["UPDATE jobs SET spec = '[]' WHERE id = 'j1'"], [("record", "j1", 0)], "the request can't be read"),
        (
            ["UPDATE jobs SET record = CAST(CAST(substr(record, 1, 20) AS BLOB) || x'ff' AS TEXT) WHERE id = 'j1'"],
            [("record", "j1", 0)],
            "the record can't be read",
        ),
        (["UPDATE jobs SET record = CAST(record AS BLOB) WHERE id = 'j1'"], [("record", "j1", 0)], "can't be read"),
        (["UPDATE meta SET value = '{}' WHERE name = 'policy'"], [("record", None, 0)], "the rules in force"),
        # columns
        (["UPDATE jobs SET owner = 'eve' WHERE id = 'j2'"], [("columns", "j2", 0)], "owner: the row says other"),
        (["UPDATE jobs SET status = 'QUEUED' WHERE id = 'j6'"], [("columns", "j6", 0)], "status: the row says other"),
        (
            ["UPDATE jobs SET ended_at = NULL, record = json_set(record, '$.ended_at', NULL) WHERE id = 'j1'"],
            [("columns", "j1", 0), ("status", "j1", 24)],
            "it is SUCCEEDED and its end is None",
        ),
        (["UPDATE events SET attempt = 7 WHERE seq = 5"], [("columns", "j1", 5)], "attempt: the row says other"),
        (["UPDATE events SET at = at + 1 WHERE seq = 5"], [("columns", "j1", 5)], "at: the row says other"),
        # events
        (["UPDATE events SET body = '{}' WHERE seq = 5"], [("event", "j1", 5)], "JobAdmitted can't be read"),
        (["UPDATE events SET kind = 'Sung' WHERE seq = 5"], [("event", "j1", 5)], "this version knows no event Sung"),
        (["UPDATE events SET body = '{}' WHERE seq = 1"], [("event", None, 1)], "NodeJoined can't be read"),
        # GPUs
        (["UPDATE events SET free_before = -1 WHERE seq = 5"], [("gpus", "j1", 5)], "free_before is -1"),
        (["UPDATE events SET charged_after = -10000 WHERE seq = 1"], [("gpus", None, 1)], "charged_after is -10000"),
        (["UPDATE events SET free_after = 'x' WHERE seq = 5"], [("gpus", "j1", 5)], "free_after is 'x'"),
        # ids and numbers
        (["DELETE FROM events WHERE seq IN (1, 2)"], [("numbers", None, 0)], "events 1 to 2 are missing"),
        (["DELETE FROM events WHERE seq = 42"], [("numbers", None, 0)], "event 42 is missing"),
        (
            ["DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)"],
            [("numbers", None, 0), ("history", "j9_2", 0)],
            "event 58 is missing",
        ),
        ([RENUMBER.format("jobs", "j1")], [("numbers", "j1", 0)], "its id does not go with its number 101"),
        (
            ["UPDATE jobs SET seq = 0, record = json_set(record, '$.seq', 0) WHERE id = 'j1'"],
            [("numbers", "j1", 0)],
            "number 0",
        ),
        (
            ["DELETE FROM jobs WHERE id = 'j9_1'"],
            [("numbers", "j9_1", 57), ("numbers", "j9", 0)],
            "it has events and no record",
        ),
        (["DELETE FROM jobs WHERE id = 'j3'"], [("numbers", "j3", 39)], "it has events and no record"),
        (["DELETE FROM events WHERE job_id = 'j7'", "UPDATE events SET seq = seq - 2 WHERE seq > 47"],
         [("numbers", None, 0), ("history", "j7", 0)], "events 57 to 58 are missing"),
        # stories (the rules themselves are tested with `History`)
        (["UPDATE events SET kind = 'PlacementReady' WHERE seq = 19"],
         [("history", "j1", 19)], "PlacementReady of attempt 1 comes while attempt 1 is STARTING"),
        ([SETS.format("status", "j6", "RESERVING")], [("status", "j6", 53)], "status RESERVING, not RUNNING"),
        # the file
        (["DROP INDEX ix_jobs_owner"], [("schema", None, 0)], "index ix_jobs_owner is missing"),
        (["DROP TABLE usage"], [("schema", None, 0)], "table usage is missing"),
        (["DROP INDEX ix_jobs_array", "ALTER TABLE jobs DROP COLUMN array"], [("schema", None, 0)] * 2,
         "column jobs.array is missing"),
        (
            [
                "PRAGMA writable_schema = ON",
                "UPDATE sqlite_schema SET sql = replace(sql, 'owner, seq', 'name, seq') WHERE name = 'ix_jobs_owner'",
            ],
            [("integrity", None, 0)] * 11,
            "row 1 missing from index ix_jobs_owner",
        ),
    ],
)  # fmt: skip
def test_each_damage_is_found_by_its_check(
    file: Path, statements: list[str], expected: list[tuple[str, str | None, int]], words: str
) -> None:
    damage(file, *statements)
    report = check(file)
    assert sorted(map(str, told(report))) == sorted(map(str, expected)), report.findings
    assert any(words in str(each) for each in report.findings), report.findings


def test_a_number_that_is_given_twice(file: Path) -> None:
    damage(
        file,
        "CREATE TABLE other AS SELECT * FROM jobs",
        "DROP TABLE jobs",
        "ALTER TABLE other RENAME TO jobs",
        "UPDATE jobs SET seq = 1, record = json_set(record, '$.seq', 1) WHERE id = 'j2'",
    )
    found = [str(each) for each in check(file).findings]
    assert "numbers: j2: number 1 is given twice" in found
    assert "schema: jobs.seq is not kept unique" in found


def test_messages_do_not_quote_what_is_stored(file: Path) -> None:
    damage(file, "UPDATE jobs SET spec = json_set(spec, '$.nproc_per_node', 'hunter2') WHERE id = 'j1'")
    (found,) = check(file).findings
    assert "hunter2" not in str(found)


def test_the_same_checks_work_on_both_databases(story: str, opened: Open) -> None:
    ledger = opened(story)
    with ledger._database.transaction() as connection:
        connection.execute(text("UPDATE jobs SET owner = 'eve' WHERE id = 'j2'"))
        connection.execute(text("UPDATE events SET free_before = -1 WHERE seq = 5"))
        connection.execute(text("DROP INDEX ix_jobs_owner"))
    assert told(check(story)) == [("schema", None, 0), ("gpus", "j1", 5), ("columns", "j2", 0)]


# --- what can't be checked ---------------------------------------------------------------------------------


def test_nothing_there_is_made(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="there is no ledger at .*check the path"):
        check(tmp_path / "ledger.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_schema_is_refused(story: str, opened: Open) -> None:
    ledger = opened(story)
    with ledger._database.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(LedgerUnavailable, match="newer version of ray-rm"):
        check(story)


@pytest.mark.parametrize("content", [b"", b"Dear diary\n" * 500])
def test_a_file_that_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "ledger.sqlite"
    file.write_bytes(content)
    with pytest.raises(LedgerUnavailable, match="is empty|not a database"):
        check(file)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="check that the server answers") as caught:
        check(f"postgresql://ann:hunter2@/ledger?host={tmp_path}")
    assert "hunter2" not in str(caught.value)


def damaged(file: Path) -> bool:
    """Whether the check says so, in one of its two ways."""
    try:
        return bool(check(file).findings)
    except LedgerUnavailable:
        return True


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_file_that_was_cut_off_is_noticed(file: Path, kept: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    assert damaged(file)


def test_flipped_bits_never_break_the_check_itself(file: Path) -> None:
    """Not all are noticed, SQLite has no checksums: those in free space and within texts that still make sense."""
    data = file.read_bytes()
    chance = random.Random(7)
    noticed = 0
    for _ in range(60):
        place = chance.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
        noticed += damaged(file)
    assert noticed > 3
    file.write_bytes(data)
    assert not damaged(file)


def test_every_table_is_known_to_the_shape(file: Path) -> None:
    """A table that is added later is missed by the check when it is dropped, too."""
    for name in metadata.tables:
        if name not in ("meta", "jobs", "events"):
            damage(file, f"DROP TABLE {name}")
            assert any(f"table {name} is missing" in str(each) for each in check(file).findings)
