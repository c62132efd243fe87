"""deploy/kuberay.yaml against the fields of the RayCluster resource, and through Ray's own reader of it.

The models below are our own, strict, and hold only the fields that the manifest uses: their names, types and places
are those of KubeRay's CRD `rayclusters.ray.io`, version v1 (ray-project/kuberay,
helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml, as of KubeRay 1.5). A field that is misspelt or stands at
the wrong place is an error, as it would silently be dropped by Kubernetes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

REPO = Path(__file__).resolve().parents[2]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0)]


class Metadata(Strict):
    name: Name


class Amounts(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] | None = None


class Variable(Strict):
    name: str
    value: str


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern="^/")]  # noqa: N815


class Port(Strict):
    containerPort: Annotated[int, Field(gt=0, lt=65536)]  # noqa: N815
    name: Annotated[str, Field(max_length=15)]


class Exec(Strict):
    command: list[str]


class Hook(Strict):
    exec: Exec


class Lifecycle(Strict):
    postStart: Hook  # noqa: N815


class Container(Strict):
    name: Name
    image: str
    env: list[Variable] = []
    lifecycle: Lifecycle | None = None
    ports: list[Port] = []
    resources: Amounts
    volumeMounts: list[Mount] = []  # noqa: N815


class Claim(Strict):
    claimName: Name  # noqa: N815


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None  # noqa: N815
    emptyDir: EmptyDir | None = None  # noqa: N815


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class SecurityContext(Strict):
    runAsNonRoot: bool  # noqa: N815
    runAsUser: int  # noqa: N815
    runAsGroup: int  # noqa: N815
    fsGroup: int  # noqa: N815


class PodSpec(Strict):
    restartPolicy: Literal["Never", "Always", "OnFailure"]  # noqa: N815
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    nodeSelector: dict[str, str] = {}  # noqa: N815
    tolerations: list[Toleration] = []
    securityContext: SecurityContext  # noqa: N815
    terminationGracePeriodSeconds: Count = 30  # noqa: N815


class Pod(Strict):
    spec: PodSpec


class Group(Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: Pod


class Head(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]  # noqa: N815


class Workers(Group):
    groupName: Name  # noqa: N815
    replicas: Count
    minReplicas: Count  # noqa: N815
    maxReplicas: Count  # noqa: N815
    labels: dict[str, str]


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]  # noqa: N815
    idleTimeoutSeconds: Count  # noqa: N815
    resources: Amounts


class RayClusterSpec(Strict):
    rayVersion: str  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: AutoscalerOptions  # noqa: N815
    headGroupSpec: Head  # noqa: N815
    workerGroupSpecs: list[Workers]  # noqa: N815


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


def _documents() -> dict[str, Any]:
    return {
        f"{each['kind']}/{each['metadata']['name']}": each
        for each in yaml.safe_load_all((REPO / "deploy" / "kuberay.yaml").read_text())
    }


@pytest.fixture
def manifest() -> dict[str, Any]:
    return copy.deepcopy(_documents()["RayCluster/ray-rm"])


def test_every_field_is_one_of_the_resource(manifest: dict[str, Any]) -> None:
    cluster = RayCluster.model_validate(manifest)
    for group in (cluster.spec.headGroupSpec, *cluster.spec.workerGroupSpecs):
        pod = group.template.spec
        mounted = {each.name for container in pod.containers for each in container.volumeMounts}
        assert mounted == {each.name for each in pod.volumes}
    names = [each.groupName for each in cluster.spec.workerGroupSpecs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "autoscalerOption"),
        ("spec", "headGroupSpec", "labelz"),
        ("spec", "autoscalerOptions", "idleTimeout"),
    ],
)
def test_a_slip_would_be_seen(manifest: dict[str, Any], path: tuple[str, ...]) -> None:
    place = manifest
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = {}
    with pytest.raises(ValidationError, match=path[-1]):
        RayCluster.model_validate(manifest)


def test_rays_autoscaler_reads_the_gpus_and_labels_that_jobs_ask_for(manifest: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    # Kubernetes fills the namespace in.
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0)) == (0, 0)
    found = {
        name: (each["resources"]["GPU"], each["labels"]["ray.io/accelerator-type"], each["min_workers"])
        for name, each in types.items()
        if name != config["head_node_type"]
    }
    assert found == {"a10g-1": (1, "A10G", 0), "a10g-4": (4, "A10G", 0), "a100-8": (8, "A100", 0)}
    assert config["idle_timeout_minutes"] == 10


def test_machines_are_chosen_that_have_these_gpus(manifest: dict[str, Any]) -> None:
    from rm.cluster_files.machines import machine

    for group in manifest["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        has = machine("aws", {"InstanceType": pod["nodeSelector"]["node.kubernetes.io/instance-type"]})
        assert has is not None
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(has.gpus)
        assert group["labels"]["ray.io/accelerator-type"] == has.gpu_type


def test_the_allocator_has_its_home_on_a_volume_that_outlives_the_head(manifest: dict[str, Any]) -> None:
    documents = _documents()
    pod = manifest["spec"]["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"]}
    assert env["RM_HOME"].startswith("/srv/ray-rm/")
    assert f"PersistentVolumeClaim/{volumes[mounts['/srv/ray-rm']]}" in documents
    shared = documents[f"PersistentVolumeClaim/{volumes[mounts[env['RM_CHECKPOINT_ROOT']]]}"]
    assert shared["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "rmctl start" in container["lifecycle"]["postStart"]["exec"]["command"][-1]


def test_no_token_stands_in_the_manifest() -> None:
    assert not [each for each in _documents() if each.startswith("Secret/")]
