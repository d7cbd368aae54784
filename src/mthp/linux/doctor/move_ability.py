"""Answer whether the mover works here: the questions of `mthp doctor` about folios below the PMD size."""

from __future__ import annotations

import errno
import os

from mthp.linux.doctor.findings import PTRACE_SCOPE, Answer, Facts, Question, State, refused
from mthp.linux.mover.arch import MACHINES
from mthp.linux.probes import UFFD_FEATURE_MOVE
from mthp.linux.rights import CAP_SYS_PTRACE


def _userfaultfd(facts: Facts) -> Answer:
    error = facts.probed.userfaultfd
    if error is None:
        return Answer(State.LIMITED, f"not tried: unknown system call number on {os.uname().machine}")
    remedy = "Linux 6.8 or later with CONFIG_USERFAULTFD"
    if error in (errno.EPERM, errno.EACCES):
        remedy = "run outside the seccomp filter or security module that forbids it"
    if error:
        return Answer(State.MISSING, refused("userfaultfd", error), remedy)
    if not facts.probed.userfaultfd_features & UFFD_FEATURE_MOVE:
        return Answer(State.MISSING, "userfaultfd is there, without UFFD_FEATURE_MOVE", remedy)
    return Answer(State.OK, "the kernel can move pages (UFFD_FEATURE_MOVE)")


def _ptrace(facts: Facts) -> Answer:
    # Documentation/admin-guide/LSM/Yama.rst; without the module neither the file nor the restriction exists.
    scope = facts.text(PTRACE_SCOPE) or "0"
    yama = f"{facts.proc}/{PTRACE_SCOPE} is {scope}"
    # Not even with CAP_SYS_PTRACE (yama_ptrace_access_check(), security/yama/yama_lsm.c).
    if scope == "3":
        return Answer(State.MISSING, f"{yama}: no process may attach", "boot with a lower kernel.yama.ptrace_scope")
    if facts.rights.has(CAP_SYS_PTRACE):
        return Answer(State.OK, "every process of this user namespace may be attached to")
    remedy = facts.rights.how_to_have(CAP_SYS_PTRACE)
    if scope == "2":
        return Answer(State.MISSING, f"{yama}: it takes CAP_SYS_PTRACE to attach", remedy)
    if scope == "1":
        what = f"{yama}: only its own children may be attached to"
        return Answer(State.LIMITED, what, f"kernel.yama.ptrace_scope=0 for processes of the same user, or {remedy}")
    return Answer(State.LIMITED, "only processes of the same user may be attached to", remedy)


def _machine(facts: Facts) -> Answer:
    machine = os.uname().machine
    if machine in MACHINES:
        return Answer(State.OK, f"there is code for {machine}")
    have = ", ".join(MACHINES)
    return Answer(State.MISSING, f"there is no code for {machine}", f"a machine of {have}")


def _switches(facts: Facts) -> Answer:
    """Answer whether the switch of a size can be on, as a move needs: without the right to set it, it has to be on."""
    directories = facts.thp.size_directories(facts.geometry.page_size)
    smaller = {
        order: path / "enabled"
        for order, path in directories.items()
        if order < facts.geometry.pmd_order and (path / "enabled").exists()
    }
    if not smaller:
        return Answer(State.MISSING, f"folios below {facts.pmd} have no switches", "Linux 6.8 or later")
    # Asked of the kernel, not of the user ID: /sys may be mounted read-only, as in containers.
    if all(os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids) for path in smaller.values()):
        return Answer(State.OK, "may be set, for as long as a batch of folios takes, and are put back")
    on = set(facts.thp.switches(facts.geometry).orders(advised=False)) & set(smaller)
    remedy = f"run as root, or have root enable a size: echo always > {facts.thp.root}/hugepages-<size>kB/enabled"
    if on:
        what = f"may not be set by this process: only {facts.size_list(tuple(sorted(on)))} can be made, which is on"
        return Answer(State.LIMITED, what, remedy)
    return Answer(State.MISSING, "may not be set by this process, and no size is on", remedy)


MOVE_QUESTIONS: tuple[Question, ...] = (
    ("move_machine", "the mover, for folios below the PMD size", False, _machine),
    ("move_userfaultfd", "the mover: moving pages", False, _userfaultfd),
    ("move_ptrace", "the mover: attaching to others", False, _ptrace),
    ("move_switches", "the mover: switches by folio size", True, _switches),
)
