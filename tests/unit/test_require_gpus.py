"""`rm.require_gpus` starts the program that calls it once more: which command line that is, and when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import types, rm
client = types.SimpleNamespace(submit=lambda command, **options: print(options["name"], *command) or rm)
rm.id = "j1"
rm.require_gpus(1, detach=True, client=client)
"""


def python(tmp_path: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RM_JOB_ID": ""}
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=tmp_path, env=env, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("started", "again"),
    [
        (["train.py", "--lr", "0.1"], "train.py python train.py --lr 0.1"),
        (["-m", "train", "-x"], "train python -m train -x"),
        (["-m", "package.train", "-x"], "package.train python -m package.train -x"),
        (["-m", "package"], "package python -m package"),
        (["package"], "package python package"),
    ],
)
def test_a_script_and_a_module_are_started_as_they_were(
    tmp_path: Path, started: list[str], again: str
) -> None:
    (tmp_path / "package").mkdir()
    for name in ("train.py", "package/__init__.py", "package/train.py", "package/__main__.py"):
        (tmp_path / name).write_text("" if "init" in name else PROGRAM)
    ran = python(tmp_path, *started)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == again


def test_what_is_no_script_is_told_what_to_use_instead(tmp_path: Path) -> None:
    for ran in (python(tmp_path, "-c", PROGRAM), python(tmp_path, "-", stdin=PROGRAM)):
        assert ran.returncode == 1
        assert "RequestError: require_gpus: " in ran.stderr
        assert "client.submit(function, num_gpus=N)" in ran.stderr.splitlines()[-1]
    notebook = (
        "import sys, types; sys.argv = ['/x/ipykernel_launcher.py', '-f', 'k.json']\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "result = InteractiveShell.instance().run_cell('import rm; rm.require_gpus(1)')\n"
        "print(type(result.error_in_exec).__name__)"
    )
    (tmp_path / "kernel.py").write_text(notebook)
    assert python(tmp_path, "kernel.py").stdout.splitlines()[-1] == "RequestError"
