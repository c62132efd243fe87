"""`rmctl scale`: what is asked of the autoscaler."""

from __future__ import annotations

import json
from typing import Any

from fake_client import HOSTILE, FakeClient

SCALE: dict[str, Any] = {
    "at": 1_000.0,
    "types": {
        "a100": {"gpus": 8, "gpu_type": "A100", "up": 2, "booting": 1, "wanted": 1, "most": 4, "price": 12.5,
                 "failed": None},
        "h100": {"gpus": 8, "gpu_type": "H100", "up": 0, "booting": 0, "wanted": 0, "most": 2, "price": None,
                 "failed": {"message": HOSTILE, "until": 1_041.0, "in_a_row": 1}},
    },
    "most_in_all": None,
    "asks": [{"node_types": ["a100"], "jobs": ["j7", "j8"]}],
    "price": 25.0,
    "price_wanted": 12.5,
}  # fmt: skip


def test_scale_says_what_is_wanted_for_whom_and_what_failed(rmctl: Any, fake: FakeClient) -> None:
    fake.on_scale = lambda: SCALE  # type: ignore[attr-defined]
    ran = rmctl("scale")
    head, wanted, failed, cost = ran.out.splitlines()
    assert head.split() == [
        "NODE",
        "TYPE",
        "TYPE",
        "GPUS",
        "UP",
        "BOOTING",
        "WANTED",
        "MOST",
        "PRICE",
        "FOR",
        "NOTE",
    ]
    assert wanted.split() == ["a100", "A100", "8", "2", "1", "1", "4", "12.5", "j7,", "j8"]
    assert failed.startswith("h100")
    assert "failed, again in 41.0 s: " in failed
    assert "\x1b" not in ran.out
    assert cost == "25 an hour for what is up, 12.5 for what is wanted besides"
    assert json.loads(rmctl("scale", "--json").out) == SCALE


def test_without_an_autoscaler_it_says_how_one_becomes_known(rmctl: Any, fake: FakeClient) -> None:
    fake.on_scale = lambda: {**SCALE, "types": {}}  # type: ignore[attr-defined]
    ran = rmctl("scale")
    assert ran.out == ""
    assert "RM_AUTOSCALING_CONFIG" in ran.err
