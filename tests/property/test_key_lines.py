"""The lines of keys: in generated TOML, every number is the line on which its key stands."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from mthp.tomllines import Place, key_lines

KEYS = st.sampled_from(["a", "b-c", "1", '"a b"', '"x.y"', "'[z]'", '"\\u00e9\\""', '"#"', '"="'])
NOISE = st.sampled_from(
    [
        *('"text"', '"a # b"', '"\\" ] }"', "'it = 1'", "1979-05-27 07:32:00", "1.5", "-inf", "true"),
        *('"""\n[[t]]\na = 1\n"""', "'''\n]\n'''", '""""two""""', '"""\\\\"""', "'''a''''", '"""\\\n  x"""'),
    ]
)
AFTER = st.sampled_from(["", " ", "\t# a = [1", " # ]"])


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Return a text in which ``@`` stands for the line of the key before it. No key is repeated in its table."""
    lines: list[str] = []
    for number in range(draw(st.integers(0, 8))):
        table = ".".join([f"t{number}", *draw(st.lists(KEYS, max_size=2))])
        array = f"array{draw(st.integers(0, 2))}"
        header = draw(st.sampled_from(["", f"[ {table} ]", f"[[{array}]]", f"[[{array}.b-c]]", f"[x.u{number}]"]))
        if header and (header != f"[[{array}.b-c]]" or any(line.startswith(f"[[{array}]]") for line in lines)):
            lines.append(header + draw(AFTER))
        lines += [draw(_assignment(f"k{number}_{each}")) + draw(AFTER) for each in range(draw(st.integers(0, 3)))]
        lines += draw(st.lists(st.sampled_from(["", "# [t]", "  "]), max_size=2))
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines)


@st.composite
def _assignment(draw: st.DrawFn, key: str) -> str:
    dotted = ".".join([key, *draw(st.lists(KEYS, max_size=2))])
    value = draw(
        st.one_of(
            st.just("@"),
            NOISE,
            st.lists(NOISE, max_size=2).map(lambda items: "[\n" + ",\n".join([*items, "@,\n[ @ ] # ]\n"]) + "]"),
            st.just("{ a = @, b.c = { d = [@, @] }, 'e' = '}' }"),
        )
    )
    return f"{dotted} = {value}"


def numbered(text: str) -> str:
    """Put the number of its line in place of every ``@``."""
    lines = text.split("\n")
    return "\n".join(line.replace("@", str(number)) for number, line in enumerate(lines, 1))


def leaves(value: Any, place: Place = ()) -> list[tuple[Place, Any]]:
    if isinstance(value, dict):
        return [each for key, below in value.items() for each in leaves(below, (*place, key))]
    if isinstance(value, list):
        return [each for index, below in enumerate(value) for each in leaves(below, (*place, index))]
    return [(place, value)]


@given(documents())
@example("[a.b]\nx = @\n[a]\ny = @\n[[c.d]]\n[[c.d]]\nz = @\n[c.d.e]\nw.v = @")
def test_every_key_is_found_on_its_line(template: str) -> None:
    text = numbered(template)
    lines = key_lines(text)
    for place, value in leaves(tomllib.loads(text)):
        assert place in lines
        if isinstance(value, int) and not isinstance(value, bool):
            assert lines[place] == value


@given(st.text(alphabet="[]{}=.,'\"#a \n\\", max_size=40))
@example("a=[")
def test_a_text_that_is_not_understood_has_fewer_lines_and_no_error(text: str) -> None:
    assert all(1 <= line <= text.count("\n") + 1 for line in key_lines(text).values())
