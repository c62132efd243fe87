"""Whether there is a live GCS at an address that a driver here can use. Every step is bounded by the caller's deadline.

1. Knock: resolve the name and open a TCP connection.
2. Ask: `CheckAlive` of the GCS without a token. Answered: the cluster is open. UNAUTHENTICATED: it wants a token; ask
   again with the one that Ray finds. The mode of this process then follows the cluster, whatever RAY_AUTH_MODE says:
   they must agree both ways, so that neither a leftover token nor a missing variable keeps anyone out.
3. Look: a driver needs a raylet of that cluster on its own machine, and permission to open its socket.

The token itself is handled by Ray's own loader and interceptor alone: no message of ours can quote it. Called by
`rm.runtime.attach`, which undoes the token mode if it fails.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from typing import Any, NoReturn

from rm.errors import AuthenticationFailed, NoCluster

MODE = "RAY_AUTH_MODE"
LOOK_AGAIN_S = 0.2


def plain(address: str) -> str:
    """The usual spelling of a loopback address, which `rm.runtime.attach` has to write in capitals for Ray."""
    return address.replace("LOCALHOST:", "127.0.0.1:")


def probe(spelling: str, deadline: float) -> str:
    """Why there is no live GCS at `spelling`; "" if there is and this process may use it. Sets the token mode."""
    import grpc
    from ray._common.network_utils import parse_address
    from ray._private import services

    address = services.canonicalize_bootstrap_address(spelling)  # what ray.init will make of it
    host, port = parse_address(address)
    if why := _knock(host, int(port), max(0.1, (deadline - time.monotonic()) / 2)):
        return why
    try:
        if not _admits(address, "disabled", deadline) and not _admits(address, "token", deadline):
            _reject(address)
        _look(address, deadline)
    except grpc.RpcError as error:
        return f"something listens, but it does not answer as a Ray GCS does ({error.code().name})"
    return ""


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


def _admits(address: str, mode: str, deadline: float) -> bool:
    """Whether the GCS serves a process in this token mode. grpc.RpcError: it is no GCS, or not a live one."""
    import grpc

    set_mode(mode)
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
        f"The Ray cluster at {plain(address)} wants a token, and {(chosen or ['~/.ray/auth_token'])[0]} has none that "
        "it accepts. Ray looks in RAY_AUTH_TOKEN, then in the file named by RAY_AUTH_TOKEN_PATH, then in "
        "~/.ray/auth_token. Copy ~/.ray/auth_token from the head node to the same place here, or run "
        "`ray get-auth-token` there and put what it prints into that file.",
        address=plain(address),
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
            f"The Ray cluster at {plain(address)} is alive, but none of its nodes runs on this machine, and a Ray "
            "driver must run on a node. Run the program on the cluster: "
            "`ray job submit --address http://HEAD:8265 -- COMMAND`.",
            address=plain(address),
        )
    if not any(os.access(node.raylet_socket_name, os.W_OK) for node in nodes):
        raise NoCluster(
            f"The Ray cluster at {plain(address)} is another user's: no permission to open "
            f"{nodes[0].raylet_socket_name}. Start one of your own with `rmctl start --local`.",
            address=plain(address),
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


def set_mode(mode: str | None) -> None:
    """Make this process use a token or not. Ray reads the variable at import, and again in `Config.initialize`."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if mode is None:
        os.environ.pop(MODE, None)
    else:
        os.environ[MODE] = mode
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()  # the file may have been copied here a moment ago
