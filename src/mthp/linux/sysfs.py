"""Read the machine's THP files: ``/sys/kernel/mm/transparent_hugepage`` and the counters of ``/proc/vmstat``.

Kernels differ in their files: none at all without CONFIG_TRANSPARENT_HUGEPAGE, no per-size directories before 6.8, an
8 kB directory for shared memory, counters that come and go. So this module expects no fixed set: it reads the existing
files, and a missing file is ordinary.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from mthp.geometry import GEOMETRIES, Geometry
from mthp.linux.kernelfiles import text_of
from mthp.tunables import Switches, Tunables

THP_ROOT = Path("/sys/kernel/mm/transparent_hugepage")
VMSTAT = Path("/proc/vmstat")

_SIZE_DIRECTORY = re.compile(r"hugepages-(\d+)kB")
_ARCHITECTURES = {"x86_64": "x86-64", "aarch64": "arm64", "ppc64le": "ppc64"}
_SEVERAL_PAGE_SIZES = ("arm64", "ppc64")


class ThpSysfs:
    """The THP directory of one machine.

    Args:
        root: the directory; tests have one of their own.
    """

    def __init__(self, root: Path = THP_ROOT, vmstat: Path = VMSTAT) -> None:
        self.root = root
        self.vmstat_path = vmstat

    @property
    def exists(self) -> bool:
        """Return whether this kernel has THP at all."""
        return self.root.is_dir()

    def text(self, path: str) -> str | None:
        """Return the text of a file below the directory, without its newline; None if it cannot be read."""
        return text_of(self.root / path)

    def geometry(self, page_size: int | None = None, machine: str | None = None) -> Geometry:
        """Return the geometry of this machine.

        Args:
            page_size: in bytes; the running kernel's if not given.
            machine: name in ``uname -m``; the running kernel's if not given.
        """
        page_size = page_size or os.sysconf("SC_PAGESIZE")
        preset = _preset(machine or os.uname().machine, page_size)
        size = self.text("hpage_pmd_size")
        pmd_order = preset.pmd_order if size is None else (int(size) // page_size).bit_length() - 1
        return dataclasses.replace(preset, pmd_order=pmd_order)

    def size_directories(self, page_size: int) -> dict[int, Path]:
        """Return the existing directories ``hugepages-<size>kB``, by order, ascending."""
        found = {}
        for path in self.root.glob("hugepages-*kB"):
            if match := _SIZE_DIRECTORY.fullmatch(path.name):
                found[((int(match[1]) << 10) // page_size).bit_length() - 1] = path
        return dict(sorted(found.items()))

    def switches(self, geometry: Geometry) -> Switches:
        """Return the switches at this moment.

        Raises:
            UsageError: a file in which no known word is chosen.
        """
        paths = [self.root / "enabled"]
        paths += [path / "enabled" for path in self.size_directories(geometry.page_size).values()]
        texts = {str(path.relative_to(self.root)): text for path in paths if (text := text_of(path)) is not None}
        return Switches.from_sysfs(texts, geometry)

    def tunables(self, geometry: Geometry) -> Tunables:
        """Return khugepaged's tunables at this moment; a missing one has the kernel's default.

        Raises:
            UsageError: a file that contains no number, or one out of range.
        """
        names = [knob.name for knob in dataclasses.fields(Tunables)]
        texts = {name: text for name in names if (text := self.text(f"khugepaged/{name}")) is not None}
        return Tunables.from_sysfs(texts, geometry)

    def stats(self, geometry: Geometry) -> dict[int, dict[str, int]]:
        """Return the per-size counters ``hugepages-<size>kB/stats/*``: order, then name, then value since boot.

        Files without a number are left out, because kernels add files there.
        """
        counters: dict[int, dict[str, int]] = {}
        for order, path in self.size_directories(geometry.page_size).items():
            files = sorted((path / "stats").glob("*"))
            values = {file.name: int(text) for file in files if (text := text_of(file) or "").isdecimal()}
            if values:
                counters[order] = values
        return counters

    def vmstat(self) -> dict[str, int]:
        """Return the ``thp_*`` counters of ``/proc/vmstat``, by name."""
        lines = (text_of(self.vmstat_path) or "").splitlines()
        pairs = (line.split() for line in lines if line.startswith("thp_"))
        return {name: int(value) for name, value in pairs}


def _preset(machine: str, page_size: int) -> Geometry:
    """Return the preset of an architecture, or one of its name in which one page of entries covers a PMD range."""
    name = _ARCHITECTURES.get(machine, machine)
    if name in _SEVERAL_PAGE_SIZES:
        name = f"{name}-{page_size >> 10}k"
    preset = GEOMETRIES.get(name)
    if preset and preset.page_size == page_size:
        return preset
    # Eight bytes an entry on every 64-bit architecture.
    entries_per_page = page_size // 8
    return Geometry(name, page_size, entries_per_page.bit_length() - 1)
