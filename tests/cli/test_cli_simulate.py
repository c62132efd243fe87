"""`rmctl simulate` and `rmctl trace convert`: no cluster, no Ray."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from rm.cli.simulate import progress_bar
from rm.sim.trace import TraceJob, read_trace

KEYS = [
    "policy", "mean_jct_s", "median_jct_s", "p95_jct_s", "p99_jct_s", "mean_queue_s", "median_queue_s", "p95_queue_s",
    "p99_queue_s", "max_queue_s", "makespan_s", "utilisation", "worst_ftr", "mean_ftr", "jain", "preemptions",
    "gpu_seconds_lost", "node_hours", "jobs",
]  # fmt: skip


def test_policies_side_by_side(rmctl: Any, trace: Path) -> None:
    ran = rmctl("simulate", str(trace), "--nodes", "2", "--policy", "fifo", "-p", "sjf+skip", "-p", "fifo")
    assert ran.code == 0
    assert ran.out.splitlines()[0].split() == ["fifo", "sjf+skip"]
    assert "80 jobs on 16 GPUs" in ran.err


def test_one_object_per_policy(rmctl: Any, trace: Path) -> None:
    policies = ["fifo", "sjf", "srtf", "tiresias", "fifo+skip", "sjf+skip"]
    ran = rmctl(
        "simulate",
        str(trace),
        "--nodes",
        "3",
        "--json",
        *(word for name in policies for word in ("-p", name)),
    )
    assert [row["policy"] for row in ran.json] == policies
    assert ran.err == ""
    for row in ran.json:
        assert list(row) == KEYS
        assert row["jobs"] == 80
        assert 0 < row["utilisation"] <= 1
        assert 0 < row["jain"] <= 1
        assert row["median_queue_s"] <= row["p95_queue_s"] <= row["p99_queue_s"] <= row["max_queue_s"]
        assert row["node_hours"] == 0


def test_queues_with_nodes_of_their_own(rmctl: Any, trace: Path) -> None:
    ran = rmctl("simulate", str(trace), "--nodes", "a=1,b=4", "--gpus-per-node", "8", "--json")
    assert ran.code == 0
    assert ran.json[0]["jobs"] == 80


@pytest.mark.parametrize(("words", "says"), [
    (["--nodes", "1"], "job j3 needs 16 GPUs, the cluster has 8"),
    (["--nodes", "a=4"], "queue 'b' of job j1 has no nodes"),
    (["--nodes", "many"], "nodes: 'many' is no count of nodes"),
    (["--nodes", "2", "-p", "best"], "policy: 'best' is not known; there are fifo, sjf,"),
    (["--nodes", "2", "--plot", "p.nonsense"], "its name must end in ."),
    (["--nodes", "2", "--plot", "none/p.png"], "there is no directory none"),
])  # fmt: skip
def test_what_can_not_be_meant(
    rmctl: Any, trace: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace.parent)
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    ran = rmctl("simulate", str(trace), *words)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert ran.err.count("\n") == 1


def test_a_picture(rmctl: Any, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = rmctl(
        "simulate", str(trace), "--nodes", "2", "-p", "fifo", "-p", "srtf", "--plot", str(tmp_path / "p.png")
    )
    assert ran.code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(
    rmctl: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = rmctl("simulate", str(trace), "--nodes", "2", "--plot", "p.png")
    assert ran.code == 2
    assert "pip install 'ray-rm[sim]'" in ran.err


def test_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", screen)
        with progress_bar("fifo", 128) as progress:
            for ended in range(1, 129):
                progress(ended)
        assert ("fifo" in screen.getvalue()) == shown


def test_convert(rmctl: Any, tmp_path: Path) -> None:
    given, made = tmp_path / "log.swf", tmp_path / "trace.csv"
    given.write_text(
        "1 50 10 100 8 -1 -1 16 3600 -1 1 3 1 -1 2 1 -1 -1\n2 50 -1 -1 8 -1 -1 16 -1 -1 5 3 1 -1 2 1 -1 -1\n"
    )
    ran = rmctl("trace", "convert", "--from", "swf", str(given), str(made))
    assert (ran.code, ran.out) == (0, "")
    assert "1 job in" in ran.err
    assert "left out: 1 never ran" in ran.err
    assert read_trace(made) == [TraceJob("1", 0, 100, 16, None, "u3", "q2", "", "COMPLETED")]
    ran = rmctl("trace", "convert", "--from", "swf", str(given), str(made), "--json")
    assert ran.json == {"jobs": 1, "dropped": {"never ran": 1}, "path": str(made)}
    assert rmctl("trace", "convert", "--from", "swf", str(given), str(given)).code == 2
    assert rmctl("trace", "convert", "--from", "swf", str(tmp_path / "none"), str(made)).code == 2
