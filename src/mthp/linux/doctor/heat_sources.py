"""Answer which sources can measure the accesses of a process: the questions of `mthp doctor` about ``--heat``."""

from __future__ import annotations

from mthp.linux.doctor.findings import Answer, Facts, Question, State
from mthp.linux.heat import damon, idle_tracking, young


def _answer(lack: tuple[str, str], available: str) -> Answer:
    return Answer(State.MISSING, *lack) if lack[0] else Answer(State.OK, available)


def _damon(facts: Facts) -> Answer:
    lack = damon.lack(facts.thp.root.parent, facts.thp.root.parents[2] / "module")
    return _answer(lack, "available, and no other program uses it: samples of each PMD range")


def _idle(facts: Facts) -> Answer:
    return _answer(idle_tracking.lack(facts.thp.root.parent), "available: samples of single pages")


def _young(facts: Facts) -> Answer:
    what, remedy = young.lack(facts.proc)
    if what:
        return Answer(State.MISSING, what, remedy)
    what = "available, for whole mappings; if memory is short, reclaim then takes pages that are in use"
    if State.OK in (_damon(facts).state, _idle(facts).state):
        return Answer(State.OK, f"{what}; not used here, because a better source works")
    return Answer(State.LIMITED, what, "heat_damon or heat_idle")


HEAT_QUESTIONS: tuple[Question, ...] = (
    ("heat_damon", "hot memory, by DAMON", False, _damon),
    ("heat_idle", "hot memory, by idle page tracking", False, _idle),
    ("heat_young", "hot memory, by young bits", False, _young),
)
