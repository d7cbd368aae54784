"""Print what the series do, as figures of the recorded cases: the tables of ``docs/policies.md``.

The rows of `rfc`, `rfc2` and `per-order` come from recordings of kernels with the series (``tests/golden``); those of
`pmd-only` and `mainline` from the simulated machine with the same cases, which agrees with every recorded case of these
policies. Only cases of khugepaged count that were recorded with all three series: 512 PTEs of written pages and holes,
with the same limits and orders.

    python bench/recorded_series.py [fill] [refused] [dropped] [read] [creep]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mthp.engine.bits import Bits
from mthp.engine.occupancy import Runs
from mthp.engine.policy import Limits, PerOrder, Policy, Rules
from mthp.results import ScanResult
from mthp.sim.golden.cases import Case, case_lines, case_of, expanded, parse_case
from mthp.sim.golden.stage import Stage
from mthp.sim.kernel import NEWEST, SERIES, kernel_of
from mthp.sim.trace import Collapse

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
POLICIES = ("pmd-only", "rfc", "rfc2", "per-order", "mainline")
RECORDED = {policy: series for series, policy in SERIES.items()}
LARGE = 4
"""Folios of this order (64 KiB) and larger ones count as large: smaller ones save few TLB entries."""

Orders = list[int | str]
"""For each page, the order of its folio, or a word."""


class Unforgetting(PerOrder):
    """The limits of `per-order`, walked as a tree: no order is given up, and neither is the rest of a range."""

    scans_each_run = False

    def scan_limits(self, rules: Rules) -> Limits | None:
        n = rules.geometry.ptes_per_pmd
        return Limits(n, n, n)

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        # As the scan of a run: an attempt in vain would leave its pages waiting for the LRU lists.
        enough: Bits = runs.none_or_zero <= self.attempt_limits(runs.order, rules).none
        return enough


def raw_cases(policy: str, kind: str) -> list[dict[str, Any]]:
    """Return the cases recorded of a series, khugepaged's alone."""
    path = GOLDEN / f"linux-6.12.117-{RECORDED[policy]}-{kind}.jsonl.gz"
    return [case for case in map(parse_case, case_lines(path)) if case["trigger"] == "khugepaged"]


def key(case: dict[str, Any]) -> str:
    """What a case begins with: state, orders and limits."""
    names = ("before", "before_flags", "orders_enabled", "max_ptes_none", "max_ptes_swap", "max_ptes_shared", "vma")
    return repr([case[name] for name in names])


def common(kind: str) -> list[dict[str, dict[str, Any]]]:
    """The cases that all three series were recorded in, by policy."""
    by_key = {policy: {key(case): case for case in raw_cases(policy, kind)} for policy in RECORDED}
    shared = [found for found in by_key["rfc"] if all(found in cases for cases in by_key.values())]
    return [{policy: by_key[policy][found] for policy in RECORDED} for found in shared]


def recorded(case: dict[str, Any]) -> list[Orders]:
    """Return the orders before, and after each pass."""
    known = case_of(case)
    return [initial(known), *(expanded(one.orders) for one in known.passes)]


def initial(case: Case) -> Orders:
    """The orders that a case begins with."""
    return Stage(case, "pmd-only", NEWEST).observe().orders


def simulated(case: dict[str, Any], policy: str | Policy, passes: int = 3) -> list[Orders]:
    """Return the same of the simulated machine under another policy."""
    known = case_of(case)
    stage = Stage(known, policy, NEWEST)
    orders = [stage.observe().orders]
    for _ in range(passes):
        stage.run_pass()
        orders.append(stage.observe().orders)
    return orders


def of_policy(cases: dict[str, dict[str, Any]], policy: str | Policy) -> list[Orders]:
    """Return the orders before and after each pass, recorded if they were."""
    if isinstance(policy, str) and policy in cases:
        return recorded(cases[policy])
    return simulated(cases["rfc"], policy)


def pages(orders: Orders) -> int:
    """Pages that are mapped, the zero page apart."""
    return sum(isinstance(order, int) for order in orders)


def large(orders: Orders, before: Orders) -> int:
    """Of the pages that were mapped before, those in large folios now."""
    pairs = zip(orders, before, strict=True)
    return sum(isinstance(now, int) and now >= LARGE and isinstance(was, int) for now, was in pairs)


def share(part: int, whole: int) -> str:
    """Return a percentage."""
    return f"{part / whole:.1%}" if whole else "-"


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown."""
    heads = list(heads)
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.stdout.flush()


def fill() -> None:
    """What is filled, and how much of the memory lies in large folios then, by what max_ptes_none allows."""
    cases = common("anon")
    bands = {"0": (0, 0), "1 to 63": (1, 63), "64 to 400": (64, 400), "511": (511, 511)}
    print(f"{len(cases)} cases; in folios of 64K and more after the first pass, and filled, of what was resident:\n")
    rows = []
    for policy in (*POLICIES, Unforgetting()):
        cells = []
        for low, high in bands.values():
            before = filled = covered = 0
            for one in cases:
                if low <= one["rfc"]["max_ptes_none"] <= high:
                    was, first, *_ = of_policy(one, policy)
                    before += pages(was)
                    filled += pages(first) - pages(was)
                    covered += large(first, was)
            cells.append(f"{share(covered, before)}, {share(filled, before)}")
        rows.append([policy if isinstance(policy, str) else "per-order's limits, nothing given up", *cells])
    table(["max_ptes_none", *bands], rows)


def refused() -> None:
    """In how many cases anything is collapsed where max_ptes_none is below 64."""
    rows = []
    for policy in ("rfc", "rfc2"):
        below = [case for case in raw_cases(policy, "anon") if case["max_ptes_none"] < 64]
        above = [case for case in raw_cases(policy, "anon") if case["max_ptes_none"] >= 64]
        counts = [f"{sum(made(case) for case in cases)} of {len(cases)}" for cases in (below, above)]
        rows.append([policy, *counts])
    table(["cases with a collapse in the first pass", "max_ptes_none below 64", "64 and more"], rows)


def made(case: dict[str, Any]) -> bool:
    """Return whether the first pass collapsed anything."""
    return any(event[:1] + event[2:3] == ["collapse", "succeeded"] for event in case["passes"][0]["events"])


def dropped() -> None:
    """Print the coverage that `per-order` loses because it drops orders, and the rest of a range."""
    rows = []
    for kind in ("anon", "states-nowr"):
        before = kept = tree = more = 0
        cases = raw_cases("per-order", kind)
        for case in cases:
            was, first, *_ = recorded(case)
            other = simulated(case, Unforgetting(), passes=1)[1]
            counts = large(first, was), large(other, was)
            before, kept, tree = before + pages(was), kept + counts[0], tree + counts[1]
            more += counts[0] < counts[1]
        rows.append([kind, len(cases), share(kept, before), share(tree, before), more])
    table(["", "cases", "in 64K and more, recorded", "with nothing given up", "cases in which that is more"], rows)


def read() -> None:
    """What a first pass reads, and how often it tries in vain."""
    cases = common("anon")
    rows = []
    for policy in POLICIES:
        entries = tried = collapsed = 0
        for one in cases:
            known = case_of(one.get(policy, one["rfc"]))
            stage = Stage(known, policy, kernel_of(known.release, known.series) if policy in one else NEWEST)
            stage.run_pass()
            clock = stage.machine.clock
            entries += clock.spent_ns().get("scan_pte", 0) * 1000 // clock.costs.scan_pte
            results = [event.result for event in stage.machine.trace.take() if isinstance(event, Collapse)]
            tried += len(results)
            collapsed += results.count(ScanResult.SUCCEED)
        rows.append([policy, f"{entries / len(cases):.0f}", collapsed, tried - collapsed])
    print(f"{len(cases)} PMD ranges of 512 PTEs:\n")
    table(["", "PTEs read by the scan of one", "folios made", "attempts that failed"], rows)


def creep() -> None:
    """What later passes add, where max_ptes_none is neither 0 nor 511."""
    cases = [one for one in common("anon") if 0 < one["rfc"]["max_ptes_none"] < 511]
    print(f"{len(cases)} cases; filled of what was resident, after each pass:\n")
    rows = []
    for policy in POLICIES:
        before, filled, later = 0, [0, 0, 0], 0
        for one in cases:
            was, *after = of_policy(one, policy)
            before += pages(was)
            filled = [have + pages(now) - pages(was) for have, now in zip(filled, after, strict=True)]
            later += pages(after[-1]) > pages(after[0])
        rows.append([policy, *(share(part, before) for part in filled), later])
    table(["", "pass 1", "pass 2", "pass 3", "cases that grew after pass 1"], rows)


FIGURES: dict[str, Callable[[], None]] = {
    "fill": fill,
    "refused": refused,
    "dropped": dropped,
    "read": read,
    "creep": creep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="which ones; all by default")
    for name in parser.parse_args().figures or FIGURES:
        print(f"\n## {name}\n")
        FIGURES[name]()


if __name__ == "__main__":
    main()
