"""The report of a collapse."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mthp.engine.allowed import Allowed
from mthp.engine.lasting import Remade
from mthp.engine.space_plan import SpacePlan
from mthp.engine.splitprice import SplitPrice
from mthp.errors import MthpError
from mthp.geometry import Geometry
from mthp.means import Mechanism
from mthp.metrics import Coverage, Durations
from mthp.objects import to_object
from mthp.results import ScanResult
from mthp.tabular import Tabular


@dataclass(frozen=True, slots=True)
class FailedFolios:
    """Folios of one order that were tried and could not be made, for one reason.

    Attributes:
        result: scan result of the attempts.
        reason: why, in words.
        folios: number of folios.
    """

    result: ScanResult
    reason: str
    folios: int


@dataclass
class FolioTally:
    """The outcomes of the folios of one order.

    Attributes:
        planned: number of folios in the plan.
        made: runs that lie in one folio of this order now and did not before.
        unchanged: runs that already lay in one folio of this order or larger when their turn came.
        failed: the other runs that were tried, by scan result and reason.
        over_budget: runs left alone because filling them would have exceeded `max_bloat`.
        over_copied: runs left alone because copying them would have exceeded `max_copied`.
        over_reserve: runs left alone because they would have taken memory that must stay free.
        not_tried: runs left when the collapse ended early.
    """

    JSON: ClassVar = (
        "planned made unchanged failed=failed_by_result reasons over_budget over_copied over_reserve not_tried"
    )

    planned: int = 0
    made: int = 0
    unchanged: int = 0
    failed: Counter[tuple[ScanResult, str]] = field(default_factory=Counter)
    over_budget: int = 0
    over_copied: int = 0
    over_reserve: int = 0
    not_tried: int = 0

    @property
    def failed_by_result(self) -> Counter[ScanResult]:
        """Number of failed runs by scan result."""
        counts: Counter[ScanResult] = Counter()
        for (result, _), count in self.failed.items():
            counts[result] += count
        return counts

    @property
    def reasons(self) -> list[FailedFolios]:
        """Number of failed runs by scan result and reason, the most frequent first."""
        return [FailedFolios(result, reason, count) for (result, reason), count in self.failed.most_common()]

    @property
    def left(self) -> int:
        """Planned runs that do not lie in a folio of their order or larger."""
        return self.failed.total() + self.over_budget + self.over_copied + self.over_reserve + self.not_tried


@dataclass
class CollapseReport(Tabular):
    """The report of a collapse. Counts are of PMD ranges unless stated otherwise.

    Attributes:
        plan: the plan that was carried out.
        dry_run: nothing was done.
        allowed: what would be done, for a dry run; else None.
        ranges: tally of the PMD ranges; a range is made if one PMD entry maps it now and did not before.
        bloat_budget: bytes that filling may add; None without a bound.
        copy_budget: bytes that may be copied; None without a bound.
        room: why memory must stay free, as a sentence; ``""`` without a limit.
        mechanisms: mechanism of each planned order; None for none.
        folios: tallies of the folios below the PMD order, by order, the largest first.
        needs_move: folios below the PMD order that only the mover makes, by order, if `move` was not requested.
        move_price: what the mover would cost the target, as a clause, if `needs_move` has any.
        split_price: price of the planned splits.
        copied_bytes: contents of all collapsed folios, and pages that splits copied outside the planned ones.
        filled_bytes: bytes by which memory grew.
        heat_share: the share of the accesses seen that go to folios that were made; None if none were seen.
        durations: durations of the kernel's calls, the longest that the target may have waited for its memory.
        windows: durations of the pauses in which pages were moved.
        moved_blocks: runs passed to the mover in these pauses.
        verified: whether the bytes of every moved run were compared.
        elapsed: seconds, rests included.
        after: the coverage at the end, of the same memory as `before`, which is its initial value.
        remade: folios below the PMD order that khugepaged will make huge again.
        interrupted: the caller stopped it.
        vanished: the target exited in the meantime.
        out_of_memory: the failed charge that ended it, as a sentence; ``""`` if none did.
        error: another error that ended it early; None if none did.
    """

    ROWS: ClassVar = "rows"
    JSON: ClassVar = (
        "plan dry_run complete collapsed_ranges=ranges.made collapsed_bytes unchanged_ranges=ranges.unchanged"
        " failed_ranges=ranges.failed_by_result over_budget_ranges=ranges.over_budget"
        " over_copied_ranges=ranges.over_copied over_reserve_ranges=ranges.over_reserve"
        " not_tried_ranges=ranges.not_tried bloat_budget_bytes=bloat_budget"
        " room:null out_of_memory:null allowed mechanism_by_order=mechanisms folios moved_bytes verified"
        " needs_move_folios=needs_move move_price:null split_price copied_bytes bloat_bytes=filled_bytes heat_share"
        " elapsed_seconds=elapsed calls=durations pauses=windows moved_blocks coverage_before=plan.coverage coverage"
        " coverage_order=plan.coverage_order measured=after done_nothing nothing_left_to_do=plan.finished"
        " remade interrupted vanished error"
    )

    plan: SpacePlan
    dry_run: bool = False
    allowed: Allowed | None = None
    ranges: FolioTally = field(default_factory=FolioTally)
    bloat_budget: int | None = None
    copy_budget: int | None = None
    room: str = ""
    mechanisms: dict[int, Mechanism | None] = field(default_factory=dict)
    folios: dict[int, FolioTally] = field(default_factory=dict)
    needs_move: dict[int, int] = field(default_factory=dict)
    move_price: str = ""
    split_price: SplitPrice = field(default_factory=SplitPrice)
    copied_bytes: int = 0
    filled_bytes: int = 0
    heat_share: float | None = None
    durations: Durations = field(default_factory=lambda: Durations.of(()))
    windows: Durations = field(default_factory=lambda: Durations.of(()))
    moved_blocks: int = 0
    verified: bool = False
    elapsed: float = 0.0
    after: Coverage = field(default_factory=Coverage)
    remade: Remade = field(default_factory=Remade)
    interrupted: bool = False
    vanished: bool = False
    out_of_memory: str = ""
    error: MthpError | None = None

    def __post_init__(self) -> None:
        # Until something is measured afterwards, nothing has changed.
        if not self.after.resident:
            self.after = self.plan.before

    def tally(self, order: int) -> FolioTally:
        """Return the tally of the folios of `order`."""
        return self.folios.get(order, self.ranges)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each planned order, the largest first: ``order``, and the counts of its :class:`FolioTally`."""
        left = {order: FolioTally(planned=count, not_tried=count) for order, count in self.needs_move.items()}
        tallies = {self.geometry.pmd_order: self.ranges} | self.folios | left
        found = [{"order": order} | to_object(tallies[order]) for order in self.plan.folios_by_order]
        return [{key: value for key, value in row.items() if key != "reasons"} for row in found]

    @property
    def geometry(self) -> Geometry:
        """Geometry of the machine."""
        return self.plan.geometry

    @property
    def before(self) -> Coverage:
        """The coverage before anything was done."""
        return self.plan.before

    @property
    def coverage(self) -> float:
        """The share of `after` in folios of the requested sizes or larger."""
        return self.after.share(self.plan.coverage_order)

    @property
    def done_nothing(self) -> bool:
        """Whether the plan had no folios, although not everything is as requested."""
        return not self.dry_run and not len(self.plan.folios) and not self.plan.finished

    @property
    def collapsed_bytes(self) -> int:
        """Bytes that PMD entries map now and did not before."""
        return self.ranges.made * self.plan.geometry.pmd_size

    @property
    def moved_bytes(self) -> int:
        """Bytes that now lie in folios below the PMD order that were made, of the planned orders."""
        return sum(tally.made * self.plan.geometry.size_of(order) for order, tally in self.folios.items())

    @property
    def complete(self) -> bool:
        """Whether all planned folios exist; an empty plan is complete if nothing was left to do."""
        left = sum(tally.left for tally in (self.ranges, *self.folios.values())) + sum(self.needs_move.values())
        return self.dry_run or not (left or self.done_nothing or self.ended_early)

    @property
    def ended_early(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.interrupted or self.vanished or bool(self.out_of_memory) or self.error is not None
