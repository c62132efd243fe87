"""`rmctl submit` and `rmctl run`: a command becomes a job. The fields are those of `Client.submit`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from rm.cli.screen import note, show_json
from rm.cli.session import connect
from rm.errors import InvalidSpec, RmError

Said = str | None
Many = list[str] | None
plain = typer.Option
shape = functools.partial(typer.Option, rich_help_panel="What it needs")
manner = functools.partial(typer.Option, rich_help_panel="How it runs")
around = functools.partial(typer.Option, rich_help_panel="What it runs in")
Words = Annotated[
    list[str], typer.Argument(metavar="COMMAND", help="After --: the program and its arguments.")
]


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What makes a request, as options of both commands. Values stay text: `rm.spec` parses and checks them."""

    name: Annotated[Said, plain("--name", "-n", help="What `rmctl ls` calls it.")] = None
    num_gpus: Annotated[Said, shape("--num-gpus", "-g", metavar="N", help="GPUs in all; 0.5 shares one.")] = (
        None
    )
    nodes: Annotated[int | None, shape(metavar="N", help="Equal bundles; STRICT_SPREAD parts them.")] = None
    min_nodes: Annotated[
        int | None, shape(metavar="N", help="Start with as few where there is no room for --nodes.")
    ] = None
    gpus_per_node: Annotated[Said, shape(metavar="N", help="Instead of --num-gpus.")] = None
    gpu_type: Annotated[Said, shape(metavar="TYPE", help="A100, or A100,H100: any of them.")] = None
    cpus_per_gpu: Annotated[float | None, shape(metavar="N", help="CPUs reserved with each GPU.")] = None
    memory_per_gpu: Annotated[Said, shape(metavar="SIZE", help="16GiB, 512M.")] = None
    strategy: Annotated[Said, shape(metavar="WORD", help="PACK, STRICT_PACK, SPREAD, STRICT_SPREAD.")] = None
    label: Annotated[Many, shape(metavar="KEY=VALUE", help="Only nodes with this label. Repeatable.")] = None
    nproc_per_node: Annotated[
        Said, manner(metavar="N", help='Processes per node, as torchrun\'s; "gpu": one per GPU.')
    ] = None
    time_limit: Annotated[Said, manner(metavar="TIME", help="90s, 15m, 2h, 1:30:00.")] = None
    grace: Annotated[Said, manner(metavar="TIME", help="From SIGTERM to SIGKILL; 30s by default.")] = None
    priority: Annotated[Said, manner(metavar="P", help="A number, or low, normal, high.")] = None
    queue: Annotated[Said, manner(metavar="NAME", help="The queue to stand in.")] = None
    after: Annotated[Said, manner(metavar="ID,…", help="Start when these jobs have succeeded.")] = None
    array: Annotated[int | None, manner(metavar="N", help="N jobs; each has its RM_ARRAY_INDEX.")] = None
    hold: Annotated[bool, manner("--hold", help="Queue it, but wait for `rmctl release`.")] = False
    no_preempt: Annotated[bool, manner("--no-preempt", help="Never stop it for others.")] = False
    min_runtime: Annotated[
        Said, manner(metavar="TIME", help="Do not stop it for others before it has run so long.")
    ] = None
    max_retries: Annotated[int | None, manner(metavar="N", help="New tries after it failed.")] = None
    max_infra_retries: Annotated[
        int | None, manner(metavar="N", help="New tries after a node or runner was lost.")
    ] = None
    env: Annotated[
        Many, around("--env", "-e", metavar="KEY[=VALUE]", help="KEY alone: its value here. Repeatable.")
    ] = None
    working_dir: Annotated[Said, around(metavar="DIR", help="Send it along and start in it.")] = None
    pip: Annotated[Many, around(metavar="PACKAGE", help='"numpy<3", or a requirements.txt. Repeatable.')] = (
        None
    )

    def given(self) -> dict[str, Any]:
        """Keyword arguments for `Client.submit`: what was said, nothing else. Raises InvalidSpec."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("label", "env", "pip", "no_preempt"):
            said.pop(name)
        said["hold"] = self.hold or None
        said["preemptible"] = False if self.no_preempt else None
        for name in ("num_gpus", "gpus_per_node"):
            said[name] = _amount(name, said[name])
        if said["num_gpus"] is None and said["gpus_per_node"] is None:
            raise InvalidSpec(
                "num_gpus: say how many GPUs it needs with -g N (or --nodes N --gpus-per-node M)",
                field="num_gpus",
            )
        said["labels"] = dict(_pair("label", each) for each in self.label or ()) or None
        said["env"] = dict(_variable(each) for each in self.env or ()) or None
        said["runtime_env"] = {"pip": _packages(self.pip)} if self.pip else None
        return {name: value for name, value in said.items() if value is not None}


def _with_request(command: Callable[..., int]) -> Callable[..., int]:
    """`command(ctx, words, request, …)` with the request's fields as options of its own, the way Typer reads them."""
    hints = get_type_hints(RequestOptions, include_extras=True)
    own = inspect.signature(command, eval_str=True).parameters.values()
    options = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name]
        )
        for each in fields(RequestOptions)
    ]
    first = [each for each in own if each.name not in {"request", "as_json"}]
    last = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own if each.name == "as_json"]

    @functools.wraps(command)
    def with_options(*args: Any, **kwargs: Any) -> int:
        said = {each.name: kwargs.pop(each.name) for each in fields(RequestOptions)}
        return command(*args, request=RequestOptions(**said), **kwargs)

    parameters = [*first, *options, *last]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


@_with_request
def submit(
    ctx: typer.Context,
    words: Words,
    request: RequestOptions,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"id": …}.')] = False,
) -> int:
    """Hand in a command and return at once. Prints the job's id.

    One word is a shell command line: rmctl submit -g 1 "python a.py && python b.py"
    """
    options = request.given()
    job = connect(ctx, start=True).submit(_entry(words), **options)
    if as_json:
        show_json({"id": job.id})
        return 0
    print(job.id, flush=True)
    if sys.stderr.isatty():
        with contextlib.suppress(RmError):  # it is accepted, whatever becomes of the estimate
            if (why := job.why()).estimated:
                note(f"{job.id}: {why.start}")
        note(f"follow it with: rmctl logs -f {job.id}")
    return 0


@_with_request
def run(ctx: typer.Context, words: Words, request: RequestOptions) -> int:
    """Run a command on GPUs and stay with it: its output, its exit code.

    Ctrl-C cancels it. The job also ends when this process dies, so that nobody holds GPUs for a closed terminal.
    """
    options = request.given()
    if request.array is not None:
        raise InvalidSpec(
            "array: `rmctl run` stays with one job; hand an array in with `rmctl submit`", field="array"
        )
    job = connect(ctx, start=True).submit(_entry(words), attach=True, **options)
    from rm.attached import follow_to_exit

    return follow_to_exit(job)


def _entry(words: list[str]) -> str | list[str]:
    """One word is a shell command line, as in `Client.submit`; several are the program and its arguments."""
    return words[0] if len(words) == 1 else words


def _amount(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        raise InvalidSpec(f"{name}: must be a number of GPUs, not {text!r}", field=name) from None
    return int(number) if number.is_integer() else number


def _pair(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidSpec(f"{name}: must be KEY=VALUE, not {text!r}", field=name)
    return key, value


def _variable(text: str) -> tuple[str, str]:
    """KEY=VALUE, or KEY with the value that it has here."""
    key, equals, value = text.partition("=")
    if equals and not key:  # without a word of the value, which may be a secret
        raise InvalidSpec("env: must be KEY=VALUE, and nothing stands before the '='", field="env")
    if equals:
        return key, value
    if text not in os.environ:
        raise InvalidSpec(
            f"env: {text} is not set here; give it a value with --env {text}=VALUE", field="env"
        )
    return text, os.environ[text]


def _packages(given: list[str]) -> list[str]:
    """Requirement lines, those of a file read here: the file would not be there when the job starts."""
    lines: list[str] = []
    for each in given:
        path = Path(each)
        if path.suffix != ".txt" and not path.is_file():
            lines.append(each)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidSpec(f"pip: {each} can't be read: {error.strerror}", field="pip") from None
        lines += [
            line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")
        ]
    return lines
