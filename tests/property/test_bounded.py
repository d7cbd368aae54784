"""Readers of foreign text: any input ends in a value or in a UsageError, and no bound is passed first."""

from __future__ import annotations

import json
import tomllib
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp import bounded
from mthp.bounded import DEPTH, FACTOR_VARIABLE, Bound, inflate, parse_json, parse_toml, read_small, read_toml
from mthp.errors import UsageError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
JSON_LIKE = st.text(alphabet='[]{}",:\\\n 0123456789eE.-+truefalsnN\x00é') | st.text() | st.binary()
TOML_WORDS = (
    *("a", "=", "\n", ".", "[", "]", "[[", "]]", "{", "}", ",", '"', '"""', "'", "'''", "#", "\\", "1", "0x", "inf"),
    *("a = 1\n", "[t]\n", "[[t]]\n", 'b = "x"\n', "9" * 30, "9" * 5000, "0x" + "f" * 40, "1979-05-27", "é", "\x00"),
)
TOML_LIKE = st.lists(st.sampled_from(TOML_WORDS)).map("".join)


@given(VALUES)
def test_what_is_json_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@given(JSON_LIKE)
def test_anything_else_is_refused(text: str | bytes) -> None:
    try:
        found = parse_json(text)
    except UsageError:
        return
    assert found == json.loads(text)


@given(TOML_LIKE)
def test_toml_is_read_or_refused(text: str) -> None:
    try:
        found = parse_toml(text)
    except UsageError:
        return
    assert found == tomllib.loads(text) or "nan" in repr(found)


@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")])
def test_nesting(opens: str, closes: str) -> None:
    depth = DEPTH.most // len(opens.replace('"a":', ""))
    parse_json(opens * depth + "1" * (opens[-1] == ":") + closes * depth)
    for beyond in (depth + 1, 2000, 200_000):
        with pytest.raises(UsageError, match="levels of nesting"):
            parse_json(opens * beyond + "1" + closes * beyond)
        with pytest.raises(UsageError):
            parse_json(opens * beyond)


def test_brackets_in_strings_are_not_nesting() -> None:
    text = "[{" * 500
    assert parse_json(json.dumps([text, f'"{text}\\'])) == [text, f'"{text}\\']
    assert parse_toml(f'a = \'{text}\' # {text}\nb = """{text}"""') == {"a": text, "b": text}


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 2000 + "]" * 2000,
        "a = " + "{a=" * 2000 + "1" + "}" * 2000,
        "a." * 2000 + "a = 1",
        "  " + "a." * 2000 + "a = 1",
        "[" + "a." * 2000 + "a]",
        "[" + "a." * 60 + "a]\nb." + "b." * 60 + "c = 1",
        "a" + " . a" * 500_000 + " = 1",
        "a = " + "9" * 5000,
        "a = 0x" + "f" * 100_000,
        "a = 9223372036854775808",
        "a = " + "1" * (2 << 20),
        "\xff",
    ],
)
def test_toml_beyond_bounds(text: str) -> None:
    with pytest.raises(UsageError):
        parse_toml(text.encode("latin-1"))


def test_advice_of_python_is_not_passed_on() -> None:
    with pytest.raises(UsageError, match="not TOML: a number of thousands of digits"):
        parse_toml("a = " + "9" * 5000)


@pytest.mark.parametrize("text", ["1" + "0" * 5000, "18446744073709551617", "-1e999", "NaN", "Infinity", b"\xff", "é["])
def test_numbers_and_bytes_that_are_not_json(text: str | bytes) -> None:
    with pytest.raises(UsageError):
        parse_json(text)


def test_many_small_values_are_counted_before_they_are_made() -> None:
    with pytest.raises(UsageError, match="values in JSON"):
        parse_json("[" + "[]," * bounded.JSON_VALUES.most + "[]]")
    with pytest.raises(UsageError, match="bytes of JSON"):
        parse_json(" " * 101, size=Bound(100, "bytes of JSON"))


def test_the_error_says_the_bound_and_how_to_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Bound(10, "sheep")
    with pytest.raises(UsageError, match=r"too many sheep: 35, and 10 are read at most") as caught:
        bound.check(35)
    assert f"{FACTOR_VARIABLE}=4" in caught.value.help
    monkeypatch.setenv(FACTOR_VARIABLE, "4")
    bound.check(35)
    with pytest.raises(UsageError, match="far more"):
        bound.check(10**5000)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1.5", "9" * 5000, "65537", "\uff11"])
def test_factors_that_cannot_be(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(FACTOR_VARIABLE, text)
    with pytest.raises(UsageError, match=FACTOR_VARIABLE):
        parse_json("[]")


@given(st.binary(max_size=200))
def test_inflating(data: bytes) -> None:
    bound = Bound(50, "words")
    packed = zlib.compress(data)
    if len(data) <= 100:
        assert inflate(packed, bound, unit=2) == data
    else:
        with pytest.raises(UsageError, match="words"):
            inflate(packed, bound, unit=2)
    for damaged in (data, packed[:-1], b""):
        with pytest.raises(UsageError):
            inflate(damaged, bound)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(b"a = 1")
    assert read_toml(path) == ("a = 1", {"a": 1})
    with pytest.raises(UsageError, match=r"file.toml: too many things"):
        read_small(path, Bound(4, "things"))
    with pytest.raises(UsageError, match="too many things"):
        read_small("/dev/zero", Bound(4, "things"))
    path.write_bytes(b"a = \xff")
    with pytest.raises(UsageError, match=r"file.toml: not TOML: not UTF-8 at byte 4"):
        read_toml(path)
    for odd in (tmp_path, tmp_path / "none", "nul\0"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_toml(odd)
