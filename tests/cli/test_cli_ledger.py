"""`rmctl ledger`: on a real ledger, without Ray."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rm.core.capacity import Totals
from rm.core.events import JobSubmitted
from rm.core.model import Gang
from rm.core.resources import GPU_UNIT, Bundle
from rm.ledger import Accepted, Batch, EventRow, Ledger
from rm.spec import build_spec

Rmctl = Callable[..., Any]
NOTHING = Totals(0, 0, 0, 0)


def submit(ledger: Ledger, *seqs: int) -> None:
    spec = build_spec(kind="command", command=("true",), num_gpus=1)
    jobs = [spec.job(f"j{seq}", seq, Gang(Bundle(GPU_UNIT)), 1000.0 + seq) for seq in seqs]
    rows = [EventRow(JobSubmitted(job.submitted_at, job), NOTHING, NOTHING) for job in jobs]
    ledger.commit(Batch([Accepted(job, spec, job.id) for job in jobs], rows, jobs))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An RM_HOME whose ledger, not in use, holds j1 to j3."""
    monkeypatch.setenv("RM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RM_LEDGER_URL", raising=False)
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'home' / 'ledger.sqlite'}")
    submit(ledger, 1, 2, 3)
    ledger.close()
    return tmp_path / "home"


def break_it(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("UPDATE events SET free_after = -1 WHERE seq = 2")
    connection.commit()
    connection.close()


def test_from_backup_to_restoration(rmctl: Rmctl, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "ledger.backup"
    ran = rmctl("ledger", "backup", str(file))
    assert (ran.code, ran.err) == (0, "")
    assert "3, 3 live; the next is j4" in ran.out
    ledger = Ledger.open(f"sqlite:///{home / 'ledger.sqlite'}")
    submit(ledger, 4)
    ledger.close()
    ran = rmctl("ledger", "restore", str(file))
    assert ran.code == 0
    assert "ledger.sqlite.replaced-" in ran.out
    for words in ("rmctl start", "jobs accepted since then are unknown", "run again", "numbered from j5"):
        assert words in ran.err
    assert rmctl("ledger", "check", "--json").json["jobs"] == 3


def test_json_is_all_that_is_on_stdout(rmctl: Rmctl, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "ledger.backup"
    made = rmctl("ledger", "backup", str(file), "--json").json
    assert (made["file"], made["bytes"]) == (str(file), file.stat().st_size)
    assert (made["jobs"], made["live"], made["events"], made["next_job"]) == (3, 3, 3, 4)
    done = rmctl("ledger", "restore", str(file), "--json").json
    assert (done["path"], done["next_job"], done["backup"]["jobs"]) == (str(home / "ledger.sqlite"), 4, 3)
    (kept,) = done["kept"]
    assert Path(kept).exists()
    break_it(file)
    ran = rmctl("ledger", "check", str(file), "--json")
    assert ran.code == 1
    assert ran.json["findings"] == [
        {"what": "gpus", "message": "free_after is -1", "job_id": "j2", "seq": 2}
    ]  # fmt: skip


def test_check_lists_what_it_finds(rmctl: Rmctl, home: Path) -> None:
    ran = rmctl("ledger", "check")
    assert (ran.code, ran.err) == (0, "nothing wrong was found\n")
    break_it(home / "ledger.sqlite")
    for where in ([], [str(home / "ledger.sqlite")], [f"sqlite:///{home / 'ledger.sqlite'}"]):
        ran = rmctl("ledger", "check", *where)
        assert (ran.code, ran.err) == (1, "1 finding\n")
        assert "gpus: j2 event 2: free_after is -1\n" in ran.out


def test_refusals_are_one_line(
    rmctl: Rmctl, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ledger.backup"
    file.write_text("precious")
    for words, code, message in [
        (["backup", str(file)], 2, "--force replaces it"),
        (["restore", str(file)], 3, "not a database"),
        (["restore", str(tmp_path / "no")], 3, "there is no ledger at"),
        (["check", str(tmp_path / "no")], 3, "there is no ledger at"),
    ]:
        ran = rmctl("ledger", *words)
        assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)
        assert message in ran.err
    monkeypatch.setenv("RM_LEDGER_URL", "postgresql://ann:hunter2@db.example.com/rm")
    ran = rmctl("ledger", "backup", str(tmp_path / "new"))
    assert ran.code == 2
    assert "pg_dump --format=custom" in ran.err
    assert "hunter2" not in ran.err


def test_no_ray_is_needed(home: Path) -> None:
    code = "import sys; from rm.cli import run; print(run(['ledger', 'check']), 'ray' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert ran.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize("command", ["backup", "restore", "check"])
def test_each_has_help(rmctl: Rmctl, command: str) -> None:
    ran = rmctl("ledger", command, "-h")
    assert ran.code == 0
    assert f"rmctl ledger {command}" in ran.out
