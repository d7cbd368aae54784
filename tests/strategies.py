"""Hypothesis strategies for the engine: PMD ranges in every state that a plane can tell, and the rules over them.

Most faults of an engine like this sit where a count just reaches its limit and where a run ends at an aligned
offset. So limits are drawn from the edges more often than from the middle, run lengths are powers of two half of
the time, and each example takes its PTEs from a small palette of states, so that whole runs of one state occur.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mthp.engine import policy
from mthp.engine.plan import make_rules
from mthp.engine.planes import Planes
from mthp.geometry import MIN_ANON_ORDER, geometry_for_ptes
from mthp.ptes import ORDER_NONE
from mthp.tunables import Tunables
from oracle import Range, Rules

ROUNDS = int(os.environ.get("MTHP_TEST_ROUNDS", "1"))


def examples(count: int) -> int:
    """Return how many examples to try of a property whose share of the profile's 100 is `count`.

    MTHP_TEST_ROUNDS multiplies it.
    """
    return max(1, count * ROUNDS * settings().max_examples // 100)


SMALL_SIZES = (16, 32, 64)
"""PTEs per PMD range at which Hypothesis can search well."""

PLANES = ("present", "zero", "swap", "shared", "lazyfree", "unreferenced", "uffd", "folio_order", "guard")
RANGE_FLAGS = ("pmd_mapped", "uffd_armed", "droppable")


@dataclass(frozen=True)
class PteState:
    """One PTE, as a value of each plane."""

    present: int = 0
    zero: int = 0
    swap: int = 0
    shared: int = 0
    lazyfree: int = 0
    unreferenced: int = 0
    uffd: int = 0
    folio_order: int = 0
    guard: int = 0


NONE = PteState(folio_order=-1)
PAGE = PteState(present=1)
ZERO = PteState(present=1, zero=1)
SWAP = PteState(swap=1, folio_order=-1)

USUAL = (
    NONE,
    PAGE,
    ZERO,
    SWAP,
    PteState(present=1, shared=1),
    PteState(present=1, unreferenced=1),
    *(PteState(present=1, folio_order=order) for order in (2, 3, 4, 9)),
    PteState(present=1, shared=1, folio_order=2),
    PteState(swap=1, guard=1),
)
"""States of which a collapse takes some at least."""

STOPPING = (
    PteState(present=1, lazyfree=1),
    PteState(present=1, uffd=1),
    PteState(swap=1, uffd=1, folio_order=-1),
)
"""States that can end a whole range."""

MEANINGLESS = (
    PteState(shared=1, lazyfree=1, unreferenced=1, uffd=1, folio_order=3),
    PteState(present=1, zero=1, shared=1, lazyfree=1, unreferenced=1, uffd=1, folio_order=3),
    PteState(swap=1, shared=1, lazyfree=1, unreferenced=1, folio_order=3),
)
"""States with bits that say nothing where they stand, such as `shared` on a none PTE; they must change nothing."""

BACKGROUNDS = (NONE, PAGE, PAGE, SWAP, ZERO)


@st.composite
def pte_lists(draw: st.DrawFn, size: int) -> list[PteState]:
    """The PTEs of one PMD range: runs of a few states, noise of them, or one state with a few others strewn in."""
    palette = draw(st.lists(st.sampled_from(USUAL), min_size=1, max_size=4))
    palette += draw(st.lists(st.sampled_from(MEANINGLESS), max_size=1))
    if draw(st.integers(0, 5)) == 0:
        palette.append(draw(st.sampled_from(STOPPING)))
    folio_limit = size.bit_length() - 1
    palette = [replace(state, folio_order=min(state.folio_order, folio_limit)) for state in palette]
    state = st.sampled_from(palette)
    match draw(st.sampled_from(("runs", "noise", "strewn"))):
        case "runs":
            powers = [1 << order for order in range(size.bit_length())]
            length = st.one_of(st.sampled_from(powers), st.integers(1, max(2, size // 8)))
            runs = draw(st.lists(st.tuples(state, length), min_size=1, max_size=24))
            ptes = [pte for pte, count in runs for _ in range(count)]
            return (ptes * (size // len(ptes) + 1))[:size]
        case "noise" if size <= max(SMALL_SIZES):
            return draw(st.lists(state, min_size=size, max_size=size))
        case "noise":
            chooser = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
            return [palette[i] for i in chooser.integers(0, len(palette), size)]
        case _:
            ptes = [draw(st.sampled_from(BACKGROUNDS))] * size
            for place, pte in draw(st.lists(st.tuples(st.integers(0, size - 1), state), max_size=12)):
                ptes[place] = pte
            return ptes


@st.composite
def ranges(draw: st.DrawFn, size: int) -> Range:
    """Return one PMD range of `size` PTEs."""
    ptes = draw(pte_lists(size))
    planes = {name: [int(getattr(pte, name)) for pte in ptes] for name in PLANES}
    rarely = st.sampled_from((False, False, False, True))
    return Range(**planes, pmd_mapped=draw(st.integers(0, 9)) == 9, uffd_armed=draw(rarely), droppable=draw(rarely))


def limits(size: int) -> st.SearchStrategy[int]:
    """Return a limit of a PMD range of `size` PTEs, more often than not at an edge."""
    half = size // 2
    edges = [0, 1, 2, half // 2, half - 1, half, half + 1, size - 2, size - 1, size - 1]
    return st.one_of(st.sampled_from(edges), st.integers(0, size - 1))


@st.composite
def rules(draw: st.DrawFn, size: int) -> Rules:
    """Orders, trigger and limits for ranges of `size` PTEs."""
    pmd_order = size.bit_length() - 1
    every = list(range(MIN_ANON_ORDER, pmd_order + 1))
    orders = draw(
        st.one_of(
            st.just(frozenset(every)),
            st.just(frozenset({pmd_order})),
            st.frozensets(st.sampled_from(every), min_size=1),
            st.frozensets(st.sampled_from(every)).map(lambda some: some | {pmd_order}),
        )
    )
    return Rules(
        orders=orders,
        khugepaged=draw(st.integers(0, 4)) != 4,
        max_ptes_none=draw(limits(size)),
        max_ptes_swap=draw(limits(size)),
        max_ptes_shared=draw(limits(size)),
        mthp_min_order=draw(st.sampled_from(sorted({2, min(3, pmd_order), min(4, pmd_order), pmd_order}))),
    )


@dataclass(frozen=True)
class Problem:
    """Ranges of one size, and the rules over them."""

    ranges: list[Range]
    rules: Rules

    def arguments(self, *, omit_empty: bool = False) -> dict[str, Any]:
        """Return the arguments of ``mthp.plan_ranges`` that pose this problem, all but the policy.

        Args:
            omit_empty: leave planes out that hold nothing but their default.
        """
        planes: dict[str, NDArray[Any] | None] = {}
        for name in PLANES:
            plane = np.array([getattr(one, name) for one in self.ranges], dtype=np.int8)
            planes[name] = plane if name == "folio_order" else plane.astype(np.bool_)
            if omit_empty and name != "present" and not plane[plane > 0].any():
                planes[name] = None
        flags = {name: np.array([getattr(one, name) for one in self.ranges]) for name in RANGE_FLAGS}
        return {
            **planes,
            **flags,
            "orders": sorted(self.rules.orders),
            "trigger": "khugepaged" if self.rules.khugepaged else "madvise",
            "max_ptes_none": self.rules.max_ptes_none,
            "max_ptes_swap": self.rules.max_ptes_swap,
            "max_ptes_shared": self.rules.max_ptes_shared,
            "mthp_min_order": self.rules.mthp_min_order,
        }


@st.composite
def problems(draw: st.DrawFn, sizes: tuple[int, ...], max_ranges: int = 4) -> Problem:
    """Up to `max_ranges` ranges of one of `sizes`, and rules for them."""
    size = draw(st.sampled_from(sizes))
    return Problem(draw(st.lists(ranges(size), min_size=1, max_size=max_ranges)), draw(rules(size)))


def planes_of(problem: Problem, index: int) -> Planes:
    """Return the planes of one of a problem's ranges."""
    arguments = problem.arguments()
    planes = {name: arguments[name][index : index + 1] for name in (*PLANES, *RANGE_FLAGS)}
    planes["folio_order"] = np.where(planes["folio_order"] == ORDER_NONE, 0, planes["folio_order"])
    return Planes.checked(planes.pop("present"), planes)


def rules_of(problem: Problem) -> policy.Rules:
    """Return a problem's rules, as the engine has them."""
    geometry = geometry_for_ptes(problem.ranges[0].size)
    arguments = problem.arguments()
    limits = {name: arguments[name] for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")}
    return make_rules(
        geometry,
        orders=arguments["orders"],
        trigger=arguments["trigger"],
        tunables=Tunables.defaults(geometry).replaced(geometry, **limits),
        mthp_min_order=arguments["mthp_min_order"],
    )
