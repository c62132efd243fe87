"""Scheduling policies on a virtual clock, over traces of real clusters.

    trace.py       what was submitted: one TraceJob per row of a CSV; `converters` makes it from public formats
    cluster.py     what it is replayed on: pools of equal nodes
    policy.py      the seam: a Policy takes jobs and a cluster and returns a Replay
    outcomes.py    what became of each job: the runs that it had
    published.py   policies under the rules of published simulators, to compare with and to check against
    timeline.py    busy GPUs and waiting jobs over time, out of the runs; plot.py draws it
    report.py      the figures of one replay; fairness.py has the equal share that they are measured against

A replay has no randomness and no clock: the same trace, cluster and policy give the same figures.
"""
