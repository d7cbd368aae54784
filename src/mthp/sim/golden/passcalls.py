"""The calls of a golden case of a split or a trim, one in each pass."""

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
"""Words of calls, and the numbers of each (tests/golden/README.md)."""


@dataclass(frozen=True)
class Call:
    """The call of a pass: a word of :data:`CALLS`, and its numbers.

    Attributes:
        first, count: pages of the range.
        order: order of the folios to make.
        at: page of the folio around which to split.
    """

    name: str
    first: int = 0
    count: int = 0
    order: int = 0
    at: int = -1

    @property
    def pages(self) -> slice:
        """The pages of the range."""
        return slice(self.first, self.first + self.count)


def call_of(words: Any, pages: int) -> Call | None:
    """Return the call in a case's list of a word and numbers, for a range of `pages`; None if it is not valid."""
    if not isinstance(words, list) or not words or not isinstance(words[0], str) or words[0] not in CALLS:
        return None
    name, *numbers = words
    if len(numbers) != len(CALLS[name]) or not all(type(number) is int for number in numbers):
        return None
    call = Call(name, **dict(zip(CALLS[name], numbers, strict=True)))
    return call if 0 <= call.first <= call.pages.stop <= pages else None
