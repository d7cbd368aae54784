"""Folio orders from a file of page flags: against a table of folios that the test itself laid out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mthp.linux import abi, framewords
from mthp.linux.kpageflags import FolioReader, states_of
from mthp.ptes import ORDER_UNKNOWN, Pte
from strategies import examples

ANON = abi.KPF_ANON | abi.KPF_SWAPBACKED
MEMORY = 1 << 14


def lay_out(path: Path, orders: list[int], flags: int = ANON) -> NDArray[np.int8]:
    """Write folios of `orders` one behind another, each at the next aligned frame; return the order of each frame."""
    words = np.full(MEMORY, flags, np.uint64)
    truth = np.zeros(MEMORY, np.int8)
    at = 0
    for order in orders:
        at = -(-at >> order << order) if at % (1 << order) == 0 else (at >> order) + 1 << order
        end = at + (1 << order)
        if end > MEMORY:
            break
        if order:
            words[at] |= np.uint64(abi.KPF_COMPOUND_HEAD)
            words[at + 1 : end] |= np.uint64(abi.KPF_COMPOUND_TAIL)
        truth[at:end] = order
        at = end
    path.write_bytes(words.tobytes())
    return truth


@pytest.mark.parametrize("pmd_order", [5, 8, 9, 11, 13])
@settings(max_examples=examples(60), suppress_health_check=list(HealthCheck))
@given(orders=st.lists(st.integers(0, 12), min_size=1, max_size=200), seed=st.integers(0, 2**32), data=st.data())
def test_every_frame_has_the_order_of_its_folio(
    tmp_path: Path, pmd_order: int, orders: list[int], seed: int, data: st.DataObject
) -> None:
    truth = lay_out(tmp_path / "kpageflags", orders)
    wanted = data.draw(st.sampled_from([1, 3, 50, 1000, MEMORY]))
    pfns = np.random.default_rng(seed).integers(0, MEMORY, wanted).astype(np.uint64)
    reader = FolioReader(pmd_order, str(tmp_path / "kpageflags"))
    flags, found = reader.read(pfns)
    assert found.tolist() == truth[pfns].tolist()
    assert ((flags & np.uint64(ANON)) == ANON).all()
    for pfn in pfns[:5].tolist():
        head, order = reader.folio_of(pfn)
        assert order == truth[pfn]
        assert head == pfn >> order << order
    reader.close()
    reader.close()


@pytest.mark.parametrize("at", [1 << 10, 5 << 8])
def test_a_folio_that_no_sample_shows_has_its_order(tmp_path: Path, at: int) -> None:
    truth = lay_out(tmp_path / "kpageflags", [0] * at + [4, 0, 3])
    pfns = np.random.default_rng(at).permutation(MEMORY).astype(np.uint64)
    pfns = np.concatenate([np.repeat(np.uint64(1), 2 * MEMORY), pfns[: MEMORY // 2]])
    reader = FolioReader(9, str(tmp_path / "kpageflags"))
    flags, orders = reader.read(pfns)
    assert orders.tolist() == truth[pfns].tolist()
    assert flags.tolist() == np.fromfile(tmp_path / "kpageflags", np.uint64)[pfns].tolist()
    reader.close()


@pytest.mark.parametrize("wanted", [1, 40, 700, MEMORY])
def test_threads_that_share_a_read_fill_in_every_word(tmp_path: Path, wanted: int) -> None:
    truth = np.arange(MEMORY, dtype=np.uint64)
    truth.tofile(tmp_path / "kpagecount")
    reader = framewords.FrameWords(str(tmp_path / "kpagecount"), threads=3, share=5, call=0)
    pfns = np.random.default_rng(wanted).permutation(MEMORY + 20).astype(np.uint64)[:wanted]
    beyond = np.uint64(abi.KPF_NOPAGE)
    assert reader.words(pfns).tolist() == np.where(pfns < MEMORY, pfns, beyond).tolist()
    reader.close()


def test_frames_beyond_memory_are_no_pages(tmp_path: Path) -> None:
    lay_out(tmp_path / "kpageflags", [0])
    reader = FolioReader(9, str(tmp_path / "kpageflags"))
    pfns = np.array([MEMORY - 1, MEMORY, MEMORY + 100_000, 1 << 44], np.uint64)
    flags, orders = reader.read(pfns)
    assert ((flags & np.uint64(abi.KPF_NOPAGE)) != 0).tolist() == [False, True, True, True]
    assert orders.tolist() == [0, 0, 0, 0]
    assert reader.read(pfns[:0])[1].tolist() == []
    assert (reader.words_at(pfns) == flags).all()
    assert (reader.words(pfns) == flags).all()
    reader.close()


def test_few_scattered_frames_cost_few_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path / "kpageflags", [0])
    reader = FolioReader(9, str(tmp_path / "kpageflags"))
    read = 0
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        size = preadv(fd, buffers, offset)
        read += size // 8
        return size

    monkeypatch.setattr(os, "preadv", counted)
    reader.read(np.arange(0, MEMORY, 512, dtype=np.uint64))
    assert read <= MEMORY // 512 * 8
    read = 0
    reader.read(np.arange(MEMORY, dtype=np.uint64))
    assert read == MEMORY
    reader.close()


def test_tails_that_show_flags_of_their_own_follow_their_head(tmp_path: Path) -> None:
    """Before Linux 6.16 the SWAPBACKED bit stood at the head of a folio only."""
    truth = lay_out(tmp_path / "kpageflags", [4, 4, 9, 10])
    words = np.fromfile(tmp_path / "kpageflags", np.uint64)
    words[(words & np.uint64(abi.KPF_COMPOUND_TAIL)) != 0] &= np.uint64(~abi.KPF_SWAPBACKED & (1 << 64) - 1)
    words[16] &= np.uint64(~abi.KPF_SWAPBACKED & (1 << 64) - 1)
    words.tofile(tmp_path / "kpageflags")
    reader = FolioReader(9, str(tmp_path / "kpageflags"))
    flags, orders = reader.read(np.arange(1024, dtype=np.uint64))
    assert orders.tolist() == truth[:1024].tolist()
    lazyfree = (states_of(flags) & np.uint16(Pte.LAZYFREE)) != 0
    assert np.flatnonzero(lazyfree).tolist() == list(range(16, 32))
    reader.close()


def test_what_flags_say_of_a_page() -> None:
    cases = {
        ANON: Pte(0),
        abi.KPF_ANON: Pte.LAZYFREE,
        0: Pte(0),
        abi.KPF_ZERO_PAGE: Pte.ZERO,
        ANON | abi.KPF_KSM: Pte.SHARED,
        abi.KPF_ANON | abi.KPF_KSM: Pte.SHARED,
        abi.KPF_ANON | abi.KPF_HUGE: Pte.HUGETLB,
        ANON | abi.KPF_COMPOUND_HEAD: Pte(0),
    }
    assert states_of(np.array(list(cases), np.uint64)).tolist() == list(cases.values())
    for word, state in cases.items():
        assert states_of(np.array([word] * 3, np.uint64)).tolist() == [state] * 3


def test_a_tail_without_its_head_does_not_lengthen_the_folio_before(tmp_path: Path) -> None:
    """As it is read when a folio is freed or made in the middle of a read."""
    words = np.full(MEMORY, ANON, np.uint64)
    words[8] |= np.uint64(abi.KPF_COMPOUND_HEAD)
    words[9:12] |= np.uint64(abi.KPF_COMPOUND_TAIL)
    words[13:17] |= np.uint64(abi.KPF_COMPOUND_TAIL)
    (tmp_path / "kpageflags").write_bytes(words.tobytes())
    reader = FolioReader(9, str(tmp_path / "kpageflags"))
    _, orders = reader.read(np.arange(32, dtype=np.uint64))
    reader.close()
    assert orders[8:12].tolist() == [2] * 4
    assert orders[13:17].tolist() == [ORDER_UNKNOWN] * 4
    assert not np.delete(orders, [*range(8, 12), *range(13, 17)]).any()
