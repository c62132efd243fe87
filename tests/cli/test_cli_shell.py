"""`rmctl` as a program: start-up, pipes, errors, terminals, and the commands around the cluster."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_client import HOSTILE, FakeClient, event, node, view
from rich.console import Console
from rich.text import Text

import rm
from rm import tables
from rm.errors import AllocatorUnavailable, InternalError, NoAllocator, NoCluster, NotAllowed, UnknownJob

HERE = Path(__file__).parent


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False, **options
    )  # fmt: skip


def test_help_is_quick_and_loads_neither_ray_nor_pydantic() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = python(
        "import sys; from rm.cli import run; code = run(['--help'])\n"
        "print(sorted({'ray', 'pydantic', 'sqlalchemy', 'torch'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (ran.returncode, ran.stderr) == (0, "[]\n")
    assert after.ru_utime - before.ru_utime < 0.5, "seconds of CPU"


def test_alone_it_explains_itself(rmctl: Any) -> None:
    ran = rmctl()
    assert ran.code == 0
    for words in ("rmctl start --local", "rmctl run -g 1 -- python train.py", "rmctl logs -f j17", "cancel"):
        assert words in ran.out
    assert all(len(line.rstrip()) <= 80 for line in ran.out.splitlines())


@pytest.mark.parametrize("command", ["run", "submit", "ls", "show", "logs", "why", "wait", "cancel", "nodes", "events",
                                     "start", "stop", "demo", "version", "simulate", "trace", "ledger"])  # fmt: skip
def test_every_command_has_help(rmctl: Any, command: str) -> None:
    ran = rmctl(command, "-h")
    assert ran.code == 0
    assert f"rmctl {command}" in ran.out


def test_a_misspelt_command_is_suggested(rmctl: Any) -> None:
    ran = rmctl("sumbit")
    assert ran.code == 2
    assert ran.err.splitlines()[0] == "error: No such command 'sumbit'. Did you mean 'submit'?"


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import sys; from fake_client import FakeClient, event; from rm import cli, client\n"
        "fake = FakeClient(); fake.event_views = [event(n, 'RunStarted') for n in range(1, 3000)]\n"
        "client.connect = lambda *_, **__: fake\n"
        "sys.argv = ['rmctl', 'events']; cli.main()"
    )
    command = f'{sys.executable} -c "$CODE" | head -1'
    env = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "CODE": code}
    ran = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60, check=True
    )
    assert ran.stdout.startswith("TIME")
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownJob("no job 'j9'\nin  this ledger"), 2),
        (NotAllowed("j12 belongs to ada; you are bob: ask ada, or an admin (carl)"), 2),
        (NoCluster("nothing at 127.0.0.1:1"), 3),
        (AllocatorUnavailable("no allocator runs"), 3),
        (InternalError("a rule was broken"), 1),
    ],
)
def test_errors_are_one_line_and_say_whose_move_it_is(
    rmctl: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("rm.client.connect", refuse)
    ran = rmctl("ls")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err == f"error: {' '.join(str(error).split())}\n"


def test_an_error_from_an_actor_is_shown_without_its_traceback(
    rmctl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayTaskError

    raised = RayTaskError(
        "shutdown", "Traceback: many\nlines", UnknownJob("no job 'j9'")
    ).as_instanceof_cause()

    def refuse(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("rm.client.connect", refuse)
    ran = rmctl("ls")
    assert (ran.code, ran.err) == (2, "error: no job 'j9'\n")


def test_ctrl_c_is_130(rmctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rm.client.connect", interrupt)
    assert rmctl("ls").code == 130


def test_a_bad_setting_names_its_variable(
    rmctl: Any, fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_NODE_POLL_S", "often")
    ran = rmctl("ls")
    assert ran.code == 2
    assert ran.err.startswith("error: RM_NODE_POLL_S: ")


def test_version(rmctl: Any) -> None:
    assert f"ray-rm {rm.__version__}" in rmctl("version").out
    assert set(rmctl("version", "--json").json) == {"ray-rm", "ray", "python"}


# --- on a terminal -----------------------------------------------------------------------------------------


def test_a_table_fits_the_terminal_and_keeps_foreign_escapes_out() -> None:
    file = io.StringIO()
    screen = Console(file=file, force_terminal=True, width=90, markup=False, emoji=False, highlight=False)
    waits = {"code": "WaitingForCapacity", "message": HOSTILE * 5, "evidence": {}, "advice": ""}
    tables.write(screen, tables.jobs_table([view("j1", "QUEUED", name=HOSTILE, reason=waits)]))
    shown = file.getvalue()
    lines = Text.from_ansi(shown).plain.splitlines()
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    assert "\u202e" not in shown
    assert len(lines) > 2, "the reason is folded, not cut"
    assert all(len(line) <= 90 for line in lines)


def test_the_history_of_a_job_is_not_broken_within_words_on_80_columns() -> None:
    file = io.StringIO()
    screen = Console(file=file, force_terminal=True, width=80, markup=False, emoji=False, highlight=False)
    waits = {"reason": {"code": "WaitingForCapacity", "message": "needs 4 GPUs, 2 are free"}}
    events = [
        event(1, "AvailabilityChecked", body=waits, free_after=4),
        event(2, "RunStarted", at=99999, attempt=1, charged_after=4, body={"hosts": ["gpu-node-17"]}),
    ]
    tables.write(screen, tables.events_table(events))
    shown = Text.from_ansi(file.getvalue()).plain
    assert "WaitingForCapacity:" in shown
    assert "gpu-node-17" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_the_bar_does_without_unicode() -> None:
    assert tables.gpu_bar(node("n", 4, charged=1, foreign=1), ascii_only=True).plain == "#x.."


# --- start and stop ----------------------------------------------------------------------------------------


class FakeLocalRay:
    """`rm.runtime.local.LocalRay`, without Ray."""

    running: FakeLocalRay | None = None
    address = "127.0.0.1:4242"
    ray_address = "LOCALHOST:4242"
    dashboard_url = "http://127.0.0.1:8265"
    num_gpus = 2
    stopped = False

    @classmethod
    def find(cls, _home: Path) -> FakeLocalRay | None:
        return cls.running

    @classmethod
    def start(cls, num_gpus: int | None, **_: Any) -> FakeLocalRay:
        cls.running = cls()
        cls.running.num_gpus = num_gpus or 2
        return cls.running

    def describe_gpus(self) -> str:
        return "no GPU found: 2 logical GPUs, accounting only"

    def stop(self) -> None:
        type(self).running = None
        type(self).stopped = True


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, fake: FakeClient, tmp_path: Path) -> type[FakeLocalRay]:
    kind = type("Local", (FakeLocalRay,), {})
    monkeypatch.setitem(sys.modules, "rm.runtime.local", SimpleNamespace(LocalRay=kind))  # type: ignore[misc]
    monkeypatch.setenv("RM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    hello = {"version": "0.1.0", "pid": 1, "live_jobs": 0, "home": "/h", "ledger_url": "sqlite:////h/l"}
    fake.on_hello = lambda: hello  # type: ignore[attr-defined]
    fake.node_views = [node("here", 2)]
    return kind


def test_start_local_says_what_to_export_and_what_comes_next(
    rmctl: Any, fake: FakeClient, local: Any
) -> None:
    ran = rmctl("start", "--local", "-g", "2")
    assert ran.code == 0
    assert "  export RAY_ADDRESS=LOCALHOST:4242\n" in ran.out
    assert "  export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265\n" in ran.out
    assert "rmctl run -g 1 -- python train.py" in ran.out
    assert "2 logical GPUs" in ran.out
    assert fake.connected == [("127.0.0.1:4242", True)]
    again = rmctl("start", "--local", "--json")
    assert again.json["exports"]["RAY_ADDRESS"] == "LOCALHOST:4242"
    assert rmctl("start", "--local", "-g", "5").code == 2, "it runs already, with another number"


def test_start_without_local_starts_no_ray(rmctl: Any, fake: FakeClient, local: Any) -> None:
    assert rmctl("--address", "h:1", "start").code == 0
    assert local.running is None
    assert fake.connected == [("h:1", True)]
    assert rmctl("start", "-g", "2").code == 2
    assert rmctl("--address", "h:1", "start", "--local").code == 2


def test_stop_ends_the_local_ray_that_start_began(rmctl: Any, fake: FakeClient, local: Any) -> None:
    rmctl("start", "--local")
    fake.connected.clear()
    assert rmctl("stop", "--json").json == {"allocator": "stopped", "ray": "ended", "home": "/h"}
    assert local.stopped
    assert fake.connected == [("127.0.0.1:4242", False)]
    assert fake.stopped == [(False, False)]


def test_stop_leaves_any_other_ray_alone(
    rmctl: Any, fake: FakeClient, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmctl("start", "--local")
    assert rmctl("--address", "h:1", "stop").code == 0
    monkeypatch.setenv("RAY_ADDRESS", "h:2")
    assert rmctl("stop").code == 0
    assert not local.stopped
    assert fake.connected[1:] == [("h:1", False), ("h:2", False)]


def test_stop_keep_jobs_keeps_their_ray(rmctl: Any, fake: FakeClient, local: Any) -> None:
    rmctl("start", "--local")
    ran = rmctl("stop", "--keep-jobs")
    assert ran.code == 0
    assert not local.stopped
    assert fake.stopped == [(False, True)]
    assert "127.0.0.1:4242" in ran.err
    assert rmctl("stop", "--keep-jobs", "--cancel-jobs").code == 2


def test_a_local_ray_without_allocator_is_ended_too(
    rmctl: Any, fake: FakeClient, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmctl("start", "--local")

    def none(*_: Any, **__: Any) -> None:
        raise NoAllocator("no allocator runs on this cluster")

    def silent(*_: Any, **__: Any) -> None:
        raise AllocatorUnavailable("the allocator did not answer")

    monkeypatch.setattr("rm.client.connect", silent)
    assert rmctl("stop").code == 3
    assert not local.stopped, "jobs may be running there"
    monkeypatch.setattr("rm.client.connect", none)
    assert rmctl("--address", "localhost:4242", "stop").code == 0
    assert local.stopped
    assert rmctl("stop").code == 3
