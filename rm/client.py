"""The SDK: connect, submit, follow. A job here is like a future whose work outlives this process.

    import rm
    client = rm.connect()
    job = client.submit("python train.py", num_gpus=2)
    job.wait()

Nothing here decides or stores anything: every call is a request to the allocator, or a read of what it committed.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rm import context
from rm.core.model import Kind
from rm.errors import InvalidSpec, RequestError
from rm.heartbeat import Heartbeat
from rm.job import Job
from rm.lease import Lease
from rm.packing import pack_directory, pack_function, sha256
from rm.spec import (
    RESOURCE_FIELDS,
    Config,
    JobSpec,
    build_spec,
    default_owner,
    did_you_mean,
    parse_duration,
)
from rm.submission import Environment, submitter_environment
from rm.views import AuditView, EventView, JobView, NodeView, QueueView

ATTACHED_TTL_S = 10.0
"""How long it may be silent before its jobs are cancelled."""
LEASE_TTL_S = 15.0

Entry = Callable[..., Any] | str | Sequence[str]


def connect(
    address: str | None = None,
    *,
    config: Config | None = None,
    start: bool = True,
    any_version: bool = False,
) -> Client:
    """Connect to the allocator of the Ray cluster at `address`, starting it where none runs.

    `address`: "host:port" of the cluster's GCS; None means RAY_ADDRESS, else the cluster of this machine.
    `any_version`: also talk to an allocator of another version of this package, which is for stopping it.
    Raises NoCluster within 5 s where there is none, AuthenticationFailed where its token is missing.
    """
    from rm.runtime.connect import connect_actors

    return Client(connect_actors(address, config=config, start=start, any_version=any_version))


class Client:
    """A connection to one allocator. Make it with `rm.connect()`; use it from any thread."""

    def __init__(self, actors: Any) -> None:
        self._actors = actors
        self._heartbeat = Heartbeat(lambda ids, timeout_s: self._allocator("heard", ids, timeout_s=timeout_s))
        self.owner = default_owner()
        self.ledger_key: str = actors.hello["ledger_key"]

    # --- submitting --------------------------------------------------------------------------------------

    def submit(
        self,
        entry: Entry,
        *args: Any,
        kwargs: dict[str, Any] | None = None,
        attach: bool = False,
        **options: Any,
    ) -> Job:
        """Ask for GPUs and run `entry` on them: a Python function with arguments, or a command.

        Options: `num_gpus` (or `nodes` and `gpus_per_node`), `name`, `gpu_type`, `cpus_per_gpu`, `memory_per_gpu`,
        `labels`, `strategy`, `nproc_per_node` (a number or "gpu"), `time_limit` and `grace` (seconds, "90m", "2h"),
        `priority` (a number, or "low", "normal", "high"), `queue`, `max_retries`, `max_infra_retries`, `env`,
        `working_dir`, `runtime_env`; `min_nodes` (with `nodes`: starts with fewer where there is no room for all),
        `preemptible` and `min_runtime` (whether, and from when on, it may be stopped for others and queued again),
        `after` (jobs that must succeed first), `array` (so many jobs under one id), `hold` (queued until released).
        `attach=True`: the job is cancelled when this process goes away.
        Raises InvalidSpec, Infeasible, NotPicklable, PayloadTooLarge: nothing was accepted then.
        """
        return self._send([self._draft(entry, args, kwargs or {}, attach, options)], attach)[0]

    def submit_many(self, entries: Iterable[Any], *, attach: bool = False, **options: Any) -> list[Job]:
        """Submit many jobs in one durable step, all or none.

        Each entry is a command, a function, a tuple (function, *args), or a dict with "entry", optional "args" and
        "kwargs", and options that override the common `options`.
        """
        drafts = []
        for each in entries:
            entry, args, kwargs, own = _unfold(each)
            drafts.append(self._draft(entry, args, kwargs, attach, {**options, **own}))
        return self._send(drafts, attach)

    def lease(self, *, timeout: float | None = None, ttl: float = LEASE_TTL_S, **options: Any) -> Lease:
        """GPUs for your own Ray tasks and actors, held until the `with` block ends or this process dies.

        `timeout`: seconds to wait for the GPUs (None: as long as it takes). Options as for `submit`.
        """
        options.setdefault("name", "lease")
        environment = submitter_environment(options)
        spec = self._spec(Kind.LEASE, environment, options, ttl_s=ttl)
        (job,) = self._send([Draft(spec, {})], attach=True)
        assert spec.ttl_s is not None
        return Lease(self, job, timeout, spec.ttl_s)

    def _draft(
        self,
        entry: Entry,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        attach: bool,
        options: dict[str, Any],
    ) -> Draft:
        options = dict(options)
        environment = submitter_environment(options)
        blobs: dict[str, bytes] = {}
        fields: dict[str, Any] = {"ttl_s": ATTACHED_TTL_S} if attach else {}
        if callable(entry):
            payload = pack_function(entry, args, kwargs)
            blobs[sha256(payload)] = payload
            fields["payload_sha256"] = sha256(payload)
            kind = Kind.FUNCTION
            options.setdefault("name", getattr(entry, "__name__", "function"))
        else:
            if args or kwargs:
                raise InvalidSpec(
                    "args: a command takes no arguments of its own; put them into it", field="args"
                )
            fields["command"] = command = _words(entry)
            kind = Kind.COMMAND
            options.setdefault("name", _command_name(command))
        if environment.working_dir is not None:
            archive = environment.archive(pack_directory)
            blobs[sha256(archive)] = archive
            fields["working_dir_sha256"] = sha256(archive)
        return Draft(self._spec(kind, environment, options, **fields), blobs)

    def _spec(self, kind: Kind, environment: Environment, options: dict[str, Any], **fields: Any) -> JobSpec:
        for key in options:
            if key not in OPTIONS:
                raise InvalidSpec(f"{key}: unknown option; {did_you_mean(key, OPTIONS)}", field=key)
        fields |= {_FIELD_NAMES.get(key, key): value for key, value in options.items()}
        if "after" in fields:
            fields["after"] = _ids(fields["after"])
        return build_spec(
            **{"owner": self.owner, **fields},
            kind=kind,
            env=environment.env,
            runtime_env=environment.runtime_env,
            cwd=environment.cwd,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )

    def _send(self, drafts: list[Draft], attach: bool) -> list[Job]:
        from rm.ledger.codec import encode_spec  # slow to import; by now it is

        blobs: dict[str, bytes] = {}
        for draft in drafts:
            blobs |= draft.blobs
        if blobs:
            known = self._store("has_blobs", list(blobs))
            for digest, data in blobs.items():
                if digest not in known:
                    self._store("put_blob", data, timeout_s=300)
        # One key per job: if the answer is lost and the call made again, the ledger knows them.
        keys = [uuid.uuid4().hex for _ in drafts]
        texts = [encode_spec(draft.spec) for draft in drafts]
        life = self._actors.hello.get("life", "")
        ids = self._allocator("submit", (texts, keys, life), timeout_s=120)
        if attach:
            each = zip(ids, drafts, strict=True)
            self._heartbeat.add({job_id: draft.spec.ttl_s or ATTACHED_TTL_S for job_id, draft in each})
        # Who hands a job in as somebody (`owner=`) goes on as that one: a lease must be able to end itself.
        return [Job(self, job_id, by=draft.spec.owner) for job_id, draft in zip(ids, drafts, strict=True)]

    # --- looking -----------------------------------------------------------------------------------------

    def job(self, job_id: str | int) -> Job:
        """The job with this id ("j17", "17" or 17), or the array with this id. Raises UnknownJob."""
        text = str(job_id)
        job = Job(self, f"j{text}" if re.fullmatch(r"[0-9]+(_[0-9]+)?", text) else text)
        job.view()
        return job

    def jobs(
        self, *, all: bool = False, owner: str | None = None, name: str | None = None, limit: int = 100
    ) -> list[Job]:
        """Jobs, newest first: those that live, with `all=True` the ended ones too."""
        views: list[JobView] = self._allocator("jobs", live_only=not all, owner=owner, name=name, limit=limit)
        return JobList(Job(self, view.id, view) for view in views)

    def cancel_all(self, owner: str | None = None) -> int:
        """Ask every job of `owner` (None: your own) to end, as `Job.cancel` does. Returns how many there were.

        Raises NotAllowed for somebody else's where the rules name admins.
        """
        whose = self.owner if owner is None else owner
        count: int = self._allocator("cancel_all", whose, self.owner, timeout_s=600)
        return count

    def nodes(self, *, gone: bool = False, booting: bool = False) -> list[NodeView]:
        """The cluster's nodes: what is charged to jobs, held by other work, and free.

        `gone`: also nodes that left the cluster and are cordoned. Their `status` is "gone".
        `booting`: also nodes that an autoscaler has launched and that are not there yet. Their `status` is "booting".
        """
        return NodeList(self._allocator("nodes", gone=gone, booting=booting))

    def scale(self) -> dict[str, Any]:
        """What is asked of the Ray autoscaler: `types` by name, and `asks` with the jobs that they are for."""
        found: dict[str, Any] = self._allocator("scale")
        return found

    def cordon(self, *nodes: str, reason: str = "") -> list[NodeView]:
        """Place nothing new on these nodes; what runs there goes on. Raises UnknownNode.

        A node is named by its name, its id, or the beginning of its id.
        """
        return NodeList(self._allocator("cordon", list(nodes), self.owner, reason))

    def drain(self, *nodes: str, deadline: float | str | None = None, reason: str = "") -> list[NodeView]:
        """Cordon these nodes and empty them: `NodeView.status` turns from "draining" to "drained".

        `deadline`: after so long (seconds, "10m"; 0: at once) what still runs there is stopped with its grace and
        queued again with its age and its checkpoint, at no retry's cost. None: its end is waited for.
        Raises UnknownNode, InvalidSpec.
        """
        try:
            deadline_s = parse_duration(deadline)
        except ValueError as error:
            raise InvalidSpec(f"deadline: {error}", field="deadline") from None
        return NodeList(
            self._allocator("cordon", list(nodes), self.owner, reason, drain=True, deadline_s=deadline_s)
        )

    def uncordon(self, *nodes: str) -> list[NodeView]:
        """Place jobs on these nodes again; a node that is gone is forgotten. Raises UnknownNode."""
        return NodeList(self._allocator("uncordon", list(nodes), self.owner))

    def events(self, *, after: int = 0, limit: int = 1000) -> list[EventView]:
        """The history of the whole cluster from the ledger, oldest first."""
        events: list[EventView] = self._allocator("events", None, after, limit)
        return events

    def apply(self, text: str, *, dry_run: bool = False, force: bool = False) -> dict[str, Any]:
        """Put the rules of an rm.yaml in force: its queues, limits and policies.

        Returns `applied`, `warnings` and `consequences`: what it does, or with `dry_run` would do, to jobs that live.
        `force`: also where its `admins` leave you out, so that you could not change the rules again.
        Raises InvalidSpec with the path of each bad field; NotAllowed where the rules in force have other admins.
        """
        answer: dict[str, Any] = self._allocator("apply", text, self.owner, dry_run=dry_run, force=force)
        return answer

    def queues(self) -> list[QueueView]:
        """The tree of queues: what each owns, uses, borrows and lends."""
        queues: list[QueueView] = self._allocator("queues")
        return queues

    def audit(self, *, look: bool = True) -> AuditView:
        """Compare the ledger, Ray's tables and the GPUs' drivers now, and repair what differs.

        The allocator does so every 30 s by itself; `look=False` gives what it found last. Takes some milliseconds where
        all agree, seconds where a difference has to be seen twice. `findings` says what was done about each.
        """
        audit: AuditView = self._allocator("audit", look=look, timeout_s=180)
        return audit

    def policy(self) -> dict[str, Any]:
        """The rules in force: `policy`, the `text` of the rm.yaml that they came from, `by` whom, `at` what time."""
        answer: dict[str, Any] = self._allocator("policy")
        return answer

    def hello(self) -> dict[str, Any]:
        """Who answers: version, ledger, home, pid."""
        hello: dict[str, Any] = self._allocator("hello")
        return hello

    def stop_allocator(self, *, cancel_jobs: bool = False, keep_jobs: bool = False) -> None:
        """End the allocator. Refused while jobs live, unless they are to be cancelled, or kept for the next one.

        Raises NotAllowed where the rules in force have other admins.
        """
        from rm.runtime.connect import stop_actors

        self._allocator("shutdown", cancel=cancel_jobs, keep=keep_jobs, by=self.owner, timeout_s=600)
        self._heartbeat.stop()
        # What goes on running still prints: then the store stays for it.
        stop_actors(store_too=not keep_jobs)

    # --- calling -----------------------------------------------------------------------------------------

    def _allocator(self, method: str, *args: Any, timeout_s: float = 60.0, **kwargs: Any) -> Any:
        return self._actors.ask("allocator", method, *args, timeout_s=timeout_s, **kwargs)

    def _store(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        return self._actors.ask("store", method, *args, timeout_s=timeout_s)

    def __repr__(self) -> str:
        hello = self._actors.hello
        return f"<rm.Client of ledger {hello['ledger_key']} in {hello['home']}>"


class Draft:
    """One request on its way: the spec, and the blobs that it names."""

    __slots__ = ("blobs", "spec")

    def __init__(self, spec: JobSpec, blobs: dict[str, bytes]) -> None:
        self.spec = spec
        self.blobs = blobs


class JobList(list[Job]):
    """A list of jobs that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        from rm.notebook import jobs_table

        return jobs_table([job.last for job in self])


class NodeList(list[NodeView]):
    """A list of nodes that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        from rm.notebook import nodes_table

        return nodes_table(self)


def require_gpus(
    num_gpus: float, *, detach: bool = False, client: Client | None = None, **options: Any
) -> None:
    """Make this very script run on GPUs: call it first thing in main().

    Inside a job it returns at once. Outside it submits the script with its arguments as a job
    (`nproc_per_node="gpu"` unless said otherwise), streams the logs and exits with the job's exit code. With
    `detach` it prints the job's id and exits; without, the job is cancelled if this process dies.
    Raises RequestError where there is no script: in a notebook, at a prompt, in `python -c`.
    """
    if context.in_job():
        return
    from rm.attached import follow_to_exit

    command = _this_program()
    client = client or connect()
    options.setdefault("nproc_per_node", "gpu" if num_gpus >= 1 else 1)
    options.setdefault("name", command[2] if command[1] == "-m" else Path(command[1]).name)
    job = client.submit(command, num_gpus=num_gpus, attach=not detach, **options)
    if detach:
        print(f"{job.id} submitted; follow it with: rmctl logs -f {job.id}")
        raise SystemExit(0)
    raise SystemExit(follow_to_exit(job))


def _this_program() -> list[str]:
    """The command line that runs this program again: a script, or a module where it came by `python -m`."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    # "python", not our own path: on its node the runner's environment stands first on PATH.
    if spec is not None and spec.name != "__main__":  # that would be a directory or a zip file: argv names it
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if not Path(getattr(main, "__file__", None) or "<stdin>").exists():
        raise RequestError(
            "require_gpus: it starts the script that calls it once more, and a notebook, a prompt or `python -c` is "
            "no script; use client.submit(function, num_gpus=N) or client.lease(num_gpus=N) there"
        )
    return ["python", *sys.argv]


_FIELD_NAMES = {"time_limit": "time_limit_s", "grace": "grace_s", "min_runtime": "min_runtime_s"}
OPTIONS = RESOURCE_FIELDS | {
    "name", "owner", "queue", "priority", "nproc_per_node", "time_limit", "grace", "max_retries",
    "max_infra_retries", "env", "working_dir", "runtime_env", "preemptible", "min_runtime", "after", "array", "hold",
}  # fmt: skip
"""What `submit` and `lease` take as keywords."""


def _ids(after: Any) -> Any:
    """What `after` names, with handles of jobs turned into ids; `rm.spec` checks the rest."""
    if isinstance(after, Job):
        return after.id
    if isinstance(after, Iterable) and not isinstance(after, str):
        return tuple(each.id if isinstance(each, Job) else each for each in after)
    return after


def _words(entry: Any) -> tuple[str, ...]:
    """A command as words. A string is a shell command line, with all that a shell offers."""
    if isinstance(entry, str):
        if not entry.strip():
            raise InvalidSpec("command: it is empty; say what to run", field="command")
        return ("bash", "-c", entry)
    if isinstance(entry, Sequence) and entry and all(isinstance(word, str | os.PathLike) for word in entry):
        return tuple(os.fspath(word) for word in entry)
    raise InvalidSpec(
        f"command: must be a function, a string or a list of words, not {type(entry).__name__}",
        field="command",
    )


def _command_name(command: tuple[str, ...]) -> str:
    """What people call it: the script, or the program."""
    words = [word for word in command if not word.startswith("-")]
    if command[:2] == ("bash", "-c"):
        words = command[2].split() or ["bash"]
    script = next(
        (word for word in words if word.endswith((".py", ".sh"))), words[0] if words else command[0]
    )
    return os.path.basename(script)[:80]  # noqa: PTH119


def _unfold(each: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    if isinstance(each, dict):
        own = dict(each)
        if "entry" not in own:
            raise InvalidSpec('entries: each dict needs an "entry": a function or a command', field="entries")
        return own.pop("entry"), tuple(own.pop("args", ())), own.pop("kwargs", {}), own
    if isinstance(each, tuple) and each and callable(each[0]):
        return each[0], each[1:], {}, {}
    return each, (), {}, {}
