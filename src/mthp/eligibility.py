"""The folio orders that a mapping may be collapsed to, or the reason why none.

Follows ``__thp_vma_allowable_orders`` (mm/huge_memory.c) for the two triggers: ``khugepaged`` obeys the switches,
``madvise`` (MADV_COLLAPSE, and this project's own collapses) does not. Both obey MADV_NOHUGEPAGE and
PR_SET_THP_DISABLE, because a program's refusal is not overruled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.movechecks import refuse_vma
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind

Trigger = Literal["khugepaged", "madvise"]
"""The cause of a collapse: the background scan, or a call for it now."""

NO_COLLAPSE_FLAGS = {
    "io": "device memory (VM_IO)",
    "pf": "memory without struct pages (VM_PFNMAP)",
    "mm": "mixed device memory (VM_MIXEDMAP)",
    "de": "may not be expanded (VM_DONTEXPAND)",
    "ht": "hugetlbfs pages",
}
"""VmFlags words of VM_NO_KHUGEPAGED (include/linux/mm.h), and their meaning."""


@dataclass(frozen=True, slots=True)
class Eligibility:
    """The orders that a mapping may have.

    Attributes:
        orders: allowed folio orders, ascending; empty if none.
        reason: why there are none, or which condition bounds them; ``""`` if none does.
    """

    JSON: ClassVar = "sizes reason"

    orders: tuple[int, ...]
    reason: str = ""

    def sizes(self, geometry: Geometry) -> list[str]:
        """Return the sizes of `orders`, such as ``"64K"``."""
        return [geometry.label(order) for order in self.orders]

    def __bool__(self) -> bool:
        return bool(self.orders)


def eligibility(
    vma: Vma,
    geometry: Geometry,
    switches: Switches,
    *,
    trigger: Trigger = "khugepaged",
    thp_disabled: bool = False,
    include_file: bool = False,
    small: bool = False,
) -> Eligibility:
    """Return the orders that `vma` may be collapsed to.

    Args:
        switches: switches of the machine, used for the trigger ``khugepaged`` only.
        thp_disabled: whether the process set PR_SET_THP_DISABLE.
        include_file: include memory of files and shared memory, which collapses to the PMD order only.
        small: include anonymous mappings without a whole PMD range, which only the mover collapses.
    """
    if reason := _refused(vma, geometry, thp_disabled, small=small):
        return Eligibility((), reason)
    if vma.kind in (VmaKind.FILE, VmaKind.SHMEM):
        what = "memory of a file" if vma.kind is VmaKind.FILE else "shared memory"
        # A PMD entry maps an aligned piece of the file at an aligned address (thp_vma_suitable_order(),
        # include/linux/huge_mm.h).
        if (vma.start - vma.offset) % geometry.pmd_size:
            return Eligibility(
                (), f"{what}, at an offset in the file that is not aligned to {geometry.label(geometry.pmd_order)}"
            )
        if include_file:
            return Eligibility((geometry.pmd_order,), f"{what}: {geometry.label(geometry.pmd_order)} only")
        return Eligibility((), f"{what}, not anonymous")
    # __thp_vma_allowable_orders() (mm/huge_memory.c) requires an anon_vma, which the first write makes. If it is not
    # known (None), the kernel decides.
    if vma.has_anon_vma is False:
        return Eligibility((), "it was never written")
    if trigger == "madvise":
        return Eligibility(geometry.anon_orders)
    advised = "hg" in vma.flags
    if orders := switches.orders(advised=advised):
        return Eligibility(orders)
    advice = "with" if advised else "without"
    return Eligibility((), f"no size is enabled for memory {advice} MADV_HUGEPAGE (enabled is {switches.enabled!r})")


def _refused(vma: Vma, geometry: Geometry, thp_disabled: bool, *, small: bool) -> str:
    """Return why no order is possible with either trigger; ``""`` if some may be."""
    if thp_disabled:
        return "the process switched THP off for itself (PR_SET_THP_DISABLE)"
    if vma.kind is VmaKind.HUGETLB:
        return NO_COLLAPSE_FLAGS["ht"]
    if vma.kind is VmaKind.SPECIAL:
        return "made by the kernel or a driver"
    for word, meaning in NO_COLLAPSE_FLAGS.items():
        if word in vma.flags:
            return meaning
    if "nh" in vma.flags:
        return "MADV_NOHUGEPAGE is set"
    start, end = vma.pmd_ranges(geometry)
    if start < end:
        return ""
    order = geometry.pmd_order
    if small and vma.kind is VmaKind.ANON:
        if refusal := refuse_vma(vma):
            return f"the mover leaves it alone: {refusal.reason}"
        if vma.parts(geometry):
            return ""
        order = MIN_ANON_ORDER
    size = geometry.label(order)
    return f"smaller than {size}" if vma.size < geometry.size_of(order) else f"holds no aligned {size}"
