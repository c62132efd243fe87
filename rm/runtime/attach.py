"""Attaching this process to a Ray cluster that runs already, or saying within seconds why that is impossible.

`ray.init(address=…)` alone is bad at saying no: a dead address blocks it for 40 to 80 s, a wrong token for 20 s,
and a driver whose token mode differs from the cluster's connects and then loses every actor. So, in this order:

1. Where: the argument, else RAY_ADDRESS, else what runs on this machine. Never a new Ray.
2. Knock: resolve the name and open a TCP connection, both with a time limit.
3. Ask: `CheckAlive` of the GCS without a token. Answered: the cluster is open. UNAUTHENTICATED: it wants a token;
   ask again with the one Ray finds. The mode of this process follows the cluster, whatever RAY_AUTH_MODE says:
   they must agree both ways, so that neither a leftover token nor a missing variable keeps anyone out.
4. Look: a driver needs a raylet of that cluster on its own machine, and permission to open its socket.
5. Only then `ray.init`, which takes well under a second.

The token itself is handled by Ray's own loader and interceptor alone: no message of ours can quote it.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rm.errors import AuthenticationFailed, ClusterError, NoCluster, RequestError

NETWORK_SHARE = 0.8
"""Of `timeout_s`, what the network may take; the rest is for `import ray`, which no deadline can cut short."""
LOOK_AGAIN_S = 0.2
_MODE = "RAY_AUTH_MODE"
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
        mode_before = os.environ.get(_MODE)
        try:
            _init(_reach([asked] if asked else _on_this_machine(), deadline))
        except BaseException:
            _set_mode(mode_before)
            raise
        if mode_before is None and os.environ[_MODE] == "disabled":
            del os.environ[_MODE]  # what children of this process start may well use a token
        return _plain(ray.get_runtime_context().gcs_address)


def _init(spelling: str) -> None:
    import ray

    try:
        ray.init(address=spelling, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        ray.shutdown()  # a half-made connection would pass for a whole one
        raise ClusterError(
            f"The Ray cluster at {_plain(spelling)} is alive, but Ray can't attach to it: {error}"
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
    current = _plain(ray.get_runtime_context().gcs_address)
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
    last = _ADDRESS.fullmatch(path.read_text(errors="replace")) if path.is_file() else None
    if last:
        yield _parse(last[0], f"from {path}, which is out of date if that Ray has ended")
    services.find_gcs_addresses.cache_clear()
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


def _plain(gcs_address: str) -> str:
    return gcs_address.replace("LOCALHOST:", "127.0.0.1:")


# --- 2. knock ------------------------------------------------------------------------------------------------


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
            why = _ask(spelling, now + (deadline - now) / left)
            if not why:
                return spelling
        tried.append(f"{target} ({target.origin}): {why}")
    found = "; ".join(tried) or "this machine: no Ray runs on it"
    raise NoCluster(f"No Ray cluster found. Tried {found}. {_WAY_OUT}")


def _knock(host: str, port: int, limit_s: float) -> str:
    """Why no TCP connection can be opened; "" if one can. In a thread, since looking up a name has no time limit."""
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()
    silence = "no answer: a wrong host, a firewall, or a machine or name server that is down"

    def knock() -> None:
        try:
            socket.create_connection((host, port), limit_s).close()
            answer.put("")
        except (socket.gaierror, UnicodeError):
            answer.put(f"the name {host!r} does not resolve")
        except ConnectionRefusedError:
            answer.put("nothing listens there")
        except TimeoutError:
            answer.put(silence)
        except OSError as error:
            answer.put(str(error.strerror or error))

    threading.Thread(target=knock, name="rm-knock", daemon=True).start()
    try:
        return answer.get(timeout=limit_s)
    except queue.Empty:
        return silence


# --- 3. ask, 4. look -----------------------------------------------------------------------------------------


def _ask(spelling: str, deadline: float) -> str:
    """Why there is no live GCS at `spelling`; "" if there is and this process may use it. Sets the token mode."""
    import grpc  # type: ignore[import-untyped]
    from ray._private import services

    address = services.canonicalize_bootstrap_address(spelling)  # what ray.init will make of it
    host, port, _ = _parse(address, "")
    if why := _knock(host, port, max(0.1, (deadline - time.monotonic()) / 2)):
        return why
    try:
        if not _admits(address, "disabled", deadline) and not _admits(address, "token", deadline):
            _reject(address)
        _look(address, deadline)
    except grpc.RpcError as error:
        return f"something listens, but it does not answer as a Ray GCS does ({error.code().name})"
    return ""


def _admits(address: str, mode: str, deadline: float) -> bool:
    """Whether the GCS serves a process in this token mode. grpc.RpcError: it is no GCS, or not a live one."""
    import grpc

    _set_mode(mode)
    try:
        _call(address, "CheckAlive", deadline)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise
    except Exception:
        if mode == "token":
            return False  # Ray's loader finds no token, or what it finds can't be sent as a header
        raise
    return True


def _reject(address: str) -> NoReturn:
    """Say where Ray looked for a token. Called outside of any `except`: grpc's own error may quote the token."""
    chosen = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    raise AuthenticationFailed(
        f"The Ray cluster at {_plain(address)} wants a token, and {(chosen or ['~/.ray/auth_token'])[0]} has none that "
        "it accepts. Ray looks in RAY_AUTH_TOKEN, then in the file named by RAY_AUTH_TOKEN_PATH, then in "
        "~/.ray/auth_token. Copy ~/.ray/auth_token from the head node to the same place here, or run "
        "`ray get-auth-token` there and put what it prints into that file.",
        address=_plain(address),
    )


def _look(address: str, deadline: float) -> None:
    """Wait until this machine is seen to run a node of the cluster. Without one `ray.init` would wait for 60 s."""
    from ray._private import services
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest

    while True:
        here = [
            GetAllNodeInfoRequest.NodeSelector(node_id=bytes.fromhex(node_id))
            for node_id in services.find_node_ids()
        ]
        nodes: list[Any] = []
        if here:
            alive = {"state_filter": GcsNodeInfo.ALIVE, "node_selectors": here}
            nodes = list(_call(address, "GetAllNodeInfo", deadline, **alive).node_info_list)
        if nodes or time.monotonic() > deadline - 2 * LOOK_AGAIN_S:
            break
        time.sleep(LOOK_AGAIN_S)
    if not nodes:
        raise NoCluster(
            f"The Ray cluster at {_plain(address)} is alive, but none of its nodes runs on this machine, and a Ray "
            "driver must run on a node. Run the program on the cluster: "
            "`ray job submit --address http://HEAD:8265 -- COMMAND`.",
            address=_plain(address),
        )
    if not any(os.access(node.raylet_socket_name, os.W_OK) for node in nodes):
        raise NoCluster(
            f"The Ray cluster at {_plain(address)} is another user's: no permission to open "
            f"{nodes[0].raylet_socket_name}. {_WAY_OUT}",
            address=_plain(address),
        )


def _call(address: str, method: str, deadline: float, **fields: Any) -> Any:
    """One call to the GCS over a channel made as Ray makes its own: TLS, and the token if the mode says so."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    request = getattr(gcs_service_pb2, f"{method}Request")(**fields)
    channel = init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        call = getattr(gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel), method)
        return call(request, timeout=max(0.05, deadline - time.monotonic()))
    finally:
        channel.close()


def _set_mode(mode: str | None) -> None:
    """Make this process use a token or not. Ray reads the variable at import, and again in `Config.initialize`."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if mode is None:
        os.environ.pop(_MODE, None)
    else:
        os.environ[_MODE] = mode
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()  # the file may have been copied here a moment ago
