"""Attaching this process to a Ray cluster that runs already, or saying within seconds why that is impossible.

`ray.init(address=…)` alone is bad at saying no: a dead address blocks it for 40 to 80 s, a wrong token for 20 s,
and a driver whose token mode differs from the cluster's connects and then loses every actor. So, in this order:

1. Where: the argument, else RAY_ADDRESS, else what runs on this machine. Never a new Ray.
2. Whether: `rm.runtime.gcs_probe` finds out, within the time limit, if a driver here can use what is there, and makes
   the token mode of this process that of the cluster.
3. Only then `ray.init`, which takes well under a second.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from rm.errors import ClusterError, NoCluster, RequestError
from rm.runtime.gcs_probe import MODE, plain, probe, set_mode
from rm.runtime.token_file import exposed_token

log = logging.getLogger("rm.attach")

NETWORK_SHARE = 0.8
"""Of `timeout_s`, what the network may take; the rest is for `import ray`, which no deadline can cut short."""
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_ADDRESS = re.compile(r"\s*(?:\[([0-9A-Fa-f:.%]+)\]|([^\s\[\]:/@]+)):(\d{1,5})\s*")
_UNSUPPORTED = {
    r"local\Z": "it would start a new Ray, which attaching never does",
    r"ray://": "Ray Client is not supported; run the program on a node of the cluster, with `ray job submit`",
    r"https?://": "this is a dashboard, for `ray job submit` (which also reads it from RAY_API_SERVER_ADDRESS); "
    "a driver needs the address of the GCS",
}
_WAY_OUT = (
    "Start one with `ray start --head` or `rmctl start --local`, or name one that runs with "
    "address='HOST:PORT' or RAY_ADDRESS (the port of its GCS, 6379 unless chosen otherwise)."
)
_one_at_a_time = threading.Lock()


class _Target(NamedTuple):
    host: str
    port: int
    origin: str
    """Who named it, in words for the error message."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def attach(address: str | None = None, timeout_s: float = 5.0) -> str:
    """Make sure that this process is connected to a Ray cluster; return the address of its GCS, "host:port".

    `address` is "host:port" of a GCS; None or "auto" is RAY_ADDRESS, else the cluster that runs on this machine.
    An existing connection is used as it is. In a `ray job submit` driver the job's runtime_env is kept. What workers
    print is not copied to this process, since that would include the allocator: call `ray.init` first to have it.
    Called by `rm.runtime.connect`; safe from several threads.

    Raises NoCluster (nothing usable at the address), AuthenticationFailed (the cluster wants a token that was not
    found or is not its own), ClusterError (Ray refuses: another version) and RequestError (attached elsewhere).
    """
    asked = _named(address, "the address given")
    import ray

    with _one_at_a_time:
        if ray.is_initialized():
            return _already_attached(asked)
        asked = asked or _named(os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")
        deadline = time.monotonic() + NETWORK_SHARE * timeout_s
        mode_before = os.environ.get(MODE)
        try:
            _init(_reach([asked] if asked else _on_this_machine(), deadline))
        except BaseException:
            set_mode(mode_before)
            raise
        if mode_before is None and os.environ[MODE] == "disabled":
            del os.environ[MODE]  # what children of this process start may well use a token
        elif os.environ[MODE] == "token" and (warning := exposed_token()):
            log.warning("%s", warning)
        return plain(ray.get_runtime_context().gcs_address)


def _init(spelling: str) -> None:
    import ray

    try:
        ray.init(address=spelling, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        ray.shutdown()  # a half-made connection would pass for a whole one
        raise ClusterError(
            f"The Ray cluster at {plain(spelling)} is alive, but Ray can't attach to it: {error}"
        ) from error


def _already_attached(asked: _Target | None) -> str:
    """The address of the connection there is. RequestError if another one is asked for: a process has only one."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        raise RequestError(
            f"This process uses ray://, and {_UNSUPPORTED['ray://']}. Call ray.shutdown() first.",
            field="address",
        )
    current = plain(ray.get_runtime_context().gcs_address)
    if asked and not _same(asked, _parse(current, "")):
        raise RequestError(
            f"address={asked} was asked for, but this process is attached to {current}, and Ray allows one "
            "cluster per process. Leave address out, or call ray.shutdown() first.",
            field="address",
        )
    return current


# --- 1. where ------------------------------------------------------------------------------------------------


def _named(address: str | None, origin: str) -> _Target | None:
    """The address that somebody chose; None where they left it open. Needs no Ray, so it refuses at once."""
    if address is None or address in {"", "auto"}:
        return None
    for pattern, why in _UNSUPPORTED.items():
        if re.match(pattern, address):
            _refuse(address, origin, why)
    return _parse(address, origin)


def _parse(address: str, origin: str) -> _Target:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[3]) < 65536:
        _refuse(address, origin, "an address looks like 'HOST:PORT', for example '10.0.0.5:6379'")
    return _Target(match[1] or match[2], int(match[3]), origin)


def _refuse(address: str, origin: str, why: str) -> NoReturn:
    raise NoCluster(f"{address!r} ({origin}) can't be attached to: {why}. {_WAY_OUT}", address=address)


def _on_this_machine() -> Iterator[_Target]:
    """What Ray's "auto" means, best first: the cluster of the last `ray start`, else the only one that runs.

    Unlike "auto", it passes over the file of a cluster that is gone, and never picks one of several at random.
    """
    from ray._common.utils import get_ray_address_file
    from ray._private import services

    path = Path(get_ray_address_file(None))
    readable = path.is_file() and os.access(path, os.R_OK)
    last = _ADDRESS.fullmatch(path.read_text(errors="replace")) if readable else None
    if last:
        yield _parse(last[0], f"from {path}, which is out of date if that Ray has ended")
    getattr(services.find_gcs_addresses, "cache_clear", lambda: None)()
    running = [_parse(found, "runs on this machine") for found in sorted(services.find_gcs_addresses())]
    others = [each for each in running if not last or not _same(each, _parse(last[0], ""))]
    if len(others) > 1:
        listed = ", ".join(map(str, others))
        raise NoCluster(f"Several Ray clusters run here: {listed}. Name one with address= or RAY_ADDRESS.")
    yield from others


def _same(one: _Target, other: _Target) -> bool:
    """Whether both name the same GCS, as far as can be told without asking it."""
    from ray._private import services

    hosts = {one.host.lower(), other.host.lower()}
    if one.port != other.port or len(hosts) == 1 or hosts <= {*_LOOPBACK, services.get_node_ip_address()}:
        return one.port == other.port
    try:
        ips = [{entry[4][0] for entry in socket.getaddrinfo(host, None)} for host in hosts]
    except (OSError, UnicodeError):
        return False
    return not ips[0].isdisjoint(ips[1])


def _reach(targets: Iterable[_Target], deadline: float) -> str:
    """The first target that is alive and usable, spelled as `ray.init` needs it, with the token mode set to match."""
    tried = []
    for target in targets:
        spellings = [str(target)]
        if target.host.lower() in _LOOPBACK:
            # Ray replaces a loopback host by this machine's outward address, where a GCS that is bound to loopback
            # does not listen. It leaves the name in capitals alone, and names have no case.
            spellings.append(f"LOCALHOST:{target.port}")
        for left, spelling in zip(range(len(spellings), 0, -1), spellings, strict=True):
            now = time.monotonic()
            why = probe(spelling, now + (deadline - now) / left)
            if not why:
                return spelling
        tried.append(f"{target} ({target.origin}): {why}")
    found = "; ".join(tried) or "this machine: no Ray runs on it"
    raise NoCluster(f"No Ray cluster found. Tried {found}. {_WAY_OUT}")
