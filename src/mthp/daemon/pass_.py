"""One pass through a target: its open address space, and the PMD ranges that are left to scan in it.

Ranges are sorted by fullness, the fullest first, so that a budget makes the most of its bytes; ranges that are about
equally full are done by address, so that neighbours are read and moved together. The engine scans and collapses
(:class:`mthp.engine.visit.Visit`); this module adds the current switches and tunables, the rule's limits and the heat.
It counts the work (:func:`account`), and trims (:func:`give_back`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp import abilities, thp_unadvised
from mthp.abilities import take_calls, take_pauses
from mthp.addrspace import AddressSpace
from mthp.budget import Room
from mthp.daemon.eagerness import EagernessLevel, large_enough
from mthp.daemon.environment import Environment
from mthp.daemon.telemetry import RuleCounters, ServiceCounters, WorkCounters
from mthp.engine.admission import Admission, Candidate
from mthp.engine.select import PlanOptions
from mthp.engine.smallblocks import SmallBlocks
from mthp.engine.trim import TrimOptions, trim_space
from mthp.engine.visit import Visit
from mthp.engine.visited import Passage
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError
from mthp.heat import Heat, worth
from mthp.means import Means, needs_move_reason, price_of_moving
from mthp.naming import ProcessFacts
from mthp.outline import Outline
from mthp.ptes import Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import VmaKind

TRIM_DISTANCE = 0.5
"""Part of the share of zeroes from which folios are trimmed that a collapse may fill, so that new folios are not
trimmed although some of their pages come to hold zeroes.
"""

_FULLNESS_STEPS = 4
"""Classes of fullness."""

_HEAT_STEPS = 8
"""Classes of heat, each half as hot as the one above; one more is for memory that is colder or not used."""


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """Mappings in which nothing may be made, for one reason."""

    reason: str
    mappings: int
    bytes: int


class TargetPass:
    """One pass through a target.

    Args:
        level: the target's level of eagerness, with its settings.
        bloat_left: returns the bytes that filling may still add; None for unlimited.

    Attributes:
        space: open address space of the target; closed with this.
        visit: the scan and collapse of its ranges.
        out_of_memory: the limit at which a charge failed, which ends the pass; ``""`` if none did.
        reasons: reasons beyond the scan result for failed and refused attempts, with the number of times.
        unadvised: whether folios below the PMD order are made in advised memory only.
        eligible: whether :meth:`outline` found a mapping in which folios may be made.

    Raises:
        TargetVanishedError, NotPermittedError, UnsupportedError: the address space cannot be opened.
    """

    def __init__(
        self, environment: Environment, pid: int, level: EagernessLevel, bloat_left: Callable[[], int | None]
    ) -> None:
        self._environment = environment
        settings = self._settings = level.settings
        self._smallest = level.smallest
        self.out_of_memory = ""
        self.unadvised = False
        self.reasons: Counter[str] = Counter()
        self.eligible = False
        self._stretches: list[tuple[Segment, int]] = []
        self.means = Means(
            settings.mechanism,
            max_bloat=settings.max_bloat,
            max_pause=settings.max_pause_ns / 1e9,
            pause_share=settings.pause_share,
            fill=True,
            reserve=settings.reserve,
            max_threads=settings.max_threads,
            min_split_share=settings.min_split_share,
            # Also the rate of all together rules out khugepaged, which keeps none.
            rate=settings.rate or environment.configuration.bytes_per_second,
        )
        self.space = environment.opened(pid)
        try:
            self._mechanisms = environment.mechanisms(self.space, self.means)
            self._tell_of_khugepaged()
            if settings.orders != "enabled" and not self._orders():
                raise UnsupportedError(self.needs_move or "the rule's mechanism makes none of its sizes")
            room = Room(lambda: abilities.memory_bounds(self.space), settings.reserve)
            self._admission = Admission(self.space, room, bloat_left, available=environment.free.available)
            self.visit = Visit(self.space, self._choice(), self.means, admit=self._admit, count_folios=True)
            self._parts = SmallBlocks(self.space, self.means, self._admit)
        except MthpError:
            self.space.close()
            raise

    @property
    def touching(self) -> bool:
        """Whether memory of the target is being worked on at this moment; any thread may ask."""
        return self.visit.touching or self._parts.touching

    def todo_parts(self) -> None:
        """Work on memory outside of whole PMD ranges too, after the ranges."""
        self._parts.plan(self._choice())

    def _choice(self) -> PlanOptions:
        settings = self._settings
        return PlanOptions(
            policy=settings.policy,
            orders=self._orders(),
            max_ptes_none=settings.max_ptes_none,
            max_ptes_swap=settings.max_ptes_swap,
            max_ptes_shared=settings.max_ptes_shared,
            switches=self._environment.switches_for(self._chosen),
            tunables=self._environment.tunables,
        )

    def only_advised(self) -> None:
        """Make folios below the PMD order in advised memory only (:mod:`mthp.thp_unadvised`)."""
        self.unadvised = True
        self._admission.only_advised()

    @property
    def makes(self) -> frozenset[int]:
        """The orders that the rule's mechanism makes."""
        return frozenset(self._mechanisms)

    def _orders(self) -> tuple[int, ...] | str:
        orders = self._settings.orders
        return orders if isinstance(orders, str) else tuple(sorted(self._chosen))

    @property
    def _chosen(self) -> frozenset[int]:
        """The orders of `makes` that the rule wants, and that are large enough."""
        return large_enough(self.makes & self._wanted, self._smallest)

    @property
    def needs_move(self) -> str:
        """The sizes that the rule's mechanism does not make, with the price of the mover; ``""`` if none."""
        geometry = self._environment.geometry
        left = sorted(self._wanted - {geometry.pmd_order} - self.makes)
        if not left:
            return ""
        price = price_of_moving(abilities.threads(self.space), self._settings.max_pause_ns)
        return f"{', '.join(map(geometry.label, left))}: {needs_move_reason(price)}"

    @property
    def _wanted(self) -> frozenset[int]:
        """The orders that the rule, or the system's switches, want."""
        orders = self._settings.orders
        return frozenset(self._environment.switches.orders(advised=True) if isinstance(orders, str) else orders)

    def _tell_of_khugepaged(self) -> None:
        """Print once that the kernel's khugepaged is driven, because that affects all processes."""
        geometry = self._environment.geometry
        driven = sorted(order for order in self._wanted if self._mechanisms.get(order) == "khugepaged")
        if driven:
            self._environment.say_once(
                "khugepaged",
                f"the kernel's khugepaged is driven for folios of {', '.join(map(geometry.label, driven))}: for seconds"
                " at a time these sizes alone are on for the whole system",
            )

    def outline(self) -> Outline:
        """Return the outline of all that may be collapsed."""
        segments: list[Segment] = []
        address = 0
        if self.visit.thp_disabled:
            return Outline.joined([])
        while (stretch := self.visit.find(address).stretch) is not None:
            segments.append(stretch)
            address = stretch[1]
        self.eligible = bool(segments)
        return self.space.outline(segments)

    def todo(self, outline: Outline, broken: NDArray[np.bool_], heat: Heat | None = None) -> None:
        """Set the ranges to scan: `broken` ones first (bool, shape (ranges,)), then the hottest, then the fullest.

        Ranges of one class of heat and fullness are done by address, so that neighbours are read and moved together.
        """
        size, n = self._environment.geometry.pmd_size, self._environment.geometry.ptes_per_pmd
        fullness = outline.present.astype(np.int64) * _FULLNESS_STEPS // n
        # One number: a broken range before any hot one, a hotter one before any fuller one.
        fullness += (_FULLNESS_STEPS + 1) * (_classes(outline, size, heat) + (_HEAT_STEPS + 1) * broken)
        # The last key is the first to be compared.
        order = np.lexsort((outline.address, -fullness))
        address, present = outline.address[order], outline.present[order]
        breaks = np.flatnonzero((np.diff(address.astype(np.int64)) != size) | (np.diff(fullness[order]) != 0)) + 1
        for first, last in itertools.pairwise([0, *breaks.tolist(), len(address)] if len(address) else []):
            start, end = int(address[first]), int(address[last - 1]) + size
            self._stretches.append(((start, end), int(present[first:last].sum())))
        # Taken from the end.
        self._stretches.reverse()

    @property
    def left_alone(self) -> list[LeftAlone]:
        """The mappings in which nothing may be made, by reason.

        Anonymous memory comes first, and the most memory.
        """
        refused = self.visit.refused
        ranked = sorted(refused, key=lambda one: (one[0] is not VmaKind.ANON, -refused[one][1]))
        return [LeftAlone(one[1], *refused[one]) for one in ranked]

    @property
    def is_done(self) -> bool:
        """Whether no range is left, and no block outside of whole ranges."""
        return not self._stretches and not self._parts.left

    @property
    def gain(self) -> int:
        """The present pages in the next stretch."""
        return self._stretches[-1][1] if self._stretches else 0

    def piece(self, ranges: int) -> list[tuple[Passage, Outline]]:
        """Scan at most `ranges` PMD ranges; return the result of each stretch, and its outline afterwards."""
        size, n = self._environment.geometry.pmd_size, self._environment.geometry.ptes_per_pmd
        done: list[tuple[Passage, Outline]] = []
        # Switches and tunables may have changed since the last piece.
        if (choice := self._choice()) != self.visit.choice:
            self.visit.choice = choice
            self.visit.forget()
        self._admission.renew()
        while ranges > 0 and self._stretches and not self._environment.stopping():
            (start, end), pages = self._stretches.pop()
            stop = min(end, start + ranges * size)
            passage = self.visit.scan((start, stop), (stop - start) // size * n)
            # Also a passage that got nowhere counts, so that the loop ends.
            ranges -= max(1, (passage.end - start) // size)
            if passage.end < end:
                left = pages * (end - passage.end) // (end - start)
                self._stretches.append(((passage.end, end), left))
            self._note(passage.attempts)
            if len(passage.addresses):
                done.append((passage, self.space.outline([(int(passage.addresses[0]), passage.end)])))
        if ranges > 0 and not self._stretches and self._parts.left and not self._environment.stopping():
            passage = self._parts.batch(ranges * size)
            self._note(passage.attempts)
            done.append((passage, Outline.joined([])))
        return done

    def _admit(self, candidate: Candidate) -> ScanResult:
        trim = self._settings.trim
        if trim is not None and candidate.filled > trim * TRIM_DISTANCE * (1 << candidate.order):
            return ScanResult.EXCEED_NONE_PTE
        # khugepaged chooses the ranges itself, so it must not fill anything if there is a budget.
        by_khugepaged = self._mechanisms.get(candidate.order) == "khugepaged"
        if by_khugepaged and candidate.filled and self.means.max_bloat is not None:
            return ScanResult.EXCEED_NONE_PTE
        result = self._admission(candidate)
        if result is ScanResult.CGROUP_CHARGE_FAIL:
            self.reasons[self._admission.room.reason] += 1
        return result

    def _note(self, attempts: Sequence[BlockOutcome]) -> None:
        """Note the reasons of failed attempts, and their consequences for the next attempts."""
        self.reasons.update(attempt.reason for attempt in attempts if attempt.reason)
        if any(attempt.reason == thp_unadvised.REASON for attempt in attempts):
            self.only_advised()
        if any(self._admission.ended_by(attempt.result) for attempt in attempts):
            self.out_of_memory = self._admission.room.reason or ScanResult.CGROUP_CHARGE_FAIL.meaning
            self._stretches.clear()
            self._parts.drop()


def _classes(outline: Outline, size: int, heat: Heat | None) -> NDArray[np.int64]:
    """Return the class of heat of some PMD ranges, 0 to `_HEAT_STEPS`: int64, shape (ranges,); all 0 without heat."""
    classes = np.zeros(len(outline), np.int64)
    if heat is None or not len(outline):
        return classes
    address = outline.address.astype(np.uint64)
    seen = worth(heat.within(address, address + np.uint64(size)), outline.present.astype(np.int64))
    used = seen > 0
    classes[used] = np.maximum(_HEAT_STEPS + np.floor(np.log2(seen[used] / seen.max())), 0).astype(np.int64)
    return classes


def account(
    environment: Environment,
    counters: WorkCounters,
    service: ServiceCounters,
    facts: ProcessFacts,
    space: AddressSpace,
    passage: Passage,
) -> int:
    """Count the work of a passage over some PMD ranges; return the bytes in the folios that it made.

    Args:
        counters, service: counters of the target.
        space: address space of the target, which hands over its pauses and calls.
    """
    geometry = environment.geometry
    rule = environment.services.rules.setdefault(service.rule, RuleCounters())
    work = _work_of(passage, environment, rule)
    pauses, calls = take_pauses(space), take_calls(space)
    # Calls for the PMD size are not among those of the space.
    calls += [one.elapsed_ns for one in passage.attempts if one.order == geometry.pmd_order and one.elapsed_ns]
    for one in (counters, environment.total):
        one.add(work)
        one.stopped.add(pauses)
        one.called.add(calls)
    made = work.collapsed_bytes(geometry)
    service.collapsed_bytes += made
    service.bloat_bytes += work.bloat_bytes
    if work.collapsed or work.failed:
        environment.event_of(
            facts,
            "collapsed" if work.collapsed else "failed",
            folios=work.collapsed_by_size(geometry),
            failed={result.name: count for result, count in work.failed.items()},
            copied_bytes=work.copied_bytes,
            bloat_bytes=work.bloat_bytes,
            max_pause_seconds=max(pauses, default=0) / 1e9,
        )
    return made


def _work_of(passage: Passage, environment: Environment, rule: RuleCounters) -> WorkCounters:
    """Return the work of a passage; count it for its rule, and note the orders of which the machine has folios."""
    size = environment.geometry.page_size
    work = WorkCounters(scanned_ptes=passage.progress)
    for attempt in passage.attempts:
        order, result = attempt.order, attempt.result
        # A split may leave pages that the collapse filled beside its blocks, also if it fails.
        added = attempt.left_filled + (attempt.filled if result is ScanResult.SUCCEED else 0)
        work.bloat_bytes += added * size
        rule.bloat_bytes[order] += added * size
        if result is ScanResult.SUCCEED:
            work.collapsed[order] += 1
            work.copied_bytes += attempt.copied * size
            environment.free.given(order)
        # A folio that is there already is not a failure.
        elif result is not ScanResult.PTE_MAPPED_HUGEPAGE:
            work.failed[result] += 1
            rule.failed[order] += 1
            # Without a duration the kernel was not called: the admission refused.
            if result is ScanResult.ALLOC_HUGE_PAGE_FAIL and attempt.elapsed_ns:
                environment.free.refused(order, environment.tunables.alloc_sleep_millisecs / 1000)
    work.ranges.update(map(ScanResult, passage.results.tolist()))
    rule.collapsed.update(work.collapsed)
    return work


def give_back(environment: Environment, facts: ProcessFacts, share: float) -> tuple[int, int | None]:
    """Trim folios of which `share` is zeroes, and write an event.

    Returns:
        The bytes that were given back, and the bytes of zeroes that were found and remain; None if the trim failed.

    Raises:
        TargetVanishedError: the process is gone.
    """
    try:
        with environment.opened(facts.pid) as space:
            report = trim_space(space, TrimOptions(zero=share), stop=environment.stopping)
    except TargetVanishedError:
        raise
    except MthpError as error:
        environment.event_of(facts, "trim_failed", reason=error.message)
        return 0, None
    if report.plan.folios:
        environment.event_of(
            facts,
            "trimmed",
            folios=report.trimmed,
            failed=report.failed_by_result,
            trimmed_bytes=report.given_back_bytes,
        )
    return report.given_back_bytes, max(0, report.plan.zero_bytes - report.given_back_bytes)
