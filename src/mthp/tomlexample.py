"""Print the tables of a TOML file with every key, its default, and its meaning.

The text is made from the dataclasses that :mod:`mthp.toml` reads the file into: their fields, defaults and docstrings.
An optional key is a comment, so the text means the same as an empty file, and a comment of the form
``# key = value`` can be uncommented.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mthp.errors import MthpError
from mthp.toml import Reader, readers_of
from mthp.units import format_size

WIDTH = 120
"""Columns of a line."""

INDENT = 32
"""Column at which meanings begin."""

_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}

UNCOMMENTED = re.compile(r'^# (?=[\w"]+ = |\[+\w+\]+$)', re.MULTILINE)
"""What to remove to uncomment every key."""


def table_text(
    kind: type, header: str, *, examples: Mapping[str, Any] | None = None, optional: bool = False, keys: str = ""
) -> str:
    """Return a table with every key of a dataclass.

    Args:
        kind: the dataclass.
        header: the line above the keys, such as ``"[machine]"``; ``""`` for none.
        examples: values of keys that are required, and of keys without a default.
        optional: make a comment of the whole table.
        keys: lines between the header and the keys.
    """
    meanings, readers = attributes(kind), readers_of(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lines = [f"{'# ' * optional}{header}"] * bool(header) + [keys] * bool(keys)
    for key, (name, reader) in readers.items():
        default = _default(fields[name])
        required = default is dataclasses.MISSING
        value = (examples or {})[key] if default in (dataclasses.MISSING, None, ()) else _written(default, reader)
        meaning = meanings.get(name, "") + " (required)" * required
        lines += _line(key, value, meaning, comment=optional or not required)
    return "\n".join(lines) + "\n"


def values_text(header: str, values: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    """Return a table of keys that are not the fields of a dataclass, each with its value, as comments."""
    found = [_line(key, value, meanings.get(key, ""), comment=True) for key, value in values.items()]
    return "\n".join([header, *(line for lines in found for line in lines)]) + "\n"


def commented(text: str) -> str:
    """Return a text as comments, wrapped to the width of a line."""
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, WIDTH - 2)) + "\n"


def attributes(kind: type) -> dict[str, str]:
    """Return the meaning of each attribute from the docstring of a class; nothing under ``python -OO``.

    TOML has no null, so "not set (None)" in Python becomes "not set" here.
    """
    found: dict[str, str] = {}
    _, _, text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    for line in re.sub(r"\n {8,}", " ", text).splitlines():
        names, colon, meaning = line.strip().partition(": ")
        if colon:
            found |= dict.fromkeys(names.split(", "), re.sub(r" \((None|empty)\)|`", "", meaning.rstrip(".")))
    return found


def summary(kind: type) -> str:
    """Return the first paragraph of the docstring of a class; nothing under ``python -OO``."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("`", "").split())


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _line(key: str, value: Any, meaning: str, *, comment: bool) -> Iterator[str]:
    shown = key if re.fullmatch("[a-z_]+", key) else json.dumps(key)
    start = f"{'# ' * comment}{shown} = {json.dumps(value)}"
    rest = textwrap.wrap(meaning, WIDTH - INDENT - 2)
    if not rest:
        yield start
        return
    # A value that reaches into the column of meanings has its meaning on the next line.
    if len(start) >= INDENT:
        yield start
    else:
        yield f"{start:{INDENT}}# {rest.pop(0)}"
    yield from (f"{'':{INDENT}}# {line}" for line in rest)


def _written(value: Any, reader: Reader | str) -> Any:
    """Return a value as TOML writes it: the first notation that is read as this value."""
    if isinstance(value, bool | str) or isinstance(reader, str) or (isinstance(value, int) and not value):
        return value
    for text in _notations(value):
        try:
            if reader(text) == value:
                return text
        except MthpError:
            continue
    return value


def _notations(value: Any) -> Iterator[str]:
    if isinstance(value, int | float):
        yield f"{100 * value:g}%"
        yield _duration(round(value * 1e9))
        yield _duration(int(value))
        yield format_size(int(value))
    yield str(value)


def _duration(nanoseconds: int) -> str:
    if not nanoseconds:
        return "0s"
    unit = next(unit for unit, length in _NANOSECONDS.items() if nanoseconds % length == 0)
    return f"{nanoseconds // _NANOSECONDS[unit]}{unit}"
