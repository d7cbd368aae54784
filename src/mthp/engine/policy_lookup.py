"""Policies by name: our own, those that installed packages declare, and classes in files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mthp.engine.policy import BUILT_IN, OWN, Policy
from mthp.errors import UsageError
from mthp.toml import text

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "mthp.policies"


def policy_names() -> list[str]:
    """Return the names of all policies: built-in, our own, then those that packages declare."""
    ours = BUILT_IN | OWN
    return [*ours, *sorted(set(_declared()) - set(ours))]


def policy_named(policy: str | Policy) -> Policy:
    """Return the policy of that name; a :class:`Policy` is returned unchanged.

    Raises:
        UsageError: no policy has that name, or the object that a package declares under it is not a policy.
    """
    if isinstance(policy, Policy):
        return policy
    ours = BUILT_IN | OWN
    if policy in ours:
        return ours[policy]()
    declared = _declared()
    if policy not in declared:
        raise UsageError(f"unknown policy {policy!r}", help=f"use {', '.join(policy_names())}")
    try:
        made = declared[policy].load()()
    except Exception as error:  # The code of another package may raise anything.
        raise UsageError(f"policy {policy!r} cannot be loaded: {error}", help=_whose(declared[policy])) from error
    if not isinstance(made, Policy):
        raise UsageError(
            f"policy {policy!r} is a {type(made).__name__}, not an mthp.Policy", help=_whose(declared[policy])
        )
    if not isinstance(getattr(made, "name", None), str):
        raise UsageError(f"policy {policy!r} has no attribute `name`", help=_whose(declared[policy]))
    return made


def known_policy(name: object) -> str:
    """Return the name of a policy, if a policy has that name.

    Raises:
        UsageError: `name` is not a text, or as :func:`policy_named`.
    """
    return policy_named(text(name)).name


def policy_in_file(text: str) -> Policy:
    """Run a file, and return a policy of the class that ``path/to/file.py:Class`` names.

    Raises:
        UsageError: the file cannot be run, or does not have such a policy.
    """
    path, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"mthp_policy_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{text!r} is not a class in a Python file", help="write file.py:Class")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        # The author of the file needs one line, not our traceback.
        raise UsageError(f"policy file {path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        own = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Policy)]
        named = sorted(key for key in own if vars(module)[key].__module__ == module.__name__)
        raise UsageError(
            f"policy file {path} has no subclass of mthp.Policy called {name!r}",
            help=f"use {', '.join(f'{path}:{key}' for key in named)}" if named else "derive one from mthp.Policy",
        )
    try:
        policy = found()
    except TypeError as error:
        raise UsageError(f"policy {name} cannot be made: {error}", help="define its missing methods") from error
    if not isinstance(getattr(policy, "name", None), str):
        raise UsageError(f"policy {name} has no attribute `name`", help='write name = "..." in the class')
    return policy


def _whose(point: EntryPoint) -> str:
    """Return where a faulty policy is declared, as a clause."""
    package = f" by {point.dist.name}" if point.dist else ""
    return f"it is declared{package} as {point.value}"


def _declared() -> dict[str, EntryPoint]:
    """Return the policies that installed packages declare, by name, without importing them."""
    # Imported here, because it costs more than the rest of this module, and few commands need it.
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
