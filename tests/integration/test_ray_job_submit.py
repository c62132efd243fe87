"""`ray job submit` against a head of its own, whose allocator keeps its ledger in PostgreSQL where there is one.

Drivers run under Ray's job manager; the script gets its GPUs from the allocator and trains there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from probes import processes_with, wait_until

from rm.core.model import Job, Status
from rm.core.resources import GPU_UNIT
from rm.ledger import Ledger
from rm.runtime.local import LocalRay

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(240), pytest.mark.xdist_group("ray_job_submit")]

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, postgres_url_of_the_day: str) -> Iterator[SimpleNamespace]:
    """A Ray head on loopback with 2 logical GPUs, and what a user's shell there has in its environment."""
    home = tmp_path_factory.mktemp("home")
    with LocalRay.start(num_gpus=2, num_cpus=4) as ray_head:
        env = {
            **os.environ,
            "RAY_ADDRESS": ray_head.address,
            "RAY_API_SERVER_ADDRESS": ray_head.dashboard_url,
            "RM_HOME": str(home),
            "RM_LEDGER_URL": postgres_url_of_the_day,
        }
        env.pop("RAY_AUTH_MODE", None)
        # Drivers run in the cluster's environment, not in the submitting shell's: the admin starts the allocator.
        subprocess.run([str(BIN / "rmctl"), "start"], env=env, check=True, capture_output=True, timeout=60)
        ledger_url = postgres_url_of_the_day or f"sqlite:///{home}/ledger.sqlite"
        yield SimpleNamespace(env=env, home=home, ray=ray_head, ledger_url=ledger_url)


@pytest.fixture
def run(head: SimpleNamespace) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the environment's bin directory in the user's shell."""

    def run(*words: str, cwd: Path = REPO, timeout: float = 150) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / words[0]), *words[1:]]
        return subprocess.run(command, cwd=cwd, env=head.env, capture_output=True, text=True, timeout=timeout)

    return run


def jobs_in_ledger(head: SimpleNamespace) -> dict[str, Job]:
    """All jobs, read from the ledger itself, past the allocator: id → record."""
    ledger = Ledger.open(head.ledger_url)
    try:
        return {row.job.id: row.job for row in ledger.jobs(limit=1000)}
    finally:
        ledger.close()


@pytest.mark.torch
def test_train_digits_on_two_gpus(run, head) -> None:
    done = run("ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/train_digits.py", "--num-gpus", "2",
               "--epochs", "4")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (accuracy,) = re.findall(r"test accuracy (0\.\d+)", done.stdout)
    assert float(accuracy) >= 0.95
    (job,) = jobs_in_ledger(head).values()
    assert (job.status, job.gang.gpu_units, job.name) == (Status.SUCCEEDED, 2 * GPU_UNIT, "train_digits.py")
    assert bool(list(head.home.glob("*.sqlite"))) == head.ledger_url.startswith("sqlite")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_driver_that_ends_takes_its_job_along(run, head, tmp_path: Path, how: str) -> None:
    (tmp_path / "main.py").write_text(
        "import rm, time\nrm.require_gpus(2, name='mine')\nprint('inside', rm.job_id())\ntime.sleep(1000)\n"
    )
    flags = ["--no-wait", "--submission-id", f"sub-{how}", "--working-dir", str(tmp_path)]
    submitted = run("ray", "job", "submit", *flags, "--", "python", "main.py")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    running = lambda: [j for j in jobs_in_ledger(head).values() if j.status is Status.RUNNING]  # noqa: E731
    (job,) = wait_until(running, 60, "the job runs")
    if how == "stopped":
        assert run("ray", "job", "stop", "--no-wait", f"sub-{how}").returncode == 0
    else:
        drivers = processes_with("RAY_JOB_CONFIG_JSON_ENV_VAR", head.ray.address, command="python main.py")
        assert drivers
        for pid in drivers:
            os.kill(pid, 9)
    wait_until(
        lambda: jobs_in_ledger(head)[job.id].status is Status.CANCELLED, 15, "the GPUs are back within 15 s"
    )
    assert all(each.attempt is None for each in jobs_in_ledger(head).values()), "nothing is charged"


def test_the_environment_of_one_ray_job_is_not_anothers_a_failure_is_passed_on_and_detach_lets_the_driver_go(
    run, head, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    (first / "main.py").write_text(
        "import rm, os, sys\nrm.require_gpus(1)\nprint('reversed', os.environ['SECRET'][::-1])\nsys.exit(3)\n"
    )
    submit = ["ray", "job", "submit", "--working-dir"]
    secret = ["--runtime-env-json", '{"env_vars": {"SECRET": "xyzzy"}}']
    failed = run(*submit, str(first), *secret, "--", "python", "main.py")
    assert failed.returncode != 0
    assert "reversed yzzyx" in failed.stdout
    assert "exited with code 3" in failed.stdout + failed.stderr

    (second / "main.py").write_text(
        "import rm, helper, os\nrm.require_gpus(1, detach=True, name='on-its-own')\n"
        "print('done', helper.WORD, os.environ.get('SECRET'))\n"
    )
    (second / "helper.py").write_text("WORD = 'shipped'\n")
    done = run(*submit, str(second), "--", "python", "main.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (job_id,) = re.findall(r"(j\d+) submitted", done.stdout)
    followed = run("rmctl", "logs", "--follow", job_id)
    assert followed.stdout == "done shipped None\n", followed.stderr
    assert jobs_in_ledger(head)[job_id].status is Status.SUCCEEDED
    assert "xyzzy" not in run("rmctl", "ls", "--all", "--json").stdout
