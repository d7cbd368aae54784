"""Policies: which folio sizes the memory of a PMD range deserves.

A policy answers three questions. The rest (the walk over the range, the checks of a page) is the same for all policies,
in :mod:`mthp.engine.walk` and :mod:`mthp.engine.checks`.

1. *Which orders does it walk?* :meth:`Policy.orders_walked`
2. *Is a run full enough to be tried?* :meth:`Policy.full_enough`
3. *How many none, swapped and shared PTEs may a run have when it is collapsed?* :meth:`Policy.limits`

Its class attributes say how the walk goes on after a failure. Those of ``rfc``, ``rfc2`` and ``per-order`` were
recorded from kernels built with the series (``docs/policies.md``).

The methods get all runs of an order in all PMD ranges at once, so they return arrays. A custom policy is a small
class::

    class ThreeQuarters(mthp.Policy):
        \"\"\"Collapse a run when three quarters of it have contents.\"\"\"

        name = "three-quarters"

        def limits(self, order, rules):
            return Limits(none=(1 << order) // 4, swap=0, shared=0)

Pass an instance wherever a policy's name is accepted. Its name works everywhere, the command line included, once its
package declares it as an entry point of the group ``mthp.policies`` (:mod:`mthp.engine.policy_lookup`).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mthp.eligibility import Trigger
from mthp.engine.bits import Bits
from mthp.engine.occupancy import Runs
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.tunables import Tunables

DEFAULT_MTHP_MIN_ORDER = 3
"""The seed's MTHP_MIN_ORDER: with it the chunk bitmap of an x86-64 PMD range has 64 bits."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The circumstances of a collapse, which a policy may use.

    Attributes:
        geometry: geometry of the machine.
        orders: the enabled orders, ascending.
        trigger: ``khugepaged``, or ``madvise`` for MADV_COLLAPSE.
        tunables: the limits in force.
        mthp_min_order: the seed's MTHP_MIN_ORDER: order of a chunk of its bitmap, and its smallest folio.
        always: those of `orders` with ``always`` in their own switch.
        of_file: the memory belongs to a file, so collapse_file() (mm/khugepaged.c) collapses it, to the PMD order
            alone.
    """

    geometry: Geometry
    orders: tuple[int, ...]
    trigger: Trigger
    tunables: Tunables
    mthp_min_order: int = DEFAULT_MTHP_MIN_ORDER
    always: tuple[int, ...] = ()
    of_file: bool = False

    @property
    def forced(self) -> bool:
        """Whether MADV_COLLAPSE is the trigger, which ignores switches, limits and references."""
        return self.trigger == "madvise"


class Limits(NamedTuple):
    """The most PTEs of each kind that a run may have."""

    none: int
    """None PTEs and zero pages, which the collapse fills."""
    swap: int
    """Swapped-out PTEs, which the collapse reads back."""
    shared: int
    """PTEs of pages that another process maps, too."""


class Policy(abc.ABC):
    """Base of all policies. Its defaults are the behaviour of Linux 7.2.

    Attributes:
        name: name on the command line.
        scans_each_run: the PTEs are scanned again for every run, with that run's limits, instead of once for the
            whole PMD range. An order that failed once is not tried again in the PMD range. When the smallest order
            failed, the rest of the range is given up.
        fail_ends_range: an attempt at the PMD order that ends in FAIL, as one over a guard marker does, ends the
            whole PMD range.
        halves_after_failure: after any failed attempt the two halves of the run are tried, also where a folio is
            already large enough. By default that folio is skipped, and some results end the PMD range.
        large_before_shared: isolation checks for a large enough folio before it counts a shared page.
        leaves_empty_runs: MADV_COLLAPSE makes no folio of a run without contents, because kernels before 6.18 require
            one writable PTE (SCAN_PAGE_RO).
        counts_mapped: the kernel's pages_collapsed also rises for MADV_COLLAPSE, and at every scan of a PMD range that
            one PMD entry already maps.
        remembers_filled: pages that a collapse filled count as none (:mod:`mthp.engine.filled`).
    """

    name: ClassVar[str]
    scans_each_run: ClassVar[bool] = False
    fail_ends_range: ClassVar[bool] = True
    halves_after_failure: ClassVar[bool] = False
    large_before_shared: ClassVar[bool] = False
    leaves_empty_runs: ClassVar[bool] = False
    counts_mapped: ClassVar[bool] = False
    remembers_filled: ClassVar[bool] = False

    def orders_walked(self, rules: Rules) -> tuple[int, ...]:
        """Return the orders at which a collapse is attempted, descending; empty if the policy does not run."""
        if rules.forced:
            return (rules.geometry.pmd_order,)
        return tuple(order for order in reversed(rules.orders) if order >= MIN_ANON_ORDER)

    def orders_allocated(self, rules: Rules) -> tuple[int, ...]:
        """Return the orders for which a folio is allocated, descending: walked ones, and those that fail later."""
        return self.orders_walked(rules)

    def scan_limits(self, rules: Rules) -> Limits | None:
        """Return the limits of the scan of a whole PMD range; None if each run is scanned separately."""
        n = rules.geometry.ptes_per_pmd
        if rules.forced:
            return Limits(n, n, n)
        tunables = rules.tunables
        return Limits(n - 1, tunables.max_ptes_swap, tunables.max_ptes_shared)

    def scan_honours_uffd(self, rules: Rules) -> bool:
        """Return whether the scan refuses none PTEs in a mapping that is armed with userfaultfd."""
        return rules.forced

    @abc.abstractmethod
    def limits(self, order: int, rules: Rules) -> Limits:
        """Return khugepaged's limits for a run of `order`, which isolation checks."""

    def attempt_limits(self, order: int, rules: Rules) -> Limits:
        """Return the limits for either trigger; by default MADV_COLLAPSE has none.

        The caller refuses none PTEs where userfaultfd is armed.
        """
        n = 1 << order
        return Limits(n, n, n) if rules.forced else self.limits(order, rules)

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        """Return the runs that are full enough to be attempted: bool, shape of ``runs.occupied``; None for all.

        By default those with occupied PTEs that leave at most ``limits().none`` to fill.
        """
        if rules.forced:
            return None
        enough: Bits = runs.occupied >= runs.size - self.limits(runs.order, rules).none
        return enough


class PmdOnly(Policy):
    """Linux up to 7.1: only the PMD order."""

    name = "pmd-only"

    def orders_walked(self, rules: Rules) -> tuple[int, ...]:
        pmd_order = rules.geometry.pmd_order
        return (pmd_order,) if rules.forced or pmd_order in rules.orders else ()

    def scan_limits(self, rules: Rules) -> Limits | None:
        return super().scan_limits(rules) if rules.forced else self.limits(rules.geometry.pmd_order, rules)

    def scan_honours_uffd(self, rules: Rules) -> bool:
        return True

    def limits(self, order: int, rules: Rules) -> Limits:
        return _unscaled(rules)

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        return None


class Rfc(Policy):
    """The seed (RFC "khugepaged: mTHP support"): a bitmap of full chunks, and a percentage for every order.

    MADV_COLLAPSE uses the bitmap and the thresholds of khugepaged, over all orders that anonymous memory can have, but
    not isolation's limits.
    """

    name = "rfc"
    fail_ends_range = False
    halves_after_failure = True
    large_before_shared = True
    leaves_empty_runs = True
    counts_mapped = True

    def orders_walked(self, rules: Rules) -> tuple[int, ...]:
        if not rules.forced and rules.geometry.pmd_order not in rules.orders:
            return ()
        orders = rules.geometry.anon_orders if rules.forced else rules.orders
        return tuple(order for order in reversed(orders) if order >= rules.mthp_min_order)

    def orders_allocated(self, rules: Rules) -> tuple[int, ...]:
        walked = self.orders_walked(rules)
        # Orders above the highest enabled one are skipped. The others fail when the mapping is checked again.
        return tuple(range(walked[0], rules.mthp_min_order - 1, -1)) if walked else ()

    def scan_limits(self, rules: Rules) -> Limits | None:
        n = rules.geometry.ptes_per_pmd
        if rules.forced:
            return Limits(n, n, n)
        return Limits(n, rules.tunables.max_ptes_swap, rules.tunables.max_ptes_shared)

    def scan_honours_uffd(self, rules: Rules) -> bool:
        return True

    def limits(self, order: int, rules: Rules) -> Limits:
        return _unscaled(rules)._replace(none=_scaled_none(order, rules))

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        n = rules.geometry.ptes_per_pmd
        percent = (n - rules.tunables.max_ptes_none - 1) * 100 // (n - 1)
        chunks = runs.size >> rules.mthp_min_order
        threshold = percent * chunks // 100
        if threshold == 0:
            return None
        enough: Bits = runs.chunks(rules.mthp_min_order, none=0) >= threshold
        return enough


class Rfc2(Rfc):
    """The seed's second version: chunks may have none PTEs, and only the PMD order takes swap and shared pages.

    A chunk counts if it has fewer none PTEs than max_ptes_none scaled to it. With the default chunks and max_ptes_none
    below 64 that limit is 0, so no run is full enough.
    """

    name = "rfc2"

    def orders_allocated(self, rules: Rules) -> tuple[int, ...]:
        return self.orders_walked(rules)

    def limits(self, order: int, rules: Rules) -> Limits:
        return self._below_pmd(order, rules, super().limits(order, rules))

    def attempt_limits(self, order: int, rules: Rules) -> Limits:
        return self._below_pmd(order, rules, super().attempt_limits(order, rules))

    @staticmethod
    def _below_pmd(order: int, rules: Rules, limits: Limits) -> Limits:
        return limits if order == rules.geometry.pmd_order else limits._replace(swap=0, shared=0)

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        if runs.order in rules.always:
            return None
        n, level = rules.geometry.ptes_per_pmd, runs.order - rules.mthp_min_order
        threshold = (n - rules.tunables.max_ptes_none - 1) >> (rules.geometry.pmd_order - level)
        none = _scaled_none(rules.mthp_min_order, rules) - 1
        enough: Bits = runs.chunks(rules.mthp_min_order, none=none) > threshold
        return enough


class PerOrder(Policy):
    """Dev Jain's series: every run is scanned separately, with all limits scaled to its order.

    MADV_COLLAPSE tries the PMD order, then the smaller orders that are enabled, without limits.
    """

    name = "per-order"
    scans_each_run = True
    fail_ends_range = False
    large_before_shared = True
    leaves_empty_runs = True

    def orders_walked(self, rules: Rules) -> tuple[int, ...]:
        enabled = tuple(order for order in reversed(rules.orders) if order >= MIN_ANON_ORDER)
        pmd_order = rules.geometry.pmd_order
        return (pmd_order, *(order for order in enabled if order < pmd_order)) if rules.forced else enabled

    def scan_limits(self, rules: Rules) -> Limits | None:
        return None

    def limits(self, order: int, rules: Rules) -> Limits:
        shift = rules.geometry.pmd_order - order
        return Limits(*(limit >> shift for limit in _unscaled(rules)))

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        return None


class Mainline(Policy):
    """Linux 7.2 and later: a bitmap of pages; runs below the PMD order have all holes filled, or must have none."""

    name = "mainline"

    def scan_limits(self, rules: Rules) -> Limits | None:
        if not rules.forced and self._pmd_alone(rules):
            return _unscaled(rules)
        return super().scan_limits(rules)

    def scan_honours_uffd(self, rules: Rules) -> bool:
        return rules.forced or self._pmd_alone(rules)

    def limits(self, order: int, rules: Rules) -> Limits:
        if order == rules.geometry.pmd_order:
            return _unscaled(rules)
        fill = rules.tunables.max_ptes_none == rules.geometry.ptes_per_pmd - 1
        return Limits((1 << order) - 1 if fill else 0, 0, 0)

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        if rules.forced:
            return None
        contents = runs.occupied
        if runs.order == rules.geometry.pmd_order:
            # The scan counts swap entries apart from its bitmap, and only the PMD order may have any.
            contents = contents + runs.swap
        enough: Bits = contents >= runs.size - self.limits(runs.order, rules).none
        return enough

    @staticmethod
    def _pmd_alone(rules: Rules) -> bool:
        return rules.orders == (rules.geometry.pmd_order,)


class NoCreep(Mainline):
    """This project's own: fills small runs in proportion, as `per-order` does, and does not creep.

    `mainline` gives up intermediate fill below the PMD order, because a filled run looks full to the next scan, which
    then finds the run around it full enough, and so on up to the PMD order. This policy remembers the pages that a
    collapse filled, and counts them as none. A later scan has the same counts as the first, so it finds the same runs,
    which are already collapsed, until the program itself touches more. A folio of order k has at least 2**k minus its
    scaled limit of the program's own pages, so bloat stays within max_ptes_none / N of the folios' size, however often
    they are scanned.

    The walk, and the limits of swapped and shared pages, are mainline's.
    """

    name = "no-creep"
    remembers_filled = True

    def limits(self, order: int, rules: Rules) -> Limits:
        if order == rules.geometry.pmd_order:
            return _unscaled(rules)
        return Limits(_scaled_none(order, rules), 0, 0)


def _scaled_none(order: int, rules: Rules) -> int:
    """Return max_ptes_none, scaled from the PMD range to a run of `order`."""
    return rules.tunables.max_ptes_none >> (rules.geometry.pmd_order - order)


def _unscaled(rules: Rules) -> Limits:
    tunables = rules.tunables
    return Limits(tunables.max_ptes_none, tunables.max_ptes_swap, tunables.max_ptes_shared)


BUILT_IN: dict[str, type[Policy]] = {policy.name: policy for policy in (PmdOnly, Rfc, Rfc2, PerOrder, Mainline)}
"""The five policies of kernels and of proposed series, by name."""

OWN: dict[str, type[Policy]] = {NoCreep.name: NoCreep}
"""This project's own policies, by name."""
