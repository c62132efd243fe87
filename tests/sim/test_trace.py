"""Traces are read and written exactly; what can't be meant is refused with its line and column."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.errors import InvalidSpec
from rm.sim.trace import TraceJob, read_trace, write_trace

HEADER = "job_id,submit_s,duration_s,num_gpus,num_nodes_hint,user,queue,gpu_type,final_state\n"
WORD = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8)
JOBS = st.lists(
    st.builds(
        TraceJob,
        job_id=st.text("abc,\"' é", min_size=1, max_size=6).filter(lambda text: text == text.strip()),
        submit_s=st.floats(0, 1e9) | st.integers(0, 10**9),
        duration_s=st.floats(0, 1e9) | st.integers(0, 10**9),
        num_gpus=st.sampled_from([0.25, 0.5, 1, 2, 8, 128]),
        num_nodes_hint=st.none() | st.integers(1, 99),
        user=WORD, queue=WORD, gpu_type=WORD, final_state=WORD,
    ),
    min_size=1, max_size=8, unique_by=lambda job: job.job_id,
)  # fmt: skip


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@given(jobs=JOBS)
@settings(deadline=None)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, name: str, jobs: list[TraceJob]
) -> None:
    path = tmp_path_factory.mktemp("trace") / name
    assert write_trace(path, jobs) == len(jobs)
    first = path.read_bytes()
    assert read_trace(path) == sorted(jobs, key=lambda job: job.submit_s)
    write_trace(path, jobs)
    assert path.read_bytes() == first


@pytest.mark.parametrize(("row", "says"), [
    (",0,1,1,,,,,", "line 3, column job_id: is empty"),
    ("a,0,1,1,,,,,", "line 3, column job_id: 'a' stands on line 2 already"),
    ("b,x,1,1,,,,,", "line 3, column submit_s: 'x' is not a number"),
    ("b,-1,1,1,,,,,", "line 3, column submit_s: -1 is negative"),
    ("b,nan,1,1,,,,,", "line 3, column submit_s: 'nan' is not a finite number"),
    ("b,0,,1,,,,,", "line 3, column duration_s: is empty"),
    ("b,0,-5,1,,,,,", "line 3, column duration_s: -5 is negative"),
    ("b,0,1,0,,,,,", "line 3, column num_gpus: 0 is not above 0"),
    ("b,0,1,1.5,,,,,", "line 3, column num_gpus: 1.5 is neither whole nor a share"),
    ("b,0,1,1,0.5,,,,", "line 3, column num_nodes_hint: 0.5 is not a count of nodes"),
    ("b,0,1,1,,,,,,more", "line 3, column header: the line has more fields"),
    ("b,0", "line 3, column duration_s: is empty"),
])  # fmt: skip
def test_the_place_of_a_fault(tmp_path: Path, row: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "a,0,1,1,,,,,\n" + row + "\n")
    with pytest.raises(InvalidSpec) as caught:
        read_trace(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message


def test_only_what_must_be_known_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("num_gpus,job_id,duration_s,submit_s\n2,b,5,7\n0.5,a,5,3.5\n")
    assert read_trace(path) == [TraceJob("a", 3.5, 5, 0.5), TraceJob("b", 7, 5, 2)]
    path.write_text("job_id,submit_s,num_gpus\nb,5,7\n")
    with pytest.raises(InvalidSpec, match="line 1: no column duration_s"):
        read_trace(path)


def test_what_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_text(HEADER)
    with pytest.raises(InvalidSpec, match="no jobs"):
        read_trace(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSpec):
        read_trace(tmp_path / "t.csv")
    (tmp_path / "t.csv.gz").write_text(HEADER)
    with pytest.raises(InvalidSpec, match="(?i)gzip"):
        read_trace(tmp_path / "t.csv.gz")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(HEADER.encode() * 200)[:40])
    with pytest.raises(InvalidSpec):
        read_trace(tmp_path / "t.csv.gz")
