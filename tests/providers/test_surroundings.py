"""What a node's commands find around them, and that none of them is `ray stop`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm.providers.surroundings import node_environment, without_ray_stop


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ray stop", "END"),
        ("ray stop; ray start --head", "END; ray start --head"),
        ("ray stop && ray start", "END && ray start"),
        ("ray  stop --force", "END"),
        ("ray stop -f -g 10; x", "END; x"),
        ("(ray stop)", "(END)"),
        ("export A=b;ray stop", "export A=b;END"),
        ("cd x\nray stop\nray start", "cd x\nEND\nray start"),
        ("ray start; ray stop", "ray start; END"),
        ("ray status", "ray status"),
        ("ray stopped", "ray stopped"),
        ("array stop", "array stop"),
    ],
)
def test_ray_stop_is_replaced_and_nothing_else(command: str, expected: str) -> None:
    assert without_ray_stop(command, "END") == expected


def test_a_node_inherits_no_other_nodes_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("RAY_ADDRESS", "RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_LABELS", "RAY_CLOUD_INSTANCE_ID", "RAY_HEAD_IP",
              "RAY_NODE_TYPE_NAME", "CUDA_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR")  # fmt: skip
    for name in others:
        monkeypatch.setenv(name, "another's")
    monkeypatch.setenv("RM_NODE", "another's")
    found = node_environment("/b/c/n", Path("/b/c"), Path("/b/c/n"), {"gcs": 1, "dashboard": 2, "client": 3})
    assert not set(others) & set(found)
    assert found["RM_NODE"] == found["RM_NODE_DIR"] == "/b/c/n"
    assert found["RM_HEAD_ADDRESS"] == "LOCALHOST:1"
    assert found["RAY_TMPDIR"] == "/b/c"
    assert "another's" not in found.values()


def test_what_the_user_chose_goes_to_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_HOME", "/mine")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    found = node_environment("m", Path("/c"), Path("/c/n"), {})
    assert (found["RM_HOME"], found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN"]) == ("/mine", "token", "secret")
    monkeypatch.delenv("RM_HOME")
    monkeypatch.delenv("RAY_AUTH_MODE")
    found = node_environment("m", Path("/c"), Path("/c/n"), {})
    assert (found["RM_HOME"], found["RAY_AUTH_MODE"]) == ("/c/home", "disabled")
