"""Translate the errno of a move into scan result and reason, and hold the reasons not to move a block."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from mthp.errors import MthpError
from mthp.results import ScanResult

EHWPOISON = 133
"""include/uapi/asm-generic/errno.h; Python's errno has it from 3.14 on."""

_RESULTS = {
    0: ScanResult.SUCCEED,
    errno.EAGAIN: ScanResult.PTE_NON_PRESENT,
    errno.ENOENT: ScanResult.PTE_NON_PRESENT,
    errno.EBUSY: ScanResult.PAGE_COUNT,
    errno.EINVAL: ScanResult.VMA_CHECK,
    errno.EFAULT: ScanResult.VMA_NULL,
    errno.ENOMEM: ScanResult.ALLOC_HUGE_PAGE_FAIL,
    EHWPOISON: ScanResult.COPY_MC,
}

_REASONS = {
    errno.EAGAIN: "a page is absent, a marker, or held by the kernel at this moment",
    errno.ENOENT: "nothing is mapped there, or a page is absent",
    errno.EBUSY: "a page is pinned, or shared with another process",
    errno.EINVAL: "the kernel does not move memory of this mapping (locked, read-only, or more than one mapping)",
    errno.EFAULT: "nothing is mapped there, or it may not be written",
}


class LostBytesError(MthpError):
    """The bytes of a block are wrong, or could not be put back: nothing more may be moved."""


class Objection(NamedTuple):
    """The reason why a block is not moved.

    Attributes:
        result: the scan result nearest to it.
        reason: text for users, a sentence without a full stop.
    """

    result: ScanResult
    reason: str


def result_of_move(error: int) -> ScanResult:
    """Return the scan result nearest to the errno of UFFDIO_MOVE (move_pages, mm/userfaultfd.c) or of populating."""
    return _RESULTS.get(error, ScanResult.FAIL)


def reason_of_move(error: int) -> str:
    """Return the text for that errno; ``""`` for 0."""
    return _REASONS.get(error, os.strerror(error)) if error else ""
