"""Find pages that a driver holds for a process, as far as the kernel shows them.

A pinned page cannot be collapsed or moved, because a device may write to it. VmPin of ``/proc/PID/status`` is the
amount that RDMA, VFIO and io_uring have accounted (``mm->pinned_vm``), and the fdinfo of an io_uring lists the buffers
registered with it (io_uring_show_fdinfo(), io_uring/fdinfo.c). Pages held by a pipe or a transfer at the moment are
shown nowhere: only an attempt detects them (PAGE_COUNT).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from mthp.errors import MthpError
from mthp.linux.process import Process
from mthp.ptes import Segment
from mthp.results import ScanResult
from mthp.units import format_size
from mthp.vma import Vma

_BUFFER = re.compile(r"^\s*[0-9]+: 0x([0-9a-f]+)/([0-9]+)", re.MULTILINE)


def pinned_by(process: Process, vma: Vma | None) -> list[str]:
    """Return the holders of pages of a mapping, or of the whole process, each as a sentence."""
    meaning = f"{ScanResult.PAGE_COUNT.name}: {ScanResult.PAGE_COUNT.meaning}"
    found = [
        f"{meaning}: io_uring has registered {format_size(end - start)} at {start:#x}"
        for start, end in _registered(process)
        if vma is None or (start < vma.end and vma.start < end)
    ]
    size = int((process.status("VmPin") or "0").split()[0]) << 10
    # VmPin counts the registered buffers, too.
    if size and not found:
        where = "" if vma is None else "; the kernel does not show whether here"
        found.append(f"{meaning}: {format_size(size)} of the process are pinned (VmPin){where}")
    return found


def _registered(process: Process) -> Iterator[Segment]:
    """Yield the buffers registered with the io_uring instances of a process; none where they are not visible."""
    try:
        directory = process.open("fd")
    except MthpError:
        process.check_alive()
        return
    try:
        for name in os.listdir(directory):  # noqa: PTH208  (a descriptor has no Path)
            try:
                if not os.readlink(name, dir_fd=directory).startswith("anon_inode:[io_uring]"):
                    continue
                text = process.read(f"fdinfo/{name}").decode(errors="replace")
            except (OSError, MthpError):
                continue
            part = text.partition("UserBufs:")[2].partition("PollList:")[0]
            for start, size in _BUFFER.findall(part):
                yield int(start, 16), int(start, 16) + int(size)
    finally:
        os.close(directory)
