"""Cases to record: random ones, the same for the same seed, and smaller variants of one that differs.

A random case is drawn in three steps: what it is about (a palette of states, and a mapping that allows them), the
pages, as runs of those states over a background, and the switches. Large folios come as aligned blocks, whole or with
pages of them replaced.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mthp.geometry import Geometry
from vm.recorder import Spec

_PLAIN = ("anon", "none", "zero")
_SWAPPING = ("swap", "swap_shared", "swapcache", "swapped_back")
_USE = ("cold", "lazyfree", "lazyfree_dirty", "pinned", "guard")


@dataclass(frozen=True)
class Theme:
    """The subject of a case.

    Attributes:
        states: the palette; the first is the background.
        vma: words of the mapping.
        weight: how often it is drawn, against the others.
    """

    states: tuple[str, ...]
    vma: tuple[str, ...] = ()
    weight: int = 10


THEMES = {
    "plain": Theme(_PLAIN, weight=15),
    "large": Theme((*_PLAIN, "large"), weight=20),
    "large_shared": Theme((*_PLAIN, "large_shared", "large", "shared"), weight=15),
    "swap": Theme((*_PLAIN, *_SWAPPING), weight=20),
    "shared": Theme((*_PLAIN, "shared", "swap_shared")),
    "use": Theme((*_PLAIN, *_USE), weight=15),
    "rare": Theme(("anon", *_USE), weight=15),
    "mixed": Theme((*_PLAIN, *_SWAPPING, "shared", "cold", "lazyfree_dirty", "large", "large_shared"), weight=20),
    "mlocked": Theme(("mlocked", "none", "zero", "swap"), ("mlocked",)),
    "mlocked_large": Theme(("mlocked", "none", "large"), ("mlocked",), 5),
    "droppable": Theme(("anon", "none", "zero"), ("droppable",), 5),
    "uffd": Theme(("anon", "uffdwp", "uffd_zero", "uffd_swap", "uffd_marker"), ("uffd_wp_registered",), 20),
    "uffd_armed": Theme(("anon", "none", "zero", "swap"), ("uffd_wp_registered",)),
    "uffd_missing": Theme(("anon", "none", "zero", "shared"), ("uffd_missing_registered",)),
}

NEVER_OLD = {"none", "zero", "uffd_zero", "uffd_marker", "swap", "swap_shared", "uffd_swap", "guard", "cold"}


def random_specs(geometry: Geometry, seed: int, *, mthp: bool, without: frozenset[str] = frozenset()) -> Iterator[Spec]:
    """Cases without end.

    Args:
        geometry: of the guest.
        seed: of all chance.
        mthp: whether the kernel collapses to orders below PMD order, and faults them in.
        without: states that the kernel cannot stage.
    """
    names = [name for name, theme in THEMES.items() if theme.states[0] not in without]
    chance = random.Random(seed)
    while True:
        theme = THEMES[chance.choices(names, [THEMES[name].weight for name in names])[0]]
        palette = tuple(state for state in theme.states if state not in without)
        yield Spec(
            trigger="madvise" if chance.random() < 0.15 else "khugepaged",
            orders=random_orders(chance, geometry) if mthp else (geometry.pmd_order,),
            limits=_limits(chance, geometry.ptes_per_pmd),
            vma=theme.vma,
            states=tuple(random_states(chance, palette, geometry, mthp=mthp)),
        )


def random_orders(chance: random.Random, geometry: Geometry) -> tuple[int, ...]:
    """Orders to enable: all, the PMD's alone, one, or some."""
    every = range(2, geometry.pmd_order + 1)
    kind = chance.random()
    if kind < 0.2:
        return tuple(every)
    if kind < 0.35:
        return (geometry.pmd_order,)
    if kind < 0.6:
        return (chance.choice(every),)
    return tuple(sorted(chance.sample(every, chance.randint(2, min(5, len(every))))))


def _limits(chance: random.Random, n: int) -> tuple[int, int, int]:
    none = chance.choice((0, n - 1, n - 1, n - 1, n // 8, chance.randrange(n)))
    swap = chance.choice((0, n // 8, n - 1, n - 1, chance.randrange(n)))
    shared = chance.choice((0, n // 2, n - 1, n - 1, chance.randrange(n)))
    return none, swap, shared


def random_states(chance: random.Random, palette: tuple[str, ...], geometry: Geometry, *, mthp: bool) -> list[str]:
    """Draw the state of each page: runs of some of the palette over its first word."""
    n = geometry.ptes_per_pmd
    chosen = [state for state in palette[1:] if chance.random() < 0.5] or [chance.choice(palette)]
    pages = [palette[0]] * n
    # From a page here and there to a range that is mostly something else.
    wanted = chance.choice((1, 2, n // 64 + 1, n // 8, n // 2))
    longest = chance.choice((1, 4, n // 16, n // 4)) or 1
    # Large folios first: what replaces some of their pages comes afterwards.
    for state in sorted(chosen, key=lambda state: not state.startswith("large")):
        placed = 0
        while placed < wanted:
            if state.startswith("large"):
                placed += _place_block(chance, pages, state, chance.choice(_block_orders(geometry, mthp=mthp)))
                continue
            length = chance.randint(1, longest)
            first = chance.randrange(n)
            old = "~" if state not in NEVER_OLD and chance.random() < 0.15 else ""
            pages[first : first + length] = [state + old] * len(pages[first : first + length])
            placed += length
    return one_folio_a_block(pages)


def _block_orders(geometry: Geometry, *, mthp: bool) -> list[int]:
    return list(range(2, geometry.pmd_order + 1)) if mthp else [geometry.pmd_order]


def _place_block(chance: random.Random, pages: list[str], state: str, order: int) -> int:
    size = 1 << order
    first = chance.randrange(len(pages) // size) * size
    old = "~" if chance.random() < 0.15 else ""
    pages[first : first + size] = [f"{state}:{order}{old}"] * size
    return size


def one_folio_a_block(pages: list[str]) -> list[str]:
    """Return the pages with small pages for each block of a large folio that another one overlaps.

    A folio is faulted in as a whole, so no two may overlap, and whether it looks used is one thing for all its pages.
    """
    done = list(pages)
    largest = max((_order(page) for page in pages), default=0)
    for order in range(largest, 0, -1):
        size = 1 << order
        for first in range(0, len(done), size):
            block = done[first : first + size]
            mine = {page for page in block if _order(page) == order}
            if not mine:
                continue
            kept = sorted(mine)[0]
            old = "~" if kept.endswith("~") else ""
            for i, page in enumerate(block, first):
                if _order(page) == order:
                    done[i] = page.rstrip("~") + old
                elif _order(page):
                    done[i] = f"{kept.partition(':')[0]}:{order}{old}"
    return done


def _order(state: str) -> int:
    return int(state.rstrip("~").partition(":")[2] or 0)


def shrunk(spec: Spec, differs: Callable[[Spec], bool], tries: int = 200) -> Spec:
    """Return the smallest case found in `tries` tries for which `differs` still holds."""
    left = tries

    def check(candidate: Spec) -> bool:
        nonlocal left
        left -= 1
        return candidate != spec and left >= 0 and differs(candidate)

    changed = True
    while changed and left > 0:
        changed = False
        for candidate in _simpler(spec):
            if left > 0 and check(candidate):
                spec, changed = candidate, True
                break
    return spec


def _simpler(spec: Spec) -> Iterator[Spec]:
    """Variants of a case with less to them, the boldest first."""
    n = len(spec.states)
    for passes in range(1, spec.passes):
        yield replace(spec, passes=passes)
    for order in spec.orders:
        if len(spec.orders) > 1:
            yield replace(spec, orders=tuple(other for other in spec.orders if other != order))
    yield from (replace(spec, vma=tuple(w for w in spec.vma if w != word)) for word in spec.vma)
    background = "mlocked" if "mlocked" in spec.vma else "anon"
    size = n
    while size:
        for first in range(0, n, size):
            part = spec.states[first : first + size]
            for state in (background, "none"):
                if any(page not in (background, "none") for page in part) or (state == background and "none" in part):
                    pages = [*spec.states[:first], *[state] * len(part), *spec.states[first + size :]]
                    yield replace(spec, states=tuple(pages))
        size //= 2
    for i, value in enumerate((n - 1, n - 1, n - 1)):
        if spec.limits[i] != value:
            limits = list(spec.limits)
            limits[i] = value
            yield replace(spec, limits=(limits[0], limits[1], limits[2]))
