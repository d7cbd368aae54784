"""Trace events of the collapse path, as in ``include/trace/events/huge_memory.h``."""

from __future__ import annotations

from dataclasses import dataclass

from mthp.results import ScanResult


@dataclass(frozen=True, slots=True)
class ScanPmd:
    """mm_khugepaged_scan_pmd: the scan of a PMD range ended.

    Attributes:
        mm: number of the address space.
        address: address of the range, in bytes.
        result: result of the scan, or of the collapse after it.
        referenced, none_or_zero, unmapped: PTEs counted until the scan ended.
    """

    mm: int
    address: int
    result: ScanResult
    referenced: int
    none_or_zero: int
    unmapped: int


@dataclass(frozen=True, slots=True)
class Collapse:
    """mm_collapse_huge_page: an attempt ended."""

    mm: int
    order: int
    result: ScanResult


@dataclass(frozen=True, slots=True)
class Isolate:
    """mm_collapse_huge_page_isolate: the isolation of the pages of a run ended."""

    order: int
    result: ScanResult
    none_or_zero: int
    referenced: int


@dataclass(frozen=True, slots=True)
class Swapin:
    """mm_collapse_huge_page_swapin: the swap-in of a run ended."""

    mm: int
    order: int
    result: ScanResult
    swapped_in: int
    referenced: int


Event = ScanPmd | Collapse | Isolate | Swapin


class EventTrace:
    """The events in the order in which they happened; recorded only while `enabled`."""

    def __init__(self) -> None:
        self.enabled = False
        self._events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Record an event."""
        if self.enabled:
            self._events.append(event)

    def take(self) -> list[Event]:
        """Return the events recorded so far, and forget them."""
        events, self._events = self._events, []
        return events
