"""What a notebook shows: tables in which nothing that users wrote is markup."""

from __future__ import annotations

import re
from html import unescape

import pytest

from rm.client import NodeList
from rm.notebook import job_card, jobs_table
from rm.views import JobView, NodeView


def test_nodes_are_a_table() -> None:
    fields = {
        "id": "ab",
        "gpu_type": "<i>",
        "gpus": 4,
        "charged_gpus": 0.5,
        "foreign_gpus": 1,
        "free_gpus": 2.5,
    }
    node = NodeView(name="<b>n", cpus=8, memory_bytes=2**35, jobs=("j1", "j2"), **fields)
    shown = NodeList([node])._repr_html_()
    cells = [each.split("</td>")[0] for each in shown.split("<td>")[1:]]
    assert cells == ["&lt;b&gt;n", "&lt;i&gt;", "4", "0.5", "1", "2.5", "j1, j2", "ready"]
    assert NodeList([])._repr_html_().count("<tr>") == 1


HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> \u202egnp.exe \x1b]0;gotcha\x07 \u2066 &amp;"
)


@pytest.mark.parametrize("status", ["QUEUED", "RUNNING", "FAILED"])
def test_nothing_that_anybody_wrote_is_markup_or_turns_the_text_around(status: str) -> None:
    view = JobView(
        id="j1", name=HOSTILE, owner=HOSTILE, kind="command", queue=HOSTILE, priority=0, status=status, gpus=1,
        bundles=1, gpus_per_bundle=1, ranks=1, gpu_types=(HOSTILE,), attempts=1, failures=0, infra_failures=0,
        submitted_at=0.0, started_at=None, ended_at=1.0, time_limit_s=None, nodes=(HOSTILE,), command=HOSTILE,
        outcome={"message": HOSTILE, "tail": [HOSTILE, "second"]},
        progress={"metrics": {"step": 1, "total": 2, HOSTILE: HOSTILE}},
    )  # fmt: skip
    for shown in (job_card(view, HOSTILE), jobs_table([view])):
        tags = set(re.findall(r"<\s*/?\s*([a-zA-Z]+)", shown))
        assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "b", "pre", "progress"}
        assert not re.search(r"<[^>]*onerror", shown)
        assert unescape(shown).replace("\n", "").isprintable()
        assert "\\u202egnp.exe" in shown, "it is shown as what it is"
    assert "second</pre>" in job_card(view), "lines stay lines"
