"""The training scripts as their users run them: real processes, killed, stopped and resumed.

What is compared is the digest of the final weights: a run that was disturbed on its way must end with the
very bits of one that was not. Each attempt is told what our runner would tell it, in its environment.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
STOPPED = 143
PATIENCE_S = 90.0


class Attempt:
    """One start of a script, as one process or as a gang; its files lie in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        script: str,
        *flags: object,
        ranks: int = 1,
        launcher: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.stop_file = directory / "stop"
        port = str(free_port())
        self.processes = []
        for rank in range(ranks):
            environment = {
                "PATH": os.environ["PATH"],
                "TMPDIR": str(directory),  # torchrun leaves a directory there
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RM_JOB_ID": "j1",
                "RM_ATTEMPT": "j1.1",
                "RM_CHECKPOINT_DIR": str(directory.parent / "checkpoints"),
                "RM_STOP_FILE": str(self.stop_file),
                "RM_REPORT_FILE": str(directory / f"report{rank}.json"),
            }
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (directory / f"output{rank}").open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, *launcher, str(JOBS / script), *map(str, flags)],
                    env=environment | variables,
                    cwd=directory,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.directory.glob("output*")))

    def ended(self) -> list[int]:
        """Wait for all processes. Their exit statuses, by rank."""
        return [process.wait(PATIENCE_S) for process in self.processes]

    def succeeded(self) -> Attempt:
        assert self.ended() == [0] * len(self.processes), self.output
        return self

    def at_step(self, step: int) -> Attempt:
        """Wait until it has reported `step`, with more of them to come."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert all(process.poll() is None for process in self.processes), self.output
            reported = self.metrics()
            if reported and reported["step"] >= step:
                assert reported["step"] < reported["total"], "it was through before it could be disturbed"
                return self
            time.sleep(0.005)
        raise AssertionError(f"no step {step} after {PATIENCE_S} s:\n{self.output}")

    def metrics(self) -> dict[str, Any] | None:
        report = self.directory / "report0.json"
        return json.loads(report.read_text())["metrics"] if report.exists() else None

    def send(self, number: signal.Signals, *ranks: int) -> Attempt:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)
        return self

    def said(self, pattern: str) -> re.Match[str]:
        """The one line of the output that matches `pattern`."""
        found = list(re.finditer(f"^{pattern}$", self.output, re.MULTILINE))
        assert len(found) == 1, f"{pattern!r} is there {len(found)} times:\n{self.output}"
        return found[0]

    def number(self, pattern: str) -> float:
        return float(self.said(pattern)[1])

    @property
    def digest(self) -> str:
        return self.said("weights sha256 ([0-9a-f]{64})")[1]

    def end_now(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


Start = Callable[..., Attempt]


@contextmanager
def attempts_in(home: Path) -> Iterator[Start]:
    """Starts attempts that share a checkpoint directory, and leaves none of them behind."""
    started: list[Attempt] = []

    def start(*what: Any, **how: Any) -> Attempt:
        started.append(Attempt(home / f"attempt{len(started)}", *what, **how))
        return started[-1]

    try:
        yield start
    finally:
        for attempt in started:
            attempt.end_now()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with attempts_in(tmp_path) as start:
        yield start


@pytest.mark.torch
class TestDigits:
    def test_learns_and_goes_on_with_no_other_training(self, start: Start) -> None:
        digits = start("train_digits.py").succeeded()
        accuracy = digits.number(r"test accuracy (0\.\d{4})")
        assert accuracy >= 0.97
        assert digits.output.splitlines()[-1].startswith("test accuracy")
        metrics = digits.metrics()
        assert metrics is not None
        assert metrics["step"] == metrics["total"] > 200
        assert metrics["test_accuracy"] == pytest.approx(accuracy, abs=1e-4)
        assert 0 < metrics["loss"] < 0.5

        checkpoints = digits.directory.parent / "checkpoints"
        other = start("train_digits.py", "--lr", 0.5, "--checkpoint-dir", checkpoints)
        assert other.ended() == [1], "another training's checkpoint is refused"
        other.said(r".*train_digits.pt is of another training \(lr 0.003, now 0.5\): .*--checkpoint-dir")

    def test_a_gang_killed_and_resumed_ends_with_the_same_bits(self, start: Start, tmp_path: Path) -> None:
        steps = ("--steps", 80)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        elsewhere = ("--checkpoint-dir", tmp_path / "undisturbed")
        undisturbed = start("train_digits.py", *steps, *elsewhere, launcher=torchrun).succeeded()
        assert undisturbed.number(r"test accuracy (0\.\d{4})") >= 0.95

        killed = start(
            "train_digits.py", *steps, "--checkpoint-every", 15, "--step-delay", 0.05, ranks=2
        ).at_step(35)
        killed.send(signal.SIGKILL)
        assert killed.ended() == [-signal.SIGKILL] * 2

        resumed = start("train_digits.py", *steps, ranks=2).succeeded()
        assert 30 <= resumed.number(r"resumed at step (\d+) of 80 from .*") < 80
        assert resumed.digest == undisturbed.digest

    @pytest.mark.long
    def test_a_gang_leaves_together_and_one_of_another_size_goes_on(
        self, start: Start, tmp_path: Path
    ) -> None:
        import torch

        # Without dropout nothing depends on the ranks: one process or two, it is the same descent up to rounding.
        # Few steps, because AdamW lets rounding grow where a gradient is nearly nothing: measured, the weights
        # differ by 1e-6 after 10 steps, 1e-4 after 30 and 1e-2 after 80; in float64 by 1e-13 after any of them.
        flags = ("--steps", 30, "--dropout", 0, "--weights-out", "weights.pt")
        undisturbed = start("train_digits.py", *flags, "--checkpoint-dir", tmp_path / "undisturbed")
        undisturbed.succeeded()

        # No checkpoint is due, and only rank 1 is told.
        gang = start("train_digits.py", *flags, "--checkpoint-every", 1000, "--step-delay", 0.2, ranks=2)
        gang.at_step(10).send(signal.SIGTERM, 1)
        assert gang.ended() == [STOPPED] * 2, gang.output
        left_at = gang.number(r"stopped at step (\d+) of 30")
        assert 10 <= left_at < 30

        alone = start("train_digits.py", *flags).succeeded()
        assert alone.number(r"resumed at step (\d+) of 30 from .*") == left_at
        alone.said(r"it had 2 processes and this has 1: .*")
        expected = torch.load(undisturbed.directory / "weights.pt", weights_only=True)
        got = torch.load(alone.directory / "weights.pt", weights_only=True)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.torch
def test_gpt_learns_and_a_kill_changes_nothing(start: Start, tmp_path: Path) -> None:
    small = ("--steps", 160, "--layers", 1)
    undisturbed = start("train_gpt.py", *small, "--checkpoint-dir", tmp_path / "undisturbed").succeeded()
    entropy = undisturbed.number(r"unigram entropy (\d\.\d+) nats")
    assert 2.5 < entropy < 4.0  # of text, not of one repeated byte
    assert undisturbed.number(r"held-out loss (\d\.\d+) nats") < entropy - 0.4

    killed = start("train_gpt.py", *small, "--checkpoint-every", 10, "--step-delay", 0.05).at_step(25)
    killed.send(signal.SIGKILL)
    assert killed.ended() == [-signal.SIGKILL]
    resumed = start("train_gpt.py", *small).succeeded()
    assert 20 <= resumed.number(r"resumed at step (\d+) of 160 from .*") < 160
    assert resumed.digest == undisturbed.digest


@pytest.fixture(scope="module")
def chars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempt]:
    """The bigrams, learnt in a process that nobody disturbed."""
    with attempts_in(tmp_path_factory.mktemp("chars")) as start:
        yield start("train_chars.py").succeeded()


class TestChars:
    def test_learns(self, chars: Attempt) -> None:
        entropy = chars.number(r"unigram entropy (\d\.\d+) nats")
        assert 2.5 < entropy < 4.0
        assert chars.number(r"final loss (\d\.\d+) nats") < entropy - 0.4
        metrics = chars.metrics()
        assert metrics is not None
        assert metrics["step"] == metrics["total"] == 600

    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, STOPPED)]
    )
    def test_disturbed_and_resumed_ends_the_same(
        self, number: signal.Signals, status: int, chars: Attempt, start: Start
    ) -> None:
        disturbed = start("train_chars.py", "--checkpoint-every", 25, "--step-delay", 0.003)
        assert disturbed.at_step(60).send(number).ended() == [status], disturbed.output
        resumed = start("train_chars.py").succeeded()
        assert 50 <= resumed.number(r"resumed at step (\d+) of 600 from .*") < 600
        kept = "checkpoints/train_chars.json"
        expected = (chars.directory.parent / kept).read_bytes()
        assert (resumed.directory.parent / kept).read_bytes() == expected

    def test_runs_where_the_resource_manager_is_not_installed(self, start: Start) -> None:
        # None in sys.modules is how Python says "not installed"; sys.path[0] as for a script.
        hide = "import runpy, sys; sys.modules['rm'] = None; sys.argv = sys.argv[1:]"
        launcher = (
            "-c",
            f"{hide}; sys.path.insert(0, {str(JOBS)!r}); runpy.run_path(sys.argv[0], None, '__main__')",
        )
        alone = start("train_chars.py", "--steps", 50, launcher=launcher, RM_JOB_ID="").succeeded()
        assert alone.number(r"final loss (\d\.\d+) nats") > 0
        assert alone.metrics() is None
        submitting = start("train_chars.py", "--num-gpus", 1, launcher=launcher, RM_JOB_ID="")
        assert submitting.ended() == [1]
        submitting.said(".*ray-rm is not installed here")


FAKE_RM = """
import os, sys
from pathlib import Path

def in_job():
    return bool(os.environ.get("RM_JOB_ID"))

def require_gpus(num_gpus, *, detach=False):
    print("asked for", num_gpus, detach, "torch" in sys.modules, flush=True)
    sys.exit(5)

def should_stop():
    print("training begins", flush=True)
    sys.exit(6)
"""


class TestSubmission:
    """With --num-gpus a script submits itself, with whatever require_gpus() is there; here one that only tells."""

    @pytest.fixture
    def fake(self, tmp_path: Path) -> str:
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "rm.py").write_text(FAKE_RM)
        return str(tmp_path / "fake")

    @pytest.mark.parametrize("script", ["train_digits.py", "train_gpt.py", "train_chars.py"])
    @pytest.mark.parametrize(("flags", "amount"), [(["2", "--detach"], "2 True"), (["0.5"], "0.5 False")])
    def test_submits_before_anything_heavy(
        self, script: str, flags: list[str], amount: str, fake: str, start: Start
    ) -> None:
        submitting = start(script, "--steps", 5, "--num-gpus", *flags, PYTHONPATH=fake, RM_JOB_ID="")
        assert submitting.ended() == [5], submitting.output
        submitting.said(f"asked for {amount} False")

    @pytest.mark.parametrize(
        "variables", [{"RM_JOB_ID": "j1"}, {"RM_JOB_ID": "", "RANK": "0"}, {"RM_JOB_ID": ""}]
    )
    def test_trains_in_a_job_under_torchrun_and_where_not_asked(
        self, variables: dict[str, str], fake: str, start: Start
    ) -> None:
        flags = ["--num-gpus", "2"] if any(variables.values()) else []
        training = start("train_chars.py", *flags, PYTHONPATH=fake, **variables)
        assert training.ended() == [6], training.output
        training.said("training begins")

    @pytest.mark.parametrize("amount", ["0", "-1", "1.5", "nan", "inf", "many"])
    def test_refuses_amounts_that_cant_be_meant(self, amount: str, fake: str, start: Start) -> None:
        refused = start("train_chars.py", f"--num-gpus={amount}", PYTHONPATH=fake, RM_JOB_ID="")
        assert refused.ended() == [2], refused.output
        assert "--num-gpus" in refused.output
