"""Who may do what: owners change their own jobs, administrators change everything.

A person is the name that a client gives; neither Ray nor this package proves it. So these rules keep people from
accidents and not from attacks (docs/security.md). Without administrators everybody may do everything.

Pure functions of names, called by the allocator before it accepts anything. What happens by itself (time limits, lost
holders, evictions) is nobody's wish and is not asked about here.
"""

from __future__ import annotations

from collections.abc import Collection

from rm.errors import InvalidSpec, NotAllowed
from rm.plain import plain

MOST_CHARACTERS = 200
MOST_NAMED = 5
"""Administrators that a sentence names."""


def is_name(text: str) -> bool:
    """Whether `text` can stand for a person: short, and without characters that a terminal would obey."""
    return len(text) <= MOST_CHARACTERS and text.isprintable()


def may_administer(by: str, admins: Collection[str]) -> bool:
    """Whether `by` may apply rules and stop the allocator."""
    return not admins or by in admins


def may_change(by: str, owner: str, admins: Collection[str]) -> bool:
    """Whether `by` may cancel, hold and release what belongs to `owner`."""
    return by == owner or may_administer(by, admins)


def require_name(by: str) -> None:
    """Raises InvalidSpec: what a client calls itself is written to the ledger and shown to others."""
    if not is_name(by):
        raise InvalidSpec(
            f"owner: must be at most {MOST_CHARACTERS} printable characters (RM_OWNER, client.owner), "
            f"not {by[:60]!r}",
            field="owner",
        )


def require_change(job_id: str, owner: str, by: str, admins: Collection[str]) -> None:
    """Raises NotAllowed where the job, or the array, belongs to somebody else."""
    if may_change(by, owner, admins):
        return
    belongs, ask = (f"to {plain(owner)}", f"{plain(owner)}, or ") if owner else ("to nobody", "")
    raise NotAllowed(
        f"{job_id} belongs {belongs}; you are {_named(by)}: ask {ask}an admin ({_listed(admins)})",
        job=job_id,
        owner=owner,
        by=by,
    )


def require_admin(what: str, by: str, admins: Collection[str]) -> None:
    """Raises NotAllowed. `what`: "apply rules"."""
    if not may_administer(by, admins):
        raise NotAllowed(f"only admins may {what}; you are {_named(by)}: ask one ({_listed(admins)})", by=by)


def require_new_rules(by: str, before: Collection[str], after: Collection[str], *, force: bool) -> None:
    """Whether `by` may replace rules with the admins `before` by rules with those `after`.

    Raises NotAllowed where `by` is no admin now; InvalidSpec where `by` would be none afterwards, which could not be
    undone and is mostly a misspelt name, unless `force` says that it is meant.
    """
    require_admin("apply rules", by, before)
    if not may_administer(by, after) and not force:
        raise InvalidSpec(
            f"admins: does not name you ({_named(by)}) but {_listed(after)}, so you could not change the rules "
            "again; add your name, or say --force (force=True) if you mean to hand over",
            field="admins",
        )


def doubts(by: str, before: Collection[str], after: Collection[str]) -> list[str]:
    """What whoever applies rules with the admins `after` should know, or is going to be refused for."""
    if not may_administer(by, before):
        return [f"admins: only {_listed(before)} may apply this; you are {_named(by)}"]
    if not after:
        return [
            "admins: names nobody, so everybody may cancel and hold every job, apply rules and stop the allocator"
        ]
    if by not in after:
        return [f"admins: does not name you ({_named(by)}): to apply this takes --force (force=True)"]
    return []


def _named(by: str) -> str:
    return plain(by) or "nobody (RM_OWNER is empty)"


def _listed(admins: Collection[str]) -> str:
    names = [plain(each) for each in list(admins)[:MOST_NAMED]]
    return ", ".join(names) + (" …" if len(admins) > MOST_NAMED else "")
