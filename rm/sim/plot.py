"""A picture of replays over time: utilisation, jobs that wait, and who holds the GPUs. Needs the extra `sim`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rm.errors import InvalidSpec
from rm.sim.outcomes import Replay, Sample
from rm.sim.timeline import timeline_of

POINTS = 1_000
"""Points along the time axis: each shows the mean over its stretch, so that a long trace stays readable."""
MOST_QUEUES = 8
"""Queues with a colour of their own; the others are one."""


def check_plot(path: Path) -> Any:
    """Whether a picture could be written there, asked before the work is done. Raises InvalidSpec.

    Returns matplotlib's object interface, which needs no display.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidSpec(f"plot: {path} needs matplotlib: pip install 'ray-rm[sim]'", field="plot") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InvalidSpec(f"plot: {path}: its name must end in .{', .'.join(sorted(kinds))}", field="plot")
    if not path.parent.is_dir():
        raise InvalidSpec(f"plot: there is no directory {path.parent}", field="plot")
    return Figure


def plot_replays(path: Path, replays: Sequence[Replay]) -> None:
    """Write the picture: PNG, or what the name's ending says. Raises InvalidSpec where it can't be written."""
    figure_class = check_plot(path)
    figure = figure_class(figsize=(11, 4 + 2.2 * len(replays)), layout="constrained")
    axes = figure.subplots(2 + len(replays), 1, sharex=True)
    used, waiting = axes[0], axes[1]
    for replay, shares in zip(replays, axes[2:], strict=True):
        samples = timeline_of(replay)
        moments = _moments(samples)
        days = [(moment - moments[0]) / 86_400 for moment in moments[:-1]]
        total = _means(samples, moments, [sample.total_gpus for sample in samples])
        busy = _means(samples, moments, [sample.busy_gpus for sample in samples])
        used.plot(days, _parts(busy, total), label=replay.policy, linewidth=1)
        queue = _means(samples, moments, [float(sample.waiting) for sample in samples])
        waiting.plot(days, queue, label=replay.policy, linewidth=1)
        held = _held_by_queue(samples, _largest_queues(replay))
        layers = [_parts(_means(samples, moments, values), total) for values in held.values()]
        shares.stackplot(days, layers, labels=list(held))
        shares.set(ylabel=f"{replay.policy}:\nshare of GPUs", ylim=(0, 1))
        shares.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small")
    used.set(ylabel="GPUs held", ylim=(0, 1.05))
    waiting.set(ylabel="jobs waiting", ylim=(0, None))
    for each in (used, waiting):
        each.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes[-1].set_xlabel("days since the first submission")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InvalidSpec(f"plot: {path}: {error}", field="plot") from error


def _moments(samples: Sequence[Sample]) -> list[float]:
    """The borders of the stretches, from the first sample to the last."""
    start_s = samples[0].at_s
    span_s = max(1.0, samples[-1].at_s - start_s)
    return [start_s + span_s * step / POINTS for step in range(POINTS + 1)]


def _means(samples: Sequence[Sample], moments: list[float], values: list[float]) -> list[float]:
    """The mean of a step function over each stretch between two moments."""
    at = [sample.at_s for sample in samples]
    whole = [0.0]
    for place in range(1, len(at)):
        whole.append(whole[-1] + values[place - 1] * (at[place] - at[place - 1]))
    areas = []
    for moment in moments:
        place = max(0, bisect_right(at, moment) - 1)
        areas.append(whole[place] + values[place] * (moment - at[place]))
    return [
        (after - before) / (until - since)
        for (before, after), (since, until) in zip(pairwise(areas), pairwise(moments), strict=True)
    ]


def _parts(values: list[float], totals: list[float]) -> list[float]:
    return [value / total if total else 0.0 for value, total in zip(values, totals, strict=True)]


def _largest_queues(replay: Replay) -> list[str]:
    """The queues by the GPU-seconds of their jobs: the same order, and so the same colours, for every policy."""
    work: dict[str, float] = {}
    for each in replay.outcomes:
        work[each.job.queue] = work.get(each.job.queue, 0.0) + each.job.gpu_seconds
    return sorted(work, key=lambda name: (-work[name], name))


def _held_by_queue(samples: Sequence[Sample], queues: list[str]) -> dict[str, list[float]]:
    """GPUs held at each sample by the largest queues, and by all others together."""
    own = queues if len(queues) <= MOST_QUEUES else queues[: MOST_QUEUES - 1]
    held = {name or "no queue": [each.busy_by_queue.get(name, 0.0) for each in samples] for name in own}
    if len(own) < len(queues):
        rest = queues[len(own) :]
        held["others"] = [sum(each.busy_by_queue.get(name, 0.0) for name in rest) for each in samples]
    return held
