"""What the store's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rm


@pytest.fixture
def run_child() -> Callable[..., str]:
    """Runs code in a Python process of its own, with limits that would hurt this one. Returns what it printed."""

    def run(code: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
            env=os.environ | {"PYTHONPATH": str(Path(rm.__file__).parents[1])},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
