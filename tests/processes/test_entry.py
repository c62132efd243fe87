"""Python functions as ranks: what comes back of values, exceptions and whatever cannot travel."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from rm.errors import NotPicklable, PayloadTooLarge
from rm.runtime.entry import load_error, result_path
from rm.runtime.processes import LaunchOutcome

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Ran:
    """How a run of the entry ended."""

    code: int
    stdout: str
    stderr: str
    result: Any  # None: no file

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.result) == {"error"}
        error: dict[str, Any] = self.result["error"]
        assert set(error) == {"type", "message", "traceback", "exception"}
        return error


def run(folder: Path, function: Any, *args: Any, rank: int | None = None, **kwargs: Any) -> Ran:
    """Run the function as one rank, sent by value as from a notebook."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        payload = cloudpickle.dumps((function, args, kwargs))
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    return run_payload(folder, payload, rank=rank)


def run_payload(folder: Path, payload: bytes, rank: int | None = None) -> Ran:
    (folder / "payload").write_bytes(payload)
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | {
        "PYTHONPATH": str(REPOSITORY)
    }
    if rank is not None:
        env["RANK"] = str(rank)
    done = subprocess.run(
        [sys.executable, "-m", "rm.runtime.entry", "payload", "result"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    left = result_path(folder / "result", rank or 0)
    ran = Ran(
        done.returncode,
        done.stdout,
        done.stderr,
        cloudpickle.loads(left.read_bytes()) if left.exists() else None,
    )
    assert {path.name for path in folder.iterdir()} <= {"payload", left.name, "only_here.py"}, (
        "no half-written file"
    )
    return ran


# --- values ------------------------------------------------------------------------------------------------


def test_a_value_comes_back(tmp_path: Path) -> None:
    def add(a: int, b: int, *, times: int) -> dict[str, int]:
        print("adding")
        return {"sum": (a + b) * times}

    assert run(tmp_path, add, 1, 2, times=3) == Ran(0, "adding\n", "", {"ok": {"sum": 9}})


def test_a_coroutine_is_run(tmp_path: Path) -> None:
    async def later(value: int) -> int:
        await asyncio.sleep(0.01)
        return value

    assert run(tmp_path, later, 5).result == {"ok": 5}


def test_the_interpreter_is_clean(tmp_path: Path) -> None:
    def modules() -> tuple[list[str], list[str]]:
        return sorted(sys.modules), sys.argv[1:]

    loaded, argv = run(tmp_path, modules).result["ok"]
    heavy = {"ray", "pydantic", "sqlalchemy", "torch", "numpy", "asyncio", "rm.spec", "rm.runtime.processes"}
    assert not heavy & set(loaded)
    assert argv == [], "user code that parses arguments finds none"


@pytest.mark.parametrize(("rank", "result"), [(None, {"ok": 7}), (0, {"ok": 7}), (1, None)])
def test_rank_0_alone_leaves_the_value(tmp_path: Path, rank: int | None, result: Any) -> None:
    assert run(tmp_path, lambda: 7, rank=rank) == Ran(0, "", "", result)


# --- exceptions --------------------------------------------------------------------------------------------


class TrainingBroke(Exception):
    """Cannot be rebuilt from its `args`, like so many."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step}: {why}")


def test_an_exception_comes_back_with_its_traceback(tmp_path: Path) -> None:
    def outer() -> None:
        def inner() -> None:
            raise ValueError("loss is nan")

        inner()

    ran = run(tmp_path, outer)
    assert ran.code == 1
    assert (ran.error["type"], ran.error["message"]) == ("ValueError", "loss is nan")
    assert ran.error["traceback"] == ran.stderr
    assert ran.stderr.startswith("Traceback (most recent call last):\n")
    assert ran.stderr.endswith("ValueError: loss is nan\n")
    assert "in outer" in ran.stderr
    assert "in inner" in ran.stderr
    assert "runtime/entry.py" not in ran.stderr, "our own frames tell the user nothing"
    again = load_error(ran.error)
    assert isinstance(again, ValueError)
    assert again.args == ("loss is nan",)


def test_of_a_coroutine_only_its_own_frames_are_shown(tmp_path: Path) -> None:
    async def later() -> None:
        raise KeyError("weights")

    ran = run(tmp_path, later)
    assert "in later" in ran.stderr
    assert "asyncio" not in ran.stderr
    assert ran.stderr.count("File ") == 1


def test_a_cause_is_shown(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            int("x")
        except ValueError as error:
            raise RuntimeError("bad config") from error

    stderr = run(tmp_path, fail).stderr
    assert (
        stderr.index("invalid literal")
        < stderr.index("direct cause")
        < stderr.index("RuntimeError: bad config")
    )


def test_an_exception_that_cannot_be_rebuilt_still_tells_all(tmp_path: Path) -> None:
    def fail() -> None:
        raise TrainingBroke(3, "overflow")

    error = run(tmp_path, fail).error
    assert error["type"].endswith("TrainingBroke")
    assert error["message"] == "step 3: overflow"
    assert error["exception"] is None
    assert load_error(error) is None


def test_an_exception_that_holds_what_cannot_travel(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("locked", threading.Lock())

    error = run(tmp_path, fail).error
    assert error["type"] == "RuntimeError"
    assert error["exception"] is None


def test_another_rank_leaves_its_error_beside_the_result(tmp_path: Path) -> None:
    ran = run(tmp_path, lambda: 1 / 0, rank=3)
    assert ran.code == 1
    assert ran.error["type"] == "ZeroDivisionError"
    assert result_path(tmp_path / "result", 3).exists()
    assert not (tmp_path / "result").exists()


def test_an_exception_is_told_even_if_stderr_was_closed(tmp_path: Path) -> None:
    def fail() -> None:
        sys.stderr.close()
        raise ValueError("quiet")

    ran = run(tmp_path, fail)
    assert (ran.code, ran.error["message"]) == (1, "quiet")


@pytest.mark.parametrize(
    ("asked", "code", "stderr"),
    [(None, 0, ""), (0, 0, ""), (7, 7, ""), (257, 1, ""), ("no data", 1, "no data\n")],
)
def test_system_exit_passes_through(tmp_path: Path, asked: Any, code: int, stderr: str) -> None:
    ran = run(tmp_path, sys.exit, asked)
    assert (ran.code, ran.stderr) == (code, stderr)
    if code:
        assert (ran.error["type"], ran.error["message"]) == ("SystemExit", str(asked))
    else:
        assert ran.result == {"ok": None}


# --- what cannot travel ------------------------------------------------------------------------------------


def test_a_module_that_the_node_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("only_on_my_laptop.models")
    monkeypatch.setitem(sys.modules, "only_on_my_laptop", ModuleType("only_on_my_laptop"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def train() -> None: ...

    train.__module__, train.__qualname__ = module.__name__, "train"
    module.train = train  # type: ignore[attr-defined]
    ran = run_payload(tmp_path, cloudpickle.dumps((train, (), {})))
    assert ran.code == 1
    for words in ("'only_on_my_laptop'", "working_dir", "'pip': ['only_on_my_laptop']", "notebook or script"):
        assert words in ran.error["message"]
    assert ran.stderr == f"error: {ran.error['message']}\n", "no traceback: nothing in it is the user's"
    again = load_error(ran.error)
    assert isinstance(again, NotPicklable)
    assert again.context["module"] == "only_on_my_laptop"


def test_a_missing_module_inside_the_function_is_an_ordinary_exception(tmp_path: Path) -> None:
    def train() -> None:
        import only_on_my_laptop  # type: ignore[import-not-found]  # noqa: F401

    ran = run(tmp_path, train)
    assert ran.error["type"] == "ModuleNotFoundError"
    assert "in train" in ran.stderr


def test_modules_of_the_working_directory_are_found(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("answer = 42\n")

    def look() -> int:
        sys.dont_write_bytecode = True
        import only_here  # type: ignore[import-not-found]

        return int(only_here.answer)

    assert run(tmp_path, look).result == {"ok": 42}


def test_a_payload_that_does_not_load_names_the_versions(tmp_path: Path) -> None:
    ran = run_payload(tmp_path, b"not a pickle")
    assert ran.code == 1
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in ran.error["message"]
    assert isinstance(load_error(ran.error), NotPicklable)


def test_a_result_that_cannot_be_pickled_names_the_way_out(tmp_path: Path) -> None:
    ran = run(tmp_path, threading.Lock)
    assert ran.code == 1
    assert "lock" in ran.error["message"]
    assert "rm.checkpoint_dir()" in ran.error["message"]
    assert isinstance(load_error(ran.error), NotPicklable)


@pytest.mark.parametrize(("size", "fits"), [(15 * 2**20, True), (16 * 2**20, False)])
def test_a_large_result_names_the_way_out(tmp_path: Path, size: int, fits: bool) -> None:
    ran = run(tmp_path, bytes, size)
    if fits:
        assert ran.result == {"ok": bytes(size)}
        return
    assert ran.code == 1
    assert "16.0 MiB" in ran.stderr
    assert "rm.checkpoint_dir()" in ran.stderr
    assert isinstance(load_error(ran.error), PayloadTooLarge)


def test_no_error_is_rebuilt_from_rubbish() -> None:
    assert load_error({"exception": None}) is None
    assert load_error({"exception": b"rubbish"}) is None
    assert load_error({"exception": cloudpickle.dumps("no exception")}) is None


# --- through the keeper ------------------------------------------------------------------------------------


def test_a_gang_of_functions(attempt: Any) -> None:
    """Two ranks of one function; the second fails first, and its exception is to be had."""

    def train() -> str:
        import time

        if os.environ["RANK"] == "1":
            raise ValueError("diverged")
        time.sleep(1000)
        return "trained"

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    payload, result = attempt.folder / "payload", attempt.folder / "result"
    payload.write_bytes(cloudpickle.dumps((train, (), {})))
    cloudpickle.unregister_pickle_by_value(here)
    argv = (sys.executable, "-m", "rm.runtime.entry", str(payload), str(result))
    ranks = [attempt.rank(n, *argv, env={**attempt.env, "RANK": str(n)}) for n in range(2)]

    async def scenario() -> LaunchOutcome:
        return await (await attempt.start(ranks, 5.0)).wait()

    outcome = asyncio.run(scenario())
    assert [(end.code, end.signal) for end in outcome.exits] == [(None, 15), (1, None)]
    assert outcome.first_failed == 1
    error = cloudpickle.loads(result_path(result, 1).read_bytes())["error"]
    assert isinstance(load_error(error), ValueError)
    assert "ValueError: diverged" in (attempt.folder / "1.err").read_text()
    assert not result.exists()
