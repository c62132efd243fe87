"""The cluster and the resource manager itself: nodes, start, stop, demo, version."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rm import tables
from rm.cli.screen import note, show, show_json
from rm.cli.session import AsJson, connect, settings
from rm.errors import InvalidSpec, LedgerUnavailable, NoAllocator

if TYPE_CHECKING:
    from rm.runtime.local import LocalRay

DASHBOARD_PORT = 8265
"""Where people look for Ray's dashboard; another port is taken where this one is in use."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})


def nodes(ctx: typer.Context, as_json: AsJson = False) -> int:
    """Each node's GPUs: held by jobs of rm, by other work, free.

    Then nodes that boot, with the jobs that wait for them; last, cordoned nodes that are gone.
    """
    views = connect(ctx).nodes(gone=True, booting=True)
    if as_json:
        show_json([view.to_dict() for view in views])
    elif views:
        ascii_only = not tables.console().encoding.startswith("utf")
        show(tables.nodes_table(views, ascii_only))
    else:
        note("the cluster has no nodes")
    return 0


def scale(ctx: typer.Context, as_json: AsJson = False) -> int:
    """What the Ray autoscaler is asked for, for whom, what it launches, and what it could not."""
    found = connect(ctx).scale()
    if as_json:
        show_json(found)
    elif found["types"]:
        show(tables.scale_table(found))
        if found["price"] or found["price_wanted"]:
            show(
                f"{found['price']:g} an hour for what is up, {found['price_wanted']:g} for what is wanted besides"
            )
    else:
        note("no autoscaler is known: RM_AUTOSCALING_CONFIG names the file with its node types")
    return 0


def audit(
    ctx: typer.Context,
    last: Annotated[
        bool,
        typer.Option(
            "--last", help="Don't look now: what was found lately, by the allocator's own audits too."
        ),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Compare the ledger, Ray's tables and the GPUs' drivers, and repair what differs.

    The allocator does so by itself every 30 s. Exit code 1 where something was found and could not be repaired.
    """
    report = connect(ctx).audit(look=not last)
    findings = report.recent if last else report.findings
    if as_json:
        show_json(report.to_dict())
    else:
        if findings:
            show(tables.findings_table(findings))
        if last:
            note(f"the last audit was {tables.span(time.time() - report.at)} ago: {tables.audited(report)}")
        elif not findings:
            show(tables.audited(report))
        for each in report.not_checked:
            note(each)
    return 0 if report.clean else 1


# --- start ---------------------------------------------------------------------------------------------------


def start(
    ctx: typer.Context,
    local: Annotated[bool, typer.Option("--local", help="Start a Ray on this machine first.")] = False,
    num_gpus: Annotated[
        int | None, typer.Option("--num-gpus", "-g", min=0, metavar="N", help="With --local: GPUs to offer.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Find the allocator, or start it; with --local a Ray cluster too.

    With --local, Ray runs on this machine alone, reachable from this machine alone, until `rmctl stop`. It offers
    the machine's GPUs; where there are none, logical ones that are only counted.
    """
    if num_gpus is not None and not local:
        raise InvalidSpec(
            "num_gpus: only with --local; a running cluster has the GPUs that it has", field="num_gpus"
        )
    if local and ctx.obj:
        raise InvalidSpec(
            "address: names a cluster that runs; --local starts one. Give one of them", field="address"
        )
    ray = _local_ray(num_gpus) if local else None
    client = connect(ctx, start=True, address=ray.address if ray else None)
    hello, found = client.hello(), client.nodes()
    facts = {
        "allocator": f"ray-rm {hello['version']}, pid {hello['pid']}, {hello['live_jobs']} live jobs",
        "home": hello["home"],
        "ledger": hello["ledger_url"],
        "GPUs": f"{sum(node.free_gpus for node in found):g} of {sum(node.gpus for node in found):g} free",
    }
    if ray:
        facts |= {"Ray": ray.address, "dashboard": ray.dashboard_url, "its GPUs": ray.describe_gpus()}
    exports = _exports(ray) if ray else {}
    if as_json:
        show_json({**hello, "address": ray.address if ray else None, "exports": exports})
        return 0
    show(tables.facts_table(facts.items()), "")
    if exports:
        show(
            "In every shell that is to use it:",
            *(f"  export {name}={value}" for name, value in exports.items()),
            "",
        )
    show("Next:", "  rmctl run -g 1 -- python train.py", "  rmctl ls", *(["  rmctl stop"] if ray else []))
    return 0


def _local_ray(num_gpus: int | None) -> LocalRay:
    """The Ray that an earlier `start --local` left running, else a new one."""
    from rm.runtime.local import LocalRay

    home = settings().home
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    running = LocalRay.find(home)
    if running is None:
        note("starting Ray on this machine …")
        return LocalRay.start(num_gpus, fate_share=False, home=home, dashboard_port=DASHBOARD_PORT)
    if num_gpus not in (None, running.num_gpus):
        raise InvalidSpec(
            f"num_gpus: the local Ray runs already, with {running.num_gpus} GPUs; `rmctl stop` ends it",
            field="num_gpus",
        )
    return running


def _exports(ray: LocalRay) -> dict[str, str]:
    """What another shell needs to find it: for drivers, for `ray job submit`, and the token mode where it is on."""
    exports = {"RAY_ADDRESS": ray.ray_address}
    if ray.dashboard_url:
        exports["RAY_API_SERVER_ADDRESS"] = ray.dashboard_url
    if os.environ.get("RAY_AUTH_MODE") == "token":
        exports["RAY_AUTH_MODE"] = "token"
    return exports


# --- stop ----------------------------------------------------------------------------------------------------


def stop(
    ctx: typer.Context,
    cancel_jobs: Annotated[bool, typer.Option("--cancel-jobs", help="End live jobs first.")] = False,
    keep_jobs: Annotated[
        bool, typer.Option("--keep-jobs", help="Leave them running; the next allocator takes them over.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """End the allocator, and the Ray that `start --local` began.

    Refused while jobs live, unless you say what is to become of them. Any other Ray is left alone.
    """
    if cancel_jobs and keep_jobs:
        raise InvalidSpec("keep_jobs: either --cancel-jobs or --keep-jobs", field="keep_jobs")
    from rm.runtime.local import LocalRay

    ray = LocalRay.find(settings().home)
    address = ctx.obj or os.environ.get("RAY_ADDRESS") or (ray.address if ray else None)
    if ray and not _names(str(address), ray):
        ray = None  # another cluster is meant
    stopped: dict[str, Any] = {"allocator": "stopped", "ray": "left running"}
    try:
        client = connect(ctx, address=address, any_version=True)
    except NoAllocator as error:
        if ray is None:
            raise
        stopped["allocator"] = f"not running ({error.message})"
    except LedgerUnavailable:
        if not keep_jobs:
            raise  # nobody knows which jobs live
        from rm.runtime.connect import stop_actors

        stop_actors(store_too=False)
        stopped["allocator"] = "stopped; it had not been able to open its ledger"
    else:
        stopped["home"] = client.hello()["home"]
        client.stop_allocator(cancel_jobs=cancel_jobs, keep_jobs=keep_jobs)
    if ray and not keep_jobs:
        ray.stop()
        stopped["ray"] = "ended"
    if as_json:
        show_json(stopped)
    else:
        show(tables.facts_table(stopped.items()))
    if ray and keep_jobs:
        note(f"Ray stays up at {ray.address} for the jobs; `rmctl start` takes them over again")
    return 0


def _names(address: str, ray: LocalRay) -> bool:
    """Whether `address` means this local Ray, in any of the ways to write loopback."""
    host, _, port = address.rpartition(":")
    return host.lower() in LOOPBACK and port == ray.address.rpartition(":")[2]


# --- the rest ------------------------------------------------------------------------------------------------


def demo(
    num_gpus: Annotated[
        int | None,
        typer.Option("--num-gpus", "-g", min=1, metavar="N", help="Else the machine's, or 2 logical ones."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The steps on stdout, what happens on stderr.")
    ] = False,
) -> int:
    """Watch the whole of it: two trainings that need the same GPUs.

    On a Ray of its own that ends with it, so nothing that runs already is touched. Half a minute.
    """
    from rm.demo import demo

    story = demo(num_gpus, sys.stderr if as_json else sys.stdout)
    if as_json:
        show_json(story.to_dict())
    return 0 if story.succeeded else 1


def version(as_json: AsJson = False) -> int:
    """Versions of rm, Ray and Python."""
    from importlib.metadata import PackageNotFoundError, version

    import rm

    try:
        ray = version("ray")
    except PackageNotFoundError:
        ray = "not installed"
    versions = {"ray-rm": rm.__version__, "ray": ray, "python": ".".join(map(str, sys.version_info[:3]))}
    if as_json:
        show_json(versions)
    else:
        show(", ".join(f"{name} {number}" for name, number in versions.items()))
    return 0
