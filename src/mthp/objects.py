"""JSON objects, and their JSON Schema, from the classes of results: one description for both.

``JSON`` of a class names the keys of its object, as words separated by blanks:

==================  ===========================================================================================
word                key
==================  ===========================================================================================
``coverage``        the attribute of that name: a field, a property, or a method
``target=label``    the attribute `label`, under another name; ``rule=rule.name`` is an attribute of an attribute
``*plan``           all keys of the object in the attribute `plan`
``start:hex``       an address, as text
``error:null``      a text; null in place of an empty one
==================  ===========================================================================================

A method is called without arguments, or with the machine's geometry: the attribute `geometry` of the innermost object
that has one. A dataclass without ``JSON`` has all of its fields as keys. The schema is made from the annotations of
these attributes, so an attribute that was renamed, or has no type, raises an error when the schema is made.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import os
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

Schema = dict[str, Any]

ADDRESS: Schema = {"type": "string", "pattern": "^0x[0-9a-f]+$"}

_SCALARS: dict[object, Schema] = {
    type(None): {"type": "null"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
}


class _Key(NamedTuple):
    """One word of ``JSON``: the key, the path to its value, and the form of the value; key ``""`` is ``*``."""

    key: str
    path: tuple[str, ...]
    form: str


def items(value: object, geometry: object = None) -> Iterator[tuple[str, Any]]:
    """Yield the keys of the object of `value`, each with its value before conversion.

    Args:
        geometry: geometry of the enclosing object.
    """
    if isinstance(value, Mapping):
        # A single step, because another thread of the daemon may count meanwhile.
        yield from ((_key_text(key), each) for key, each in dict(value).items())
        return
    geometry = getattr(value, "geometry", geometry)
    for key, path, form in _keys_of(value):
        found: Any = value
        for name in path:
            found = getattr(found, name)
            if isinstance(found, types.MethodType):
                found = found(geometry) if found.__code__.co_argcount > 1 else found()
        if not key:
            yield from items(found, geometry)
        elif form == "hex":
            yield key, f"{found:#x}"
        else:
            yield key, (found or None) if form == "null" else found


def to_object(value: object, geometry: object = None) -> dict[str, Any]:
    """Return the JSON object of `value`, for json.dumps()."""
    geometry = getattr(value, "geometry", geometry)
    return {key: to_json(each, geometry) for key, each in items(value, geometry)}


def to_json(value: object, geometry: object = None) -> Any:
    """Return `value` in a form for json.dumps().

    Raises:
        TypeError: `value` has no form in JSON.
    """
    if isinstance(value, enum.Enum):
        return _key_text(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) or _is_object(type(value)):
        return to_object(value, geometry)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Set):
        return sorted(to_json(each) for each in value)
    if isinstance(value, Iterable):
        return [to_json(each, geometry) for each in value]
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def schema_of(name: str, *alternatives: tuple[type, ...]) -> Schema:
    """Return the JSON Schema of objects with `name` as their ``schema``.

    Args:
        alternatives: for each alternative, the classes with the keys of such an object.
    """
    defs: dict[str, Schema] = {}
    made = []
    for classes in alternatives:
        properties: Schema = {"schema": {"const": name}}
        for each in classes:
            properties |= _properties(each, defs)
        made.append(_object(properties))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "anyOf": made,
        "$defs": dict(sorted(defs.items())),
    }


def _is_object(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or hasattr(kind, "JSON")


def _keys_of(value: object) -> tuple[_Key, ...]:
    kind: Any = type(value)  # mypy does not know that a class is hashable
    return _keys(kind)


@functools.cache
def _keys(kind: Any) -> tuple[_Key, ...]:
    words = getattr(kind, "JSON", None)
    if words is None:
        return tuple(_Key(field.name, (field.name,), "") for field in dataclasses.fields(kind))
    return tuple(map(_parsed, words.split()))


def _parsed(word: str) -> _Key:
    word, _, form = word.partition(":")
    key, _, path = word.partition("=")
    key = key.lstrip("*") if not word.startswith("*") else ""
    return _Key(key, tuple((path or word.lstrip("*")).split(".")), form)


def _key_text(key: object) -> str:
    """Return a key as JSON has it: results by name, orders as numbers."""
    return key.name if isinstance(key, enum.Enum) and not isinstance(key, str) else str(key)


def _properties(kind: type, defs: dict[str, Schema]) -> Schema:
    found: Schema = {}
    for key, path, form in _keys(kind):
        hint: Any = kind
        for name in path:
            hint = _hint(hint, name)
        if not key:
            found |= _properties(hint, defs)
        elif form:
            found[key] = ADDRESS if form == "hex" else {"type": ["string", "null"]}
        else:
            found[key] = _schema(hint, defs)
    return found


def _hint(kind: type, name: str) -> Any:
    """Return the type of an attribute.

    Raises:
        TypeError: the attribute does not exist, or has no type.
    """
    hints = get_type_hints(kind, include_extras=True)
    if name in hints:
        return hints[name]
    found = getattr(kind, name, None)
    function = getattr(found, "fget", None) or getattr(found, "func", None) or found
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{kind.__name__} has no attribute {name!r} with a type")
    return get_type_hints(function, include_extras=True)["return"]


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _schema(hint: Any, defs: dict[str, Schema]) -> Schema:
    """Return the schema of a type; the schemas of classes are added to `defs`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return dict(_SCALARS[hint])
    if origin is Annotated:
        # A row of a table names its columns in the annotation; other annotations are keys of TOML.
        row = get_origin(arguments[0]) is dict
        return {**arguments[1](), "additionalProperties": False} if row else _schema(arguments[0], defs)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        parts = [_schema(each, defs) for each in arguments]
        if all(part.keys() == {"type"} for part in parts):
            return {"type": [part["type"] for part in parts]}
        return {"anyOf": parts}
    if origin is Counter:
        return {"type": "object", "additionalProperties": {"type": "integer"}}
    if origin in (dict, collections.abc.Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], defs)}
    if origin in (list, tuple, frozenset, collections.abc.Sequence, collections.abc.Iterable):
        return {"type": "array", "items": _schema(arguments[0], defs)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [_key_text(each) for each in hint]}
    if isinstance(hint, type) and _is_object(hint):
        # Entered before its properties are made, so that a class that contains itself ends here.
        if hint.__name__ not in defs:
            defs[hint.__name__] = {}
            defs[hint.__name__] = _object(_properties(hint, defs))
        return {"$ref": f"#/$defs/{hint.__name__}"}
    raise TypeError(f"{hint} has no form in JSON")
