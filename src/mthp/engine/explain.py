"""Why memory is not in large folios: its kind, what each policy would make of it, and what stops it, in sentences.

Every reason is one that other modules decide by: :func:`mthp.eligibility.eligibility`, the scan results of a plan, and
the backend (:func:`mthp.abilities.objections`, :func:`mthp.abilities.pins`). This module collects the reasons for one
address, and adds none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mthp.abilities import objections, pins
from mthp.addrspace import AddressSpace
from mthp.eligibility import eligibility
from mthp.engine.planning import plan_space
from mthp.engine.policy import BUILT_IN, OWN
from mthp.engine.select import ORDERS_ENABLED, PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.metrics import anonymous_pages, out_of_reach_remark, resident_pages
from mthp.ptes import Pte, PteColumns, Segment
from mthp.results import ScanResult
from mthp.text import numbered
from mthp.units import format_size
from mthp.vma import Vma, VmaKind

Maker = Literal["khugepaged", "madvise", "move"]
"""What might make a folio: the kernel's own scan, MADV_COLLAPSE, and the mover."""

_MAKERS: dict[Maker, str] = {
    "khugepaged": "the kernel's khugepaged",
    "madvise": "MADV_COLLAPSE (mthp collapse)",
    "move": "the mover (--mechanism move)",
}

_KINDS = {
    VmaKind.ANON: "anonymous memory",
    VmaKind.FILE: "memory of a file",
    VmaKind.SHMEM: "shared memory",
    VmaKind.HUGETLB: "hugetlbfs pages",
    VmaKind.SPECIAL: "made by the kernel or a driver",
}

_COUNTED = {
    "swapped out": Pte.SWAP,
    "shared with another process": Pte.SHARED,
    "the zero page": Pte.ZERO,
    "write-protected by userfaultfd": Pte.UFFD_WP,
    "freed lazily": Pte.LAZYFREE,
    "guard pages": Pte.GUARD,
}

_NOTHING_STOPS = frozenset({ScanResult.SUCCEED, ScanResult.PMD_MAPPED})

TOP = 8
"""The most reasons to list of a whole process: those that concern most memory."""


@dataclass(frozen=True, slots=True)
class MakerRefusal:
    """A reason why one maker of folios makes none.

    Attributes:
        maker: the maker.
        reason: a clause.
    """

    JSON: ClassVar = "mechanism=maker reason"

    maker: Maker
    reason: str

    @property
    def sentence(self) -> str:
        """The reason as a sentence."""
        return f"{_MAKERS[self.maker]} refuses: {self.reason}"


@dataclass(frozen=True, slots=True)
class Prospect:
    """The predicted result of a policy, with the machine's limits and every size on.

    Attributes:
        policy: name of the policy.
        folios: number of folios by label of their size.
        copied_bytes, bloat_bytes: bytes that this would copy, and add.
        reason: why it would make nothing; ``""`` if it would make something.
    """

    policy: str
    folios: dict[str, int]
    copied_bytes: int
    bloat_bytes: int
    reason: str

    @property
    def clause(self) -> str:
        """The prospect as a sentence without its subject."""
        if not self.folios:
            return f"would make no folios: {self.reason}"
        made = ", ".join(f"{count} of {size}" for size, count in self.folios.items())
        return (
            f"would make folios: {made}; that would copy {format_size(self.copied_bytes)} and add"
            f" {format_size(self.bloat_bytes)} of bloat"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why memory is not in large folios.

    Attributes:
        label: name of the target.
        geometry: geometry of its machine.
        memory: the kind and state of the memory, in sentences.
        prospects: what each policy would make of it.
        refusals: what stops each maker.
        out_of_reach_bytes: resident part of the memory in no whole PMD range of its mapping.
        missing: what could not be read, and what would make it readable.
    """

    JSON: ClassVar = "target=label memory prospects refusals out_of_reach_bytes missing"

    label: str
    geometry: Geometry
    memory: tuple[str, ...]
    prospects: tuple[Prospect, ...]
    refusals: tuple[MakerRefusal, ...]
    out_of_reach_bytes: int
    missing: tuple[str, ...]

    @property
    def sentences(self) -> list[str]:
        """The whole explanation, one sentence an item."""
        return [*self.memory, *self.predicted, *(each.sentence for each in self.refusals)]

    @property
    def predicted(self) -> list[str]:
        """The prospects as sentences, one for all policies of the same effect."""
        policies: dict[str, list[str]] = {}
        for each in self.prospects:
            policies.setdefault(each.clause, []).append(each.policy)
        return [
            f"{'policy' if len(names) == 1 else 'policies'} {', '.join(names)} {clause}"
            for clause, names in policies.items()
        ]


def explain_space(space: AddressSpace, address: int | None = None) -> Explanation:
    """Explain the memory of `space`, or the PMD range that `address` lies in.

    Raises:
        UsageError: nothing is mapped at `address`.
        TargetVanishedError: the process is gone.
    """
    if address is None:
        return _explained_process(space)
    vma = next((vma for vma in space.vmas() if vma.start <= address < vma.end), None)
    if vma is None:
        raise UsageError(f"nothing is mapped at {address:#x}", help="mthp inspect --all lists the mappings")
    size = space.geometry.pmd_size
    start = address // size * size
    part = max(start, vma.start), min(start + size, vma.end)
    columns = space.read([] if vma.kind is VmaKind.SPECIAL else [part])
    whole = part == (start, start + size)
    plans = _plans(space, vma, (start, start + size)) if whole else []
    memory = [*_described(space, vma, address, part, columns)]
    outside = 0 if whole else int(anonymous_pages(columns).sum()) * space.geometry.page_size
    if outside:
        memory.append(out_of_reach_remark(outside, space.geometry, recommend=not objections(space, vma)))
    return Explanation(
        space.label,
        space.geometry,
        tuple(memory),
        tuple(_prospect(plan, space.geometry) for plan in plans),
        tuple(dict.fromkeys(_refusals(space, vma, (start, start + size), whole))),
        outside,
        space.missing,
    )


def _plans(space: AddressSpace, vma: Vma, within: Segment) -> list[SpacePlan]:
    files = vma.kind in (VmaKind.FILE, VmaKind.SHMEM)
    names = ("pmd-only",) if files else (*BUILT_IN, *OWN)
    return [plan_space(space, PlanOptions(policy=name, within=within, include_file=files)) for name in names]


def _prospect(plan: SpacePlan, geometry: Geometry) -> Prospect:
    folios = {geometry.label(order): count for order, count in plan.folios_by_order.items()}
    return Prospect(plan.policy, folios, plan.copied_bytes, plan.filled_bytes, "" if folios else _reason_of(plan))


def _reason_of(plan: SpacePlan) -> str:
    """Return why a plan makes nothing of most of its range, or of its process."""
    reasons = {left.reason: left.resident for left in plan.left}
    for result, count in plan.ranges_by_result.items():
        # Those in which nothing stops a folio, because there is one.
        if result is not ScanResult.SUCCEED:
            reasons.setdefault(f"{result.name}: {result.meaning}", count * plan.geometry.pmd_size)
    return max(reasons, key=reasons.__getitem__, default="it is empty")


def _described(space: AddressSpace, vma: Vma, address: int, part: Segment, columns: PteColumns) -> Iterator[str]:
    geometry = space.geometry
    name = f"{vma.name}, " if vma.name else ""
    advice = "MADV_HUGEPAGE is set" if "hg" in vma.flags else "no advice is set"
    advice = "MADV_NOHUGEPAGE is set" if "nh" in vma.flags else advice
    yield (
        f"{address:#x} lies in {name}{_KINDS[vma.kind]}, {format_size(vma.size)} at {vma.start:#x}"
        f" ({vma.permissions}); {advice}"
    )
    pages = (part[1] - part[0]) // geometry.page_size
    resident = resident_pages(columns)
    size = geometry.label(geometry.pmd_order)
    counted = numbered(pages, "page")
    sentence = f"the {size} range around it has {counted} in this mapping: {int(resident.sum())} resident"
    orders = columns.folio_order[anonymous_pages(columns) | resident]
    for order in sorted({int(each) for each in orders}):
        where = f"in folios of {geometry.label(order)}" if order >= 0 else "in folios of a size that is not visible"
        sentence += f", {int((orders == order).sum())} {where}"
    for what, bit in _COUNTED.items():
        if count := int(columns.has(bit).sum()):
            sentence += f", {count} {what}"
    yield sentence
    if columns.has(Pte.PMD_MAPPED).any():
        yield "one PMD entry maps it: it is a huge page already"


def _refusals(space: AddressSpace, vma: Vma, within: Segment, whole: bool) -> Iterator[MakerRefusal]:
    """Yield what stops each maker of folios in one PMD range."""
    geometry, switches, disabled = space.geometry, space.switches, space.thp_disabled
    by_kernel = eligibility(vma, geometry, switches, thp_disabled=disabled)
    on_call = eligibility(vma, geometry, switches, trigger="madvise", thp_disabled=disabled, include_file=True)
    ends = f"it lies at the end of the mapping, outside of whole {geometry.label(geometry.pmd_order)} ranges"
    if not by_kernel:
        yield MakerRefusal("khugepaged", by_kernel.reason)
    elif not whole:
        yield MakerRefusal("khugepaged", ends)
    else:
        options = PlanOptions(within=within, orders=ORDERS_ENABLED)
        yield from _results(plan_space(space, options), "khugepaged", vma)
    if not on_call:
        yield MakerRefusal("madvise", on_call.reason)
    elif not whole:
        yield MakerRefusal("madvise", ends)
    else:
        options = PlanOptions(policy="pmd-only", within=within, trigger="madvise", include_file=True)
        yield from _results(plan_space(space, options), "madvise", vma)
    yield from (MakerRefusal("move", reason) for reason in objections(space, vma))
    yield from (MakerRefusal(maker, reason) for reason in pins(space, vma) for maker in _MAKERS)


def _results(plan: SpacePlan, maker: Maker, vma: Vma) -> Iterator[MakerRefusal]:
    limits = plan.tunables
    values = {
        ScanResult.EXCEED_NONE_PTE: f" (max_ptes_none is {limits.max_ptes_none})",
        ScanResult.EXCEED_SWAP_PTE: f" (max_ptes_swap is {limits.max_ptes_swap})",
        ScanResult.EXCEED_SHARED_PTE: f" (max_ptes_shared is {limits.max_ptes_shared})",
    }
    for result in plan.ranges_by_result:
        if result in _NOTHING_STOPS or len(plan.folios):
            continue
        value = values.get(result, "")
        if result is ScanResult.EXCEED_NONE_PTE and vma.uffd_armed:
            value = ", which is 0 in memory that is registered with userfaultfd"
        yield MakerRefusal(maker, f"{result.name}: {result.meaning}{value}")


def _explained_process(space: AddressSpace) -> Explanation:
    """Explain a whole process: what stops the kernel in most of its memory, and each policy."""
    geometry = space.geometry
    plans = [plan_space(space, PlanOptions(policy=name)) for name in (*BUILT_IN, *OWN)]
    enabled, before = plan_space(space, PlanOptions(orders=ORDERS_ENABLED)), plans[0].before
    pmd = geometry.pmd_order
    memory = [
        f"{space.label} has {format_size(before.resident * geometry.page_size)} of anonymous memory,"
        f" {100 * before.share(pmd):.1f}% of it mapped as {geometry.label(pmd)}"
    ]
    if outside := before.out_of_reach_bytes(geometry):
        memory.append(out_of_reach_remark(outside, geometry, recommend=not objections(space, None)))
    if space.thp_disabled:
        memory.append("it has switched THP off for itself (PR_SET_THP_DISABLE)")
    found = [
        MakerRefusal("khugepaged", f"{left.reason} ({format_size(left.resident)} resident)")
        for left in enabled.left[:TOP]
        if left.resident
    ]
    found += [MakerRefusal("move", reason) for reason in objections(space, None)]
    found += [MakerRefusal(maker, reason) for reason in pins(space, None) for maker in _MAKERS]
    largest = _largest(enabled)
    if largest is not None:
        memory.append(f"most of the memory that is left alone lies at {largest:#x}: explain that address for details")
    prospects = tuple(_prospect(plan, geometry) for plan in plans)
    return Explanation(space.label, geometry, tuple(memory), prospects, tuple(found), outside, space.missing)


def _largest(plan: SpacePlan) -> int | None:
    """Return the start of the refused mapping with most resident memory; None if none is resident."""
    resident: Sequence[tuple[int, Vma]] = [
        (pages, vma) for (vma, _), pages in zip(plan.refused, plan.refused_resident, strict=False) if pages
    ]
    return max(resident, key=lambda each: each[0])[1].start if resident else None
