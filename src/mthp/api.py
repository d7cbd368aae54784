"""The library's verbs: inspect, plan and collapse a target, in one call each."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mthp.census import Census, take_census
from mthp.collapsing import CollapseOptions, CollapseReport, collapse_space
from mthp.errors import UsageError
from mthp.planning import PlanOptions, SpacePlan, plan_space
from mthp.targets import Target, open_target, refuse_ancestor

_PLAN_FIELDS = frozenset(f.name for f in dataclasses.fields(PlanOptions))


def inspect(target: Target) -> Census:
    """Count the pages of `target` by folio order, per mapping and in all.

    Args:
        target: a PID, ``"self"``, or the path of a snapshot.

    Raises:
        UsageError, TargetVanishedError, NotPermittedError, UnsupportedError: as
            :func:`mthp.targets.open_target`.
    """
    with open_target(target) as space:
        return take_census(space)


def plan(target: Target, **options: Any) -> SpacePlan:
    """Plan the collapse of `target`, without changing anything.

    Args:
        target: a PID, ``"self"``, or the path of a snapshot.
        options: the fields of :class:`mthp.planning.PlanOptions`.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`; an option that does not exist.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.targets.open_target`.
    """
    with open_target(target) as space:
        return plan_space(space, _plan_options(options))


def collapse(target: Target, **options: Any) -> CollapseReport:
    """Collapse `target` now, as planned, and say what came of it.

    Args:
        target: a PID, or ``"self"``.
        options: the fields of :class:`mthp.planning.PlanOptions`, and of
            :class:`mthp.collapsing.CollapseOptions` but for its `plan`.

    Raises:
        UsageError: as :func:`plan`; or `target` is an ancestor of this process.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.collapsing.collapse_space`.
    """
    refuse_ancestor(target)
    with open_target(target) as space:
        return collapse_space(space, _collapse_options(options))


def collapse_buffer(buffer: Any, **options: Any) -> CollapseReport:
    """Collapse memory of this process: the whole PMD ranges within a NumPy array, an mmap or another buffer.

    Everything there that holds anything is collapsed to the PMD order, shared memory too (which an mmap is by
    default), unless `options` say otherwise. Needs no rights.

    Args:
        buffer: an object with the buffer protocol, contiguous.
        options: as for :func:`collapse`.

    Raises:
        UsageError: not a contiguous buffer; as :func:`plan`.
        UnsupportedError: as :func:`mthp.collapsing.collapse_space`.
    """
    start, size = _memory_of(buffer)
    chosen: dict[str, Any] = {
        "policy": "pmd-only",
        "trigger": "madvise",
        "include_file": True,
        "within": (start, start + size),
    }
    with open_target("self") as space:
        return collapse_space(space, _collapse_options(chosen | options))


def _memory_of(buffer: Any) -> tuple[int, int]:
    """Address and size in bytes of the memory behind `buffer`."""
    try:
        array = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(f"a {type(buffer).__name__} is not a buffer that can be collapsed: {error}") from error
    if not array.flags.forc:
        raise UsageError("the array is not contiguous: collapse the array that it is a view of")
    return array.__array_interface__["data"][0], array.nbytes


def _plan_options(options: dict[str, Any]) -> PlanOptions:
    try:
        return PlanOptions(**options)
    except TypeError as error:
        raise UsageError(str(error).replace("PlanOptions.__init__()", "plan options:")) from None


def _collapse_options(options: dict[str, Any]) -> CollapseOptions:
    planning = {name: value for name, value in options.items() if name in _PLAN_FIELDS}
    others = {name: value for name, value in options.items() if name not in _PLAN_FIELDS}
    try:
        return CollapseOptions(plan=_plan_options(planning), **others)
    except TypeError as error:
        raise UsageError(str(error).replace("CollapseOptions.__init__()", "collapse options:")) from None
