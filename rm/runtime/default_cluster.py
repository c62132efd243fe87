"""The machine's default cluster: what `ray.init()`, `ray status` and `ray job submit` find without an address.

Ray keeps its address in a file. A cluster on loopback is entered there under a name of its own (`default_name`), and
never in place of one that runs. Called by the launcher of a local Ray and by the local node provider.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

ANSWER_S = 0.5


def default_name(address: str) -> str:
    """How the machine's default cluster is named in Ray's file, for a cluster that is bound to loopback.

    Ray replaces "127.0.0.1" and "localhost" by the machine's outward address before it connects, and would find nothing
    there. It leaves the name in capitals alone.
    """
    return address.replace("127.0.0.1", "LOCALHOST")


def become_default(address: str, file: Path) -> str:
    """Make this the cluster that Ray's own commands find, unless one that lives is. The file, or "" if it did not."""
    with suppress(OSError):  # where it is forbidden: leave it
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
            file.parent.chmod(0o777)  # as Ray makes it: the place is everybody's
        if not file.exists() or not _answers(file.read_text().strip()):
            file.write_text(default_name(address))
            return str(file)
    return ""


def forget_default(address: str, file: str) -> None:
    """Remove the file that `become_default` wrote, if it still names this cluster. "": there is none."""
    with suppress(OSError):
        if file and Path(file).read_text() == default_name(address):
            Path(file).unlink()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, ValueError):
        return False
    return True
