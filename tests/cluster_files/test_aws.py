"""What deploy/ makes in AWS for cluster.yaml, and how a head comes to the volume with the ledger."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import aws_home
import aws_prepare
import boto3
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
ZONE, OURS = "us-west-2a", "203.0.113.7/32"


@pytest.fixture
def prepared(aws: None) -> dict[str, str]:
    return aws_prepare.prepare(boto3.Session(), "ray-rm", ZONE, OURS, 100)


def _rules(ec2: Any) -> list[dict[str, Any]]:
    groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["ray-rm"]}])
    (group,) = groups["SecurityGroups"]
    return list(group["IpPermissions"])


# --- who can reach it ----------------------------------------------------------------------------------------


def test_a_group_that_ray_made_first_is_closed(aws: None) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    ec2 = boto3.client("ec2")
    bootstrap_aws(prepare_config(yaml.safe_load((REPO / "cluster.yaml").read_text())))
    assert "0.0.0.0/0" in [each["CidrIp"] for rule in _rules(ec2) for each in rule["IpRanges"]]
    aws_prepare.prepare(boto3.Session(), "ray-rm", ZONE, OURS, 100)
    assert [each["CidrIp"] for rule in _rules(ec2) for each in rule["IpRanges"]] == [OURS]


def test_the_head_may_do_what_the_autoscaler_does_and_no_more(prepared: dict[str, str]) -> None:
    iam = boto3.client("iam")
    policy = iam.get_role_policy(RoleName="ray-rm-head", PolicyName="ray-rm-head")["PolicyDocument"]
    policy = json.loads(policy) if isinstance(policy, str) else policy
    actions = {
        action
        for each in policy["Statement"]
        for action in ([each["Action"]] if isinstance(each["Action"], str) else each["Action"])
    }
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags", "ec2:AttachVolume"} <= actions
    assert not {each for each in actions if each.startswith(("iam:", "s3:", "sts:")) or each.endswith(":*")}
    assert not iam.list_attached_role_policies(RoleName="ray-rm-head")["AttachedPolicies"]


@pytest.mark.parametrize("words", ["0.0.0.0/0", "10.0.0.0/7", "home", "203.0.113.7/24"])
def test_ssh_from_everywhere_is_refused(words: str) -> None:
    with pytest.raises(SystemExit):
        aws_prepare.main(["--zone", ZONE, "--ssh-from", words])


# --- preparing -----------------------------------------------------------------------------------------------


def test_preparing_twice_changes_nothing(prepared: dict[str, str]) -> None:
    before = _rules(boto3.client("ec2"))
    assert aws_prepare.prepare(boto3.Session(), "ray-rm", ZONE, OURS, 100) == prepared
    assert _rules(boto3.client("ec2")) == before
    volumes = boto3.client("ec2").describe_volumes(Filters=[{"Name": "tag:Name", "Values": ["ray-rm-home"]}])
    assert [each["Encrypted"] for each in volumes["Volumes"]] == [True]


def test_another_zone_than_the_volume_has_is_refused(prepared: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match="us-west-2a"):
        aws_prepare.prepare(boto3.Session(), "ray-rm", "us-west-2b", OURS, 100)


def test_the_env_file_is_ours_alone_and_a_shell_reads_it(aws: None, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "aws.env"
    aws_prepare.main(["--zone", ZONE, "--ssh-from", OURS, "--env-file", str(path)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = subprocess.run(["sh", "-c", f'. {path}; echo "$RM_AWS_VOLUME"'], capture_output=True, text=True)
    assert said.stdout.startswith("vol-")


# --- the volume of the head ----------------------------------------------------------------------------------


def _machine(ec2: Any) -> str:
    subnet = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [ZONE]}])["Subnets"][0]
    made = ec2.run_instances(
        ImageId="ami-12c6146b", InstanceType="m6i.xlarge", MinCount=1, MaxCount=1, SubnetId=subnet["SubnetId"]
    )
    return str(made["Instances"][0]["InstanceId"])


def _holders(ec2: Any, volume: str) -> list[str]:
    return [
        each["InstanceId"] for each in ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Attachments"]
    ]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_home, "POLL_S", 0.01)
    monkeypatch.setenv(
        "PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin"
    )  # mkfs and blkid, which root finds there


def test_the_next_head_gets_the_volume_of_one_that_ended(prepared: dict[str, str]) -> None:
    ec2, volume = boto3.client("ec2"), prepared["RM_AWS_VOLUME"]
    first, second = _machine(ec2), _machine(ec2)
    aws_home.attach(ec2, volume, first)
    aws_home.attach(ec2, volume, first)
    assert _holders(ec2, volume) == [first]
    ec2.stop_instances(InstanceIds=[first])
    aws_home.attach(ec2, volume, second)
    assert _holders(ec2, volume) == [second]


def test_a_head_that_still_runs_keeps_the_volume(prepared: dict[str, str]) -> None:
    ec2, volume = boto3.client("ec2"), prepared["RM_AWS_VOLUME"]
    first, second = _machine(ec2), _machine(ec2)
    aws_home.attach(ec2, volume, first)
    with pytest.raises(SystemExit, match=f"in use by {first}, which is running"):
        aws_home.attach(ec2, volume, second)
    assert _holders(ec2, volume) == [first]


def test_a_file_system_is_made_only_where_nothing_is(tmp_path: Path) -> None:
    image = tmp_path / "volume"
    image.write_bytes(bytes(4 * 2**20))
    assert aws_home.make_file_system(image)
    made = image.read_bytes()
    assert not aws_home.make_file_system(image)
    assert image.read_bytes() == made
    other = tmp_path / "swap"
    other.write_bytes(bytes(2**20))
    subprocess.run(["mkswap", str(other)], check=True, capture_output=True)
    swap = other.read_bytes()
    with pytest.raises(SystemExit, match="holds swap"):
        aws_home.make_file_system(other)
    assert other.read_bytes() == swap


def test_fstab_gets_one_line(tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text("LABEL=root / ext4 defaults 0 1\n")
    for _ in range(2):
        aws_home.add_to_fstab(fstab, Path("/srv/ray-rm"))
    assert fstab.read_text() == (
        "LABEL=root / ext4 defaults 0 1\nLABEL=ray-rm-home /srv/ray-rm ext4 defaults,nofail 0 2\n"
    )
