"""Refusals of the mover that follow from texts and columns."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.linux.mover.refuse.block import BlockRefusal, SpecialRanges, refuse_blocks
from mthp.linux.mover.refuse.devices import device_of, is_harmless, refuse_files
from mthp.linux.mover.refuse.process import foreign_executable
from mthp.linux.mover.taskfiles import Thread
from mthp.movechecks import refuse_vma
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns
from mthp.vma import Vma, VmaKind

PAGE = 4096
BASE = 1 << 30
PLAIN = frozenset({"rd", "wr", "mr", "mw", "me"})
R = BlockRefusal


def vma(start: int = BASE, pages: int = 512, **fields: Any) -> Vma:
    values: dict[str, Any] = {"permissions": "rw-p", "flags": PLAIN} | fields
    return Vma(start=start, end=start + pages * PAGE, **values)


# --- Mappings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("ac",), ("hg",), ("sd",), ("nr",), ("dc", "nr"), ("ac", "hg", "sd")])
def test_plain_memory_is_allowed(more: tuple[str, ...]) -> None:
    assert refuse_vma(vma(flags=PLAIN | frozenset(more))) is None
    assert refuse_vma(vma(flags=PLAIN | frozenset(more), name="[heap]")) is None
    assert refuse_vma(vma(flags=PLAIN | frozenset(more), name="[anon:arena]")) is None


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"kind": VmaKind.FILE}, "vma_not_anonymous"),
        ({"kind": VmaKind.HUGETLB}, "vma_not_anonymous"),
        ({"kind": VmaKind.SPECIAL}, "vma_not_anonymous"),
        ({"kind": VmaKind.SHMEM}, "vma_not_private"),
        ({"permissions": "rw-s"}, "vma_not_private"),
        ({"permissions": "r--p"}, "vma_not_read_write"),
        ({"permissions": "-w-p"}, "vma_not_read_write"),
        ({"permissions": "---p"}, "vma_not_read_write"),
        ({"permissions": "rwxp", "flags": PLAIN | {"ex"}}, "vma_executable"),
        ({"name": "[stack]"}, "vma_stack"),
        ({"flags": frozenset()}, "vma_flags_unknown"),
    ],
)
def test_other_kinds_of_memory_are_refused(fields: dict[str, Any], key: str) -> None:
    refusal = refuse_vma(vma(**fields))
    assert refusal is not None
    assert refusal.key == key
    assert refusal.reason


FLAG_KEYS = {
    "sl": "vma_sealed", "gd": "vma_stack", "lo": "vma_locked", "nh": "vma_nohugepage", "um": "vma_userfaultfd",
    "uw": "vma_userfaultfd", "ui": "vma_userfaultfd", "mg": "vma_mergeable",
    "wf": "vma_wipeonfork", "dd": "vma_dontdump", "dp": "vma_droppable", "gu": "vma_guard",
    "ss": "vma_shadow_stack", "mt": "vma_tagged",
}  # fmt: skip


@pytest.mark.parametrize("word", [*FLAG_KEYS, "io", "pf", "mm", "de", "ht", "sr", "rr", "sf", "ar", "??", "zz"])
def test_every_other_flag_is_refused(word: str) -> None:
    """Also one that no kernel has yet, which is what an allow-list is for."""
    refusal = refuse_vma(vma(flags=PLAIN | {word, "ac"}))
    assert refusal is not None
    assert refusal.key == FLAG_KEYS.get(word, "vma_flags")
    if refusal.key == "vma_flags":
        assert word in refusal.reason


# --- Blocks -----------------------------------------------------------------------------------------------------------

EXCLUSIVE = int(Pte.PRESENT)


def columns(state: list[int], order: list[int], pfn: list[int] | None = None, start: int = BASE) -> PteColumns:
    frames = None if pfn is None else np.array(pfn, np.uint64)
    segment = (start, start + len(state) * PAGE)
    return PteColumns((segment,), np.array(state, np.uint16), np.array(order, np.int8), frames)


def refusal_of(  # one block of order 2 at BASE, by default
    state: list[int] | None = None,
    order: list[int] | None = None,
    pfn: list[int] | None = None,
    *,
    address: int = BASE,
    block_order: int = 2,
    mapcounts: list[int] | None = None,
    vmas: list[Vma] | None = None,
    special: tuple[tuple[int, int], ...] = (),
    fill: bool = False,
) -> BlockRefusal:
    verdict = refuse_blocks(
        columns(state or [EXCLUSIVE] * 4, order or [0] * 4, pfn),
        None if mapcounts is None else np.array(mapcounts, np.int64),
        np.array([address], np.int64),
        np.array([block_order], np.int8),
        vmas=[vma()] if vmas is None else vmas,
        special=SpecialRanges(stacks=special),
        page_size=PAGE,
        fill=fill,
    )
    assert verdict.dtype == np.uint8
    assert verdict.shape == (1,)
    return BlockRefusal(int(verdict[0]))


def test_a_plain_block_may_be_moved() -> None:
    assert refusal_of() is R.NONE
    assert refusal_of(mapcounts=[1, 1, 1, 1]) is R.NONE
    assert refusal_of(state=[EXCLUSIVE | Pte.LAZYFREE] * 4) is R.NONE


@pytest.mark.parametrize(
    ("bits", "why"),
    [
        (0, R.ABSENT),
        (Pte.PRESENT | Pte.ZERO, R.ABSENT),
        (Pte.SWAP, R.SWAPPED),
        (Pte.SWAP | Pte.GUARD, R.MARKER),
        (Pte.SWAP | Pte.UFFD_WP, R.MARKER),
        (Pte.PRESENT | Pte.UFFD_WP, R.MARKER),
        (Pte.PRESENT | Pte.SHARED, R.SHARED),
        (Pte.PRESENT | Pte.FILE, R.NOT_ANON),
        (Pte.PRESENT | Pte.HUGETLB, R.NOT_ANON),
    ],
)
@pytest.mark.parametrize("at", range(4))
def test_one_page_decides(bits: Pte, why: BlockRefusal, at: int) -> None:
    state = [EXCLUSIVE] * 4
    state[at] = int(bits)
    order = [0] * 4
    if not bits & Pte.PRESENT:
        order[at] = ORDER_NONE
    assert refusal_of(state, order) is why
    assert refusal_of(state, order, fill=True) is (R.NONE if why is R.ABSENT else why)


def test_nothing_at_all_is_not_filled_either() -> None:
    assert refusal_of([0] * 4, [ORDER_NONE] * 4, fill=True) is R.EMPTY
    assert refusal_of([int(Pte.PRESENT | Pte.ZERO)] * 4, fill=True) is R.EMPTY


def test_a_page_mapped_twice() -> None:
    assert refusal_of(mapcounts=[1, 1, 2, 1]) is R.SHARED
    # The count of the zero page, which everybody maps, says nothing.
    state = [EXCLUSIVE, EXCLUSIVE, int(Pte.PRESENT | Pte.ZERO), EXCLUSIVE]
    assert refusal_of(state, mapcounts=[1, 1, 900, 1], fill=True) is R.NONE


def test_large_folios() -> None:
    assert refusal_of(order=[2] * 4, pfn=[8, 9, 10, 11]) is R.ALREADY
    assert refusal_of(order=[4] * 4, pfn=[20, 21, 22, 23]) is R.ALREADY
    assert refusal_of(order=[9] * 4) is R.ALREADY
    # Two folios of that order, each with a part in the block, as after mremap(2).
    assert refusal_of(order=[2] * 4, pfn=[10, 11, 12, 13]) is R.LARGE_FOLIO
    assert refusal_of(order=[2, 2, 0, 0], pfn=[8, 9, 77, 78]) is R.LARGE_FOLIO
    # Smaller folios are to be collapsed, and an unknown order is not a refusal.
    assert refusal_of(order=[1, 1, 0, 0], pfn=[8, 9, 77, 78]) is R.NONE
    assert refusal_of(order=[ORDER_UNKNOWN] * 4) is R.NONE


def test_where_it_lies() -> None:
    assert refusal_of(address=BASE + PAGE) is R.MISALIGNED
    assert refusal_of(vmas=[]) is R.NOT_IN_ONE_VMA
    assert refusal_of(vmas=[vma(BASE - 2 * PAGE, 4)]) is R.NOT_IN_ONE_VMA
    assert refusal_of(vmas=[vma(BASE, 2), vma(BASE + 2 * PAGE, 510)]) is R.NOT_IN_ONE_VMA
    assert refusal_of(vmas=[vma(BASE + 4 * PAGE)]) is R.NOT_IN_ONE_VMA
    assert refusal_of(vmas=[vma(flags=PLAIN | {"lo"})]) is R.VMA
    assert refusal_of(address=BASE + 4 * PAGE) is R.NOT_READ
    assert refusal_of(block_order=3) is R.NOT_READ
    # [vsyscall] does not fit in a signed 64-bit integer.
    assert refusal_of(vmas=[vma(), vma((1 << 64) - (10 << 20), 1)]) is R.NONE


@pytest.mark.parametrize(
    ("special", "why"),
    [
        ((BASE - 8, BASE), R.NONE),
        ((BASE - 8, BASE + 1), R.SPECIAL),
        ((BASE + PAGE, BASE + PAGE + 24), R.SPECIAL),
        ((BASE + 4 * PAGE - 1, BASE + 4 * PAGE + 8), R.SPECIAL),
        ((BASE + 4 * PAGE, BASE + 4 * PAGE + 8), R.NONE),
        ((BASE - 8, BASE + 8 * PAGE), R.SPECIAL),
    ],
)
def test_special_ranges(special: tuple[int, int], why: BlockRefusal) -> None:
    assert refusal_of(special=(special,)) is why
    # Others around it change nothing.
    assert refusal_of(special=((0, 8), special, (BASE << 1, (BASE << 1) + 8))) is why


_STATES = (
    EXCLUSIVE, EXCLUSIVE, EXCLUSIVE, EXCLUSIVE, EXCLUSIVE, 0, int(Pte.SWAP), int(Pte.SWAP | Pte.GUARD),
    int(Pte.PRESENT | Pte.ZERO), int(Pte.PRESENT | Pte.SHARED),
)  # fmt: skip


def plainly(pages: list[tuple[int, int]], order: int, *, special: bool, fill: bool) -> BlockRefusal:
    """Return the same verdict by loops, for pages of (state, folio order) without frame numbers."""
    states = [state for state, _ in pages]
    held = [folio for state, folio in pages if state & Pte.PRESENT and not state & Pte.ZERO]
    if special:
        return R.SPECIAL
    for bits, why in ((Pte.GUARD, R.MARKER), (Pte.SWAP, R.SWAPPED), (Pte.SHARED, R.SHARED)):
        if any(state & bits for state in states):
            return why
    if len(held) == len(pages) and all(folio >= order for folio in held):
        return R.ALREADY
    if any(folio >= order for folio in held):
        return R.LARGE_FOLIO
    if not held:
        return R.EMPTY
    return R.ABSENT if len(held) < len(pages) and not fill else R.NONE


@given(data=st.data(), fill=st.booleans())
def test_many_blocks_at_once(data: st.DataObject, fill: bool) -> None:
    """Blocks of several orders in two segments, of which the first is read last."""
    pages = data.draw(st.lists(st.tuples(st.sampled_from(_STATES), st.integers(0, 4)), min_size=64, max_size=64))
    plain = data.draw(st.booleans())
    if plain:
        pages = [(EXCLUSIVE, folio % 2) for _, folio in pages]
    special = data.draw(st.lists(st.integers(0, 63), max_size=4))
    halves = (pages[32:], pages[:32])
    read = PteColumns(
        ((BASE + 32 * PAGE, BASE + 64 * PAGE), (BASE, BASE + 32 * PAGE)),
        np.array([state for half in halves for state, _ in half], np.uint16),
        np.array([folio for half in halves for _, folio in half], np.int8),
    )
    blocks = [(first, order) for order in (2, 3, 4) for first in range(0, 64, 1 << order)]
    verdict = refuse_blocks(
        read,
        None,
        np.array([BASE + first * PAGE for first, _ in blocks], np.int64),
        np.array([order for _, order in blocks], np.int8),
        vmas=[vma(pages=64)],
        special=SpecialRanges(robust_lists=tuple((BASE + at * PAGE + 8, BASE + at * PAGE + 32) for at in special)),
        page_size=PAGE,
        fill=fill,
    )
    expected = [
        plainly(
            pages[first : first + (1 << order)],
            order,
            special=any(first <= at < first + (1 << order) for at in special),
            fill=fill,
        )
        for first, order in blocks
    ]
    assert [BlockRefusal(code) for code in verdict.tolist()] == expected


def test_no_blocks() -> None:
    none = np.empty(0, np.int64)
    verdict = refuse_blocks(
        columns([], []), None, none, none.astype(np.int8), vmas=[], special=SpecialRanges(),
        page_size=PAGE,
    )  # fmt: skip
    assert verdict.shape == (0,)


def test_every_verdict_has_a_reason() -> None:
    reasons = [why.objection.reason for why in BlockRefusal if why]
    assert all(reasons)
    assert len(set(reasons)) == len(reasons)
    assert BlockRefusal.NONE.objection.reason == ""


# --- Processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "kind"),
    [
        ("/dev/kvm", "kvm"),
        ("anon_inode:kvm-vcpu:0", "kvm"),
        ("/dev/vfio/vfio", "vfio"),
        ("anon_inode:[vfio-device]", "vfio"),
        ("/dev/infiniband/uverbs0", "infiniband"),
        ("/dev/nvidia0", "nvidia"),
        ("/dev/nvidia-uvm", "nvidia"),
        ("/dev/dri/renderD128", "dri"),
        ("/dev/video0", "video"),
        ("/dev/vhost-net", "vhost"),
        ("/dev/mshv", "hypervisor"),
        ("/dev/dsa/wq0.0", "sva"),
        ("/dev/xpmem", "xpmem"),
        ("/dev/null", None),
        ("/home/user/dev/kvm", None),
        ("socket:[4711]", None),
        ("anon_inode:[eventpoll]", None),
    ],
)
def test_devices(link: str, kind: str | None) -> None:
    assert device_of(link) == kind
    assert {refusal.key for refusal in refuse_files([(link, 0)])} == ({f"device_{kind}"} if kind else set())


@pytest.mark.parametrize(
    ("link", "number", "harmless"),
    [
        ("/dev/null", (1, 3), True),
        ("/jail/null", (1, 3), True),
        ("/dev/urandom", (1, 9), True),
        ("/dev/mem", (1, 1), False),
        ("/dev/pts/0", (136, 0), True),
        ("/dev/tty", (5, 0), True),
        ("/dev/fuse", (10, 229), True),
        ("/jail/dev/net/tun", (10, 200), True),
        ("/dev/rtc0", (251, 0), True),
        ("/dev/vport0p2", (246, 2), True),
        ("/dev/of-a-later-kernel", (10, 300), False),
        ("/tmp/kvm-by-another-name", (10, 232), False),
        ("/dev/neuron0", (240, 0), False),
    ],
)
def test_an_unknown_device_is_refused(link: str, number: tuple[int, int], harmless: bool) -> None:
    device = os.makedev(*number)
    assert is_harmless(link, device) == harmless
    refusals = refuse_files([(link, device), ("socket:[4711]", 0), ("/etc/passwd", 0)])
    assert [refusal.key for refusal in refusals] == ([] if harmless else ["device_unknown"])
    assert all(link in refusal.reason for refusal in refusals)


def elf(word_class: int = 2, machine: int = 62) -> bytes:
    return b"\x7fELF" + bytes([word_class]) + bytes(11) + b"\x02\x00" + machine.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("header", "machine", "key"),
    [
        (elf(), "x86_64", None),
        (elf(machine=183), "aarch64", None),
        (elf(1, 3), "x86_64", "not_64_bit"),
        (elf(1, 62), "x86_64", "not_64_bit"),  # x32
        (elf(machine=183), "x86_64", "executable"),
        (b"#!/bin/sh\n" + bytes(40), "x86_64", "executable"),
        (b"\x7fELF", "x86_64", "executable"),
        (b"", "x86_64", "executable"),
    ],
)
def test_executables(header: bytes, machine: str, key: str | None) -> None:
    refusal = foreign_executable(header, machine)
    assert (refusal and refusal.key) == key


def test_thread_status() -> None:
    text = b"Name:\tiou-wrk-7\nUmask:\t0022\nState:\tD (disk sleep)\nTgid:\t7\nTracerPid:\t4\nSeccomp:\t2\n"
    assert Thread.parse(9, text) == Thread(tid=9, comm="iou-wrk-7", state="D", tracer=4, seccomp=2)
    # A kernel without seccomp.
    assert Thread.parse(9, b"Name:\ta b\nState:\tS (sleeping)\nTracerPid:\t0\n").seccomp == 0
