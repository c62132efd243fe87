"""Command lines that come to the same without a shell.

A string is a command line of bash, and most are a program and its arguments. bash takes a millisecond and a half to
start, only to execute that program in its own place. `make` leaves the shell out in the same way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHELL = ("bash", "-c")
_PLAIN = re.compile(r"[A-Za-z0-9_@%+:,./-][A-Za-z0-9_@%+:,./=-]*", re.ASCII)
"""A word that bash takes as it is: nothing is expanded, matched or redirected, and no `~` stands after a `=` or `:`."""
_BUILT_IN = """
. : [ alias bg bind break builtin caller case cd command compgen complete compopt continue coproc declare dirs disown do
done echo elif else enable esac eval exec exit export fc fg fi for function getopts hash help history if in jobs kill
let local logout mapfile popd printf pushd pwd read readarray readonly return select set shift shopt source suspend test
then time times trap type typeset ulimit umask unalias unset until wait while
"""
_INNER = re.compile(r"[1-9][0-9]{0,2}")
"""SHLVL where another shell is around this one."""
_OPTIONS = ("BASH_ENV", "SHELLOPTS", "BASHOPTS", "BASH_COMPAT", "EXECIGNORE", "POSIXLY_CORRECT")
_OF_BASH = frozenset(_BUILT_IN.split())
"""What bash does itself, as far as the programs of these names, if there are any, do it otherwise."""


def without_shell(command: tuple[str, ...], env: Mapping[str, str]) -> tuple[str, ...]:
    """The program that `bash -c LINE` executes in its own place, by its path, and then its words, the name first.

    () where bash does more than that, or where no such program is found: bash has the better words for it.
    """
    if len(command) != 3 or command[:2] != SHELL or "\n" in command[2]:
        return ()
    words = [word for word in command[2].split(" ") if word]
    if not words or not all(map(_PLAIN.fullmatch, words)):
        return ()
    if words[0] in _OF_BASH or "=" in words[0] or words[0].startswith("%"):
        return ()
    if _told(env):
        return ()
    program = words[0] if words[0].startswith("/") else _found(words[0], env.get("PATH", os.defpath))
    return (program, *words) if program else ()


def _told(env: Mapping[str, str]) -> bool:
    """Whether the environment tells bash to do something first, or to do anything otherwise."""
    if any(name in env for name in _OPTIONS) or any(name.startswith("BASH_FUNC_") for name in env):
        return True
    # As Debian builds it, bash reads ~/.bashrc where it thinks that sshd has started it.
    return any(name in env for name in ("SSH_CLIENT", "SSH2_CLIENT")) and not _INNER.fullmatch(
        env.get("SHLVL", "")
    )


def _found(name: str, path: str) -> str:
    """As bash looks for it; "" where it is not to be found without knowing the job's directory."""
    if "/" in name:
        return ""
    for directory in path.split(os.pathsep):
        if not directory.startswith("/"):
            return ""
        program = f"{directory}/{name}"
        if os.access(program, os.X_OK) and not os.path.isdir(program):  # noqa: PTH112 - text will do
            return program
    return ""
