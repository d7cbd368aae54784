"""The calls that a golden case of a split or a trim makes, one in each pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PAGES = ("first", "count")

CALLS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("collapse", "fork", "mlock"), ()),
    **dict.fromkeys(("pin", "fill", "zero", "dontneed", "move", "cold"), _PAGES),
    "split": (*_PAGES, "order"),
    "split_at": (*_PAGES, "order", "at"),
}
"""The words of calls, and the numbers that each takes (tests/golden/README.md)."""


@dataclass(frozen=True)
class Call:
    """What a pass does: a word of :data:`CALLS`, and the numbers behind it.

    Attributes:
        first, count: pages of the range.
        order: of the folios that are to be made.
        at: page of the folio that it is split around.
    """

    name: str
    first: int = 0
    count: int = 0
    order: int = 0
    at: int = -1

    @property
    def pages(self) -> slice:
        """The pages that it names."""
        return slice(self.first, self.first + self.count)


def call_of(words: Any, pages: int) -> Call | None:
    """Return the call in a case's list of a word and numbers, for a range of `pages`; None if it is not one."""
    if not isinstance(words, list) or not words or not isinstance(words[0], str) or words[0] not in CALLS:
        return None
    name, *numbers = words
    if len(numbers) != len(CALLS[name]) or not all(type(number) is int for number in numbers):
        return None
    call = Call(name, **dict(zip(CALLS[name], numbers, strict=True)))
    return call if 0 <= call.first <= call.pages.stop <= pages else None
