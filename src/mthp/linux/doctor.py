"""What this kernel and these rights allow, and how to get the rest.

:func:`examine` asks a fixed list of questions and answers each with a :class:`Finding`. An answer comes from a trial
(:mod:`mthp.linux.probes`) or from a file that is there or not; the kernel's release is reported but never compared,
since distributions carry features back and configure them away. Kernel versions stand in remedies only: they say in
which release of kernel.org the thing came. Nothing is changed, and whatever a trial takes it gives back.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from mthp.errors import UsageError
from mthp.geometry import Geometry, format_size
from mthp.linux.freememory import cgroup_limit, parse_buddyinfo, parse_meminfo
from mthp.linux.probes import UFFD_FEATURE_MOVE, Probed, probe
from mthp.linux.rights import CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_PTRACE, Rights
from mthp.linux.sysfs import ThpSysfs
from mthp.results import result_of_madvise

SLOW_SECONDS_PER_GIB = 60
"""A khugepaged that rests longer than this on its way through 1 GiB is called limited."""

_GIB = 1 << 30
_PTRACE_SCOPE = "sys/kernel/yama/ptrace_scope"
_PLANNED = "for the move mechanism (no command uses it yet)"


class State(StrEnum):
    """How it stands with a finding."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question.

    Attributes:
        key: a word for scripts, which stays.
        title: what it is about.
        state: how it stands.
        what: what is the case.
        remedy: what would make it better: a capability, a setting, a kernel, a package; or ``""``.
    """

    key: str
    title: str
    state: State
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found out about a machine and the rights of this process.

    Attributes:
        kernel: its release.
        geometry: of the machine.
        has_thp: whether this kernel has THP at all.
        findings: in the order of a person's interest.
    """

    kernel: str
    geometry: Geometry
    has_thp: bool
    findings: tuple[Finding, ...]


class _Answer(NamedTuple):
    state: State
    what: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the questions are asked of.

    Attributes:
        thp: the THP directory.
        cgroups: where cgroup file systems are mounted.
        proc: where proc is mounted.
        geometry: of the machine.
        probed: outcome of the trials.
        rights: of this process.
    """

    thp: ThpSysfs
    cgroups: Path
    proc: Path
    geometry: Geometry
    probed: Probed
    rights: Rights

    @property
    def pmd(self) -> str:
        """The PMD size, as people write it."""
        return self.geometry.label(self.geometry.pmd_order)

    def text(self, path: str) -> str | None:
        """The text of a file of proc; None if it cannot be read."""
        try:
            return (self.proc / path).read_text(errors="replace").strip()
        except OSError:
            return None

    @property
    def switched_off(self) -> bool:
        """Whether this process, or one that it descends from, switched THP off (THP_enabled, proc_pid_status(5))."""
        return "THP_enabled:\t0" in (self.text("self/status") or "")

    def size_list(self, orders: tuple[int, ...]) -> str:
        """Sizes as people write them."""
        return ", ".join(self.geometry.label(order) for order in orders) or "none"


def examine(
    *,
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    geometry: Geometry | None = None,
    probed: Probed | None = None,
) -> Examination:
    """Find out what this kernel and these rights allow. Takes some milliseconds.

    Args:
        sysfs, proc: where they are mounted; tests give trees of their own.
        geometry: of the machine; found out if not given.
        probed: outcome of the trials; they are made if not given.
    """
    thp = ThpSysfs(sysfs / "kernel/mm/transparent_hugepage", proc / "vmstat")
    geometry = geometry or thp.geometry()
    facts = _Facts(thp, sysfs / "fs/cgroup", proc, geometry, probed or probe(geometry), Rights.read(proc / "self"))
    has_thp = thp.exists
    findings = []
    for key, title, of_thp, ask in _QUESTIONS:
        if of_thp and not has_thp:
            answer = _Answer(State.MISSING, "this kernel has no THP")
        else:
            try:
                answer = ask(facts)
            except UsageError as error:
                # A kernel whose files say something that this version does not know.
                answer = _Answer(State.LIMITED, error.message, "a newer mthp may know it")
        findings.append(Finding(key, title, *answer))
    return Examination(facts.text("sys/kernel/osrelease") or os.uname().release, geometry, has_thp, tuple(findings))


def _thp(facts: _Facts) -> _Answer:
    if not facts.thp.exists:
        return _Answer(
            State.MISSING,
            f"there is no {facts.thp.root}",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE, on a CPU with huge pages",
        )
    word = facts.thp.switches(facts.geometry).enabled
    if facts.switched_off:
        return _Answer(
            State.LIMITED,
            f"there, enabled is {word}, but switched off for this process",
            "start it from a process that has not called prctl(PR_SET_THP_DISABLE), which is inherited",
        )
    if word == "never":
        return _Answer(
            State.LIMITED,
            "there, but enabled is never; MADV_COLLAPSE works nevertheless",
            f"echo madvise > {facts.thp.root}/enabled (as root) lets programs ask for huge pages",
        )
    return _Answer(State.OK, f"there, enabled is {word}")


def _size_switches(facts: _Facts) -> _Answer:
    directories = facts.thp.size_directories(facts.geometry.page_size)
    orders = tuple(order for order, path in directories.items() if (path / "enabled").exists())
    if not orders:
        return _Answer(State.MISSING, f"one switch for all: folios of {facts.pmd}", "Linux 6.8 or later")
    return _Answer(State.OK, facts.size_list(orders))


def _sizes(facts: _Facts) -> _Answer:
    switches = facts.thp.switches(facts.geometry)
    plain, advised = switches.orders(advised=False), switches.orders(advised=True)
    what = f"on for plain memory: {facts.size_list(plain)}; for MADV_HUGEPAGE memory: {facts.size_list(advised)}"
    smaller = [order for order in switches.sizes if order < facts.geometry.pmd_order]
    if any(order in advised for order in smaller):
        return _Answer(State.OK, what)
    if not smaller:
        return _Answer(State.LIMITED, what, "smaller sizes: Linux 6.8 or later")
    # 64K is what most processors gain from, but a machine of large pages may not have it.
    size = facts.geometry.sysfs_name(min(smaller, key=lambda order: abs(facts.geometry.size_of(order) - (64 << 10))))
    return _Answer(State.LIMITED, what, f"smaller sizes: echo madvise > {facts.thp.root}/{size}/enabled (as root)")


def _size_stats(facts: _Facts) -> _Answer:
    counters = facts.thp.stats(facts.geometry)
    if not counters:
        return _Answer(State.MISSING, "no counters by size", "Linux 6.10 or later")
    names = sorted(set().union(*counters.values()))
    return _Answer(State.OK, f"{len(names)} counters for {facts.size_list(tuple(counters))}")


def _madv_collapse(facts: _Facts) -> _Answer:
    known, error = facts.probed.collapse_known, facts.probed.collapse
    if known == errno.EINVAL:
        return _Answer(State.MISSING, "the kernel does not know it", "Linux 6.1 or later")
    if known:
        return _Answer(State.MISSING, _refused("madvise", known), "run outside the seccomp filter that forbids it")
    if error is None:
        return _Answer(State.OK, f"the kernel knows it; not tried, since a folio has {facts.pmd}")
    if not error:
        return _Answer(State.OK, f"collapsed {facts.pmd} of memory of its own, for trial")
    remedies = {
        errno.ENOMEM: f"free memory in blocks of {facts.pmd}: see free_memory",
        errno.EBUSY: "room in the memory cgroup: see memory_limit",
        errno.EAGAIN: "try again",
    }
    if facts.switched_off:
        remedies[errno.EINVAL] = "a process without prctl(PR_SET_THP_DISABLE): see thp"
    what = f"the kernel knows it, but on memory of its own it failed: {_name(error)}"
    return _Answer(State.LIMITED, f"{what}, {result_of_madvise(error).meaning}", remedies.get(error, ""))


def _process_madvise(facts: _Facts) -> _Answer:
    error = facts.probed.process_madvise
    if error is None:
        return _Answer(State.LIMITED, "not tried: no child process could be started")
    if not error:
        return _Answer(State.OK, "works on a child process; others: those whose memory may be looked at")
    remedies = {
        errno.EPERM: facts.rights.how_to_have(CAP_SYS_NICE),
        errno.EACCES: facts.rights.how_to_have(CAP_SYS_PTRACE),
        errno.EINVAL: "Linux 6.1 or later, which takes MADV_COLLAPSE there",
        errno.ENOSYS: "Linux 6.1 or later",
    }
    what = f"{_refused('process_madvise', error)}; this process can collapse its own memory only"
    return _Answer(State.MISSING, what, remedies.get(error, ""))


def _other_processes(facts: _Facts) -> _Answer:
    # Looking takes PTRACE_MODE_READ; Yama restricts PTRACE_MODE_ATTACH alone (yama_ptrace_access_check).
    if facts.rights.has(CAP_SYS_PTRACE):
        return _Answer(State.OK, "the memory of every process of this user namespace may be looked at")
    what = f"only processes of user {facts.rights.fsuid} that have no more capabilities than this one"
    if (scope := facts.text(_PTRACE_SCOPE)) is not None:
        what += f"; Yama's ptrace_scope, which is {scope}, does not matter to this"
    return _Answer(State.LIMITED, what, facts.rights.how_to_have(CAP_SYS_PTRACE))


def _pfns(facts: _Facts) -> _Answer:
    if facts.probed.pfns:
        return _Answer(State.OK, "pagemap shows them")
    what = f"pagemap hides them; folios below {facts.pmd} and lazily freed pages cannot be told from others"
    return _Answer(State.MISSING, what, facts.rights.how_to_have(CAP_SYS_ADMIN))


def _kpageflags(facts: _Facts) -> _Answer:
    path = facts.proc / "kpageflags"
    try:
        with path.open("rb", buffering=0) as file:
            file.read(8)
    except FileNotFoundError:
        return _Answer(State.MISSING, f"there is no {path}", "a kernel with CONFIG_PROC_PAGE_MONITOR")
    except OSError as error:
        return _Answer(
            State.MISSING, f"{path}: {error.strerror}", "run as root of the first user namespace, whose file it is"
        )
    return _Answer(State.OK, "readable; it tells the folio orders, where page frame numbers are seen")


def _pagemap_scan(facts: _Facts) -> _Answer:
    if facts.probed.pagemap_scan:
        return _Answer(State.OK, "works; it tells what is mapped by PMD entries, and the zero page")
    what = "not there; where PMD entries map is told from smaps, and the zero page from page frame numbers alone"
    return _Answer(State.MISSING, what, "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR")


def _mthp_khugepaged(facts: _Facts) -> _Answer:
    stats = facts.thp.stats(facts.geometry)
    if any("collapse_alloc" in names for order, names in stats.items() if order < facts.geometry.pmd_order):
        return _Answer(State.OK, "collapses to sizes below the PMD size too, and counts by size")
    return _Answer(State.MISSING, f"collapses to {facts.pmd} only", "Linux 7.2 or later")


def _khugepaged(facts: _Facts) -> _Answer:
    if not (facts.thp.root / "khugepaged").is_dir():
        return _Answer(State.MISSING, f"there is no {facts.thp.root}/khugepaged")
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
        return _Answer(
            State.LIMITED, f"stands still, since no folio size is on; {what}", "a size that is on: see sizes"
        )
    folder = f"{facts.thp.root}/khugepaged"
    if passes * rest > SLOW_SECONDS_PER_GIB:
        remedy = f"more in {folder}/pages_to_scan or less in scan_sleep_millisecs; `mthp collapse` does not wait for it"
        return _Answer(State.LIMITED, what, remedy)
    return _Answer(State.OK, what)


def _free_memory(facts: _Facts) -> _Answer:
    geometry = facts.geometry
    available = parse_meminfo(facts.text("meminfo") or "", "MemAvailable")
    memory = "" if available is None else f"; {format_size(available)} are available in all"
    nodes = parse_buddyinfo(facts.text("buddyinfo") or "")
    if not nodes:
        return _Answer(State.LIMITED, f"{facts.proc}/buddyinfo tells nothing{memory}")
    parts = []
    for node in nodes:
        free, folios = node.pages * geometry.page_size, node.folios(geometry.pmd_order)
        parts.append(f"node {node.node}: {folios} folios of {facts.pmd} at once, of {format_size(free)} free")
    what = ", ".join(parts) + memory
    if any(node.folios(geometry.pmd_order) for node in nodes):
        return _Answer(State.OK, what)
    remedy = f"echo 1 > {facts.proc}/sys/vm/compact_memory (as root) compacts memory, or smaller folios"
    return _Answer(State.LIMITED, what, remedy)


def _memory_limit(facts: _Facts) -> _Answer:
    limit = cgroup_limit(facts.cgroups, facts.text("self/cgroup") or "")
    if limit is None:
        return _Answer(State.OK, "none for this process; a collapse is charged to the target's cgroup")
    what = f"{format_size(limit.used)} of {format_size(limit.limit)} are used in {limit.path}"
    return _Answer(State.LIMITED, what, "a higher limit there; a collapse is charged to the target's cgroup")


def _snapshot(_facts: _Facts) -> _Answer:
    if importlib.util.find_spec("pyarrow"):
        return _Answer(State.OK, "pyarrow is installed")
    return _Answer(State.MISSING, "pyarrow is not installed", "pip install 'mthp[snapshot]'")


def _move_userfaultfd(facts: _Facts) -> _Answer:
    error = facts.probed.userfaultfd
    if error is None:
        return _Answer(State.LIMITED, f"not tried: unknown system call number on {os.uname().machine}")
    remedy = "Linux 6.8 or later with CONFIG_USERFAULTFD"
    if error in (errno.EPERM, errno.EACCES):
        remedy = "run outside the seccomp filter or security module that forbids it"
    if error:
        return _Answer(State.MISSING, _refused("userfaultfd", error), remedy)
    if not facts.probed.userfaultfd_features & UFFD_FEATURE_MOVE:
        return _Answer(State.MISSING, "userfaultfd is there, without UFFD_FEATURE_MOVE", remedy)
    return _Answer(State.OK, "the kernel can move pages (UFFD_FEATURE_MOVE)")


def _move_ptrace(facts: _Facts) -> _Answer:
    # Documentation/admin-guide/LSM/Yama.rst; without the module there is no such file, and no such restriction.
    scope = facts.text(_PTRACE_SCOPE) or "0"
    yama = f"{facts.proc}/{_PTRACE_SCOPE} is {scope}"
    if scope == "3":
        return _Answer(State.MISSING, f"{yama}: nobody may attach", "boot with a lower kernel.yama.ptrace_scope")
    if facts.rights.has(CAP_SYS_PTRACE):
        return _Answer(State.OK, "every process of this user namespace may be attached to")
    remedy = facts.rights.how_to_have(CAP_SYS_PTRACE)
    if scope == "2":
        return _Answer(State.MISSING, f"{yama}: it takes CAP_SYS_PTRACE to attach", remedy)
    if scope == "1":
        what = f"{yama}: only its own children may be attached to"
        return _Answer(State.LIMITED, what, f"kernel.yama.ptrace_scope=0 for processes of the same user, or {remedy}")
    return _Answer(State.LIMITED, "only processes of the same user may be attached to", remedy)


def _name(error: int) -> str:
    return errno.errorcode.get(error, f"errno {error}")


def _refused(call: str, error: int) -> str:
    return f"{call} fails with {_name(error)} ({os.strerror(error)})"


_QUESTIONS: tuple[tuple[str, str, bool, Callable[[_Facts], _Answer]], ...] = (
    ("thp", "transparent huge pages", False, _thp),
    ("size_switches", "switches by folio size", True, _size_switches),
    ("sizes", "folio sizes that are on", True, _sizes),
    ("size_stats", "statistics by folio size", True, _size_stats),
    ("madv_collapse", "MADV_COLLAPSE", True, _madv_collapse),
    ("process_madvise", "MADV_COLLAPSE of other processes", True, _process_madvise),
    ("other_processes", "looking at other processes", False, _other_processes),
    ("pfns", "page frame numbers", False, _pfns),
    ("kpageflags", "kpageflags", False, _kpageflags),
    ("pagemap_scan", "PAGEMAP_SCAN", False, _pagemap_scan),
    ("khugepaged", "the kernel's khugepaged", True, _khugepaged),
    ("mthp_khugepaged", "the kernel's khugepaged, below the PMD size", True, _mthp_khugepaged),
    ("free_memory", "free memory", False, _free_memory),
    ("memory_limit", "memory cgroup limit", False, _memory_limit),
    ("snapshot", "snapshots", False, _snapshot),
    ("move_userfaultfd", f"moving pages, {_PLANNED}", False, _move_userfaultfd),
    ("move_ptrace", f"attaching, {_PLANNED}", False, _move_ptrace),
)
"""Key, title, whether it is about a part of THP, and the function that answers."""
