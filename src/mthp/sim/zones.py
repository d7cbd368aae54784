"""What the machine prints of its zones: /proc/buddyinfo, /proc/pagetypeinfo and /proc/zoneinfo.

Page blocks have the PMD order and one of two migrate types (:attr:`~mthp.sim.frames.memory.Memory.unmovable`).
"""

from __future__ import annotations

import numpy as np

from mthp.sim.frames.buddy import Zone
from mthp.sim.frames.memory import Fl
from mthp.sim.parts import Parts

_TYPES = ("Unmovable", "Movable")


def buddyinfo(parts: Parts) -> str:
    """Return the text of /proc/buddyinfo (frag_show_print, mm/vmstat.c)."""
    lines = []
    for zone in parts.memory.zones:
        counts = "".join(f"{count:6d} " for count in zone.free_counts())
        lines.append(f"Node {zone.node}, zone {zone.name:>8} {counts}\n")
    return "".join(lines)


def pagetypeinfo(parts: Parts) -> str:
    """Return the text of /proc/pagetypeinfo (pagetypeinfo_show, mm/vmstat.c)."""
    order, memory = parts.geometry.pmd_order, parts.memory
    head = "Free pages count per migrate type at order"
    lines = [f"Page block order: {order}\n", f"Pages per block:  {1 << order}\n\n"]
    lines.append(f"{head:<43} " + "".join(f"{at:6d} " for at in range(memory.max_order + 1)) + "\n")
    for zone in memory.zones:
        free = np.zeros((len(_TYPES), zone.max_order + 1), np.int64)
        for first, at in zone.free_blocks():
            # A free block of more than a page block lies in the list of its first one.
            free[int(not memory.unmovable[first >> order]), at] += 1
        for name, counts in zip(_TYPES, free.tolist(), strict=True):
            numbers = "".join(f"{count:6d} " for count in counts)
            lines.append(f"Node {zone.node:4d}, zone {zone.name:>8}, type {name:>12} {numbers}\n")
    lines.append(f"\n{'Number of blocks type':<23}" + "".join(f"{name:>12} " for name in _TYPES) + "\n")
    for zone in memory.zones:
        unmovable = int(memory.unmovable[zone.start >> order : zone.end >> order].sum())
        blocks = f"{unmovable:12d} {(zone.frames >> order) - unmovable:12d} "
        lines.append(f"Node {zone.node}, zone {zone.name:>8} {blocks}\n")
    return "".join(lines)


def zoneinfo(parts: Parts) -> str:
    """Return what /proc/zoneinfo says of watermarks, reserves and the LRU lists (zoneinfo_show_print, mm/vmstat.c)."""
    return "".join(_zoneinfo(parts, zone) for zone in parts.memory.zones)


def _zoneinfo(parts: Parts, zone: Zone) -> str:
    marks = zone.watermarks
    # Flags are kept at the head, and each frame of a folio counts.
    heads = parts.memory.heads(np.arange(zone.start, zone.end))
    flags = parts.memory.flags[heads]
    anon = (flags & Fl.ANON) != 0
    file = ~anon & ((flags & Fl.LRU) != 0)
    return (
        f"Node {zone.node}, zone {zone.name:>8}\n"
        f"  pages free     {zone.free_frames}\n"
        f"        min      {marks.min}\n"
        f"        low      {marks.low}\n"
        f"        high     {marks.high}\n"
        f"        spanned  {zone.frames}\n"
        f"        managed  {zone.frames}\n"
        f"        protection: (0, {zone.reserve})\n"
        f"  start_pfn:           {zone.start}\n"
        f"      nr_zone_inactive_anon {int(anon.sum())}\n"
        f"      nr_zone_inactive_file {int(file.sum())}\n"
    )
