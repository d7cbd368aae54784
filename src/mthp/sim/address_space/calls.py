"""What a program can ask of the machine: its system calls, each giving 0 or an error number.

The programs of :mod:`mthp.lab` make few of them. The random life tests alone make the others (locking, mremap,
userfaultfd, drivers' pages, migration): khugepaged has to cope with what they leave in page tables.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec, TypeVar

from mthp.sim.address_space import driver, syscalls, uffd
from mthp.sim.address_space.mremap import Remap, mremap
from mthp.sim.allocation.migrate import finish_migration, start_migration
from mthp.sim.mm import Mm, SimVma
from mthp.sim.parts import Parts

ADDRESS_LIMIT = 1 << 47
"""The address behind the last one of user space, as on x86-64."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _call(function: Callable[Concatenate[Parts, _P], _R]) -> Callable[Concatenate[SystemCalls, _P], _R]:
    """Return the method that calls `function` with the machine's parts."""

    def method(self: SystemCalls, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(self.parts, *args, **kwargs)

    return method


class SystemCalls:
    """The calls that need nothing but the machine's parts."""

    parts: Parts

    def map(self, mm: Mm, start: int, end: int, *, flags: Iterable[str] = (), anon_vma: bool = False) -> SimVma:
        """Add a private anonymous mapping."""
        raise NotImplementedError

    def mmap(self, mm: Mm, size: int, *, flags: Iterable[str] = ()) -> int:
        """Map `size` bytes wherever there is room, from the top down; aligned to the PMD size if a multiple of it.

        Returns:
            The address, or the negative of EINVAL or ENOMEM.
        """
        page = self.parts.geometry.page_size
        size = -(-size // page) * page
        if size <= 0:
            return -errno.EINVAL
        address = mm.free_range(size, ADDRESS_LIMIT)
        if address is None:
            return -errno.ENOMEM
        self.map(mm, address, address + size, flags=flags)
        return address

    munmap = _call(syscalls.munmap)
    """Unmap a range: 0 or an error number."""

    mprotect = _call(syscalls.mprotect)
    """Change what accesses a range permits, to such as ``"r--"``: 0, EINVAL or ENOMEM."""

    mlock = _call(syscalls.mlock)
    """Lock a range in memory, and bring all of it there: 0, EINVAL, ENOMEM or EAGAIN."""

    munlock = _call(syscalls.munlock)
    """Unlock a range: 0, EINVAL or ENOMEM."""

    def mremap(
        self, mm: Mm, start: int, end: int, size: int, flags: Remap = Remap.MAYMOVE, new_address: int | None = None
    ) -> int:
        """Make the mapping of a range one of `size` bytes, here or elsewhere (:mod:`~mthp.sim.address_space.mremap`).

        Returns:
            The new address, or the negative of an error number.
        """
        return mremap(self.parts, mm, start, end, size, flags, new_address, ADDRESS_LIMIT)

    def thp_disable(self, mm: Mm, disabled: bool) -> int:
        """prctl(PR_SET_THP_DISABLE): no large folios for this address space from now on, or again; 0."""
        mm.thp_disabled = disabled
        return 0

    uffd_register = _call(uffd.register)
    """UFFDIO_REGISTER for ``"missing"``, ``"wp"`` or both: 0 or EINVAL."""

    uffd_unregister = _call(uffd.unregister)
    """UFFDIO_UNREGISTER: 0 or EINVAL."""

    uffd_writeprotect = _call(uffd.writeprotect)
    """UFFDIO_WRITEPROTECT: 0, EINVAL or ENOENT."""

    uffd_copy = _call(uffd.copy)
    """UFFDIO_COPY of one page: 0, EINVAL, ENOENT, EEXIST or ENOMEM."""

    uffd_zeropage = _call(uffd.zeropage)
    """UFFDIO_ZEROPAGE of one page: 0, EINVAL, ENOENT or EEXIST."""

    insert_page = _call(driver.insert_page)
    """A driver maps a page of its own: 0, EFAULT, EBUSY or ENOMEM."""

    start_migration = _call(start_migration)
    """Begin to move the folio at an address to other frames: 0, EFAULT or EBUSY."""

    def finish_migrations(self) -> None:
        """Let all folios arrive that are on their way."""
        for head in list(self.parts.migrating):
            finish_migration(self.parts, head)
