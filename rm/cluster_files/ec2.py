"""`node_config` of AWS against the EC2 API's own description of RunInstances, where botocore is installed.

Ray passes these fields on as they are, so a slip shows only when the first node is wanted. Nothing is sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from rm.cluster_files.file import ClusterFile, NodeType
from rm.cluster_files.findings import Finding

_RAYS = frozenset({"SubnetIds"})
"""Fields that Ray reads itself and takes out."""
_RAY_SETS = {"MinCount": 1, "MaxCount": 1}


def is_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("botocore") is not None


def ec2_errors(file: ClusterFile) -> Iterator[Finding]:
    """Unknown fields and wrong types in each `node_config`. Needs `is_installed()`."""
    for each in file.node_types if file.provider == "aws" else ():
        yield from _node_type(file, each)


def _node_type(file: ClusterFile, kind: NodeType) -> Iterator[Finding]:
    from botocore.validate import ParamValidator

    shape = _run_instances()
    config = {name: value for name, value in kind.part("node_config").items() if name not in _RAYS}
    path = (*kind.path, "node_config")
    for name in list(config):
        if name not in shape.members:
            del config[name]
            near = difflib.get_close_matches(name, shape.members, 1)
            yield file.error(
                "unknown",
                (*path, name),
                "EC2's RunInstances has no such field",
                f"did you mean {near[0]!r}?" if near else "take it out",
            )
    report = ParamValidator().validate({**_RAY_SETS, **config}, shape)
    if report.has_errors():
        for words in report.generate_report().split("\n"):
            yield file.error("ec2", path, " ".join(words.split()), "mend it")


@lru_cache(maxsize=1)
def _run_instances() -> Any:
    from botocore.session import Session

    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape
