"""Small samples in the shape of the public formats, and what becomes of each row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rm.errors import InvalidSpec
from rm.sim.converters import NEVER_RAN, NO_GPUS, PARTIAL, STILL_RAN, convert
from rm.sim.trace import TraceJob, read_trace, write_trace


def attempt(start: str | None, end: str | None, *gpus_per_node: int) -> dict[str, Any]:
    detail = [
        {"ip": f"m{node}", "gpus": [f"gpu{gpu}" for gpu in range(gpus)]}
        for node, gpus in enumerate(gpus_per_node)
    ]
    return {"start_time": start, "end_time": end, "detail": detail}


def philly_job(jobid: str, submitted: str, *attempts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"status": "Pass", "vc": "v1", "jobid": jobid, "attempts": list(attempts), "submitted_time": submitted,
            "user": "u1", **more}  # fmt: skip


def test_philly(tmp_path: Path) -> None:
    day = "2017-10-07 "
    jobs = [
        philly_job("late", day + "01:00:10", attempt(day + "02:00:00", day + "02:01:00", 8, 8),
                   status="Killed", user=None),
        philly_job("first", day + "01:00:00", attempt(day + "01:00:30", day + "01:01:00", 1),
                   attempt(day + "01:02:00", day + "01:04:00", 2)),
        philly_job("lost", day + "01:00:01", attempt(None, day + "01:00:09", 1),
                   attempt(day + "01:00:10", day + "01:00:20", 1), status="Failed"),
        philly_job("waits", day + "01:00:00"),
        philly_job("runs", day + "01:00:00", attempt(day + "01:00:00", None, 4)),
        philly_job("cpu", day + "01:00:00", attempt(day + "01:00:00", day + "01:00:05")),
    ]  # fmt: skip
    path = tmp_path / "cluster_job_log"
    path.write_text(json.dumps(jobs))
    converted = convert("philly", path)
    assert converted.jobs == [
        TraceJob("first", 0, 150, 2, 1, "u1", "v1", "", "COMPLETED"),
        TraceJob("lost", 1, 10, 1, 1, "u1", "v1", "", "FAILED"),
        TraceJob("late", 10, 60, 16, 2, "", "v1", "", "CANCELLED"),
    ]
    assert converted.dropped == {NEVER_RAN: 1, STILL_RAN: 1, NO_GPUS: 1}


@pytest.mark.parametrize(("text", "says"), [
    ("[", "line 1, column 2: not JSON"),
    ("{}", "a list of jobs is expected, not dict"),
    ("[1]", "entry 0: "),
    ('[{"attempts": []}]', "entry 0: no 'submitted_time'"),
    (json.dumps([philly_job("a", "yesterday")]), "entry 0: Invalid isoformat"),
    ("[]", "no job in it that could be replayed"),
    (json.dumps([philly_job("a", "2017-10-07 01:00:00")]), "replayed; 1 never ran"),
])  # fmt: skip
def test_what_is_no_philly_log(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(InvalidSpec) as caught:
        convert("philly", path)
    assert says in caught.value.message


HELIOS = "job_id,user,vc,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue\n"


def test_helios(tmp_path: Path) -> None:
    path = tmp_path / "cluster_log.csv.gz"
    rows = (
        "7,uA,vc1,16,64,2,FAILED,2020-06-09 18:41:27,2020-06-09 18:41:27,2020-06-09 18:45:36,249,0\n"
        "8,uB,vc2,0,16,1,COMPLETED,2020-06-09 18:41:28,,,5,0\n"
        "6,uB,vc2,1,1,1,COMPLETED,2020-06-08 18:41:27,,,36848,0\n"
    )
    path.write_bytes(gzip.compress((HELIOS + rows).encode()))
    converted = convert("helios", path)
    assert converted.jobs == [
        TraceJob("6", 0, 36848, 1, 1, "uB", "vc2", "", "COMPLETED"),
        TraceJob("7", 86400, 249, 16, 2, "uA", "vc1", "", "FAILED"),
    ]
    assert converted.dropped == {NO_GPUS: 1}


OPENB = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,"
    "creation_time,deletion_time,scheduled_time\n"
)


def test_openb(tmp_path: Path) -> None:
    path = tmp_path / "openb_pod_list.csv"
    path.write_text(
        OPENB + "p1,88000,327680,8,1000,,Burstable,Succeeded,100,1100,150\n"
        "p2,4000,15258,1,220,nan,BE,Running,110,400,110\n"
        "p3,6000,32768,1,1000,V100M16|V100M32,LS,Failed,120,130,125\n"
        "p4,6000,32768,1,500,,LS,Pending,120,130,\n"
        "p5,6000,32768,0,0,,LS,Running,120,130,121\n"
        "p6,6000,32768,1,500,,LS,Running,120,,121\n"
    )
    converted = convert("openb", path)
    assert converted.jobs == [
        TraceJob("p1", 0, 950, 8, 1, "", "Burstable", "", "COMPLETED"),
        TraceJob("p2", 10, 290, 0.22, 1, "", "BE", "", ""),
        TraceJob("p3", 20, 5, 1, 1, "", "LS", "V100M16", "FAILED"),
    ]
    assert converted.dropped == {NEVER_RAN: 1, NO_GPUS: 1, STILL_RAN: 1}


def test_standard_workload_format(tmp_path: Path) -> None:
    path = tmp_path / "log.swf"
    path.write_text(
        "; Version: 2.2\n;\n"
        "1 50 10 100 8 -1 -1 16 3600 -1 1 3 1 -1 2 1 -1 -1\n"
        "2 60 10 100 4 -1 -1 -1 -1 -1 0 -1 1 -1 -1 1 -1 -1 ; a comment\n"
        "\n"
        "3 61 -1 -1 -1 -1 -1 4 -1 -1 5 1 1 -1 1 1 -1 -1\n"
        "4 62 1 10 4 -1 -1 4 -1 -1 2 1 1 -1 1 1 -1 -1\n"
    )
    converted = convert("swf", path)
    assert converted.jobs == [
        TraceJob("1", 0, 100, 16, None, "u3", "q2", "", "COMPLETED"),
        TraceJob("2", 10, 100, 4, None, "", "", "", "FAILED"),
    ]
    assert converted.dropped == {NEVER_RAN: 1, PARTIAL: 1}


@pytest.mark.parametrize(("source", "text", "says"), [
    ("helios", HELIOS + "1,u,v,x,1,1,S,2020-06-09 18:41:01,,,1,0\n", "line 2, column gpu_num: 'x' is not a number"),
    ("helios", HELIOS + "1,u,v,1,1,1,S,noon,,,1,0\n", "line 2, column submit_time: 'noon' is not a time"),
    ("helios", HELIOS + "1,u,v,1,1,1,S,2020-06-09 18:41:01,,,-1,0\n", "line 2, column duration: -1 is negative"),
    ("helios", "job_id\n", "line 1: no column gpu_num, submit_time, duration"),
    ("openb", OPENB + "p,1,1,1,0,,BE,Running,1,2,1\n", "line 2, column gpu_milli: 0 is not from 1 to 1000"),
    ("swf", "1 2 3\n", "line 1, column 4: 3 fields instead of 18"),
    ("swf", "1 x " + "1 " * 16, "line 1, column 2: 'x' is not a number"),
    ("slurm", "", "from: 'slurm' is not known; there are philly, helios, openb, swf"),
])  # fmt: skip
def test_the_place_of_a_fault(tmp_path: Path, source: str, text: str, says: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(InvalidSpec) as caught:
        convert(source, path)
    assert says in caught.value.message


def test_a_converted_trace_can_be_read(tmp_path: Path) -> None:
    source, made = tmp_path / "pods.csv", tmp_path / "trace.csv"
    source.write_text(OPENB + "p2,4000,15258,1,220,nan,BE,Running,110,400,110\n")
    jobs = convert("openb", source).jobs
    write_trace(made, jobs)
    assert read_trace(made) == jobs
