"""Scan results: each has a meaning, and the words that the kernel's trace events print."""

from __future__ import annotations

import errno

import pytest

from golden.loader import STATES_FILE, load
from mthp.results import ScanResult, result_of_madvise


@pytest.mark.parametrize("result", ScanResult)
def test_every_result_means_something(result: ScanResult) -> None:
    assert result.meaning
    assert not result.meaning.endswith(".")


def test_meanings_and_trace_words_tell_results_apart() -> None:
    assert len({result.meaning for result in ScanResult}) == len(ScanResult)
    assert len({result.trace_word for result in ScanResult}) == len(ScanResult)


def test_nothing_is_falsy_but_fail() -> None:
    assert [result for result in ScanResult if not result] == [ScanResult.FAIL]


@pytest.mark.slow
def test_trace_words_of_a_real_kernel_are_known() -> None:
    """Those that recorded cases contain, in scans and in attempts."""
    words = {result.trace_word for result in ScanResult}
    cases = load(STATES_FILE)
    seen = {case.scan_result for case in cases if case.scanned}
    seen |= {word for case in cases for _, word in case.attempts}
    assert len(seen) > 8
    assert seen <= words


@pytest.mark.parametrize(
    ("result", "word"),
    [
        (ScanResult.SUCCEED, "succeeded"),
        (ScanResult.FAIL, "failed"),
        (ScanResult.PAGE_COUNT, "not_suitable_page_count"),
        (ScanResult.PTE_UFFD, "pte_uffd_wp"),
        (ScanResult.PMD_MAPPED, "page_pmd_mapped"),
        (ScanResult.CGROUP_CHARGE_FAIL, "ccgroup_charge_failed"),
        (ScanResult.EXCEED_NONE_PTE, "exceed_none_pte"),
        (ScanResult.NO_PTE_TABLE, "no_pte_table"),
    ],
)
def test_trace_words(result: ScanResult, word: str) -> None:
    assert result.trace_word == word


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (0, ScanResult.SUCCEED),
        (errno.ENOMEM, ScanResult.ALLOC_HUGE_PAGE_FAIL),
        (errno.EBUSY, ScanResult.CGROUP_CHARGE_FAIL),
        (errno.EAGAIN, ScanResult.PAGE_COUNT),
        (errno.EINVAL, ScanResult.VMA_CHECK),
        (errno.ESRCH, ScanResult.ANY_PROCESS),
        (errno.ENOSYS, ScanResult.FAIL),
    ],
)
def test_errno_of_madvise(error: int, result: ScanResult) -> None:
    assert result_of_madvise(error) is result


def test_errno_tells_success_from_failure_as_real_calls_did() -> None:
    calls = [
        (case.raw["passes"][0]["errno"], case.scan_result) for case in load(STATES_FILE) if case.trigger == "madvise"
    ]
    assert len(calls) > 400
    for error, word in calls:
        assert (result_of_madvise(error) is ScanResult.SUCCEED) == (word == ScanResult.SUCCEED.trace_word)
