"""What a program can ask of the machine: its system calls, each giving 0 or an error number.

The programs of :mod:`mthp.lab` make few of them. The random life tests alone make the others (locking, mremap,
userfaultfd, drivers' pages, migration): khugepaged has to cope with what they leave in page tables.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from mthp.sim import driver, syscalls, uffd
from mthp.sim.migrate import finish_migration, start_migration
from mthp.sim.mm import Mm, SimVma
from mthp.sim.mremap import Remap, mremap
from mthp.sim.parts import Parts

ADDRESS_LIMIT = 1 << 47
"""The address behind the last one of user space, as on x86-64."""


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

    def munmap(self, mm: Mm, start: int, end: int) -> int:
        """Unmap a range: 0 or an error number."""
        return syscalls.munmap(self.parts, mm, start, end)

    def mprotect(self, mm: Mm, start: int, end: int, permissions: str) -> int:
        """Change what accesses a range permits, to such as ``"r--"``: 0, EINVAL or ENOMEM."""
        return syscalls.mprotect(self.parts, mm, start, end, permissions)

    def mlock(self, mm: Mm, start: int, end: int) -> int:
        """Lock a range in memory, and bring all of it there: 0, EINVAL, ENOMEM or EAGAIN."""
        return syscalls.mlock(self.parts, mm, start, end)

    def munlock(self, mm: Mm, start: int, end: int) -> int:
        """Unlock a range: 0, EINVAL or ENOMEM."""
        return syscalls.munlock(self.parts, mm, start, end)

    def mremap(
        self, mm: Mm, start: int, end: int, size: int, flags: Remap = Remap.MAYMOVE, new_address: int | None = None
    ) -> int:
        """Make the mapping of a range one of `size` bytes, here or elsewhere (:func:`mthp.sim.mremap.mremap`).

        Returns:
            The new address, or the negative of an error number.
        """
        return mremap(self.parts, mm, start, end, size, flags, new_address, ADDRESS_LIMIT)

    def thp_disable(self, mm: Mm, disabled: bool) -> int:
        """prctl(PR_SET_THP_DISABLE): no large folios for this address space from now on, or again; 0."""
        mm.thp_disabled = disabled
        return 0

    def uffd_register(self, mm: Mm, start: int, end: int, modes: Sequence[str]) -> int:
        """UFFDIO_REGISTER for ``"missing"``, ``"wp"`` or both: 0 or EINVAL."""
        return uffd.register(self.parts, mm, start, end, modes)

    def uffd_unregister(self, mm: Mm, start: int, end: int) -> int:
        """UFFDIO_UNREGISTER: 0 or EINVAL."""
        return uffd.unregister(self.parts, mm, start, end)

    def uffd_writeprotect(self, mm: Mm, start: int, end: int, *, on: bool) -> int:
        """UFFDIO_WRITEPROTECT: 0, EINVAL or ENOENT."""
        return uffd.writeprotect(self.parts, mm, start, end, on=on)

    def uffd_copy(self, mm: Mm, address: int, content: int) -> int:
        """UFFDIO_COPY of one page: 0, EINVAL, ENOENT, EEXIST or ENOMEM."""
        return uffd.copy(self.parts, mm, address, content)

    def uffd_zeropage(self, mm: Mm, address: int) -> int:
        """UFFDIO_ZEROPAGE of one page: 0, EINVAL, ENOENT or EEXIST."""
        return uffd.zeropage(self.parts, mm, address)

    def insert_page(self, mm: Mm, address: int, *, managed: bool) -> int:
        """A driver maps a page of its own (:func:`mthp.sim.driver.insert_page`): 0, EFAULT, EBUSY or ENOMEM."""
        return driver.insert_page(self.parts, mm, address, managed=managed)

    def start_migration(self, mm: Mm, address: int) -> int:
        """Begin to move the folio at `address` to other frames: 0, EFAULT or EBUSY."""
        return start_migration(self.parts, mm, address)

    def finish_migrations(self) -> None:
        """Let all folios arrive that are on their way."""
        for head in list(self.parts.migrating):
            finish_migration(self.parts, head)
