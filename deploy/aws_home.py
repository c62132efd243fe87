"""On the head, as root: attach the volume that outlives it, and mount it. Run by cluster.yaml before Ray starts.

A volume can be attached to one machine at a time, which is what the ledger needs: two heads can't write it. If the head
before this one is on its way out, its end is waited for; if it still runs, this stops. A file system is made only on
a volume that holds nothing at all.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

IMDS = "http://169.254.169.254/latest"
WAIT_S = 300.0
POLL_S = 2.0
_GONE = frozenset({"shutting-down", "terminated", "stopping", "stopped"})


def attach(ec2: Any, volume: str, instance: str, wait_s: float = WAIT_S) -> None:
    """Returns when `volume` is attached to `instance`. Exits with what is in the way."""
    deadline = time.monotonic() + wait_s
    asked = False
    while True:
        found = ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]
        holders = {each["InstanceId"]: each["State"] for each in found["Attachments"]}
        if holders.get(instance) == "attached":
            return
        if found["State"] == "available" and not asked:
            ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
            asked = True
        for other, state in holders.items():
            if other != instance and state == "attached":
                _let_go(ec2, volume, other)
        if time.monotonic() > deadline:
            sys.exit(
                f"{volume} is {found['State']} after {wait_s:g} s, held by {', '.join(holders) or 'nobody'}"
            )
        time.sleep(POLL_S)


def _let_go(ec2: Any, volume: str, other: str) -> None:
    """Take the volume from a machine that is ending."""
    described = ec2.describe_instances(InstanceIds=[other])["Reservations"]
    state = described[0]["Instances"][0]["State"]["Name"] if described else "terminated"
    if state not in _GONE:
        sys.exit(
            f"{volume} is in use by {other}, which is {state}: two heads must not share a ledger; end that one"
        )
    if state in {"stopped", "terminated"}:
        ec2.detach_volume(VolumeId=volume, InstanceId=other)


def device(volume: str, wait_s: float = 60.0) -> Path:
    """The block device under which the kernel shows the volume, once it does."""
    serial = volume.replace("-", "")
    places = [Path(f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{serial}"), Path("/dev/xvdf")]
    deadline = time.monotonic() + wait_s
    while not (here := [each for each in places if each.exists()]):
        if time.monotonic() > deadline:
            sys.exit(f"{volume} is attached and shows as none of {', '.join(map(str, places))}")
        time.sleep(POLL_S)
    return here[0]


def make_file_system(where: Path) -> bool:
    """Make ext4 on a device that holds nothing. Returns whether it did; exits if something else is there."""
    # blkid's low-level probe: 2 where it finds nothing, 0 where it finds something, else it can't tell.
    probe = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "TYPE", str(where)], capture_output=True, text=True, check=False
    )
    if probe.returncode == 2:
        subprocess.run(["mkfs.ext4", "-q", "-L", "ray-rm-home", str(where)], check=True)
        return True
    if probe.returncode != 0 or probe.stdout.strip() != "ext4":
        found = probe.stdout.strip() or probe.stderr.strip() or "partitions"
        sys.exit(f"{where} holds {found}, not ext4; nothing was changed")
    return False


def mount(where: Path, target: Path, owner: str) -> None:
    """Mount, now and after each boot, and give the directory to `owner`."""
    target.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mountpoint", "-q", str(target)], check=False).returncode != 0:
        subprocess.run(["mount", str(where), str(target)], check=True)
    add_to_fstab(Path("/etc/fstab"), target)
    shutil.chown(target, owner)
    target.chmod(0o700)


def add_to_fstab(fstab: Path, target: Path) -> None:
    """One line for the volume, however often this runs. `nofail`: a head without it boots, and says so."""
    line = f"LABEL=ray-rm-home {target} ext4 defaults,nofail 0 2"
    if line not in (text := fstab.read_text()).splitlines():
        fstab.write_text(text.rstrip("\n") + "\n" + line + "\n")


def whoami() -> tuple[str, str]:
    """This machine's id and region, from the instance metadata service (version 2)."""
    ask = urllib.request.Request(
        f"{IMDS}/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    token = urllib.request.urlopen(ask, timeout=5).read().decode()
    found = []
    for path in ("instance-id", "placement/region"):
        ask = urllib.request.Request(f"{IMDS}/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token})
        found.append(urllib.request.urlopen(ask, timeout=5).read().decode())
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Attach and mount the volume of RM_HOME.")
    parser.add_argument("volume")
    parser.add_argument("target", type=Path)
    parser.add_argument("--owner", required=True)
    given = parser.parse_args()
    import boto3

    instance, region = whoami()
    attach(boto3.client("ec2", region_name=region), given.volume, instance)
    where = device(given.volume)
    make_file_system(where)
    mount(where, given.target, given.owner)


if __name__ == "__main__":
    main()
