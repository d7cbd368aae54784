"""A trace against what policies make: page walks that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.abilities import Accesses
from mthp.engine.select import PlanOptions
from mthp.lab.compare import compare, settings_of
from mthp.lab.replay import mapped_after, replayed
from mthp.lab.tlb import Processor
from mthp.ptes import ORDER_NONE, Pte
from mthp.vma import Vma

P = int(Pte.PRESENT)
BASE = 0x7F00_0000_0000
PAGE = BASE >> 12


def space() -> FakeSpace:
    """Return a full PMD range, one with a folio of 16 pages and nothing else, and one that is huge."""
    runs = page_runs((512, P, 0), (16, P, 4), (496, 0, ORDER_NONE), (512, P | Pte.PMD_MAPPED, 9))
    return FakeSpace([(Vma(BASE, BASE + 3 * (2 << 20), "rw-p"), *runs)])


def test_large_folios_are_found_as_they_are_and_as_they_become() -> None:
    now = mapped_after(space(), PlanOptions(policy="mainline", max_ptes_none=0), 0)
    assert now.page.tolist() == [*range(PAGE + 512, PAGE + 528), *range(PAGE + 1024, PAGE + 1536)]
    assert (now.order.tolist(), now.huge.tolist()) == ([4] * 16 + [9] * 512, [False] * 16 + [True] * 512)
    later = mapped_after(space(), PlanOptions(policy="mainline", max_ptes_none=0), None)
    assert len(later.page) == 512 + 16 + 512
    order, huge = later.of(np.array([PAGE + 3, PAGE + 520, PAGE + 1500, PAGE + 600, 0], np.int64))
    assert (order.tolist(), huge.tolist()) == ([9, 4, 9, 0, 0], [True, False, True, False, False])


@pytest.mark.parametrize(("name", "expected"), [("skylake", 512 + 16 + 1), ("zen4", 512 + 4 + 1), ("neoverse-n1", 514)])
def test_walks_of_one_pass_are_the_translations(name: str, expected: int) -> None:
    pages = np.arange(PAGE, PAGE + 3 * 512, dtype=np.int64)
    pages = pages[(pages < PAGE + 528) | (pages >= PAGE + 1024)]
    mapped = mapped_after(space(), PlanOptions(policy="mainline", max_ptes_none=0), 0)
    counts = replayed(lambda: iter([pages[:300], pages[300:]]), mapped, Processor.named(name), 4096)
    assert (counts.accesses, counts.walks) == (1040, expected)


class Traced(FakeSpace):
    """The memory of :func:`space`, recorded from a trace."""

    def accesses(self) -> Accesses:
        return lambda: [np.tile(np.arange(PAGE, PAGE + 512, dtype=np.int64), 2)]


def test_compare_tells_the_walks_of_every_setting() -> None:
    result = compare(Traced(space()._mappings), settings_of(["mainline", "pmd-only"], max_ptes_none=[0]), scans=None)
    # 512 base pages fit the second level; as one huge page they take one walk.
    by_scan = {(row["setting"], row["scan"]): row["tlb_misses"] for row in result.rows}
    last = max(scan for _, scan in by_scan)
    assert by_scan["mainline", 0] == by_scan["pmd-only", 0] == 512
    assert by_scan["mainline", last] == by_scan["pmd-only", last] == 1
    assert "the 1,024 accesses of the trace" in result.verdict[-1]
    assert "take 512 page walks now; 1 (mainline), 1 (pmd-only)" in result.verdict[-1]
    assert "tlb_misses" not in compare(space(), settings_of(["mainline"])).rows[0]


def test_a_recording_of_a_trace_is_compared_with_its_walks(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from e2e.helpers import mthp, mthp_json

    lines = "".join(f" L {BASE + at * 4096:x},8\n" for at in range(2048))
    (tmp_path / "trace").write_text(lines)
    assert mthp("record", "--from-trace", tmp_path / "trace", "-o", tmp_path / "r").returncode == 0
    answer = mthp_json("compare", tmp_path / "r", "--policies", "mainline", "--max-ptes-none", "0")
    assert [row["tlb_misses"] for row in answer["rows"]] == [2048, 4]
    assert "page walks" in mthp("compare", tmp_path / "r", "--policies", "mainline").stdout
