"""The databases that the ledger's tests run on: SQLite files, and a PostgreSQL server of our own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger_server import Server, find_binaries

import rm
from rm.ledger import Ledger


@pytest.fixture(scope="session")
def running_server() -> Iterator[Server]:
    binaries = find_binaries()
    if binaries is None:
        reason = "no PostgreSQL server here: neither initdb on PATH nor /usr/lib/postgresql/*/bin"
        if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
            pytest.fail(reason)
        pytest.skip(reason)
    server = Server(binaries)
    try:
        server.start()
        server.main = server.database()
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """The server, up: a test may kill it."""
    yield running_server
    if running_server.process is None:
        running_server.start()


@pytest.fixture
def postgres_url(server: Server) -> str:
    """A schema of its own for each test: quicker than a database."""
    schema = f"s{secrets.token_hex(6)}"
    server.sql(f"CREATE SCHEMA {schema}", server.main)
    return server.url(server.main, schema)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'home' / 'ledger.sqlite'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest) -> str:
    """An empty place for a ledger, in each kind of database."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def opened() -> Iterator[Callable[[str], Ledger]]:
    """Opens ledgers and closes them after the test."""
    ledgers: list[Ledger] = []

    def open_ledger(url: str) -> Ledger:
        ledgers.append(Ledger.open(url))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def ledger(opened: Callable[[str], Ledger], url: str) -> Ledger:
    return opened(url)


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python processes that can import this package and the tests' own modules; ends them after the test."""
    started: list[subprocess.Popen[str]] = []
    path = os.pathsep.join([str(Path(rm.__file__).parents[1]), str(Path(__file__).parent)])

    def start(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
