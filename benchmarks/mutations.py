"""Breaks each rule of the scheduler by hand, one at a time, and demands that a test notices.

    python benchmarks/mutations.py [WORD ...]      # only the mutations whose rule or file has one of the words

Each mutation is applied to a copy of the package that the tests then import. It is killed by tests/scenarios, by
tests/core, or at the latest by a short run of tests/properties. Exit status 1 where one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
TESTS = (("tests/scenarios",), ("tests/core",), ("tests/properties",))
"""The quick ones first: the next are run only where the mutation survives."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old` stands in `file` exactly once; `new` takes its place."""

    rule: str
    file: str
    old: str
    new: str


M = Mutation
MUTATIONS = (
    # --- request ---
    M("a share needs one device", "resources", "return any(free >= units for free in self.free)",
      "return sum(self.free) >= units"),
    M("a share goes to the fullest device", "resources", "slots = (min((i for", "slots = (max((i for"),
    M("strangers' GPUs are not ours", "capacity",
      "return node.devices.without_foreign(node.foreign_units) if node.foreign_units else node.devices",
      "return node.devices"),
    M("one bundle where it fits", "shapes", "if units <= largest or largest == 0:", "if units < GPU_UNIT:"),
    M("fewest equal bundles", "shapes", "for count in cuts:", "for count in reversed(cuts):"),
    M("nearest counts that work", "shapes", "for each in (gpus - step, gpus + step)", "for each in (gpus + step,)"),
    M("never more than there is", "shapes", "if not feasible(gang, fitting):", "if False:"),
    M("GPU types in order", "options", "for name in gang.gpu_types", "for name in reversed(gang.gpu_types)"),
    M("a gang has one GPU type", "options",
      "tuple(each for each in classes if each.key.gpu_type == name)", "tuple(classes)"),
    M("a gang is feasible on one type", "placement", "if not gang.gpu_types:\n        return place(least",
      "if True:\n        return place(least"),
    M("a queue's labels", "options", "gang.on(state.policy.queues[queue].labels)", "gang"),
    M("STRICT_PACK: one node", "placement", "if strict and fits < missing:", "if False:"),
    M("STRICT_SPREAD: different nodes", "placement",
      "if gang.strategy is Strategy.STRICT_SPREAD and len(nodes) < gang.count:", "if False:"),
    M("SPREAD: different nodes", "placement", "if gang.strategy in (Strategy.PACK, Strategy.STRICT_PACK):",
      "if gang.strategy is not Strategy.STRICT_SPREAD:"),
    M("CPUs beside the GPUs", "capacity", "fits = min(fits, cpu_milli // bundle.cpu_milli)", "pass"),
    M("memory beside the GPUs", "capacity", "fits = min(fits, memory_bytes // bundle.memory_bytes)", "pass"),
    # --- placement ---
    M("best fit", "placement", "enough = range(min(most + 1, missing * gpus), most + 1)",
      "enough = range(most, min(most, missing * gpus - 1), -1)"),
    M("best fit: few nodes", "placement", "fewer = range(min(most, missing * gpus - 1), gpus - 1, -1)",
      "fewer = range(gpus, min(most, missing * gpus - 1) + 1)"),
    M("elastic: more than the minimum", "placement", "low, best = middle + 1, places",
      "return place(gang.sized(gang.minimum), capacity, classes)"),
    M("elastic: starts below its count", "placement", "if places is not None or gang.minimum == gang.count:",
      "if True:"),
    # --- quota ---
    M("borrow limit", "quota", "above = min(above, lent_free + self.borrow)", "pass"),
    M("lend limit", "quota", "tally.local = max(0, tally.quota - lend)", "pass"),
    M("what no queue owns is the root's", "quota", "root.quota = max(lent, self._capacity.get(kind, 0) - kept)",
      "root.quota = lent"),
    M("the root's limit", "quota", "return self.quota - self.usage\n", "return self.quota\n"),
    M("what is never lent stays", "quota", "return self.local_free + above", "return above"),
    M("use beyond the own goes up", "quota", "self.parent.add(beyond)", "self.parent.add(units)"),
    M("returned use comes down", "quota", "beyond = -min(-units, max(0, self.usage - self.local))",
      "beyond = units"),
    M("the most a queue may hold", "quota", "return self.local + above", "return above"),
    M("the most: borrow limit", "quota", "above = min(above, self.quota - self.local + self.borrow)", "pass"),
    M("kinds of GPU", "quota", "return gpu_type if gpu_type in self.kinds else ANY", "return ANY"),
    M("without nominal nothing is limited", "quota",
      "self.limited = any(queue.nominal is not None for queue in policy.queues.values())", "self.limited = True"),
    M("capacity that can be launched counts", "state", "for shape in self.launchable:\n            name",
      "for shape in ():\n            name"),
    M("an owner's limit", "cycle", "return most - held - self._given.units(job.queue, job.owner)",
      "return most"),
    # --- order ---
    M("who fits nominal comes first", "order", "return (not any(within), levels,", "return (levels,"),
    M("nominal level by level", "order", "(not owns, quota.share(name)) for", "(False, quota.share(name)) for"),
    M("lowest share first", "order", "(not owns, quota.share(name)) for", "(not owns, 0.0) for"),
    M("shares are weighted", "quota", "return worst / policy.weight", "return worst"),
    M("ties by allocated / nominal", "quota", "worst = max(worst, tally.usage / tally.nominal)", "pass"),
    M("priority in a queue", "order", "return -lane.priority, self._given", "return 0, self._given"),
    M("usage in a queue", "order", "self._given.standing(lane.queue, lane.owner), turn.seq", "0.0, turn.seq"),
    M("submission in a queue", "order", "self._given.standing(lane.queue, lane.owner), turn.seq",
      "self._given.standing(lane.queue, lane.owner), -turn.seq"),
    M("fifo: priority", "order", "return (*before, -turn.group.priority), turn.seq", "return before, turn.seq"),
    M("fifo: submission", "order", "return (*before, -turn.group.priority), turn.seq",
      "return (*before, -turn.group.priority), -turn.seq"),
    M("an admission counts at once", "order", "found += soon(self._units[key], self._half_life_s)", "pass"),
    M("usage decays", "fairshare", "self.average = keep * self.average + (1.0 - keep) * self.current",
      "self.average += (1.0 - keep) * self.current"),
    M("decay is right for uneven steps", "fairshare", "keep: float = 0.5 ** (elapsed_s / half_life_s)",
      "keep: float = 1.0 / (1.0 + elapsed_s / half_life_s)"),
    M("age lifts", "pending", "if now >= old_at:", "if False:"),
    M("age lifts by one name", "pending", "priority += ONE_NAME", "priority += 3 * ONE_NAME"),
    M("an evicted job keeps its age", "pending", "Order.SHORTEST_FIRST else job.submitted_at",
      "Order.SHORTEST_FIRST else job.queued_at"),
    M("a held job waits", "pending", "if job.held or job.after:", "if job.after:"),
    M("dependencies wait", "pending", "if job.held or job.after:", "if job.held:"),
    M("a pause waits", "pending", "if job.eligible_at > now:", "if False:"),
    M("a stopped queue", "cycle", "return rules is not None and not rules.stopped", "return rules is not None"),
    # --- backfill ---
    M("backfill ends before T", "cycle", "for due, option in dated if end <= due]", "for due, option in dated]"),
    M("backfill may end at T", "cycle", "for due, option in dated if end <= due]",
      "for due, option in dated if end < due]"),
    M("nobody passes in time", "cycle", "if not self._fit_in_time & group.shape.bit:", "if True:"),
    M("endless jobs never use a hold", "backfill", "return inf if limit_s is None else now + START_S",
      "return now if limit_s is None else now + START_S"),
    M("a start takes time", "backfill", "else now + START_S + limit_s + job.grace_s", "else now + limit_s"),
    M("an unknown T is no T", "keeping", "return -inf if inf in dates else min(dates, default=inf)",
      "return min(dates, default=inf)"),
    M("dates on other nodes do not count", "keeping", "if each.classes & ids]", "]"),
    M("what is reserved is kept", "keeping", "self._state.capacity.keep_free(node_id, held)", "pass"),
    M("only what is needed is kept", "backfill", "spare = max(0, free_then", "spare = 0 * max(0, free_then"),
    M("CPUs are kept", "backfill", "_to_hold(need.cpu_milli, node", "0 * _to_hold(need.cpu_milli, node"),
    M("memory is kept", "backfill", "_to_hold(need.memory_bytes, node", "0 * _to_hold(need.memory_bytes, node"),
    M("only the CPUs that are needed are kept", "backfill", "free_now - max(0, free_then - need))", "free_now)"),
    M("a date holds by CPUs and memory too", "backfill", "then.copies(bundle) * bundle.gpu_units < need.gpu_units",
      "then.devices.copies(bundle.gpu_units) * bundle.gpu_units < need.gpu_units"),
    M("CPUs are owed", "resources", "max(0, self.cpu_milli - other.cpu_milli)", "0"),
    M("memory is owed", "resources", "max(0, self.memory_bytes - other.memory_bytes)", "0"),
    M("CPUs of others do not come back to us", "relief", "foreign_cpu_milli=site.others.cpu_milli",
      "foreign_cpu_milli=node.foreign_cpu_milli"),
    M("no search in vain", "relief", "if site.copies > before:", "if site.copies > before + 1:"),
    M("memory of others does not come back to us", "relief", "foreign_memory_bytes=site.others.memory_bytes",
      "foreign_memory_bytes=node.foreign_memory_bytes"),
    M("shortest_first stops enough for the CPUs", "resources",
      "and (self.cpu_milli >= bundle.cpu_milli or not bundle.cpu_milli)", ""),
    M("shortest_first stops enough for the memory", "resources",
      "and (self.memory_bytes >= bundle.memory_bytes or not bundle.memory_bytes)", ""),
    M("it is said what is kept", "explain", "if _fits_somewhere(cycle, bare, options) is None else", "if True else"),
    M("a share may cost a whole device", "backfill", "if shared > spare:", "if False:"),
    M("whom something is kept for may be another by now", "cycle",
      "self._overtaken = self._overtaken or self._may_reorder(job.queue)", "pass"),
    M("who has grown old is looked at", "cycle", "new = (*self.state.books.unchecked, *lifted)",
      "new = (*self.state.books.unchecked,)"),
    M("a hold that shrank", "cycle", "self._loosened |= len(self.admitted) > before", "pass"),
    M("T is the earliest", "backfill", "            if places is not None:\n                need",
      "            if places is not None and end > now + 200:\n                need"),
    M("blocked by quota: no reservation", "cycle", "        if not within:\n            return\n",
      "        within = within or list(options)\n"),
    M("each kind of node has its first", "cycle",
      "mine = [option for option in options if not class_ids(option.classes) & others]",
      "mine = [] if self.kept.reservations else options"),
    M("one reservation by class", "cycle",
      "mine = [option for option in options if not class_ids(option.classes) & others]", "mine = options"),
    M("the earliest date over the GPU types", "backfill", "if sooner_than is not None and end >= sooner_than:",
      "if sooner_than is not None:"),
    M("the later GPU type only where it is sooner", "backfill",
      "if sooner_than is not None and end >= sooner_than:", "if False:"),
    M("a date does not move without need", "cycle", "found = self._kept_date(job, mine) or self._earliest(job, mine)",
      "found = self._earliest(job, mine)"),
    M("a date of another type is given up", "cycle",
      "option = next((each for each in options if class_ids(each.classes) == old.classes), None)",
      "option = options[0] if options else None"),
    M("the type that is kept is named", "explain", "if mine is not None and len(options) > 1 else None",
      "if False else None"),
    M("backfill none", "cycle", "self.closed.setdefault(id(each), job)", "pass"),
    M("backfill skip", "cycle", "case Backfill.SKIP:\n                pass",
      "case Backfill.SKIP:\n                self._reserve(job, within)"),
    M("kept quota is charged", "cycle", "self._charge(*kept)\n", "pass\n"),
    # --- preemption and reclaim ---
    M("only lower priorities", "preemption",
      "and run.job.priority < job.priority\n", "and run.job.priority <= job.priority\n"),
    M("preempt never", "policy", "return self.preempt is Preempt.LOWER", "return True"),
    M("reclaim never", "policy", "return self.reclaim is not Reclaim.NEVER", "return True"),
    M("reclaim lower", "preemption", "lower = queue.reclaim is Reclaim.ANY or run.job.priority < job.priority",
      "lower = True"),
    M("reclaim any", "preemption", "lower = queue.reclaim is Reclaim.ANY or run.job.priority < job.priority",
      "lower = run.job.priority < job.priority"),
    M("who is lifted is no victim of who is not", "preemption",
      "                and _counts(run.job, self._state, self._now) < mine\n", ""),
    M("a surplus of who comes first", "preemption", "if mine != theirs:\n        return mine > theirs",
      "if job.priority != other.priority:\n        return job.priority > other.priority"),
    M("reclaim only within nominal", "quota", "return any(self.within(queue, kind, units)[shared:])", "return True"),
    M("reclaim only from borrowers", "quota",
      "if any(tree[name].usage <= tree[name].quota for name in theirs[shared:]):", "if False:"),
    M("siblings settle among themselves", "quota", "while shared < min(len(mine), len(theirs)) and", "while False and"),
    M("a victim's queue stays at its own", "preemption", "if each.borrowing and not quota.may_reclaim(",
      "if False and not quota.may_reclaim("),
    M("preemptible=false", "preemption",
      "if job.attempt is not None and job.preemptible", "if job.attempt is not None"),
    M("min_runtime of the job", "preemption", "max(job.min_runtime_s, state.policy.min_runtime_s)",
      "state.policy.min_runtime_s"),
    M("min_runtime of the policy", "preemption", "max(job.min_runtime_s, state.policy.min_runtime_s)",
      "job.min_runtime_s"),
    M("the clock ends min_runtime", "cycle", "self._wake = at if self._wake is None else min(self._wake, at)", "pass"),
    M("borrowing queues first", "preemption", "sides = (True, across), (False, [job.queue])",
      "sides = (False, [job.queue]), (True, across)"),
    M("lowest priority first", "preemption", "self.key = job.priority, loss(", "self.key = 0, loss("),
    M("least loss first", "preemption", "self.key = job.priority, loss(job, now),", "self.key = job.priority, 0.0,"),
    M("loss since the checkpoint", "preemption", "max(attempt.started_at, attempt.checkpoint_at or attempt.started_at)",
      "attempt.started_at"),
    M("loss by GPUs", "preemption", "max(0.0, now - since) * job.held_units / GPU_UNIT", "max(0.0, now - since)"),
    M("surplus before victims", "preemption",
      "yield _Candidate(run, replace(run.attempt, placed=surplus), borrowing, True)", "pass"),
    M("a surplus is left alone at first", "preemption", "run.attempt.admitted_at + self._state.policy.settle_s",
      "run.attempt.admitted_at"),
    M("for how long is for administrators to say", "preemption",
      "run.attempt.admitted_at + self._state.policy.settle_s",
      "run.attempt.admitted_at + 60.0"),
    M("under fifo a surplus is for who comes first", "preemption",
      "if job.owner == other.owner or order is Order.FIFO:", "if job.owner == other.owner:"),
    M("by rank equals leave a surplus alone", "preemption", "    if order is Order.SHORTEST_FIRST:\n",
      "    if False:\n"),
    M("nothing is taken back in the same breath", "preemption", "AT_ONCE_S = 1.0", "AT_ONCE_S = 0.0"),
    M("victims that are not needed are spared", "preemption", "for each in list(reversed(chosen))[1:]:",
      "for each in ():"),
    M("nobody is evicted in vain", "preemption", "if not met:", "if not met and relief.places() is None:"),
    M("what is coming is not taken twice", "transit",
      "self._ending = (*state.books.ending, *stopped)", "self._ending = ()"),
    M("what was evicted for one is not another's", "backfill",
      "return state.pending.group_of(attempt.stop_by) is not None", "return False"),
    M("quota on its way back", "transit", "charged = quota_back(state, back)", "charged = []"),
    M("a search that failed is not repeated", "searches", "if failed is not None and self._fails_again(failed) and",
      "if False and"),
    M("it is when GPUs have changed hands", "searches", "if failed.moves == self._state.books.moves:", "if True:"),
    M("who is new may come before whom GPUs are kept for", "cycle", "if (preceded and self.kept.holds) or any(",
      "if any("),
    M("not only by priority", "cycle",
      "        place = -group.priority, standing(mine.queue, mine.owner), mine.seq\n",
      "        place = -group.priority, inf, mine.seq\n"),
    M("also from another queue", "cycle",
      "return self._queue_key(mine.queue, None) < self._queue_key(theirs.queue, other)", "return False"),
    M("also by what it owns under fifo", "cycle",
      "place = (*self._before(Turn(group)), -group.priority, mine.seq)", "place = (inf,)"),
    M("several evict in one cycle", "cycle", "if self._try(turn) or self.kept.is_coming(turn.job_id):",
      "if self._try(turn):"),
    M("an eviction uses no retry", "state", "and not outcome.infra and not evicted\n",
      "and not outcome.infra\n"),
    M("an evicted job comes back", "model",
      "return self in (StopCause.PREEMPTED, StopCause.RESIZED, StopCause.DRAINED)", "return False"),
    # --- shortest_first ---
    M("by rank", "order", "needed_s = rank_waiting(job, self._state) * job.gang.gpu_units",
      "needed_s = 1.0 * job.gang.gpu_units"),
    M("rank × GPUs", "order", "needed_s = rank_waiting(job, self._state) * job.gang.gpu_units",
      "needed_s = rank_waiting(job, self._state)"),
    M("an evicted job starts again", "outlast", "again_s = RESTART_S if job.evictions else 0.0", "again_s = 0.0"),
    M("gain of each", "outlast", "return mine.aged or victim.score > GAIN *",
      "return mine.aged or victim.score > 0.9 * GAIN *"),
    M("gain of each, not too much", "outlast", "return mine.aged or victim.score > GAIN *",
      "return mine.aged or victim.score > 1.05 * GAIN *"),
    M("gain by GPUs", "outlast", "(mine.rank_s * mine.gpus + victim.cost_s", "(mine.rank_s + victim.cost_s"),
    M("a victim's score by GPUs", "outlast", "return self.rank_s * self.gpus", "return self.rank_s"),
    M("gain after costs", "outlast", "mine.gpus + victim.cost_s * victim.gpus)", "mine.gpus)"),
    M("costs by GPUs", "outlast", "mine.gpus + victim.cost_s * victim.gpus)", "mine.gpus + victim.cost_s)"),
    M("a restart costs", "outlast", "rank_s, RESTART_S + lost_s,", "rank_s, lost_s,"),
    M("lost work costs", "outlast", "rank_s, RESTART_S + lost_s,", "rank_s, RESTART_S,"),
    M("gain of all together", "outlast", "return mine.aged or GAIN * sum(", "return mine.aged or sum("),
    M("gain of all together, not too much", "outlast", "return mine.aged or GAIN * sum(",
      "return mine.aged or 1.05 * GAIN * sum("),
    M("only right after a checkpoint", "outlast", "MOST_LOST_S = 120.0", "MOST_LOST_S = 125.0"),
    M("right after is not at once", "outlast", "MOST_LOST_S = 120.0", "MOST_LOST_S = 119.0"),
    M("the first stretch", "outlast", "FIRST_STRETCH_S = 600.0", "FIRST_STRETCH_S = 590.0"),
    M("the first stretch ends", "outlast", "FIRST_STRETCH_S = 600.0", "FIRST_STRETCH_S = 601.0"),
    M("min_runtime by rank", "outlast", "max(FIRST_STRETCH_S, job.min_runtime_s, ", "max(FIRST_STRETCH_S, "),
    M("preemptible=false by rank", "outlast", "if started is None or not job.preemptible or", "if started is None or"),
    M("priorities by rank", "outlast", "or victim.job.priority > mine.job.priority:", "or False:"),
    M("no gang of several nodes is stopped", "outlast", "len({each.node_id for each in attempt.placed}) > 1", "False"),
    M("a gang on one node may be", "outlast", "len({each.node_id for each in attempt.placed}) > 1",
      "len(attempt.placed) > 1"),
    M("a stopped queue keeps what runs", "outlast", "if rules is None or rules.stopped:", "if rules is None:"),
    M("so does one that is gone", "outlast", "if rules is None or rules.stopped:",
      "if rules is not None and rules.stopped:"),
    M("the aged need no gain", "outlast", "return mine.aged or victim.score", "return victim.score"),
    M("nor a checkpoint", "outlast", "        if not aged:\n            return self._just_saved",
      "        if True:\n            return self._just_saved"),
    M("the aged are left alone", "outlast", "GUARD_S = 7_200.0", "GUARD_S = 0.0"),
    M("for two hours", "outlast", "GUARD_S = 7_200.0", "GUARD_S = 7_201.0"),
    M("a fifth at most", "outlast", "MOST_GUARDED = 0.2", "MOST_GUARDED = 0.3"),
    M("not less than a fifth", "outlast", "MOST_GUARDED = 0.2", "MOST_GUARDED = 0.1"),
    M("who stops counts as aged at once", "outlast", "            self._guarded[job.id] = job.gang.least_units\n",
      "            pass\n"),
    M("who is admitted counts as aged at once", "outlast", "        for _, job, attempt in fresh:",
      "        for _, job, attempt in ():"),
    M("age counts from the last run", "pending", "job.queued_at if self._policy.order is Order.SHORTEST_FIRST",
      "job.submitted_at if self._policy.order is Order.SHORTEST_FIRST"),
    M("the cheapest node", "outlast", "offers.sort(key=lambda each: each[0])",
      "offers.sort(key=lambda each: -each[0])"),
    M("the cheapest nodes", "outlast", "offers.sort(key=lambda each: (each[0], each[2]))",
      "offers.sort(key=lambda each: (-each[0], each[2]))"),
    M("the longest first", "outlast", "victims.sort(key=lambda each: -each.score)",
      "victims.sort(key=lambda each: each.score)"),
    M("nobody goes who need not", "outlast", "                    chosen.remove(each)\n                else:",
      "                    move(each.job, -1)\n                else:"),
    M("only where the job fits then", "outlast", ">= job.gang.least_units and relief.places() is not None",
      ">= job.gang.least_units"),
    M("only with the quota", "outlast",
      "quota.available(job.queue, mine.kind) >= job.gang.least_units and", "True and"),
    M("only what is borrowed", "outlast", "or books.quota.borrows(queue, books.kind(victim.attempt))", "or True"),
    M("until it borrows no more", "outlast", "                if not self._lends(mine, each):",
      "                if False:"),
    M("what is coming is not missing", "outlast",
      "_free(node) + on_their_way.get(node_id, NOTHING) -", "_free(node) -"),
    M("a share stops nobody", "outlast", "if job.gang.bundle.gpu_units < GPU_UNIT:", "if False:"),
    M("CPUs that a node has never had", "outlast",
      "        node.cpu_milli - node.foreign_cpu_milli,\n", "        2**40,\n"),
    M("STRICT_SPREAD by rank", "outlast", "return min(1, copies)", "return copies"),
    M("STRICT_PACK by rank", "outlast", "return 0 if gang.strategy is Strategy.STRICT_PACK and copies < gang.minimum",
      "return 0 if False"),
    M("ranks are compared again", "cycle", "self.wake_at(self.now + LOOK_AGAIN_S)", "pass"),
    M("rights under any order", "searches",
      "if self._all_rights().get(job.queue) else None", "if not self._ranked else None"),
    M("who may not hides nobody behind", "searches",
      "return job.queue, job.gang, option.kind, job.priority, waited_long(job, self._now, self._state)",
      "return job.queue, job.gang, option.kind"),
    M("what was evicted for one is its own by rank", "cycle",
      "if each.evicting and each.job_id in self.state.pending and",
      "if False and"),
    M("what was evicted is kept though nobody is left", "transit", "return bool(self._mask or self.claimants)",
      "return bool(self._mask)"),
    M("who was made room for gets it", "cycle", "            self._admit_claimants()\n", ""),
    M("owners first under any order", "cycle", "        return claims, most\n", "        return (claims,)\n"),
    M("owners first in a team", "order", "sum(0.5**level for level, owns in enumerate(levels) if not owns) +", ""),
    M("learnt by owner", "gittins", "(job.queue, job.owner, gpus))", "(job.queue, gpus))"),
    # --- dependencies, time ---
    M("success lets dependents go", "state", "left = tuple(each for each in dependent.after if each != job.id)",
      "left = dependent.after"),
    M("failure ends dependents", "state", "elif all(dependent is not each for each, _ in ending):", "elif False:"),
    M("a retry is no failure", "state", "if not outcome.infra and job.failures < job.max_retries:", "if False:"),
    M("the time limit ends a job", "state",
      "bisect_right(self.books.deadlines, now,", "bisect_right(self.books.deadlines, now - 1000,"),
    M("Held", "explain", "if job.held:", "if False:"),
    M("Held: pause", "explain", "if job.eligible_at > cycle.now:", "if False:"),
    M("Dependency", "explain", "if job.after:", "if False:"),
    M("QueueStopped", "explain", "if not cycle.open(job.queue):", "if False:"),
    M("NoMatchingGpuType", "explain", "if not state.capacity.matching(gang):", "if False:"),
    M("Infeasible", "explain", "reasons.INFEASIBLE,", "reasons.WAITING_FOR_CAPACITY,"),
    M("a node could be launched", "explain", "if feasible(gang, all_shapes):", "if False:"),
    M("ExceedsQuota", "explain", "if most >= units:", "if True:"),
    M("WaitingForQuota", "explain", "        _quota(cycle, job, options)\n        or", "       "),
    M("WaitingForVictims", "explain", "        or _coming(cycle, job)\n", ""),
    M("Reserved", "explain", "        or _kept_for_others(cycle, job, options)\n", ""),
    M("Fragmented", "explain", "        or _fragmented(cycle, job, options)\n", ""),
    M("Priority", "explain", "        or _behind(cycle, job, options)\n", ""),
    M("NotEvaluated: a bound", "explain", "        or _cut_off(cycle, job, options)\n", ""),
    M("NotEvaluated: passes", "explain", 'if "passes" in cycle.bounds', "if False"),
    M("NotEvaluated: backfill_depth", "explain", 'if "backfill_depth" in cycle.bounds', "if False"),
    M("NotEvaluated: it would have ended in time", "explain", "if end <= cycle.kept.due(each.classes)]", "]"),
    M("NotEvaluated: only who was not reached", "searches",
      "return not all(each is not None and self._fails_again(each) for each in known)", "return True"),
    M("NotEvaluated: only who has a right", "preemption",
      "min(books.evictable.get(job.queue, ()), default=inf) < job.priority:", "True:"),
    M("NotEvaluated: by time limit", "cycle",
      "return (*alike, job.priority, job.time_limit_s, job.grace_s) if self.bounds else alike", "return alike"),
    M("what is kept is not used", "explain", "used = books.quota.usage(job.queue, kind) - kept",
      "used = books.quota.usage(job.queue, kind)"),
    M("what is kept in this queue", "cycle", "if whose == [queue, kind])", ")"),
    M("NotEvaluated", "explain", "if not len(state.capacity):", "if False:"),
    M("host resources are no fragmentation", "explain",
      "if place(bare, cycle.state.capacity, classes) is not None:", "if False:"),
    M("what is kept for me is free", "explain", "capacity.keep_free(node_id, -(held if alone else held.at_most(need)))",
      "pass"),
    M("NodesCordoned", "explain", "if feasible(gang, present):", "if False:"),
    M("cordoned nodes' CPUs are none", "explain",
      "if not node.cordoned and capacity.class_of(node.id) in classes", "if capacity.class_of(node.id) in classes"),
    # --- cordon and drain ---
    M("nothing is placed on a cordoned node", "capacity",
      "    if node.cordoned:\n        return Devices.none(node.gpu_slots)\n", ""),
    M("a placement keeps the cordon", "capacity",
      "        node.cordoned,\n        node.quarantined_units,", "        False,\n        node.quarantined_units,"),
    M("a placement keeps the quarantine", "capacity", "        node.quarantined_units,\n    )", "    )"),
    M("what others hold comes on top of a quarantine", "state",
      "foreign_units=event.gpu_units + self._quarantined(event.node_id)", "foreign_units=event.gpu_units"),
    M("a node seen anew keeps its quarantine", "state",
      "foreign_units=self._quarantined(event.node_id)", "foreign_units=0"),
    M("a node that is gone has no quarantine", "state",
      "        self.quarantines.pop(event.node_id, None)\n        # A", "        # A"),
    M("a quarantine is lifted by 0", "state",
      "        if event.units:\n            since", "        if True:\n            since"),
    M("what is in quarantine is told of in a reason", "explain",
      "    if strays := sum(each.quarantined for each in classes):\n        evidence",
      "    if strays := 0:\n        evidence"),
    M("cordoned nodes hold nobody who needs them", "cycle", "self.state.open_shapes()", "self.state.present_shapes()"),
    M("feasible is asked again after a cordon", "capacity",
      "self._put(replace(self._nodes[node_id], cordoned=cordoned))\n        self._shapes_changed()",
      "self._put(replace(self._nodes[node_id], cordoned=cordoned))"),
    M("nothing comes back on a cordoned node", "relief",
      "            if node.cordoned:\n                return None\n", ""),
    M("no date is kept on a cordoned node", "backfill", " or state.capacity[node_id].cordoned:", ":"),
    M("nobody is outlasted on a cordoned node", "outlast", "    if node.cordoned:\n        return 0\n", ""),
    M("a cordon outlives the node", "state", "cordoned=event.node_id in self.cordons,", "cordoned=False,"),
    M("a cordon is seen by the next cycle", "state",
      "node_id in self.cordons)\n        self.books.moves += 1", "node_id in self.cordons)"),
    M("a drain waits for its deadline", "state", "each.deadline is not None and each.deadline <= now]",
      "each.deadline is not None]"),
    M("a drain without a deadline waits", "state", "each.deadline is not None and each.deadline <= now]",
      "each.deadline is None or each.deadline <= now]"),
    M("a drain ends at all", "state", "[each for each in self.cordons.values() if each.draining]", "[]"),
    M("the clock wakes for a drain", "state", "self.wake_at, launches, *drains):", "self.wake_at, launches):"),
    M("a drain stops an attempt once", "state", "if attempt.stop is None and attempt.phase is not Phase.RELEASING:",
      "if True:"),
    # --- what is wanted of an autoscaler ---
    M("no more is wanted than can be launched", "launches", "- self.up.get(name, 0) - self.booting.get(name, 0)", ""),
    M("all types together have a bound", "launches", "count if room is None else min(count, room)", "count"),
    M("a type that failed is left alone", "launches",
      "return failure is not None and now < failure.until", "return False"),
    M("a boot that takes too long has failed", "launches", "if since + policy.boot_timeout_s <= now", "if False"),
    M("the largest are packed first", "scaleup", "return again if", "return placed if"),
    M("who ends soon is waited for", "scaleup", "for node_id in new) < due", "for node_id in new) < due + 1e9"),
    M("the least waste", "scaleup", "slots - used, self.price(fresh)", "self.price(fresh)"),
    M("what is kept is part of what a gang asks for", "scaleup", "capacity.keep_free(node_id, -amount)", "pass"),
    # --- nodes that fail ---
    M("a failing node is cordoned", "state", "        events += self._failing(now)\n", ""),
    M("one job condemns no node", "health", "and len({each.job_id for each in recent}) > 1", ""),
    M("the limit of failures", "health", "len(recent) >= policy.node_failure_limit",
      "len(recent) > policy.node_failure_limit"),
    M("old failures are forgotten", "health", "recent[0].at <= now - policy.node_failure_window_s", "False"),
    M("0 failures: never", "health", "if not policy.node_failure_limit:", "if False:"),
    M("what was told to stop is no failure", "state", "node_id is not None and attempt.stop is None and",
      "node_id is not None and"),
    M("the last node stays", "state", "if left < 1:", "if False:"),
    M("nodes without GPUs are no last ones", "capacity", "for key, each in self.classes.items() if key.gpu_slots)",
      "for key, each in self.classes.items())"),
    M("uncordoned it begins anew", "state",
      "        self.health.forget(event.node_id)\n        if self.cordons.pop", "        if self.cordons.pop"),
    M("an exit code is no failure of the node", "state", "        if event.outcome.infra:\n", "        if True:\n"),
    # --- the books ---
    M("GPUs are charged until released", "state", "        self.capacity.give(job.gang.bundle, attempt.placed)\n", ""),
    M("an admission is charged", "state", "        self.capacity.take(job.gang.bundle, event.placed)\n", ""),
    M("a trial leaves no trace", "cycle", "self.state.capacity.rollback(self._mark)", "pass"),
    M("quota trials leave no trace", "cycle", "self.state.books.quota.add(queue, kind, -units)\n        if",
      "pass\n        if"),
    M("old news is dropped", "state", "job.attempt.number != event.attempt", "False"),
)  # fmt: skip


def main(words: list[str]) -> int:
    chosen = [
        each for each in MUTATIONS if not words or any(word in f"{each.rule} {each.file}" for word in words)
    ]
    width = max(len(each.rule) for each in chosen)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copytree(REPO / "rm", tree / "rm", ignore=shutil.ignore_patterns("__pycache__"))
        if any(_fails(tree, tests) for tests in TESTS):
            print("the tests fail without any mutation")
            return 2
        for each in chosen:
            file = tree / "rm" / "core" / f"{each.file}.py"
            text = file.read_text()
            if text.count(each.old) != 1:
                print(
                    f"{each.rule:<{width}}  STALE     {each.file}: the text is there {text.count(each.old)} times"
                )
                survived += 1
                continue
            begun = time.monotonic()
            file.write_text(text.replace(each.old, each.new))
            by = next((failed for tests in TESTS if (failed := _fails(tree, tests))), "")
            file.write_text(text)
            survived += not by
            said = f"killed    {by}" if by else "SURVIVED"
            print(
                f"{each.rule:<{width}}  {each.file:<10}  {said}  {time.monotonic() - begun:.1f} s", flush=True
            )
    print(f"{len(chosen) - survived} of {len(chosen)} mutations killed")
    return 1 if survived else 0


def _fails(tree: Path, tests: tuple[str, ...]) -> str:
    """The first test that fails with the package in `tree`, or "" where none does."""
    env = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RM_PROPERTY_EXAMPLES": "20",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider",
         "--durations=0", "--timeout=120", *tests],
        cwd=REPO, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" ")[1].rpartition("/")[2] if failed else f"pytest ended {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
