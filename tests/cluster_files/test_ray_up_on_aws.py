"""cluster.yaml through Ray's own code, up to the instances that EC2 is asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aws_prepare
import boto3
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
ZONE, OURS = "us-west-2a", "203.0.113.7/32"


@pytest.fixture(scope="module")
def catalogue(aws_of_the_module: None) -> Iterator[list[dict[str, Any]]]:
    """EC2's machines, as Ray asks for them; read once, because that takes seconds."""
    from ray.autoscaler._private.aws import node_provider

    found = node_provider.list_ec2_instances("us-west-2", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_provider, "list_ec2_instances", lambda *_: found)
        yield found


@pytest.fixture(scope="module")
def bootstrapped(catalogue: list[dict[str, Any]]) -> dict[str, Any]:
    """What `ray up` makes of cluster.yaml before it starts the head."""
    from ray.autoscaler._private import commands

    aws_prepare.prepare(boto3.Session(), "ray-rm", ZONE, OURS, 100)
    config = yaml.safe_load((REPO / "cluster.yaml").read_text())
    return dict(commands._bootstrap_config(config, no_config_cache=True))


def test_every_node_type_becomes_the_instances_that_it_says(bootstrapped: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    written = yaml.safe_load((REPO / "cluster.yaml").read_text())["available_node_types"]
    provider = AWSNodeProvider(bootstrapped["provider"], bootstrapped["cluster_name"])
    asked: list[dict[str, Any]] = []
    provider.ec2_fail_fast.meta.client.meta.events.register(
        "provide-client-params.ec2.RunInstances", lambda params, **_: asked.append(params)
    )
    ec2 = boto3.client("ec2")
    wanted = [{"Name": "group-name", "Values": ["ray-rm"]}]
    (group,) = ec2.describe_security_groups(Filters=wanted)["SecurityGroups"]
    for name, kind in bootstrapped["available_node_types"].items():
        is_head = name == "head"
        config = {**(bootstrapped["head_node"] if is_head else {}), **kind["node_config"]}
        tags = {TAG_RAY_NODE_KIND: "head" if is_head else "worker", TAG_RAY_USER_NODE_TYPE: name}
        provider.create_node(config, tags, 1 if is_head else 3)
        # moto starts the least number asked for, EC2 the most that it has.
        assert (asked[-1]["MinCount"], asked[-1]["MaxCount"]) == (1, 1 if is_head else 3)
        assert asked[-1]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/")
        wanted = [{"Name": f"tag:{TAG_RAY_USER_NODE_TYPE}", "Values": [name]}]
        (found,) = ec2.describe_instances(Filters=wanted)["Reservations"]
        (each,) = found["Instances"]
        assert each["InstanceType"] == written[name]["node_config"]["InstanceType"]
        assert each["Placement"]["AvailabilityZone"] == ZONE
        assert [its["GroupId"] for its in each["SecurityGroups"]] == [group["GroupId"]]
        assert (each.get("InstanceLifecycle") == "spot") == name.endswith("-spot"), name
        assert (written[name]["labels"]["ray.io/market-type"] == "spot") == name.endswith("-spot"), name
        assert {its["Key"]: its["Value"] for its in each["Tags"]}[TAG_RAY_CLUSTER_NAME] == "ray-rm"
        # Rights in the account for the head, none for a node that runs jobs.
        assert ("IamInstanceProfile" in each) == is_head
        if is_head:
            assert each["IamInstanceProfile"]["Arn"].endswith("/ray-rm-head")
        assert asked[-1]["MetadataOptions"]["HttpTokens"] == "required"
        assert asked[-1]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    assert len(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})) == len(written) - 1


def test_ray_counts_the_gpus_and_types_that_the_file_says(bootstrapped: dict[str, Any]) -> None:
    """Ray looks each machine up; what the file says must be what it has, or a job waits for ever."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    bare = copy.deepcopy(bootstrapped)
    for kind in bare["available_node_types"].values():
        kind["resources"] = {}
    for name, kind in AWSNodeProvider.fillout_available_node_types_resources(bare)[
        "available_node_types"
    ].items():
        written = bootstrapped["available_node_types"][name]
        assert kind["resources"].get("GPU") == written["resources"].get("GPU"), name
        if name == "head":
            assert written["resources"] == {"CPU": 0}
            continue
        assert kind["resources"]["CPU"] == written["resources"]["CPU"], name
        assert kind["resources"][f"accelerator_type:{written['labels']['ray.io/accelerator-type']}"] == 1
        assert written["resources"]["memory"] > 0, "rm plans with the memory of nodes that are not there yet"


def test_the_known_machines_are_those_of_the_catalogue(catalogue: list[dict[str, Any]]) -> None:
    from rm.cluster_files.machines import _AWS_WITHOUT, known_machines

    has = {}
    for each in catalogue:
        gpus = each.get("GpuInfo", {}).get("Gpus", [])
        has[each["InstanceType"]] = (sum(its["Count"] for its in gpus), gpus[0]["Name"] if gpus else "")
    # Retired from the catalogue, still to be had.
    retired = {name for name in known_machines("aws") if name.startswith("p3.")}
    for name, known in known_machines("aws").items():
        if name not in retired:
            assert has[name] == (known.gpus, known.gpu_type), name
    assert not [name for name, (gpus, _) in has.items() if gpus and name.partition(".")[0] in _AWS_WITHOUT]


def test_only_the_nodes_and_our_own_addresses_get_in(bootstrapped: dict[str, Any]) -> None:
    """After `ray up`, which adds SSH for the whole world to a group without rules."""
    wanted = [{"Name": "group-name", "Values": ["ray-rm"]}]
    (group,) = boto3.client("ec2").describe_security_groups(Filters=wanted)["SecurityGroups"]
    rules = group["IpPermissions"]
    open_to = [each["CidrIp"] for rule in rules for each in rule["IpRanges"]]
    assert open_to == [OURS]
    assert [rule["FromPort"] for rule in rules if rule["IpRanges"]] == [22]
    assert not any(rule.get("Ipv6Ranges") for rule in rules)
    assert all(rule["UserIdGroupPairs"] for rule in rules if not rule["IpRanges"])
