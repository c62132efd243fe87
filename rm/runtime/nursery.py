"""The runner's side of the nursery: a process that forks keepers, so that no attempt waits for a Python to start.

`rm.runtime.keeper` is the other side. One per runner; it starts with it, and ends with it. Where it was killed, the
next attempt starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rm.runtime import keeper

KEEPER = Path(keeper.__file__)
LINE_LIMIT_BYTES = 1 << 20
LEAVE = b'{"do": "leave"}\n'


class Talk:
    """The two ends of a talk with a keeper: about one attempt, or about one after the other."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transport: asyncio.WriteTransport
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._transport = transport
        self._first = b""
        self._begun = False

    async def ready(self) -> None:
        """Wait for its first words, which say that it listens."""
        self._first = await self._reader.readline()

    @property
    def waits(self) -> bool:
        """Of one that was `ready`, or has ended an attempt: whether it still listens."""
        return bool(self._first) and not self._reader.at_eof()

    async def line(self) -> bytes:
        """What it says next, for each attempt its first words first. Empty when neither keeper nor guard lives."""
        if not self._first:
            self._first = await self._reader.readline()
        if self._begun:
            return await self._reader.readline()
        self._begun = True
        return self._first

    def begin_anew(self) -> None:
        """The attempt is over, and the keeper waits for the next one."""
        self._begun = False

    def tell(self, line: bytes) -> None:
        """Nothing happens where it listens no more."""
        if not self._transport.is_closing():
            self._transport.write(line)

    def close(self) -> None:
        """Neither hear nor tell any more. While it lives it kills all, and ends."""
        self.tell(LEAVE)  # else it would take this for our death, and remove what is ours
        self._transport.close()
        self._writer.close()


class Nursery:
    """One process, and the socket on which it is asked. Used by one thread."""

    def __init__(
        self, command: Sequence[str] = (), env: dict[str, str] | None = None, *, minds: Sequence[str] = ()
    ) -> None:
        """`command`: what to start instead of a bare nursery; `env`: its environment, ours where there is none.

        `minds`: directories that are to go where this process dies.
        """
        self._mind = json.dumps({"do": "mind", "directories": list(minds)}).encode() + b"\n"
        self._command = tuple(command)
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._spare: Talk | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process, unless it runs. Raises OSError where this machine can't start one more."""
        if self.alive:
            return
        self.close()
        self._closed = False
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = self._command or (sys.executable, "-I", "-S", str(KEEPER), "--nursery")
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=self._env
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self, most_bytes: int) -> bytes:
        """What it has said unasked, if it has: a message, or nothing."""
        if self._requests is None:
            return b""
        try:
            return self._requests.recv(most_bytes, socket.MSG_DONTWAIT)
        except OSError:
            return b""

    async def keeper(self, attempt: str) -> Talk:
        """A guard and a keeper for the attempt: those that wait, if there are any. Raises OSError."""
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare.waits:
                return spare
            spare.close()
        return await self._new(attempt)

    def take_back(self, talk: Talk) -> bool:
        """A keeper has ended its attempt and waits for the next one: whether it is wanted."""
        if self._spare is not None or not self.alive:
            return False
        talk.begin_anew()
        self._spare = talk
        return True

    def prepare(self) -> None:
        """Have a keeper ready for the attempt to come: it takes milliseconds to make, and now nobody waits for it."""
        if self._spare is None and (self._preparing is None or self._preparing.done()):
            self._preparing = asyncio.create_task(self._prepare(), name="prepare a keeper")

    async def _prepare(self) -> None:
        if self._closed:
            return  # nobody would ever end what is started now
        with contextlib.suppress(OSError):  # the attempt to come will try again, and say so
            spare = await self._new(keeper.IDLE_NAME.decode())
            await spare.ready()
            if self._spare is None and self.alive:
                self._spare = spare
            else:
                spare.close()

    async def _new(self, attempt: str) -> Talk:
        # Not one socket for both ways: an answer must still be read when the other side no longer listens.
        hears, says = socket.socketpair()
        told, tells = socket.socketpair()
        with told, says:
            try:
                try:
                    self._hand_in(attempt, told, says)
                except (BrokenPipeError, ConnectionResetError):
                    self._hand_in(attempt, told, says)  # it was killed since it was last looked at
            except BaseException:
                hears.close()
                tells.close()
                raise
        opening = asyncio.create_task(_open(hears, tells))
        try:
            talk = await asyncio.shield(opening)
        except asyncio.CancelledError:
            (await opening).close()
            raise
        talk.tell(self._mind)
        return talk

    def _hand_in(self, attempt: str, told: socket.socket, says: socket.socket) -> None:
        self.start()
        assert self._requests is not None
        socket.send_fds(self._requests, [attempt.encode()], [told.fileno(), says.fileno()])

    def close(self) -> None:
        """End it. Attempts under way go on: they are not its."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        if self._requests is not None:
            self._requests.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._requests = self._process = None
        self._closed = True


async def _open(hears: socket.socket, tells: socket.socket) -> Talk:
    reader, writer = await asyncio.open_unix_connection(sock=hears, limit=LINE_LIMIT_BYTES)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_unix_connection(asyncio.Protocol, sock=tells)
    return Talk(reader, writer, transport)
