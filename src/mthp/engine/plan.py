"""Plans: the folios that a collapse would make of many PMD ranges, what it would copy and fill, and why not more.

A plan assumes that every attempt succeeds that the PTEs do not rule out. Other failures of a real kernel
(allocations, locked pages, races) are left to the backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mthp.eligibility import Trigger
from mthp.engine.attempts import Attempts
from mthp.engine.checks import PolicyChecks
from mthp.engine.planes import PlaneArrays, Planes
from mthp.engine.policy import DEFAULT_MTHP_MIN_ORDER, PmdOnly, Policy, Rules
from mthp.engine.policy_lookup import policy_named
from mthp.engine.walk import Walk
from mthp.errors import UsageError
from mthp.geometry import Geometry, geometry_for_ptes, geometry_named
from mthp.tunables import Tunables

Made = TypeVar("Made")
T = TypeVar("T", bound=np.generic)

PORTION_PTES = 1 << 22
"""PTEs to plan at a time: few enough that the working arrays stay in the processor's caches."""


class Plan:
    """The plan of a collapse of some PMD ranges. All but the walk itself is computed at first use.

    Attributes:
        policy: name of the policy.
        geometry: geometry of the machine.
        portion_ptes: PTEs to plan at a time.
    """

    portion_ptes = PORTION_PTES

    def __init__(self, policy: Policy, rules: Rules, planes: Planes) -> None:
        self.policy = policy.name
        self.geometry = rules.geometry
        self._planes = planes
        self._checks = PolicyChecks(policy, rules)

    def __len__(self) -> int:
        """Return the number of PMD ranges."""
        return len(self._planes.present)

    def _each(self, make: Callable[[slice, Walk], Made]) -> list[Made]:
        """Return the results of `make` for each block: a slice of the PMD ranges, and the walk over them.

        The walk over a single block is kept. Walks over several are repeated for each property that is read: their
        arrays are as large as the planes, and writing them to memory takes longer than the walk. Each is dropped
        before the next, which then finds its memory in the cache.
        """
        step = max(1, self.portion_ptes >> self.geometry.pmd_order)
        if 0 < len(self) <= step:
            return [make(slice(0, len(self)), self._only_walk)]
        blocks = (slice(start, min(start + step, len(self))) for start in range(0, len(self), step))
        return [make(rows, Walk(self._planes.chosen(rows), self._checks)) for rows in blocks]

    @cached_property
    def _only_walk(self) -> Walk:
        return Walk(self._planes, self._checks)

    @cached_property
    def orders(self) -> NDArray[np.int8]:
        """The order of the folio that each page would lie in afterwards: int8, shape (ranges, ptes_per_pmd).

        0 is a base page or the zero page, -1 is none; a page that is not collapsed keeps its present order.
        """
        orders = np.empty((len(self), self.geometry.ptes_per_pmd), np.int8)
        self._each(lambda rows, walk: walk.orders(orders[rows]))
        return orders

    @cached_property
    def made(self) -> NDArray[np.int8]:
        """The order of the folio that each page would be collapsed to: int8, shape as `orders`; 0 if none."""
        made = np.empty((len(self), self.geometry.ptes_per_pmd), np.int8)
        self._each(lambda rows, walk: walk.made(made[rows]))
        return made

    @cached_property
    def scanned_ptes(self) -> int:
        """The PTEs that one scan of all these PMD ranges reads."""
        return sum(self._each(lambda _, walk: walk.scanned_ptes()))

    @cached_property
    def scan_result(self) -> NDArray[np.int8]:
        """One :class:`~mthp.results.ScanResult` per PMD range: int8, shape (ranges,).

        SUCCEED if anything is collapsed, else what ended the scan, else the result of the last attempt, else FAIL.
        """
        return self._joined(self._each(lambda _, walk: walk.scan_result()), np.int8)

    @cached_property
    def resident(self) -> NDArray[np.int32]:
        """Pages with contents that are mapped now, per PMD range: int32, shape (ranges,)."""
        return self._joined(self._each(lambda _, walk: walk.resident()), np.int32)

    @property
    def copied(self) -> NDArray[np.int32]:
        """Pages with contents in the collapsed runs, per PMD range: int32, shape (ranges,)."""
        return self._copied_and_filled[0]

    @property
    def filled(self) -> NDArray[np.int32]:
        """None and zero PTEs that become memory of their own, per PMD range: int32, shape (ranges,). The bloat."""
        return self._copied_and_filled[1]

    @cached_property
    def _copied_and_filled(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        parts = self._each(lambda _, walk: walk.copied_and_filled)
        return self._joined([copied for copied, _ in parts], np.int32), self._joined(
            [filled for _, filled in parts], np.int32
        )

    @cached_property
    def attempts(self) -> Attempts:
        """All attempts, in the kernel's order."""
        parts = self._each(lambda rows, walk: replace(walk.attempts, range=walk.attempts.range + rows.start))
        return Attempts.joined(parts)

    @property
    def folios(self) -> Attempts:
        """The folios that would be made: the attempts that succeed, in the kernel's order."""
        return self.attempts.succeeded

    @staticmethod
    def _joined(parts: list[NDArray[T]], dtype: type[T]) -> NDArray[T]:
        return np.concatenate(parts) if parts else np.empty(0, dtype)


def plan_ranges(
    present: ArrayLike,
    *,
    policy: str | Policy = "mainline",
    orders: Iterable[int] | str | None = None,
    trigger: Trigger = "khugepaged",
    max_ptes_none: int | None = None,
    max_ptes_swap: int | None = None,
    max_ptes_shared: int | None = None,
    geometry: Geometry | str | None = None,
    mthp_min_order: int | None = None,
    **planes: Unpack[PlaneArrays],
) -> Plan:
    """Plan the collapse of some PMD ranges.

    Args:
        present: the pages that are mapped: bool or integer, shape (ranges, ptes_per_pmd).
        policy: a policy's name, or a :class:`~mthp.engine.policy.Policy`.
        orders: the enabled orders (or sizes, as ``"64K,2M"``); by default all that anonymous memory can have.
        trigger: ``khugepaged``; or ``madvise``, which ignores limits and the enabled orders as MADV_COLLAPSE does.
        max_ptes_none, max_ptes_swap, max_ptes_shared: khugepaged's limits per PMD range; by default the kernel's.
        geometry: geometry of the machine, or its name; by default one with this number of PTEs in a PMD range.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``; 3 by default.
        planes: other planes, as :class:`~mthp.engine.planes.Planes` defines them: ``zero``, ``swap``, ``guard``,
            ``shared``, ``lazyfree``, ``uffd``, ``unreferenced`` and ``filled``, bool or integer and of the shape of
            `present`; ``folio_order``, int8, the order of the folio that each page lies in now; ``pmd_mapped``,
            ``uffd_armed`` and ``droppable``, bool, shape (ranges,) or one for all.

    Raises:
        UsageError: an unknown policy or trigger, an order or limit that does not exist on this geometry, or planes
            with shapes that differ or contradict each other.
    """
    checked = Planes.checked(present, planes)
    ptes = checked.present.shape[1]
    if geometry is None:
        geometry = geometry_for_ptes(ptes)
    elif isinstance(geometry, str):
        geometry = geometry_named(geometry)
    if ptes != geometry.ptes_per_pmd:
        raise UsageError(f"present has {ptes} PTEs per range, but {geometry.name} has {geometry.ptes_per_pmd}")
    limits = {"max_ptes_none": max_ptes_none, "max_ptes_swap": max_ptes_swap, "max_ptes_shared": max_ptes_shared}
    rules = make_rules(
        geometry,
        orders=orders,
        trigger=trigger,
        tunables=Tunables.defaults(geometry).replaced(geometry, **limits),
        mthp_min_order=mthp_min_order,
    )
    return plan_planes(checked, policy_named(policy), rules)


def make_rules(
    geometry: Geometry,
    *,
    orders: Iterable[int] | str | None,
    trigger: Trigger,
    tunables: Tunables,
    mthp_min_order: int | None = None,
) -> Rules:
    """Return the checked rules of a plan.

    Raises:
        UsageError: as :func:`plan_ranges`.
    """
    if trigger not in ("khugepaged", "madvise"):
        raise UsageError(f"unknown trigger {trigger!r}", help="use khugepaged or madvise")
    if mthp_min_order is None:
        mthp_min_order = min(DEFAULT_MTHP_MIN_ORDER, geometry.pmd_order)
    enabled = geometry.anon_orders if orders is None else geometry.parse_orders(orders)
    return Rules(geometry, enabled, trigger, tunables.checked(geometry), geometry.check_order(mthp_min_order))


def plan_planes(planes: Planes, policy: Policy, rules: Rules) -> Plan:
    """Plan the collapse of PMD ranges with planes and rules that are already checked."""
    # collapse_file() (mm/khugepaged.c) makes only PMD folios, under every kernel's policy for anonymous memory.
    if rules.of_file:
        policy = PmdOnly()
    return Plan(policy, rules, planes)
