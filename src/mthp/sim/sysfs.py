"""The machine's files: transparent_hugepage in sysfs, and the related files of ``/proc``.

Texts are those of the kernel, byte for byte where it has fixed ones, and writes are accepted or refused as there:
:meth:`Sysfs.write` raises :class:`OSError` with the error number of write(2). A path without a leading slash is below
``/sys/kernel/mm/transparent_hugepage``.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from mthp.sim.allocation.compact_all import compact_all
from mthp.sim.allocation.reclaim import drop_cache
from mthp.sim.frames.buddy import Watermarks
from mthp.sim.knobs import DEFRAG_WORDS
from mthp.sim.page_tables.split import split_huge_pages
from mthp.sim.parts import Parts
from mthp.sim.zones import buddyinfo, pagetypeinfo, zoneinfo
from mthp.tunables import SIZE_WORDS, TOP_WORDS, Switches

THP = "/sys/kernel/mm/transparent_hugepage/"

STATS = (
    "anon_fault_alloc",
    "anon_fault_fallback",
    "anon_fault_fallback_charge",
    "collapse_alloc",
    "collapse_alloc_failed",
    "collapse_exceed_none_pte",
    "collapse_exceed_shared_pte",
    "collapse_exceed_swap_pte",
    "nr_anon",
    "nr_anon_partially_mapped",
    "split",
    "split_deferred",
    "split_failed",
    "swpin",
    "swpout",
    "swpout_fallback",
)
"""Files of ``hugepages-<size>kB/stats/`` that concern anonymous memory."""

VMSTAT = (
    "pgfault",
    "pgmajfault",
    "pgscan_direct",
    "pgscan_kswapd",
    "pgsteal_direct",
    "pgsteal_kswapd",
    "pgmigrate_success",
    "pgmigrate_fail",
    "compact_migrate_scanned",
    "compact_isolated",
    "compact_stall",
    "compact_fail",
    "compact_success",
    "pswpin",
    "pswpout",
    "oom_kill",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_fault_fallback_charge",
    "thp_collapse_alloc",
    "thp_collapse_alloc_failed",
    "thp_split_page",
    "thp_split_page_failed",
    "thp_deferred_split_page",
    "thp_underused_split_page",
    "thp_split_pmd",
    "thp_scan_exceed_none_pte",
    "thp_scan_exceed_swap_pte",
    "thp_scan_exceed_share_pte",
    "thp_zero_page_alloc",
    "thp_swpout",
    "thp_swpout_fallback",
    "unevictable_pgs_mlocked",
    "unevictable_pgs_munlocked",
    "unevictable_pgs_cleared",
)
"""Counters of ``/proc/vmstat`` that this machine keeps."""

_UINT_MAX, _ULONG_MAX = (1 << 32) - 1, (1 << 64) - 1
_NUMBER = re.compile(r"\+?[0-9]+\n?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _File:
    """One file: its read function, and its write function if it is writable."""

    read: Callable[[], str]
    write: Callable[[str], None] | None = None


class Sysfs:
    """The files of a machine."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._files = {THP + path: file for path, file in self._thp().items()} | self._proc()

    def read(self, path: str) -> str:
        """Return the text of a file, with its newline.

        Raises:
            OSError: ENOENT, or EACCES for a write-only file.
        """
        return self._file(path).read()

    def write(self, path: str, text: str) -> None:
        """Write to a file, all at once.

        Raises:
            OSError: ENOENT; EACCES for a read-only file; EINVAL or ERANGE for values that the kernel refuses.
        """
        file = self._file(path)
        if file.write is None:
            raise _error(errno.EACCES, path)
        try:
            file.write(text)
        except OSError as error:
            raise _error(error.errno or errno.EINVAL, path) from None

    def paths(self) -> list[str]:
        """Return the paths of all files, sorted."""
        return sorted(self._files)

    def _file(self, path: str) -> _File:
        whole = path if path.startswith("/") else THP + path
        if whole not in self._files:
            raise _error(errno.ENOENT, path)
        return self._files[whole]

    # The directory of transparent huge pages.

    def _thp(self) -> dict[str, _File]:
        parts = self._parts
        files = {
            "enabled": self._words(TOP_WORDS, lambda: parts.switches.enabled, self._set_enabled),
            "defrag": self._words(DEFRAG_WORDS, lambda: parts.knobs.defrag, lambda word: self._knob("defrag", word)),
            "use_zero_page": self._flag("use_zero_page"),
            "shrink_underused": self._flag("shrink_underused"),
            "hpage_pmd_size": _File(lambda: f"{parts.geometry.pmd_size}\n"),
            "khugepaged/defrag": _File(
                lambda: f"{int(parts.tunables.defrag)}\n", lambda text: self._tune("defrag", bool(_number(text, 1)))
            ),
            "khugepaged/full_scans": self._counter("full_scans"),
            "khugepaged/pages_collapsed": self._counter("pages_collapsed"),
        }
        highest = parts.geometry.ptes_per_pmd - 1
        for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared"):
            files[f"khugepaged/{name}"] = self._tunable(name, lambda text: _number(text, highest))
        files["khugepaged/pages_to_scan"] = self._tunable(
            "pages_to_scan", lambda text: _number(text, _UINT_MAX, lowest=1)
        )
        for name in ("scan_sleep_millisecs", "alloc_sleep_millisecs"):
            files[f"khugepaged/{name}"] = self._tunable(name, lambda text: _number(text, _UINT_MAX))
        # Only sizes that anonymous memory can have: order 1 has no directory.
        for order in parts.geometry.anon_orders:
            files |= self._size(order)
        return files

    def _size(self, order: int) -> dict[str, _File]:
        """Return the files of the directory of one folio size."""
        name, parts = self._parts.geometry.sysfs_name(order), self._parts
        enabled = self._words(
            SIZE_WORDS, lambda: parts.switches.sizes.get(order, "never"), lambda word: self._set_size(order, word)
        )
        return {f"{name}/enabled": enabled} | {
            f"{name}/stats/{stat}": self._counter(f"{name}/{stat}") for stat in STATS
        }

    def _words(self, words: tuple[str, ...], get: Callable[[], str], put: Callable[[str], None]) -> _File:
        """Return a file that shows all words, with the current one in brackets."""

        def write(text: str) -> None:
            # sysfs_streq() ignores one newline at the end, as `echo` writes it.
            word = text.removesuffix("\n")
            if word not in words:
                raise _error(errno.EINVAL)
            put(word)

        return _File(lambda: " ".join(f"[{word}]" if word == get() else word for word in words) + "\n", write)

    def _set_enabled(self, word: str) -> None:
        parts = self._parts
        parts.switches = Switches(word, parts.switches.sizes)

    def _set_size(self, order: int, word: str) -> None:
        parts = self._parts
        # A new object each time: a scan that has begun keeps the switches that it began with.
        parts.switches = Switches(parts.switches.enabled, dict(parts.switches.sizes) | {order: word})

    def _knob(self, name: str, value: object) -> None:
        parts = self._parts
        parts.knobs = replace(parts.knobs, **{name: value})  # type: ignore[arg-type]

    def _flag(self, name: str) -> _File:
        parts = self._parts
        return _File(
            lambda: f"{int(getattr(parts.knobs, name))}\n", lambda text: self._knob(name, bool(_number(text, 1)))
        )

    def _tune(self, name: str, value: int) -> None:
        parts = self._parts
        parts.tunables = replace(parts.tunables, **{name: value})  # type: ignore[arg-type]

    def _tunable(self, name: str, parse: Callable[[str], int]) -> _File:
        parts = self._parts
        return _File(lambda: f"{getattr(parts.tunables, name)}\n", lambda text: self._tune(name, parse(text)))

    def _counter(self, name: str) -> _File:
        return _File(lambda: f"{self._parts.counters[name]}\n")

    # Below /proc, and debugfs.

    def _proc(self) -> dict[str, _File]:
        parts = self._parts
        return {
            "/proc/buddyinfo": _File(lambda: buddyinfo(parts)),
            "/proc/pagetypeinfo": _File(lambda: pagetypeinfo(parts)),
            "/proc/zoneinfo": _File(lambda: zoneinfo(parts)),
            "/proc/vmstat": _File(self._vmstat),
            "/proc/sys/vm/min_free_kbytes": _File(
                lambda: f"{self._min_free_kbytes()}\n", lambda text: self._set_min_free_kbytes(_number(text, _UINT_MAX))
            ),
            "/proc/sys/vm/zone_reclaim_mode": _File(
                lambda: f"{parts.knobs.zone_reclaim_mode}\n",
                lambda text: self._knob("zone_reclaim_mode", _number(text, _UINT_MAX)),
            ),
            "/proc/sys/vm/compact_memory": _File(lambda: "0\n", self._compact_memory),
            "/proc/sys/vm/drop_caches": _File(lambda: "0\n", self._drop_caches),
            "/sys/kernel/debug/extfrag/unusable_index": _File(self._unusable_index),
            "/sys/kernel/debug/split_huge_pages": _File(_unreadable, self._split_huge_pages),
        }

    def _compact_memory(self, text: str) -> None:
        """Compact all zones as far as possible (compact_nodes)."""
        if _number(text, _UINT_MAX) != 1:
            raise _error(errno.EINVAL)
        compact_all(self._parts)

    def _drop_caches(self, text: str) -> None:
        """Drop all of the page cache; 2 drops only slab objects, which this machine does not have."""
        if _number(text, 4, lowest=1) & 1:
            drop_cache(self._parts, len(self._parts.memory.cache))

    def _split_huge_pages(self, text: str) -> None:
        if error := split_huge_pages(self._parts, text):
            raise _error(error)

    def _unusable_index(self) -> str:
        lines = []
        for zone in self._parts.memory.zones:
            # unusable_show_print() prints thousandths, rounded down.
            numbers = [int(zone.unusable_index(order) * 1000) for order in range(zone.max_order + 1)]
            values = "".join(f"{number // 1000}.{number % 1000:03d} " for number in numbers)
            lines.append(f"Node {zone.node}, zone {zone.name:>8} {values}\n")
        return "".join(lines)

    def _vmstat(self) -> str:
        counted = "".join(f"{name} {self._parts.counters[name]}\n" for name in VMSTAT)
        return f"nr_free_pages {self._parts.memory.free_frames}\n{counted}"

    def _min_free_kbytes(self) -> int:
        frames = sum(zone.watermarks.min for zone in self._parts.memory.zones)
        return frames * self._parts.geometry.page_size >> 10

    def _set_min_free_kbytes(self, kbytes: int) -> None:
        """Distribute the frames to the zones by their size (__setup_per_zone_wmarks, mm/page_alloc.c)."""
        zones = self._parts.memory.zones
        total = (kbytes << 10) // self._parts.geometry.page_size
        frames = sum(zone.frames for zone in zones)
        for zone in zones:
            zone.watermarks = Watermarks.above(total * zone.frames // frames)


def _unreadable() -> str:
    raise _error(errno.EACCES)


def _number(text: str, highest: int, *, lowest: int = 0) -> int:
    """Return a number as kstrtoul() parses it: ``[+]DIGITS[newline]``.

    Raises:
        OSError: EINVAL, also for a number out of range; ERANGE for one beyond an unsigned long.
    """
    if not _NUMBER.fullmatch(text):
        raise _error(errno.EINVAL)
    number = int(text)
    if number > _ULONG_MAX:
        raise _error(errno.ERANGE)
    if not lowest <= number <= highest:
        raise _error(errno.EINVAL)
    return number


def _error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path) if path is not None else OSError(number, os.strerror(number))
