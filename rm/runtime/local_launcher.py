"""The process that starts the Ray of a `LocalRay` and, if that is to share its starter's fate, watches the starter.

Run by `LocalRay.start` with one argument, the order as JSON; it reports LocalRay's fields as JSON in READY. Killed at
any moment, it leaves nothing that `end` would not find.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import psutil

from rm.runtime.default_cluster import become_default
from rm.runtime.local import READY, LocalRay
from rm.runtime.local_processes import end, is_free

LOGICAL_GPUS = 4
"""How many GPUs a node pretends to have if the machine has none and no number is asked for."""
REPORT_PERIOD_MS = 20
"""How often a raylet tells the GCS what is free. Ray's 100 ms delay the next placement group by as much."""
LOOK_S = 0.5


def main() -> NoReturn:
    """Start the nodes as ordered, report, and leave or keep watch."""
    order = json.loads(sys.argv[1])
    fate_share = order["fate_share"]
    local = LocalRay(order["key"], order["directory"], record=order["record"])
    try:
        from ray._common.utils import get_ray_address_file

        default_file = Path(get_ray_address_file(None))
        os.environ["RAY_TMPDIR"] = local.directory  # where all of this Ray and its jobs write, and look it up
        _ensure_token()
        _start_nodes(local, order)
        if not fate_share:
            local.default_file = become_default(local.address, default_file)
        for path in filter(None, (local.record, f"{local.directory}/{READY}")):
            Path(f"{path}.new").write_text(json.dumps(asdict(local)))
            Path(f"{path}.new").rename(path)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the starter, or the kernel, ends what there is of the cluster
    if fate_share:
        _watch(order["starter"])
        end(local.key)
        local.remove_files()
    os._exit(0)  # without Ray's own exit handlers, which would end the cluster


def _watch(starter: int) -> None:
    """Return when the starter is gone or drops its end of our stdin, or on SIGTERM.

    The pipe tells at once, but a child that the starter forked may hold it open for longer than the starter lives.
    """
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    while not told and os.getppid() == starter and not select.select([0], [], [], LOOK_S)[0]:
        pass


def _ensure_token() -> None:
    """With RAY_AUTH_MODE=token, make a token if there is none, readable to its owner alone; Ray's would be to all."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

    mask = os.umask(0o077)
    ensure_token_if_auth_enabled(create_token_if_missing=True)
    os.umask(mask)


def _start_nodes(local: LocalRay, order: dict[str, Any]) -> None:
    from ray._private.utils import get_num_cpus
    from ray.cluster_utils import Cluster

    labels = order["labels"]
    devices = _share_gpus(local, order["num_gpus"], len(labels))
    common = {
        "node_ip_address": "127.0.0.1",
        "num_cpus": order["num_cpus"] or max(1, get_num_cpus() // len(labels)),
        "object_store_memory": order["object_store_bytes"],
        "dashboard_agent_listen_port": 0,
    }
    head = {
        "include_dashboard": order["dashboard"],
        "dashboard_host": "127.0.0.1",
        "dashboard_port": order["dashboard_port"] if is_free(order["dashboard_port"]) else 0,
        "_system_config": {"raylet_report_resources_period_milliseconds": REPORT_PERIOD_MS},
    }
    if len(labels) > 1:  # each node would count all of the machine's memory as its own
        common["memory"] = psutil.virtual_memory().available // len(labels) - order["object_store_bytes"]
    cluster = Cluster(shutdown_at_exit=order["fate_share"])  # True: its processes get PR_SET_PDEATHSIG
    for one, gpus, (variable, ids) in zip(labels, local.gpus_per_node, devices, strict=True):
        if variable:
            os.environ[variable] = ids
        cluster.add_node(**common, num_gpus=gpus, labels=one, **(head if cluster.head_node is None else {}))
    local.address = cluster.address
    local.dashboard_url = f"http://{cluster.webui_url}" if order["dashboard"] else ""


def _share_gpus(local: LocalRay, wanted: int | None, nodes: int) -> list[tuple[str, str]]:
    """Settle what the GPUs of `local` are. For each node: the variable that names its devices, and the devices."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    kind = get_accelerator_manager_for_resource("GPU")
    variable = kind.get_visible_accelerator_ids_env_var()
    visible = kind.get_current_process_visible_accelerator_ids()
    local.gpus_found = kind.get_current_node_num_accelerators()
    local.gpu_type = (kind.get_current_node_accelerator_type() if local.gpus_found else None) or ""
    ids = [str(n) for n in range(local.gpus_found)] if visible is None else visible[: local.gpus_found]
    each = len(ids) // nodes if wanted is None else wanted
    local.real_gpus = 0 < each * nodes <= len(ids)
    if local.real_gpus:
        local.gpus_per_node = [each] * nodes
        return [(variable, ",".join(ids[n * each : (n + 1) * each])) for n in range(nodes)]
    os.environ.pop(variable, None)  # Ray refuses to count more devices than it names
    local.gpus_per_node = [LOGICAL_GPUS if wanted is None else wanted] * nodes
    return [("", "")] * nodes
