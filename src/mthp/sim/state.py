"""A checksum of the whole state of a machine, to compare two runs.

It covers every column, the free lists in their order, the mappings, the counters and the clock. All of these are whole
numbers of fixed width, so that the checksum is the same on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.sim.parts import Parts


def columns(parts: Parts) -> Iterator[NDArray[np.integer[Any]]]:
    """Yield all columns of the parts."""
    memory, swap = parts.memory, parts.swap
    yield from (memory.flags, memory.order, memory.refcount, memory.mapcount, memory.content, memory.cgroup)
    yield memory.unmovable.view(np.uint8)
    yield from (swap.count, swap.content, swap.cached)
    for mm in parts.mms.values():
        for table in mm.tables:
            yield from (table.pmd, table.bits, table.value)


def digest(parts: Parts) -> str:
    """Return the checksum, in hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for column in columns(parts):
        # In one byte order, so that machines of either kind agree.
        hashed.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).data)
    rest = {
        # In the order of the lists, because it decides which block is taken next.
        "free": [zone.free_blocks() for zone in parts.memory.zones],
        "charged": parts.memory.cgroups.usage.tolist(),
        "deferred": list(parts.memory.deferred),
        "cache": list(parts.memory.cache),
        "batch": parts.lru.waiting,
        # Without pins that were undone: whether a folio was ever pinned is not a part of the state.
        "pins": sorted((head, count) for head, count in parts.pins.items() if count),
        "mms": [
            [mm.id, mm.anon_pages, mm.swap_entries, [[v.start, v.end, sorted(v.flags), v.permissions] for v in mm.vmas]]
            for mm in parts.mms.values()
        ],
        "counters": sorted(parts.counters.values().items()),
        "spent": parts.clock.spent_ns(),
        "now": parts.clock.now_ns,
    }
    hashed.update(json.dumps(rest, sort_keys=True, default=int).encode())
    return hashed.hexdigest()
