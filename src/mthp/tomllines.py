"""Find the lines of keys in a TOML text, for errors, because tomllib does not report them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress

Place = tuple[str | int, ...]
"""The place of a value: keys, and positions in arrays from 0."""

_TOKEN = re.compile(
    r"(?P<blank>(?:[ \t]|\#[^\n]*)+)"
    r"|(?P<newline>\r?\n)"
    # Up to two quotation marks may stand before the three that end a text.
    r'|(?P<texts>"""(?:[^"\\]|\\.|"(?!""))*+"{3,5}|\'\'\'(?:[^\']|\'(?!\'\'))*+\'{3,5})'
    r'|(?P<text>"(?:[^"\\\n]|\\.)*+"|\'[^\'\n]*\')'
    r"|(?P<mark>[\[\]{}=,.])"
    r"|(?P<word>[^\s\[\]{}=,.\#\"']+)",
    re.DOTALL,
)


def key_lines(text: str) -> dict[Place, int]:
    """Return the line, from 1, of every key, table and element of an array of a TOML text.

    The text has been accepted by tomllib. The scan ends where it does not understand it, and the rest has no line.
    """
    scan = _Scan(text)
    with suppress(_LostError, RecursionError, tomllib.TOMLDecodeError):
        scan.document()
    return scan.lines


class _LostError(Exception):
    """The scan met a part that it does not understand."""


class _Scan:
    """One pass over the tokens of a TOML text."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Place, int] = {}
        self._tokens = _tokens(text)
        self._counts: dict[Place, int] = {}
        self._kind = self._token = ""
        self._line = 0

    def _next(self) -> None:
        self._kind, self._token, self._line = next(self._tokens, ("end", "", 0))

    def _take(self, mark: str) -> bool:
        if self._kind != "mark" or self._token != mark:
            return False
        self._next()
        return True

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise _LostError

    def _skip_newlines(self) -> None:
        while self._kind == "newline":
            self._next()

    def document(self) -> None:
        """Scan headers and assignments up to the end."""
        self._next()
        table: Place = ()
        while True:
            self._skip_newlines()
            if self._kind == "end":
                return
            if self._kind == "mark" and self._token == "[":
                table = self._header()
            else:
                self._assignment(table)
            if self._kind not in ("newline", "end"):
                raise _LostError

    def _header(self) -> Place:
        """Scan ``[table]`` or ``[[table]]``, and return its place."""
        line = self._line
        self._expect("[")
        is_array = self._take("[")
        keys = self._key()
        self._expect("]")
        place: Place = ()
        for number, key in enumerate(keys):
            place = (*place, key)
            if is_array and number == len(keys) - 1:
                self._expect("]")
                self._counts[place] = self._counts.get(place, -1) + 1
            self._put(place, line)
            # A table below an array of tables belongs to the last element.
            if place in self._counts:
                place = (*place, self._counts[place])
                self._put(place, line)
        # A table may be named after a table below it. Its own header is its line.
        self.lines[place] = line
        return place

    def _assignment(self, table: Place) -> None:
        line = self._line
        place = table
        for key in self._key():
            place = (*place, key)
            self._put(place, line)
        self._expect("=")
        self._value(place)

    def _key(self) -> list[str]:
        """Scan a key, and return its parts."""
        parts: list[str] = []
        while True:
            if self._kind == "text":
                # tomllib resolves the escapes.
                parts += tomllib.loads(f"{self._token} = 0")
            elif self._kind == "word":
                parts.append(self._token)
            else:
                raise _LostError
            self._next()
            if not self._take("."):
                return parts

    def _value(self, place: Place) -> None:
        if self._take("["):
            self._array(place)
        elif self._take("{"):
            self._inline_table(place)
        elif self._kind in ("text", "texts", "word"):
            # Numbers have points, and a date may have a blank before its time.
            while self._kind in ("text", "texts", "word") or (self._kind, self._token) == ("mark", "."):
                self._next()
        else:
            raise _LostError

    def _array(self, place: Place) -> None:
        index = 0
        while True:
            self._skip_newlines()
            if self._take("]"):
                return
            if self._kind == "end":
                raise _LostError
            self._put((*place, index), self._line)
            self._value((*place, index))
            self._skip_newlines()
            index += 1
            if not self._take(","):
                self._expect("]")
                return

    def _inline_table(self, place: Place) -> None:
        while True:
            self._skip_newlines()
            if self._take("}"):
                return
            self._assignment(place)
            self._skip_newlines()
            if not self._take(","):
                self._expect("}")
                return

    def _put(self, place: Place, line: int) -> None:
        self.lines.setdefault(place, line)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield kind, text and line of each token of a TOML text except blanks and comments."""
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _LostError
        if match.lastgroup != "blank":
            yield match.lastgroup or "", match[0], line
        line += match[0].count("\n")
        at = match.end()
