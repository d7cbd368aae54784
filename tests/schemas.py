"""Check the --json output of a command against the schema that `mthp schema` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from mthp.cli.schema_command import schema

Validate = Callable[[object], Iterator[Any]]


def check(command: str, answer: object) -> None:
    """Fail unless `answer` is as the schema of `command` says, without a key more or less."""
    for error in _validator(command)(answer):
        # Only the errors of the intended alternative help.
        meant = min(error.context, key=lambda each: len(each.message)) if error.context else error
        place = ".".join(map(str, meant.absolute_path))
        raise AssertionError(f"{command}: {place}: {meant.message[:500]}")


@cache
def _validator(command: str) -> Validate:
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        # Guests have what their distribution packages; here it is always there.
        return lambda answer: iter(())
    made = schema(command)
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made).iter_errors
