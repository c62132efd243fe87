"""A PostgreSQL server of the tests' own: on a Unix socket in a temporary directory, gone when the tests are."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import psutil

START_LIMIT_S = 60.0
PR_SET_PDEATHSIG = 1


def find_binaries() -> Path | None:
    """The directory with `initdb` and `postgres`, or None where no server is installed."""
    found = shutil.which("initdb")
    candidates = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)
    for each in [found, *candidates]:
        if each is not None and Path(each).resolve().with_name("postgres").exists():
            return Path(each).resolve().parent
    return None


class Server:
    """One server. fsync is off: these tests kill processes, never the machine."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        # Not under pytest's directory, which only root may enter: the server refuses to run as root.
        self.directory = Path(tempfile.mkdtemp(prefix="rm-pg-", dir="/tmp"))
        self.user = _unprivileged_user()
        self.data = self.directory / "data"
        self.main = ""
        self.process: subprocess.Popen[bytes] | None = None
        if self.user is not None:
            shutil.chown(self.directory, self.user)
        words = ["--auth=trust", "--username=rm", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run([str(binaries / "initdb"), "-D", str(self.data), *words])

    def start(self) -> None:
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.directory),
            "fsync": "off",
            "max_connections": "40",
            "shared_buffers": "16MB",
            "autovacuum": "off",
            "log_min_messages": "panic",
        }
        words = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        log = (self.directory / "server.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [str(self.binaries / "postgres"), "-D", str(self.data), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.user,
                extra_groups=[] if self.user else None,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops the server in order
                preexec_fn=_die_with_parent,
            )
        give_up = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"postgres did not start: {(self.directory / 'server.log').read_text()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to the server and to each of its backends: a crash in the middle of whatever it was doing."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        children = parent.children()
        self.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(children, timeout=10)
        self.process = None

    def stop(self) -> None:
        """At once and for good, directory included."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.kill()
        self.process = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement through psql, which shares no code with the ledger. Returns what it printed."""
        words = ["-h", str(self.directory), "-U", "rm", "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1"]
        return self._run([str(self.binaries / "psql"), *words, "-c", statement]).strip()

    def database(self, encoding: str = "UTF8") -> str:
        """The name of a new empty database."""
        name = f"t{secrets.token_hex(6)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}'")
        return name

    def url(self, database: str, schema: str | None = None) -> str:
        options = f"&options={quote(f'-csearch_path={schema}')}" if schema else ""
        return f"postgresql://rm@/{database}?host={self.directory}{options}"

    def _answers(self) -> bool:
        words = [str(self.binaries / "pg_isready"), "-q", "-h", str(self.directory)]
        return subprocess.run(words, check=False).returncode == 0

    def _run(self, words: list[str]) -> str:
        done = subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            user=self.user,
            extra_groups=[] if self.user else None,
            cwd=self.directory,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{words[0]}: {done.stdout}{done.stderr}")
        return done.stdout


def _unprivileged_user() -> str | None:
    """Whom the server runs as: ourselves, or somebody harmless where we are root."""
    if os.geteuid() != 0:
        return None
    known = {each.pw_name for each in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Even a killed pytest leaves no server behind."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
