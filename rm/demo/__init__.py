"""`rmctl demo`: the main job end to end, for a person watching.

Request → check availability → allocate → run → release → the next request allocated, on a Ray of its own: two trainings
that each need all GPUs, so that the second must wait for the first. What is told at the end is read back from the
ledger, not remembered.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from rm.demo.sandbox import local_ray, private_directory, training, training_scripts
from rm.demo.stage import Stage
from rm.demo.steps import NAMES, Story, steps, steps_table
from rm.plain import plain

if TYPE_CHECKING:
    from rm.client import Client
    from rm.job import Job

LOOK_S = 0.15
TIME_LIMIT_S = 300
MEASURED = re.compile(r"^(test accuracy|final loss) ([0-9.]+)", re.MULTILINE)


def demo(num_gpus: int | None, file: IO[str]) -> Story:
    """Run it and tell it on `file`. Raises RmError where it can't be run. Nothing is left behind either way."""
    began = time.monotonic()
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with Stage(file) as stage, private_directory() as directory:
            stage.wait_for("starting a Ray of its own, and the allocator")
            with local_ray(directory, num_gpus) as ray:
                stage.say(f"GPUs: {ray.describe_gpus()}.")
                story = _play(stage, _client(ray.address, directory), ray.num_gpus)
            stage.wait_for("ending Ray")
        story.took_s = time.monotonic() - began
        _tell(stage, story)
        return story
    except KeyboardInterrupt:
        print("Interrupted. The demo's Ray has ended, and nothing of it is left.", file=file)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _client(address: str, directory: Path) -> Client:
    from rm.client import connect
    from rm.spec import Config

    # Said in full: RM_* variables of the environment are for the person's own allocator.
    client = connect(address, config=Config(home=directory / "home", ledger_url="", checkpoint_root=""))
    signal.signal(signal.SIGTERM, _as_interrupt)  # again: Ray has put its own in place
    return client


def _play(stage: Stage, client: Client, gpus: int) -> Story:
    """Submit both jobs, watch them to their ends, and read back what happened."""
    command, processes, trained = training(gpus)
    stage.say(f"Two jobs, each needs {'the GPU' if gpus == 1 else f'all {gpus} GPUs'}. They train {trained}.")
    stage.say("")
    jobs: list[Job] = []
    for name in NAMES:
        job = client.submit(
            [*command, "--seed", str(len(jobs))],
            name=name,
            num_gpus=gpus,
            nproc_per_node=processes,
            working_dir=training_scripts(),
            time_limit=TIME_LIMIT_S,
            max_infra_retries=0,
        )
        stage.names[job.id] = name
        jobs.append(job)
    _watch(stage, client, jobs)
    nodes, named = client.nodes(), dict(zip(NAMES, jobs, strict=True))
    return Story(
        gpus=gpus,
        trained=trained,
        names=stage.names,
        steps=steps(client.events()),
        statuses={name: job.last.status for name, job in named.items()},
        measured={name: _measured(job) for name, job in named.items()},
        failures={name: _failure(job) for name, job in named.items() if job.last.status != "SUCCEEDED"},
        free_gpus=sum(node.free_gpus for node in nodes),
        charged_gpus=sum(node.charged_gpus for node in nodes),
    )


def _watch(stage: Stage, client: Client, jobs: list[Job]) -> None:
    """Show what happens until every job has ended, and all of it is in the ledger."""
    seen = 0
    while True:
        views = [job.view() for job in jobs]
        news = client.events(after=seen)
        seen = news[-1].seq if news else seen
        stage.happened(news)
        stage.update(views, client.nodes())
        if all(view.ended for view in views) and not news:
            return
        time.sleep(LOOK_S)


def _measured(job: Job) -> dict[str, float]:
    """What the training found in the end, from its own last lines."""
    return {
        name.replace(" ", "_"): float(value)
        for name, value in MEASURED.findall(job.logs(rank=0, stream="out"))
    }


def _failure(job: Job) -> str:
    outcome = job.last.outcome or {}
    return "\n".join(
        [f"{job.id} {job.last.status}: {outcome.get('message', '')}", *(outcome.get("tail") or ())]
    )


def _tell(stage: Stage, story: Story) -> None:
    """The end: every step as the ledger has it, what was learnt, and that nothing is held any more."""
    stage.clear()
    stage.say("")
    stage.say("What happened, read back from the ledger (GPUs of the cluster before → after each step):")
    stage.say("")
    stage.say(steps_table(story.steps, story.names))
    stage.say("")
    for name, values in story.measured.items():
        told = ", ".join(f"{what.replace('_', ' ')} {value:g}" for what, value in values.items())
        stage.say(f"{name}: {story.statuses[name]}{', ' if told else ''}{told}")
    for failure in story.failures.values():
        stage.say(plain(failure))
    free = f"{story.free_gpus:g} of {story.gpus:g} GPUs are free and {story.charged_gpus:g} allocated"
    stage.say(f"{'' if story.succeeded else 'This is not as it should be. '}At the end {free}.")
    stage.say(f"It took {story.took_s:.1f} s. Its Ray has ended, and nothing of it is left.")


def _as_interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
