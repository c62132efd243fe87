"""Numbers of a cluster file that contradict each other, its boot time, or the queues' quotas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rm.cluster_files.file import ClusterFile, NodeType
from rm.cluster_files.findings import Finding
from rm.core.policy import ANY, Policy
from rm.core.resources import GPU_UNIT
from rm.lending import owned
from rm.spec import did_you_mean


def size_doubts(file: ClusterFile) -> Iterator[Finding]:
    """Workers and idle timeouts."""
    yield from _workers(file)
    yield from _idle(file)
    if file.provider == "local":
        yield from _own_machines(file)


def _workers(file: ClusterFile) -> Iterator[Finding]:
    of_all = file.max_workers
    for each in file.node_types:
        most = each.given.get("max_workers")
        if not isinstance(most, int):
            continue
        if each.least > most:
            yield file.error(
                "workers",
                (*each.path, "min_workers"),
                f"is {each.least}, above max_workers of {most}",
                "lower it",
            )
        if of_all is not None and most > of_all:
            yield file.warning(
                "workers",
                (*each.path, "max_workers"),
                f"is {most}, and `max_workers` of the whole cluster is {of_all}: it is never reached",
                "raise the one, or lower the other",
            )
    if of_all is None or not file.node_types:
        return
    # By Ray's default a type may have as many nodes as the cluster.
    together = sum(each.most(of_all) - each.is_head for each in file.node_types)
    if together < of_all:
        yield file.warning(
            "workers",
            ("max_workers",),
            f"is {of_all}, and the node types allow {together} together: it is never reached",
            f"say {together}, or allow more of a type",
        )


def _idle(file: ClusterFile) -> Iterator[Finding]:
    waits: list[tuple[tuple[str, ...], float]] = []
    minutes = file.value.get("idle_timeout_minutes", 5 if file.is_cloud else None)
    if isinstance(minutes, int | float):
        waits.append((("idle_timeout_minutes",), minutes * 60.0))
    for each in file.node_types:
        seconds = each.given.get("idle_timeout_s")
        if isinstance(seconds, int | float) and not each.is_head:
            waits.append(((*each.path, "idle_timeout_s"), float(seconds)))
    for path, wait in waits:
        if wait < file.boot_s:
            yield file.warning(
                "idle-timeout",
                path,
                f"an idle node is removed after {wait:g} s, and a new one takes {file.boot_s:g} s to boot: nodes would "
                "go and come between two jobs",
                "wait longer than a boot takes; `metadata: {boot_minutes: …}` says how long that is here",
            )


def _own_machines(file: ClusterFile) -> Iterator[Finding]:
    workers = file.part("provider").get("worker_ips")
    least = file.value.get("min_workers")
    if isinstance(workers, list) and isinstance(least, int) and least < len(workers):
        yield file.warning(
            "own-machines",
            ("min_workers",),
            f"is {least} of {len(workers)}: Ray does not know what GPUs these machines have, so it starts none of the "
            "others for a job that waits",
            f"say {len(workers)}, or leave it out",
        )


# --- quotas --------------------------------------------------------------------------------------------------


def quota_doubts(file: ClusterFile, policy: Policy) -> Iterator[Finding]:
    """Quotas of rm.yaml that the cluster could not fill with all its nodes."""
    quotas, types = owned(policy), {each.gpu_type for each in file.node_types if each.gpus and each.gpu_type}
    named = policy.kinds()
    roots = [queue.name for queue in policy.queues.values() if queue.parent is None]
    wanted = {kind: sum(quotas[name, kind].quota for name in roots) for kind in (ANY, *sorted(named))}
    most = {kind: _launchable(file, kind, named) for kind in wanted}
    for kind, units in wanted.items():
        if not units:
            continue
        what = f"{units / GPU_UNIT:g} {'GPUs of other types' if kind == ANY and named else _gpus(kind)}"
        if not most[kind] and kind != ANY:
            yield file.warning(
                "quota-type",
                ("available_node_types",),
                f"queues own {what}, and no node type has GPUs of type {kind}",
                did_you_mean(kind, types) if types else "label the node types with their GPU type",
            )
        elif units > most[kind] * GPU_UNIT:
            yield file.warning(
                "quota",
                ("max_workers",),
                f"queues own {what}, and all nodes together have at most {most[kind]}: more is promised than there is",
                "raise max_workers, or lower the quotas of rm.yaml",
            )
    yield from _together(file, {kind: units / GPU_UNIT for kind, units in wanted.items()}, most)


def _together(file: ClusterFile, wanted: dict[str, float], most: dict[str, int]) -> Iterator[Finding]:
    """Each quota alone may fit where the cluster's own limit forbids all of them at once."""
    total, room = sum(wanted.values()), _most_gpus(file, file.node_types)
    if total > room and all(gpus <= most[kind] for kind, gpus in wanted.items()):
        yield file.warning(
            "quota",
            ("max_workers",),
            f"queues own {total:g} GPUs in all, and {file.max_workers} nodes have at most {room}",
            "raise max_workers, or lower the quotas of rm.yaml",
        )


def _launchable(file: ClusterFile, kind: str, named: frozenset[str]) -> int:
    """GPUs of a kind, where the cluster has as many nodes of it as it may."""
    return _most_gpus(
        file,
        (
            each
            for each in file.node_types
            if (each.gpu_type not in named if kind == ANY else each.gpu_type == kind)
        ),
    )


def _most_gpus(file: ClusterFile, types: Iterable[NodeType]) -> int:
    left, gpus = file.max_workers or 0, 0
    for each in sorted(types, key=lambda each: -each.gpus):
        if each.is_head:
            gpus += each.gpus
            continue
        nodes = min(left, each.most(file.max_workers or 0))
        left, gpus = left - nodes, gpus + nodes * each.gpus
    return gpus


def _gpus(kind: str) -> str:
    return "GPUs" if kind == ANY else f"GPUs of type {kind}"
