"""The system calls of a program, each returning 0 or an error number.

The programs of :mod:`mthp.lab` use few of them. Only the random life tests use the others (locking, mremap,
userfaultfd, drivers' pages, migration), because khugepaged has to cope with the page tables that they leave.
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
    """The calls that need only the machine's parts."""

    parts: Parts

    def map(self, mm: Mm, start: int, end: int, *, flags: Iterable[str] = (), anon_vma: bool = False) -> SimVma:
        """Add a private anonymous mapping."""
        raise NotImplementedError

    def mmap(self, mm: Mm, size: int, *, flags: Iterable[str] = ()) -> int:
        """Map `size` bytes in the highest free range.

        Returns:
            The address, aligned to the PMD size if `size` is a multiple of it; or the negative of EINVAL or ENOMEM.
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
    """Unmap a range; return 0 or an error number."""

    mprotect = _call(syscalls.mprotect)
    """Change the permissions of a range, for example to ``"r--"``; return 0, EINVAL or ENOMEM."""

    mlock = _call(syscalls.mlock)
    """Lock a range in memory, and make all of it present; return 0, EINVAL, ENOMEM or EAGAIN."""

    munlock = _call(syscalls.munlock)
    """Unlock a range; return 0, EINVAL or ENOMEM."""

    def mremap(
        self, mm: Mm, start: int, end: int, size: int, flags: Remap = Remap.MAYMOVE, new_address: int | None = None
    ) -> int:
        """Resize the mapping of a range (:mod:`~mthp.sim.address_space.mremap`).

        Returns:
            The new address, or the negative of an error number.
        """
        return mremap(self.parts, mm, start, end, size, flags, new_address, ADDRESS_LIMIT)

    def thp_disable(self, mm: Mm, disabled: bool) -> int:
        """prctl(PR_SET_THP_DISABLE): disallow or allow large folios for this address space; return 0."""
        mm.thp_disabled = disabled
        return 0

    uffd_register = _call(uffd.register)
    """UFFDIO_REGISTER for ``"missing"``, ``"wp"`` or both; return 0 or EINVAL."""

    uffd_unregister = _call(uffd.unregister)
    """UFFDIO_UNREGISTER; return 0 or EINVAL."""

    uffd_writeprotect = _call(uffd.writeprotect)
    """UFFDIO_WRITEPROTECT; return 0, EINVAL or ENOENT."""

    uffd_copy = _call(uffd.copy)
    """UFFDIO_COPY of one page; return 0, EINVAL, ENOENT, EEXIST or ENOMEM."""

    uffd_zeropage = _call(uffd.zeropage)
    """UFFDIO_ZEROPAGE of one page; return 0, EINVAL, ENOENT or EEXIST."""

    insert_page = _call(driver.insert_page)
    """Map a page of a driver; return 0, EFAULT, EBUSY or ENOMEM."""

    start_migration = _call(start_migration)
    """Begin to move the folio at an address to other frames; return 0, EFAULT or EBUSY."""

    def finish_migrations(self) -> None:
        """Finish all migrations that were started."""
        for head in list(self.parts.migrating):
            finish_migration(self.parts, head)
