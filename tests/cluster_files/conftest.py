"""AWS without AWS: boto3 answered in this process by moto, with a home directory of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "deploy"))


@pytest.fixture(scope="module")
def aws_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One account for the tests that only look: EC2's catalogue of machines takes seconds to read."""
    with _account(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[None]:
    with _account(tmp_path):
        yield


@contextlib.contextmanager
def _account(home: Path) -> Iterator[None]:
    from moto import mock_aws

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HOME": str(home),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-west-2",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.delenv(name, raising=False)
        with mock_aws():
            _forget()
            yield
        _forget()


def _forget() -> None:
    """Ray keeps clients, subnets and instance types for the life of the process."""
    from ray.autoscaler._private.aws import config, utils

    for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cached.cache_clear()
