"""From words on a command line to the request that the allocator gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_client import FakeClient

from rm.core.model import Kind, Strategy


def test_every_option_arrives_in_the_request(
    rmctl: Any, fake: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("pass")
    monkeypatch.setenv("FROM_HERE", "there")
    ran = rmctl(
        "submit", "--nodes", "2", "--gpus-per-node", "4", "--name", "big", "--gpu-type", "A100,H100",
        "--cpus-per-gpu", "2.5", "--memory-per-gpu", "16GiB", "--strategy", "spread", "--nproc-per-node", "gpu",
        "--time-limit", "90m", "--grace", "5s", "--priority", "high", "--queue", "default", "--max-retries", "2",
        "--max-infra-retries", "0", "--env", "A=1=2", "-e", "FROM_HERE", "--env", "EMPTY=", "--label", "zone=a",
        "--pip", "numpy<3", "--working-dir", str(tmp_path), "--min-nodes", "1", "--after", "j7,8_1", "--array", "3",
        "--hold", "--no-preempt", "--min-runtime", "10m", "--", "python", "a.py", "--lr", "0.1", "-g", "7",
    )  # fmt: skip
    assert (ran.code, ran.out) == (0, "j1\n")
    (spec,) = fake.submitted
    needs = spec.resources
    assert (needs.num_gpus, needs.nodes, needs.gpus_per_node) == (None, 2, 4)
    assert (needs.gpu_type, needs.cpus_per_gpu, needs.memory_per_gpu) == (("A100", "H100"), 2.5, 16 * 2**30)
    assert (needs.strategy, needs.labels) == (Strategy.SPREAD, {"zone": "a"})
    assert (spec.kind, spec.command) == (Kind.COMMAND, ("python", "a.py", "--lr", "0.1", "-g", "7"))
    assert (spec.name, spec.owner, spec.queue, spec.priority) == ("big", "ada", "default", 100)
    assert (spec.nproc_per_node, spec.time_limit_s, spec.grace_s) == ("gpu", 5400, 5)
    assert (spec.max_retries, spec.max_infra_retries, spec.ttl_s) == (2, 0, None)
    assert spec.env == {"A": "1=2", "FROM_HERE": "there", "EMPTY": ""}
    assert spec.runtime_env == {"pip": ["numpy<3"]}
    assert spec.working_dir_sha256
    assert (needs.min_nodes, spec.after, spec.array, spec.hold) == (1, ("j7", "j8_1"), 3, True)
    assert (spec.preemptible, spec.min_runtime_s) == (False, 600)


def test_the_command_needs_no_dashes_and_keeps_its_own_options(rmctl: Any, fake: FakeClient) -> None:
    assert rmctl("submit", "-g", "0.5", "python", "train.py", "--name", "its own").code == 0
    assert fake.submitted[0].command == ("python", "train.py", "--name", "its own")
    assert fake.submitted[0].resources.num_gpus == 0.5


def test_one_word_is_a_shell_command_line(rmctl: Any, fake: FakeClient) -> None:
    assert rmctl("submit", "-g", "1", "a && b > c").code == 0
    assert fake.submitted[0].command == ("bash", "-c", "a && b > c")


def test_submit_starts_an_allocator_and_looking_does_not(rmctl: Any, fake: FakeClient) -> None:
    rmctl("--address", "127.0.0.1:1", "submit", "-g", "1", "x")
    rmctl("ls")
    assert fake.connected == [("127.0.0.1:1", True), (None, False)]


def test_submit_as_json(rmctl: Any, fake: FakeClient) -> None:
    ran = rmctl("submit", "-g", "1", "--json", "x")
    assert ran.json == {"id": "j1"}
    assert ran.err == ""


def test_submit_tells_a_person_when_it_will_start(
    rmctl: Any, fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {"p50_s": 240.0, "p90_s": 300.0, "basis": "", "new_nodes": ("g5.12xlarge",)}
    fake.reasons["j1"] = {"code": "NodeBooting", "message": "", "start": start}
    assert rmctl("submit", "-g", "1", "x").err == "", "a program is told nothing but the id"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    ran = rmctl("submit", "-g", "1", "x")
    assert (ran.out, ran.err.splitlines()[0]) == (
        "j1\n",
        "j1: it will start in about 4 min on a new g5.12xlarge, 5 min in the worst of ten cases (estimated)",
    )
    fake.reasons["j1"]["start"] = {"p50_s": None, "p90_s": None, "basis": "nothing is known"}
    assert rmctl("submit", "-g", "1", "x").err == "follow it with: rmctl logs -f j1\n"


def test_requirements_files_are_read_here(rmctl: Any, fake: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("# ours\nnumpy<3\n\n  rich\n")
    rmctl("submit", "-g", "1", "--pip", str(tmp_path / "requirements.txt"), "--pip", "six", "x")
    assert fake.submitted[0].runtime_env == {"pip": ["numpy<3", "rich", "six"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x",), "how many GPUs"),
        (("-g", "two", "x"), "num_gpus: must be a number of GPUs, not 'two'"),
        (("-g", "1.5", "x"), "whole number"),
        (("-g", "-1", "x"), "more than 0"),
        (("-g", "nan", "x"), "more than 0"),
        (("-g", "inf", "x"), "at most"),
        (("-g", "1", "--gpus-per-node", "1", "x"), "not both"),
        (("-g", "1", "--env", "RM_SURELY_NOT_SET", "x"), "--env RM_SURELY_NOT_SET=VALUE"),
        (("-g", "1", "--env", "=1", "x"), "KEY=VALUE"),
        (("-g", "1", "--label", "zone", "x"), "label: must be KEY=VALUE"),
        (("-g", "1", "--time-limit", "soon", "x"), "time_limit: must be a duration"),
        (("-g", "1", "--strategy", "TIGHT", "x"), "STRICT_PACK"),
        (("-g", "1", "--priority", "urgent", "x"), "low, normal, high"),
        (("-g", "1", "--after", "yesterday", "x"), "after: must be job ids such as 'j17', not 'yesterday'"),
        (("-g", "1", "--array", "0", "x"), "array: must be from 1 to 5000, not 0"),
        (("-g", "1", "--min-nodes", "1", "x"), "min_nodes=1 needs a nodes="),
        (("-g", "1", "--min-runtime", "a bit", "x"), "min_runtime: must be a duration"),
        (("-g", "1", "--queue", "a b", "x"), "queue: must be a queue's name"),
        (("-g", "1", "--pip", "/no/such/requirements.txt", "x"), "can't be read"),
        (("-g", "1", "--working-dir", "/no/such", "x"), "does not exist"),
        (("-g", "1", "--name", "a\nb", "x"), "printable"),
        (("-g", "1", "  "), "command"),
        (("-g", "1"), "Missing argument"),
        (("--num-gpu", "1", "x"), "--num-gpus"),
        (("--nodes", "two", "x"), "--nodes"),
    ],
)
def test_what_can_not_be_meant_is_one_line_and_code_2(
    rmctl: Any, fake: FakeClient, words: tuple[str, ...], said: str
) -> None:
    ran = rmctl("submit", *words)
    assert ran.code == 2
    assert ran.out == ""
    first, *hints = ran.err.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert all(each.startswith("hint: ") for each in hints)
    assert not fake.submitted


def test_what_is_not_said_is_left_to_the_queue(rmctl: Any, fake: FakeClient) -> None:
    rmctl("submit", "-g", "1", "x")
    (spec,) = fake.submitted
    assert (spec.queue, spec.priority, spec.time_limit_s) == ("", None, None)
    assert (spec.preemptible, spec.hold, spec.after, spec.array) == (True, False, (), None)


def test_run_stays_with_one_job(rmctl: Any, fake: FakeClient) -> None:
    ran = rmctl("run", "-g", "1", "--array", "2", "x")
    assert (ran.code, fake.submitted) == (2, [])
    assert "rmctl submit" in ran.err


def test_after_takes_handles_and_ids(fake: FakeClient) -> None:
    first = fake.submit("a", num_gpus=1)
    fake.submit("b", num_gpus=1, after=[first, 7])
    fake.submit("c", num_gpus=1, after=first)
    assert [spec.after for spec in fake.submitted] == [(), ("j1", "j7"), ("j1",)]
