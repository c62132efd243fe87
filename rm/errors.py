"""Every error a caller can see.

Three families, so that a handler can tell whose move it is: the caller's (`RequestError`: mend the named
field), the world's (`ClusterError`: check the named thing) and ours (`InternalError`: report it). All of
them cross process boundaries: `__reduce__` rebuilds them from their own arguments, which plain exceptions
with keyword arguments don't survive.
"""

from __future__ import annotations

from typing import Any


class RmError(Exception):
    """Any error of this package. `message` says what is wrong and what to do about it."""

    def __init__(self, message: str, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.context = context

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.context)

    def __str__(self) -> str:
        return self.message


def _rebuild(kind: type[RmError], message: str, context: dict[str, Any]) -> RmError:
    return kind(message, **context)


# --- the caller's move -------------------------------------------------------------------------------------


class RequestError(RmError):
    """What was asked can't be done as asked. `context["field"]` names the field, where there is one."""

    @property
    def field(self) -> str | None:
        return self.context.get("field")


class InvalidSpec(RequestError):
    """A field of the request has a value that can't be meant."""


class Infeasible(RequestError):
    """No node type of this cluster could ever hold the request. The message names the nearest shapes that fit."""


class UnknownJob(RequestError):
    """No job with this id is in the ledger."""


class UnknownQueue(RequestError):
    """The named queue is not configured."""


class UnknownNode(RequestError):
    """No node of the cluster is called so, or several are."""


class NotAllowed(RequestError):
    """It is somebody else's, or for administrators. `context`: by, and for a job: job, owner."""


class PayloadTooLarge(RequestError):
    """A function and its arguments, or a result, exceed what travels by value."""


class NotPicklable(RequestError):
    """A function or its arguments can't be sent to another process."""


class JobFailed(RequestError):
    """`Job.result()` of a job that did not succeed. `context`: job, status, rank, exit_code, signal, tail."""


class JobNotFinished(RequestError):
    """A wait ran out of time before the job ended. The job goes on."""


class LeaseLost(RequestError):
    """The lease is over: ended, expired, or its holder was silent for too long."""


# --- the world's move --------------------------------------------------------------------------------------


class ClusterError(RmError):
    """Something outside this package is not as it must be."""


class NoCluster(ClusterError):
    """There is no Ray cluster at the address."""


class AuthenticationFailed(ClusterError):
    """The cluster wants a token that this process has not got."""


class AllocatorUnavailable(ClusterError):
    """The allocator did not answer in time, or is stopping."""


class NoAllocator(AllocatorUnavailable):
    """The cluster is there, and no allocator runs on it."""


class LedgerUnavailable(ClusterError):
    """The ledger can't be read or written. Nothing was acknowledged."""


class Busy(ClusterError):
    """A bound on what the allocator holds is reached. Try again later; nothing was accepted."""


# --- ours --------------------------------------------------------------------------------------------------


class InternalError(RmError):
    """A rule of our own was broken. Please report the message."""


class InvalidTransition(InternalError):
    """An event that the job's state does not allow. `context`: job, state, event, story."""
