"""`rmctl queues` and `rmctl apply`."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_client import HOSTILE, FakeClient, queue


def test_queues_is_a_tree(rmctl: Any, fake: FakeClient) -> None:
    fake.queue_views = [
        queue("research", nominal={"*": 12.0}, used={"*": 9.5}, running=3, pending=1),
        queue("nlp", "research", nominal={"*": 8.0, "A100": 4.0}, lent={"*": 2.0}),
        queue("batch", used={"A100": 2.0}, borrowed={"A100": 2.0}, share=166.7, stopped=True),
    ]
    ran = rmctl("queues")
    header, research, nlp, batch = ran.out.splitlines()
    assert header.split() == [
        "QUEUE", "NOMINAL", "USED", "BORROWED", "LENT", "SHARE", "RUNNING", "PENDING",
    ]  # fmt: skip
    assert research.split() == ["research", "12", "9.5", "–", "–", "0", "3", "1"]
    assert nlp.startswith("  nlp ")
    assert "4 A100, 8 others" in nlp
    assert batch.split() == ["batch", "–", "2", "A100", "2", "A100", "–", "167", "0", "0", "stopped"]
    assert fake.connected == [(None, False)], "looking starts no allocator"


def test_queues_as_json(rmctl: Any, fake: FakeClient) -> None:
    fake.queue_views = [queue("a", nominal={"*": 2.0}, weight=2.0)]
    (row,) = rmctl("queues", "--json").json
    assert (row["name"], row["nominal"], row["weight"], row["reclaim"]) == ("a", {"*": 2.0}, 2.0, "any")


def test_names_reach_the_terminal_as_text(rmctl: Any, fake: FakeClient) -> None:
    fake.queue_views = [queue(HOSTILE, nominal={HOSTILE: 1.0})]
    fake.warnings = [HOSTILE]
    out = rmctl("queues").out
    assert "\x1b" not in out
    assert "[red]x[/red]" in out


def test_apply_sends_the_text_and_says_what_it_does(rmctl: Any, fake: FakeClient, tmp_path: Path) -> None:
    file = tmp_path / "rm.yaml"
    file.write_text("queues: {a: }\n")
    fake.warnings = ["queues.a.lend_limit: 6 is more than the 4 that a owns"]
    fake.consequences = ["queue b will be gone: 1 job (j2) waits until it is back"]
    ran = rmctl("apply", "-f", str(file))
    assert ran.code == 0
    assert ran.out == "queue b will be gone: 1 job (j2) waits until it is back\n"
    assert ran.err == "warning: queues.a.lend_limit: 6 is more than the 4 that a owns\napplied\n"
    assert fake.applied == [("queues: {a: }\n", False, False)]


def test_a_dry_run_applies_nothing(rmctl: Any, fake: FakeClient, tmp_path: Path) -> None:
    file = tmp_path / "rm.yaml"
    file.write_text("order: fifo")
    ran = rmctl("apply", "-f", str(file), "--dry-run")
    assert fake.applied == [("order: fifo", True, False)]
    assert ran.err == "no live job is affected\nnot applied: this was a dry run\n"
    assert rmctl("apply", "--file", str(file), "--dry-run", "--json").json == {
        "applied": False, "warnings": [], "consequences": [],
    }  # fmt: skip


def test_apply_from_stdin(rmctl: Any, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("admins: [müller]".encode())))
    assert rmctl("apply", "-f", "-").code == 0
    assert fake.applied == [("admins: [müller]", False, False)]
    assert rmctl("apply", "--force", "-f", "-").code == 0
    assert fake.applied[1:] == [("", False, True)], "read once"


def test_apply_of_what_is_no_file(rmctl: Any, fake: FakeClient, tmp_path: Path) -> None:
    ran = rmctl("apply", "-f", str(tmp_path / "none.yaml"))
    assert (ran.code, fake.applied) == (2, [])
    assert "none.yaml: No such file or directory" in ran.err
    (tmp_path / "bad.yaml").write_bytes(b"a: 1\nb: \xff\n")
    ran = rmctl("apply", "-f", str(tmp_path / "bad.yaml"))
    assert "line 2 is not UTF-8" in ran.err
    assert rmctl("apply").code == 2
