"""`rmctl audit`: what it says of agreement and of findings, and its exit code."""

from __future__ import annotations

from typing import Any

from fake_client import HOSTILE, FakeClient

from rm.views import AuditView, FindingView

COUNTS = {"attempts": 12, "groups": 12, "runners": 30, "nodes": 1, "drivers": 0}


def audit(*findings: FindingView, **fields: Any) -> AuditView:
    return AuditView(
        **{"at": 1_700_000_000.0, "took_s": 0.01, "checked": COUNTS, "findings": findings, **fields}
    )


def finding(**fields: Any) -> FindingView:
    values = {
        "at": 1_700_000_000.0, "kind": "lost_group", "what": "j17.1", "message": "j17.1: its placement group is gone",
        "evidence": {"state": "REMOVED"}, "repair": "attempt 1 of j17 ended as lost", "repaired": True,
    }  # fmt: skip
    return FindingView(**{**values, **fields})


def test_agreement_is_one_line(rmctl: Any, fake: FakeClient) -> None:
    fake.audits = [audit(not_checked=("GPU memory on a not checked: no NVML",))]
    ran = rmctl("audit")
    assert ran.code == 0
    assert ran.out == "ledger and Ray agree: 12 attempts, 12 groups, 30 runners, 1 node\n"
    assert ran.err == "GPU memory on a not checked: no NVML\n"
    assert fake.audits_asked == [True]
    fake.audits = [audit(checked={**COUNTS, "nodes": 2, "drivers": 2})]
    assert rmctl("audit").out == (
        "ledger, Ray and the GPUs' drivers agree: 12 attempts, 12 groups, 30 runners, 2 nodes, 2 drivers\n"
    )


def test_what_was_repaired_is_no_failure(rmctl: Any, fake: FakeClient) -> None:
    fake.audits = [audit(finding())]
    ran = rmctl("audit")
    assert ran.code == 0
    assert "lost_group" in ran.out
    assert "attempt 1 of j17 ended as lost" in ran.out
    assert "agree" not in ran.out


def test_what_was_not_repaired_is(rmctl: Any, fake: FakeClient) -> None:
    bad = finding(kind="charges", repair="reported only", repaired=False, message=HOSTILE)
    fake.audits = [audit(finding(), bad), audit(finding(), bad)]
    ran = rmctl("audit")
    assert ran.code == 1
    assert "\x1b" not in ran.out
    shown = rmctl("audit", "--json")
    assert shown.code == 1
    assert [each["repaired"] for each in shown.json["findings"]] == [True, False]
    assert shown.json["checked"] == COUNTS


def test_the_last_audit_can_be_read_without_another(rmctl: Any, fake: FakeClient) -> None:
    fake.audits = [audit(recent=(finding(),)), audit()]
    ran = rmctl("audit", "--last")
    assert "j17.1: its placement group is gone" in ran.out
    assert "ledger and Ray agree" in ran.err
    assert rmctl("audit", "--last").out == ""
    assert fake.audits_asked == [False, False]
