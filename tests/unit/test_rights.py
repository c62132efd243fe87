"""Who may do what, as a table."""

from __future__ import annotations

import pickle

import pytest

from rm import rights
from rm.core.policy import Policy
from rm.errors import InvalidSpec, NotAllowed, RequestError
from rm.settings import Settings


@pytest.mark.parametrize(
    ("by", "owner", "admins", "may"),
    [
        ("ada", "ada", (), True),
        ("bob", "ada", (), True),  # nobody administers: everybody may
        ("ada", "ada", ("carl",), True),
        ("bob", "ada", ("carl",), False),
        ("carl", "ada", ("carl",), True),
        ("carl", "ada", ("dora", "carl"), True),
        ("Ada", "ada", ("carl",), False),  # names are compared as they stand
        ("ada ", "ada", ("carl",), False),
        ("", "ada", ("carl",), False),
        ("ad", "ada", ("ada",), False),
    ],
)
def test_who_may_change_a_job(by: str, owner: str, admins: tuple[str, ...], may: bool) -> None:
    assert rights.may_change(by, owner, admins) is may
    if may:
        rights.require_change("j12", owner, by, admins)
        return
    with pytest.raises(NotAllowed):
        rights.require_change("j12", owner, by, admins)


def test_a_refusal_says_whose_it_is_and_whom_to_ask() -> None:
    with pytest.raises(NotAllowed) as caught:
        rights.require_change("j12", "ada", "bob", ("carl",))
    assert str(caught.value) == "j12 belongs to ada; you are bob: ask ada, or an admin (carl)"
    assert caught.value.context == {"job": "j12", "owner": "ada", "by": "bob"}
    assert isinstance(caught.value, RequestError), "the caller's move"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (NotAllowed, str(caught.value))
    with pytest.raises(
        NotAllowed, match=r"only admins may stop the allocator; you are bob: ask one \(a, b\)"
    ):
        rights.require_admin("stop the allocator", "bob", ("a", "b"))
    with pytest.raises(NotAllowed, match=r"you are nobody .*\(a0, a1, a2, a3, a4 …\)"):
        rights.require_admin("apply rules", "", [f"a{n}" for n in range(9)])


@pytest.mark.parametrize(
    ("by", "before", "after", "force", "error"),
    [
        ("bob", (), (), False, None),
        ("bob", (), ("bob",), False, None),
        ("bob", (), ("carl",), False, InvalidSpec),  # would lock out who applies it
        ("bob", (), ("carl",), True, None),
        ("carl", ("carl",), ("carl", "bob"), False, None),
        ("carl", ("carl",), ("bob",), False, InvalidSpec),
        ("carl", ("carl",), ("bob",), True, None),
        ("carl", ("carl",), (), False, None),  # opening to everybody locks nobody out
        ("bob", ("carl",), ("bob",), False, NotAllowed),
        ("bob", ("carl",), ("bob",), True, NotAllowed),  # to force is no right
        ("bob", ("carl",), (), True, NotAllowed),
    ],
)
def test_who_may_replace_the_rules(by, before, after, force: bool, error) -> None:
    warned = rights.doubts(by, before, after)
    if error is None:
        rights.require_new_rules(by, before, after, force=force)
        assert bool(warned) is (not after or by not in after)
        return
    with pytest.raises(error) as caught:
        rights.require_new_rules(by, before, after, force=force)
    assert type(caught.value) is error
    assert warned, "a dry run says so beforehand"


def test_without_admins_a_warning_says_what_that_means() -> None:
    (said,) = rights.doubts("bob", ("bob",), ())
    assert said.startswith("admins: names nobody, so everybody may cancel")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\x9b31m", "a\u202eb", "\u2066x", "x" * 201, "\0"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        rights.require_name(name)
    assert str(caught.value).isprintable()
    with pytest.raises(InvalidSpec, match="admins: must be names"):
        Settings.parse(
            "admins: [" + '"' + name.encode("unicode_escape").decode().replace("\\x00", "\\0") + '"]'
        )


def test_admins_reach_the_policy_and_an_older_one_has_none() -> None:
    assert Settings.parse("admins: [ada, bob, ada]").policy().admins == ("ada", "bob")
    assert Settings.parse("admins: [ada]\nqueues: {a: }").policy().admins == ("ada",)
    assert Policy().admins == ()
