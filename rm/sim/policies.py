"""The policies that `rmctl simulate --policy` knows by name."""

from __future__ import annotations

from rm.errors import InvalidSpec
from rm.sim import published, published_preemptive, rules
from rm.sim.live import LivePolicy
from rm.sim.policy import Policy

_REGISTERED: tuple[Policy, ...] = (
    published.FIFO,
    published.SJF,
    published_preemptive.SRTF,
    published_preemptive.TIRESIAS,
    published.FIFO_SKIP,
    published.SJF_SKIP,
    LivePolicy(
        "rm-default", "our scheduler: fair share between queues and owners, EASY backfill", rules.DEFAULT
    ),
    LivePolicy(
        "rm-patient",
        "our scheduler: the same, but GPUs are kept at an unknown date only for who has waited 6 hours",
        rules.PATIENT,
    ),
    LivePolicy("rm-fifo", "our scheduler: by submission, nothing passes a blocked job", rules.STRICT_FIFO),
    LivePolicy(
        "kueue", "our scheduler as Kueue's best effort: by submission, past what doesn't fit", rules.KUEUE
    ),
    LivePolicy(
        "slurm",
        "our scheduler as Slurm: priority, submission, EASY backfill; limits are predicted",
        rules.SLURM,
    ),
    LivePolicy(
        "rm-shortest",
        "our scheduler: what is predicted to end soonest first, by preemption where that pays",
        rules.SHORTEST,
    ),
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
