"""Make dataclasses from the tables of a TOML file, and report all of its errors at once.

A table is a dataclass, and a key of it is a field; the field's type defines how the value is written:

=====================================  ==========================================================================
type                                   value
=====================================  ==========================================================================
``Annotated[X, read]``                 a value that `read` accepts: a function that raises UsageError for all others
``Annotated[X, "word"]``               the same, by the document's own reader of that name (:class:`TomlDocument`)
``bool``, ``str``, ``Literal[...]``    true or false; a text; one of some words
``tuple[X, ...]``                      one value, or a non-empty list of values
``X | None``                           X; TOML has no null
=====================================  ==========================================================================

A field called ``pause_ns`` is the key ``pause``, because in a file the unit stands beside the number. An unknown key is
an error, because a misspelled limit would have no effect.

Errors name their line (:mod:`mthp.tomllines`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mthp.bounded import parse_toml, read_toml
from mthp.errors import MthpError, UsageError
from mthp.text import clean
from mthp.tomllines import Place, key_lines
from mthp.units import above_zero

Reader = Callable[[Any], Any]
"""Returns the meaning of a TOML value, or raises UsageError."""

MAX_ERRORS = 20
"""Errors of a file that are printed; the rest is counted."""

_T = TypeVar("_T")


class TomlDocument:
    """A TOML file while it is read. Errors are collected until :meth:`check` raises all of them.

    Args:
        text: the source of the tables; "" if unknown, so that errors have no line.
        data: the tables.
        readers: readers of the types that are annotated with a word.
    """

    def __init__(self, text: str, data: dict[str, Any], name: str, readers: Mapping[str, Reader] | None = None) -> None:
        self._text, self._data, self._name = text, data, name
        self.readers = dict(readers or {})
        self._errors: dict[tuple[Place, str, str], None] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str], readers: Mapping[str, Reader] | None = None) -> TomlDocument:
        """Read the file at `path`.

        Raises:
            UsageError: the file cannot be read, or is not TOML.
        """
        text, data = read_toml(path)
        return cls(text, data, os.fspath(path), readers)

    @classmethod
    def parse(cls, text: str, name: str, readers: Mapping[str, Reader] | None = None) -> TomlDocument:
        """Read a text.

        Raises:
            UsageError: the text is not TOML.
        """
        return cls(text, parse_toml(text), name, readers)

    @property
    def text(self) -> str:
        """The text of the file."""
        return self._text

    def where(self, *place: str | int) -> str:
        """Return the file and the line of `place`."""
        return _at_line(self._name, _line_at(place, key_lines(self._text)))

    def table(self, kind: type[_T], *place: str | int, beside: Sequence[str] = ()) -> _T | None:
        """Return a table as a dataclass; None if a required value is missing or wrong.

        Args:
            beside: keys of the table that are read elsewhere.
        """
        readers = readers_of(kind)  # type: ignore[arg-type]  # a class is hashable
        found = self.values(place, readers, beside=beside)
        written = self._table_at(place)
        for key in _required(kind):
            if key not in written:
                self.refuse((*place, key), "is missing")
        return None if any(readers[key][0] not in found for key in _required(kind)) else kind(**found)

    def values(
        self, place: Place, readers: Mapping[str, tuple[str, Reader | str]], *, beside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return the valid values of a table; collect errors for the others.

        Args:
            readers: by key, the name for the returned value, and its reader.
            beside: keys of the table that are read elsewhere.
        """
        known = sorted({*readers, *beside})
        found = {}
        for key, value in self._table_at(place).items():
            if key in readers:
                name, reader = readers[key]
                with self.at(*place, key):
                    found[name] = self._reader(reader)(value)
            elif key not in known:
                # Matching is slow, and a hostile file may have a hundred thousand such keys.
                close = difflib.get_close_matches(key, known, n=1) if len(self._errors) < MAX_ERRORS else []
                meant = f"did you mean {close[0]!r}? " if close else ""
                self.refuse((*place, key), "is an unknown key", help=f"{meant}known are {', '.join(known)}")
        return found

    def tables(self, key: str) -> list[Place]:
        """Return the places of an array of tables."""
        tables = self._data.get(key, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.refuse((key,), "is not a list of tables", help=f"write [[{key}]] on a line of its own, for each")
            return []
        return [(key, index) for index in range(len(tables))]

    def keys(self, *place: str | int) -> list[str]:
        """Return the keys of a table."""
        return list(self._table_at(place))

    def value(self, *place: str | int) -> Any:
        """Return the value at a place; None if there is none."""
        value: Any = self._data
        for part in place:
            value = value.get(part) if isinstance(value, dict) else value[part]
        return value

    def _table_at(self, place: Place) -> dict[str, Any]:
        table = self.value(*place)
        if table is not None and not isinstance(table, dict):
            # The heading of a table within a list does not say in which one of the list it is.
            inline = any(isinstance(part, int) for part in place)
            how = f"{place[-1]} = {{ ... }}" if inline else f"[{shown_place(place)}] on a line of its own"
            self.refuse(place, "is not a table", help=f"write {how}")
        return table if isinstance(table, dict) else {}

    def _reader(self, reader: Reader | str) -> Reader:
        return self.readers[reader] if isinstance(reader, str) else reader

    def refuse(self, place: Place, message: str, *, help: str = "") -> None:
        """Collect an error about `place`."""
        self._errors[place, f"{shown_place(place)} {message}" if place else message, help] = None

    def refused(self, *place: str | int) -> bool:
        """Return whether there is an error at or below `place`."""
        return any(each[: len(place)] == place for each, *_ in self._errors)

    @contextmanager
    def at(self, *place: str | int) -> Iterator[None]:
        """Collect an error that is raised in the block as one about `place`."""
        try:
            yield
        except MthpError as error:
            before = f"{shown_place(place)}: " if place else ""
            self._errors[place, f"{before}{error.message}", error.help] = None

    def check(self) -> None:
        """Raise all collected errors as one.

        Raises:
            UsageError: the first error, with the others in its help.
        """
        if not self._errors:
            return
        lines = key_lines(self._text)
        errors = [(_line_at(place, lines), message, remedy) for place, message, remedy in self._errors]
        errors.sort(key=lambda error: error[0])
        shown = [(f"{_at_line(self._name, line)}: {message}", remedy) for line, message, remedy in errors]
        (first, remedy), others = shown[0], shown[1:MAX_ERRORS]
        # Errors are printed line by line, so a name from the file must not contain a line's end.
        also = [clean(f"also {message}" + (f" ({more})" if more else "")) for message, more in others]
        if len(shown) > MAX_ERRORS:
            also.append(f"and {len(shown) - MAX_ERRORS} more")
        raise UsageError(first, help="\n".join([*([remedy] if remedy else []), *also]))


@functools.cache
def readers_of(kind: type) -> dict[str, tuple[str, Reader | str]]:
    """Return the keys of a dataclass, each with the name of its field and the reader of its value."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        _key_of(field.name): (field.name, reader)
        for field in dataclasses.fields(kind)
        if field.init and (reader := _reader_of(hints[field.name])) is not None
    }


def _key_of(name: str) -> str:
    return name.removesuffix("_ns")


def _required(kind: type) -> list[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return [_key_of(each.name) for each in fields if each.default is missing and each.default_factory is missing]


def _reader_of(hint: Any) -> Reader | str | None:
    """Return the reader of values of a type; None for a type without TOML values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found: Reader | str = next(word for word in arguments[1:] if isinstance(word, str) or callable(word))
        return found
    if origin is Literal:
        return one_of(*arguments)
    if origin in (Union, types.UnionType):
        return next((_reader_of(each) for each in arguments if each is not type(None)), None)
    if origin is tuple:
        reader = _reader_of(arguments[0])
        return many(reader) if callable(reader) else None
    return {bool: flag, str: text}.get(hint)


def shown_place(place: Sequence[str | int]) -> str:
    """Return a place in the form that errors use: ``rule 2.match.uid``, with positions from 1."""
    shown = ""
    for part in place:
        if isinstance(part, int):
            shown += f" {part + 1}"
        else:
            shown += ("." if shown else "") + (part if re.fullmatch(r"[\w-]{1,40}", part) else repr(part[:40]))
    return shown


def text(value: Any) -> str:
    """Return a text, or refuse another value."""
    if not isinstance(value, str):
        raise UsageError(f"{_shown(value)} is not a text in quotes")
    return value


def flag(value: Any) -> bool:
    """Return true or false, or refuse another value."""
    if not isinstance(value, bool):
        raise UsageError(f"{_shown(value)} is not true or false")
    return value


def whole(lowest: int = 0, highest: int | None = None) -> Reader:
    """Return a reader of whole numbers within bounds."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{_shown(value)} is not a whole number")
        if value < lowest or (highest is not None and value > highest):
            allowed = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
            raise UsageError(f"{value} is out of range", help=f"it may be {allowed}")
        return value

    return read


def positive(reader: Reader) -> Reader:
    """Return a reader that accepts what `reader` does, if it is above 0."""

    def read(value: Any) -> Any:
        number = reader(value)
        above_zero(value, number)
        return number

    return read


def one_of(*words: str) -> Reader:
    """Return a reader of one of some words."""

    def read(value: Any) -> str:
        if value not in words:
            raise UsageError(f"{_shown(value)} is not known", help=f"it may be {', '.join(words)}")
        return str(value)

    return read


def many(reader: Reader) -> Reader:
    """Return a reader of one value or a list of them, which makes a tuple without duplicates."""

    def read(value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UsageError("an empty list has no effect", help="leave it out, or add a value")
        return tuple(dict.fromkeys(reader(each) for each in values))

    return read


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _at_line(name: str, line: int) -> str:
    return f"{name}:{line}" if line else name


def _line_at(place: Place, lines: Mapping[Place, int]) -> int:
    """Return the line of a place, or of the table in which it is missing; 0 if unknown."""
    while place:
        if place in lines:
            return lines[place]
        place = place[:-1]
    return 0
