"""Measure accesses by the young bits of page table entries, cleared through clear_refs, counted by smaps by mapping.

No file shows young bits page by page, so a mapping is as hot as its mean. And clearing costs the target something: it
clears the young bits *and* the referenced flags of its pages (clear_refs_pte_range(), fs/proc/task_mmu.c), which
reclaim uses. Where memory is short, pages in use may be swapped out before they are used again.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np

from mthp.heat import Heat
from mthp.linux.heat import Stop, rounds
from mthp.linux.processspace import ProcessSpace
from mthp.vma import VmaKind

REMARK = (
    "the young bits of the target were cleared: while memory is short, its pages look unused to reclaim until they are"
    " used again"
)

CLEAR_YOUNG = b"1"
"""Word for clearing those of all pages (proc_pid_clear_refs(5))."""

_HEAD = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_REFERENCED = re.compile(rb"^Referenced:\s+(\d+) kB", re.MULTILINE)


def lack(proc: Path) -> tuple[str, str]:
    """Return why the young bits cannot be used, and the remedy; empty texts if they can."""
    if not (proc / "self/clear_refs").exists():
        return "this kernel has no clear_refs", "a kernel with CONFIG_PROC_PAGE_MONITOR"
    return "", ""


def measure_young(space: ProcessSpace, seconds: float, stop: Stop) -> Heat:
    """Return the accesses of `space` by mapping, for `seconds` or until `stop` returns True."""
    begin, begun = time.monotonic(), time.process_time()
    anonymous = {vma.start: vma.end for vma in space.vmas() if vma.kind is VmaKind.ANON}
    referenced: dict[tuple[int, int], int] = {}
    space.process.write("clear_refs", CLEAR_YOUNG)
    for _ in rounds(seconds, stop):
        for start, end, size in parse_referenced(space.process.read("smaps")):
            # A mapping that has changed its ends since is left out: what its count belongs to is unknown.
            if anonymous.get(start) == end:
                referenced[start, end] = referenced.get((start, end), 0) + size // space.geometry.page_size
        space.process.write("clear_refs", CLEAR_YOUNG)
    spans = np.array(list(referenced), np.uint64).reshape(-1, 2)
    return Heat.of_spans(
        spans[:, 0],
        spans[:, 1],
        np.array(list(referenced.values()), np.float64),
        source="young bits",
        seconds=time.monotonic() - begin,
        cpu_seconds=time.process_time() - begun,
        remark=REMARK,
    )


def parse_referenced(text: bytes) -> list[tuple[int, int, int]]:
    """Return start, end and referenced bytes of each mapping in the text of ``/proc/PID/smaps``."""
    found = []
    heads = list(_HEAD.finditer(text))
    for head, until in zip(heads, [each.start() for each in heads[1:]] + [len(text)], strict=False):
        if match := _REFERENCED.search(text, head.end(), until):
            found.append((int(head[1], 16), int(head[2], 16), int(match[1]) << 10))
    return found
