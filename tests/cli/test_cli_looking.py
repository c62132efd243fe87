"""What the listing commands print: for people, for pipes, and as JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_client import HOSTILE, FakeClient, event, node, view

WAITS = {
    "code": "WaitingForCapacity",
    "message": "needs 2 GPUs, 0 are free",
    "evidence": {"needed_gpus": 2, "free_gpus": 0},
    "advice": "it starts as soon as running jobs release enough",
}
FAILED = {
    "status": "FAILED",
    "message": "rank 0 exited with code 3",
    "exit_code": 3,
    "tail": ["boom", "bang"],
}


# --- ls ------------------------------------------------------------------------------------------------------


def test_ls_shows_who_waits_and_why(rmctl: Any, fake: FakeClient) -> None:
    fake.add(
        view("j2", "QUEUED", reason=WAITS),
        view("j1", progress={"at": 0, "metrics": {"step": 5, "total": 10, "loss": 0.25}}, nodes=("gpu-1",)),
        view("j0", "SUCCEEDED"),
    )
    ran = rmctl("ls")
    header, second, first = ran.out.splitlines()
    assert header.split() == ["ID", "NAME", "OWNER", "STATUS", "GPUS", "TIME", "NOTE"]
    assert "WaitingForCapacity: needs 2 GPUs, 0 are free" in second
    assert "5/10 loss 0.25, on gpu-1" in first
    assert ran.err == ""


def test_durations_are_counted_by_the_clock_of_the_allocator(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", as_of=1_700_000_070.0), view("j2", "QUEUED", as_of=1_700_000_070.0))
    out = rmctl("ls").out
    assert "runs 1 min 00 s" in out
    assert "waits 1 min 10 s" in out
    assert "runs 1 min 00 s" in rmctl("show", "j1").out


def test_ls_all_mine_and_owner(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1"), view("j2", "FAILED", outcome=FAILED, owner="bob"))
    assert "j2" not in rmctl("ls").out
    assert "rank 0 exited with code 3" in rmctl("ls", "--all").out
    assert "j2" not in rmctl("ls", "--all", "--mine").out
    assert "j1" not in rmctl("ls", "--all", "--owner", "bob").out


def test_ls_of_nothing_says_what_to_do_next(rmctl: Any, fake: FakeClient) -> None:
    fake.node_views = [node("a", 4, charged=1)]
    ran = rmctl("ls")
    assert (ran.code, ran.out) == (0, "")
    assert "3 of 4 GPUs are free" in ran.err
    assert "rmctl run -g 1 -- python train.py" in ran.err
    assert rmctl("ls", "--json").json == []


def test_ls_says_when_it_left_some_out(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1"), view("j2"))
    assert "--limit" in rmctl("ls", "--limit", "2").err


def test_nothing_is_cut_off_in_a_pipe(rmctl: Any, fake: FakeClient) -> None:
    long = "why " * 200
    fake.add(view("j1", "QUEUED", reason={**WAITS, "message": long}))
    (line,) = rmctl("ls").out.splitlines()[1:]
    assert long.strip() in line
    assert "\x1b" not in line, "no colours"


def test_ls_watch_and_json_exclude_each_other(rmctl: Any, fake: FakeClient) -> None:
    assert rmctl("ls", "--watch", "--json").code == 2


def test_ls_watch_prints_changes_until_interrupted(
    rmctl: Any, fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(view("j1", "QUEUED"))
    turns = iter(["RUNNING", "RUNNING", None])

    def next_turn(_seconds: float) -> None:
        status = next(turns)
        if status is None:
            raise KeyboardInterrupt
        fake.add(view("j1", status))

    monkeypatch.setattr("rm.cli.looking.time.sleep", next_turn)
    ran = rmctl("ls", "--watch")
    assert ran.code == 0
    assert ran.out.count("ID") == 2, "once for each change"


# --- what users wrote --------------------------------------------------------------------------------------


def test_nothing_that_users_wrote_reaches_the_terminal_unescaped(rmctl: Any, fake: FakeClient) -> None:
    reason = {**WAITS, "message": HOSTILE, "advice": HOSTILE, "evidence": {HOSTILE: HOSTILE}}
    outcome = {**FAILED, "message": HOSTILE, "tail": [HOSTILE]}
    told = {"name": HOSTILE, "owner": HOSTILE, "command": HOSTILE, "nodes": (HOSTILE,)}
    fake.add(
        view("j1", progress={"metrics": {HOSTILE: HOSTILE}}, **told),
        view("j2", "QUEUED", reason=reason, **told),
        view("j3", "FAILED", outcome=outcome, **told),
    )
    fake.reasons["j2"] = reason
    fake.node_views = [node(HOSTILE, 2, gpu_type=HOSTILE, jobs=(HOSTILE,))]
    fake.event_views = [
        event(1, "JobSubmitted", body={"name": HOSTILE, "owner": HOSTILE}),
        event(2, "RunLost", body={"why": HOSTILE}),
        event(3, "RunStarted", body={"hosts": [HOSTILE], "gpu_ids": [[HOSTILE]]}),
    ]
    for words in (
        ["ls", "--all"], ["show", "1"], ["show", "2"], ["show", "3"], ["why", "2"], ["wait", "3"], ["nodes"],
        ["events"], ["events", "1"], ["cancel", "2"],
    ):  # fmt: skip
        ran = rmctl(*words)
        shown = ran.out + ran.err
        assert "[red]x[/red]" in shown or words[0] == "cancel", f"{words}: markup is shown as it was written"
        assert all(each.isprintable() or each == "\n" for each in shown), (words, shown)


def test_json_is_ascii_and_faithful(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", name=HOSTILE, progress={"metrics": {"loss": float("nan")}}))
    ran = rmctl("ls", "--json")
    assert ran.out.isascii()
    assert ran.json[0]["name"] == HOSTILE
    assert ran.json[0]["progress"] == {"metrics": {"loss": "nan"}}


def test_a_hostile_id_in_an_error_is_escaped(rmctl: Any, fake: FakeClient) -> None:
    ran = rmctl("show", HOSTILE)
    assert ran.code == 2
    assert "\x1b" not in ran.err
    assert len(ran.err.splitlines()) == 1


# --- show, why, events -------------------------------------------------------------------------------------


def test_show_tells_state_outcome_tail_and_history(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", "FAILED", outcome=FAILED, attempts=2, failures=2, gpu_types=("A100",)))
    fake.event_views = [
        event(1, "JobSubmitted", body={"name": "t", "owner": "ada", "gang": {"bundle": {"gpu_units": 20000}}}),
        event(2, "JobAdmitted", at=1.5, attempt=1, body={"placed": [{"node_id": "n"}]}, free_after=0, charged_after=2),
    ]  # fmt: skip
    ran = rmctl("show", "1")
    for words in (
        "FAILED",
        "rank 0 exited with code 3",
        "2 A100",
        "python train.py",
        "bang",
        "1.500 s",
        "2 → 0",
    ):
        assert words in ran.out
    shown = rmctl("show", "j1", "--json").json
    assert shown["outcome"]["tail"] == ["boom", "bang"]
    assert [each["kind"] for each in shown["events"]] == ["JobSubmitted", "JobAdmitted"]


def test_the_history_names_the_job_only_where_there_are_several(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1"), view("j2"))
    fake.event_views = [event(1, "JobSubmitted"), event(2, "JobAdmitted", attempt=1)]
    assert rmctl("events").out.split()[:4] == ["TIME", "AFTER", "EVENT", "FREE"]
    fake.event_views += [event(3, "JobAdmitted", attempt=2)]
    assert "j1.2" in rmctl("show", "1").out, "several attempts are told apart"
    fake.event_views = [event(1, "JobSubmitted"), event(2, "JobSubmitted", job_id="j2")]
    assert rmctl("events").out.split()[:4] == ["TIME", "AFTER", "EVENT", "JOB"]


def test_why_gives_sentence_evidence_and_advice(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", "QUEUED"))
    fake.reasons["j1"] = WAITS
    ran = rmctl("why", "1")
    assert ran.out.splitlines()[0] == "WaitingForCapacity: needs 2 GPUs, 0 are free"
    assert "needed_gpus" in ran.out
    assert ran.out.splitlines()[-1] == WAITS["advice"]
    assert rmctl("why", "1", "--json").json == WAITS


START = {
    "p50_s": 240.0, "p90_s": 900.0, "basis": "", "gpu_type": None, "nodes": (), "new_nodes": ("g5.12xlarge",),
    "price": 5.672, "wait_s": 720.0, "wait_nodes": ("a100-1",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("forecast", "said"),
    [
        (
            START,
            (
                "it will start in about 4 min on a new g5.12xlarge (5.672 an hour), 15 min in the worst of ten cases; "
                "without it in about 12 min on a100-1 (estimated)"
            ),
        ),
        (
            {**START, "wait_s": None, "price": None, "p90_s": None},
            "it will start in about 4 min on a new g5.12xlarge, later than can be told (estimated)",
        ),
        (
            {
                **START,
                "new_nodes": (),
                "price": None,
                "wait_s": None,
                "nodes": ("n1", "n2"),
                "gpu_type": "A100",
            },
            "it will start on A100 in about 4 min on n1 and n2, 15 min in the worst of ten cases (estimated)",
        ),
        (
            {**START, "new_nodes": ("a8", "a8"), "nodes": ("n1", "n2", "n3", "n4", "n5"), "wait_s": None},
            (
                "it will start in about 4 min on n1, n2, n3, 2 more and 2 new a8 (5.672 an hour), "
                "15 min in the worst of ten cases (estimated)"
            ),
        ),
        ({"p50_s": None, "p90_s": None, "basis": "too many ask"}, "no estimate of its start: too many ask"),
    ],
)
def test_an_estimate_says_when_where_and_at_what_price(rmctl, fake, forecast, said) -> None:
    fake.add(view("j1", "QUEUED"))
    fake.reasons["j1"] = {**WAITS, "start": forecast}
    assert rmctl("why", "1").out.splitlines()[-1] == said
    shown = " ".join(rmctl("show", "1").out.split())
    assert (said in shown) == (forecast["p50_s"] is not None), "nothing is said where there is no basis"


def test_events_are_read_to_the_end(rmctl: Any, fake: FakeClient) -> None:
    fake.event_views = [event(seq, "JobSubmitted") for seq in range(1, 2502)]
    assert len(rmctl("events", "--json").json) == 2501
    assert [each["seq"] for each in rmctl("events", "--after", "2400", "--limit", "2", "--json").json] == [
        2401,
        2402,
    ]
    assert len(rmctl("events").out.splitlines()) == 2502


# --- nodes -------------------------------------------------------------------------------------------------


def test_nodes_shows_whose_the_gpus_are(rmctl: Any, fake: FakeClient) -> None:
    fake.node_views = [
        node("big", 8, charged=4, foreign=2, gpu_type="H100", jobs=("j1", "j2")),
        node("huge", 64, charged=32),
        node("head", 0),
    ]
    header, big, huge, head = rmctl("nodes").out.splitlines()
    assert header.split() == ["NODE", "TYPE", "GPUS", "RM", "OTHERS", "FREE", "CPUS", "MEMORY", "JOBS"]
    assert big.split()[:7] == ["big", "H100", "8", "████▒▒░░", "4", "2", "2"]
    assert big.endswith("j1, j2")
    assert "████████░░░░░░░░ " in huge
    assert head.split()[:3] == ["head", "–", "0"]
    assert rmctl("nodes", "--json").json[0]["foreign_gpus"] == 2


# --- logs --------------------------------------------------------------------------------------------------


def test_logs_are_printed_as_they_were(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", "SUCCEEDED", ranks=2))
    fake.output = {
        (0, "out"): b"\x1b[32mgreen\x1b[0m [red]\n",
        (0, "err"): b"warning\n",
        (1, "out"): b"other\n",
    }
    assert rmctl("logs", "1", "--rank", "0", "--stdout").out == "\x1b[32mgreen\x1b[0m [red]\n"
    assert rmctl("logs", "1", "--stderr").out == "[rank 0] warning\n"
    assert rmctl("logs", "-f", "1", "--stdout").out.splitlines()[1] == "[rank 1] other"


def test_logs_of_a_silent_job_say_so_beside_stdout(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", "QUEUED"))
    ran = rmctl("logs", "1")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == "j1 has printed nothing yet: it is QUEUED\n"
    fake.add(view("j1", "SUCCEEDED"))
    fake.output = {(0, "out"): b""}
    assert rmctl("logs", "1").err == "j1 has printed nothing: it is SUCCEEDED\n"


def test_logs_that_were_removed_are_told_of_with_the_setting(rmctl: Any, fake: FakeClient) -> None:
    ended = view("j1", "SUCCEEDED", started_at=0.0, ended_at=100.0)
    day_s = 86_400
    for words in (("logs", "1"), ("logs", "-f", "1")):
        fake.add(replace(ended, as_of=100.0 + 40 * day_s))
        ran = rmctl(*words)
        assert (ran.code, ran.out) == (0, "")
        assert ran.err == (
            "the logs of j1 were removed: they are kept for 30 days (RM_STORE_KEEP_DAYS), and it ended 40 days ago\n"
        )
    fake.add(replace(ended, as_of=100.0 + 2 * day_s))
    assert "may take 50 GiB (RM_STORE_KEEP_BYTES)" in rmctl("logs", "1").err
    nothing = "j1 has printed nothing: it is SUCCEEDED\n"
    fake.add(replace(ended, as_of=100.0 + 3500))
    assert rmctl("logs", "1").err == nothing, "nothing is removed within the hour"
    fake.add(replace(ended, as_of=100.0 + 40 * day_s))
    fake.output = {(0, "out"): b""}
    assert rmctl("logs", "1").err == nothing, "an empty log is kept as one"
    fake.output = {}
    fake.add(replace(ended, as_of=100.0 + 40 * day_s, started_at=None))
    assert rmctl("logs", "1").err == nothing, "it never ran"


def test_logs_of_a_rank_that_there_is_not(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", ranks=2))
    ran = rmctl("logs", "1", "--rank", "2")
    assert (ran.code, ran.err) == (2, "error: rank: j1 has no rank 2; they go from 0 to 1\n")
    fake.add(view("j1", ranks=1))
    assert "it has one process, rank 0" in rmctl("logs", "1", "--rank", "2").err


# --- cancel and wait ---------------------------------------------------------------------------------------


def test_cancel_goes_on_after_an_unknown_id(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1"), view("j3"))
    ran = rmctl("cancel", "1", "2", "3", "3", "--wait")
    assert ran.code == 2
    assert ran.err.startswith("error: no job 'j2'")
    assert ran.out.split() == ["j1", "CANCELLED", "j3", "CANCELLED"]


def test_all_jobs_of_somebody_are_cancelled_at_once(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", owner="bob"), view("j2", owner="ada"), view("j3", owner="bob"))
    ran = rmctl("cancel", "--all-of", "bob")
    assert (ran.code, ran.out) == (0, "2 jobs of bob were told to end\n")
    assert [each.status for each in fake.views.values()] == ["CANCELLED", "RUNNING", "CANCELLED"]
    assert rmctl("cancel", "--all-of", "eve", "--json").json == {"owner": "eve", "cancelled": 0}
    for words in ((), ("1", "--all-of", "bob"), ("--all-of", "bob", "--wait")):
        ran = rmctl("cancel", *words)
        assert ran.code == 2
        assert "--all-of" in ran.err or "--wait" in ran.err


@pytest.mark.parametrize(
    ("status", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 1), ("TIMED_OUT", 1)]
)
def test_wait_succeeds_only_if_all_did(rmctl: Any, fake: FakeClient, status: str, code: int) -> None:
    fake.add(view("j1", "SUCCEEDED"), view("j2", status))
    assert rmctl("wait", "1", "2").code == code
    ran = rmctl("wait", "1", "2", "--json")
    assert (ran.code, [each["status"] for each in ran.json]) == (code, ["SUCCEEDED", status])


def test_wait_gives_up_in_time(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1"))
    ran = rmctl("wait", "1", "--timeout", "0")
    assert ran.code == 2
    assert "still RUNNING" in ran.err


# --- queues, arrays, holds -----------------------------------------------------------------------------------


def test_hold_and_release(rmctl: Any, fake: FakeClient) -> None:
    fake.add(view("j1", "QUEUED"), view("j2", "QUEUED"))
    assert rmctl("hold", "1", "j2").code == 0
    assert [each.held_by for each in fake.views.values()] == ["ada", "ada"]
    assert rmctl("release", "j1", "j9").code == 2, "the wrong id is named and the others are done"
    assert [each.held for each in fake.views.values()] == [False, True]


def test_show_says_what_matters_for_the_order(rmctl: Any, fake: FakeClient) -> None:
    fake.add(
        view(
            "j5", "QUEUED", queue="lab/a", priority=100, attempts=2, evictions=1, held=True, held_by="eve",
            after=("j1", "j2"), min_runtime_s=600.0, bundles=4, least_bundles=2, gpus=8,
        ),
        view("j6", preemptible=False, bundles=4, least_bundles=2, gpus=8, held_gpus=4, checkpoint_at=1_700_000_050.0),
    )  # fmt: skip
    waits = rmctl("show", "j5").out
    for part in (
        "lab/a, priority 100", "eve", "j1, j2", "8 (2 to 4 × 2)", "1 evicted for others", "in its first 10 min 00 s"
    ):  # fmt: skip
        assert part in waits, part
    runs = rmctl("show", "j6").out
    for part in ("4 GPUs", "it is never stopped for others", "checkpoint"):
        assert part in runs, part
    assert rmctl("show", "j5", "--json").json["evictions"] == 1


def test_an_array_is_listed_by_its_id(rmctl: Any, fake: FakeClient) -> None:
    counts = {"QUEUED": 1, "SUCCEEDED": 1}
    fake.add(
        view("j1_0", "SUCCEEDED", array="j1", array_index=0),
        view("j1_1", "QUEUED", array="j1", array_index=1),
        view("j2"),
        view("j1", "QUEUED", array="j1", array_counts=counts),
    )
    assert [each["id"] for each in rmctl("ls", "j1", "--json").json] == ["j1_0", "j1_1"]
    assert [each["id"] for each in rmctl("ls", "2", "--json").json] == ["j2"]
    assert "2 jobs: 1 QUEUED, 1 SUCCEEDED" in rmctl("show", "1").out
    assert "number 1 of j1" in rmctl("show", "1_1").out
    ran = rmctl("logs", "j1")
    assert ran.code == 2
    assert "j1_0 to j1_1" in ran.err


def test_events_of_holds_and_policies_are_sentences(rmctl: Any, fake: FakeClient) -> None:
    fake.event_views = [
        event(1, "HoldChanged", body={"held": True, "by": "eve"}),
        event(2, "HoldChanged", body={"held": False, "by": ""}),
        event(3, "PolicyChanged", None, body={"policy": {"queues": {"a": {}, "b": {}}}, "by": "root"}),
        event(4, "StopRequested", body={"cause": "preempted", "by": "j7"}),
    ]
    out = rmctl("events").out
    for part in ("held by eve", "released", "2 queues by root", "preempted by j7"):
        assert part in out
