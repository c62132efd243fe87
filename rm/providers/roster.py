"""Which nodes a cluster has: one file that several processes share.

`ray up`, `ray down` and the autoscaler on the head are processes of their own, each with a provider of its own, and any
of them may be killed at any moment. So the roster is read anew for every question, and changed under a lock that the
kernel drops when its holder dies. The lock is on the directory, which needs no file that would be left behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rm.errors import ClusterError

FILE = "roster.json"


@dataclass
class Node:
    """One node. `machine`: which one it runs on, "" where there is only one.

    `ready_at`: on the machine's monotonic clock, in seconds; a node boots until then. `ending`: somebody is ending it,
    and nothing may be started on it any more. It stays in the roster until none of its processes is left.
    """

    type: str
    tags: dict[str, str]
    machine: str = ""
    ready_at: float = 0.0
    ending: bool = False


@dataclass
class Roster:
    """`ports`: of the head, by use. `refused`: how many launches of each type were refused on purpose, for tests.

    `unclean`: machines on which something may still run, and what to end there: machine → mark. `files`: elsewhere,
    to be removed with the cluster. `default_file`: the one that names this cluster as the machine's default.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    unclean: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    default_file: str = ""

    def of_type(self, name: str) -> int:
        """How many nodes of this type there are, those that end included: they still hold their machine."""
        return sum(node.type == name for node in self.nodes.values())


class RosterFile:
    """The roster of one cluster in its directory. Safe between threads and processes; its lock is not reentrant."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / FILE

    def read(self) -> Roster:
        """The roster as it is; an empty one where there is no cluster. ClusterError: the file makes no sense."""
        try:
            stored = json.loads(self._path.read_bytes())
            stored["nodes"] = {name: Node(**node) for name, node in stored["nodes"].items()}
            return Roster(**stored)
        except FileNotFoundError:
            return Roster()
        except (ValueError, TypeError, KeyError) as error:
            raise ClusterError(
                f"{self._path} can't be read ({error}). End what carries the cluster's mark by hand, then remove it"
            ) from error

    @contextmanager
    def held(self, *, make: bool = False) -> Iterator[Roster]:
        """The roster, which nobody changes meanwhile. FileNotFoundError: there is no cluster, and `make` is not set."""
        with locked(self.directory, make=make):
            yield self.read()

    @contextmanager
    def changing(self, *, make: bool = False) -> Iterator[Roster]:
        """The roster, to be changed; written when the block ends without an exception, whole or not at all."""
        with self.held(make=make) as roster:
            yield roster
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(asdict(roster)))
            new.replace(self._path)

    def remove(self) -> None:
        """Remove the directory and all in it. Again: nothing happens."""
        with suppress(FileNotFoundError), locked(self.directory):
            shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def locked(directory: Path, *, make: bool = False) -> Iterator[None]:
    """Hold the lock on `directory`; `make` it if need be, open to its owner alone. FileNotFoundError: it is gone."""
    descriptor = _lock(directory, make)
    while descriptor is None:  # its former owner removed it while we waited
        descriptor = _lock(directory, make)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(directory: Path, make: bool) -> int | None:
    """A descriptor that holds the lock; None if what it locks is no longer the directory of this name."""
    try:
        if make:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        if os.path.lexists(directory) and not directory.is_dir():
            raise
        return None  # it was there for `mkdir` and gone for the question whether it is a directory
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        if make:
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_there(directory, descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_there(directory: Path, descriptor: int) -> bool:
    """Whether the directory is still the one that was locked: its former owner may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(directory.stat(), os.fstat(descriptor))
    return False
