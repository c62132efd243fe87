"""What administrators decide: queues, quotas, weights and rules. A value; `rm.settings` makes it from rm.yaml.

Queues form a tree whose root is the whole cluster. Jobs are submitted to leaves. Amounts of GPUs are units
(`resources.GPU_UNIT`) per *kind*: a GPU type that some queue names in a quota is a kind of its own, all other
types together are the kind ANY. Sources: Kueue's cohorts (nominal, borrowing, lending, fair sharing), Slurm's
backfill and preemption parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

ANY = "*"
"""The kind of every GPU type that no quota names."""
DAY_S = 86_400.0


class Order(StrEnum):
    """Who comes first. FAIR: queues by weighted share, then priority, owner's usage, submission."""

    FAIR = "fair"
    FIFO = "fifo"
    SHORTEST_FIRST = "shortest_first"


class Backfill(StrEnum):
    """What may pass a blocked job. EASY: what does not delay it. SKIP: anything that fits. NONE: nothing."""

    EASY = "easy"
    SKIP = "skip"
    NONE = "none"


class Preempt(StrEnum):
    """Inside a queue: whether a higher priority may evict a lower one."""

    NEVER = "never"
    LOWER = "lower"


class Reclaim(StrEnum):
    """What a job within its queue's nominal quota may take back from borrowing queues."""

    NEVER = "never"
    LOWER = "lower"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """One queue. `nominal`, `borrow_limit`, `lend_limit`: units by kind.

    `nominal=None`: the queue owns nothing; it may use what is idle, and loses it first. A kind that is missing in
    `nominal` counts as 0; one missing in a limit is not limited. `borrow_limit=None`, `lend_limit=None`: no limit.
    """

    name: str
    parent: str | None = None
    nominal: Mapping[str, int] | None = None
    borrow_limit: Mapping[str, int] | None = None
    lend_limit: Mapping[str, int] | None = None
    weight: float = 1.0
    preempt: Preempt = Preempt.NEVER
    reclaim: Reclaim = Reclaim.ANY
    stopped: bool = False
    """Nothing new starts; what runs goes on."""
    labels: tuple[tuple[str, str], ...] = ()
    """Only nodes that carry all of these serve the queue."""
    max_time_limit_s: float | None = None
    default_time_limit_s: float | None = None
    default_priority: int = 0
    max_gpus_per_owner: int | None = None
    """Units that one owner may hold in this queue at a time."""

    @property
    def preempts(self) -> bool:
        """Whether its higher priorities may evict its lower ones."""
        return self.preempt is Preempt.LOWER

    @property
    def reclaims(self) -> bool:
        """Whether its jobs may take back what others borrow."""
        return self.reclaim is not Reclaim.NEVER


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules in force. Without queues there is one, `default`, without limits."""

    queues: Mapping[str, QueuePolicy] = field(default_factory=lambda: {"default": QueuePolicy("default")})
    default_queue: str = "default"
    order: Order = Order.FAIR
    backfill: Backfill = Backfill.EASY
    half_life_s: float = 7 * DAY_S
    """Of an owner's usage."""
    max_age_s: float = DAY_S
    """After this long a waiting job counts one priority name higher."""
    patience_s: float = 0.0
    """How long the first blocked job waits before GPUs are kept idle for it although nobody knows when the rest of
    what it needs comes back. 0: at once, so that nobody passes it. Longer: more is running, and gangs wait longer."""
    predicted_limits: bool = False
    """Plan backfill with predicted durations where there is no time limit. Then a wrong guess may delay the head."""
    min_runtime_s: float = 0.0
    """Nothing is evicted before it has run this long (a job may ask for more)."""
    node_failure_limit: int = 3
    """So many infrastructure failures on a node within the window, of two jobs at least, cordon it; a broken GPU
    does at once. 0: nodes are never cordoned by themselves."""
    node_failure_window_s: float = 600.0
    settle_s: float = 60.0
    """How long an elastic gang keeps what it took above its minimum before it is shrunk for others."""
    boot_timeout_s: float = 900.0
    """A node type that is wanted and of which no node joins for so long counts as failed for a while."""
    boot_s: float = 240.0
    """How long a node takes to join, until boots of its type have been seen."""
    prices: Mapping[str, float] = field(default_factory=dict)
    """By node type, what a node costs in an hour: the cheaper one is wanted where two types waste as little."""
    admins: tuple[str, ...] = ()
    """Owners who may change everybody's jobs and these rules. Empty: everybody may. No decision of the core's."""

    def kinds(self) -> frozenset[str]:
        """The GPU types that quotas name, without ANY."""
        named: set[str] = set()
        for queue in self.queues.values():
            for amounts in (queue.nominal, queue.borrow_limit, queue.lend_limit):
                named |= set(amounts or ())
        return frozenset(named - {ANY})

    def leaves(self) -> tuple[str, ...]:
        """The queues that jobs can be submitted to, in the order of the configuration."""
        parents = {queue.parent for queue in self.queues.values()}
        return tuple(name for name in self.queues if name not in parents)
