"""GPUs of the clouds' machines, as far as we know them: their number, and the name that Ray gives to their type.

Whoever is not listed is not judged. The AWS table is compared in the tests with a catalogue of its instance types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpus`: how many, 0 for none. `gpu_type`: as in the label ray.io/accelerator-type, "" for none."""

    name: str
    gpus: int
    gpu_type: str


_ONE_GPU = ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")
_AWS: dict[str, tuple[int, str]] = {
    "p3.2xlarge": (1, "V100"),
    "p3.8xlarge": (4, "V100"),
    "p3.16xlarge": (8, "V100"),
    "p3dn.24xlarge": (8, "V100"),
    "p4d.24xlarge": (8, "A100"),
    "p4de.24xlarge": (8, "A100"),
    "p5.4xlarge": (1, "H100"),
    "p5.48xlarge": (8, "H100"),
    "p5e.48xlarge": (8, "H200"),
    "p5en.48xlarge": (8, "H200"),
    "p6-b200.48xlarge": (8, "B200"),
    "p6-b300.48xlarge": (8, "B300"),
    "g4dn.12xlarge": (4, "T4"),
    "g4dn.metal": (8, "T4"),
    "gr6.4xlarge": (1, "L4"),
    "gr6.8xlarge": (1, "L4"),
    **{f"g4dn.{size}": (1, "T4") for size in _ONE_GPU},
    **{
        f"{family}.{size}": (gpus, kind)
        for family, kind in (("g5", "A10G"), ("g6", "L4"), ("g6e", "L40S"))
        for size, gpus in (
            *((each, 1) for each in _ONE_GPU),
            ("12xlarge", 4),
            ("24xlarge", 4),
            ("48xlarge", 8),
        )
    },
}
_AWS_WITHOUT = frozenset({"t2", "t3", "t3a", "t4g", "m5", "m5a", "m6a", "m6i", "m7a", "m7i", "c5", "c6a", "c6i", "c7a",
                          "c7i", "r5", "r6a", "r6i", "r7a", "r7i"})  # fmt: skip
"""Families of machines that have no GPU."""
_GCP_WITH: dict[str, tuple[int, str]] = {
    **{f"a2-highgpu-{gpus}g": (gpus, "A100") for gpus in (1, 2, 4, 8)},
    **{f"a2-ultragpu-{gpus}g": (gpus, "A100") for gpus in (1, 2, 4, 8)},
    "a2-megagpu-16g": (16, "A100"),
    **{f"a3-highgpu-{gpus}g": (gpus, "H100") for gpus in (1, 2, 4, 8)},
    "a3-megagpu-8g": (8, "H100"),
    "a3-ultragpu-8g": (8, "H200"),
    **{f"g2-standard-{cpus}": (1, "L4") for cpus in (4, 8, 12, 16, 32)},
    "g2-standard-24": (2, "L4"),
    "g2-standard-48": (4, "L4"),
    "g2-standard-96": (8, "L4"),
}
_GCP_ADDED = {
    "nvidia-tesla-t4": "T4",
    "nvidia-tesla-v100": "V100",
    "nvidia-tesla-p100": "P100",
    "nvidia-tesla-p4": "P4",
    "nvidia-tesla-a100": "A100",
    "nvidia-a100-80gb": "A100",
    "nvidia-l4": "L4",
    "nvidia-h100-80gb": "H100",
}


def machine(provider: str, node_config: Any) -> Machine | None:
    """What `node_config` asks the cloud for; None where we don't know it."""
    if not isinstance(node_config, dict):
        return None
    if provider == "aws":
        return _aws(str(node_config.get("InstanceType", "")))
    return _gcp(node_config) if provider == "gcp" else None


def known_machines(provider: str) -> dict[str, Machine]:
    """Machines with GPUs, by name."""
    known = {"aws": _AWS, "gcp": _GCP_WITH}.get(provider, {})
    return {name: Machine(name, gpus, kind) for name, (gpus, kind) in known.items()}


def _aws(name: str) -> Machine | None:
    if name in _AWS:
        return Machine(name, *_AWS[name])
    return Machine(name, 0, "") if name.partition(".")[0] in _AWS_WITHOUT else None


def _gcp(node_config: dict[str, Any]) -> Machine | None:
    name = str(node_config.get("machineType", "")).rpartition("/")[2]
    if name in _GCP_WITH:
        return Machine(name, *_GCP_WITH[name])
    added = node_config.get("guestAccelerators")
    if isinstance(added, list) and len(added) == 1 and isinstance(added[0], dict):
        kind = _GCP_ADDED.get(str(added[0].get("acceleratorType", "")).rpartition("/")[2])
        gpus = added[0].get("acceleratorCount")
        if kind and isinstance(gpus, int):
            return Machine(f"{name} with {gpus} {kind}", gpus, kind)
    return None
