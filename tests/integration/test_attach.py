"""Attaching to a Ray cluster, against real ones: an open one and one that wants a token, side by side on this machine.

A process can attach to one cluster only, and the test session may be attached to its own: cases run in child processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rm.runtime.local import LocalRay
from rm.runtime.local_processes import members

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(120), pytest.mark.xdist_group("attach")]

PRELUDE = """
import json, os, threading, time
import ray  # counted apart: the first import on a busy machine takes seconds
from ray._private import services
from rm.runtime.attach import attach

def tell(**what):
    print("TELL", json.dumps(what), flush=True)

def attempt(address=None, **options):
    began = time.monotonic()
    try:
        said = {"at": attach(address, **options)}
    except Exception as error:
        said = {"error": type(error).__name__, "message": str(error)}
    tell(asked=address, s=time.monotonic() - began, mode=os.environ.get("RAY_AUTH_MODE"), **said)

def actor_works():
    @ray.remote(num_cpus=0)
    class Echo:
        def echo(self, value):
            return value
    return ray.get(Echo.remote().echo.remote(7), timeout=30) == 7

def pretend_to_find(*addresses):
    services.find_gcs_addresses = lambda: frozenset(addresses)
    services.find_gcs_addresses.cache_clear = lambda: None
"""


class Place:
    """A home and a temporary directory of a user of this machine, where no token and no default cluster is."""

    def __init__(self, root: Path) -> None:
        self.home, self.tmp = root / "home", root / "tmp"
        (self.home / ".ray").mkdir(parents=True)
        (self.tmp / "ray").mkdir(parents=True)
        self.token = self.home / ".ray" / "auth_token"
        self.default = self.tmp / "ray" / "ray_current_cluster"
        self.warned = ""
        """What the last process said on stderr."""

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "HOME": str(self.home), "RAY_TMPDIR": str(self.tmp), **extra}

    def run(self, code: str, **extra: str) -> list[dict[str, Any]]:
        """What `code` told, run in a process of this user. No token may appear in anything that it printed."""
        child = subprocess.run(
            [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", "-c", PRELUDE + code],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert child.returncode == 0, child.stderr[-3000:]
        self.warned = child.stderr
        for secret in (*SECRETS, extra.get("RAY_AUTH_TOKEN")):
            assert not secret or secret not in child.stdout + child.stderr
        return [json.loads(line[5:]) for line in child.stdout.splitlines() if line.startswith("TELL ")]


SECRETS: list[str] = []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def rays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LocalRay]]:
    """The open cluster and the closed one; the closed one's token is made by it, in a home of its own."""
    owner = Place(tmp_path_factory.mktemp("owner"))
    code = (
        "import json, sys; from rm.runtime.local import LocalRay; from dataclasses import asdict\n"
        "with LocalRay.start(num_gpus=1, dashboard=False) as ray:\n"
        "    print(json.dumps(asdict(ray)), flush=True); sys.stdin.read()"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=owner.environment(RAY_AUTH_MODE=mode),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for mode in ("disabled", "token")
    ]
    found = [LocalRay(**json.loads(child.stdout.readline())) for child in children if child.stdout]
    SECRETS.append(owner.token.read_text())
    assert owner.token.stat().st_mode & 0o077 == 0
    yield dict(zip(("open", "closed"), found, strict=True))
    for child in children:
        child.communicate(timeout=30)
    assert not any(members(each.key) for each in found)
    assert not any(Path(each.directory).exists() for each in found)


@contextmanager
def silent_server(*, accepts: bool) -> Iterator[str]:
    """The address of a server that says nothing: it accepts connections, or its backlog is full, like a blackhole."""
    held = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16 if accepts else 0)
        for _ in range(0 if accepts else 3):
            held.append(socket.socket())
            held[-1].setblocking(False)
            held[-1].connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for each in held:
            each.close()


def test_an_address_where_no_gcs_answers_is_refused_within_five_seconds(tmp_path: Path) -> None:
    with silent_server(accepts=True) as silent, silent_server(accepts=False) as blackhole:
        cases = {silent: "not answer as a Ray GCS", blackhole: "no answer"}
        with ThreadPoolExecutor() as pool:
            runs = [
                pool.submit(Place(tmp_path / str(n)).run, f"attempt({address!r}); attempt('127.0.0.1:1')")
                for n, address in enumerate(cases)
            ]
            told = [run.result() for run in runs]
    for (slow, dead), why in zip(told, cases.values(), strict=True):
        assert slow["error"] == dead["error"] == "NoCluster"
        assert why in slow["message"]
        assert "nothing listens there" in dead["message"]
        assert "`ray start --head`" in dead["message"]
        assert "`rmctl start --local`" in dead["message"]
        assert slow["s"] < 5
        assert dead["s"] < 1
        assert slow["mode"] is None


def test_an_address_that_can_not_be_meant_is_refused_at_once(place: Place) -> None:
    bad = [
        "head",
        "head:",
        "head:0",
        ":6379",
        "head:99999",
        "1:2:3",
        "h p:1",
        "[::1:1",
        "redis://h:1",
        "local",
    ]
    bad += ["ray://head:10001", "http://127.0.0.1:8265", "no-such-host.invalid:6379", "a..b:6379"]
    told = place.run(
        f"for address in {bad!r}: attempt(address)\n"
        "os.environ['RAY_ADDRESS'] = 'https://head:8265'; attempt(); attempt('auto')"
    )
    assert [each["error"] for each in told] == ["NoCluster"] * len(told)
    message = {each["asked"]: each["message"] for each in told}
    assert all(each["s"] < 4 for each in told)
    assert "looks like 'HOST:PORT'" in message["head"]
    assert "would start a new Ray" in message["local"]
    assert "Ray Client is not supported" in message["ray://head:10001"]
    assert "this is a dashboard" in message["http://127.0.0.1:8265"]
    assert "does not resolve" in message["no-such-host.invalid:6379"]
    assert "(RAY_ADDRESS)" in message["auto"]
    assert message["auto"] == message[None]


def test_the_cluster_of_this_machine_is_found(rays: dict[str, LocalRay], place: Place) -> None:
    """By the file of the last `ray start`; past a stale one; if it is the only one. Several: the user has to choose."""
    here, there = rays["open"].address, rays["closed"].address
    place.default.write_text("127.0.0.1:1")
    told = place.run(
        f"file = {str(place.default)!r}\n"
        f"pretend_to_find(); attempt()\n"
        f"pretend_to_find({here!r}, {there!r}); attempt()\n"
        f"pretend_to_find({here!r}); attempt('auto'); ray.shutdown()\n"
        f"os.remove(file); attempt(); ray.shutdown()\n"
        "pretend_to_find(); attempt()\n"
        f"open(file, 'w').write('what is this?'); attempt()\n"
        f"open(file, 'w').write({here.replace('127.0.0.1', 'LOCALHOST')!r})\n"
        f"pretend_to_find({there!r}, {here!r}); attempt()"
    )
    stale, several, past_stale, only, none, garbage, chosen = told
    assert stale["error"] == several["error"] == none["error"] == garbage["error"] == "NoCluster"
    assert str(place.default) in stale["message"]
    assert "out of date" in stale["message"]
    assert here in several["message"]
    assert there in several["message"]
    assert past_stale["at"] == only["at"] == chosen["at"] == here
    assert "no Ray runs on it" in none["message"]


def test_an_existing_connection_is_used(rays: dict[str, LocalRay], place: Place) -> None:
    here, there = rays["open"].address, rays["closed"].address
    port = here.partition(":")[2]
    told = place.run(
        "found = []\n"
        "threads = [threading.Thread(target=lambda: found.append(attach())) for _ in range(3)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]; tell(found=found)\n"
        f"for address in (None, 'auto', {here!r}, 'localhost:{port}', {there!r}): attempt(address)\n"
        "tell(works=actor_works(), namespace=ray.get_runtime_context().namespace)",
        RAY_ADDRESS=here,
    )
    assert told[0]["found"] == [here] * 3
    assert [each.get("at") for each in told[1:5]] == [here] * 4
    assert told[5]["error"] == "RequestError"
    assert f"attached to {here}" in told[5]["message"]
    assert told[6]["works"]
    assert told[6]["namespace"] != "rm"


def test_a_machine_without_a_node_of_the_cluster_is_told_to_submit(
    rays: dict[str, LocalRay], place: Place
) -> None:
    here = rays["open"].address
    elsewhere, forbidden = place.run(
        f"real = services.find_node_ids; services.find_node_ids = set; attempt({here!r}, timeout_s=1)\n"
        f"services.find_node_ids = real; os.access = lambda *_: False; attempt({here!r})"
    )
    assert elsewhere["error"] == forbidden["error"] == "NoCluster"
    assert elsewhere["s"] < 2
    assert "`ray job submit" in elsewhere["message"]
    assert "another user's" in forbidden["message"]


def test_what_ray_refuses_after_all_is_said(rays: dict[str, LocalRay], place: Place) -> None:
    here = rays["open"].address
    refused, after = place.run(
        "version = ray.__version__; ray.__version__ = '1.0.0'\n"
        f"attempt({here!r}); ray.__version__ = version; attempt({here!r})"
    )
    assert refused["error"] == "ClusterError"
    assert "ersion mismatch" in refused["message"]
    assert after["at"] == here


@pytest.mark.parametrize(("mode", "visited"), [(None, ("open", "closed", "open")), ("token", ("open",))])
def test_a_token_in_the_home_directory_does_for_either_cluster(
    rays: dict[str, LocalRay], place: Place, mode: str | None, visited: tuple[str, ...]
) -> None:
    """The mode follows the cluster, both ways, in one process: a leftover token does no harm, RAY_AUTH_MODE neither."""
    place.token.write_text(SECRETS[0] + "\n")
    place.token.chmod(0o644)
    told = place.run(
        f"for address in {[rays[which].address for which in visited]!r}:\n"
        "    attempt(address); tell(works=actor_works()); ray.shutdown()",
        **({"RAY_AUTH_MODE": mode} if mode else {}),
    )
    assert all(each["works"] for each in told[1::2])
    open_mode = "disabled" if mode else None
    assert [each["mode"] for each in told[::2]] == [open_mode, "token", "disabled"][: len(visited)]
    loose = place.warned.count(f"the token file {place.token} is open to others (mode 0644)")
    assert loose == visited.count("closed"), "said where a token is used, and nowhere else"


def test_a_closed_cluster_takes_its_token_from_where_ray_looks(
    rays: dict[str, LocalRay], place: Place, tmp_path: Path
) -> None:
    """RAY_AUTH_TOKEN before RAY_AUTH_TOKEN_PATH before ~/.ray/auth_token; otherwise the error says where it looked."""
    closed, file = rays["closed"].address, tmp_path / "elsewhere"
    file.write_text(SECRETS[0])
    told = place.run(
        f"home, file = {str(place.token)!r}, {str(file)!r}\n"
        "token = open(file).read()\n"
        "for text, variables in [\n"
        "    (None, {}),\n"
        "    ('0' * 64, {}),\n"
        "    ('two\\nlines of höchst private text', {}),\n"
        "    (token, {'RAY_AUTH_TOKEN': 'private', 'RAY_AUTH_TOKEN_PATH': file}),\n"
        "    (token, {'RAY_AUTH_TOKEN_PATH': '/nowhere/token'}),\n"
        "    (None, {'RAY_AUTH_MODE': 'token'}),\n"
        "    ('0' * 64, {'RAY_AUTH_TOKEN_PATH': file}),\n"
        "    ('0' * 64, {'RAY_AUTH_TOKEN': token, 'RAY_AUTH_TOKEN_PATH': '/nowhere/token'}),\n"
        "    (token, {}),\n"
        "]:\n"
        "    open(home, 'w').write(text) if text else os.path.exists(home) and os.remove(home)\n"
        "    for name in ('RAY_AUTH_TOKEN', 'RAY_AUTH_TOKEN_PATH', 'RAY_AUTH_MODE'): os.environ.pop(name, None)\n"
        "    os.environ.update(variables)\n"
        f"    attempt({closed!r}); ray.shutdown()"
    )
    refused, accepted = told[:6], told[6:]
    assert [each.get("at") for each in accepted] == [closed] * 3
    assert [each["error"] for each in refused] == ["AuthenticationFailed"] * 6
    places = ["~/.ray/auth_token"] * 3 + ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"]
    for each, where in zip(refused, places, strict=True):
        assert each["s"] < 2
        assert f"{where} has none" in each["message"]
        assert "`ray get-auth-token`" in each["message"]
        assert "Copy ~/.ray/auth_token from the head node" in each["message"]
        assert "private" not in each["message"]
    assert [each["mode"] for each in refused] == [None] * 5 + ["token"]
