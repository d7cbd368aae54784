"""Which orders a mapping may have, and the reason where there are none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mthp.eligibility import NO_COLLAPSE_FLAGS, Eligibility, Trigger, eligibility
from mthp.geometry import X86_64, geometry_named
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind

MIB = 1 << 20
ALWAYS = Switches("always", {2: "never", 4: "madvise", 9: "inherit"})
NEVER = Switches("never", {9: "inherit"})
HEAP = Vma(start=64 * MIB, end=80 * MIB, permissions="rw-p", flags=frozenset({"rd", "wr", "mr", "mw", "me", "ac"}))


def vma(**changes: Any) -> Vma:
    return dataclasses.replace(HEAP, **changes)


def flagged(*words: str) -> Vma:
    return vma(flags=HEAP.flags | set(words))


def test_switches_rule_khugepaged() -> None:
    assert eligibility(HEAP, X86_64, ALWAYS) == Eligibility((9,))
    assert eligibility(flagged("hg"), X86_64, ALWAYS) == Eligibility((4, 9))


def test_switches_do_not_rule_madvise() -> None:
    assert eligibility(HEAP, X86_64, NEVER, trigger="madvise") == Eligibility(X86_64.anon_orders)
    assert eligibility(flagged("hg"), X86_64, NEVER, trigger="madvise").orders == X86_64.anon_orders


@pytest.mark.parametrize(("target", "said"), [(HEAP, "without MADV_HUGEPAGE"), (flagged("hg"), "with MADV_HUGEPAGE")])
def test_switched_off_says_how(target: Vma, said: str) -> None:
    found = eligibility(target, X86_64, NEVER)
    assert not found
    assert said in found.reason
    assert "'never'" in found.reason


@pytest.mark.parametrize("trigger", ["khugepaged", "madvise"])
@pytest.mark.parametrize(
    ("target", "said"),
    [
        (flagged("nh"), "MADV_NOHUGEPAGE"),
        (flagged("nh", "hg"), "MADV_NOHUGEPAGE"),
        (vma(kind=VmaKind.HUGETLB), "hugetlbfs"),
        (vma(kind=VmaKind.SPECIAL), "driver"),
        (vma(kind=VmaKind.FILE), "file"),
        (vma(kind=VmaKind.SHMEM), "shared memory"),
        (vma(has_anon_vma=False), "never written|ever written"),
        (vma(end=65 * MIB), "smaller than 2M"),
        (vma(start=64 * MIB + 4096, end=67 * MIB), "no aligned 2M"),
        *((flagged(word), said) for word, said in (("io", "VM_IO"), ("pf", "VM_PFNMAP"), ("de", "VM_DONTEXPAND"))),
    ],
)
def test_refusals_give_their_reason(target: Vma, said: str, trigger: Trigger) -> None:
    found = eligibility(target, X86_64, ALWAYS, trigger=trigger)
    assert found.orders == ()
    assert any(one in found.reason for one in said.split("|")), found.reason


@pytest.mark.parametrize("word", NO_COLLAPSE_FLAGS)
def test_every_flag_that_khugepaged_avoids(word: str) -> None:
    assert not eligibility(flagged(word), X86_64, ALWAYS, trigger="madvise")


@pytest.mark.parametrize("target", [HEAP, flagged("hg"), vma(kind=VmaKind.FILE)])
def test_a_process_that_said_no_is_not_overruled(target: Vma) -> None:
    found = eligibility(target, X86_64, ALWAYS, trigger="madvise", thp_disabled=True, include_file=True)
    assert not found
    assert "PR_SET_THP_DISABLE" in found.reason


@pytest.mark.parametrize("kind", [VmaKind.FILE, VmaKind.SHMEM])
def test_files_collapse_to_the_pmd_size_alone(kind: VmaKind) -> None:
    found = eligibility(vma(kind=kind), X86_64, NEVER, trigger="madvise", include_file=True)
    assert found.orders == (9,)
    assert "2M only" in found.reason


def test_memory_whose_writes_are_unknown_is_not_refused_for_that() -> None:
    assert eligibility(vma(has_anon_vma=None), X86_64, ALWAYS)
    assert eligibility(vma(has_anon_vma=True), X86_64, ALWAYS)


def test_what_is_small_depends_on_the_machine() -> None:
    target = vma(start=512 * MIB, end=528 * MIB)
    assert eligibility(target, X86_64, ALWAYS, trigger="madvise")
    assert "smaller than 512M" in eligibility(target, geometry_named("arm64-64k"), ALWAYS, trigger="madvise").reason
    assert eligibility(target, geometry_named("s390x"), ALWAYS, trigger="madvise").orders == tuple(range(2, 9))


def test_flags_that_nobody_knows_do_no_harm() -> None:
    assert eligibility(vma(flags=frozenset()), X86_64, ALWAYS)
    assert eligibility(flagged("zz", "??"), X86_64, ALWAYS)


@pytest.mark.parametrize("kind", [VmaKind.FILE, VmaKind.SHMEM])
@pytest.mark.parametrize(
    ("start", "offset", "orders"),
    [
        (2 * MIB, 0, (9,)),
        (2 * MIB, 4 * MIB, (9,)),
        (2 * MIB, 1 * MIB, ()),
        (2 * MIB, 4096, ()),
        (2 * MIB + 8192, 8192, (9,)),
        (2 * MIB + 8192, 0, ()),
    ],
)
def test_file_memory_must_lie_in_the_file_as_in_the_address_space(
    kind: VmaKind, start: int, offset: int, orders: tuple[int, ...]
) -> None:
    vma = Vma(start, start + 6 * MIB, "rw-s", "/file", kind, offset=offset)
    found = eligibility(vma, X86_64, Switches.defaults(X86_64), trigger="madvise", include_file=True)
    assert found.orders == orders
    assert ("not aligned" in found.reason) == (not orders)
