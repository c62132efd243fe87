"""A Ray that finds this machine's real GPUs by itself, and its allocator. `make gpu`; one GPU is enough for most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_driver import driver


@pytest.fixture(scope="session")
def ray_cluster(ray_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """In place of the shared cluster of logical GPUs: one node, as `ray start --head` would have made it."""
    assert driver().conditions, "no GPU"
    import ray

    import rm
    from rm.spec import Config

    home = tmp_path_factory.mktemp("rm-home")
    context = ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _system_config={"raylet_report_resources_period_milliseconds": 50},
    )
    try:
        config = Config(home=home, checkpoint_root=str(home / "checkpoints"), audit_every_s=5)
        address = context.address_info["gcs_address"]
        yield SimpleNamespace(client=rm.connect(address, config=config), address=address, home=home)
    finally:
        ray.shutdown()
