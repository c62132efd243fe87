"""The published rules, played second by second as they are written down: slow and obvious, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from rm.sim.trace import TraceJob


@dataclass(eq=False)
class Live:
    job: TraceJob
    remain: int
    attained: float = 0
    nodes: tuple[tuple[int, int], ...] = ()
    started: int = -1
    starts: tuple[int, ...] = ()
    end: int = -1


def place(free: list[int], gpus: int, per_node: int) -> tuple[tuple[int, int], ...] | None:
    if gpus <= per_node:
        fitting = [node for node, have in enumerate(free) if have >= gpus]
        return ((min(fitting, key=lambda node: free[node]), gpus),) if fitting else None
    order = sorted(range(len(free)), key=lambda node: -free[node])
    want = [per_node] * (gpus // per_node) + ([gpus % per_node] if gpus % per_node else [])
    if len(want) > len(order) or any(free[node] < part for node, part in zip(order, want, strict=False)):
        return None
    return tuple(zip(order, want, strict=False))


def play(
    policy: str, jobs: list[TraceJob], nodes: int, per_node: int
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Each job's starts and its end."""
    free = [per_node] * nodes
    waiting: list[Live] = []
    running: list[Live] = []
    ended: list[Live] = []
    now = 0
    preemptive = policy in {"srtf", "tiresias"}
    while len(ended) < len(jobs):
        for each in list(running):
            if each.remain == 0 if preemptive else now == each.started + each.remain:
                each.end = now
                running.remove(each)
                ended.append(each)
                for node, gpus in each.nodes:
                    free[node] += gpus
            elif preemptive:
                each.remain -= 1
                each.attained += each.job.num_gpus
        waiting += [Live(job, int(job.duration_s)) for job in jobs if job.submit_s == now]
        if preemptive:
            if policy == "srtf" or now % 60 == 0:
                _preempting(policy, now, waiting, running, free, per_node)
        else:
            waiting.sort(
                key=lambda live: live.job.submit_s if policy.startswith("fifo") else live.job.duration_s
            )
            for each in list(waiting):
                if _start(each, now, free, per_node):
                    waiting.remove(each)
                    running.append(each)
                elif not policy.endswith("skip"):
                    break
        now += 1
    return {each.job.job_id: (each.starts, each.end) for each in ended}


def _start(live: Live, now: int, free: list[int], per_node: int) -> bool:
    placed = place(free, int(live.job.num_gpus), per_node)
    if placed is None:
        return False
    live.nodes, live.started, live.starts = placed, now, (*live.starts, now)
    for node, gpus in placed:
        free[node] -= gpus
    return True


def _preempting(
    policy: str, now: int, waiting: list[Live], running: list[Live], free: list[int], per_node: int
) -> None:
    if policy == "srtf":
        order = sorted(waiting + running, key=lambda live: live.remain)
    else:
        order = sorted(running + waiting, key=lambda live: (live.attained > 18_000, live.job.submit_s))
    quota = len(free) * per_node
    preempt, chosen = [], []
    for each in order:
        if each.job.num_gpus <= quota:
            quota -= int(each.job.num_gpus)
            if each in waiting:
                chosen.append(each)
        elif each in running:
            preempt.append(each)
    for each in preempt:
        each.remain += 40 if each.job.num_gpus <= 8 else 60
        for node, gpus in each.nodes:
            free[node] += gpus
        running.remove(each)
        waiting.append(each)
    for each in chosen:
        if _start(each, now, free, per_node):
            waiting.remove(each)
            running.append(each)
