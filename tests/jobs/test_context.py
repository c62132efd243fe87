"""What a job sees of the resource manager, without any: environment in, answers and files out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rm import context

ROOT = Path(context.__file__).parents[1]
OURS = (
    "RM_JOB_ID",
    "RM_ATTEMPT",
    "RM_CHECKPOINT_DIR",
    "RM_STOP_FILE",
    "RM_REPORT_FILE",
    "RM_ARRAY_INDEX",
    "RM_ARRAY_SIZE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)
Runs = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _outside_a_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables of ours, a fresh memory, and the test runner's own SIGTERM handling afterwards."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(context, "_stop", context._Stop())
    monkeypatch.setattr(context, "_reporter", context._Reporter())
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def report_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "report.json"
    monkeypatch.setenv("RM_REPORT_FILE", str(path))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Run Python source in a process of its own; further variables as keywords."""

    def run(source: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", source],
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return run


def metrics_in(path: Path) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=no_constant)
    assert set(content) == {"at", "metrics"}
    metrics: dict[str, Any] = content["metrics"]
    return metrics


class TestWhoAmI:
    def test_outside_a_job_there_are_defaults(self) -> None:
        assert not context.in_job()
        assert context.job_id() is None
        assert context.attempt() == 1
        assert (context.rank(), context.local_rank(), context.world_size()) == (0, 0, 1)
        assert (context.array_index(), context.array_size()) == (0, 1)

    def test_in_a_job_the_runner_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = {
            "RM_JOB_ID": "j17",
            "RM_ATTEMPT": "j17.12",
            "RM_ARRAY_INDEX": "3",
            "RM_ARRAY_SIZE": "9",
            "RANK": "5",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "8",
        }
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert context.in_job()
        assert context.job_id() == "j17"
        assert context.attempt() == 12
        assert (context.rank(), context.local_rank(), context.world_size()) == (5, 1, 8)
        assert (context.array_index(), context.array_size()) == (3, 9)

    @pytest.mark.parametrize("unexpected", ["", "j17", "j17.", "j17.x", "²"])
    def test_an_attempt_it_cant_read_counts_as_the_first(
        self, unexpected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RM_ATTEMPT", unexpected)
        assert context.attempt() == 1

    def test_importing_it_loads_nothing_heavy(self, runs: Runs) -> None:
        ended = runs("import sys, rm.context; print(sorted(m for m in sys.modules if m.startswith('rm')))")
        assert ended.stdout.strip() == "['rm', 'rm.context']", ended.stderr


class TestCheckpointDir:
    def test_a_job_has_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RM_CHECKPOINT_DIR", str(tmp_path / "a" / "b"))
        assert context.checkpoint_dir() == tmp_path / "a" / "b"
        assert (tmp_path / "a" / "b").is_dir()
        assert context.checkpoint_dir().is_dir()  # and once more, now that it exists

    def test_elsewhere_it_is_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert context.checkpoint_dir() == Path("checkpoints")
        assert (tmp_path / "checkpoints").is_dir()


class TestShouldStop:
    def test_the_stop_file_stops_for_good(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stop_file = tmp_path / "stop"
        monkeypatch.setenv("RM_STOP_FILE", str(stop_file))
        assert not context.should_stop()
        stop_file.touch()
        time.sleep(1.5 * context.STAT_INTERVAL_S)
        assert context.should_stop()
        stop_file.unlink()
        time.sleep(1.5 * context.STAT_INTERVAL_S)
        assert context.should_stop()

    def test_sigterm_stops_and_does_not_kill(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert not context.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert context.should_stop()

    def test_a_handler_of_the_users_stays(self) -> None:
        got: list[int] = []
        handler = lambda number, _frame: got.append(number)  # noqa: E731
        signal.signal(signal.SIGTERM, handler)
        assert not context.should_stop()
        assert signal.getsignal(signal.SIGTERM) is handler
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]
        assert not context.should_stop()

    def test_ignored_sigterm_stays_ignored(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        context.should_stop()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN

    def test_asked_first_in_another_thread_it_still_takes_sigterm_over_later(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(context.should_stop()))
        thread.start()
        thread.join()
        assert answers == [False]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        context.should_stop()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    def test_a_forked_worker_can_still_be_terminated(self, runs: Runs) -> None:
        # Without the default action back, Pool.terminate() would wait for ever.
        ended = runs("""
import multiprocessing, time
import rm.context
rm.context.should_stop()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
worker.start()
worker.terminate()
worker.join(60)
print(worker.exitcode, rm.context.should_stop())
""")
        assert ended.stdout.split() == ["-15", "False"], ended.stderr

    def test_it_looks_at_the_disk_only_now_and_then(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[Path] = []
        monkeypatch.setattr(context.Path, "exists", lambda path: looks.append(path) or False)
        monkeypatch.setenv("RM_STOP_FILE", str(tmp_path / "stop"))
        began, spent = time.monotonic(), time.thread_time()
        for _ in range(10_000):
            context.should_stop()
        took, spent = time.monotonic() - began, time.thread_time() - spent
        assert 1 <= len(looks) <= 1 + took / context.STAT_INTERVAL_S
        assert spent < 0.5, "seconds of CPU"


class TestReport:
    def test_outside_a_job_nothing_happens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        context.report(step=1, anything=object())
        assert list(tmp_path.iterdir()) == []

    def test_what_is_reported_is_bounded(self, report_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        context.report(**{f"m{number}": number for number in range(context.MOST_METRICS)})
        context.report(text="x" * 10**6, late=1, m0="y" * 10**6)
        context._reporter.flush()
        metrics = metrics_in(report_file)
        assert len(metrics) == context.MOST_METRICS
        assert metrics["m0"] == "y" * context.MOST_CHARS, "known ones go on"
        assert "late" not in metrics
        assert capsys.readouterr().err == f"rm: only the first {context.MOST_METRICS} metrics are kept\n"

    def test_checkpoints_without_end_are_written_now_and_then(
        self, report_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(context.time, "monotonic", lambda: now[0])
        written: list[float] = []
        monkeypatch.setattr(context, "_replace_text", lambda *_: written.append(now[0]))
        context.report(step=1)
        assert written == [1000.0]
        context.checkpointed()
        assert written == [1000.0] * 2, "the first is told at once, whatever was written before"
        for _ in range(10_000):
            now[0] += 0.0001
            context.checkpointed()
        assert len(written) <= 2 + 1 / context.WRITE_INTERVAL_S + 1

    def test_the_first_is_written_at_once(self, report_file: Path) -> None:
        before = time.time()
        context.report(step=1, total=10, loss=2.5, phase="warm-up", best=True, note=None)
        assert metrics_in(report_file) == {
            "step": 1,
            "total": 10,
            "loss": 2.5,
            "phase": "warm-up",
            "best": True,
            "note": None,
        }
        assert before <= json.loads(report_file.read_text())["at"] <= time.time()

    def test_values_are_merged(self, report_file: Path) -> None:
        context.report(step=1, loss=2.5)
        time.sleep(1.5 * context.WRITE_INTERVAL_S)
        context.report(step=2)
        assert metrics_in(report_file) == {"step": 2, "loss": 2.5}

    def test_values_in_between_wait_for_the_next_call(self, report_file: Path) -> None:
        context.report(step=1)
        context.report(loss=0.5)
        assert metrics_in(report_file) == {"step": 1}
        time.sleep(1.5 * context.WRITE_INTERVAL_S)
        context.report(step=2)
        assert metrics_in(report_file) == {"step": 2, "loss": 0.5}

    def test_a_checkpoint_is_told_at_once_and_remembered(self, report_file: Path) -> None:
        context.report(step=1)
        before, began = time.time(), time.monotonic()
        context.checkpointed()
        told = json.loads(report_file.read_text())
        assert before <= told["checkpoint_at"] <= time.time()
        assert began <= told["checkpoint_monotonic"] <= time.monotonic()
        assert told["metrics"] == {"step": 1}
        time.sleep(1.5 * context.WRITE_INTERVAL_S)
        context.report(step=2)
        later = json.loads(report_file.read_text())
        assert (later["checkpoint_at"], later["metrics"]) == (told["checkpoint_at"], {"step": 2})

    def test_outside_a_job_a_checkpoint_is_nobodys_business(self, tmp_path: Path) -> None:
        context.checkpointed()
        assert list(tmp_path.iterdir()) == []

    def test_the_last_value_is_written_at_exit(self, report_file: Path, runs: Runs) -> None:
        ended = runs(
            "import rm.context as c; [c.report(step=n) for n in range(1000)]", RM_REPORT_FILE=str(report_file)
        )
        assert ended.returncode == 0, ended.stderr
        assert metrics_in(report_file) == {"step": 999}

    def test_nan_and_the_infinities_are_strings(self, report_file: Path) -> None:
        context.report(a=math.nan, b=math.inf, c=-math.inf)
        assert metrics_in(report_file) == {"a": "nan", "b": "inf", "c": "-inf"}

    def test_scalars_of_arrays_are_numbers(self, report_file: Path) -> None:
        numpy = pytest.importorskip("numpy")
        context.report(
            loss=numpy.float32(0.5),
            step=numpy.int64(7),
            done=numpy.bool_(True),
            one=numpy.array([3.0]),
            bad=numpy.float64("nan"),
        )
        assert metrics_in(report_file) == {"loss": 0.5, "step": 7, "done": True, "one": 3.0, "bad": "nan"}

    @pytest.mark.torch
    def test_tensors_of_one_element_are_numbers(self, report_file: Path) -> None:
        torch = pytest.importorskip("torch")
        context.report(loss=torch.tensor(0.25, requires_grad=True), step=torch.tensor([3]))
        assert metrics_in(report_file) == {"loss": 0.25, "step": 3}
        with pytest.raises(TypeError, match="losses"):
            context.report(losses=torch.zeros(2))

    @pytest.mark.parametrize("value", [[1], {"a": 1}, object(), 1j, b"x", {1}.pop])
    def test_anything_else_is_refused_by_name(self, value: object, report_file: Path) -> None:
        with pytest.raises(TypeError, match="val_loss"):
            context.report(step=1, val_loss=value)
        assert not report_file.exists()

    def test_many_calls_are_cheap_and_few_writes(
        self, report_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writes: list[str] = []
        monkeypatch.setattr(context, "_replace_text", lambda _path, text: writes.append(text))
        began, spent = time.monotonic(), time.thread_time()
        for step in range(10_000):
            context.report(step=step, total=10_000, loss=0.5)
        took, spent = time.monotonic() - began, time.thread_time() - spent
        assert 1 <= len(writes) <= 1 + took / context.WRITE_INTERVAL_S
        assert spent < 0.5, "seconds of CPU"

    def test_a_reader_never_sees_half_a_report(
        self, report_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(context, "WRITE_INTERVAL_S", 0.0)
        context.report(step=0, text="x")
        threads = [
            threading.Thread(
                target=lambda n=n: [context.report(**{f"t{n}": i, "text": "x" * 20_000}) for i in range(100)]
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        seen = 0
        while any(thread.is_alive() for thread in threads):
            metrics_in(report_file)
            seen += 1
        assert seen > 3
        assert {n: metrics_in(report_file)[f"t{n}"] for n in range(4)} == dict.fromkeys(range(4), 99)
        assert list(report_file.parent.iterdir()) == [report_file]  # no temporary file is left

    def test_a_failing_disk_is_said_once_and_outlived(
        self, report_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(context, "WRITE_INTERVAL_S", 0.0)

        def full(_path: Path, _text: str, **_options: str) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(context.Path, "write_text", full)
            context.report(step=1)
            context.report(step=2)
        assert capfd.readouterr().err.count("No space left on device") == 1
        assert list(report_file.parent.iterdir()) == []
        context.report(loss=0.5)  # there is space again: nothing of the above is lost
        assert metrics_in(report_file) == {"step": 2, "loss": 0.5}

    def test_a_missing_directory_breaks_nothing(self, runs: Runs, tmp_path: Path) -> None:
        ended = runs(
            "import rm.context as c; c.report(step=1); print('trained')",
            RM_REPORT_FILE=str(tmp_path / "gone" / "report.json"),
        )
        assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr

    def test_a_forked_worker_leaves_the_parents_values_to_the_parent(
        self, report_file: Path, runs: Runs
    ) -> None:
        ended = runs(
            """
import os, sys
import rm.context as c
c.report(step=1)
c.report(step=2)
child = os.fork()
if child == 0:
    sys.exit(0)  # runs the exit handlers, in which step 2 would be written
os.waitpid(child, 0)
print(open(os.environ["RM_REPORT_FILE"]).read())
""",
            RM_REPORT_FILE=str(report_file),
        )
        assert json.loads(ended.stdout)["metrics"] == {"step": 1}, ended.stderr
        assert metrics_in(report_file) == {"step": 2}
