"""Node types that Ray would launch and that no job of rm could use as it is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from rm.cluster_files.file import ClusterFile, NodeType
from rm.cluster_files.findings import Finding
from rm.cluster_files.machines import known_machines
from rm.core.model import GPU_TYPE


def node_type_doubts(file: ClusterFile) -> Iterator[Finding]:
    """GPUs and their type, type by type; and what a head should not have."""
    for each in file.node_types:
        if each.is_head:
            yield from _head(file, each)
        else:
            yield from _worker(file, each)
        yield from _labels(file, each)
        if each.machine is not None:
            yield from _machine(file, each)
        elif file.provider == "aws":
            yield from _misspelt_machine(file, each)


def _head(file: ClusterFile, head: NodeType) -> Iterator[Finding]:
    resources = head.part("resources")
    if head.gpus:
        yield file.warning(
            "head-gpus",
            (*head.path, "resources"),
            f"the head has {head.gpus} GPUs: it is never removed, so they cost money day and night, and a training "
            "that exhausts its memory takes the allocator along",
            "use a machine without GPUs for the head",
        )
    if resources.get("CPU") != 0:
        has = f"has {resources['CPU']} CPUs" if "CPU" in resources else "has all CPUs of its machine"
        yield file.warning(
            "head-cpus",
            (*head.path, "resources"),
            f"the head {has} for tasks: Ray work can crowd out the GCS, the autoscaler and the allocator",
            "say `resources: {CPU: 0}`; the allocator needs none",
        )


def _worker(file: ClusterFile, kind: NodeType) -> Iterator[Finding]:
    if kind.given.get("max_workers") == 0:
        yield file.warning(
            "never-launched", (*kind.path, "max_workers"), "is 0: no node of this type is ever launched",
            "raise it, or take the type out",
        )  # fmt: skip
    if not kind.gpus:
        yield file.warning(
            "no-gpus",
            (*kind.path, "resources"),
            "has no GPUs and is not the head: only Ray work beside rm could make it start",
            "say `GPU:` with the GPUs of one node, or take the type out",
        )
    elif not kind.gpu_type:
        type_of = kind.machine.gpu_type if kind.machine else ""
        yield file.warning(
            "gpu-type-missing",
            (*kind.path, "labels"),
            f"has GPUs and no label {GPU_TYPE}: before such a node is up, no job that names a GPU type can count on "
            "it, and no quota for one",
            f"add `labels: {{{GPU_TYPE}: {type_of or 'A100'}}}`",
        )


def _labels(file: ClusterFile, kind: NodeType) -> Iterator[Finding]:
    for name in kind.labels:
        near = difflib.get_close_matches(name, [GPU_TYPE], 1, 0.8)
        if name != GPU_TYPE and near:
            yield file.error(
                "label", (*kind.path, "labels", name), "no label of Ray's", f"did you mean {GPU_TYPE!r}?"
            )
    if kind.gpu_type and kind.gpu_type not in _gpu_types():
        same = [each for each in _gpu_types() if each.lower() == kind.gpu_type.lower()]
        if same:
            yield file.error(
                "gpu-type-spelling",
                (*kind.path, "labels", GPU_TYPE),
                f"is {kind.gpu_type!r}, and Ray calls it {same[0]!r}: names are compared letter by letter",
                f"write {same[0]}",
            )


def _machine(file: ClusterFile, kind: NodeType) -> Iterator[Finding]:
    """What the file says about the GPUs, against what the machine has."""
    has = kind.machine
    assert has is not None
    if kind.gpu_type and not kind.is_head and has.gpus and not _same_type(kind.gpu_type, has.gpu_type):
        yield file.error(
            "gpu-type-wrong",
            (*kind.path, "labels", GPU_TYPE),
            f"says {kind.gpu_type}, and {has.name} has {has.gpu_type}: jobs would get GPUs that they did not ask for",
            f"say {has.gpu_type}, or take another machine",
        )
    written = kind.part("resources").get("GPU")
    if isinstance(written, int) and written > has.gpus:
        yield file.error(
            "gpu-count",
            (*kind.path, "resources", "GPU"),
            f"is {written}, and {has.name} has {has.gpus or 'no GPUs'}: jobs would be started on GPUs that don't exist",
            f"say {has.gpus}, or take another machine",
        )
    elif isinstance(written, int) and written < has.gpus and not kind.is_head:
        yield file.warning(
            "gpu-count",
            (*kind.path, "resources", "GPU"),
            f"is {written}, and {has.name} has {has.gpus}: the others are paid for and never used",
            f"say {has.gpus}, or take a smaller machine",
        )


def _misspelt_machine(file: ClusterFile, kind: NodeType) -> Iterator[Finding]:
    name = str(kind.part("node_config").get("InstanceType", ""))
    near = difflib.get_close_matches(name, known_machines("aws"), 1, 0.85)
    if not name:
        yield file.error(
            "missing",
            (*kind.path, "node_config", "InstanceType"),
            "is missing",
            "name the machine, such as g5.xlarge",
        )
    elif near and name.partition(".")[0] == near[0].partition(".")[0]:
        yield file.warning(
            "machine", (*kind.path, "node_config", "InstanceType"), f"no machine {name!r} is known to us",
            f"did you mean {near[0]!r}?",
        )  # fmt: skip


def _same_type(said: str, has: str) -> bool:
    """Ray knows A100-40G and A100-80G as narrower names of A100, for whoever labels nodes by hand."""
    return said == has or said.startswith(f"{has}-")


def _gpu_types() -> frozenset[str]:
    from ray.util import accelerators

    return frozenset(
        str(value) for name, value in vars(accelerators).items() if name.isupper() and isinstance(value, str)
    )
