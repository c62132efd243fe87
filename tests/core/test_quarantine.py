"""What is kept from everybody because strays are on it, beside what the scenario tells."""

from __future__ import annotations

from rm.core.events import ForeignUseObserved, GpusQuarantined, NodeJoined
from rm.core.model import Stray
from rm.core.resources import GPU_UNIT
from rm.testing import FakeCluster
from rm.views import node_view

STRAY = Stray(1, 7, "python", "ada", 2**31)


def free(fake: FakeCluster) -> float:
    return fake.state.totals().free / GPU_UNIT


def test_the_last_word_counts_and_the_first_tells_since_when() -> None:
    fake = FakeCluster()
    fake.add_node("n", 4)
    fake.now = 5.0
    fake.happen(GpusQuarantined(5.0, "n", 4 * GPU_UNIT))
    assert free(fake) == 0
    fake.now = 6.0
    fake.happen(GpusQuarantined(6.0, "n", GPU_UNIT, (STRAY,)))
    assert free(fake) == 3
    assert (fake.state.quarantines["n"].at, fake.state.quarantines["n"].strays) == (5.0, (STRAY,))
    fake.happen(GpusQuarantined(7.0, "n", 0))
    assert (free(fake), fake.state.quarantines) == (4, {})
    fake.state.check()


def test_a_node_seen_anew_keeps_it_and_one_that_is_gone_does_not() -> None:
    fake = FakeCluster()
    fake.add_node("n", 4)
    fake.quarantine("n", 1)
    fake.happen(NodeJoined(fake.now, "n", "another name", 4, 64_000, 2**38))
    assert free(fake) == 3
    fake.state.check()
    fake.lose_node("n")
    assert fake.state.quarantines == {}
    fake.add_node("n", 4)
    assert free(fake) == 4
    fake.happen(GpusQuarantined(fake.now, "never seen", GPU_UNIT))
    assert fake.state.quarantines == {}


def test_other_work_comes_on_top_whichever_is_seen_first() -> None:
    fake = FakeCluster()
    fake.add_node("n", 4)
    foreign = ForeignUseObserved(fake.now, "n", GPU_UNIT // 2, 0, 0)
    for one, other in (("foreign", "quarantine"), ("quarantine", "foreign")):
        for each in (one, other):
            fake.happen(foreign) if each == "foreign" else fake.quarantine("n", 1)
        assert free(fake) == 2.5, one
        view = node_view(fake.state.nodes["n"], ())
        assert (view.quarantined_gpus, view.foreign_gpus, view.free_gpus) == (1, 0.5, 2.5)
        fake.happen(ForeignUseObserved(fake.now, "n", 0, 0, 0))
        fake.quarantine("n", 0)
        assert free(fake) == 4


def test_what_runs_beside_it_goes_on_and_gives_back_no_more_than_it_had() -> None:
    fake = FakeCluster()
    fake.add_node("n", 2)
    job = fake.submit(1)
    fake.step()
    fake.quarantine("n", 2)
    view = node_view(fake.state.nodes["n"], (job,), None, strays=(STRAY,))
    assert (view.charged_gpus, view.quarantined_gpus, view.free_gpus) == (1, 1, 0)
    assert view.strays[0]["pid"] == 7
    fake.run()
    assert job in fake.ended
    assert fake.state.totals().free == 0
