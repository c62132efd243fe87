"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BANNED = {"time", "datetime", "random", "uuid", "os", "socket", "asyncio", "threading", "subprocess", "pathlib", "io",
          "sqlite3", "logging", "secrets"}  # fmt: skip


def test_the_core_has_no_clock_no_randomness_and_no_io() -> None:
    for file in (REPO / "rm" / "core").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"open", "print", "input", "exec", "eval"}, (
                    f"{file.name}: {node.func.id}()"
                )
            for name in names:
                assert name.split(".")[0] not in BANNED, f"{file.name} imports {name}"


def test_only_the_runtime_and_the_providers_import_ray_at_import_time() -> None:
    """What ends a node on a machine, `rm.providers.stop`, must do so where Ray is broken."""
    light = {"stop.py", "surroundings.py", "roster.py", "options.py", "loopback.py"}
    for file in (REPO / "rm").rglob("*.py"):
        if "runtime" in file.parts or ("providers" in file.parts and file.name not in light):
            continue
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "ray" for name in names), file


def test_importing_rm_is_light() -> None:
    code = "import rm, sys; rm.report; print({'ray', 'torch', 'pydantic', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_docs_links_lead_somewhere() -> None:
    for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(REPO)}: {target}"


def test_every_state_and_every_reason_has_its_page() -> None:
    from rm.core import reasons
    from rm.core.model import Status

    states = (REPO / "docs" / "states.md").read_text()
    for status in Status:
        assert f"## {status}" in states
    codes = [value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)]
    for code in codes:
        assert (REPO / "docs" / "reasons" / f"{code}.md").exists(), code


def test_every_mutation_has_something_to_break() -> None:
    """`make mutations` runs for minutes and not in CI: what it would change must at least still be there."""
    names = runpy.run_path(str(REPO / "benchmarks" / "mutations.py"))
    stale = [
        each.rule
        for each in names["MUTATIONS"]
        if (REPO / "rm" / "core" / f"{each.file}.py").read_text().count(each.old) != 1
    ]
    assert not stale
