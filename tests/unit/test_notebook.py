"""What a notebook shows: tables in which nothing that users wrote is markup."""

from __future__ import annotations

from rm.client import NodeList
from rm.views import NodeView


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
