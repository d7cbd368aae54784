"""Policies side by side on one target, with a verdict in words.

A policy is *on the frontier* if no other policy has at least its coverage and at most its bloat, and is better in one
of the two. Coverage is the share of the resident memory in folios of a chosen size or larger, the PMD size by default.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mthp import abilities
from mthp.abilities import heat_of
from mthp.addrspace import AddressSpace
from mthp.engine.policy_lookup import policy_names
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.heat import Heat
from mthp.lab.evaluate import Evaluation, evaluate
from mthp.lab.figures import (
    METRICS,
    Metric,
    Row,
    coverage_from,
    frontier,
    metric_of,
    order_column,
    setting_names,
    share,
)
from mthp.lab.heated import accesses_to_count
from mthp.lab.replay import misses, walks_at
from mthp.lab.tlb import Processor, TlbCounts
from mthp.measuring import out_of_reach_bytes
from mthp.progress import Progress
from mthp.sim.clock import Costs
from mthp.tabular import Tabular
from mthp.units import format_size, percent

DEFAULT_POLICIES = ("pmd-only", "rfc", "per-order", "mainline", "no-creep")


@dataclass(frozen=True)
class Comparison(Tabular):
    """Settings compared on one target.

    Attributes:
        label: name of the target.
        geometry: geometry of its machine.
        outcomes: one for each setting.
        covered: the smallest order that counts as covered.
        processor: the processor of the modelled TLB.
        costs: costs of khugepaged's work.
        misses_before, misses: TLB counts of the target's trace, or of accesses drawn by heat, now and after the last
            scan under each setting; None and empty without both.
        out_of_reach_bytes: memory in no whole PMD range of its mapping, with which no policy does anything.
        missing: what could not be read, and what would make it readable.
        heat: which memory the target uses, if known.
        traced: whether the target was recorded from a trace, so that page walks are those of the trace.
    """

    ROWS: ClassVar = "rows"
    JSON: ClassVar = (
        "target=label geometry covered_order=covered processor settings=names frontier=on_frontier verdict metrics rows"
        " out_of_reach_bytes missing heat"
    )

    label: str
    geometry: Geometry
    outcomes: tuple[Evaluation, ...]
    covered: int
    processor: Processor
    costs: Costs
    misses_before: TlbCounts | None = None
    misses: tuple[TlbCounts, ...] = ()
    out_of_reach_bytes: int = 0
    missing: tuple[str, ...] = ()
    heat: Heat | None = None
    traced: bool = False

    @property
    def rows(self) -> list[Row]:
        """One row for every setting and scan, the state before included: see :meth:`Evaluation.rows`.

        They also have the columns ``setting``, the setting's name, and ``coverage``; with a trace also ``tlb_misses``,
        for the state before and after the last scan, None in between.
        """
        names = self.names
        tlb = {
            "tlb_entries": self.processor.last_level_entries,
            "coalesced_order": self.processor.coalesced_order(self.geometry.page_size),
        }
        rows = [
            {"setting": name} | row | {"coverage": self.coverage(outcome, row["scan"])}
            for name, outcome in zip(names, self.outcomes, strict=True)
            for row in outcome.rows(self.costs, **tlb)
        ]
        return rows if self.misses_before is None else [row | {"tlb_misses": self._walks(row)} for row in rows]

    def _walks(self, row: Row) -> int | None:
        """Return the page walks of the trace in the state of a row, if known."""
        index = self.names.index(row["setting"])
        assert self.misses_before is not None
        return walks_at(row["scan"], len(self.outcomes[index].scans) - 1, self.misses_before, self.misses[index])

    @property
    def names(self) -> list[str]:
        """The name of each setting (:func:`mthp.lab.figures.setting_names`)."""
        return setting_names([outcome.setting for outcome in self.outcomes])

    def coverage(self, outcome: Evaluation, scan: int = -1) -> float:
        """Return the share of the resident memory that is covered after a scan, by default the last."""
        counts = outcome.scans[scan]
        # A folio of the PMD order counts only if a PMD entry maps it: PTEs may map it, too.
        if self.covered >= self.geometry.pmd_order:
            return share(counts.pmd_mapped, int(counts.by_order.sum()))
        return coverage_from(counts.by_order, self.covered)

    @property
    def frontier(self) -> list[bool]:
        """Whether each setting is on the frontier of coverage against bloat, after the last scan."""
        coverage = [self.coverage(outcome) for outcome in self.outcomes]
        return frontier(coverage, [outcome.scans[-1].filled for outcome in self.outcomes])

    @property
    def on_frontier(self) -> list[str]:
        """The names of the settings on the frontier."""
        return [name for name, on in zip(self.names, self.frontier, strict=True) if on]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The definitions of the columns that are figures."""
        return {
            name: metric_of(name)
            for name in self.rows[0]
            if name in METRICS or name.startswith(order_column(0).rstrip("0"))
        }

    @property
    def verdict(self) -> list[str]:
        """The comparison in words, one sentence each."""
        size = self.geometry.label(self.covered)
        if not any(int(outcome.scans[0].by_order.sum()) for outcome in self.outcomes):
            return [f"{self.label} has no resident memory that may be collapsed: no policy has an effect."]
        before = self.coverage(self.outcomes[0], 0)
        best = [
            (name, outcome) for name, outcome, on in zip(self.names, self.outcomes, self.frontier, strict=True) if on
        ]
        # Settings with equal results share one entry.
        groups: dict[tuple[float, int], list[str]] = {}
        for name, outcome in sorted(best, key=lambda pair: self.coverage(pair[1])):
            groups.setdefault((self.coverage(outcome), outcome.scans[-1].filled), []).append(name)
        parts = [
            f"{_listed(names)} ({size} coverage {before:.1%} -> {coverage:.1%}, bloat {self._bytes(filled)})"
            for (coverage, filled), names in groups.items()
        ]
        sentences = [f"On the frontier of {size} coverage against bloat: {'; '.join(parts)}."]
        sentences += self._beaten()
        sentences += self._creep()
        sentences += self._hot()
        sentences += self._trace()
        return sentences

    def _beaten(self) -> list[str]:
        """Return a sentence for each setting that another one beats."""
        sentences = []
        pairs = list(zip(self.names, self.outcomes, strict=True))
        for (name, outcome), on in zip(pairs, self.frontier, strict=True):
            if on:
                continue
            coverage, filled = self.coverage(outcome), outcome.scans[-1].filled
            other, by = max(
                (
                    (other_name, other)
                    for other_name, other in pairs
                    if self.coverage(other) >= coverage
                    and other.scans[-1].filled <= filled
                    # Equal in both is not better.
                    and (self.coverage(other), -other.scans[-1].filled) != (coverage, -filled)
                ),
                key=lambda pair: (self.coverage(pair[1]), -pair[1].scans[-1].filled),
            )
            sentences.append(
                f"{name} is behind {other}: coverage {coverage:.2%} against {self.coverage(by):.2%},"
                f" bloat {self._bytes(filled)} against {self._bytes(by.scans[-1].filled)}."
            )
        return sentences

    def _creep(self) -> list[str]:
        """Return a sentence on the settings that add memory after the first scan."""
        creeping = [
            f"{name} (bloat {self._bytes(outcome.scans[1].filled)} after the first scan,"
            f" {self._bytes(outcome.scans[-1].filled)} after {_settled(outcome)})"
            for name, outcome in zip(self.names, self.outcomes, strict=True)
            # The state before the first scan is the first of `scans`, so creep needs three.
            if len(outcome.scans) > 2 and outcome.scans[-1].filled > outcome.scans[1].filled
        ]
        if creeping:
            return [f"Creep, which is growth after the first scan: {'; '.join(creeping)}."]
        if any(len(outcome.scans) > 2 for outcome in self.outcomes):
            return ["No setting creeps: no scan after the first adds memory."]
        return []

    def _hot(self) -> list[str]:
        """Return a sentence on the accesses that memory that PMD entries map serves."""
        if not any(outcome.heated for outcome in self.outcomes):
            return []
        size = self.geometry.label(self.geometry.pmd_order)
        pairs = zip(self.names, self.outcomes, strict=True)
        parts = ", ".join(f"{percent(outcome.scans[-1].hot)} ({name})" for name, outcome in pairs)
        now = percent(self.outcomes[0].scans[0].hot)
        return [f"Of the observed accesses, {now} go to memory mapped as {size} now; {parts}."]

    def _trace(self) -> list[str]:
        """Return a sentence on the page walks of the trace, or of accesses drawn by heat."""
        if self.misses_before is None:
            return []
        parts = (f"{counts.walks:,} ({name})" for name, counts in zip(self.names, self.misses, strict=True))
        source = self.heat.source if self.heat is not None else ""
        weighed_by = "accesses of the trace" if self.traced else f"random accesses by heat from {source or 'a file'}"
        return [
            f"On {self.processor.title}, the {self.misses_before.accesses:,} {weighed_by} that go to another page than"
            f" the one before take {self.misses_before.walks:,} page walks now; {', '.join(parts)}."
        ]

    def _bytes(self, pages: int) -> str:
        return format_size(pages * self.geometry.page_size)


def _settled(outcome: Evaluation) -> int:
    """Return the number of the last scan that added memory."""
    scans = outcome.scans
    return max(index for index in range(1, len(scans)) if scans[index].filled > scans[index - 1].filled)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def compare(
    space: AddressSpace,
    settings: Sequence[PlanOptions],
    *,
    scans: int | None = 1,
    covered: int | None = None,
    processor: Processor | None = None,
    costs: Costs | None = None,
    heat: Heat | None = None,
    contents: bool = False,
    walks: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Compare `settings` on the memory of `space`; see :func:`mthp.lab.evaluate.evaluate`.

    Args:
        covered: the smallest order that counts as covered; by default the PMD order.
        heat: which memory is used; by default what was recorded with it.
        walks: count page walks of the trace that the memory was recorded from, without one of accesses drawn by heat,
            which takes a second for each setting.

    Raises:
        UsageError: no settings; fewer than one scan; an unknown policy, order or limit.
        TargetVanishedError: the process exited in the meantime.
    """
    if not settings:
        raise UsageError("no policy was given", help=f"use --policies with some of {', '.join(policy_names())}")
    if scans is not None and not (isinstance(scans, int) and scans >= 1):
        raise UsageError(f"{scans!r} is not a number of scans", help="use 1 for the next, None for the final state")
    geometry = space.geometry
    processor = processor or Processor.named("skylake")
    heat = heat_of(space, heat)
    outcomes = evaluate(space, settings, scans=scans, contents=contents, heat=heat, progress=progress)
    accesses = accesses_to_count(space, heat) if walks else None
    before, after = (None, []) if accesses is None else misses(space, settings, accesses, processor, scans)
    return Comparison(
        label=space.label,
        geometry=geometry,
        outcomes=tuple(outcomes),
        covered=geometry.pmd_order if covered is None else geometry.check_order(covered),
        processor=processor,
        costs=costs or Costs(),
        misses_before=before,
        misses=tuple(after),
        out_of_reach_bytes=out_of_reach_bytes(space),
        missing=space.missing,
        heat=heat,
        traced=abilities.accesses(space) is not None,
    )


def settings_of(
    policies: Iterable[str],
    *,
    max_ptes_none: Sequence[int | None] = (None,),
    max_ptes_swap: Sequence[int | None] = (None,),
    max_ptes_shared: Sequence[int | None] = (None,),
    orders: Sequence[str | None] = (None,),
    mthp_min_order: Sequence[int | None] = (None,),
    include_file: bool = False,
) -> list[PlanOptions]:
    """Return every combination of the values as options of a plan; None is the value of the target's machine."""
    return [
        PlanOptions(
            policy=policy,
            orders=sizes,
            max_ptes_none=none,
            max_ptes_swap=swap,
            max_ptes_shared=shared,
            mthp_min_order=chunk,
            include_file=include_file,
        )
        # The policy varies fastest, so policies with the same limits follow each other.
        for sizes, none, swap, shared, chunk, policy in itertools.product(
            orders, max_ptes_none, max_ptes_swap, max_ptes_shared, mthp_min_order, policies
        )
    ]
