"""A plan as a picture: one cell for each PMD range, in address order, coloured by the largest folio made in it."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.results import ScanResult
from mthp.units import format_size

SpacePlan = Any
"""A :class:`mthp.engine.space_plan.SpacePlan`. Its module imports this one, so this one does not import it."""

ACROSS = 64
"""Cells in a row: 64 ranges of 2M are 128M."""

CELL = 9
"""Width of a cell in pixels, with the gap."""

MOST = 64 * 64
"""The most cells: with more ranges a cell stands for several, and shows the first."""

_HEAD = 56
"""Pixels above the cells, for three lines of text."""

_LINE = 16
"""Pixels from one line of text to the next."""

_HUGE, _LEFT = -1, -2
"""Kinds of cells that are not an order: already mapped by a PMD entry, and left as it is."""

_COLOURS = {_HUGE: "#1b7837", _LEFT: "#bbbbbb"}

_SHADES = ("#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
"""Colours of the orders, the smallest order first; the largest has the last."""


def picture(plan: SpacePlan, most: int = MOST) -> str:
    """Return an SVG picture of a plan, of at most `most` cells."""
    kinds = _kinds(plan)
    step = max(1, -(-len(kinds) // most))
    shown = kinds[::step]
    lines = -(-len(shown) // ACROSS)
    present = sorted(set(shown.tolist()), reverse=True)
    width, bottom = ACROSS * CELL, _HEAD + max(lines, 1) * CELL + 8
    cells = "".join(
        f'<rect x="{at % ACROSS * CELL}" y="{_HEAD + at // ACROSS * CELL}" width="{CELL - 1}" height="{CELL - 1}"'
        f' fill="{_colour(kind, plan)}"/>'
        for at, kind in enumerate(shown.tolist())
    )
    legend, x = "", 0
    for kind in present:
        name = _name(kind, plan)
        taken = 24 + 7 * len(name)
        if x + taken > width:
            x, bottom = 0, bottom + _LINE
        legend += f'<rect x="{x}" y="{bottom}" width="8" height="8" fill="{_colour(kind, plan)}"/>'
        legend += f'<text x="{x + 12}" y="{bottom + 8}">{escape(name)}</text>'
        x += taken
    height = bottom + 12
    size = plan.geometry.label(plan.coverage_order)
    says = (
        f"policy {plan.policy}: {size} from {100 * plan.coverage:.1f}% to {100 * plan.coverage_after:.1f}%,"
        f" {format_size(plan.copied_bytes)} copied, {format_size(plan.filled_bytes)} of bloat"
    )
    each = f"a cell is {step} ranges of " if step > 1 else "a cell is a range of "
    label = escape(plan.label)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' font-family="sans-serif" font-size="12" role="img" aria-label="{escape(says)}"><title>{label}</title>'
        f'<g fill="currentColor"><text y="14" font-weight="bold">{label}</text><text y="30">{escape(says)}</text>'
        f'<text y="46">{each}{plan.geometry.label(plan.geometry.pmd_order)}</text>{legend}</g>{cells}</svg>'
    )


def _kinds(plan: SpacePlan) -> NDArray[np.int64]:
    """Return the kind of each PMD range: the largest order made in it, `_HUGE` or `_LEFT`."""
    # A plan may have several parts of one PMD range, or folios in ranges that have no row.
    size = np.uint64(plan.geometry.pmd_size)
    numbers, at = np.unique(np.concatenate([plan.ranges.address, plan.folios.address]) // size, return_inverse=True)
    kinds = np.full(len(numbers), _LEFT, np.int64)
    of_range, of_folio = at[: len(plan.ranges)], at[len(plan.ranges) :]
    kinds[of_range[plan.ranges.scan_result == ScanResult.PMD_MAPPED]] = _HUGE
    np.maximum.at(kinds, of_folio, plan.folios.order.astype(np.int64))
    return kinds


def _colour(kind: int, plan: SpacePlan) -> str:
    if kind < 0:
        return _COLOURS[kind]
    return _SHADES[max(0, len(_SHADES) - 1 - (plan.geometry.pmd_order - kind))]


def _name(kind: int, plan: SpacePlan) -> str:
    size = plan.geometry.label(plan.geometry.pmd_order)
    return {_HUGE: f"mapped as {size} already", _LEFT: "left as it is"}.get(
        kind, f"becomes {plan.geometry.label(max(kind, 0))}"
    )
