"""The file that Ray reads its token from here, and whether others can read it too."""

from __future__ import annotations

import os
from pathlib import Path


def exposed_token() -> str:
    """A warning where others may read or change the token file of this process; "" where all is well, or none is read.

    Only asked about permissions: the token itself is for Ray to read.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return ""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        found = path.stat()
    except OSError:
        return ""
    if found.st_uid not in (os.getuid(), 0):
        how = "belongs to another user"
    elif found.st_mode & 0o077:
        how = f"is open to others (mode {found.st_mode & 0o777:04o})"
    else:
        return ""
    return (
        f"the token file {path} {how}: whoever has the token can run code on the cluster. Make it yours alone with "
        f"`chmod 600 {path}`, and if somebody may have read it, give the cluster a new token"
    )
