"""Read untrusted input within bounds: small files, JSON, TOML and deflated bytes.

A file that arrives by mail may be made to hurt its reader: brackets nested a hundred thousand deep, a number of a
million digits, four kilobytes that inflate to eight gibibytes. So every reader of this package names its bounds as
:class:`Bound`, and checks them before it allocates. Each is far above what mthp writes itself. For larger input
:data:`FACTOR_VARIABLE` in the environment multiplies all bounds, and the error names the factor that it takes.

All errors are :class:`~mthp.errors.UsageError`. None of them repeats more than a few words of the input.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mthp.errors import UsageError

FACTOR_VARIABLE = "MTHP_INPUT_FACTOR"
"""The environment variable that multiplies every bound on input: a whole number, 1 by default."""

MAX_FACTOR = 1 << 16
"""The largest factor. Above it a bound would exceed the memory of any machine of today."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The most of something that is read.

    Attributes:
        most: the number, before :data:`FACTOR_VARIABLE` multiplies it.
        what: the counted things, in the plural, for the error: ``"bytes of JSON"``.
    """

    most: int
    what: str

    @property
    def now(self) -> int:
        """The number, multiplied by the factor of the environment.

        Raises:
            UsageError: the environment variable is not a factor.
        """
        return self.most * factor()

    def check(self, count: int) -> None:
        """Check that `count` is within the bound.

        Raises:
            UsageError: `count` exceeds the bound.
        """
        if count > self.now:
            self.exceeded(count)

    def exceeded(self, count: int | None = None) -> NoReturn:
        """Raise the error for `count`, or for an unknown number above the bound."""
        found = "more" if count is None else f"{count:,}" if count < 1 << 64 else "far more"
        needed = 2 * factor() if count is None else math.ceil(min(count, 1 << 64) / self.most)
        raise UsageError(
            f"too many {self.what}: {found}, and {self.now:,} are read at most",
            help=f"set {FACTOR_VARIABLE}={needed} in the environment if you trust its source: it multiplies every bound"
            if needed <= MAX_FACTOR
            else "",
        )


DEPTH = Bound(64, "levels of nesting")
"""Levels of nesting in JSON and TOML. mthp writes 5; at some hundred, Python's own recursion ends."""

JSON_BYTES = Bound(64 << 20, "bytes of JSON")
"""Bytes. A snapshot's description takes 170 bytes a mapping: this is six times the mappings of vm.max_map_count."""

JSON_VALUES = Bound(1 << 22, "values in JSON")
"""Values. One takes up to 100 bytes of memory and may be 2 bytes of text, so the bound on bytes does not suffice."""

TOML_BYTES = Bound(1 << 20, "bytes of TOML")
"""Bytes. A rules file with a thousand rules is 100 KiB; Python's parser takes a second for this bound."""

KEY_PARTS = Bound(64, "parts of a dotted key")
"""Parts of a dotted key. The parser's time grows with their square."""

DIGITS = 20
"""Digits of a whole number: 2**64 has 20."""

_JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_JSON_STRUCTURE = re.compile(r"[^\[\]{},:]++")
_TOML_TEXT = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+"""|\'\'\'(?:[^\']++|\'(?!\'\'))*+\'\'\''
    r'|"(?:[^"\\\n]++|\\.)*+"|\'[^\'\n]*+\'|#[^\n]*+',
    re.DOTALL,
)
_BRACKETS = str.maketrans("{}", "[]")


def factor() -> int:
    """Return the factor set in the environment.

    Raises:
        UsageError: the variable is not a whole number within bounds.
    """
    text = os.environ.get(FACTOR_VARIABLE, "1")
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_FACTOR:
        raise UsageError(
            f"{FACTOR_VARIABLE} in the environment is not a factor: {text[:40]!r}",
            help=f"use a whole number from 1 to {MAX_FACTOR}, or unset it",
        )
    return int(text)


def read_small(path: str | os.PathLike[str], bound: Bound) -> bytes:
    """Return the contents of the file at `path`; for a pipe, until its writer closes it.

    Raises:
        UsageError: the file cannot be read, or is larger than `bound`.
    """
    try:
        with Path(path).open("rb") as file:
            # Not by the size that stat(2) reports: a pipe has none, and a file may grow meanwhile.
            data = file.read(bound.now + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{os.fspath(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > bound.now:
        with named(path):
            bound.exceeded()
    return data


class named:  # noqa: N801 - reads as a statement
    """Prefix the message of every UsageError raised in the block with the name of a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UsageError) and not error.message.startswith((f"{self._path}: ", f"{self._path} ")):
            raise UsageError(f"{self._path}: {error.message}", help=error.help) from error


def parse_json(text: bytes | str, *, size: Bound = JSON_BYTES) -> Any:
    """Return the value of a JSON text with finite numbers of at most 64 bits.

    Raises:
        UsageError: the text is not JSON, not UTF-8, or beyond a bound.
    """
    size.check(len(text))
    try:
        if isinstance(text, bytes):
            text = text.decode()
        _check_json(text)
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_no_number)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {_said(error)}") from error


def _check_json(text: str) -> None:
    """Check the number of values and the nesting on the text without its strings."""
    # So few brackets cannot nest too deep, and most texts are small: the regular expressions cost more than parsing.
    if text.count("[") + text.count("{") + text.count(",") + text.count(":") <= DEPTH.most:
        return
    structure = _JSON_STRUCTURE.sub("", _JSON_STRING.sub("", text))
    JSON_VALUES.check(len(structure) - structure.count("]") - structure.count("}"))
    _check_depth(re.sub("[,:]+", "", structure))


def _check_depth(brackets: str) -> None:
    """Check the nesting of a text of brackets alone: removing empty pairs once removes one level."""
    rest = brackets.translate(_BRACKETS)
    for _ in range(DEPTH.now):
        if "[]" not in rest:
            return
        rest = rest.replace("[]", "")
    if rest:
        DEPTH.exceeded()


def parse_toml(text: bytes | str) -> dict[str, Any]:
    """Return the tables of a TOML text with whole numbers of at most 64 bits, as TOML requires.

    Raises:
        UsageError: the text is not TOML, not UTF-8, or beyond a bound.
    """
    TOML_BYTES.check(len(text))
    try:
        if isinstance(text, bytes):
            text = text.decode()
        bare = _TOML_TEXT.sub("0", text)
        _check_depth(re.sub(r"[^\[\]{}]+", "", bare))
        # Without the look-behind the search starts at every letter of a long word, which takes quadratic time.
        if re.search(rf"(?<![\w \t-])[ \t]*+(?:[\w-]*+[ \t]*+\.[ \t]*+){{{KEY_PARTS.now}}}", bare):
            KEY_PARTS.exceeded()
        data = tomllib.loads(text)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not TOML: {_said(error)}", help="it must be TOML (toml.io)") from error
    _check_tables(data)
    return data


def read_toml(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Return the text and the tables of the TOML file at `path`.

    Raises:
        UsageError: the file cannot be read, or as :func:`parse_toml`; the message begins with the path.
    """
    data = read_small(path, TOML_BYTES)
    with named(path):
        tables = parse_toml(data)
    return data.decode(), tables


def _check_tables(data: dict[str, Any]) -> None:
    """Check numbers and nesting of parsed TOML, because several headers may nest one table in another."""
    waiting: list[tuple[Any, int]] = [(data, 1)]
    deepest = DEPTH.now
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list):
            if depth > deepest:
                DEPTH.exceeded()
            waiting += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise UsageError(
                "a whole number has more than 64 bits", help="TOML has none larger than 9223372036854775807"
            )


def inflate(data: bytes, bound: Bound, *, unit: int = 1) -> bytes:
    """Return the inflated bytes of the zlib stream `data`.

    Args:
        bound: the most units of `unit` bytes.

    Raises:
        UsageError: `data` inflates to more, or is damaged.
    """
    most = bound.now * unit
    stream = zlib.decompressobj()
    try:
        # One byte more than allowed shows that there is more, without inflating the rest.
        inflated = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise UsageError(f"damaged: {error}") from error
    if len(inflated) > most:
        bound.exceeded()
    if not stream.eof:
        raise UsageError("damaged: compressed data that is cut short")
    return inflated


def _whole(digits: str) -> int:
    if len(digits) > DIGITS + 1 or abs(number := int(digits)) > 1 << 64:
        raise UsageError("a whole number has more than 64 bits")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise UsageError("a number is too large")
    return number


def _no_number(word: str) -> NoReturn:
    raise UsageError(f"not JSON: {word} is not a number")


def _said(error: Exception) -> str:
    """Return the first line of a parser's message, which repeats parts of the input."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if type(error) is ValueError:
        # Python's own message, which advises to change a setting of Python.
        return "a number of thousands of digits"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    lines = str(error).split("\n")
    return lines[0][:200] or type(error).__name__
