"""What one submission of the fault machine must have done, judged from outside: no Ray here, and no ledger.

Each rank of each attempt holds a lock on a file of its own for as long as a process of it lives, the kernel lets go of
it however they die, and it writes into its job's diary:

    begin ATTEMPT RANK TIME      it runs
    overlap ATTEMPT RANK FILE    a process of another attempt, the one that locks FILE, is still alive
    end ATTEMPT RANK TIME        it has done all its work
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SCRIPT = """\
# DIARY SECONDS CODE
diary="$1.$RM_JOB_ID" rank="${RANK:-0}"
exec 9>>"$diary.$RM_ATTEMPT.$rank.lock"
flock 9
for other in "$diary".*.lock; do
  case "$other" in "$diary.$RM_ATTEMPT."*) continue ;; esac
  flock --nonblock --shared "$other" true || echo "overlap $RM_ATTEMPT $rank ${other##*/}" >> "$diary"
done
echo "begin $RM_ATTEMPT $rank $EPOCHREALTIME" >> "$diary"
sleep "$2"
echo "end $RM_ATTEMPT $rank $EPOCHREALTIME" >> "$diary"
exit "$3"
"""
USER_KILL, CLIENT_KILL = "user process", "client"
OWN_END = {"ok": "SUCCEEDED", "fail": "FAILED", "endless": "TIMED_OUT"}


@dataclass
class Story:
    """One job: what was asked for, what was done to it, and what is known of it in the end.

    `fate`: "ok", "fail" (exits with 3) or "endless" (has a time limit). `hits`: faults that hit it, by kind; those that
    are neither a killed user process nor a killed client may cost it one infrastructure failure each.
    """

    name: str
    fate: str
    kind: str = "command"
    max_infra_retries: int = 1000
    job_id: str = ""
    cancelled: bool = False
    """A cancellation was acknowledged while it lived."""
    moved: bool = False
    """It was evicted by a drain."""
    hits: Counter[str] = field(default_factory=Counter)
    victims: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """The same by job: those of an array are hit one by one."""
    view: Any = None
    diary: list[str] = field(default_factory=list)

    @property
    def infra_hits(self) -> int:
        return sum(number for kind, number in self.hits.items() if kind not in (USER_KILL, CLIENT_KILL))


def judge(story: Story) -> list[str]:
    """What went wrong with one ended job, each as a sentence."""
    view = story.view
    if view.ended_at is None:
        return [f"{story.job_id} ({story.name}) is {view.status} and should have ended"]
    lines = [line.split() for line in story.diary if len(line.split()) == 4]
    return [
        f"{story.job_id} ({story.name}, {story.fate}, {view.status}, hit by {dict(story.hits)}): {each}"
        for each in (*_end(story), *_retries(story), *_attempts(story, lines), *_late(story, lines))
    ]


def _end(story: Story) -> Iterator[str]:
    """Is the state one that it may end in?"""
    view, outcome = story.view, story.view.outcome or {}
    allowed = {"SUCCEEDED" if story.kind == "lease" else OWN_END[story.fate]}
    if story.cancelled:
        allowed = {"CANCELLED"}
        # The first cause counts: its time may have been up by then.
        if story.fate == "endless":
            allowed |= {"TIMED_OUT"}
    if story.hits[CLIENT_KILL]:
        allowed |= {"CANCELLED"}
    if story.hits[USER_KILL]:
        allowed |= {"FAILED"}
    if story.infra_hits and (story.kind == "lease" or story.infra_hits > story.max_infra_retries):
        allowed |= {"FAILED"}
    if view.status not in allowed:
        yield f"it is {view.status} ({outcome.get('message')}), and only {sorted(allowed)} would be right"
    if view.status == "FAILED" and not outcome.get("infra") and story.kind != "lease":
        code, signal = outcome.get("exit_code"), outcome.get("signal")
        expected = story.fate == "fail" and code == (1 if story.kind == "function" else 3)
        if not expected and not (story.hits[USER_KILL] and (signal == 9 or code)):
            yield f"it failed with exit code {code}, signal {signal}: {outcome.get('message')}"


def _retries(story: Story) -> Iterator[str]:
    view, outcome = story.view, story.view.outcome or {}
    if view.infra_failures > story.infra_hits:
        yield f"it counts {view.infra_failures} infrastructure failures and was hit {story.infra_hits} times"
    if story.kind == "lease" or view.status != "FAILED" or not outcome.get("infra"):
        return
    # Those that it was tried again after: the one that ended it is not counted.
    if view.infra_failures != story.max_infra_retries:
        yield f"it was lost for good after {view.infra_failures} of its {story.max_infra_retries} tries again"


def _attempts(story: Story, lines: list[list[str]]) -> Iterator[str]:
    """Did its attempts run one after the other, each once, and as often as they had to?"""
    began, ended = ([line[1:3] for line in lines if line[0] == word] for word in ("begin", "end"))
    for _, attempt, rank, other in (line for line in lines if line[0] == "overlap"):
        yield f"rank {rank} of attempt {attempt} began while a process that holds {other} lived"
    for (attempt, rank), times in Counter(map(tuple, began)).items():
        if times > 1:
            yield f"rank {rank} of attempt {attempt} ran {times} times"
    if story.kind == "lease":
        return
    tried = {attempt for attempt, _ in began}
    if len(tried) > 1 and not story.hits and not story.moved:
        yield f"nothing was done to it, and it ran in attempts {sorted(tried)}"
    last = f"{story.job_id}.{story.view.attempts}"
    done = len({rank for attempt, rank in ended if attempt == last})
    if story.view.status == "SUCCEEDED" and done != story.view.ranks:
        yield f"it succeeded, and {done} of {story.view.ranks} ranks of {last} have done their work"
    if story.view.status == "FAILED" and not story.infra_hits and not story.hits and not done:
        yield f"it failed, and no rank of {last} has come to its end"


def _late(story: Story, lines: list[list[str]]) -> Iterator[str]:
    for word, attempt, rank, at in lines:
        if word != "overlap" and float(at) > story.view.ended_at:
            late = float(at) - story.view.ended_at
            yield f"{word} of rank {rank} of {attempt} came {late:.3f} s after the job had ended"
