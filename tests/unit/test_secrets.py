"""Values of a job's environment show nowhere: not in what a log would print, not in what an error says."""

from __future__ import annotations

import asyncio
import traceback
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from rm.cli.submitting import RequestOptions
from rm.core.events import JobSubmitted
from rm.core.model import Kind, NodeShape
from rm.core.policy import Policy
from rm.errors import InvalidSpec
from rm.ledger import Accepted, Batch, Ledger
from rm.runtime.drafts import Drafting
from rm.runtime.orders import RunOrder
from rm.runtime.processes import RankProcess
from rm.runtime.writer import _Request
from rm.spec import Config, JobSpec, build_spec
from rm.submission import submitter_environment

SECRET = "hunter2-5d41402a"


def spec() -> JobSpec:
    return build_spec(
        kind=Kind.COMMAND,
        command=("true",),
        num_gpus=1,
        env={"TOKEN": SECRET},
        runtime_env={"config": {"token": SECRET}},
    )


def test_what_carries_an_environment_does_not_print_it() -> None:
    environment = submitter_environment({"env": {"A": SECRET}, "runtime_env": {"env_vars": {"B": SECRET}}})
    assert set(environment.env.values()) == {SECRET}, "it is there"
    order = RunOrder(
        "j1", 1, "abc", "n", 0, 1, 0, 1, 1, "127.0.0.1", 1, Kind.COMMAND, ("true",), "", "", "", {"A": SECRET}, "3.11",
        0, "/c", 1.0,
    )  # fmt: skip
    process = RankProcess(0, ("true",), {"A": SECRET}, "/", "/o", "/e")
    config = Config(ledger_url=f"postgresql://rm:{SECRET}@db/rm")
    shapes = [NodeShape(1, 1000, 0)]
    job = Drafting(Policy(), shapes).draft(spec(), (), 0.0)("j1", 1)

    async def request() -> _Request:
        answer = asyncio.get_running_loop().create_future()
        return _Request(JobSubmitted(0.0, job), answer, Accepted(job, spec(), "key"))

    batch = asyncio.run(request())  # what the writer logs when a batch breaks
    for each in (environment, spec(), order, process, config, job, batch, Batch([batch.accepted])):
        assert SECRET not in repr(each), type(each)
        assert SECRET not in str(each), type(each)
    assert spec().env == {"TOKEN": SECRET}


@pytest.mark.parametrize(
    "fields",
    [
        {"env": {f"TOKEN={SECRET}": ""}},
        {"env": {"TOKEN": f"{SECRET}\0"}},
        {"env": {"TOKEN": SECRET}, "num_gpus": -1},
        {"env": {"TOKEN": [SECRET]}},
        {"env": SECRET},
        {"env": {"TOKEN": SECRET}, "typo": 1},
        {"runtime_env": SECRET},
    ],
)
def test_a_bad_request_is_refused_without_a_word_of_it(fields: dict) -> None:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(**{"kind": Kind.COMMAND, "command": ("true",), "num_gpus": 1, **fields})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "options",
    [{"env": [SECRET]}, {"env": SECRET}, {"runtime_env": {"env_vars": SECRET}}, {"runtime_env": SECRET}],
)
def test_an_environment_that_is_none_is_refused_without_a_word_of_it(options: dict) -> None:
    with pytest.raises(InvalidSpec, match=r"env.*: must be a dict") as caught:
        submitter_environment(options)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_command_line_does_not_repeat_a_value_without_a_name() -> None:
    with pytest.raises(InvalidSpec, match="KEY=VALUE") as caught:
        RequestOptions(num_gpus="1", env=[f"={SECRET}"]).given()
    assert SECRET not in str(caught.value)
    assert RequestOptions(num_gpus="1", env=["A=b=c", "E="]).given()["env"] == {"A": "b=c", "E": ""}


def test_an_error_of_the_database_holds_no_parameters(tmp_path: Path) -> None:
    """The allocator logs errors with their causes, and a request is a parameter."""
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    try:
        with pytest.raises(SQLAlchemyError) as caught, ledger._database.writer.begin() as connection:
            connection.execute(text("INSERT INTO nowhere (spec) VALUES (:spec)"), {"spec": SECRET})
        assert SECRET not in str(caught.value)
    finally:
        ledger.close()
