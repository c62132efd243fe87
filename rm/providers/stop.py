"""`python -m rm.providers.stop`: end what runs on this node, or with --cluster on all nodes of its cluster here.

Stands where a cluster's YAML usually says `ray stop`, which would end every Ray of the machine. The node is the one
whose command this is (RM_NODE), or the one that --mark names. The command itself lives on, with what runs it.
"""

from __future__ import annotations

import argparse
import os
import sys

import psutil

from rm.errors import ClusterError
from rm.providers.surroundings import NODE
from rm.runtime.local_processes import end


def main(words: list[str] | None = None) -> int:
    """The exit code: 0 if nothing is left, 1 with a message if something does not end, 2 without a mark."""
    parser = argparse.ArgumentParser(prog="python -m rm.providers.stop", description=__doc__)
    parser.add_argument(
        "--cluster", action="store_true", help="all nodes of the cluster that are on this machine"
    )
    parser.add_argument("--mark", default=os.environ.get(NODE, ""), help=f"instead of {NODE}")
    given = parser.parse_args(words)
    if not given.mark:
        print(f"{NODE} is not set: this is no command of a node. Name one with --mark.", file=sys.stderr)
        return 2
    try:
        end(given.mark.rpartition("/")[0] if given.cluster else given.mark, NODE, spared=_callers())
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _callers() -> list[psutil.Process]:
    """Who waits for this command: its shell, the connection, and so on up to the first process."""
    try:
        return list(psutil.Process().parents())
    except psutil.Error:
        return []


if __name__ == "__main__":
    sys.exit(main())
