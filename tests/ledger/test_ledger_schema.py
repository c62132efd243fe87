"""Which databases are taken for a ledger, and how an old one becomes a new one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from ledger_batches import submission
from sqlalchemy import inspect, text

from rm.core.model import Cordon
from rm.errors import LedgerUnavailable
from rm.ledger import Batch, Ledger, schema
from rm.ledger.tables import metadata

Open = Callable[[str], Ledger]

REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

def upgrade():
    op.add_column("jobs", sa.Column("colour", sa.Text, nullable=False, server_default="grey"))
    op.execute("{then}")
"""


def run(ledger: Ledger, *statements: str) -> None:
    with ledger._database.transaction() as connection:
        for each in statements:
            connection.execute(text(each))


@pytest.fixture
def next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The package with one revision more, which ends with the given statement."""

    def add(then: str) -> None:
        copy = tmp_path / f"migrations-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(schema.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "versions" / "r0004_colour.py").write_text(REVISION.format(then=then))
        monkeypatch.setattr(schema, "MIGRATIONS", copy)

    return add


def test_the_revisions_make_the_tables_that_the_code_uses(ledger: Ledger) -> None:
    with ledger._database.transaction() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        found = inspect(connection)
        for table in metadata.tables.values():
            assert {each["name"] for each in found.get_indexes(table.name)} >= {
                index.name for index in table.indexes
            }


def test_a_newer_ledger_is_left_alone(opened: Open, url: str) -> None:
    ledger = opened(url)
    run(ledger, "UPDATE alembic_version SET version_num = '9999'")
    ledger.close()
    with pytest.raises(LedgerUnavailable, match=r"newer version of ray-rm \(schema 9999.*upgrade ray-rm"):
        Ledger.open(url)


def test_an_older_ledger_is_brought_up_with_all_it_holds(
    opened: Open, url: str, next_revision: Callable[[str], None]
) -> None:
    ledger = opened(url)
    ledger.commit(submission(1, 2))
    key = ledger.key
    ledger.close()
    next_revision("UPDATE jobs SET colour = 'red' WHERE seq = 2")
    upgraded = opened(url)
    assert upgraded.key == key
    assert [each.job.id for each in upgraded.jobs()] == ["j2", "j1"]
    with upgraded._database.reading() as connection:
        colours = connection.execute(text("SELECT colour FROM jobs ORDER BY seq")).scalars()
        assert list(colours) == ["grey", "red"]


def test_a_ledger_from_before_cordons_takes_them(
    opened: Open, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = schema.MIGRATIONS
    older = tmp_path / "older"
    shutil.copytree(released, older, ignore=shutil.ignore_patterns("__pycache__", "r0003_*"))
    monkeypatch.setattr(schema, "MIGRATIONS", older)
    before = opened(url)
    before.commit(submission(1))
    with before._database.reading() as connection:
        assert not inspect(connection).has_table("cordons")
    before.close()
    monkeypatch.setattr(schema, "MIGRATIONS", released)
    ledger = opened(url)
    assert ledger.load().cordons == []
    ledger.commit(Batch(cordons={"n1": Cordon("n1", 5.0, "ada", "a fan is loud", True, 65.0)}))
    assert [job.id for job in ledger.load().jobs] == ["j1"]
    assert [each.reason for each in ledger.load().cordons] == ["a fan is loud"]


def test_an_upgrade_that_fails_changes_nothing(
    opened: Open, url: str, next_revision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = schema.MIGRATIONS
    ledger = opened(url)
    ledger.commit(submission(1, 2))
    ledger.close()
    next_revision("UPDATE no_such_table SET colour = 'red'")
    with pytest.raises(LedgerUnavailable, match="no_such_table"):
        Ledger.open(url)
    monkeypatch.setattr(schema, "MIGRATIONS", released)
    again = opened(url)
    assert [job.id for job in again.load().jobs] == ["j1", "j2"]
    with again._database.reading() as connection:
        assert "colour" not in {each["name"] for each in inspect(connection).get_columns("jobs")}


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(["CREATE TABLE customers (id INTEGER)"], id="other tables"),
        pytest.param(
            ["CREATE TABLE meta (id INTEGER)", "CREATE TABLE alembic_version (version_num TEXT)"],
            id="tables of the same names",
        ),
        pytest.param(
            [
                "CREATE TABLE meta (name TEXT, value TEXT)",
                "CREATE TABLE alembic_version (version_num TEXT)",
                "INSERT INTO meta VALUES ('application', 'another')",
            ],
            id="tables of the same shape",
        ),
    ],
)
def test_a_database_of_somebody_else_is_left_alone(opened: Open, url: str, theirs: list[str]) -> None:
    ledger = opened(url)
    run(
        ledger,
        *(f"DROP TABLE {name}" for name in ("meta", "alembic_version", "jobs", "events", "usage", "cordons")),
        *theirs,
    )
    with ledger._database.reading() as connection:
        before = inspect(connection).get_table_names()
    with pytest.raises(LedgerUnavailable, match="is no ledger of ray-rm"):
        Ledger.open(url)
    with ledger._database.reading() as connection:
        assert inspect(connection).get_table_names() == before


def test_a_ledger_without_its_key_is_damaged(opened: Open, url: str) -> None:
    ledger = opened(url)
    run(ledger, "DELETE FROM meta WHERE name = 'key'")
    with pytest.raises(LedgerUnavailable, match="lost its key"):
        Ledger.open(url)


@pytest.mark.parametrize("wrong", ["", "ledger.sqlite", "mysql://host/db", "sqlite://", "sqlite:///:memory:"])
def test_an_url_that_names_no_ledger_is_refused(wrong: str) -> None:
    with pytest.raises(LedgerUnavailable, match=r"sqlite:////path/to/ledger\.sqlite"):
        Ledger.open(wrong)
