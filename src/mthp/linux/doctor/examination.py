"""Find out what this kernel and these rights allow, and how to get the rest.

:func:`examine` answers a fixed list of questions with a :class:`Finding` each. An answer comes from a trial
(``probes``) or from the existence of a file; the kernel's release is reported but never compared, because distributions
backport features and configure them away. Kernel versions occur in remedies only: they name the release of kernel.org
that introduced the feature. Nothing is changed, and trials release whatever they allocate.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path

from mthp.engine.lasting import lasting_on
from mthp.errors import UsageError
from mthp.freememory import parse_buddyinfo
from mthp.geometry import Geometry
from mthp.linux.cgroups import cgroup_mounts
from mthp.linux.doctor.findings import (
    PTRACE_SCOPE,
    Answer,
    Examination,
    Facts,
    Finding,
    Question,
    State,
    name_of,
    refused,
)
from mthp.linux.doctor.heat_sources import HEAT_QUESTIONS
from mthp.linux.doctor.move_ability import MOVE_QUESTIONS
from mthp.linux.doctor.split_ability import SPLIT_QUESTIONS
from mthp.linux.memorylimits import cgroup_bounds, parse_meminfo
from mthp.linux.probes import Probed, probe
from mthp.linux.rights import CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_PTRACE, Rights
from mthp.linux.sysfs import ThpSysfs
from mthp.results import result_of_madvise
from mthp.units import format_size

SLOW_SECONDS_PER_GIB = 60
"""Seconds for 1 GiB above which khugepaged's rests make it limited."""

_GIB = 1 << 30


def examine(
    *,
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    geometry: Geometry | None = None,
    probed: Probed | None = None,
) -> Examination:
    """Return what this kernel and these rights allow. Takes some milliseconds.

    Args:
        sysfs, proc: mount points; tests have trees of their own.
        geometry: page and folio sizes of the machine; read from it if not given.
        probed: results of the trials; they are made if not given.
    """
    thp = ThpSysfs(sysfs / "kernel/mm/transparent_hugepage", proc / "vmstat")
    geometry = geometry or thp.geometry()
    facts = Facts(thp, proc, geometry, probed or probe(geometry), Rights.read(proc / "self"))
    has_thp = thp.exists
    findings = []
    for key, title, of_thp, ask in _QUESTIONS:
        # Without THP there are no files to answer from; one reason for all of these questions.
        if of_thp and not has_thp:
            answer = Answer(State.MISSING, "this kernel has no THP")
        else:
            try:
                answer = ask(facts)
            except UsageError as error:
                # A file of this kernel has a word that this version does not know.
                answer = Answer(State.LIMITED, error.message, "a newer mthp may know it")
        findings.append(Finding(key, title, *answer))
    return Examination(facts.text("sys/kernel/osrelease") or os.uname().release, geometry, has_thp, tuple(findings))


def _thp(facts: Facts) -> Answer:
    if not facts.thp.exists:
        return Answer(
            State.MISSING,
            f"{facts.thp.root} does not exist",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE, on a CPU with huge pages",
        )
    word = facts.thp.switches(facts.geometry).enabled
    if facts.switched_off:
        return Answer(
            State.LIMITED,
            f"available, enabled is {word}, but switched off for this process",
            "start it from a process that has not called prctl(PR_SET_THP_DISABLE), which is inherited",
        )
    # MADV_COLLAPSE ignores the switches (TVA_FORCED_COLLAPSE, __thp_vma_allowable_orders(), mm/huge_memory.c, 7.3).
    if word == "never":
        return Answer(
            State.LIMITED,
            "available, but enabled is never; MADV_COLLAPSE works nevertheless",
            f"echo madvise > {facts.thp.root}/enabled (as root) lets programs request huge pages",
        )
    return Answer(State.OK, f"available, enabled is {word}")


def _size_switches(facts: Facts) -> Answer:
    directories = facts.thp.size_directories(facts.geometry.page_size)
    orders = tuple(order for order, path in directories.items() if (path / "enabled").exists())
    if not orders:
        return Answer(State.MISSING, f"one switch for all: folios of {facts.pmd}", "Linux 6.8 or later")
    return Answer(State.OK, facts.size_list(orders))


def _sizes(facts: Facts) -> Answer:
    switches = facts.thp.switches(facts.geometry)
    plain, advised = switches.orders(advised=False), switches.orders(advised=True)
    what = f"for plain memory: {facts.size_list(plain)}; for MADV_HUGEPAGE memory: {facts.size_list(advised)}"
    smaller = [order for order in switches.sizes if order < facts.geometry.pmd_order]
    if any(order in advised for order in smaller):
        return Answer(State.OK, what)
    if not smaller:
        return Answer(State.LIMITED, what, "smaller sizes: Linux 6.8 or later")
    # Most processors gain from 64K, but a machine of large pages may not have it.
    size = facts.geometry.sysfs_name(min(smaller, key=lambda order: abs(facts.geometry.size_of(order) - (64 << 10))))
    return Answer(State.LIMITED, what, f"smaller sizes: echo madvise > {facts.thp.root}/{size}/enabled (as root)")


def _size_stats(facts: Facts) -> Answer:
    counters = facts.thp.stats(facts.geometry)
    if not counters:
        return Answer(State.MISSING, "no counters by size", "Linux 6.10 or later")
    names = sorted(set().union(*counters.values()))
    return Answer(State.OK, f"{len(names)} counters for {facts.size_list(tuple(counters))}")


def _madv_collapse(facts: Facts) -> Answer:
    known, error = facts.probed.collapse_known, facts.probed.collapse
    # Over an empty range an advice that the kernel knows succeeds (see probes).
    if known == errno.EINVAL:
        return Answer(State.MISSING, "the kernel does not know it", "Linux 6.1 or later")
    if known:
        return Answer(State.MISSING, refused("madvise", known), "run outside the seccomp filter that forbids it")
    if error is None:
        return Answer(State.OK, f"the kernel knows it; not tried, since a folio has {facts.pmd}")
    if not error:
        return Answer(State.OK, f"collapsed {facts.pmd} of memory of its own, as a trial")
    remedies = {
        errno.ENOMEM: f"free memory in blocks of {facts.pmd}: see free_memory",
        errno.EBUSY: "room in the memory cgroup: see memory_limit",
        errno.EAGAIN: "try again",
    }
    if facts.switched_off:
        remedies[errno.EINVAL] = "a process without prctl(PR_SET_THP_DISABLE): see thp"
    what = f"the kernel knows it, but on memory of its own it failed: {name_of(error)}"
    return Answer(State.LIMITED, f"{what}, {result_of_madvise(error).meaning}", remedies.get(error, ""))


def _process_madvise(facts: Facts) -> Answer:
    error = facts.probed.process_madvise
    if error is None:
        return Answer(State.LIMITED, "not tried: no child process could be started")
    if not error:
        return Answer(State.OK, "works on a child process, and on processes with readable memory (other_processes)")
    remedies = {
        errno.EPERM: facts.rights.how_to_have(CAP_SYS_NICE),
        errno.EACCES: facts.rights.how_to_have(CAP_SYS_PTRACE),
        errno.EINVAL: "Linux 6.1 or later, which takes MADV_COLLAPSE there",
        errno.ENOSYS: "Linux 6.1 or later",
    }
    what = f"{refused('process_madvise', error)}; this process can collapse its own memory only"
    return Answer(State.MISSING, what, remedies.get(error, ""))


def _other_processes(facts: Facts) -> Answer:
    # Reading takes PTRACE_MODE_READ; Yama restricts PTRACE_MODE_ATTACH alone (yama_ptrace_access_check).
    if facts.rights.has(CAP_SYS_PTRACE):
        return Answer(State.OK, "the memory of every process of this user namespace may be read")
    what = f"only processes of user {facts.rights.fsuid} that have no more capabilities than this one"
    if (scope := facts.text(PTRACE_SCOPE)) is not None:
        what += f"; Yama's ptrace_scope, which is {scope}, has no effect on this"
    return Answer(State.LIMITED, what, facts.rights.how_to_have(CAP_SYS_PTRACE))


def _pfns(facts: Facts) -> Answer:
    if facts.probed.pfns:
        return Answer(State.OK, "pagemap shows them")
    what = f"pagemap hides them; folios below {facts.pmd} and lazily freed pages cannot be recognised"
    return Answer(State.MISSING, what, facts.rights.how_to_have(CAP_SYS_ADMIN))


def _kpageflags(facts: Facts) -> Answer:
    path = facts.proc / "kpageflags"
    try:
        with path.open("rb", buffering=0) as file:
            file.read(8)
    except FileNotFoundError:
        return Answer(State.MISSING, f"{path} does not exist", "a kernel with CONFIG_PROC_PAGE_MONITOR")
    except OSError as error:
        return Answer(
            State.MISSING, f"{path}: {error.strerror}", "run as root of the first user namespace, which owns the file"
        )
    return Answer(State.OK, "readable; it shows the folio orders where page frame numbers are visible")


def _pagemap_scan(facts: Facts) -> Answer:
    if facts.probed.pagemap_scan:
        return Answer(State.OK, "works; it shows what PMD entries map, and the zero page")
    what = "missing; smaps shows how much PMD entries map, and page frame numbers show the zero page"
    return Answer(State.MISSING, what, "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR")


def _mthp_khugepaged(facts: Facts) -> Answer:
    stats = facts.thp.stats(facts.geometry)
    # The counter came with khugepaged's support of these orders; there is no other sign of it.
    if not any("collapse_alloc" in names for order, names in stats.items() if order < facts.geometry.pmd_order):
        return Answer(State.MISSING, f"collapses to {facts.pmd} only", "Linux 7.2 or later")
    lacking = [key for key, _, _, question in MOVE_QUESTIONS if question(facts).state is State.MISSING]
    if lacking:
        when = f"the only way to these sizes here, without {', '.join(lacking)}"
    else:
        when = "the better way for processes that may not be stopped or traced, or that moving refuses"
    what = "collapses to sizes below the PMD size too, and counts by size"
    how = f"`mthp collapse --mechanism khugepaged` drives it: {when} (switches change for the whole system meanwhile)"
    return Answer(State.OK, f"{what}; {how}")


def _khugepaged(facts: Facts) -> Answer:
    if not (facts.thp.root / "khugepaged").is_dir():
        return Answer(State.MISSING, f"{facts.thp.root}/khugepaged does not exist")
    tunables = facts.thp.tunables(facts.geometry)
    passes = -(-(_GIB // facts.geometry.page_size) // tunables.pages_to_scan)
    rest = tunables.scan_sleep_millisecs / 1000
    what = (
        f"max_ptes_none {tunables.max_ptes_none}, max_ptes_swap {tunables.max_ptes_swap},"
        f" max_ptes_shared {tunables.max_ptes_shared}, defrag {int(tunables.defrag)};"
        f" 1 GiB takes {passes} passes of {tunables.pages_to_scan} pages with {rest:g} s of rest after each:"
        f" {passes * rest:g} s and its own work"
    )
    if not facts.thp.switches(facts.geometry).orders(advised=True):
        return Answer(State.LIMITED, f"idle, because no folio size is on; {what}", "a size that is on: see sizes")
    folder = f"{facts.thp.root}/khugepaged"
    if passes * rest > SLOW_SECONDS_PER_GIB:
        remedy = f"more in {folder}/pages_to_scan or less in scan_sleep_millisecs; `mthp collapse` does not wait for it"
        return Answer(State.LIMITED, what, remedy)
    return Answer(State.OK, what)


def _lasting(facts: Facts) -> Answer:
    what, remedy = lasting_on(facts.thp.switches(facts.geometry), facts.thp.tunables(facts.geometry), facts.geometry)
    return Answer(State.LIMITED if remedy else State.OK, what, remedy)


def _free_memory(facts: Facts) -> Answer:
    geometry = facts.geometry
    available = parse_meminfo(facts.text("meminfo") or "", "MemAvailable")
    memory = "" if available is None else f"; {format_size(available)} are available in all"
    nodes = parse_buddyinfo(facts.text("buddyinfo") or "")
    if not nodes:
        return Answer(State.LIMITED, f"{facts.proc}/buddyinfo shows nothing{memory}")
    parts = []
    for node in nodes:
        free, folios = node.pages * geometry.page_size, node.folios(geometry.pmd_order)
        parts.append(f"node {node.node}: {folios} folios of {facts.pmd} at once, of {format_size(free)} free")
    what = ", ".join(parts) + memory
    if any(node.folios(geometry.pmd_order) for node in nodes):
        return Answer(State.OK, what)
    remedy = f"echo 1 > {facts.proc}/sys/vm/compact_memory (as root) compacts memory, or smaller folios"
    return Answer(State.LIMITED, what, remedy)


def _memory_limit(facts: Facts) -> Answer:
    mounts = cgroup_mounts(facts.text("self/mountinfo") or "")
    bounds = cgroup_bounds(mounts, facts.text("self/cgroup") or "")
    # Every cgroup on the way to the root limits what is charged below it.
    bound = min(bounds, key=lambda each: each.left, default=None)
    if bound is None:
        return Answer(State.OK, "none for this process; a collapse is charged to the target's cgroup")
    what = f"{format_size(max(0, bound.left))} of {format_size(bound.limit)} are left in {bound.name}"
    return Answer(State.LIMITED, what, "a higher limit there; a collapse is charged to the target's cgroup")


def _snapshot(_facts: Facts) -> Answer:
    if importlib.util.find_spec("pyarrow"):
        return Answer(State.OK, "pyarrow is installed")
    what = "pyarrow is not installed: snapshots and recordings need file names that end with .mthp"
    return Answer(State.LIMITED, what, "pip install 'mthp[snapshot]' for Parquet and Arrow")


_QUESTIONS: tuple[Question, ...] = (
    ("thp", "transparent huge pages", False, _thp),
    ("size_switches", "switches by folio size", True, _size_switches),
    ("sizes", "folio sizes that are on", True, _sizes),
    ("size_stats", "statistics by folio size", True, _size_stats),
    ("madv_collapse", "MADV_COLLAPSE", True, _madv_collapse),
    ("process_madvise", "MADV_COLLAPSE of other processes", True, _process_madvise),
    ("other_processes", "reading other processes", False, _other_processes),
    ("pfns", "page frame numbers", False, _pfns),
    ("kpageflags", "kpageflags", False, _kpageflags),
    ("pagemap_scan", "PAGEMAP_SCAN", False, _pagemap_scan),
    ("khugepaged", "the kernel's khugepaged", True, _khugepaged),
    ("mthp_khugepaged", "the kernel's khugepaged, below the PMD size", True, _mthp_khugepaged),
    ("lasting", "lifetime of folios below the PMD size", True, _lasting),
    ("free_memory", "free memory", False, _free_memory),
    ("memory_limit", "memory cgroup limit", False, _memory_limit),
    ("snapshot", "snapshots", False, _snapshot),
    *HEAT_QUESTIONS,
    *SPLIT_QUESTIONS,
    *MOVE_QUESTIONS,
)
