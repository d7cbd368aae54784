"""The TLB model against an LRU array in plain loops."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mthp.lab.tlb import PROCESSORS, Processor, Structure, Tlb, lru_misses
from strategies import examples


def plain_misses(tags: list[int], sets: int, ways: int) -> list[bool]:
    contents: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(sets)]
    missed = []
    for tag in tags:
        line = contents[tag % sets]
        missed.append(tag not in line)
        line[tag] = None
        line.move_to_end(tag)
        if len(line) > ways:
            line.popitem(last=False)
    return missed


@given(
    tags=st.lists(st.integers(0, 40), max_size=400),
    sets=st.sampled_from([1, 2, 4, 8]),
    ways=st.sampled_from([1, 2, 3, 4, 8]),
)
@settings(max_examples=examples(200))
def test_misses_are_those_of_plain_lru(tags: list[int], sets: int, ways: int) -> None:
    assert lru_misses(np.array(tags, np.int64), sets, ways).tolist() == plain_misses(tags, sets, ways)


@given(data=st.data(), chunk=st.sampled_from([1, 7, 64, 1000]))
@settings(max_examples=examples(60))
def test_contents_stay_from_one_chunk_to_the_next(data: st.DataObject, chunk: int) -> None:
    pages = data.draw(st.lists(st.integers(0, 300), max_size=300))
    processor = Processor("test", "", "", ((Structure(8, 2, 4096),), (Structure(32, 4, 4096),)))
    whole, first = plain_misses(pages, 4, 2), []
    second = plain_misses([page for page, missed in zip(pages, whole, strict=True) if missed], 8, 4)
    first += whole
    model = Tlb(processor, 4096, chunk)
    model.access(np.array(pages, np.int64), np.zeros(len(pages), np.int8), np.zeros(len(pages), np.bool_))
    assert model.counts.misses == (sum(first), sum(second))
    assert model.counts.walks == sum(second)


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_memory_within_reach_misses_once_and_beyond_it_always(name: str) -> None:
    processor = Processor.named(name)
    entries = processor.last_level_entries
    for pages, rounds, expected in ((entries, 3, entries), (4 * entries, 3, 12 * entries)):
        model = Tlb(processor, 4096)
        for _ in range(rounds):
            numbers = np.arange(pages, dtype=np.int64)
            model.access(numbers, np.zeros(pages, np.int8), np.zeros(pages, np.bool_))
        assert model.counts.walks == expected
        assert model.counts.accesses == rounds * pages


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_larger_folios_take_fewer_entries(name: str) -> None:
    processor = Processor.named(name)
    pages = np.arange(1 << 16, dtype=np.int64)
    walks = {}
    for order, pmd in ((0, False), (4, False), (9, True)):
        model = Tlb(processor, 4096)
        model.access(pages, np.full(len(pages), order, np.int8), np.full(len(pages), pmd))
        walks[order] = model.counts.walks
    coalesced = 1 << min(4, processor.coalesced_order(4096))
    assert walks == {0: 1 << 16, 4: (1 << 16) // coalesced, 9: 128}


def test_every_processor_has_whole_sets_and_a_source() -> None:
    for processor in PROCESSORS.values():
        assert processor.source
        for level in processor.levels:
            assert [s.largest for s in level] == sorted(s.largest for s in level)
            for structure in level:
                assert structure.sets * structure.ways == structure.entries
                assert structure.sets & (structure.sets - 1) == 0


@pytest.mark.parametrize(
    ("name", "page_size", "order"),
    [
        ("skylake", 4096, 0),
        ("zen", 4096, 3),
        ("zen4", 4096, 2),
        ("zen4", 65536, 0),
        ("neoverse-n1", 4096, 4),
        ("neoverse-n1", 16384, 7),
        ("neoverse-n1", 65536, 5),
    ],
)
def test_how_large_a_run_is_coalesced_depends_on_the_base_page(name: str, page_size: int, order: int) -> None:
    assert Processor.named(name).coalesced_order(page_size) == order
