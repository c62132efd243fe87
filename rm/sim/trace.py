"""Traces: what was submitted to a cluster, one job per row.

A trace is a CSV, plain or gzipped, with the columns of `COLUMNS` in any order. An empty field is unknown;
`job_id`, `submit_s`, `duration_s` and `num_gpus` must be known. Times are seconds; `submit_s` counts from any
fixed moment, by convention the first submission. `duration_s` is what the job ran for in the source cluster,
whatever its end: a job that was cancelled or failed held its GPUs all the same.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

from rm.errors import InvalidSpec

COLUMNS = (
    "job_id",
    "submit_s",
    "duration_s",
    "num_gpus",
    "num_nodes_hint",
    "user",
    "queue",
    "gpu_type",
    "final_state",
)
REQUIRED = COLUMNS[:4]


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One submission.

    `num_gpus`: whole devices, or a share of one below 1. `num_nodes_hint`: nodes that it had in the source
    cluster. `user`, `queue`, `gpu_type`, `final_state`: "" where the trace doesn't say; several acceptable GPU
    types stand in order, with "|" between them. The rest is known of jobs from a ledger and not in the CSV:
    `bundles` is the number of equal parts that were asked for, None where the scheduler may choose.
    """

    job_id: str
    submit_s: float
    duration_s: float
    num_gpus: float
    num_nodes_hint: int | None = None
    user: str = ""
    queue: str = ""
    gpu_type: str = ""
    final_state: str = ""
    name: str = ""
    priority: int = 0
    time_limit_s: float | None = None
    bundles: int | None = None

    @property
    def gpu_seconds(self) -> float:
        return self.num_gpus * self.duration_s


def read_trace(path: Path) -> list[TraceJob]:
    """All jobs of the file, by submission (ties in the order of the file).

    Raises InvalidSpec, naming the line and the column, where a field can't be meant.
    """
    jobs: list[TraceJob] = []
    lines: dict[str, int] = {}
    with open_text(path) as file:
        for line, row in read_rows(path, file, REQUIRED):
            job = _job(path, line, row)
            if job.job_id in lines:
                refuse(path, line, "job_id", f"{job.job_id!r} stands on line {lines[job.job_id]} already")
            lines[job.job_id] = line
            jobs.append(job)
    if not jobs:
        raise InvalidSpec(f"{path}: no jobs in it, only the header", field="trace")
    jobs.sort(key=lambda job: job.submit_s)
    return jobs


def write_trace(path: Path, jobs: Iterable[TraceJob]) -> int:
    """Write them, gzipped if the name ends in .gz; returns how many. The same jobs give the same bytes."""
    count = 0
    with open_text(path, "w") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for job in jobs:
            out.writerow(
                (
                    job.job_id,
                    _number(job.submit_s),
                    _number(job.duration_s),
                    _number(job.num_gpus),
                    "" if job.num_nodes_hint is None else job.num_nodes_hint,
                    job.user,
                    job.queue,
                    job.gpu_type,
                    job.final_state,
                )
            )
            count += 1
    return count


# --- files that people hand in -------------------------------------------------------------------------------


def open_text(path: Path, mode: str = "r") -> IO[str]:
    """Open a text file, gzipped or not. Raises InvalidSpec where it can't be opened."""
    try:
        if path.suffix != ".gz":
            return path.open(mode, encoding="utf-8", newline="")
        if mode == "r":
            return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8", newline=""))
        return io.TextIOWrapper(_StableGzip(path), encoding="utf-8", newline="")
    except OSError as error:
        raise InvalidSpec(f"{path}: {error.strerror or error}", field="trace") from error


class _StableGzip(gzip.GzipFile):
    """No time and no name in the header: the same trace is the same file. Closes the file that it writes to."""

    def __init__(self, path: Path) -> None:
        self._below = path.open("wb")
        super().__init__(filename="", mode="wb", fileobj=self._below, mtime=0)

    def close(self) -> None:
        super().close()
        self._below.close()


def read_rows(path: Path, file: IO[str], required: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV with a header as dictionaries, each with its line number (the header is line 1)."""
    reader = csv.DictReader(file)
    try:
        present = reader.fieldnames or []
        missing = [each for each in required if each not in present]
        if missing:
            raise InvalidSpec(
                f"{path}: line 1: no column {', '.join(missing)}; it has {', '.join(present) or 'none'}",
                field=missing[0],
            )
        for row in reader:
            if None in row:
                refuse(
                    path, reader.line_num, "header", f"the line has more fields than {len(present)} columns"
                )
            yield reader.line_num, {key: (value or "").strip() for key, value in row.items()}
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidSpec(f"{path}: line {reader.line_num + 1}: {error}", field="trace") from error


def refuse(path: Path, line: int, column: str, what: str) -> NoReturn:
    """Raise InvalidSpec at a place in a file."""
    raise InvalidSpec(f"{path}: line {line}, column {column}: {what}", field=column, line=line)


def number(path: Path, line: int, column: str, text: str) -> float:
    """The finite number in a field."""
    try:
        value = float(text)
    except ValueError:
        refuse(path, line, column, f"{text!r} is not a number" if text else "is empty")
    if not math.isfinite(value):
        refuse(path, line, column, f"{text!r} is not a finite number")
    return value


def _job(path: Path, line: int, row: dict[str, str]) -> TraceJob:
    if not row["job_id"]:
        refuse(path, line, "job_id", "is empty")
    submit_s = number(path, line, "submit_s", row["submit_s"])
    if submit_s < 0:
        refuse(path, line, "submit_s", f"{row['submit_s']} is negative")
    duration_s = number(path, line, "duration_s", row["duration_s"])
    if duration_s < 0:
        refuse(path, line, "duration_s", f"{row['duration_s']} is negative")
    num_gpus = number(path, line, "num_gpus", row["num_gpus"])
    if num_gpus <= 0:
        refuse(path, line, "num_gpus", f"{row['num_gpus']} is not above 0; leave jobs without GPUs out")
    if num_gpus > 1 and num_gpus != int(num_gpus):
        refuse(path, line, "num_gpus", f"{row['num_gpus']} is neither whole nor a share of one device")
    hint = row.get("num_nodes_hint", "")
    nodes = number(path, line, "num_nodes_hint", hint) if hint else None
    if nodes is not None and (nodes < 1 or nodes != int(nodes)):
        refuse(path, line, "num_nodes_hint", f"{hint} is not a count of nodes")
    return TraceJob(
        job_id=row["job_id"],
        submit_s=submit_s,
        duration_s=duration_s,
        num_gpus=num_gpus,
        num_nodes_hint=None if nodes is None else int(nodes),
        user=row.get("user", ""),
        queue=row.get("queue", ""),
        gpu_type=row.get("gpu_type", ""),
        final_state=row.get("final_state", ""),
    )


def _number(value: float) -> str:
    """Whole numbers without a point, others exactly."""
    return str(int(value)) if value == int(value) else repr(float(value))
