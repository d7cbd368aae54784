"""Text that is fit to be printed, in a module of its own because errors need it and it costs nothing."""

from __future__ import annotations

import unicodedata
from typing import AnyStr

ELLIPSIS = "…"
"""Stands for the characters that a shortened name has lost."""


def lines(text: AnyStr) -> list[AnyStr]:
    """Return the lines of a text of the kernel, which end at newlines only.

    Processes choose the names in it. The kernel escapes a newline in them, but not a carriage return or the other ends
    of lines of ``splitlines()``. With these, a name such as ``x``, CR, ``NSpid: 1`` would become a field of its own.
    """
    newline = "\n" if isinstance(text, str) else b"\n"
    return text.removesuffix(newline).split(newline) if text else []


def clean(text: str) -> str:
    """Return `text` without control characters, for names that a process chose itself."""
    return "".join(char if unicodedata.category(char)[0] != "C" else "�" for char in text)


def numbered(count: int, one: str, many: str = "") -> str:
    """Return `count` and a noun: `one`, or `many`, which by default ends with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def shortened(name: str, width: int) -> str:
    """Return `name` in at most `width` columns. Its end, which says more than its beginning, keeps two thirds."""
    # Imported here, because errors import this module and do not need rich.
    from rich.cells import cell_len, set_cell_size

    if cell_len(name) <= width:
        return name
    tail = 2 * (width - 1) // 3
    # A double-width character that does not fit is replaced by a blank, which is stripped on both sides.
    front = set_cell_size(name, width - 1 - tail).rstrip()
    back = set_cell_size(name[::-1], tail).rstrip()[::-1]
    return front + ELLIPSIS + back
