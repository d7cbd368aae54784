"""Record golden cases in a guest: convert the recorder's raw answers to the form of ``tests/golden/README.md``.

The recorder (``recorder.c``) stages a case in the guest, triggers a collapse, and answers with page table entries,
folio orders, flags and map counts, counters, and lines of the kernel's trace. This module makes a golden case of them.
It checks the state of every page against the observed one, and refuses a case that was not staged as specified.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from mthp.geometry import GEOMETRIES, Geometry
from vm.apt import LabError
from vm.guest import Guest, Job
from vm.kernels import Kernel

Runs = list[list[Any]]

CASE_SECONDS = 300
"""Seconds to wait for an answer. The recorder gives up a case after 60."""

# Documentation/admin-guide/mm/pagemap.rst
_PRESENT, _SWAPPED, _UFFD_WP = 1 << 63, 1 << 62, 1 << 57
_PFN = (1 << 55) - 1
_SWAP_TYPE_BITS = 5
# include/linux/swapops.h: kinds of markers, which are swap entries with a type that is not a device.
_MARKER_GUARD = 1 << 2
# include/uapi/linux/kernel-page-flags.h
_KPF_ANON, _KPF_SWAPCACHE, _KPF_SWAPBACKED, _KPF_ZERO_PAGE, _KPF_MLOCKED = (1 << bit for bit in (12, 13, 14, 24, 33))

_COUNTED = re.compile(
    r"hugepages-\d+kB/(?!.*(shmem|fault)).*|thp_(collapse|scan|split|swp|zero|deferred|migr).*|pswp(in|out)|pgmajfault"
    r"|unevictable_pgs_mlocked|pages_collapsed|full_scans"
)
"""The counters of a record."""

_TRACE = {
    name: re.compile(pattern)
    for name, pattern in {
        "scan": r"mm_khugepaged_scan_pmd: .*?referenced=(\d+), none_or_zero=(\d+), status=(\w+), unmapped=(\d+)",
        "isolate": r"mm_collapse_huge_page_isolate: .*?none_or_zero=(\d+), referenced=(\d+),.*?status=(\w+)",
        "collapse": r"mm_collapse_huge_page: .*?status=(\w+)",
        "swapin": r"mm_collapse_huge_page_swapin: .*?swapped_in=(\d+), .*?ret=(\d+)",
    }.items()
}
_ORDER = re.compile(r"order=(\d+)")


class RefusedError(Exception):
    """A case that the guest could not stage as specified."""


@dataclass(frozen=True)
class Spec:
    """A case to record.

    Attributes:
        trigger: ``khugepaged``, ``madvise``, ``split`` or ``trim``.
        orders: the enabled orders.
        limits: max_ptes_none, max_ptes_swap, max_ptes_shared.
        vma: words of the mapping.
        states: one word a page, with a ``~`` after it if the page must look unused.
        passes: full scans, or calls.
        child_keeps_all: if pages are shared, the child keeps all its pages, not only those, and the parent writes to
        the
            others again.
        about: the purpose of a case that was not drawn at random.
        calls: for ``split`` and ``trim``: the call of each pass, as :data:`mthp.sim.golden.passcalls.CALLS` has it.
    """

    trigger: str
    orders: tuple[int, ...]
    limits: tuple[int, int, int]
    vma: tuple[str, ...]
    states: tuple[str, ...]
    passes: int = 3
    child_keeps_all: bool = False
    calls: tuple[tuple[str | int, ...], ...] = ()
    about: str = ""

    @property
    def forks(self) -> bool:
        """Return whether a child shares pages."""
        return any("shared" in state for state in self.states)

    @property
    def setup(self) -> str:
        """Return the record's word for that."""
        if not self.forks:
            return "no_fork"
        return "fork_child_keeps_all_parent_rewrites_anon" if self.child_keeps_all else "fork_child_keeps_only_shared"

    def line(self, name: str) -> str:
        """Return the case in the recorder's format."""
        states = ",".join(f"{state.replace(':', '/')}:{count}" for state, count in runs_of(self.states))
        calls = [f"{'/'.join(map(str, call)).replace('split_at', 'split')}" for call in self.calls]
        trigger = "calls" if calls else self.trigger
        words = ("case", name, trigger, self.passes, ",".join(map(str, self.orders)), *self.limits)
        return " ".join(map(str, (*words, "+".join(self.vma) or "-", self.setup, states, ",".join(calls)))) + "\n"


def runs_of(values: Iterable[Any]) -> Runs:
    """Return run lengths: [value, count] of equal neighbours."""
    return [[value, len(list(group))] for value, group in groupby(values)]


class Recorder:
    """A guest that records.

    Args:
        guest: the guest with the recorder.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._buffer = b""
        hello = self._answer(guest.remaining)
        self.geometry = _geometry(guest.kernel, hello)
        self._warm_up()

    def record(self, spec: Spec, name: str) -> dict[str, Any]:
        """Record a case.

        Raises:
            RefusedError: it cannot be staged on this kernel.
            LabError: the guest ended.
        """
        self._guest.channel.sendall(spec.line(name).encode())
        answer = self._answer(CASE_SECONDS)
        if "error" in answer:
            raise RefusedError(answer["error"])
        return golden_case(spec, answer, self._guest.kernel.version, self.geometry)

    def _warm_up(self) -> None:
        """Run a case without recording it, because khugepaged may be busy with memory found at its start."""
        n = self.geometry.ptes_per_pmd
        spec = Spec("khugepaged", (self.geometry.pmd_order,), (n - 1, n - 1, n - 1), (), ("anon",) * n)
        with contextlib.suppress(RefusedError):
            self.record(spec, "warm-up")

    def quit(self) -> None:
        """Let the recorder end."""
        self._guest.channel.sendall(b"quit\n")

    def _answer(self, seconds: float) -> dict[str, Any]:
        channel = self._guest.channel
        channel.settimeout(max(0.1, min(seconds, self._guest.remaining)))
        while b"\n" not in self._buffer:
            try:
                chunk = channel.recv(1 << 20)
            except TimeoutError:
                chunk = b""
            if not chunk:
                self._guest.drain()
                raise LabError(f"the guest does not answer: {self._guest.console[-1000:]}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def recorder(kernel: Kernel, seconds: float) -> Iterator[Recorder]:
    """Run a guest with the recorder for `seconds`."""
    job = Job("exec recorder $CHANNEL", seconds=seconds, memory_mb=768)
    with Guest(kernel, job) as guest:
        found = Recorder(guest)
        yield found
        try:
            found.quit()
        except (TimeoutError, OSError):
            return


def _geometry(kernel: Kernel, hello: dict[str, Any]) -> Geometry:
    if "error" in hello:
        raise LabError(f"the recorder does not run on {kernel.release}: {hello['error']}")
    geometry = GEOMETRIES[kernel.platform.name]
    seen = (hello["page_size"], hello["pmd_order"])
    if seen != (geometry.page_size, geometry.pmd_order):
        raise LabError(f"{kernel.release} has pages of {seen[0]} and PMD order {seen[1]}: not {geometry.name}")
    return geometry


def golden_case(spec: Spec, answer: dict[str, Any], version: str, geometry: Geometry) -> dict[str, Any]:
    """Return the golden case in an answer.

    Raises:
        RefusedError: the pages are not in the specified states.
    """
    before = _Look(answer["before"], spec)
    before.check(spec, geometry)
    case: dict[str, Any] = {"id": answer["id"], "kernel": version}
    if geometry.name != "x86-64":
        case["geometry"] = geometry.name
    case |= {
        **({"category": spec.about} if spec.about else {}),
        "trigger": spec.trigger,
        **({"calls": [list(call) for call in spec.calls]} if spec.calls else {}),
        "orders_enabled": list(spec.orders),
        "max_ptes_none": spec.limits[0],
        "max_ptes_swap": spec.limits[1],
        "max_ptes_shared": spec.limits[2],
        "vma": list(spec.vma),
        "setup": spec.setup,
        "before": runs_of(state.rstrip("~") for state in spec.states),
        "before_flags": runs_of(before.letters(spec)),
    }
    looks = [_Look(raw["look"], spec) for raw in answer["passes"]]
    orders = [runs_of(look.orders) for look in looks]
    case["after"] = orders[0]
    for number, (one, other) in enumerate(pairwise(orders), 2):
        if one != other:
            case[f"after_pass{number}"] = other
    if before.swap:
        case["swap_offsets"] = before.swap
    case["passes"] = [
        _pass(spec, raw, look, earlier)
        for raw, look, earlier in zip(answer["passes"], looks, [before, *looks], strict=False)
    ]
    case["scan_result"] = case["passes"][0]["scan_result"]
    case["data_intact"] = answer["intact"]
    return case


def _pass(spec: Spec, raw: dict[str, Any], look: _Look, earlier: _Look) -> dict[str, Any]:
    scan, events = _events(raw["trace"], look.pmd_order)
    if spec.trigger == "khugepaged" and raw["stats"].get("full_scans") != 1:
        raise RefusedError("khugepaged scanned more than once")
    found: dict[str, Any] = {
        "scan_result": scan["result"] if scan else None,
        "scan": scan,
        "events": events,
        "stats": {name: by for name, by in raw["stats"].items() if _COUNTED.fullmatch(name)},
        "pmd_mapped": look.pmd_mapped,
        "moved": runs_of(int(one != other) for one, other in zip(look.frames, earlier.frames, strict=True)),
    }
    letters = look.letters()
    if any(letters):
        found["flags"] = runs_of(letters)
    if look.swap:
        found["swap_offsets"] = look.swap
    if spec.trigger != "khugepaged":
        found["errno"] = raw["errno"]
    if spec.calls:
        found["rss_kb"] = look.rss_kb
    return found


def _events(lines: list[str], pmd_order: int) -> tuple[dict[str, Any] | None, Runs]:
    """Return the scan, and the other events, each with its number of repetitions in succession."""
    scan, rows = None, []
    for line in lines:
        matches = ((name, pattern.match(line)) for name, pattern in _TRACE.items())
        name, match = next(((name, match) for name, match in matches if match), ("", None))
        if match is None:
            continue
        if name == "scan":
            referenced, none_or_zero, status, unmapped = match.groups()
            scan = {
                "result": status,
                "referenced": int(referenced),
                "none_or_zero": int(none_or_zero),
                "unmapped": int(unmapped),
            }
            continue
        # Kernels with events without an order have only the PMD's.
        order = int(of[1]) if (of := _ORDER.search(line)) else pmd_order
        if name == "isolate":
            none_or_zero, referenced, status = match.groups()
            rows.append([name, order, status, int(none_or_zero), int(referenced)])
        elif name == "collapse":
            rows.append([name, order, match[1]])
        else:
            rows.append([name, order, int(match[2]), int(match[1])])
    return scan, [[*row, times] for row, times in runs_of(rows)]


class _Look:
    """One reading of the range, page by page."""

    def __init__(self, raw: dict[str, Any], spec: Spec) -> None:
        self._entries, self._orders, self._flags, self._counts = (
            [value for value, count in raw[name] for _ in range(count)]
            for name in ("pagemap", "order", "flags", "count")
        )
        self.pmd_order = len(spec.states).bit_length() - 1
        self.pmd_mapped = raw["huge_kb"] > 0
        self.referenced_kb = raw["referenced_kb"]
        self.rss_kb = raw["rss_kb"]
        self.frames = [entry & _PFN if entry & _PRESENT else 0 for entry in self._entries]
        self.orders = [self._order(i) for i in range(len(self._entries))]
        self.swap = self._swap()

    def _order(self, i: int) -> int | str:
        entry = self._entries[i]
        if entry & _PRESENT:
            return "zero" if self._flags[i] & _KPF_ZERO_PAGE else int(self._orders[i])
        if entry & _SWAPPED:
            kind, offset = self._swap_entry(entry)
            if kind:
                return "guard" if offset & _MARKER_GUARD else "marker"
            return "swap"
        return "marker" if entry & _UFFD_WP else "none"

    @staticmethod
    def _swap_entry(entry: int) -> tuple[int, int]:
        number = entry & _PFN
        return number & ((1 << _SWAP_TYPE_BITS) - 1), number >> _SWAP_TYPE_BITS

    def _swap(self) -> Runs:
        """Return [first entry, slot, count] of adjoining swap entries with adjoining slots."""
        runs: Runs = []
        for i, order in enumerate(self.orders):
            if order != "swap":
                continue
            slot = self._swap_entry(self._entries[i])[1]
            if runs and runs[-1][0] + runs[-1][2] == i and runs[-1][1] + runs[-1][2] == slot:
                runs[-1][2] += 1
            else:
                runs.append([i, slot, 1])
        return runs

    def letters(self, spec: Spec | None = None) -> list[str]:
        """Return the letters of every page; with `spec` also those of pages that look used."""
        found = []
        for i, order in enumerate(self.orders):
            letters, flags = "", self._flags[i]
            if isinstance(order, int):
                letters += "c" if flags & _KPF_SWAPCACHE and flags & _KPF_SWAPBACKED else ""
                letters += "l" if flags & _KPF_ANON and not flags & _KPF_SWAPBACKED else ""
                letters += "m" if flags & _KPF_MLOCKED else ""
                letters += "r" if spec and not _looks_unused(spec.states[i]) else ""
                letters += "s" if self._counts[i] > 1 else ""
            found.append(letters + ("w" if self._entries[i] & _UFFD_WP else ""))
        return found

    def check(self, spec: Spec, geometry: Geometry) -> None:
        """Check that every page is in its specified state.

        Raises:
            RefusedError: one is not.
        """
        letters = self.letters(spec)
        for i, state in enumerate(spec.states):
            wanted, flags = _WANTED[state.rstrip("~").partition(":")[0]], letters[i]
            order: int | str = int(state.rstrip("~").partition(":")[2]) if wanted == "large" else wanted
            if self.orders[i] != order:
                raise RefusedError(f"page {i} is {self.orders[i]}, and was to be {state}")
            needed = _LETTERS.get(state.rstrip("~").partition(":")[0], "")
            if spec.vma and "droppable" in spec.vma:
                needed = needed.replace("l", "")
            if not set(needed) <= set(flags):
                raise RefusedError(f"page {i} is {flags!r}, and was to be {state} ({needed!r})")
        used = sum("r" in flags for flags in letters) * geometry.page_size >> 10
        if self.referenced_kb != used:
            raise RefusedError(f"{self.referenced_kb} kB look used, and {used} kB were to")


def _looks_unused(state: str) -> bool:
    return state.endswith("~") or state == "cold"


_WANTED: dict[str, int | str] = {
    "none": "none", "zero": "zero", "uffd_zero": "zero", "guard": "guard", "uffd_marker": "marker",
    "swap": "swap", "swap_shared": "swap", "uffd_swap": "swap", "large": "large", "large_shared": "large",
    **dict.fromkeys(
        ("anon", "shared", "swapcache", "swapped_back", "cold", "lazyfree", "lazyfree_dirty", "mlocked", "pinned",
         "uffdwp"), 0,
    ),
}  # fmt: skip
"""The observed state of a page, by the specified one."""

_LETTERS = {
    "shared": "s", "large_shared": "s", "swapcache": "c", "lazyfree": "l", "lazyfree_dirty": "l", "mlocked": "m",
    "uffdwp": "w", "uffd_zero": "w", "uffd_swap": "w", "uffd_marker": "w",
}  # fmt: skip
"""The flags that it must have, by the specified state."""
