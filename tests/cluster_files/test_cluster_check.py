"""Each rule of `rmctl cluster check` on a file that is right but for one thing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm.cluster_files import Finding, check
from rm.cluster_files.ray_schema import EXTERNAL_FIELDS
from rm.settings import Settings

REPO = Path(__file__).resolve().parents[2]
GOOD = """\
cluster_name: lab
max_workers: 4
idle_timeout_minutes: 15
provider:
  type: aws
  region: us-west-2
  security_group: {GroupName: lab}
head_node_type: head
available_node_types:
  head:
    resources: {CPU: 0}
    node_config: {InstanceType: m6i.xlarge}
  gpu:
    max_workers: 4
    resources: {CPU: 48, GPU: 4}
    labels: {ray.io/accelerator-type: A10G}
    node_config: {InstanceType: g5.12xlarge}
file_mounts:
  ~/.ray/auth_token: ~/.ray/auth_token
head_start_ray_commands:
  - export RAY_AUTH_MODE=token; ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml
  - export RM_HOME=/srv/ray-rm; rmctl start
worker_start_ray_commands:
  - export RAY_AUTH_MODE=token; ray start --address=$RAY_HEAD_IP:6379
"""
GPU = "available_node_types.gpu"
LOCAL = """\
cluster_name: desk
max_workers: 2
idle_timeout_minutes: 1
upscaling_speed: 1.0
provider: {type: external, module: lab.nodes.Provider}
auth: {}
docker: {}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, node_config: {}}
  gpu:
    max_workers: 2
    resources: {CPU: 4, GPU: 4}
    labels: {ray.io/accelerator-type: A100}
    node_config: {}
file_mounts: {}
cluster_synced_files: []
file_mounts_sync_continuously: false
rsync_exclude: []
rsync_filter: []
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands:
  - RAY_AUTH_MODE=token ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml
  - rmctl start
worker_start_ray_commands:
  - RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379
"""
ONPREM = """\
cluster_name: rack
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}
auth: {ssh_user: ray}
min_workers: 2
max_workers: 2
file_mounts: {~/.ray/auth_token: ~/.ray/auth_token}
head_start_ray_commands:
  - export RAY_AUTH_MODE=token; ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml
  - rmctl start
worker_start_ray_commands:
  - export RAY_AUTH_MODE=token; ray start --address=$RAY_HEAD_IP:6379
"""


def _found(text: str, rules: str = "") -> list[Finding]:
    policy = Settings.parse(rules).policy() if rules else None
    return list(check(text, policy).findings)


def _only(text: str, rules: str = "") -> Finding:
    found = _found(text, rules)
    assert len(found) == 1, found
    return found[0]


def _line(text: str, part: str) -> int:
    return next(place for place, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.parametrize("text", [GOOD, LOCAL, ONPREM], ids=["aws", "external", "own machines"])
def test_a_good_file_has_no_findings(text: str) -> None:
    assert _found(text) == []


@pytest.mark.parametrize("file", sorted(REPO.glob("cluster*.yaml")), ids=lambda file: file.name)
def test_no_file_of_ours_has_errors(file: Path) -> None:
    assert [each for each in _found(file.read_text()) if each.severity == "error"] == []


def test_ours_has_no_findings_with_boto3_to_look_at_each_machine() -> None:
    report = check((REPO / "cluster.yaml").read_text())
    assert report.findings == ()
    assert report.not_checked == ()


# --- not even a cluster file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (GOOD.replace("  region:", "   region:"), 6, "YAML"),
        (GOOD + "max_workers: 5\n", GOOD.count("\n") + 1, "a second time"),
        (GOOD + "\tx: 1\n", GOOD.count("\n") + 1, "YAML"),
        (GOOD.replace("{GroupName: lab}", "!!python/object:os.system {}"), 7, "tag"),
        ("", None, "fields of a cluster"),
        ("- a\n", None, "fields of a cluster"),
        ("apiVersion: ray.io/v1\nkind: RayCluster\n", None, "Kubernetes"),
    ],
)
def test_what_is_not_one_is_told_with_its_line(text: str, line: int | None, words: str) -> None:
    found = _only(text)
    assert (found.severity, found.rule, found.line) == ("error", "yaml", line)
    assert words in found.message


# --- what Ray demands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "field", "advice"),
    [
        ("max_workers: 4\nidle", "max_worker: 4\nidle", "max_worker", "did you mean 'max_workers'?"),
        ("    max_workers: 4\n", "    max_worker: 4\n", "available_node_types.gpu.max_worker", "'max_workers'"),
        ("cluster_name: lab", "cluster_name: lab\nmin_workers: 1", "min_workers", "of each node type"),
        ("cluster_name: lab", "cluster_name: lab\nhead_node: {}", "head_node", "available_node_types"),
        ("  region: us", "  availability_zon: a\n  region: us", "provider.availability_zon", "'availability_zone'"),
        ("type: aws", "type: asw", "provider.type", "did you mean 'aws'?"),
        ("InstanceType: g5", "ImageID: x, InstanceType: g5", f"{GPU}.node_config.ImageID", "'ImageId'"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_the_nearest(old: str, new: str, field: str, advice: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    found = next(each for each in _found(text) if each.field == field)
    assert advice in found.advice
    assert found.line == _line(text, f"{field.rpartition('.')[2]}: ")


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        (
            "max_workers: 4\nidle",
            "max_workers: four\nidle",
            "max_workers",
            "must be of type integer, not 'four'",
        ),
        (
            "{CPU: 48, GPU: 4}",
            "{CPU: 48, GPU: 0.5}",
            "available_node_types.gpu.resources.GPU",
            "integer, not 0.5",
        ),
        (
            "head_node_type: head",
            "head_node_type: boss",
            "head_node_type",
            "must be one of `available_node_types`",
        ),
        (
            "    max_workers: 4",
            "    max_workers: 9\n    min_workers: 9",
            "max_workers",
            "sum of `min_workers`",
        ),
        ("cluster_name: lab\n", "", "cluster_name", "is missing"),
        (
            "    node_config: {InstanceType: g5.12xlarge}\n",
            "",
            "available_node_types.gpu.node_config",
            "is missing",
        ),
    ],
)
def test_what_ray_refuses_is_an_error_here(old: str, new: str, field: str, words: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    found = next(each for each in _found(text) if each.field == field)
    assert found.severity == "error"
    assert words in found.message


@pytest.mark.parametrize("name", sorted(EXTERNAL_FIELDS))
def test_an_external_provider_gets_no_defaults(name: str) -> None:
    fields = yaml.safe_load(LOCAL)
    del fields[name]
    found = [each for each in _found(yaml.safe_dump(fields)) if each.field == name]
    assert found
    assert found[0].rule == "missing"


def test_an_external_field_is_an_error_where_ray_breaks_without_it() -> None:
    """What we call an error and what Ray's own reading stops at agree, as far as that reading goes."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    for name in EXTERNAL_FIELDS:
        fields = yaml.safe_load(LOCAL)
        del fields[name]
        try:
            validate_config(prepare_config(fields))
        except Exception:
            assert any(
                each.severity == "error" and each.field == name for each in _found(yaml.safe_dump(fields))
            )


def test_an_external_provider_needs_its_class() -> None:
    found = _only(LOCAL.replace(", module: lab.nodes.Provider", ""))
    assert (found.severity, found.field) == ("error", "provider.module")


def test_machines_of_ones_own_need_addresses() -> None:
    found = _found(ONPREM.replace("head_ip: 10.0.0.1, ", ""))
    assert [each.field for each in found if each.severity == "error"] == ["provider.head_ip"]
    found = _found(ONPREM.replace("min_workers: 2", "min_workers: 0"))
    assert [each.rule for each in found] == ["own-machines"]


# --- one slip, one finding -----------------------------------------------------------------------------------

WIDE_OPEN = """
    GroupName: lab
    IpPermissions: [{IpProtocol: tcp, FromPort: 8265, ToPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}]"""
SLIPS: list[tuple[str, str, str, str, str]] = [
    # old, new, rule, severity, field
    ("{CPU: 48, GPU: 4}", "{CPU: 48, GPU: 8}", "gpu-count", "error", "available_node_types.gpu.resources.GPU"),
    ("{CPU: 48, GPU: 4}", "{CPU: 48, GPU: 1}", "gpu-count", "warning", "available_node_types.gpu.resources.GPU"),
    ("A10G}", "A100}", "gpu-type-wrong", "error", "available_node_types.gpu.labels.ray.io/accelerator-type"),
    ("    labels: {ray.io/accelerator-type: A10G}\n", "", "gpu-type-missing", "warning", f"{GPU}.labels"),
    ("{ray.io/acc", "{ray.io/accelerator_type: A10G, ray.io/acc", "label", "error",
     "available_node_types.gpu.labels.ray.io/accelerator_type"),
    ("{CPU: 0}", "{CPU: 4}", "head-cpus", "warning", "available_node_types.head.resources"),
    ("{CPU: 0}", "{}", "head-cpus", "warning", "available_node_types.head.resources"),
    ("m6i.xlarge", "g5.xlarge", "head-gpus", "warning", "available_node_types.head.resources"),
    ("    max_workers: 4\n", "    max_workers: 8\n", "workers", "warning", "available_node_types.gpu.max_workers"),
    ("max_workers: 4\nidle", "max_workers: 6\nidle", "workers", "warning", "max_workers"),
    ("idle_timeout_minutes: 15", "idle_timeout_minutes: 2", "idle-timeout", "warning", "idle_timeout_minutes"),
    ("idle_timeout_minutes: 15", "idle_timeout_minutes: 15\nmetadata: {boot_minutes: 20}", "idle-timeout", "warning",
     "idle_timeout_minutes"),
    ("    max_workers: 4\n", "    max_workers: 4\n    idle_timeout_s: 60\n", "idle-timeout", "warning",
     "available_node_types.gpu.idle_timeout_s"),
    ("RAY_AUTH_MODE=token; ray start --head", "A=1; ray start --head", "token-missing", "error",
     "head_start_ray_commands"),
    ("RAY_AUTH_MODE=token; ray start --address", "A=1; ray start --address", "token-missing", "error",
     "worker_start_ray_commands"),
    ("file_mounts:\n  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "token-file", "error", "file_mounts"),
    ("export RM_HOME", "export RAY_AUTH_TOKEN=abc RM_HOME", "token-written", "error", "head_start_ray_commands.1"),
    (" --autoscaling-config=~/ray_bootstrap_config.yaml", "", "ray-start", "error", "head_start_ray_commands.0"),
    ("ray start --head", "ray start", "ray-start", "error", "head_start_ray_commands.0"),
    ("ray start --address=$RAY_HEAD_IP:6379", "true", "ray-start", "error", "worker_start_ray_commands"),
    ("start --head", "start --head --dashboard-host=0.0.0.0", "dashboard", "warning", "head_start_ray_commands.0"),
    ("rmctl start", "true", "allocator", "warning", "head_start_ray_commands"),
    ("export RM_HOME=/srv/ray-rm; ", "", "ledger", "warning", "head_start_ray_commands"),
    ("  security_group: {GroupName: lab}\n", "", "ssh-open", "warning", "provider.security_group"),
    ("{GroupName: lab}", WIDE_OPEN, "open-port", "error", "provider.security_group.IpPermissions.0"),
    ("InstanceType: g5.12xlarge", "InstanceType: g5.12xlagre", "machine", "warning",
     "available_node_types.gpu.node_config.InstanceType"),
    ("InstanceType: g5.12xlarge", "EbsOptimized: 1, InstanceType: g5.12xlarge", "ec2", "error",
     "available_node_types.gpu.node_config"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "rule", "severity", "field"), SLIPS)
def test_one_slip_is_one_finding(old: str, new: str, rule: str, severity: str, field: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    found = _only(text)
    assert (found.rule, found.severity, found.field) == (rule, severity, field)
    assert found.line or field == "file_mounts"
    assert found.advice


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ({"max_workers": 0}, {"never-launched", "workers"}),
        (
            {"resources": {"CPU": 8}, "labels": {}, "node_config": {"InstanceType": "m6i.2xlarge"}},
            {"no-gpus"},
        ),
        ({"min_workers": 3, "max_workers": 2}, {"workers"}),
    ],
)
def test_node_types_that_no_job_could_use(change: dict[str, Any], rules: set[str]) -> None:
    fields = yaml.safe_load(GOOD)
    fields["available_node_types"]["gpu"] |= change
    assert {each.rule for each in _found(yaml.safe_dump(fields))} == rules


def test_a_spelling_of_a_gpu_type_that_ray_does_not_use() -> None:
    assert {each.rule for each in _found(LOCAL.replace("A100}", "a100}"))} == {"gpu-type-spelling"}


def test_a_narrower_name_of_the_same_gpu_is_no_contradiction() -> None:
    text = (
        GOOD.replace("A10G}", "A100-40G}").replace("g5.12xlarge", "p4d.24xlarge").replace("GPU: 4", "GPU: 8")
    )
    assert _found(text) == []


def test_what_the_cloud_knows_need_not_be_written() -> None:
    assert _found(GOOD.replace("{CPU: 48, GPU: 4}", "{}")) == []


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"machineType": "a2-highgpu-8g"}, None),
        ({"machineType": "g2-standard-96"}, "gpu-type-wrong"),
        ({"machineType": "n1-standard-8", "guestAccelerators": [
            {"acceleratorType": "projects/p/zones/z/acceleratorTypes/nvidia-tesla-a100", "acceleratorCount": 4}]},
         "gpu-count"),
    ],
)  # fmt: skip
def test_machines_of_gcp(config: dict[str, Any], rule: str | None) -> None:
    fields = yaml.safe_load(GOOD)
    fields["provider"] = {
        "type": "gcp",
        "region": "us-west1",
        "availability_zone": "us-west1-a",
        "project_id": "p",
    }
    fields["available_node_types"]["head"]["node_config"] = {"machineType": "n2-standard-4"}
    fields["available_node_types"]["gpu"] |= {
        "node_config": config,
        "resources": {"CPU": 8, "GPU": 8},
        "labels": {"ray.io/accelerator-type": "A100"},
    }
    assert {each.rule for each in _found(yaml.safe_dump(fields))} == ({rule} if rule else set())


def test_docker_may_bring_the_token_mode() -> None:
    text = (
        GOOD.replace("export RAY_AUTH_MODE=token; ", "")
        + "docker: {run_options: ['-e RAY_AUTH_MODE=token']}\n"
    )
    assert not [each for each in _found(text) if each.rule == "token-missing"]


def test_a_token_from_elsewhere_is_not_written_out() -> None:
    text = GOOD.replace("export RM_HOME", "export RAY_AUTH_TOKEN=$(cat /run/token) RM_HOME")
    assert _found(text) == []


def test_start_commands_left_to_ray_have_no_token() -> None:
    fields = yaml.safe_load(GOOD)
    del fields["worker_start_ray_commands"]
    assert [each.rule for each in _found(yaml.safe_dump(fields))] == ["token-missing"]


# --- quotas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "rule", "words"),
    [
        ("queues: {a: {nominal: 16}}", None, ""),
        ("queues: {a: {nominal: 17}}", "quota", "at most 16"),
        (
            "default_queue: a\nqueues: {a: {nominal: {A10G: 12}}, b: {nominal: {A10G: 12}}}",
            "quota",
            "24 GPUs of type A10G",
        ),
        ("queues: {a: {nominal: {A10: 4}}}", "quota-type", "no node type has GPUs of type A10"),
        ("queues: {t: {queues: {a: {nominal: 8}, b: {nominal: 9}}}}\ndefault_queue: a", "quota", "17 GPUs"),
    ],
)
def test_quotas_that_the_cluster_cannot_fill(rules: str, rule: str | None, words: str) -> None:
    found = _found(GOOD, rules)
    assert [each.rule for each in found] == ([rule] if rule else [])
    if rule:
        assert words in found[0].message


def test_quotas_that_fit_alone_and_not_together() -> None:
    fields = yaml.safe_load(GOOD)
    fields["available_node_types"]["big"] = {
        "max_workers": 4,
        "resources": {"CPU": 96, "GPU": 8},
        "labels": {"ray.io/accelerator-type": "A100"},
        "node_config": {"InstanceType": "p4d.24xlarge"},
    }
    text = yaml.safe_dump(fields)
    assert _found(text, "queues: {a: {nominal: {A100: 16, A10G: 8}}}") == []
    found = _only(text, "queues: {a: {nominal: {A100: 32, A10G: 16}}}")
    assert "48 GPUs in all, and 4 nodes have at most 32" in found.message


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def rmctl(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from rm import cli

    def rmctl(*words: str) -> tuple[int, str, str]:
        code = cli.run(words)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return rmctl


def test_the_command_says_where_and_what_to_do(rmctl: Any, tmp_path: Any) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(GOOD.replace("A10G}", "A100}").replace("{CPU: 0}", "{CPU: 2}"))
    code, out, err = rmctl("cluster", "check", str(file))
    assert code == 1
    assert f"{file}:16: error: available_node_types.gpu.labels.ray.io/accelerator-type: says A100" in "".join(
        out.splitlines()
    )
    assert "1 errors, 1 warnings" in err


def test_warnings_alone_are_no_failure_and_json_is_only_json(rmctl: Any, tmp_path: Any) -> None:
    import json

    file = tmp_path / "c.yaml"
    file.write_text(GOOD.replace("{CPU: 0}", "{CPU: 2}"))
    code, out, _ = rmctl("cluster", "check", str(file), "--json")
    assert code == 0
    said = json.loads(out)
    assert said["ok"] is True
    assert said["findings"][0]["rule"] == "head-cpus"
    assert said["findings"][0]["line"] == 11


def test_quotas_come_from_the_file_that_is_named(rmctl: Any, tmp_path: Any) -> None:
    file, rules = tmp_path / "c.yaml", tmp_path / "rm.yaml"
    file.write_text(GOOD)
    rules.write_text("queues: {a: {nominal: 99}}\n")
    code, out, _ = rmctl("cluster", "check", str(file), "--config", str(rules))
    assert (code, "queues own 99 GPUs" in " ".join(out.split())) == (0, True)
    rules.write_text("queue: {}\n")
    code, _, err = rmctl("cluster", "check", str(file), "--config", str(rules))
    assert (code, "did you mean 'queues'?" in err) == (2, True)


@pytest.mark.parametrize("data", [None, b"\xff\n"])
def test_a_file_that_cannot_be_read(rmctl: Any, tmp_path: Any, data: bytes | None) -> None:
    file = tmp_path / "c.yaml"
    if data is not None:
        file.write_bytes(data)
    code, _, err = rmctl("cluster", "check", str(file))
    assert code == 2
    assert re.search(r"No such file|line 1 is not UTF-8", err)
