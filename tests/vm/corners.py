"""Cases from the corners: what random ones reach seldom.

Three things make a corner. States and kinds of mapping that are rarely found together: every state that a mapping
allows is combined with every other. Places: pages lie in aligned tiles, so that runs of every order are nearly full,
nearly empty, or cut by one page, and folios are shared in part. And limits: mostly the very number of pages that a
case has of a kind, one less, or one more, and as many referenced pages as a range with swap entries needs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mthp.geometry import Geometry
from vm.cases import NEVER_OLD, one_folio_a_block, random_orders
from vm.recorder import Spec

_EVERYWHERE = ("none", "none", "zero", "guard", "cold", "pinned")
_PRIVATE = ("swap", "swapcache", "swapped_back", "lazyfree", "lazyfree_dirty", "large", "large")
_SHARED = ("shared", "swap_shared", "large_shared")
_PROTECTED = ("uffdwp", "uffd_zero", "uffd_swap", "uffd_marker")
_FATAL = {"guard", "pinned", "lazyfree", *_PROTECTED}
"""One of them ends the scan of the whole range, or all that comes after an attempt: mostly they are left out."""

_KEPT_BY_THE_CHILD_TOO = {"swap", "swapcache", "large", "uffd_swap"}
"""States of pages that a child which keeps everything would share."""

_MAPPINGS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("anon", *_EVERYWHERE, *_PRIVATE, *_SHARED),
    ("uffd_wp_registered",): ("anon", *_EVERYWHERE, *_PRIVATE, *_SHARED, *_PROTECTED),
    ("uffd_missing_registered",): ("anon", *_EVERYWHERE, *_PRIVATE, *_SHARED),
    ("mlocked",): ("mlocked", *_EVERYWHERE, *_PRIVATE, *_SHARED),
    ("mlocked", "uffd_wp_registered"): ("mlocked", *_EVERYWHERE, *_PRIVATE, *_SHARED, *_PROTECTED),
    ("mlocked", "uffd_missing_registered"): ("mlocked", *_EVERYWHERE, *_PRIVATE, *_SHARED),
    ("droppable",): ("anon", *_EVERYWHERE, "large"),
}


def corner_specs(geometry: Geometry, seed: int, *, mthp: bool, without: frozenset[str] = frozenset()) -> Iterator[Spec]:
    """Cases without end; arguments as those of :func:`vm.cases.random_specs`."""
    mappings = [vma for vma in _MAPPINGS if mthp or "large" in _MAPPINGS[vma]]
    chance = random.Random(seed)
    while True:
        vma = chance.choice(((), (), (), *mappings))
        states = [state for state in _MAPPINGS[vma] if state not in without]
        if not states or states[0] in without:
            continue
        keeps_all = chance.random() < 0.15
        if keeps_all:
            states = [state for state in states if state not in _KEPT_BY_THE_CHILD_TOO]
        if chance.random() < 0.8:
            states = [state for state in states if state not in _FATAL]
        pages = _pages(chance, states, geometry, mthp=mthp)
        pages = _aged(chance, pages)
        yield Spec(
            trigger="madvise" if chance.random() < 0.15 else "khugepaged",
            orders=random_orders(chance, geometry) if mthp else (geometry.pmd_order,),
            limits=_limits(chance, pages),
            vma=vma,
            states=tuple(pages),
            child_keeps_all=keeps_all and any("shared" in page for page in pages),
        )


def _pages(chance: random.Random, states: list[str], geometry: Geometry, *, mthp: bool) -> list[str]:
    n = geometry.ptes_per_pmd
    background = chance.choice((states[0], states[0], states[0], "none"))
    chosen = chance.sample(sorted(set(states)), min(chance.choice((1, 2, 3, 6)), len(set(states))))
    pages = [background] * n
    tile = 1 << chance.randrange(geometry.pmd_order)
    share = chance.choice((0.02, 0.1, 0.3, 0.7))
    for first in range(0, n, tile):
        if chance.random() < share:
            _place(chance, pages, (first, tile), chance.choice(chosen), geometry, mthp=mthp)
    # Single pages, which replace others.
    for _ in range(chance.choice((0, 1, 3, n // 32))):
        pages[chance.randrange(n)] = chance.choice([state for state in (*chosen, states[0]) if "large" not in state])
    return one_folio_a_block(_shared_in_part(chance, pages) if {"large", "large_shared"} <= set(states) else pages)


def _place(
    chance: random.Random, pages: list[str], tile: tuple[int, int], state: str, geometry: Geometry, *, mthp: bool
) -> None:
    """Fill a tile, most of one, or a page of it with a state."""
    first, size = tile
    if state.startswith("large"):
        order = max(2, size.bit_length() - 1) if mthp else geometry.pmd_order
        first &= -(1 << order)
        pages[first : first + (1 << order)] = [f"{state}:{order}"] * (1 << order)
        return
    wanted = chance.choice((1, max(1, size - 1), size, size))
    for i in chance.sample(range(first, first + size), wanted):
        pages[i] = state


def _shared_in_part(chance: random.Random, pages: list[str]) -> list[str]:
    """Large folios of which a child keeps some pages only: now and then, all of a case."""
    if chance.random() < 0.5:
        return pages
    large = [i for i, page in enumerate(pages) if page.startswith("large")]
    done = list(pages)
    for i in chance.sample(large, len(large) // chance.choice((1, 2, 4, 8, 64))):
        done[i] = f"{chance.choice(('large', 'large_shared'))}:{pages[i].partition(':')[2]}"
    return done


def _aged(chance: random.Random, pages: list[str]) -> list[str]:
    """Return the pages with some that look unused: few, about half, or nearly all; pages of a folio alike."""
    n = len(pages)
    able = [i for i, page in enumerate(pages) if page not in NEVER_OLD and not page.startswith("large")]
    swapped = any("swap" in page for page in pages)
    old = chance.choice((0, 0, n // 16, len(able) - n // 2 + chance.randint(-1, 1) if swapped else len(able) - 1))
    done = list(pages)
    for i in chance.sample(able, min(max(0, old), len(able))):
        done[i] += "~"
    if chance.random() < 0.2:
        done = [page + "~" if page.startswith("large") else page for page in done]
    return done


def _limits(chance: random.Random, pages: list[str]) -> tuple[int, int, int]:
    n = len(pages)
    kinds = [page.rstrip("~").partition(":")[0] for page in pages]
    none, swap, shared = (
        sum(kind in of for kind in kinds)
        for of in (
            ("none", "zero", "uffd_zero"),
            ("swap", "swap_shared", "uffd_swap", "uffd_marker", "guard"),
            ("shared", "large_shared"),
        )
    )

    def near(count: int) -> int:
        wide = chance.choice((n - 1, n - 1, n - 1, n - 2, 1, 0))
        return min(n - 1, max(0, chance.choice((count, count - 1, count + 1, wide, wide, wide))))

    return near(none), near(swap), near(shared)
