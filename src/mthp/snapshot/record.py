"""Recording an address space into a file.

The file appears under its name whole or not at all (:mod:`mthp.files`). Like ``perf.data``, only its owner can read it,
because it shows the memory layout of a live process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from mthp.abilities import service, with_nodes
from mthp.addrspace import AddressSpace
from mthp.errors import UsageError
from mthp.files import creating
from mthp.heat import Heat
from mthp.progress import Progress
from mthp.ptes import Segment, at_pmd_ranges, in_portions, page_numbers
from mthp.snapshot.description import Description, SnapshotInfo
from mthp.snapshot.formats import check_new, run_writer
from mthp.snapshot.runs import RunTable, encode
from mthp.vma import Vma, VmaKind

PORTION_SIZE = 256 << 20
"""Bytes of address space read at a time: 65 536 entries of 4 KiB."""


def record(
    space: AddressSpace,
    path: str | os.PathLike[str],
    *,
    portion_size: int = PORTION_SIZE,
    progress: Progress = lambda done, total: None,
    overwrite: bool = False,
    heat: Heat | None = None,
) -> SnapshotInfo:
    """Record `space` into a new file at `path`.

    Mappings of drivers and of the kernel itself are listed, but their entries are not read.

    Args:
        portion_size: bytes of address space read at a time, rounded up to whole PMD ranges.
        overwrite: replace a regular file or a symbolic link of that name.
        heat: memory that `space` uses, stored with it.

    Raises:
        UsageError: `path` exists, is not a regular file, or cannot be created; `portion_size` is not positive.
        MthpError: the file cannot be completed, for example on a full disk. No file is left.
        TargetVanishedError: the process exited. No file is left.
    """
    if portion_size < 1:
        raise UsageError(f"portion size {portion_size} is not positive")
    check_new(path, overwrite=overwrite)
    description = describe(space, with_nodes(space, space.vmas()), heat)
    with creating(path, overwrite=overwrite) as file:
        with run_writer(file, path, space.geometry.page_size) as writer:
            for runs in _runs(space, description.vmas, portion_size, progress):
                writer.add(runs)
            description = writer.finish(description)
        size = file.tell()
    return description.info(os.fspath(path), writer.runs, size)


def describe(space: AddressSpace, vmas: Sequence[Vma], heat: Heat | None = None) -> Description:
    """Return the current description of `space`, with these mappings and heat.

    Raises:
        TargetVanishedError: the process exited.
    """
    return Description(
        label=space.label,
        service=service(space),
        kernel=space.kernel,
        recorded_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        geometry=space.geometry,
        switches=space.switches,
        tunables=space.tunables,
        thp_disabled=space.thp_disabled,
        missing=space.missing,
        vmas=tuple(vmas),
        pages=0,
        heat=heat,
    )


def _runs(space: AddressSpace, vmas: Sequence[Vma], portion_size: int, progress: Progress) -> Iterator[RunTable]:
    """Yield the runs of all readable mappings, portion by portion."""
    geometry = space.geometry
    portion_size = -(-portion_size // geometry.pmd_size) * geometry.pmd_size
    vma_first = page_numbers([(vma.start, vma.end) for vma in vmas], geometry.page_size)[:, 0]
    total = sum(vma.size for vma in vmas)
    # At the end of a portion, all mappings below it are done.
    below, index = 0, 0
    for portion in in_portions(_segments(space, vmas), portion_size):
        yield encode(space.read(portion), vma_first, geometry.page_size)
        end = portion[-1][1]
        while index < len(vmas) and vmas[index].end <= end:
            below += vmas[index].size
            index += 1
        inside = max(0, end - vmas[index].start) if index < len(vmas) else 0
        progress(below + inside, total)
    progress(total, total)


def _segments(space: AddressSpace, vmas: Sequence[Vma]) -> Iterator[Segment]:
    """Yield the segments that may be populated in the readable mappings, ascending."""
    geometry = space.geometry
    for vma in vmas:
        # Memory of drivers and of the kernel itself, which khugepaged never touches.
        if vma.kind is not VmaKind.SPECIAL:
            for segment in space.populated([(vma.start, vma.end)], geometry.pmd_size):
                # Blocks are cut at multiples of their size from a segment's start: so no segment begins inside a PMD
                # range and goes beyond it, and no portion cuts a range and its folios.
                yield from at_pmd_ranges([segment], geometry)
