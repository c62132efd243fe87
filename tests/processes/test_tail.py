"""Log files as user code really writes them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rm.runtime.tail import LINE_LIMIT_CHARS, Tail, last_lines


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert (tail.read(10), tail.drained) == (b"", True), "not there yet"
    with path.open("ab", buffering=0) as log:
        log.write(b"epoch 1\nepo")
        assert not tail.drained
        assert tail.read(8) == b"epoch 1\n"
        assert not tail.drained
        assert (tail.read(100), tail.drained) == (b"epo", True)
        assert tail.read(100) == b""
        log.write(b"ch 2\n")
        assert (tail.drained, tail.read(100), tail.drained) == (False, b"ch 2\n", True)


def test_pieces_add_up_to_the_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "log").write_bytes(content)
    tail, pieces = Tail(str(tmp_path / "log")), []
    while not tail.drained:
        pieces.append(tail.read(777))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) == 777


def test_an_emptied_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"long before\n")
    tail = Tail(path)
    tail.read(100)
    path.write_bytes(b"after\n")
    assert not tail.drained
    assert (tail.read(100), tail.drained) == (b"after\n", True)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"one", ["one"]),
        (b"one\n\nthree\n", ["one", "", "three"]),
        (b"dos\r\nlines\r\n", ["dos", "lines"]),
        (b" 10%\r 50%\r100%\ndone\n", ["100%", "done"]),
        (b" 10%\r 50%\r", [" 50%"]),
        (b"\r 10%", [" 10%"]),
        ("Größe \N{ROCKET}\n".encode(), ["Größe \N{ROCKET}"]),
        (b"\xff\xfe\x00ok\tend\n", ["\ufffd\ufffd\ufffdok\tend"]),
        (b"\x1b[1;31mred\x1b[0m \x1b[2Kplain\n", ["red plain"]),
        (b"a\x0bb\xe2\x80\xa8c\n", ["a\ufffdb\u2028c"]),
    ],
)
def test_last_lines_are_clean_text(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "log").write_bytes(content)
    assert last_lines(tmp_path / "log", 10) == lines


def test_only_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {n}\n" for n in range(1000)))
    assert last_lines(path, 2) == ["line 998", "line 999"]
    assert last_lines(path, 0) == []
    assert last_lines(str(path), 10, max_bytes=20) == ["line 998", "line 999"], (
        "a line that was cut is left out"
    )


def test_no_file_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "nothing", 5) == []


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 10_000_000)
    (line,) = last_lines(path, 5)
    assert len(line) == LINE_LIMIT_CHARS
    assert line.endswith("x…")
    path.write_bytes(b"y" * LINE_LIMIT_CHARS)
    assert last_lines(path, 5) == ["y" * LINE_LIMIT_CHARS]


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as log:
        log.truncate(50 * 2**30)  # sparse: takes no space
        log.seek(0, 2)
        log.write(b"\nthe end\n")
    began = time.monotonic()
    assert last_lines(path, 1) == ["the end"]
    tail = Tail(path)
    assert len(tail.read(1000)) == 1000
    assert time.monotonic() - began < 5


def test_what_was_read_is_forgotten_but_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    content = bytes(range(256)) * 16 * 256  # 1 MiB
    path.write_bytes(content)
    while tail.read(100_000):
        tail.forget(64 * 1024, 128 * 1024)
    assert path.stat().st_size == len(content), "everything keeps its place"
    assert path.stat().st_blocks * 512 <= (64 + 128) * 1024 + 3 * 4096
    assert path.read_bytes()[-64 * 1024 :] == content[-64 * 1024 :]
    with path.open("ab") as file:
        file.write(b"more")
    assert tail.behind() == 4
    assert tail.read(100) == b"more"
    path.write_bytes(b"")  # emptied by its program
    assert tail.read(100) == b""
    path.write_bytes(b"anew")
    assert tail.read(100) == b"anew"
    tail.forget(1, 1)
    assert path.read_bytes()[-1:] == b"w"


def test_a_backlog_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0123456789")
    tail = Tail(path)
    assert tail.behind() == 10
    tail.skip(7)
    assert tail.read(100) == b"789"
    assert Tail(tmp_path / "none").behind() == 0
