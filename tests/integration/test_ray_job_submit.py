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
from rm.runtime.local import LocalRay

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(240)]

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
        yield SimpleNamespace(env=env, home=home, ray=ray_head)


@pytest.fixture
def run(head: SimpleNamespace) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the environment's bin directory in the user's shell."""

    def run(*words: str, cwd: Path = REPO, timeout: float = 150) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / words[0]), *words[1:]]
        return subprocess.run(command, cwd=cwd, env=head.env, capture_output=True, text=True, timeout=timeout)

    return run


def listed(run) -> list[dict]:
    import json

    done = run("rmctl", "ls", "--all", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nothing_is_charged(run) -> bool:
    import json

    nodes = json.loads(run("rmctl", "nodes", "--json").stdout)
    return all(node["charged_gpus"] == 0 for node in nodes)


@pytest.mark.torch
def test_train_digits_on_two_gpus(run, head) -> None:
    done = run("ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/train_digits.py", "--num-gpus", "2",
               "--epochs", "6")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (accuracy,) = re.findall(r"test accuracy (0\.\d+)", done.stdout)
    assert float(accuracy) >= 0.95
    jobs = listed(run)
    assert len(jobs) == 1, jobs
    job = jobs[0]
    assert (job["status"], job["gpus"], job["name"]) == ("SUCCEEDED", 2, "train_digits.py")
    url = head.env["RM_LEDGER_URL"]
    if url:
        from rm.ledger import Ledger

        ledger = Ledger.open(url)
        assert ledger.job(job["id"]).job.status == "SUCCEEDED"
        ledger.close()
        assert not list(head.home.glob("*.sqlite"))


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_driver_that_ends_takes_its_job_along(run, head, tmp_path: Path, how: str) -> None:
    (tmp_path / "main.py").write_text(
        "import rm, os, time\nrm.require_gpus(2, name='mine')\nprint('inside', os.environ['RM_JOB_ID'])\ntime.sleep(1000)\n"
    )
    submitted = run("ray", "job", "submit", "--no-wait", "--submission-id", f"sub-{how}", "--working-dir", str(tmp_path),
                    "--", "python", "main.py")  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = wait_until(lambda: [j for j in listed(run) if j["status"] == "RUNNING"], 60, "the job runs")[0]
    if how == "stopped":
        assert run("ray", "job", "stop", "--no-wait", f"sub-{how}").returncode == 0
    else:
        for pid in processes_with("RAY_JOB_CONFIG_JSON_ENV_VAR", head.ray.record, command="python main.py"):
            os.kill(pid, 9)
    wait_until(lambda: nothing_is_charged(run), 15, "the GPUs are back within 15 s")
    ended = {j["id"]: j["status"] for j in listed(run)}
    assert ended[job["id"]] == "CANCELLED"


def test_detach_lets_the_driver_go_and_the_job_run(run, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        "import rm, helper\nrm.require_gpus(1, detach=True, name='on-its-own')\nprint('done', helper.WORD)\n"
    )
    (tmp_path / "helper.py").write_text("WORD = 'shipped'\n")
    done = run("ray", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "main.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (job_id,) = re.findall(r"(j\d+) submitted", done.stdout)
    assert run("rmctl", "wait", job_id).returncode == 0
    assert run("rmctl", "logs", job_id).stdout == "done shipped\n"


def test_a_failing_script_fails_the_ray_job(run, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import rm, sys\nrm.require_gpus(1)\nsys.exit(3)\n")
    done = run("ray", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "main.py")
    assert done.returncode != 0
    assert "exited with code 3" in done.stdout + done.stderr


def test_env_vars_of_one_ray_job_do_not_reach_another(run, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        "import rm, os\nrm.require_gpus(1)\nprint('secret is', os.environ.get('SECRET'))\n"
    )
    submit = ["ray", "job", "submit", "--working-dir", str(tmp_path)]
    first = run(*submit, "--runtime-env-json", '{"env_vars": {"SECRET": "xyzzy"}}', "--", "python", "main.py")
    second = run(*submit, "--", "python", "main.py")
    assert "secret is xyzzy" in first.stdout, first.stdout + first.stderr
    assert "secret is None" in second.stdout, second.stdout + second.stderr
    assert "xyzzy" not in run("rmctl", "ls", "--all", "--json").stdout
