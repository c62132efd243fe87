"""Public trace formats, turned into ours. Rows that can't be replayed are dropped and counted, with the reason.

philly  `cluster_job_log`, JSON: https://github.com/msr-fiddle/philly-traces (Jeon et al., USENIX ATC '19)
helios  `cluster_log.csv`: https://github.com/S-Lab-System-Group/HeliosData (Hu et al., SC '21)
openb   `openb_pod_list_*.csv` of Alibaba: https://github.com/alibaba/clusterdata, cluster-trace-gpu-v2023
        (Weng et al., USENIX ATC '23)
swf     the Standard Workload Format 2.2: https://www.cs.huji.ac.il/labs/parallel/workload/swf.html
        (Chapin et al., JSSPP '99)

All of them may be gzipped. Submissions count from the first job that is kept. Final states get the words that
Slurm has: COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rm.errors import InvalidSpec
from rm.sim.trace import TraceJob, number, open_text, read_rows, refuse

NO_GPUS = "asked for no GPU"
NEVER_RAN = "never ran"
STILL_RAN = "still ran, or its end is unknown"
PARTIAL = "part of a job that has a line for the whole"


@dataclass(frozen=True, slots=True)
class Converted:
    """Jobs by submission, and how many rows were left out for which reason."""

    jobs: list[TraceJob]
    dropped: Counter[str] = field(default_factory=Counter)


Row = TraceJob | str
"""What a reader makes of a row: a job whose `submit_s` counts from anywhere, or why there is none."""


def convert(source: str, path: Path) -> Converted:
    """Read a file of the named format. Raises InvalidSpec: an unknown name, a wrong field, no job left."""
    reader = READERS.get(source)
    if reader is None:
        raise InvalidSpec(f"from: {source!r} is not known; there are {', '.join(READERS)}", field="from")
    jobs: list[TraceJob] = []
    dropped: Counter[str] = Counter()
    for row in reader(path):
        if isinstance(row, str):
            dropped[row] += 1
        else:
            jobs.append(row)
    if not jobs:
        why = "".join(f"; {count} {reason}" for reason, count in dropped.items())
        raise InvalidSpec(f"{path}: no job in it that could be replayed{why}", field="trace")
    jobs.sort(key=lambda job: job.submit_s)
    first_s = jobs[0].submit_s
    return Converted([replace(job, submit_s=job.submit_s - first_s) for job in jobs], dropped)


# --- Philly --------------------------------------------------------------------------------------------------

PHILLY_STATES = {"Pass": "COMPLETED", "Killed": "CANCELLED", "Failed": "FAILED"}


def read_philly(path: Path) -> Iterator[Row]:
    """One object per job. It ran for the sum of its attempts; its size is that of the last one with GPUs.

    Times are the cluster's wall clock without a zone, taken as they stand.
    """
    try:
        with open_text(path) as file:
            entries = json.load(file)
    except json.JSONDecodeError as error:
        refuse(path, error.lineno, str(error.colno), f"not JSON: {error.msg}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"{path}: {error}", field="trace") from error
    if not isinstance(entries, list):
        raise InvalidSpec(f"{path}: a list of jobs is expected, not {type(entries).__name__}", field="trace")
    for place, entry in enumerate(entries):
        try:
            yield _philly_job(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InvalidSpec(f"{path}: entry {place}: {what}", field="trace", entry=place) from error


def _philly_job(entry: dict[str, Any]) -> Row:
    submitted_s = _philly_seconds(entry["submitted_time"])
    duration_s, gpus, nodes, open_end = 0.0, 0, 0, False
    for attempt in entry["attempts"]:
        start_s, end_s = _philly_seconds(attempt["start_time"]), _philly_seconds(attempt["end_time"])
        if start_s is not None and end_s is not None:
            duration_s += max(0.0, end_s - start_s)
        open_end = end_s is None
        held = sum(len(each["gpus"]) for each in attempt["detail"])
        if held:
            gpus, nodes = held, len(attempt["detail"])
    if not entry["attempts"] or submitted_s is None:
        return NEVER_RAN
    if open_end:
        return STILL_RAN
    if not gpus:
        return NO_GPUS
    return TraceJob(
        job_id=str(entry["jobid"]),
        submit_s=submitted_s,
        duration_s=duration_s,
        num_gpus=gpus,
        num_nodes_hint=nodes,
        user=entry.get("user") or "",
        queue=entry.get("vc") or "",
        final_state=PHILLY_STATES.get(entry["status"], entry["status"].upper()),
    )


def _philly_seconds(text: str | None) -> float | None:
    return None if text in {None, "None", ""} else _seconds(str(text))


def _seconds(text: str) -> float:
    """A wall-clock time without a zone as seconds; as if it were UTC, so that differences have no leaps."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


# --- Helios --------------------------------------------------------------------------------------------------


def read_helios(path: Path) -> Iterator[Row]:
    """Slurm's accounting; CPU jobs are in it."""
    needed = ("job_id", "gpu_num", "submit_time", "duration")
    with open_text(path) as file:
        for line, row in read_rows(path, file, needed):
            gpus = number(path, line, "gpu_num", row["gpu_num"])
            if gpus <= 0:
                yield NO_GPUS
                continue
            nodes = row.get("node_num", "")
            yield TraceJob(
                job_id=row["job_id"] or refuse(path, line, "job_id", "is empty"),
                submit_s=_helios_seconds(path, line, row["submit_time"]),
                duration_s=_not_negative(path, line, "duration", row["duration"]),
                num_gpus=gpus,
                num_nodes_hint=int(number(path, line, "node_num", nodes)) if nodes else None,
                user=row.get("user", ""),
                queue=row.get("vc", ""),
                final_state=row.get("state", ""),
            )


def _helios_seconds(path: Path, line: int, text: str) -> float:
    try:
        return _seconds(text)
    except ValueError:
        refuse(path, line, "submit_time", f"{text!r} is not a time such as 2020-06-09 18:41:01")


# --- Alibaba openb -------------------------------------------------------------------------------------------

OPENB_STATES = {"Succeeded": "COMPLETED", "Failed": "FAILED"}


def read_openb(path: Path) -> Iterator[Row]:
    """Pods, times in seconds. One GPU with `gpu_milli` below 1000 is a share of it. The queue is the QoS class.

    Of several acceptable types in `gpu_spec`, "V100M16|V100M32", the trace format holds the first.
    """
    needed = ("name", "num_gpu", "gpu_milli", "creation_time", "deletion_time", "scheduled_time")
    with open_text(path) as file:
        for line, row in read_rows(path, file, needed):
            gpus = number(path, line, "num_gpu", row["num_gpu"])
            if gpus <= 0:
                yield NO_GPUS
            elif _missing(row["scheduled_time"]) or row.get("pod_phase") == "Pending":
                yield NEVER_RAN
            elif _missing(row["deletion_time"]):
                yield STILL_RAN
            else:
                milli = number(path, line, "gpu_milli", row["gpu_milli"])
                if not 0 < milli <= 1000:
                    refuse(path, line, "gpu_milli", f"{row['gpu_milli']} is not from 1 to 1000")
                scheduled_s = number(path, line, "scheduled_time", row["scheduled_time"])
                deleted_s = number(path, line, "deletion_time", row["deletion_time"])
                gpu_type = row.get("gpu_spec", "").split("|")[0]
                yield TraceJob(
                    job_id=row["name"] or refuse(path, line, "name", "is empty"),
                    submit_s=number(path, line, "creation_time", row["creation_time"]),
                    duration_s=max(0.0, deleted_s - scheduled_s),
                    num_gpus=milli / 1000 if gpus == 1 else gpus,
                    num_nodes_hint=1,
                    queue=row.get("qos", ""),
                    gpu_type="" if _missing(gpu_type) else gpu_type,
                    final_state=OPENB_STATES.get(row.get("pod_phase", ""), ""),
                )


def _missing(text: str) -> bool:
    return text in {"", "nan", "None"}


# --- Standard Workload Format --------------------------------------------------------------------------------

SWF_FIELDS = 18
SWF_STATES = {"0": "FAILED", "1": "COMPLETED", "5": "CANCELLED"}
SWF_PARTIAL = frozenset({"2", "3", "4"})


def read_swf(path: Path) -> Iterator[Row]:
    """18 numbers a line, -1 for unknown, `;` before comments. Processors are taken for GPUs.

    Field 2 is the submission, 4 the run time, 5 the processors it had, 8 those it asked for, 11 the status,
    12 the user, 15 the queue (1 based; 0 is interactive).
    """
    with open_text(path) as file:
        try:
            for line, text in enumerate(file, 1):
                fields = text.partition(";")[0].split()
                if fields:
                    yield _swf_job(path, line, fields)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InvalidSpec(f"{path}: {error}", field="trace") from error


def _swf_job(path: Path, line: int, fields: list[str]) -> Row:
    if len(fields) != SWF_FIELDS:
        refuse(
            path, line, str(min(len(fields), SWF_FIELDS) + 1), f"{len(fields)} fields instead of {SWF_FIELDS}"
        )
    values = [number(path, line, str(column), text) for column, text in enumerate(fields, 1)]
    submit_s, run_s, had, asked = values[1], values[3], values[4], values[7]
    status = fields[10]
    if status in SWF_PARTIAL:
        return PARTIAL
    if run_s < 0:
        return NEVER_RAN
    gpus = asked if asked > 0 else had
    if gpus <= 0:
        return NO_GPUS
    return TraceJob(
        job_id=fields[0],
        submit_s=submit_s,
        duration_s=run_s,
        num_gpus=gpus,
        user="" if values[11] < 0 else f"u{fields[11]}",
        queue="" if values[14] < 0 else f"q{fields[14]}",
        final_state=SWF_STATES.get(status, ""),
    )


def _not_negative(path: Path, line: int, column: str, text: str) -> float:
    value = number(path, line, column, text)
    return value if value >= 0 else refuse(path, line, column, f"{text} is negative")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "philly": read_philly,
    "helios": read_helios,
    "openb": read_openb,
    "swf": read_swf,
}
