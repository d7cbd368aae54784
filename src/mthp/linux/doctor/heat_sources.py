"""Answer which sources can measure the accesses of a process: the questions of `mthp doctor` about ``--heat``."""

from __future__ import annotations

from collections.abc import Callable

from mthp.linux.doctor.findings import Answer, Facts, State
from mthp.linux.heat import damon, idle_tracking, young


def _damon(facts: Facts) -> Answer:
    what, remedy = damon.lack(facts.thp.root.parent, facts.thp.root.parents[2] / "module")
    if what:
        return Answer(State.MISSING, what, remedy)
    return Answer(State.OK, "available, and no other program uses it: samples of each PMD range")


def _idle(facts: Facts) -> Answer:
    what, remedy = idle_tracking.lack(facts.thp.root.parent)
    if what:
        return Answer(State.MISSING, what, remedy)
    return Answer(State.OK, "available: samples of single pages")


def _young(facts: Facts) -> Answer:
    what, remedy = young.lack(facts.proc)
    if what:
        return Answer(State.MISSING, what, remedy)
    what = "available, for whole mappings; if memory is short, reclaim then takes pages that are in use"
    if State.OK in (_damon(facts).state, _idle(facts).state):
        return Answer(State.OK, f"{what}; not used here, because a better source works")
    return Answer(State.LIMITED, what, "heat_damon or heat_idle")


HEAT_QUESTIONS: tuple[tuple[str, str, bool, Callable[[Facts], Answer]], ...] = (
    ("heat_damon", "hot memory, by DAMON", False, _damon),
    ("heat_idle", "hot memory, by idle page tracking", False, _idle),
    ("heat_young", "hot memory, by young bits", False, _young),
)
"""Key, title, whether it is about a part of THP, and the function that answers."""
