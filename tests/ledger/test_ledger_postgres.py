"""The ledger on a PostgreSQL server that is killed, restarted, locked, misconfigured or not there."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from ledger_batches import admission, make_job, submission
from ledger_server import Server
from sqlalchemy import make_url, text

from rm.errors import LedgerUnavailable
from rm.ledger import Ledger
from rm.ledger.postgres import FENCE_KEY

Open = Callable[[str], Ledger]


def console(url: str) -> psycopg.Connection:
    """A connection that has nothing to do with the ledger's own."""
    parsed = make_url(url)
    return psycopg.connect(dbname=parsed.database, user=parsed.username, **parsed.query)


def backends(server: Server) -> list[str]:
    """The process ids of every connection to the ledgers."""
    return server.sql(f"SELECT pid FROM pg_stat_activity WHERE datname = '{server.main}'").split()


# --- without a server --------------------------------------------------------------------------------------


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(LedgerUnavailable, match=r"pip install 'ray-rm\[postgres\]'"):
        Ledger.open("postgresql://ann:hunter2@localhost/ledger")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_server_that_is_not_there(tmp_path: Path, scheme: str) -> None:
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable, match="check that the server answers") as caught:
        Ledger.open(f"{scheme}://ann:hunter2@/ledger?host={tmp_path}")
    assert time.monotonic() - began < 5
    assert "hunter2" not in str(caught.value)


def test_another_driver_is_refused() -> None:
    with pytest.raises(LedgerUnavailable, match="write it as postgresql://"):
        Ledger.open("postgresql+asyncpg://ann@localhost/ledger")


# --- a server that goes away -------------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_server_that_was_killed_and_came_back(server: Server, opened: Open, postgres_url: str) -> None:
    ledger = opened(postgres_url)
    ledger.commit(submission(1, 2))
    server.kill()
    for call in (ledger.load, ledger.jobs, ledger.count_events, lambda: ledger.commit(submission(3))):
        with pytest.raises(LedgerUnavailable, match="the ledger postgresql://rm@/"):
            call()
    server.start()
    assert [job.id for job in ledger.load().jobs] == ["j1", "j2"]
    ledger.commit(submission(3))
    assert ledger.count_events() == 3


@pytest.mark.postgres
def test_a_server_that_is_killed_while_it_commits(server: Server, opened: Open, postgres_url: str) -> None:
    ledger = opened(postgres_url)
    acknowledged, failures = [0], []
    under_way = threading.Event()

    def write() -> None:
        for first in range(1, 1_000_000, 50):
            try:
                ledger.commit(submission(*range(first, first + 50)))
            except LedgerUnavailable as error:
                failures.append(error)
                return
            acknowledged.append(first + 49)
            if len(acknowledged) > 5:
                under_way.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert under_way.wait(120)
    server.kill()
    writer.join()
    server.start()
    assert len(failures) == 1
    jobs = ledger.load().jobs
    assert [job.seq for job in jobs] == list(range(1, len(jobs) + 1))
    # The last batch may have been committed without anybody being told; in part it can't be there.
    assert len(jobs) - acknowledged[-1] in (0, 50)
    assert ledger.count_events() == len(jobs)
    ledger.commit(submission(len(jobs) + 1))


@pytest.mark.postgres
def test_idle_connections_that_were_cut_cost_nothing(server: Server, opened: Open, postgres_url: str) -> None:
    ledger = opened(postgres_url)
    ledger.commit(submission(1))
    assert ledger.count_events() == 1
    assert len(backends(server)) >= 2
    for pid in backends(server):
        server.sql(f"SELECT pg_terminate_backend({pid})")
    ledger.commit(submission(2))
    assert ledger.count_events() == 2


@pytest.mark.postgres
def test_a_connection_that_is_cut_in_a_transaction(server: Server, opened: Open, postgres_url: str) -> None:
    ledger = opened(postgres_url)
    ledger.commit(submission(1))
    with (
        pytest.raises(LedgerUnavailable, match=r"terminating connection|server closed the connection"),
        ledger._database.transaction() as connection,
    ):
        connection.execute(text("DELETE FROM jobs"))
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
        server.sql(f"SELECT pg_terminate_backend({pid})")
        connection.execute(text("DELETE FROM events"))
    assert [job.id for job in ledger.load().jobs] == ["j1"]
    ledger.commit(submission(2))


@pytest.mark.postgres
def test_loading_waits_for_a_commit_whose_connection_was_lost(opened: Open, postgres_url: str) -> None:
    """To the ledger, the console's transaction is one of its own that the server is still busy with."""
    ledger = opened(postgres_url)
    ledger.commit(submission(1, 2))
    loaded: list[object] = []
    with console(postgres_url) as lost:
        lost.execute(f"SELECT pg_advisory_xact_lock({FENCE_KEY})")
        lost.execute("UPDATE jobs SET status = 'SUCCEEDED' WHERE id = 'j1'")
        reader = threading.Thread(target=lambda: loaded.append(ledger.load()))
        reader.start()
        reader.join(0.3)
        assert loaded == []
        lost.commit()
        reader.join()
    assert loaded[0].jobs == [make_job(2)]


# --- a server in other hands -------------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_table_that_somebody_else_has_locked(
    opened: Open, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rm.ledger.postgres as module

    monkeypatch.setattr(module, "_SESSION", module._SESSION.replace("5.0s", "200ms"))
    ledger = opened(postgres_url)
    ledger.commit(submission(1))
    with console(postgres_url) as other:
        other.execute("LOCK TABLE jobs IN SHARE MODE")
        with pytest.raises(LedgerUnavailable, match="lock timeout"):
            ledger.commit(submission(2))
        assert [each.job.id for each in ledger.jobs()] == ["j1"]
        other.rollback()
    ledger.commit(submission(2))


@pytest.mark.postgres
def test_a_server_set_up_to_forget_is_told_not_to(server: Server, opened: Open) -> None:
    def said(database: str) -> str:
        with opened(server.url(database))._database.transaction() as connection:
            return connection.execute(text("SHOW synchronous_commit")).scalar_one()

    loose, strict = server.database(), server.database()
    server.sql(f"ALTER DATABASE {loose} SET synchronous_commit = off")
    server.sql(f"ALTER DATABASE {strict} SET synchronous_commit = remote_apply")
    assert said(loose) == "on"
    assert said(strict) == "remote_apply"


@pytest.mark.postgres
def test_a_database_that_can_not_hold_every_text_is_refused(server: Server) -> None:
    with pytest.raises(LedgerUnavailable, match=r"encoded as LATIN1.*ENCODING 'UTF8'"):
        Ledger.open(server.url(server.database("LATIN1")))


@pytest.mark.postgres
def test_a_database_that_is_not_there(server: Server) -> None:
    with pytest.raises(LedgerUnavailable, match='database "nowhere" does not exist'):
        Ledger.open(server.url("nowhere"))


@pytest.mark.postgres
def test_a_schema_that_is_not_there(server: Server) -> None:
    with pytest.raises(LedgerUnavailable, match="no schema has been selected"):
        Ledger.open(server.url(server.main, "nowhere"))


@pytest.mark.postgres
def test_two_ledgers_in_one_database_know_nothing_of_each_other(server: Server, opened: Open) -> None:
    database = server.database()
    for schema in ("one", "two"):
        server.sql(f"CREATE SCHEMA {schema}", database)
    one, two = (opened(server.url(database, schema)) for schema in ("one", "two"))
    one.commit(submission(1))
    assert one.key != two.key
    assert two.load().jobs == []
    assert one.load().jobs == [make_job(1)]


@pytest.mark.postgres
def test_a_server_that_turned_read_only(server: Server, opened: Open, postgres_url: str) -> None:
    ledger = opened(postgres_url)
    ledger.commit(submission(1))
    server.sql(f"ALTER DATABASE {server.main} SET default_transaction_read_only = on")
    try:
        for pid in backends(server):
            server.sql(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(LedgerUnavailable, match="read-only transaction"):
            ledger.commit(admission(make_job(1)))
        assert ledger.jobs()[0].job == make_job(1)
    finally:
        server.sql(f"ALTER DATABASE {server.main} SET default_transaction_read_only = off", "postgres")
    for pid in backends(server):
        server.sql(f"SELECT pg_terminate_backend({pid})")
    ledger.commit(admission(make_job(1)))
