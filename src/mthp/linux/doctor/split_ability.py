"""Answer whether folios can be split in place and trimmed: the questions of `mthp doctor` about the mechanism split."""

from __future__ import annotations

from mthp.linux.doctor.findings import Answer, Facts, Question, State
from mthp.linux.split.file import SPLIT_FILE, SplitAbility

_LATER = "Linux 6.12 or later"


def _split(facts: Facts) -> Answer:
    ability = facts.probed.split
    if ability.splits:
        what = f"makes folios below {facts.pmd} of one of {facts.pmd} in place (tried on memory of its own)"
        return Answer(State.OK, what)
    return Answer(State.MISSING, *ability.why_no_split())


def _offset(facts: Facts) -> Answer:
    ability = facts.probed.split
    without = Answer(State.LIMITED, "not known to the kernel: layouts take more writes", "Linux 6.18 or later")
    return _of_file(
        ability, ability.offset, "one write splits a folio around one page and leaves the rest of it large", without
    )


def _zeroes(facts: Facts) -> Answer:
    ability = facts.probed.split
    without = Answer(State.MISSING, "pages of zeroes stay resident after a split", _LATER)
    return _of_file(ability, ability.zeroes, "pages of zeroes go back to the kernel in a split to base pages", without)


def _cold(facts: Facts) -> Answer:
    ability = facts.probed.split
    if ability.cold is None:
        return Answer(State.LIMITED, ability.untried or "not tried")
    if ability.cold:
        return Answer(State.OK, "MADV_COLD of one page of a folio frees its pages of zeroes")
    return Answer(State.MISSING, "MADV_COLD of one page of a folio frees nothing", _LATER)


def _of_file(ability: SplitAbility, found: bool | None, what: str, without: Answer) -> Answer:
    """Return the answer about an ability of the file: `what` it does, that one `without` it, or why it is unknown."""
    if found is not None:
        return Answer(State.OK, what) if found else without
    if ability.file:
        return Answer(State.MISSING, "not tried, because split is missing")
    return Answer(State.LIMITED, ability.untried or "not tried")


SPLIT_QUESTIONS: tuple[Question, ...] = (
    ("split", f"splitting folios in place ({SPLIT_FILE.name})", True, _split),
    ("split_offset", "splitting around one page", True, _offset),
    ("split_zeroes", "giving zeroes back by splitting", True, _zeroes),
    ("cold_zeroes", "giving zeroes back by MADV_COLD", True, _cold),
)
