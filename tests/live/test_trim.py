"""Trimming pages of zeroes in large folios of other processes, beside threads that use them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import mthp
from memory_cgroups import memory_cgroup
from mthp.errors import MthpError
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.process import Process
from mthp.linux.sysfs import ThpSysfs
from mthp.ptes import Block, Pte
from mthp.results import ScanResult
from mthp.trimming import SMALLEST_LARGE, TrimBy, Trimming, in_use
from mthp.vma import Vma
from split_targets import Churn
from targets import MADV_COLLAPSE, PAGE_SIZE, PMD_ORDER, PMD_SIZE, Puppet
from thp_switches import ThpSwitches, size_name

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "thp"),
    pytest.mark.usefixtures("no_sizes"),
]

PAGES = PMD_SIZE // PAGE_SIZE
CHURN_SECONDS = float(os.environ.get("MTHP_TEST_CHURN_SECONDS", "10"))
TRIMS = int(os.environ.get("MTHP_TEST_TRIMS", "2000"))
TOLD_SHARE = 0.95
"""Part of the zero-filled memory that `mthp inspect` reports which must leave Rss."""

WAYS: tuple[TrimBy, ...] = ("cold", "split")


@pytest.fixture(params=WAYS)
def by(request: pytest.FixtureRequest) -> TrimBy:
    with open_live("self") as space:
        if request.param not in space.trims_by:
            pytest.skip(f"folios cannot be trimmed by {request.param} here")
    way: TrimBy = request.param
    return way


def huge(puppet: Puppet, used: int, at: int = 0) -> int:
    """Have the puppet map a PMD folio with `used` pages in use, the page `at` the first."""
    address = puppet.map(PMD_SIZE)
    puppet.write(address + at * PAGE_SIZE, used)
    puppet.tell("madvise", address, PMD_SIZE, MADV_COLLAPSE)
    return address


def whole(addresses: list[int]) -> list[Block]:
    return [(address, PMD_ORDER) for address in addresses]


def zeroes(space: LiveAddressSpace, address: int) -> NDArray[np.bool_]:
    return space.zero_filled(space.read([(address, address + PMD_SIZE)]))


def resident(pid: int, address: int) -> int:
    """Resident pages of the mapping at `address`, as smaps has them."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    return (int(text[text.index(f"{address:x}-") :].partition("\nRss:")[2].split()[0]) << 10) // PAGE_SIZE


def test_pages_of_zeroes_go_back_and_the_others_stay(puppet: Puppet, by: TrimBy) -> None:
    addresses = [huge(puppet, 40, at) for at in (0, 100, PAGES - 40)]
    with open_live(puppet.pid) as space:
        trimming: Trimming = space
        zero = [zeroes(space, address) for address in addresses]
        assert [int(each.sum()) for each in zero] == [PAGES - 40] * 3
        outcomes = trimming.trim_folios(whole(addresses), zero, by)
        for address, outcome, pages in zip(addresses, outcomes, zero, strict=True):
            assert outcome.result is ScanResult.SUCCEED, outcome
            orders = np.zeros(PAGES, np.int8) if by == "cold" else in_use(pages, PAGE_SIZE)
            kept = int((~pages | (orders > 0)).sum())
            assert resident(puppet.pid, address) == kept
            assert outcome.given_back == PAGES - kept
            assert sum(count << order for order, count in outcome.left.items()) == kept
            columns = space.read([(address, address + PMD_SIZE)])
            there = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
            assert (columns.folio_order[there] == orders[there]).all()
    for address, at in zip(addresses, (0, 100, PAGES - 40), strict=True):
        assert puppet.tell("read", address + at * PAGE_SIZE, 40, 1) == 40
        assert puppet.tell("read", address, PAGES, 1) == 40


@pytest.mark.parametrize(
    ("stage", "result", "word"),
    [
        (lambda puppet, at: puppet.tell("mlock", at, PMD_SIZE, 0), ScanResult.VMA_CHECK, "mlocked"),
        (lambda puppet, at: puppet.tell("fork"), ScanResult.EXCEED_SHARED_PTE, "shared"),
        (lambda puppet, at: puppet.tell("pin", at, PAGE_SIZE), ScanResult.PAGE_COUNT, "pinned"),
        (lambda puppet, at: puppet.write(at, PAGES), ScanResult.FAIL, "zeroes"),
        (lambda puppet, at: puppet.tell("munmap", at, PMD_SIZE), ScanResult.PTE_NON_PRESENT, "one folio"),
    ],
    ids=["mlock", "fork", "pinned", "full", "unmapped"],
)
def test_a_folio_is_left_as_it_is(
    puppet: Puppet, by: TrimBy, stage: Callable[[Puppet, int], object], result: ScanResult, word: str
) -> None:
    address, other = huge(puppet, 40), huge(puppet, 40)
    stage(puppet, address)
    with open_live(puppet.pid) as space:
        outcomes = space.trim_folios(whole([address, other]), [zeroes(space, each) for each in (address, other)], by)
        assert [outcome.result for outcome in outcomes][1] is (
            # A child shares all memory.
            result if result is ScanResult.EXCEED_SHARED_PTE else ScanResult.SUCCEED
        )
        assert outcomes[0].result is result, outcomes[0]
        assert word in outcomes[0].reason
        assert not outcomes[0].given_back


def test_a_folio_of_which_a_part_was_unmapped_is_trimmed_too(puppet: Puppet, by: TrimBy) -> None:
    address = huge(puppet, 40, PAGES // 2)
    puppet.tell("munmap", address, PAGE_SIZE * 8)
    rest = address + PAGE_SIZE * 8
    with open_live(puppet.pid) as space:
        (outcome,) = space.trim_folios(whole([address]), [zeroes(space, address)], by)
        assert outcome.result is ScanResult.SUCCEED
        assert outcome.given_back == PAGES - 8 - resident(puppet.pid, rest)
        assert outcome.given_back >= PAGES - 8 - 64
        assert puppet.tell("read", rest, PAGES - 8, 1) == 40


@pytest.mark.parametrize("stage", ["mlock", "pin", "fork", "munmap"])
def test_what_happens_after_the_look_is_shown_by_the_tables(puppet: Puppet, by: TrimBy, stage: str) -> None:
    address = huge(puppet, 40)
    arguments = {"mlock": (address, PMD_SIZE, 0), "pin": (address, PAGE_SIZE), "munmap": (address, PMD_SIZE)}

    class Meddled(LiveAddressSpace):
        """A space whose process acts once its mappings were listed."""

        def vmas(self) -> list[Vma]:
            found = super().vmas()
            puppet.tell(stage, *arguments.get(stage, ()))
            return found

    with open_live(puppet.pid) as space:
        zero = zeroes(space, address)
    with Meddled(Process(puppet.pid)) as space:
        (outcome,) = space.trim_folios(whole([address]), [zero], by)
        if stage == "munmap":
            assert not outcome.left
            return
        assert outcome.given_back == PAGES - resident(puppet.pid, address)
        assert puppet.tell("read", address, PAGES, 1) == 40
        if (stage, by) not in (("fork", "split"), ("mlock", "split")):
            assert outcome.result is not ScanResult.SUCCEED
            assert outcome.reason


def test_a_target_that_exits(puppet: Puppet, by: TrimBy) -> None:
    address = huge(puppet, 40)
    with open_live(puppet.pid) as space:
        zero = zeroes(space, address)
        puppet.kill()
        with pytest.raises(MthpError) as raised:
            space.trim_folios(whole([address]), [zero], by)
        assert raised.value.exit_code == 4


def test_a_target_at_its_memory_limit_is_trimmed(by: TrimBy) -> None:
    """A split charges nothing."""
    with memory_cgroup() as cgroup, Puppet() as puppet:
        cgroup.enter(puppet.pid)
        address = huge(puppet, 40)
        cgroup.limit(cgroup.used)
        with open_live(puppet.pid) as space:
            (outcome,) = space.trim_folios(whole([address]), [zeroes(space, address)], by)
        assert outcome.result is ScanResult.SUCCEED
        assert outcome.given_back == PAGES - resident(puppet.pid, address) > 0
        cgroup.limit(1 << 30)
        assert puppet.tell("read", address, PAGES, 1) == 40


TRIMMING = """
from mthp.linux.live import open_live
with open_live({pid}) as space:
    folios = {folios!r}
    zero = [space.zero_filled(space.read([(address, address + {size})])) for address, _ in folios]
    space.trim_folios(folios, zero, {by!r})
"""


@pytest.mark.slow
def test_two_at_once_lose_nothing(puppet: Puppet, by: TrimBy) -> None:
    addresses = [huge(puppet, 40) for _ in range(8)]
    script = TRIMMING.format(pid=puppet.pid, folios=whole(addresses), size=PMD_SIZE, by=by)
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    for address in addresses:
        assert resident(puppet.pid, address) < PAGES
        assert puppet.tell("read", address, PAGES, 1) == 40


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 2])
def test_killed_in_the_middle_it_leaves_nothing_to_undo(puppet: Puppet, by: TrimBy, done: int) -> None:
    addresses = [huge(puppet, 40) for _ in range(4)]
    killed = f"""
import os, signal
from mthp.linux.split import zeroes
plain, done = zeroes.Trimmer._one, 0
def one(self, *rest):
    global done
    if done == {done}:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return plain(self, *rest)
zeroes.Trimmer._one = one
"""
    script = TRIMMING.format(pid=puppet.pid, folios=whole(addresses), size=PMD_SIZE, by=by)
    assert subprocess.run([sys.executable, "-c", killed + script], check=False).returncode == -signal.SIGKILL
    assert [resident(puppet.pid, address) < PAGES for address in addresses] == [n < done for n in range(4)]
    assert "TracerPid:\t0\n" in Path(f"/proc/{puppet.pid}/status").read_text()
    # Another run returns the rest.
    subprocess.run([sys.executable, "-c", script], check=True)
    for address in addresses:
        assert resident(puppet.pid, address) < PAGES
        assert puppet.tell("read", address, PAGES, 1) == 40


@pytest.mark.slow
def test_khugepaged_works_on_the_same_memory(by: TrimBy, thp_switches: ThpSwitches) -> None:
    for name in ("scan_sleep_millisecs", "alloc_sleep_millisecs"):
        thp_switches.set(f"khugepaged/{name}", "0")
    thp_switches.set("enabled", "always")
    thp_switches.only(size_name(PMD_ORDER), word="inherit")
    results, given_back = trimmed_beside_threads(by, "-")
    assert results[ScanResult.SUCCEED], results
    assert given_back


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-", "z", "d", "f"])
def test_threads_lose_nothing_while_their_memory_is_trimmed_again_and_again(by: TrimBy, flags: str) -> None:
    results, given_back = trimmed_beside_threads(by, flags)
    # Memory that is discarded all the time, or shared with children, is rarely one whole folio.
    assert (results[ScanResult.SUCCEED] and given_back) or flags in ("d", "f"), results


def trimmed_beside_threads(by: TrimBy, flags: str) -> tuple[Counter[ScanResult], int]:
    """Collapse and trim memory that threads use, repeatedly; return the outcomes and the number of freed pages."""
    end = time.monotonic() + CHURN_SECONDS
    results: Counter[ScanResult] = Counter()
    given_back = 0
    with Churn(3, max(16, 2 * PMD_SIZE >> 20), 30, flags) as churn, open_live(churn.pid) as space:
        addresses = list(range(churn.address, churn.address + churn.size, PMD_SIZE))
        while time.monotonic() < end:
            space.collapse_blocks(whole(addresses))
            outcomes = space.trim_folios(whole(addresses), [zeroes(space, address) for address in addresses], by)
            results.update(outcome.result for outcome in outcomes)
            given_back += sum(outcome.given_back for outcome in outcomes)
        assert churn.finish() == 0
        assert churn.accesses
    return results, given_back


class Trims:
    """Compare trims beside threads that write with `mthp inspect --zero-filled` before each round."""

    def __init__(self, order: int, by: TrimBy) -> None:
        self._order, self._by = order, by
        self._told = self._fallen = self._accesses = self._wrong = self.trimmed = 0
        self._results: Counter[str] = Counter()

    def round(self, churn: Churn, space: LiveAddressSpace) -> None:
        """Trim the large folios in the memory of `churn`."""
        before = resident(churn.pid, churn.address)
        self._told += zero_filled_reported(churn.pid, churn.address)
        columns = space.read([(churn.address, churn.address + churn.size)])
        zero = space.zero_filled(columns).reshape(-1, 1 << self._order)
        large = np.flatnonzero(columns.folio_order[:: 1 << self._order] == self._order)
        folios = [(churn.address + (at << self._order) * PAGE_SIZE, self._order) for at in large.tolist()]
        outcomes = space.trim_folios(folios, list(zero[large]), self._by)
        self._fallen += before - resident(churn.pid, churn.address)
        self.trimmed += sum(outcome.result is ScanResult.SUCCEED for outcome in outcomes)
        self._results.update(f"{each.result.name} {each.reason}".strip() for each in outcomes)

    def end(self, churn: Churn) -> None:
        """Print the outcome of all rounds, and compare it with the reports."""
        wrong = churn.finish()
        size = f"{PAGE_SIZE << self._order >> 10}K"
        print(f"{self.trimmed} folios of {size} trimmed by {self._by} beside 2 threads: {dict(self._results)};")
        print(f"{churn.accesses} accesses, {wrong} words wrong; Rss fell by {self._fallen / self._told:.2%}")
        print(f"of the {self._told * PAGE_SIZE >> 20} MiB that mthp inspect --zero-filled reported")
        assert not wrong
        assert churn.accesses
        # A split to larger orders keeps zeroes beside pages in use.
        assert self._fallen >= TOLD_SHARE * self._told or self._by == "split"


@pytest.mark.slow
def test_rss_of_huge_pages_falls_by_what_inspect_reports(by: TrimBy) -> None:
    trims, end = Trims(PMD_ORDER, by), time.monotonic() + CHURN_SECONDS
    with Churn(2, max(64, 2 * PMD_SIZE >> 20), 30) as churn, open_live(churn.pid) as space:
        while time.monotonic() < end or not trims.trimmed:
            space.collapse_blocks(whole(list(range(churn.address, churn.address + churn.size, PMD_SIZE))))
            trims.round(churn, space)
        trims.end(churn)


@pytest.mark.slow
@pytest.mark.requires("mthp")
def test_rss_of_mthps_falls_by_what_inspect_reports(thp_switches: ThpSwitches) -> None:
    with open_live("self") as space:
        if "cold" not in space.trims_by:
            pytest.skip("folios cannot be trimmed by cold here")
    order = ((64 << 10) // PAGE_SIZE).bit_length() - 1
    thp_switches.only(size_name(order))
    trims = Trims(order, "cold")
    with Churn(2, 64, 30, "hb") as churn, open_live(churn.pid) as space:
        while trims.trimmed < TRIMS:
            # Each first touch of a block of 64 KiB makes a folio.
            churn.fill_again()
            trims.round(churn, space)
        trims.end(churn)


def zero_filled_reported(pid: int, address: int) -> int:
    """Return how many zero-filled pages of large folios `mthp inspect --zero-filled` reports of one mapping."""
    census = mthp.inspect(pid, zero_filled=True)
    pages = next(each.pages for each in census.vmas if each.vma.start <= address < each.vma.end)
    assert pages.zero_filled is not None
    return int(pages.zero_filled[1:-1].sum())


def test_a_way_that_is_not_to_be_had_is_refused_with_the_remedy(puppet: Puppet) -> None:
    if not ThpSysfs().exists:
        pytest.skip("no THP")
    with open_live(puppet.pid) as space:
        for way in set(WAYS) - set(space.trims_by):
            with pytest.raises(MthpError) as raised:
                space.trim_folios([(0, PMD_ORDER)], [np.ones(PAGES, np.bool_)], way)
            assert raised.value.help


def test_what_is_in_use_stays_in_the_largest_folios() -> None:
    zero = np.ones(PAGES, np.bool_)
    zero[PAGES // 2 :] = False
    block = max(4, SMALLEST_LARGE // PAGE_SIZE)
    zero[3] = False
    orders = in_use(zero, PAGE_SIZE)
    assert (orders[PAGES // 2 :] == PMD_ORDER - 1).all()
    assert (orders[:block] == block.bit_length() - 1).all()
    assert not orders[block : PAGES // 2].any()
