"""Check that memory lies in folios as expected: ``2M>=95%``, ``heap:64K>=90%``, ``guest-ram:2M>=99%``.

Only memory that the hardware can use counts (:class:`~mthp.metrics.Coverage`): the PMD size if a PMD entry maps it,
smaller sizes as whole blocks, aligned in memory and in the address space, as arm64 can fold them (contpte).

Without a mapping, an expectation is about the anonymous memory of the whole process; with one, about all resident
memory of the mappings of that name: ``heap`` and ``stack``, ``guest-ram``, an address in the mapping, or a shell
pattern of its name.

Guest RAM is the writable memory that a virtual machine monitor keeps from its children (MADV_DONTFORK, as QEMU does),
else its largest writable mapping.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.engine.census import Census, PageCounts, VmaCensus, take_census
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.metrics import MAX_FOLIO_ORDER
from mthp.progress import Progress
from mthp.tabular import Tabular
from mthp.units import format_size, parse_share

Verdict = Literal["passed", "failed", "unknown"]

_EXPECTATION = re.compile(r"\s*(?:(?P<mapping>.*):)?(?P<size>[^:]+?)\s*>=\s*(?P<share>[^=<>]+)")

_HOW = "write it as 2M>=95%, heap:64K>=90%, guest-ram:2M>=99% or 0x7f0000000000:2M>=50%"

_NOT_COPIED = "dc"
"""The word of VmFlags for VM_DONTCOPY (show_smap_vma_flags(), fs/proc/task_mmu.c)."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """An expectation of some memory.

    Attributes:
        text: as the user wrote it.
        mapping: name of the mappings; ``""`` for the anonymous memory of all.
        size: folio size, as written.
        least: the least share of the resident memory in folios of that size or larger.
    """

    text: str
    mapping: str
    size: str
    least: float

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Return the expectation that `text` states.

        Raises:
            UsageError: `text` is not an expectation.
        """
        found = _EXPECTATION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise UsageError(f"{str(text)[:60]!r} is not an expectation", help=_HOW)
        try:
            least = parse_share(found["share"].strip())
        except UsageError as error:
            raise UsageError(f"expectation {text[:60]!r}: {error.message}", help=error.help or _HOW) from error
        if not 0 <= least <= 1:
            raise UsageError(f"expectation {text[:60]!r}: a share is 0% to 100%", help=_HOW)
        return cls(text.strip(), found["mapping"] or "", found["size"], least)


@dataclass(frozen=True, slots=True)
class Checked:
    """One expectation, and the result of checking it.

    Attributes:
        expectation: as the user wrote it.
        mapping, size, least: its parts.
        mappings: number of mappings that it is about.
        resident_bytes: resident bytes of these.
        share: the part of these bytes in folios of that size or larger; None if nothing is resident.
        verdict: ``unknown`` if folio sizes are not visible, and what is visible does not suffice.
        reason: why it did not pass; ``""`` if it did.
    """

    expectation: str
    mapping: str
    size: str
    least: float
    mappings: int
    resident_bytes: int
    share: float | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Verification(Tabular):
    """The checked expectations of one target.

    Attributes:
        label: name of the target.
        geometry: geometry of its machine.
        checks: the result of each expectation.
        out_of_reach_bytes: anonymous memory of the target in no whole PMD range of its mapping.
        missing: what could not be read, and what would make it readable.
    """

    ROWS: ClassVar = "checks"
    JSON: ClassVar = "target=label geometry passed checks out_of_reach_bytes missing"

    label: str
    geometry: Geometry
    checks: tuple[Checked, ...]
    out_of_reach_bytes: int
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all expectations are met."""
        return all(check.verdict == "passed" for check in self.checks)

    @property
    def exit_code(self) -> int:
        """1 if an expectation failed, 3 if one is unknown, else 0."""
        verdicts = {check.verdict for check in self.checks}
        return 1 if "failed" in verdicts else 3 if "unknown" in verdicts else 0


def verify_space(
    space: AddressSpace, expectations: Sequence[Expectation], progress: Progress | None = None
) -> Verification:
    """Check expectations of the memory of `space`.

    Raises:
        UsageError: a size that no folio has here.
    """
    orders = [space.geometry.parse_order(each.size) for each in expectations]
    census = take_census(space, progress)
    # The PMD size takes a PMD entry: it is known without the size of any folio.
    known = space.geometry.pmd_order if abilities.shows_pmd_entries(space) else MAX_FOLIO_ORDER + 1
    checks = tuple(
        _checked(census, each, order, order >= known) for each, order in zip(expectations, orders, strict=True)
    )
    reach = census.anonymous.out_of_reach_bytes(space.geometry)
    return Verification(space.label, space.geometry, checks, reach, space.missing)


def _checked(census: Census, expectation: Expectation, order: int, known: bool) -> Checked:
    vmas = _mappings(census, expectation.mapping) if expectation.mapping else list(census.vmas)
    pages = PageCounts.total([vma.pages if expectation.mapping else vma.anonymous for vma in vmas])
    coverage, geometry = pages.coverage, census.geometry
    share = coverage.share(order) if coverage.resident else None
    unknown = 0 if known else coverage.unknown
    verdict: Verdict = "failed"
    reason = ""
    if not vmas:
        reason = f"no mapping is called {expectation.mapping}: mthp inspect --all lists them"
    elif share is None:
        reason = "nothing of it is resident"
    elif share >= expectation.least:
        verdict = "passed"
    elif unknown and (coverage.pages[order] + unknown) / coverage.resident >= expectation.least:
        verdict, reason = "unknown", f"the folio sizes of {format_size(unknown * geometry.page_size)} are not visible"
    else:
        reason = f"{100 * share:.1f}% is less than {100 * expectation.least:g}%"
        if coverage.out_of_reach:
            size = format_size(coverage.out_of_reach_bytes(geometry))
            reason += f"; {size} of it lie in no whole {geometry.label(geometry.pmd_order)} range of their mapping"
    return Checked(
        expectation.text,
        expectation.mapping,
        geometry.label(order),
        expectation.least,
        len(vmas) if expectation.mapping else len([vma for vma in vmas if vma.anonymous.resident]),
        coverage.resident_bytes(geometry),
        share,
        verdict,
        reason,
    )


def _mappings(census: Census, name: str) -> list[VmaCensus]:
    """Return the mappings that `name` means."""
    if name == "guest-ram":
        return _guest_ram(census)
    if re.fullmatch("0x[0-9a-fA-F]+", name):
        # 18 characters hold every 64-bit address; more digits name no mapping, and must not cost time.
        address = int(name[:18], 16)
        return [each for each in census.vmas if each.vma.start <= address < each.vma.end]
    wanted = f"[{name}]" if name in ("heap", "stack") else name
    # A name in brackets is the kernel's own, not a set of characters, so it is also compared literally.
    return [each for each in census.vmas if each.vma.name == wanted or fnmatchcase(each.vma.name, wanted)]


def _guest_ram(census: Census) -> list[VmaCensus]:
    size = census.geometry.pmd_size
    writable = [each for each in census.vmas if "w" in each.vma.permissions and each.vma.size >= size]
    kept = [each for each in writable if _NOT_COPIED in each.vma.flags]
    return kept or sorted(writable, key=lambda each: -each.vma.size)[:1]
