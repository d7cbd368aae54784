"""Whatever the table and the width: no figure is cut, no word is lost, and no line is longer than the terminal."""

from __future__ import annotations

import io
import re

from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mthp.cli.render.tables import Table
from mthp.text import ELLIPSIS

FIGURES = st.one_of(
    st.from_regex(r"[1-9][0-9]{0,9}(\.[0-9])?[KMGT%]?", fullmatch=True),
    st.from_regex(r"[1-9][0-9]{0,3}\.[0-9]{2} ms", fullmatch=True),
    st.just(""),
)
WORDS = st.text("abcde/:=漢é0123456789", min_size=1, max_size=16)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)
NAMES = st.text("abc/.漢-_ ", max_size=90).map(str.strip)
HEADS = st.lists(st.text("abcdef_", min_size=1, max_size=14), min_size=1, max_size=3).map(" ".join)
KINDS = {"figure": FIGURES, "name": NAMES, "text": TEXTS}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=12))
    heads = [draw(HEADS) for _ in kinds]
    rows = draw(st.lists(st.tuples(*(KINDS[kind] for kind in kinds)), max_size=5))
    chosen = {kind: {index for index, each in enumerate(kinds) if each == kind} for kind in KINDS}
    return Table(draw(TEXTS), heads, rows, right=chosen["figure"], names=chosen["name"])


def printed(table: Table, width: int, *, terminal: bool) -> list[str]:
    out = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


@given(tables(), st.integers(40, 200), st.booleans())
def test_no_line_is_longer_than_the_terminal(table: Table, width: int, terminal: bool) -> None:
    assert all(cell_len(line) <= width for line in printed(table, width, terminal=terminal))


@given(tables(), st.integers(40, 200))
def test_every_figure_stands_whole_on_one_line(table: Table, width: int) -> None:
    """Count each figure as often as the table has it, so that one row cannot hide a loss in another."""
    lines = printed(table, width, terminal=True)
    figures = [row[index] for row in table.rows for index in table.right if row[index]]
    for figure in set(figures):
        whole = re.compile(rf"(?<!\S){re.escape(figure)}(?!\S)")
        assert sum(len(whole.findall(line)) for line in lines) >= figures.count(figure)


@given(tables(), st.integers(40, 200))
def test_no_word_of_a_text_is_cut(table: Table, width: int) -> None:
    lines = printed(table, width, terminal=True)
    there = [word for line in lines for word in line.split()]
    texts = set(range(len(table.columns))) - set(table.right) - set(table.names)
    wanted = [word for row in table.rows for index in texts for word in row[index].split()]
    for word in set(wanted):
        assert there.count(word) >= wanted.count(word)


@given(tables(), st.integers(40, 200))
def test_a_name_is_whole_or_has_an_ellipsis_between_its_ends(table: Table, width: int) -> None:
    lines = printed(table, width, terminal=True)
    for row in table.rows:
        for index in table.names:
            assert any(row[index] in line for line in lines) or any(_shows(line, row[index]) for line in lines)


def test_a_name_with_blanks_is_not_broken_below_its_row() -> None:
    name = "one  name of 漢 several words"
    for head in ("a", "head " * 3 + "name", "head " * 5 + "name"):
        table = Table("title", ["x" * 40, head, "b"], [("1" * 40, name, "c")], right={0}, names={1})
        assert any(name in line for line in printed(table, 40, terminal=True))


def _shows(line: str, name: str) -> bool:
    """Return whether a `line` has the beginning of a name, an ellipsis, and its end."""
    for match in re.finditer(ELLIPSIS, line):
        before, after = line[: match.start()], line[match.end() :]
        heads = (name[:size] for size in range(1, len(name)))
        tails = (name[-size:] for size in range(1, len(name)))
        if any(before.endswith(head.rstrip()) for head in heads) and any(after.startswith(t.lstrip()) for t in tails):
            return True
    return False


@given(tables())
@example(Table("", ["head"], [("",)], names={0}))
def test_wide_enough_every_row_is_one_line(table: Table) -> None:
    heads, lines = table.laid_out(1 << 16)
    assert len(heads) == 1
    assert len(lines) == len(table.rows)
