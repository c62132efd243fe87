"""The ledger: one write, a few reads.

Theory of operation. The allocator's writer is the only one that commits. A batch is accepted jobs, changed
records and events, in one transaction: after a failure the database holds none of it, and a failure that
came while the database was committing is settled by the next `load`, which waits for it. Job records are
overwritten, since the core keeps one per job; events are only ever added. Reads see what is committed and never
wait for the writer.

Methods block: the allocator calls them in worker threads. All raise LedgerUnavailable, with the database's own
words, for whatever the world has done to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from math import inf
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy import Connection, Dialect, Select, Table, bindparam, delete, func, select, text, update

from rm.core.books import Owner
from rm.core.events import Event, NodeJoined, NodeLost
from rm.core.fairshare import Usage
from rm.core.model import TERMINAL, Job, Status
from rm.core.resources import gpu_count
from rm.errors import LedgerUnavailable, UnknownJob
from rm.ledger import codec
from rm.ledger.database import Database, parse_url
from rm.ledger.rows import Accepted, AppliedPolicy, Batch, EventRow, JobRow, Loaded
from rm.ledger.schema import read_key
from rm.ledger.tables import cordons, events, jobs, meta, usage
from rm.spec import JobSpec
from rm.views import EventView

Value = TypeVar("Value")
Fields = dict[str, Any]

LIVE = tuple(str(status) for status in Status if status not in TERMINAL)
LEARNT_FROM = 2_000
"""How many of the latest ended jobs `load` gives, to learn durations from."""
POLICY = "policy"
"""The row of `meta` that holds the rules in force."""
FIRST_SEQ = "first_seq"
"""The row of `meta` below which no number is given again: a restored backup's. Later jobs had those numbers."""
LATEST = 1_000
"""Events among which the newest time is looked for."""
KEYS_AT_ONCE = 1_000
"""Most parameters of one query; SQLite allows 32,766."""


class Ledger:
    """An open ledger. Thread-safe. `key`: its 6 hex characters, drawn when it was created and kept for good."""

    def __init__(self, database: Database) -> None:
        """For `open` alone."""
        self._database = database
        with database.reading() as connection:
            self.key = read_key(connection)

    @classmethod
    def open(cls, url: str) -> Ledger:
        """The ledger at a SQLAlchemy URL (`sqlite:///…` or `postgresql://…`), created where there is nothing.

        Raises LedgerUnavailable where something else is: a damaged file, a foreign database, a newer schema.
        """
        parsed = parse_url(url)
        if parsed.get_backend_name() == "sqlite":
            from rm.ledger.sqlite import open_sqlite as connect
        else:
            from rm.ledger.postgres import open_postgres as connect
        database = connect(parsed)
        try:
            return cls(database)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Close all connections. Whoever opened the ledger calls it, once nothing reads any more."""
        self._database.close()

    # --- the writer's two calls --------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Every job that has not ended, and what else the allocator needs. Includes all that was ever committed."""
        records = select(jobs.c.id, jobs.c.record)
        live = records.where(jobs.c.status.in_(LIVE)).order_by(jobs.c.seq)
        # By seq, which has an index: about the latest is good enough to learn from.
        ended = records.where(jobs.c.ended_at.is_not(None)).order_by(jobs.c.seq.desc()).limit(LEARNT_FROM)
        with self._database.transaction("read") as connection:
            rows = connection.execute(live).all()
            ended_rows = connection.execute(ended).all()
            used = connection.execute(select(usage)).all()
            policy = connection.execute(_POLICY_ROW).scalar()
            number = next_seq(connection)
            cordoned = connection.execute(select(cordons).order_by(cordons.c.node_id)).all()
            came_and_went = connection.execute(_NODES).all()
        return Loaded(
            [_job(row) for row in rows],
            number,
            [((codec.uncolumn(each.queue), codec.uncolumn(each.owner)), _usage(each)) for each in used],
            sorted((_job(row) for row in ended_rows), key=lambda job: job.ended_at or 0.0),
            None if policy is None else _decoded("the policy", codec.decode_policy, policy),
            [_decoded(f"node {each.node_id}", codec.decode_cordon, each.record) for each in cordoned],
            _nodes(came_and_went),
        )

    def commit(self, batch: Batch) -> None:
        """Write the batch in one transaction, durably. Raises LedgerUnavailable: then none of it is written."""
        changed = {job.id: job for job in batch.changed}
        # A job accepted in this very batch is written once, as it is at the end of it.
        added = [_accepted_fields(each, changed.pop(each.job.id, each.job)) for each in batch.accepted]
        moved = [{"of": codec.column(job.id), **_record_fields(job)} for job in changed.values()]
        happened = [_event_fields(row) for row in batch.events]
        used = [_usage_fields(*each) for each in batch.usage]
        if not (added or moved or happened or used or batch.policy or batch.cordons):
            return
        with self._database.transaction() as connection:
            if added:
                _insert(connection, jobs, added)
            if moved:
                found = connection.execute(_MOVE, moved).rowcount
                if found != len(moved):
                    raise LedgerUnavailable(
                        f"the ledger {self._database.name} lacks {len(moved) - found} of the jobs "
                        f"{', '.join(list(changed)[:10])}: was it replaced while the allocator was running?"
                    )
            if happened:
                _insert(connection, events, happened)
            if used:
                connection.execute(_USED, used)
            for node_id, cordon in batch.cordons.items():
                connection.execute(_LIFT.where(cordons.c.node_id == codec.column(node_id)))
                if cordon is not None:
                    row = {"node_id": codec.column(node_id), "record": codec.encode_cordon(cordon)}
                    connection.execute(cordons.insert(), row)
            if batch.policy is not None:
                row = {"name": POLICY, "value": codec.encode_policy(batch.policy)}
                connection.execute(_SET_META, row)

    # --- reads -------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> JobRow | None:
        """One job, ended or not, or None."""
        rows = self._read(_JOB_ROW.where(jobs.c.id == codec.column(job_id)))
        return _job_row(rows[0]) if rows else None

    def spec(self, job_id: str) -> JobSpec:
        """What was asked for. Raises UnknownJob."""
        rows = self._read(select(jobs.c.id, jobs.c.spec).where(jobs.c.id == codec.column(job_id)))
        if not rows:
            raise UnknownJob(f"there is no job {job_id!r} in the ledger", field="job_id")
        return _decoded(rows[0].id, codec.decode_spec, rows[0].spec)

    def specs(self, job_ids: Sequence[str]) -> dict[str, JobSpec]:
        """What was asked for, by id, of those that the ledger has."""
        stored = {codec.column(job_id): job_id for job_id in job_ids}
        found: dict[str, JobSpec] = {}
        for some in _parts(list(stored)):
            rows = self._read(select(jobs.c.id, jobs.c.spec).where(jobs.c.id.in_(some)))
            found |= {stored[row.id]: _decoded(row.id, codec.decode_spec, row.spec) for row in rows}
        return found

    def blobs_of_live_jobs(self) -> set[str]:
        """The SHA-256 of every function and working directory that a job which has not ended may still need."""
        found: set[str] = set()
        query = select(jobs.c.seq, jobs.c.spec).where(jobs.c.status.in_(LIVE))
        after = 0
        while True:
            rows = self._read(query.where(jobs.c.seq > after).order_by(jobs.c.seq).limit(KEYS_AT_ONCE))
            if not rows:
                return found
            after = rows[-1].seq
            # Not decoded: there may be a hundred thousand. What only looks like one costs nothing.
            for row in rows:
                found.update(_BLOB.findall(row.spec))

    def newest(self) -> float:
        """The newest time of the latest events and of the owners' use: seconds since the epoch, 0 where there is none.

        By number and not by time, which has no index: an event is stamped shortly before it gets its number.
        """
        latest = select(events.c.at).order_by(events.c.seq.desc()).limit(LATEST).subquery()
        found = [
            self._read(select(func.max(latest.c.at)).where(latest.c.at < inf))[0][0],
            self._read(select(func.max(usage.c.at)).where(usage.c.at < inf))[0][0],
        ]
        return max((float(at) for at in found if at is not None), default=0.0)

    def policy(self) -> AppliedPolicy | None:
        """The rules in force, or None where none were ever applied."""
        rows = self._read(_POLICY_ROW)
        return _decoded("the policy", codec.decode_policy, rows[0].value) if rows else None

    def members(self, array_id: str) -> list[JobRow]:
        """The jobs of an array, by index; empty where there is no such array."""
        rows = self._read(_JOB_ROW.where(jobs.c.array == codec.column(array_id)).order_by(jobs.c.seq))
        return [_job_row(row) for row in rows]

    def tally(self, array_id: str) -> dict[Status, int]:
        """How many of an array's jobs have each status; empty where there is no such array."""
        query = select(jobs.c.status, func.count()).where(jobs.c.array == codec.column(array_id))
        return {Status(row[0]): row[1] for row in self._read(query.group_by(jobs.c.status))}

    def last_end(self, array_id: str) -> float | None:
        """When the latest of an array's ended jobs ended."""
        query = select(func.max(jobs.c.ended_at)).where(jobs.c.array == codec.column(array_id))
        found: float | None = self._read(query)[0][0]
        return found

    def jobs(
        self,
        statuses: Iterable[Status] | None = None,
        owner: str | None = None,
        name: str | None = None,
        limit: int = 100,
        newest_first: bool = True,
    ) -> list[JobRow]:
        """Jobs in the order of submission, of these statuses, this owner and this name where given."""
        query = _JOB_ROW.order_by(jobs.c.seq.desc() if newest_first else jobs.c.seq).limit(limit)
        if statuses is not None:
            query = query.where(jobs.c.status.in_([str(status) for status in statuses]))
        if owner is not None:
            query = query.where(jobs.c.owner == codec.column(owner))
        if name is not None:
            query = query.where(jobs.c.name == codec.column(name))
        return [_job_row(row) for row in self._read(query)]

    def events(
        self, job_id: str | None = None, after: int = 0, limit: int = 1000, *, array_id: str | None = None
    ) -> list[EventView]:
        """The oldest `limit` events with a number above `after`, of one job, of an array or of all, in order."""
        query = select(events).where(events.c.seq > after).order_by(events.c.seq).limit(limit)
        if job_id is not None:
            query = query.where(events.c.job_id == codec.column(job_id))
        if array_id is not None:
            members = select(jobs.c.id).where(jobs.c.array == codec.column(array_id))
            query = query.where(events.c.job_id.in_(members))
        return [_event_view(row) for row in self._read(query)]

    def submitted(self, keys: Sequence[str]) -> dict[str, str]:
        """Which of these idempotency keys were accepted before: key → job id."""
        stored = {codec.column(key): key for key in keys}
        found: dict[str, str] = {}
        for some in _parts(list(stored)):
            rows = self._read(select(jobs.c.key, jobs.c.id).where(jobs.c.key.in_(some)))
            found.update({stored[row.key]: row.id for row in rows})
        return found

    def count_events(self) -> int:
        """How many events there are. Reads an index from end to end."""
        return int(self._read(select(func.count()).select_from(events))[0][0])

    def _read(self, query: Select[Any]) -> Sequence[Any]:
        with self._database.reading() as connection:
            return connection.execute(query).all()


def next_seq(connection: Connection) -> int:
    """The next free number of a job."""
    last = connection.execute(select(func.max(jobs.c.seq))).scalar()
    first = connection.execute(select(meta.c.value).where(meta.c.name == FIRST_SEQ)).scalar()
    return max((last or 0) + 1, int(first or 1))


def _insert(connection: Connection, table: Table, rows: Sequence[Fields]) -> None:
    """Add rows, all with the fields of the first, by the driver's own cursor.

    What SQLAlchemy does around each statement and each row's parameters takes longer than SQLite itself. Only for
    columns whose values go to the driver as they are: texts, numbers and None.
    """
    statement, names = _insertion(table, connection.dialect, tuple(rows[0]))
    cursor = connection.connection.cursor()
    try:
        if names is None:
            cursor.executemany(statement, rows)
        else:
            cursor.executemany(statement, [tuple(row[name] for name in names) for row in rows])
    except Exception as error:
        _note_loss(connection, error, cursor)
        raise
    finally:
        cursor.close()


def _note_loss(connection: Connection, error: Any, cursor: Any) -> None:
    """As SQLAlchemy does for its own cursors: else the end of the transaction fails again, in less telling words."""
    if connection.dialect.is_disconnect(error, connection.connection.dbapi_connection, cursor):
        connection.invalidate(error)


@lru_cache(maxsize=16)
def _insertion(table: Table, dialect: Dialect, fields: tuple[str, ...]) -> tuple[str, list[str] | None]:
    """The statement in the driver's words, and the fields in the order of its places; None where these have names."""
    compiled = table.insert().compile(dialect=dialect, column_keys=list(fields))
    return str(compiled), compiled.positiontup


def _parts(columns: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(columns), KEYS_AT_ONCE):
        yield columns[start : start + KEYS_AT_ONCE]


_BLOB = re.compile(r'"(?:payload|working_dir)_sha256":"([0-9a-f]{64})"')
_JOB_ROW = select(jobs.c.id, jobs.c.record, jobs.c.spec)
_LIFT = delete(cordons)
_NODES = (
    select(events.c.seq, events.c.kind, events.c.body)
    .where(events.c.job_id.is_(None), events.c.kind.in_(["NodeJoined", "NodeLost"]))
    .order_by(events.c.seq)
)
"""By the index on `job_id`: events that are no job's are few."""
_MOVE = update(jobs).where(jobs.c.id == bindparam("of"))
_POLICY_ROW = select(meta.c.value).where(meta.c.name == POLICY)
_USED = text(
    "INSERT INTO usage (queue, owner, average, at) VALUES (:queue, :owner, :average, :at) "
    "ON CONFLICT (queue, owner) DO UPDATE SET average = excluded.average, at = excluded.at"
)
_SET_META = text(
    "INSERT INTO meta (name, value) VALUES (:name, :value) "
    "ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)
"""Both databases know this form."""


def _accepted_fields(accepted: Accepted, job: Job) -> Fields:
    return {
        "id": codec.column(job.id),
        "key": codec.column(accepted.key),
        "spec": accepted.spec_text or codec.encode_spec(accepted.spec),
        "array": codec.column(job.array) if job.array else None,
        **_record_fields(job),
    }


def _record_fields(job: Job) -> Fields:
    return {**columns_of(job), "record": codec.encode_job(job)}


def columns_of(job: Job) -> Fields:
    """What a job's row says of its record beside the record itself, to be looked for."""
    return {
        "seq": job.seq,
        "name": codec.column(job.name),
        "owner": codec.column(job.owner),
        "queue": codec.column(job.queue),
        "kind": str(job.kind),
        "status": str(job.status),
        "submitted_at": codec.moment(job.submitted_at),
        "ended_at": None if job.ended_at is None else codec.moment(job.ended_at),
    }


def _usage_fields(owner: Owner, used: Usage) -> Fields:
    queue, name = owner
    return {
        "queue": codec.column(queue),
        "owner": codec.column(name),
        "average": codec.moment(used.average),
        "at": codec.moment(used.at),
    }


def _nodes(rows: Iterable[Any]) -> dict[str, NodeJoined]:
    """The nodes that are there after these events, by id."""
    found: dict[str, NodeJoined] = {}
    for row in rows:
        event: Event = _decoded(f"event {row.seq}", partial(codec.decode_event, row.kind), row.body)
        if isinstance(event, NodeJoined):
            found[event.node_id] = event
        elif isinstance(event, NodeLost):
            found.pop(event.node_id, None)
    return found


def _usage(row: Any) -> Usage:
    return Usage(row.average, 0, row.at)


def _event_fields(row: EventRow) -> Fields:
    event = row.event
    return {
        "at": codec.moment(event.at),
        "kind": type(event).__name__,
        "job_id": None if event.job_id is None else codec.column(event.job_id),
        "attempt": getattr(event, "attempt", None),
        "body": codec.encode_event(event),
        "free_before": row.totals_before.free,
        "free_after": row.totals_after.free,
        "charged_before": row.totals_before.charged,
        "charged_after": row.totals_after.charged,
    }


def _job(row: Any) -> Job:
    return _decoded(row.id, codec.decode_job, row.record)


def _job_row(row: Any) -> JobRow:
    return JobRow(_job(row), _decoded(row.id, codec.decode_spec, row.spec))


def _event_view(row: Any) -> EventView:
    return EventView(
        seq=row.seq,
        at=row.at,
        kind=row.kind,
        job_id=row.job_id,
        attempt=row.attempt,
        body=_decoded(f"event {row.seq}", codec.event_fields, row.body),
        free_before=gpu_count(row.free_before),
        free_after=gpu_count(row.free_after),
        charged_before=gpu_count(row.charged_before),
        charged_after=gpu_count(row.charged_after),
    )


def _decoded(whose: str, decode: Callable[[str], Value], stored: str) -> Value:
    try:
        return decode(stored)
    except ValueError as error:
        # Without the values, and not chained: a spec's environment may hold secrets.
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_input=False, include_url=False)[0]
            why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise LedgerUnavailable(
            f"the ledger's record of {whose} can't be read ({why}): it was damaged, or written by another version"
        ) from None
