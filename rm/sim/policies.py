"""The policies that `rmctl simulate --policy` knows by name."""

from __future__ import annotations

from rm.errors import InvalidSpec
from rm.sim import published, published_preemptive
from rm.sim.policy import Policy

_REGISTERED: tuple[Policy, ...] = (
    published.FIFO,
    published.SJF,
    published_preemptive.SRTF,
    published_preemptive.TIRESIAS,
    published.FIFO_SKIP,
    published.SJF_SKIP,
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in _REGISTERED}


def policy_named(name: str) -> Policy:
    """Raises InvalidSpec, with the names that there are."""
    try:
        return POLICIES[name]
    except KeyError:
        raise InvalidSpec(
            f"policy: {name!r} is not known; there are {', '.join(POLICIES)}", field="policy"
        ) from None
