"""Makes in AWS what cluster.yaml expects and what must outlive every head; run it once, from your own machine.

A security group that lets nobody in but its own nodes, and your addresses for SSH; an encrypted volume for the ledger,
its logs and results; an encrypted file system for checkpoints; a role for the head that may start and end GPU nodes
and attach that volume, and nothing else. Running it again changes only what differs. Needs boto3 and the rights to
make these things. Which volume and which file system they are goes into an env file that `ray up` copies to the nodes.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import sys
from pathlib import Path
from typing import Any

ENV_FILE = Path("~/.config/ray-rm/aws.env")


def prepare(session: Any, name: str, zone: str, ssh_from: str, volume_gib: int) -> dict[str, str]:
    """All of it, in the account and region of the boto3 `session`. Returns the lines of the env file."""
    ec2 = session.client("ec2")
    subnet = _subnet(ec2, zone)
    group = security_group(ec2, name, subnet["VpcId"], ssh_from)
    volume = home_volume(ec2, name, zone, volume_gib)
    head_role(session, name, volume)
    system = checkpoints(session.client("efs"), name, subnet["SubnetId"], group)
    return {
        "RM_AWS_REGION": session.region_name,
        "RM_AWS_VOLUME": volume,
        "RM_AWS_CHECKPOINTS": f"{system}.efs.{session.region_name}.amazonaws.com",
    }


def _subnet(ec2: Any, zone: str) -> dict[str, Any]:
    wanted = [{"Name": "availability-zone", "Values": [zone]}, {"Name": "default-for-az", "Values": ["true"]}]
    found = ec2.describe_subnets(Filters=wanted)["Subnets"]
    if not found:
        sys.exit(f"--zone: {zone} has no default subnet; make one with `aws ec2 create-default-subnet`")
    return dict(found[0])


def security_group(ec2: Any, name: str, vpc: str, ssh_from: str) -> str:
    """Everything among its own nodes, SSH from `ssh_from`. Whatever else is open there is closed."""
    wanted = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = ec2.describe_security_groups(Filters=wanted)["SecurityGroups"]
    group = (
        found[0]["GroupId"]
        if found
        else ec2.create_security_group(GroupName=name, Description="Ray nodes of ray-rm", VpcId=vpc)[
            "GroupId"
        ]
    )
    rules = ec2.describe_security_group_rules(Filters=[{"Name": "group-id", "Values": [group]}])
    among, ssh = False, False
    for rule in rules["SecurityGroupRules"]:
        if rule["IsEgress"]:
            continue
        if rule["IpProtocol"] == "-1" and rule.get("ReferencedGroupInfo", {}).get("GroupId") == group:
            among = True
        elif rule["FromPort"] == rule["ToPort"] == 22 and rule.get("CidrIpv4") == ssh_from:
            ssh = True
        else:
            ec2.revoke_security_group_ingress(
                GroupId=group, SecurityGroupRuleIds=[rule["SecurityGroupRuleId"]]
            )
    missing: list[dict[str, Any]] = []
    if not among:
        missing.append({"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]})
    if not ssh:
        missing.append(
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_from}]}
        )
    if missing:
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=missing)
    return str(group)


def home_volume(ec2: Any, name: str, zone: str, gib: int) -> str:
    """The volume for RM_HOME: found by its tag, or made."""
    tag = f"{name}-home"
    found = ec2.describe_volumes(Filters=[{"Name": "tag:Name", "Values": [tag]}])["Volumes"]
    if len(found) > 1:
        sys.exit(f"several volumes are called {tag}; rename all but the one with the ledger")
    if found:
        if found[0]["AvailabilityZone"] != zone:
            sys.exit(
                f"--zone: the volume {tag} is in {found[0]['AvailabilityZone']}, and a head in {zone} can't have it"
            )
        return str(found[0]["VolumeId"])
    made = ec2.create_volume(
        AvailabilityZone=zone,
        Size=gib,
        VolumeType="gp3",
        Encrypted=True,
        TagSpecifications=[{"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": tag}]}],
    )
    return str(made["VolumeId"])


def checkpoints(efs: Any, name: str, subnet: str, group: str) -> str:
    """A file system that all nodes mount, reachable from the security group only."""
    # The token makes a second call find the first one's.
    found = efs.describe_file_systems(CreationToken=name)["FileSystems"]
    if found:
        system = found[0]["FileSystemId"]
    else:
        tags = [{"Key": "Name", "Value": f"{name}-checkpoints"}]
        system = efs.create_file_system(CreationToken=name, Encrypted=True, Tags=tags)["FileSystemId"]
        _until_available(efs, system)
    if not efs.describe_mount_targets(FileSystemId=system)["MountTargets"]:
        efs.create_mount_target(FileSystemId=system, SubnetId=subnet, SecurityGroups=[group])
    return str(system)


def _until_available(efs: Any, system: str) -> None:
    import time

    deadline = time.monotonic() + 120
    while efs.describe_file_systems(FileSystemId=system)["FileSystems"][0]["LifeCycleState"] != "available":
        if time.monotonic() > deadline:
            sys.exit(f"the file system {system} is not available after 2 minutes; run this again")
        time.sleep(2)


def head_role(session: Any, name: str, volume: str) -> None:
    """The role and instance profile of the head. GPU nodes get none: a job's code has no rights in the account."""
    iam, role = session.client("iam"), f"{name}-head"
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
        ],
    }
    try:
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(trust))
    except iam.exceptions.EntityAlreadyExistsException:
        pass
    iam.put_role_policy(RoleName=role, PolicyName=role, PolicyDocument=json.dumps(head_policy(name, volume)))
    try:
        iam.create_instance_profile(InstanceProfileName=role)
    except iam.exceptions.EntityAlreadyExistsException:
        pass
    if not iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
    try:
        # The account's first spot request makes this, and the head may not.
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    except iam.exceptions.ClientError as error:
        if "has been taken" not in str(error) and "already exists" not in str(error):
            raise


def head_policy(name: str, volume: str) -> dict[str, Any]:
    """What the autoscaler on the head calls, and `aws_home.py`. It passes no role on, so its nodes get no rights."""
    ours = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": name}}
    launched = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": ["ec2:Describe*", "ec2:RunInstances"], "Resource": "*"},
            {
                "Effect": "Allow",
                "Action": "ssm:GetParameters",
                "Resource": "arn:aws:ssm:*::parameter/aws/service/*",
            },
            {"Effect": "Allow", "Action": "ec2:CreateTags", "Resource": "*", "Condition": launched},
            {
                "Effect": "Allow",
                "Action": [
                    "ec2:CreateTags",
                    "ec2:TerminateInstances",
                    "ec2:AttachVolume",
                    "ec2:DetachVolume",
                ],
                "Resource": "arn:aws:ec2:*:*:instance/*",
                "Condition": ours,
            },
            {
                "Effect": "Allow",
                "Action": ["ec2:AttachVolume", "ec2:DetachVolume"],
                "Resource": f"arn:aws:ec2:*:*:volume/{volume}",
            },
        ],
    }


def write_env(path: Path, lines: dict[str, str]) -> None:
    """The env file, for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = "".join(f"export {name}={value}\n" for name, value in lines.items())
    with open(path, "w", opener=lambda where, flags: os.open(where, flags, 0o600)) as file:
        file.write(text)


def network(text: str) -> str:
    """An address range that is not the whole world."""
    try:
        found = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a range such as 203.0.113.7/32: {error}") from None
    if found.prefixlen < 8:
        raise argparse.ArgumentTypeError(f"{text} is the world, or nearly; name your own addresses")
    return str(found)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make in AWS what cluster.yaml expects.")
    parser.add_argument("--zone", required=True, help="provider.availability_zone of the cluster file")
    parser.add_argument(
        "--ssh-from", required=True, type=network, metavar="CIDR", help="who may reach port 22"
    )
    parser.add_argument("--name", default="ray-rm", help="cluster_name of the cluster file")
    parser.add_argument("--volume-gib", type=int, default=100, help="for ledger, logs and results")
    parser.add_argument("--env-file", type=Path, default=ENV_FILE)
    given = parser.parse_args(words)
    import boto3

    session = boto3.Session(region_name=given.zone.rstrip("abcdefghijklmnopqrstuvwxyz"))
    lines = prepare(session, given.name, given.zone, given.ssh_from, given.volume_gib)
    write_env(given.env_file.expanduser(), lines)
    for name, value in lines.items():
        print(f"{name}={value}")
    print(f"written to {given.env_file}; next: ray up cluster.yaml")


if __name__ == "__main__":
    main()
