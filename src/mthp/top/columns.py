"""The columns of the table of `mthp top`: how wide they are in a terminal, and their cells."""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from mthp.geometry import Geometry
from mthp.text import clean, shortened
from mthp.top.model import UNKNOWN, Row, bar
from mthp.units import format_size

SHADES = {
    True: ("#6b6880", "#5561b0", "#3f7fa8", "#27ad81", "#7fd34e", "#fde725"),
    False: ("#a39c88", "#7f9a3a", "#3f9a63", "#1f7f86", "#2f6897", "#2b3f86"),
}
"""Colours of orders from base pages to the PMD order, by whether the theme is dark."""

COLUMNS = (
    ("id", "pid", 7),
    ("name", "name", None),
    ("resident", "resident", 8),
    ("huge", "huge", 6),
    ("gain", "could gain", 10),
    ("bloat", "adds", 7),
    ("", "folio sizes", None),
)
"""Sort key, heading and width of each column. The width is that of the longest figure, because figures are never cut;
None for names and bars, which share the room that the figures leave.
"""

ADDRESS_WIDTH = 12
"""Digits of an address of user space (47 bits), which mappings show in place of a PID."""

NAME_WIDTHS = (8, 26)
"""The narrowest and the widest column of names."""

BAR_WIDTH = 24
"""The widest bar."""

BAR_FROM = 20
"""Columns that the figures must leave for a bar to be shown: a shorter one beside a name is useless."""

PADDING = 2
"""Blanks around each cell of a DataTable, together."""

SCROLL_BAR = 2
"""Width of the vertical scroll bar."""


def column_widths(room: int, *, mapped: bool) -> list[int]:
    """Return the widths of the columns in a terminal of `room` columns: those of :data:`COLUMNS`, or without the bar.

    Args:
        mapped: whether the first column holds addresses.
    """
    figures = sum(width or 0 for _, _, width in COLUMNS) + (ADDRESS_WIDTH - COLUMNS[0][2] if mapped else 0)
    spare = room - SCROLL_BAR - figures - PADDING * len(COLUMNS)
    with_bar = spare >= BAR_FROM
    # Without the bar, the blanks around it are free.
    name = min(NAME_WIDTHS[1], max(NAME_WIDTHS[0], spare * 3 // 5 if with_bar else spare + PADDING))
    bars = [min(BAR_WIDTH, spare - name)] if with_bar else []
    own = [width or name for _, _, width in COLUMNS[:-1]]
    return [ADDRESS_WIDTH if mapped else own[0], *own[1:], *bars]


def column_heads(widths: Sequence[int], *, mapped: bool) -> list[Text]:
    """Return the headings of columns of these `widths`."""
    heads = []
    # Without the bar there is a width less.
    for (name, head, _), width in zip(COLUMNS, widths, strict=False):
        if name == "id" and mapped:
            head = "address"
        # Only the bar may be narrower than its heading.
        if len(head) > width:
            head = "folios"
        heads.append(Text(head, justify="left" if name in ("name", "") else "right"))
    return heads


def row_cells(row: Row, widths: Sequence[int], geometry: Geometry, *, dark: bool, mapped: bool) -> list[Text]:
    """Return the cells of `row`, one for each of `widths`.

    Args:
        dark: whether the theme is dark.
        mapped: whether the row is a mapping, with its address as key.
    """
    # An upper bound, which the list of keys explains.
    mark = "" if row.planned or row.gain is None else "~"
    share = row.huge_share
    dim = "dim" if row.trouble else ""
    cells = [
        Text(f"{row.key:x}" if mapped else str(row.key), style=dim, justify="right"),
        Text(shortened(clean(row.name), widths[1]), style=dim, no_wrap=True),
        Text(format_size(row.resident), style=dim, justify="right"),
        Text("" if share is None else f"{share:.1%}", style=dim, justify="right"),
        Text("" if row.gain is None else mark + format_size(row.gain), style=dim or "bold", justify="right"),
        Text("" if row.bloat is None else format_size(row.bloat), style=dim, justify="right"),
    ]
    return [*cells, *(_bar(row, width, geometry, dark=dark) for width in widths[len(cells) :])]


def _bar(row: Row, width: int, geometry: Geometry, *, dark: bool) -> Text:
    text = Text(no_wrap=True)
    if row.trouble and row.by_order is None:
        return text.append("denied" if "permitted" in row.trouble else "-", style="dim")
    shades = SHADES[dark]
    top = geometry.pmd_order
    for order, characters in bar(row.by_order or {}, geometry, width):
        # Base pages keep a shade of their own.
        shade = 0 if order <= 0 else max(1, round((len(shades) - 1) * min(order, top) / top))
        text.append(characters, Style(color=None if order == UNKNOWN else shades[shade], dim=order == UNKNOWN))
    return text
