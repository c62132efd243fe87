"""What needs no shell, measured against a real bash."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.runtime import simple_commands
from rm.runtime.processes import Launched, LaunchOutcome
from rm.runtime.simple_commands import without_shell

PATH = {"PATH": "/usr/bin:/bin"}


def words(line: str, **env: str) -> tuple[str, ...]:
    return without_shell(("bash", "-c", line), PATH | env)


def test_a_program_and_plain_words_need_none() -> None:
    assert words("true") == (shutil.which("true", path=PATH["PATH"]), "true")
    assert words("  sleep   0.5 ")[1:] == ("sleep", "0.5")
    assert words("env --lr=0.1 a=b run_1.py@2,3:4/5%6+7")[1:] == (
        "env",
        "--lr=0.1",
        "a=b",
        "run_1.py@2,3:4/5%6+7",
    )
    assert words("/usr/bin/env python") == ("/usr/bin/env", "/usr/bin/env", "python")


@pytest.mark.parametrize(
    "line",
    ["", " ", "a=1", "a=1 env", "%1", "~/train", "cat ~", "echo hi", "exit 3", "cd /tmp", "time true", "! true",
     "no-such-program", "./here", "sub/here", "true; false", "true &", "env $HOME", "env 'a b'", "ls *",
     "true\nfalse", "env\tx", "env x=~"],
)  # fmt: skip
def test_what_bash_would_do_more_for_is_its(line: str) -> None:
    assert words(line) == ()


def test_what_changes_bash_is_its() -> None:
    assert words("true", BASH_ENV="/tmp/x") == ()
    assert words("true", **{"BASH_FUNC_true%%": "() { false; }"}) == ()
    for name in ("SHELLOPTS", "BASHOPTS", "BASH_COMPAT", "EXECIGNORE", "POSIXLY_CORRECT"):
        assert words("true", **{name: "x"}) == ()
    assert words("true", SSH_CLIENT="::1 1 22") == words("true", SSH_CLIENT="::1 1 22", SHLVL="0") == ()
    assert (
        words("true", SSH_CLIENT="::1 1 22", SHLVL="")
        == words("true", SSH_CLIENT="::1 1 22", SHLVL="-1")
        == ()
    )
    assert words("true", SSH_CLIENT="::1 1 22", SHLVL="1") != ()
    assert without_shell(("sh", "-c", "true"), PATH) == ()
    assert without_shell(("bash", "-c", "true", "x"), PATH) == ()
    assert without_shell(("true",), PATH) == ()


def test_where_the_path_depends_on_the_directory_bash_looks() -> None:
    assert without_shell(("bash", "-c", "true"), {"PATH": ".:/usr/bin"}) == ()
    assert without_shell(("bash", "-c", "true"), {"PATH": "/nowhere:/usr/bin"})[1:] == ("true",)


def test_all_that_is_built_in_is_known() -> None:
    listed = subprocess.run(
        ["bash", "-c", "compgen -b; compgen -k"], capture_output=True, text=True, check=True
    )
    built_in = {word for word in listed.stdout.split() if simple_commands._PLAIN.fullmatch(word)}
    assert built_in - {"true", "false"} <= simple_commands._OF_BASH | {"."}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab:@%+,./=-_Z09", min_size=1, max_size=8), min_size=1, max_size=6))
def test_plain_words_are_to_bash_what_they_are_to_us(some: list[str]) -> None:
    found = words("env " + " ".join(some))
    if any(word.startswith("=") for word in some):
        assert found == ()
        return
    assert found[2:] == tuple(some)
    script = f"for each in {' '.join(some)}; do printf '%s\\0' \"$each\"; done"
    told = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode()
    assert tuple(told.split("\0")[:-1]) == found[2:]


@pytest.mark.parametrize("special", "~$*?!#&|;<>()[]{}'\"\\`^\t\n\r\v\f\0é")
def test_any_other_character_leaves_it_to_bash(special: str) -> None:
    for word in (special, f"{special}a", f"a{special}", f"a{special}b"):
        assert words(f"env {word}") == ()
        assert words(f"{word} a") == ()


def outcome(attempt: Any, line: str) -> LaunchOutcome:
    command = ("bash", "-c", line)
    rank = attempt.rank(0, *command, direct=without_shell(command, attempt.env))

    async def scenario() -> LaunchOutcome:
        launched: Launched = await attempt.start([rank], 5.0)
        return await launched.wait()

    return asyncio.run(scenario())


def test_it_is_the_program_that_runs(attempt: Any) -> None:
    attempt.env.pop("_", None)  # bash sets it for whatever it starts
    (end,) = outcome(attempt, "env").exits
    assert end.code == 0
    assert not [line for line in attempt.out(0).splitlines() if line.startswith("_=")]
    (end,) = outcome(attempt, "false").exits
    assert (end.code, end.error) == (1, None)


def test_a_script_without_a_first_line_is_run_by_bash_as_ever(attempt: Any) -> None:
    script = attempt.folder / "train"
    script.write_text("echo ran by $0\n")
    script.chmod(0o755)
    (end,) = outcome(attempt, str(script)).exits
    assert (end.code, attempt.out(0)) == (0, f"ran by {script}\n")
