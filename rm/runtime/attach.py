"""Attaching this process to a Ray cluster that runs already, or saying within seconds why that is impossible.

`ray.init(address=…)` alone is bad at saying no: a dead address blocks it for 40 to 80 s, a wrong token for 20 s,
and a driver whose token mode differs from the cluster's connects and then loses every actor. So, in this order:

1. Where: the argument, else RAY_ADDRESS, else what runs on this machine. Never a new Ray.
2. Knock: resolve the name and open a TCP connection, both with a time limit.
3. Ask: `CheckAlive` of the GCS without a token. Answered: the cluster is open. UNAUTHENTICATED: it wants a token; ask
   again with the one Ray finds. The mode of this process follows the cluster, whatever RAY_AUTH_MODE says: they
   must agree both ways, so that neither a leftover token nor a missing variable keeps anyone out.
4. Look: a driver needs a raylet of that cluster on its own machine, and permission to open its socket.
5. Only then `ray.init`, which takes well under a second.

The token itself is handled by Ray's own loader and interceptor alone: no message of ours can quote it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from rm.errors import AuthenticationFailed, ClusterError, NoCluster, RequestError

NETWORK_SHARE = 0.8
"""Of `timeout_s`, what the network may take; the rest is for `import ray`, which no deadline can cut short."""
_MODE = "RAY_AUTH_MODE"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_WAY_OUT = (
    "Start one with `ray start --head` or `rmctl start --local`, or name one that runs with "
    "address='HOST:PORT' or RAY_ADDRESS (the port of its GCS, 6379 unless chosen otherwise)."
)
_UNSUPPORTED = {
    "local": "it would start a new Ray, which attaching never does",
    "ray://": "Ray Client is not supported; run the program on a node of the cluster, with `ray job submit`",
    "http": "this is a dashboard, for `ray job submit` (which also reads it from RAY_API_SERVER_ADDRESS); "
    "a driver needs the address of the GCS",
}
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

    `address` is "host:port" of a GCS, or None or "auto": RAY_ADDRESS, else the cluster that runs on this machine. An existing
    connection is used as it is. In a `ray job submit` driver the job's runtime_env is kept. The output of workers is not
    copied to this process (it would include the allocator's own): whoever wants it calls `ray.init` first. Called
    by `rm.runtime.connect`; safe from several threads.

    Raises NoCluster (nothing usable at the address), AuthenticationFailed (the cluster wants a token that was not found
    or is not its own), ClusterError (Ray refuses, for example another version) and RequestError (attached elsewhere).
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
            spelling = _reach([asked] if asked else _on_this_machine(), deadline)
            _init(spelling)
        except BaseException:
            _set_mode(mode_before)
            raise
        if mode_before is None and os.environ[_MODE] == "disabled":
            del os.environ[_MODE]  # children of this process may be meant for another cluster
        return _plain(ray.get_runtime_context().gcs_address)


# --- 1. where ---------------------------------------------------------------------------------------------------


def _named(address: str | None, origin: str) -> _Target | None:
    """The address in words that a person chose; None where they left it open. Needs no Ray, so it refuses at once."""
    if address in {None, "", "auto"}:
        return None
    assert address is not None
    for start, why in _UNSUPPORTED.items():
        if address.startswith(start):
            _refuse(address, origin, why)
    return _parse(address, origin)


def _parse(address: str, origin: str) -> _Target:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s\[\]:/@]+)):(\d{1,5})", address.strip())
    if match is None or not 0 < int(match[3]) < 65536:
        _refuse(address, origin, "an address looks like 'HOST:PORT', for example '10.0.0.5:6379'")
    return _Target(match[1] or match[2], int(match[3]), origin)


def _refuse(address: str, origin: str, why: str) -> NoReturn:
    raise NoCluster(f"{address!r} ({origin}) can't be attached to: {why}. {_WAY_OUT}", address=address)


def _on_this_machine() -> Iterator[_Target]:
    """What Ray's "auto" means, best first: the cluster of the last `ray start`, else the only one that runs.

    Unlike "auto", a file left over by a cluster that is gone is passed over, and of several clusters none is picked at random.
    """
    from ray._common.utils import get_ray_address_file
    from ray._private import services

    path = get_ray_address_file(None)
    last = None
    with contextlib.suppress(OSError, NoCluster), open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        last = _parse(file.read(), f"from {path}, which is out of date if that cluster has ended")
    if last:
        yield last
    services.find_gcs_addresses.cache_clear()
    running = [_parse(found, "runs on this machine") for found in sorted(services.find_gcs_addresses())]
    others = [each for each in running if last is None or not _same(each, last)]
    if len(others) > 1:
        listed = ", ".join(str(each) for each in others)
        raise NoCluster(
            f"Several Ray clusters run on this machine: {listed}. Name one with address= or RAY_ADDRESS."
        )
    yield from others


def _same(one: _Target, other: _Target) -> bool:
    """Whether both name the same GCS, as far as can be told without asking."""
    hosts = {one.host.lower(), other.host.lower()}
    if one.port != other.port or len(hosts) == 1:
        return one.port == other.port
    from ray._private import services

    if hosts <= {*_LOOPBACK, services.get_node_ip_address()}:
        return True
    return bool(_resolved(one.host, 1.0) & _resolved(other.host, 1.0))


def _resolved(host: str, limit_s: float) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in _resolve(host, 0, time.monotonic() + limit_s)}
    except OSError:
        return set()


def _already_attached(asked: _Target | None) -> str:
    """The address of the connection there is. RequestError where another one was asked for: a process has only one."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        raise RequestError(
            "This process uses Ray Client (ray://), which is not supported: call ray.shutdown() and run on a "
            "node of the cluster, for example with `ray job submit`.",
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


def _plain(gcs_address: str) -> str:
    return gcs_address.replace("LOCALHOST:", "127.0.0.1:")


# --- 2 to 4. knock, ask, look -----------------------------------------------------------------------------------


def _reach(targets: Iterator[_Target] | list[_Target], deadline: float) -> str:
    """The first target that is alive and usable, spelled as `ray.init` needs it; the token mode is set to match."""
    tried = []
    for target in targets:
        # Ray replaces a loopback host by this machine's outward address, at which a GCS that is bound to loopback does
        # not listen. It leaves the name alone in capitals, and names have no case.
        spellings = (
            [str(target), f"LOCALHOST:{target.port}"] if target.host.lower() in _LOOPBACK else [str(target)]
        )
        for n, spelling in enumerate(spellings, 1):
            limit = deadline if n == len(spellings) else (deadline + time.monotonic()) / 2
            why = _ask(spelling, limit)
            if not why:
                return spelling
        tried.append(f"{target} ({target.origin}): {why}")
    raise NoCluster(
        f"No Ray cluster found. Tried {'; '.join(tried) or 'this machine: no Ray runs on it'}. {_WAY_OUT}"
    )


def _ask(spelling: str, deadline: float) -> str:
    """Why there is no live GCS at `spelling` as Ray would read it; "" if there is and this process may use it."""
    import grpc
    from ray._private import services

    actual = services.canonicalize_bootstrap_address(spelling)
    assert actual is not None
    host, port, _ = _parse(actual, "")
    if why := _knock(host, port, (deadline + time.monotonic()) / 2):
        return why
    for mode in ("disabled", "token"):
        _set_mode(mode)
        try:
            _call(actual, "CheckAlive", deadline)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                continue
            return f"something listens, but it does not answer as a Ray GCS ({error.code().name})"
        except Exception:  # Ray's loader: no token, an unreadable file; grpc: not sendable as a header
            _reject(actual)
        _look(actual, deadline)
        return ""
    _reject(actual)


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """getaddrinfo with a time limit, which it lacks. OSError: it failed; TimeoutError: no answer in time."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=ask, name="rm-resolve", daemon=True).start()
    try:
        found = answer.get(timeout=max(0.05, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise OSError(str(found)) from found
    return list(found)


def _knock(host: str, port: int, deadline: float) -> str:
    """Why no TCP connection can be opened; "" if one can."""
    try:
        ways = _resolve(host, port, deadline)
    except TimeoutError:
        return f"the name {host!r} could not be looked up in time"
    except OSError:
        return f"the name {host!r} does not resolve"
    why = "it has no address"
    for n, (family, kind, protocol, _, where) in enumerate(ways):
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(max(0.05, (deadline - time.monotonic()) / (len(ways) - n)))
            try:
                connection.connect(where)
                return ""
            except ConnectionRefusedError:
                why = "nothing listens there"
            except TimeoutError:
                why = "no answer: a wrong host, a firewall, or a machine that is down"
            except OSError as error:
                why = str(error.strerror or error)
    return why


def _call(address: str, method: str, deadline: float, **fields: Any) -> Any:
    """One call to the GCS over a channel made as Ray makes its own: TLS, and the token if the mode says so."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    channel = init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        request = getattr(messages, f"{method}Request")(**fields)
        return getattr(NodeInfoGcsServiceStub(channel), method)(
            request, timeout=max(0.05, deadline - time.monotonic())
        )
    finally:
        channel.close()


def _look(address: str, deadline: float) -> None:
    """Wait until a node of this cluster on this machine is seen. Without one `ray.init` would wait for 60 s."""
    from ray._private import services
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest as Request

    while True:
        ids = [bytes.fromhex(node_id) for node_id in services.find_node_ids()]
        nodes = (
            ids
            and _call(
                address,
                "GetAllNodeInfo",
                deadline,
                state_filter=GcsNodeInfo.ALIVE,
                node_selectors=[Request.NodeSelector(node_id=node_id) for node_id in ids],
            ).node_info_list
        )
        if nodes:
            break
        if time.monotonic() > deadline - 0.2:
            raise NoCluster(
                f"The Ray cluster at {address} is alive, but none of its nodes runs on this machine, and a Ray driver "
                "must run on a node. Run the program on the cluster: "
                "`ray job submit --address http://HEAD:8265 -- COMMAND`.",
                address=address,
            )
        time.sleep(0.1)
    if not any(os.access(node.raylet_socket_name, os.W_OK) for node in nodes):
        raise NoCluster(
            f"The Ray cluster at {address} belongs to another user of this machine: no permission to open "
            f"{nodes[0].raylet_socket_name}. {_WAY_OUT}",
            address=address,
        )


def _set_mode(mode: str | None) -> None:
    """Make this process use a token or not. Ray reads the variable once, at import; `Config.initialize` reads it again."""
    from ray._raylet import AuthenticationTokenLoader, Config

    if mode is None:
        os.environ.pop(_MODE, None)
    else:
        os.environ[_MODE] = mode
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()  # the file may have been copied here a moment ago


def _reject(address: str) -> NoReturn:
    """AuthenticationFailed, saying where Ray looked. No cause is chained: grpc's may quote the token."""
    places = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    place = places[0] if places else "~/.ray/auth_token"
    raise AuthenticationFailed(
        f"The Ray cluster at {address} wants a token, and {place} {'names' if 'PATH' in place else 'holds'} none that "
        "it accepts. Ray looks in RAY_AUTH_TOKEN, then in the file named by RAY_AUTH_TOKEN_PATH, then in "
        "~/.ray/auth_token. Copy ~/.ray/auth_token from the head node to the same place here, or run "
        "`ray get-auth-token` there and put what it prints into that file.",
        address=address,
    ) from None


# --- 5. connect -------------------------------------------------------------------------------------------------


def _init(spelling: str) -> None:
    import ray

    try:
        ray.init(address=spelling, logging_level=logging.WARNING, log_to_driver=False)
    except ray.exceptions.AuthenticationError:
        ray.shutdown()
        _reject(_plain(spelling))
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        ray.shutdown()  # a half-made connection would pass for a whole one
        raise ClusterError(
            f"The Ray cluster at {_plain(spelling)} is alive, but Ray can't attach to it: {error}"
        ) from error
