"""Is what a ledger holds whole, readable and possible? Reads only, and needs neither Ray nor an allocator.

`check` looks at one moment of a ledger, also of one that an allocator is writing. It asks the database first, then
decodes everything that is stored, compares columns with what they were made from, and replays each job's events
(`rm.ledger.history`). SQLite has no checksums: a byte that changes within a text and leaves it readable, and that is
in no column, is not noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, func, inspect, select, text
from sqlalchemy.exc import DBAPIError

from rm.core.events import Event
from rm.core.model import TERMINAL, Job
from rm.ledger import codec, postgres, sqlite
from rm.ledger.database import parse_url
from rm.ledger.history import History
from rm.ledger.ledger import LIVE, POLICY, columns_of, next_seq
from rm.ledger.schema import head, read_key, revision
from rm.ledger.tables import events, jobs, meta, metadata
from rm.spec import JobSpec

Value = TypeVar("Value")

ROWS_AT_ONCE = 1_000
INTEGRITY, SCHEMA, RECORD, EVENT, COLUMNS, NUMBERS, GPUS = (
    "integrity",
    "schema",
    "record",
    "event",
    "columns",
    "numbers",
    "gpus",
)
_AMOUNTS = ("free_before", "free_after", "charged_before", "charged_after")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `seq`: the number of the event that shows it, 0 where none does.

    `what` is one of integrity (the file itself), schema (a table, column or index is missing), record, event (can't be
    read), columns (a row disagrees with what it holds), numbers (ids and numbers), gpus (a negative amount), history
    (an event where it can't be), overlap (an attempt before the end of another), after_end, status (the record
    disagrees with the events).
    """

    what: str
    message: str
    job_id: str | None = None
    seq: int = 0

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.job_id, f"event {self.seq}" if self.seq else "")))
        return f"{self.what}: {where}: {self.message}" if where else f"{self.what}: {self.message}"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a ledger holds. `schema`: its revision. `next_job`: the next job's number. `last_at`: the latest event."""

    key: str
    schema: str
    jobs: int
    live: int
    events: int
    next_job: int
    last_at: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` saw. `newest`: the revision that this version writes; an older ledger is upgraded when it starts."""

    name: str
    newest: str
    summary: Summary
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ledger": self.name,
            "newest_schema": self.newest,
            **asdict(self.summary),
            "findings": [asdict(each) for each in self.findings],
        }


def check(where: str | Path) -> Report:
    """Everything that is wrong with the ledger at a URL or in a SQLite file.

    Raises LedgerUnavailable for what is no ledger that this version can read: nothing there, a foreign or an empty
    file, a newer schema, no database at all.
    """
    name, snapshot = _source(where)
    newest = head()
    with snapshot() as connection:
        schema = revision(connection, name)
        read_key(connection)  # without one it can't be opened either
        damage = sqlite.damage(connection) if connection.dialect.name == "sqlite" else []
        walk = _Walk(connection, [Finding(INTEGRITY, line) for line in damage])
        try:
            if schema == newest:
                walk.shape()
            walk.meta()
            walk.events()
            walk.jobs()
        except DBAPIError as error:
            if not damage:
                raise
            walk.findings.append(Finding(INTEGRITY, f"the rest can't be read: {error.orig}"))
        summary = summarise(connection, name) if not damage else _blank(schema)
    return Report(name, newest, summary, walk.findings)


def summarise(connection: Connection, name: str) -> Summary:
    """Counts of a ledger's rows. Raises LedgerUnavailable for what is no ledger, or a newer one."""
    schema = revision(connection, name)
    key = read_key(connection)
    live = select(func.count()).select_from(jobs).where(jobs.c.status.in_(LIVE))
    last_event = select(events.c.at).order_by(events.c.seq.desc()).limit(1)
    return Summary(
        key,
        schema,
        connection.execute(select(func.count()).select_from(jobs)).scalar_one(),
        connection.execute(live).scalar_one(),
        connection.execute(select(func.count()).select_from(events)).scalar_one(),
        next_seq(connection),
        connection.execute(last_event).scalar(),
    )


def _blank(schema: str) -> Summary:
    """Of a damaged file nothing is counted: the counts would be guesses."""
    return Summary("", schema, 0, 0, 0, 0, None)


def _source(where: str | Path) -> tuple[str, Callable[[], Any]]:
    """The name and the reader of a URL or file."""
    if isinstance(where, str) and "://" in where:
        url = parse_url(where)
        if url.get_backend_name() != "sqlite":
            return postgres.public_name(url), lambda: postgres.snapshot(url)
        where = sqlite.file_of(url)
    path = Path(where)
    return str(path), lambda: sqlite.snapshot(path)


@dataclass(slots=True)
class _Walk:
    """One pass over everything, with what it found so far."""

    connection: Connection
    findings: list[Finding]
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self.history = History(lambda what, job_id, seq, words: self.found(what, words, job_id, seq))

    def found(self, what: str, message: str, job_id: str | None = None, seq: int = 0) -> None:
        self.findings.append(Finding(what, message, job_id, seq))

    def shape(self) -> None:
        """Tables, columns, indexes: for a ledger of this version's schema."""
        inspector = inspect(self.connection)
        there = set(inspector.get_table_names())
        for table in metadata.sorted_tables:
            if table.name not in there:
                self.found(SCHEMA, f"table {table.name} is missing")
                continue
            lacks = {each.name for each in table.columns}
            lacks -= {each["name"] for each in inspector.get_columns(table.name)}
            indexes = {str(each.name) for each in table.indexes}
            indexes -= {str(each["name"]) for each in inspector.get_indexes(table.name)}
            uniques = [each["column_names"] for each in inspector.get_unique_constraints(table.name)]
            for column in sorted(lacks):
                self.found(SCHEMA, f"column {table.name}.{column} is missing")
            for index in sorted(indexes):
                self.found(SCHEMA, f"index {index} is missing")
            for each in table.columns:
                if each.unique and [each.name] not in uniques:
                    self.found(SCHEMA, f"{table.name}.{each.name} is not kept unique")

    def meta(self) -> None:
        stored = self.connection.execute(select(meta.c.value).where(meta.c.name == POLICY)).scalar()
        if stored is not None:
            self.decoded(RECORD, "the rules in force", partial(codec.decode_policy, stored))

    def jobs(self) -> None:
        """Records, requests, ids and numbers. Only columns that every schema has are read."""
        names = (
            "id",
            "seq",
            "name",
            "owner",
            "queue",
            "kind",
            "status",
            "submitted_at",
            "ended_at",
            "record",
            "spec",
        )
        ids: set[str] = set()
        numbers: set[int] = set()
        arrays: Counter[str] = Counter()
        sizes: dict[str, int] = {}
        for row in self.rows(select(*(jobs.c[name] for name in names)).order_by(jobs.c.seq, jobs.c.id)):
            job = self.decoded(RECORD, "the record", partial(codec.decode_job, row.record), row.id)
            spec = self.decoded(RECORD, "the request", partial(codec.decode_spec, row.spec), row.id)
            ids.add(row.id)
            if row.seq in numbers:
                self.found(NUMBERS, f"number {row.seq} is given twice", row.id)
            numbers.add(row.seq)
            if job is None:
                continue
            self.columns_of(row, job)
            self.number_of(job)
            self.history.compare(job)
            if job.array and isinstance(spec, JobSpec):
                arrays[job.array] += 1
                sizes[job.array] = spec.array or 0
        for job_id, life in self.history.lives.items():
            if job_id not in ids:
                self.found(NUMBERS, "it has events and no record", job_id, life.last)
        for array, size in sizes.items():
            if arrays[array] != size:
                self.found(NUMBERS, f"of {size} jobs of the array {arrays[array]} are there", array)

    def columns_of(self, row: Any, job: Job) -> None:
        made = {"id": codec.column(job.id), **columns_of(job)}
        wrong = [name for name, value in made.items() if getattr(row, name) != value]
        if wrong:
            self.found(COLUMNS, f"{', '.join(wrong)}: the row says other than the record in it", row.id)
        if (job.status in TERMINAL) != (job.ended_at is not None):
            self.found(COLUMNS, f"it is {job.status} and its end is {job.ended_at}", row.id)

    def number_of(self, job: Job) -> None:
        if job.array:
            first = job.seq - (job.array_index or 0)
            right = job.array == f"j{first}" and job.id == f"j{first}_{job.array_index}"
        else:
            right = job.id == f"j{job.seq}"
        if not right or job.seq < 1:
            self.found(NUMBERS, f"its id does not go with its number {job.seq}", job.id)

    def events(self) -> None:
        last = 0
        for row in self.rows(select(events).order_by(events.c.seq)):
            # PostgreSQL leaves out the numbers of what was rolled back, SQLite does not.
            if self.connection.dialect.name == "sqlite" and row.seq != last + 1:
                self.gap(last + 1, row.seq - 1)
            last = row.seq
            for name in _AMOUNTS:
                amount = getattr(row, name)
                if not isinstance(amount, int) or amount < 0:
                    self.found(GPUS, f"{name} is {amount!r}", row.job_id, row.seq)
            event = self.decoded(
                EVENT, row.kind, partial(codec.decode_event, row.kind, row.body), row.job_id, row.seq
            )
            if event is not None:
                self.event_columns(row, event)
                self.history.add(row.seq, event)
            elif row.job_id is not None:
                self.history.unreadable(row.seq, row.job_id)
        if self.connection.dialect.name == "sqlite":
            given = self.connection.execute(
                text("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
            ).scalar()
            if given is not None and given > last:
                self.gap(last + 1, given)

    def gap(self, first: int, last: int) -> None:
        self.found(
            NUMBERS, f"events {first} to {last} are missing" if last > first else f"event {first} is missing"
        )

    def event_columns(self, row: Any, event: Event) -> None:
        job_id = None if event.job_id is None else codec.column(event.job_id)
        made = {"at": codec.moment(event.at), "job_id": job_id, "attempt": getattr(event, "attempt", None)}
        wrong = [name for name, value in made.items() if getattr(row, name) != value]
        if wrong:
            self.found(
                COLUMNS, f"{', '.join(wrong)}: the row says other than the event in it", row.job_id, row.seq
            )

    def rows(self, query: Any) -> Iterator[Any]:
        yield from self.connection.execute(query, execution_options={"yield_per": ROWS_AT_ONCE})

    def decoded(
        self, what: str, whose: str, decode: Callable[[], Value], job_id: str | None = None, seq: int = 0
    ) -> Value | None:
        try:
            return decode()
        except KeyError:
            self.found(what, f"this version knows no event {whose}", job_id, seq)
        except (ValueError, TypeError) as error:
            # The kind of error only: its text quotes what is stored, which may be secret.
            self.found(what, f"{whose} can't be read ({type(error).__name__})", job_id, seq)
        return None
