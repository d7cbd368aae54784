"""The mappings that the mover refuses, by their /proc/PID/smaps, for live, recorded and simulated ones.

The list has the allowed flags, not the refused ones, so that a flag of a later kernel is refused until it has been
examined. It has:

- ``rd wr mr mw me``: the permissions, and those that the mapping may get.
- ``ac`` and ``nr``: whether the mapping counts against the overcommit limit. It was counted when it was made
  (vm_enough_memory); its pages may come and go. Heaps of glibc's threads and of jemalloc have ``nr``.
- ``hg``: MADV_HUGEPAGE.
- ``dc``: MADV_DONTFORK. V8 sets it on its whole heap, so that fork(2) has less to copy (OS::Allocate,
  src/base/platform/platform-posix.cc), and drivers' libraries on memory that a device writes to. UFFDIO_MOVE refuses
  pages that such a device has pinned, and a process that has one open is refused as a whole
  (:mod:`mthp.linux.mover.refuse.devices`).
- ``sd``: soft-dirty (Documentation/admin-guide/mm/soft-dirty.rst). It means that the mapping is newer than the last
  clearing of such bits, so a checkpointer treats all of its pages as written. A moved page is a written page with its
  own bit set: a clean page is then saved once more, and none is missed. Kernels built with CONFIG_MEM_SOFT_DIRTY show
  it on nearly every mapping.

The protection key of a mapping (pkeys(7)) is not a flag, and is not checked here: a caller that runs code inside a
target has to make sure that no key prevents that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mthp.vma import Vma, VmaKind


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reason not to move something.

    Attributes:
        key: a word for scripts, which does not change between versions.
        reason: a sentence without a full stop.
        remedy: what would allow the move, or ``""``.
    """

    key: str
    reason: str
    remedy: str = ""


ALLOWED_FLAGS = frozenset({"rd", "wr", "mr", "mw", "me", "ac", "nr", "hg", "dc", "sd"})
"""VmFlags words that allow a move (show_smap_vma_flags(), fs/proc/task_mmu.c)."""

_FLAG_REFUSALS = {
    "sl": Refusal("vma_sealed", "it is sealed (mseal): its contents are not to be taken away"),
    "gd": Refusal("vma_stack", "it is a stack that grows (VM_GROWSDOWN)"),
    "lo": Refusal("vma_locked", "it is locked (mlock): its pages must not move", "munlock(2)"),
    "lf": Refusal("vma_locked", "it is locked (mlock2 on fault): its pages must not move", "munlock(2)"),
    "nh": Refusal("vma_nohugepage", "MADV_NOHUGEPAGE is set"),
    "um": Refusal("vma_userfaultfd", "its faults are served by a userfaultfd of its own"),
    "uw": Refusal("vma_userfaultfd", "a userfaultfd of its own tracks writes to it"),
    "ui": Refusal("vma_userfaultfd", "its faults are served by a userfaultfd of its own"),
    "mg": Refusal("vma_mergeable", "its pages are merged with others of the same contents (KSM)"),
    "wf": Refusal("vma_wipeonfork", "MADV_WIPEONFORK is set, as it is on secrets that must not be copied"),
    "dd": Refusal("vma_dontdump", "MADV_DONTDUMP is set, as it is on secrets and on memory of devices"),
    "dp": Refusal("vma_droppable", "the kernel may drop its pages at any time (MAP_DROPPABLE)"),
    "gu": Refusal("vma_guard", "it may hold guard pages (MADV_GUARD_INSTALL)"),
    "ss": Refusal("vma_shadow_stack", "it is a shadow stack"),
    "ex": Refusal("vma_executable", "it may be executed"),
    "mt": Refusal("vma_tagged", "its pages carry memory tags (MTE), which a copy of the bytes would lose"),
}
"""Refusals of flags with a reason of their own; the first that applies is returned."""

_NOT_ANON = Refusal("vma_not_anonymous", "it is not anonymous memory", "MADV_COLLAPSE takes memory of files")
_NOT_PRIVATE = Refusal("vma_not_private", "it is shared memory", "MADV_COLLAPSE takes shared memory")
_NOT_READ_WRITE = Refusal("vma_not_read_write", "it may not be both read and written")
_NO_FLAGS = Refusal("vma_flags_unknown", "its flags cannot be seen", "a kernel with CONFIG_PROC_PAGE_MONITOR")
_STACK = Refusal("vma_stack", "it is the stack of the first thread")


def refuse_vma(vma: Vma) -> Refusal | None:
    """Return the reason not to move memory of a mapping; None if there is none."""
    return _refuse(vma.permissions, vma.kind, vma.flags, vma.name.startswith("[stack"))


@functools.lru_cache(maxsize=1024)
def _refuse(permissions: str, kind: VmaKind, flags: frozenset[str], stack: bool) -> Refusal | None:
    """Do the work of :func:`refuse_vma`, cached because few mappings of a process differ in these."""
    # The order is that of the most useful reason: the kind of memory, then its permissions, then its flags.
    if kind is VmaKind.SHMEM or permissions.endswith("s"):
        return _NOT_PRIVATE
    if kind is not VmaKind.ANON:
        return _NOT_ANON
    if not permissions.startswith("rw"):
        return _NOT_READ_WRITE
    if stack:
        return _STACK
    if not flags:
        return _NO_FLAGS
    for word, refusal in _FLAG_REFUSALS.items():
        if word in flags:
            return refusal
    if unknown := sorted(flags - ALLOWED_FLAGS):
        return Refusal("vma_flags", f"it has flags that the mover does not know to be harmless: {' '.join(unknown)}")
    return None
