"""Give memory back: pages of large folios that contain only zeroes.

Contents are read in two steps, because most folios have no such pages: a sample of the pages of each folio first, then
all pages of the folios with a page of zeroes in the sample. The plan is a hint. The kernel reads the bytes again when
it splits a folio, so a page that is written to in the meantime stays (:class:`~mthp.trimming.Trimming`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.engine.lasting import Remade, remade
from mthp.engine.select import PORTION_PMD_RANGES
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError, UsageError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.measuring import out_of_reach_bytes
from mthp.metrics import Durations, anonymous_pages, page_numbers
from mthp.pacing import ByteBudget
from mthp.progress import StepProgress
from mthp.ptes import Block, PteColumns, Segment, in_range_portions
from mthp.results import ScanResult
from mthp.tabular import Tabular
from mthp.trimming import TrimBy, Trimming, TrimOutcome, given_back
from mthp.vma import VmaKind

MISSED = 0.01
"""Probability that the sample misses a folio with just the wanted share of zeroes, if they lie at random."""

BATCH_BYTES = 32 << 20
"""Bytes of folios to trim between two calls of `stop`."""

PACE = 0.1
"""The longest rest, in seconds, between two calls of `stop`."""


@dataclass(frozen=True, slots=True)
class TrimOptions:
    """What to give back.

    Attributes:
        zero: the share of a folio's pages that must contain only zeroes, above 0, up to 1.
        within: trim this range of addresses only.
        by: the way to trim; None for the best one that works here.
        rate: bytes of folios that are split per second; None without a limit.

    Raises:
        UsageError: a number out of range.
    """

    zero: float = 0.5
    within: Segment | None = None
    by: TrimBy | None = None
    rate: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.zero <= 1:
            raise UsageError(f"a zero share of {self.zero:g} is not above 0 and at most 1", help="the default is 50%")
        if self.rate is not None and self.rate <= 0:
            raise UsageError(f"a rate of {self.rate} bytes a second is not above 0")


@dataclass(frozen=True)
class TrimPlan:
    """The folios to be trimmed, those with the most pages of zeroes first.

    Attributes:
        label, geometry: name of the target, and geometry of its machine.
        by: the way to trim; None if none works here.
        folios: address and order of each.
        zero: for each the pages that contain only zeroes: bool, shape (2**order,).
        gains: for each the number of these pages that would be given back.
        scanned_folios: number of large folios scanned.
        out_of_reach_bytes: resident memory of the target in no whole PMD range of its mapping.
        interrupted: the caller stopped it before all folios were scanned.
    """

    JSON: ClassVar = "target=label by folios_by_order scanned_folios zero_bytes out_of_reach_bytes"

    label: str
    geometry: Geometry
    by: TrimBy | None
    folios: list[Block]
    zero: list[NDArray[np.bool_]]
    gains: list[int]
    scanned_folios: int
    out_of_reach_bytes: int = 0
    interrupted: bool = False

    @property
    def zero_bytes(self) -> int:
        """Bytes in pages of zeroes that would be given back."""
        return sum(self.gains) * self.geometry.page_size

    @property
    def folios_by_order(self) -> dict[int, int]:
        """Number of folios to trim by order, the largest order first."""
        return dict(sorted(Counter(order for _, order in self.folios).items(), reverse=True))


@dataclass
class TrimReport(Tabular):
    """The report of a trim.

    Attributes:
        plan: the plan that was carried out.
        dry_run: nothing was done.
        trimmed: number of folios that were split.
        failed: number of the others that were tried, by scan result and reason.
        not_tried: number of folios left when the trim ended early.
        given_back_bytes: bytes that are no longer resident according to the page tables.
        left_by_order: number of folios by order that the memory of trimmed ones lies in, base pages as order 0.
        rss_before_bytes, rss_after_bytes: resident bytes of the whole target.
        calls: durations of the trims of single folios.
        elapsed: seconds, rests included.
        interrupted: the caller stopped it.
        vanished: the target exited in the meantime.
        remade: trimmed memory that khugepaged will make huge again.
        error: another error that ended it early; ``""`` if none did.
    """

    ROWS: ClassVar = "rows"
    JSON: ClassVar = (
        "plan dry_run complete trimmed failed=failed_by_result reasons not_tried given_back_bytes left_by_order"
        " rss_before_bytes rss_after_bytes calls elapsed_seconds=elapsed remade interrupted vanished error:null"
    )

    plan: TrimPlan
    dry_run: bool = False
    trimmed: int = 0
    failed: Counter[tuple[ScanResult, str]] = field(default_factory=Counter)
    not_tried: int = 0
    given_back_bytes: int = 0
    left_by_order: dict[int, int] = field(default_factory=dict)
    rss_before_bytes: int = 0
    rss_after_bytes: int = 0
    calls: Durations = field(default_factory=lambda: Durations.of(()))
    elapsed: float = 0.0
    remade: Remade = field(default_factory=Remade)
    interrupted: bool = False
    vanished: bool = False
    error: str = ""

    @property
    def rows(self) -> list[dict[str, str | int]]:
        """One row for each outcome of the tried folios: ``result``, ``reason``, and their number ``folios``."""
        outcomes = {(ScanResult.SUCCEED, ""): self.trimmed} | self.failed
        return [{"result": result.name, "reason": reason, "folios": n} for (result, reason), n in outcomes.items() if n]

    @property
    def failed_by_result(self) -> dict[str, int]:
        """Number of folios that were not trimmed, by the name of the scan result."""
        counts: Counter[str] = Counter()
        for (result, _), count in self.failed.items():
            counts[result.name] += count
        return dict(counts)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of folios that were not trimmed, by the reason."""
        return {reason: count for (_, reason), count in self.failed.most_common()}

    @property
    def complete(self) -> bool:
        """Whether all planned folios were trimmed."""
        undone = self.failed or self.not_tried or self.interrupted or self.vanished or self.error
        return not undone

    def add(self, outcome: TrimOutcome) -> None:
        """Count the outcome of one folio."""
        self.not_tried -= 1
        self.given_back_bytes += outcome.given_back * self.plan.geometry.page_size
        if outcome.result is not ScanResult.SUCCEED:
            self.failed[outcome.result, outcome.reason or outcome.result.meaning] += 1
            return
        self.trimmed += 1
        for order, count in outcome.left.items():
            self.left_by_order[order] = self.left_by_order.get(order, 0) + count


def plan_trim(
    space: AddressSpace,
    options: TrimOptions,
    progress: StepProgress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrimPlan:
    """Find the folios with a share of zeroes that is large enough.

    Args:
        stop: called before every portion; once it returns True nothing more is read.

    Raises:
        UnsupportedError: the contents or the frames of `space` cannot be read.
        NotPermittedError: the rights do not suffice.
    """
    geometry, size = space.geometry, space.geometry.page_size
    abilities.zero_filled(space, space.read([]))  # Fails at once for a target without contents.
    segments = space.populated(list(_anonymous(space, options.within)), size)
    total, done, scanned = sum(end - start for start, end in segments), 0, 0
    ways = space.trims_by if isinstance(space, Trimming) else ()
    by = options.by or next(iter(ways), None)
    found: list[tuple[int, Block, NDArray[np.bool_]]] = []
    interrupted = False
    for portion in in_range_portions(segments, geometry, PORTION_PMD_RANGES * geometry.pmd_size):
        if interrupted := stop():
            break
        columns = space.read(portion)
        folios = _whole_folios(columns, geometry)
        scanned += len(folios)
        for folio, zero in _with_zeroes(space, columns, folios, options.zero):
            # Where nothing can be trimmed, report what MADV_COLD would give back.
            if gain := int(given_back(zero, by or "cold", size).sum()):
                found.append((gain, folio, zero))
        done += sum(end - start for start, end in portion)
        if progress is not None:
            progress(done, total, "contents")
    # The largest gain first, then by ascending address.
    found.sort(key=lambda one: (-one[0], one[1]))
    return TrimPlan(
        label=space.label,
        geometry=geometry,
        by=by,
        folios=[folio for _, folio, _ in found],
        zero=[zero for _, _, zero in found],
        gains=[gain for gain, _, _ in found],
        scanned_folios=scanned,
        out_of_reach_bytes=out_of_reach_bytes(space),
        interrupted=interrupted,
    )


def trim_space(
    space: AddressSpace,
    options: TrimOptions,
    *,
    dry_run: bool = False,
    progress: StepProgress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrimReport:
    """Give back the pages of zeroes of `space`, and return the report.

    Args:
        stop: called before every batch; once it returns True nothing more is begun.

    Raises:
        UnsupportedError, NotPermittedError: as :func:`plan_trim`; or folios cannot be trimmed here.
        TargetVanishedError: the process exited before anything was done.
    """
    plan = plan_trim(space, options, progress, stop)
    report = TrimReport(plan, dry_run=dry_run, not_tried=len(plan.folios), interrupted=plan.interrupted)
    report.rss_before_bytes = report.rss_after_bytes = abilities.resident_bytes(space)
    if dry_run:
        report.not_tried = 0
        report.remade = _remade(space, plan)
        return report
    if not isinstance(space, Trimming) or plan.by is None:
        raise UnsupportedError(
            f"folios of {space.label} cannot be trimmed here", help="run `mthp doctor` for the reason"
        )
    begun = time.monotonic()
    seconds: list[float] = []
    try:
        _carry_out(space, plan, plan.by, report, seconds, ByteBudget(options.rate, time.monotonic), progress, stop)
        report.rss_after_bytes = abilities.resident_bytes(space)
        report.remade = _remade(space, plan)
    except TargetVanishedError:
        report.vanished = True
    except MthpError as error:
        if report.not_tried == len(plan.folios):
            raise
        report.error = error.message
    report.calls = Durations.of(seconds)
    report.elapsed = time.monotonic() - begun
    return report


def _carry_out(
    space: Trimming,
    plan: TrimPlan,
    by: TrimBy,
    report: TrimReport,
    seconds: list[float],
    budget: ByteBudget,
    progress: StepProgress | None,
    stop: Callable[[], bool],
) -> None:
    sizes = [plan.geometry.size_of(order) for _, order in plan.folios]
    total, done, at = sum(sizes), 0, 0
    while at < len(plan.folios):
        while (rest := budget.wait()) > 0 and not stop():
            time.sleep(min(rest, PACE))
        if stop():
            report.interrupted = True
            return
        through, size = at, 0
        # A batch has at least one folio, and otherwise as many as fit.
        while through < len(sizes) and (through == at or size + sizes[through] <= BATCH_BYTES):
            size += sizes[through]
            through += 1
        outcomes = space.trim_folios(plan.folios[at:through], plan.zero[at:through], by)
        for outcome in outcomes:
            report.add(outcome)
            if outcome.elapsed_ns:
                seconds.append(outcome.elapsed_ns / 1e9)
        budget.spend(size)
        at, done = through, done + size
        if progress is not None:
            progress(done, total, "trimmed")


def _remade(space: AddressSpace, plan: TrimPlan) -> Remade:
    """Predict which of the trimmed PMD folios khugepaged will make huge again."""
    pmd_order = plan.geometry.pmd_order
    huge = [at for at, (_, order) in enumerate(plan.folios) if order == pmd_order]
    addresses = np.array([plan.folios[at][0] for at in huge], np.uint64)
    return remade(space, addresses, np.array([plan.gains[at] for at in huge], np.int64))


def _anonymous(space: AddressSpace, within: Segment | None) -> Iterator[Segment]:
    low, high = within or (0, 1 << 64)
    for vma in space.vmas():
        start, end = max(vma.start, low), min(vma.end, high)
        if start < end and (vma.kind is VmaKind.ANON or vma.has_anon_vma is True) and vma.kind is not VmaKind.SPECIAL:
            yield start, end


def _whole_folios(columns: PteColumns, geometry: Geometry) -> list[Block]:
    """Return the large anonymous folios that are mapped in order, from their first page to their last.

    Raises:
        UnsupportedError: frames cannot be read.
    """
    if columns.pfn is None:
        raise UnsupportedError(
            "page frames cannot be seen, so the beginnings of folios are unknown", help="run it with CAP_SYS_ADMIN"
        )
    order = np.where(anonymous_pages(columns), columns.folio_order, -1).astype(np.int64)
    large = np.flatnonzero(order >= MIN_ANON_ORDER)
    page, frame = page_numbers(columns, geometry.page_size), columns.pfn.view(np.int64)
    heads = large[frame[large] & ((np.int64(1) << order[large]) - 1) == 0]
    last = heads + (np.int64(1) << order[heads]) - 1
    heads, last = heads[last < len(order)], last[last < len(order)]
    # Pages and frames that advance by the same length are mapped in order.
    whole = (page[last] - page[heads] == last - heads) & (frame[last] - frame[heads] == last - heads)
    whole &= order[last] == order[heads]
    runs = np.cumsum(np.diff(frame - page, prepend=0) != 0)
    whole &= runs[last] == runs[heads]
    heads = heads[whole]
    return list(zip((page[heads] * geometry.page_size).tolist(), order[heads].tolist(), strict=True))


def _with_zeroes(
    space: AddressSpace, columns: PteColumns, folios: list[Block], share: float
) -> Iterator[tuple[Block, NDArray[np.bool_]]]:
    """Yield the folios in which at least `share` of the pages contain only zeroes, with these pages.

    Raises:
        MthpError: as :func:`mthp.abilities.zero_filled`.
    """
    size = space.geometry.page_size
    sampled = []
    for address, order in folios:
        pages = 1 << order
        count = pages if share >= 1 else min(pages, math.ceil(math.log(MISSED) / math.log(1 - share)))
        step = pages // count
        sampled += [(address + page * size, address + (page + 1) * size) for page in range(step // 2, pages, step)]
    if not sampled:
        return
    sample = columns.select(sampled, size)
    empty = abilities.zero_filled(space, sample)
    starts = np.array([start // size for start, _ in sampled], np.int64)
    firsts = np.array([address // size for address, _ in folios], np.int64)
    hits = np.bincount(np.searchsorted(firsts, starts[empty], side="right") - 1, minlength=len(folios))
    for (address, order), hit in zip(folios, hits.tolist(), strict=True):
        if hit:
            segment = address, address + (size << order)
            zero = abilities.zero_filled(space, columns.select([segment], size))
            if zero.sum() >= share * len(zero):
                yield (address, order), zero
