"""Ledgers of every schema that ever landed, as the code of that time wrote them, are brought up whole.

`shapes/<revision>.sql` is the dump of a ledger that a version with that schema has filled: jobs that succeeded, were
tried again, cancelled and timed out, and some that still lived. A revision that is no longer the newest needs one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from rm.core.policy import Policy
from rm.core.state import ClusterState
from rm.ledger import Ledger, back_up, check, restore, schema

Open = Callable[[str], Ledger]
SHAPES = Path(__file__).parent / "shapes"
SCRIPT = ScriptDirectory.from_config(schema._config())
REVISIONS = sorted(each.revision for each in SCRIPT.walk_revisions())


def filled(revision: str, file: Path) -> str:
    """Make the ledger of that revision in `file`; returns its URL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file)
    connection.executescript((SHAPES / f"{revision}.sql").read_text())
    connection.close()
    return f"sqlite:///{file}"


def test_there_is_a_shape_of_each_schema_but_the_newest() -> None:
    shapes = {each.stem for each in SHAPES.glob("*.sql")}
    assert shapes >= set(REVISIONS) - {schema.head()}
    assert shapes <= set(REVISIONS)


@pytest.mark.parametrize("revision", sorted(each.stem for each in SHAPES.glob("*.sql")))
def test_a_ledger_of_each_shape_is_checked_brought_up_and_goes_on(
    opened: Open, tmp_path: Path, revision: str
) -> None:
    url = filled(revision, tmp_path / "ledger.sqlite")
    before = check(url)
    assert (before.findings, before.summary.schema) == ([], revision)
    ledger = opened(url)
    loaded = ledger.load()
    state = ClusterState(loaded.policy.policy if loaded.policy else Policy())
    assert state.restore(loaded.jobs, loaded.usage, loaded.ended)
    state.check()
    assert [row.job.seq for row in ledger.jobs(newest_first=False)] == list(range(1, before.summary.next_job))
    assert {job.id for job in loaded.jobs} >= {"j6", "j7", "j8"}
    assert ledger.spec("j1").env == {"LAB": "a"}
    assert len(ledger.events()) == before.summary.events
    after = check(url)
    assert after.findings == []
    assert (after.summary.schema, after.summary.key) == (schema.head(), before.summary.key)
    assert (after.summary.jobs, after.summary.events) == (before.summary.jobs, before.summary.events)


@pytest.mark.parametrize("revision", sorted(each.stem for each in SHAPES.glob("*.sql")))
def test_a_backup_of_each_shape_is_made_and_put_back(opened: Open, tmp_path: Path, revision: str) -> None:
    url = filled(revision, tmp_path / "ledger.sqlite")
    made = back_up(url, tmp_path / "ledger.backup")
    assert made.schema == revision
    opened(url).close()  # an upgrade that is gone back from
    assert restore(url, tmp_path / "ledger.backup").backup == made
    assert check(url).summary == made
