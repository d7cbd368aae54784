"""Cases of splits and trims: a collapse, writes to split_huge_pages, MADV_COLD, and actions between them.

The actions prevent a split, or change its result: pins, locks,
forks, pages that are unmapped, moved away or zeroed. They come before or after the collapse, and between the splits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mthp.geometry import Geometry
from vm.cases import random_states
from vm.recorder import Spec

Call = tuple[str | int, ...]

_PALETTES = (
    ("anon", "none", "zero"),
    ("anon", "none", "zero"),
    ("none", "anon"),
    ("anon", "none", "zero", "large"),
    ("anon", "none", "large"),
    ("anon", "none", "swap", "swapcache", "swapped_back"),
    ("anon", "none", "shared", "large_shared"),
    ("anon", "none", "cold", "pinned"),
)

_LOCKED = ("mlocked", "none", "zero")

_BETWEEN = ("fork", "mlock", "pin", "dontneed", "move", "zero", "fill", "cold")


def split_specs(geometry: Geometry, seed: int, *, mthp: bool, without: frozenset[str] = frozenset()) -> Iterator[Spec]:
    """The named cases, then random ones without end; arguments as those of :func:`vm.cases.random_specs`."""
    chance = random.Random(seed)
    limit = geometry.ptes_per_pmd - 1
    yield from _named(geometry)
    while True:
        locked = chance.random() < 0.07
        palette = _LOCKED if locked else chance.choice(_PALETTES)
        states = random_states(chance, tuple(s for s in palette if s not in without), geometry, mthp=True)
        if geometry.name == "arm64-16k" and set(states) == {f"large:{geometry.pmd_order}"}:
            # Some of its entries have the processor's contiguous bit, so another collapse unmaps it in more than one go
            # (folio_pte_batch): it is partially mapped for a moment, which nothing but a counter shows.
            continue
        trim = chance.random() < 0.35
        yield Spec(
            trigger="trim" if trim else "split",
            orders=(geometry.pmd_order,),
            limits=(limit, limit, limit),
            vma=("mlocked",) if locked else (),
            states=tuple(states),
            calls=tuple(_calls(chance, geometry, trim=trim, forked=any("shared" in state for state in states))),
        )


def _named(geometry: Geometry) -> Iterator[Spec]:
    """One case for each thing that may happen to a range before its collapse, or between that and the split."""
    n, limit = geometry.ptes_per_pmd, geometry.ptes_per_pmd - 1
    order = max(2, geometry.pmd_order // 2)
    size, part = 1 << order, n // 4
    collapse, small, base, cold = ("collapse",), ("split", 0, 1, order), ("split", 0, n, 0), ("cold", 0, 1)
    cases: dict[str, tuple[Call, ...]] = {
        "pinned before": (("pin", 1, 1), collapse, small, base),
        "pinned after": (collapse, ("pin", 1, 1), small, cold, base),
        "pinned one of the small folios": (collapse, small, ("pin", 1, 1), base, cold),
        "locked": (collapse, small, base, cold),
        "locked after": (collapse, ("mlock",), small, base, cold),
        "locked between": (collapse, small, ("mlock",), base, cold),
        "forked before": (("fork",), collapse, small, base),
        "forked after": (collapse, ("fork",), small, small, cold, base),
        "forked between": (collapse, small, ("fork",), cold, base, base),
        "forked and written": (collapse, ("fork",), ("fill", part, part), small, small, base),
        "swapped in part": (collapse, small, cold, base),
        "shared before": (collapse, small, cold, base),
        "partially mapped": (collapse, ("dontneed", 1, part), small, base),
        "partially mapped small folios": (collapse, small, ("dontneed", 1, part), base),
        "one page mapped": (collapse, ("dontneed", 1, n - 1), small, base),
        "moved": (collapse, ("move", part, part), small, base),
        "moved small folios": (collapse, small, ("move", 1, part), base),
        "zero-filled": (collapse, ("zero", part, part), small, base),
        "zeroes of small folios": (collapse, small, ("zero", 0, size), cold, base),
        "smaller already": (collapse, small, small, ("split", 0, n, order + 1), ("split", 0, n, geometry.pmd_order)),
        "order 1": (collapse, ("split", 0, 1, 1), small, ("split", 0, 2, 1)),
        "around a page": (collapse, ("split_at", 0, 1, 0, 1), ("split_at", n - 1, 1, 2, part)),
        "around a page outside": (
            collapse,
            ("split_at", 0, 1, order, n),
        ),
        "nothing there": (small, cold, ("split_at", n - 1, 1, 0, 0)),
        "cold as a whole": (collapse, ("cold", 0, n), cold),
        "cold in part": (collapse, ("cold", 0, n - 1)),
        "cold small folio": (collapse, small, ("cold", 0, size), cold),
    }
    # Holes first, where the splits begin; then pages and holes in turn.
    plain = ["none"] * size + ["anon" if i % 3 else "none" for i in range(n - size)]
    states = {
        "locked": ["mlocked" if state == "anon" else state for state in plain],
        "swapped in part": [*plain[:part], *["swap"] * part, *plain[2 * part :]],
        "shared before": [*plain[:part], *["shared"] * part, *plain[2 * part :]],
    }
    for about, calls in cases.items():
        trim = not any(str(call[0]).startswith("split") for call in calls)
        yield Spec(
            trigger="trim" if trim else "split",
            orders=(geometry.pmd_order,),
            limits=(limit, limit, limit),
            vma=("mlocked",) if about == "locked" else (),
            states=tuple(states.get(about, plain)),
            calls=calls,
            about=about,
        )


def _calls(chance: random.Random, geometry: Geometry, *, trim: bool, forked: bool) -> list[Call]:
    """Return calls: mostly a collapse, zeroes, then a split or a trim, and mostly one action between."""
    n = geometry.ptes_per_pmd
    calls: list[Call] = [("collapse",)] if chance.random() < 0.9 else []
    if trim or chance.random() < 0.5:
        calls += [("zero", *_run(chance, n, chance.choice((1, n // 8, n // 2)))) for _ in range(chance.randint(1, 2))]
    if trim:
        lengths = (1, 1, 1, 1, 4, n // 4, n)
        calls += [("cold", *_run(chance, n, chance.choice(lengths))) for _ in range(chance.randint(1, 3))]
    else:
        calls += _splits(chance, geometry)
    if chance.random() < 0.6:
        name = chance.choice([word for word in _BETWEEN if word != "fork" or not forked])
        numbers = (
            () if name in ("fork", "mlock") else _run(chance, n, 1 if name == "pin" else chance.choice((1, n // 8)))
        )
        calls.insert(chance.randint(0, len(calls)), (name, *numbers))
    return calls


def _splits(chance: random.Random, geometry: Geometry) -> list[Call]:
    """Writes, largest order first in most cases, each for one page in most."""
    n = geometry.ptes_per_pmd
    orders = [chance.choice((0, *range(2, geometry.pmd_order))) for _ in range(chance.randint(1, 4))]
    if chance.random() < 0.8:
        orders.sort(reverse=True)
    if chance.random() < 0.08:
        orders[-1] = chance.choice((1, geometry.pmd_order))
    calls: list[Call] = []
    for order in orders:
        first, count = _run(chance, n, chance.choice((1, 1, 1, 1, n // 16 or 1, n)))
        if chance.random() < 0.3:
            calls.append(
                ("split_at", first, count, order, chance.choice((chance.randrange(n), chance.randrange(2 * n))))
            )
        else:
            calls.append(("split", first, count, order))
    return calls


def _run(chance: random.Random, n: int, longest: int) -> tuple[int, int]:
    count = longest if longest in (1, n) else chance.randint(1, longest)
    return chance.randrange(n - count + 1), count
