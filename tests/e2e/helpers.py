"""Run the command line as a process, read facts of a process from the kernel, and start targets that check themselves.

An :class:`Actor` fills pages with a pattern that depends on the address, and reports afterwards how many of them
still hold it, as the target itself sees them. It runs without site-packages, so this module needs the standard
library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from targets import PAGE_SIZE, Puppet
from waiting import PATIENCE

NOBODY = 65534
MTHP = [sys.executable, "-m", "mthp"]
TESTS = str(Path(targets.__file__).parent)

_CPUS = os.cpu_count() or 1
COUNTER_ERROR = max(32, 2 * _CPUS) * _CPUS * PAGE_SIZE
"""How far statm and status may lie from what smaps counts, in bytes: each CPU keeps a part of the sum to itself
(lib/percpu_counter.c)."""

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S{4} ")


def mthp(*arguments: object, program: Sequence[str] = MTHP, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line; a traceback is a failure whatever the arguments."""
    command = [*program, *map(str, arguments)]
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, **(given | options), text=True, check=False, timeout=2 * PATIENCE)
    assert "Traceback" not in (done.stderr or ""), done.stderr
    return done


def mthp_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process.

    Most of the time of a short command is the start of a process. Tests of what a process does as such (its memory, its
    output, its end) take one of its own (:func:`mthp`).
    """
    from mthp.cli import main  # an actor has this module without site-packages

    command = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def mthp_json(*arguments: object, code: int = 0, **options: Any) -> dict[str, Any]:
    """Run the command line with --json, which must exit with `code`, and return its object."""
    return _checked_json(mthp(*arguments, "--json", **options), str(arguments[0]), code)


def mthp_json_here(*arguments: object, code: int = 0) -> dict[str, Any]:
    """Do the same in this process."""
    return _checked_json(mthp_here(*arguments, "--json"), str(arguments[0]), code)


def _checked_json(done: subprocess.CompletedProcess[str], command: str, code: int) -> dict[str, Any]:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    from schemas import check  # an actor has this module without site-packages

    check(command, answer)
    return answer


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, or of a part of it, from smaps."""

    rss: int
    anon_huge: int
    shmem_huge: int
    file_huge: int

    @property
    def huge(self) -> int:
        """Bytes that PMD entries map."""
        return self.anon_huge + self.shmem_huge + self.file_huge


def memory_of(pid: int, start: int = 0, end: int = 1 << 64) -> Memory:
    """What smaps says of the mappings of `pid` that lie between `start` and `end`."""
    sums = dict.fromkeys(("Rss", "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"), 0)
    counts = False
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        if header := _HEADER.match(line):
            counts = start <= int(header[1], 16) and int(header[2], 16) <= end
            continue
        name, _, value = line.partition(":")
        if counts and name in sums:
            sums[name] += int(value.split()[0]) << 10
    return Memory(*sums.values())


class Actor(Puppet):
    """A puppet that can fill pages with a pattern, and look for it.

    Args:
        as_nobody: runs without rights.
    """

    def __init__(self, *, as_nobody: bool = False) -> None:
        code = f"import sys; sys.path.insert(0, {TESTS!r}); from e2e import helpers; "
        code += "helpers.become_nobody(); " if as_nobody else ""
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", f"{code} helpers.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._answer() == "ready"

    def fill(self, address: int, pages: int, step: int = 1) -> None:
        """Write the pattern to `pages` pages, every `step`-th one."""
        self.tell("fill", address, pages, step)

    def damaged(self, address: int, pages: int, step: int = 1) -> int:
        """Return how many of those pages do not hold the pattern."""
        return self.tell("damaged", address, pages, step)

    def unwritten(self, address: int, pages: int) -> int:
        """Return how many of `pages` pages are all zeros."""
        return self.tell("unwritten", address, pages)


def _pattern(address: int) -> bytes:
    return (address ^ 0x5AFE_C0DE_0BAD_F00D).to_bytes(8, "little") * (PAGE_SIZE // 8)


def _fill(address: int, pages: int, step: int) -> int:
    for page in range(address, address + pages * step * PAGE_SIZE, step * PAGE_SIZE):
        ctypes.memmove(page, _pattern(page), PAGE_SIZE)
    return 0


def _damaged(address: int, pages: int, step: int) -> int:
    addresses = range(address, address + pages * step * PAGE_SIZE, step * PAGE_SIZE)
    return sum(ctypes.string_at(page, PAGE_SIZE) != _pattern(page) for page in addresses)


def _unwritten(address: int, pages: int) -> int:
    addresses = range(address, address + pages * PAGE_SIZE, PAGE_SIZE)
    return sum(not any(ctypes.string_at(page, PAGE_SIZE)) for page in addresses)


def serve() -> None:
    """Be an actor."""
    targets._VERBS.update(fill=_fill, damaged=_damaged, unwritten=_unwritten)
    targets._serve()


def become_nobody() -> None:
    """Drop all rights of this process, but let others of the same user read it."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 1, 0, 0, 0)


_AS_NOBODY = f"""
import contextlib, io, sys
sys.path.insert(0, {TESTS!r})
from e2e.helpers import become_nobody
from early_imports import import_all
from mthp.cli import main
import_all()
# Rich loads its tables of cell widths when it prints.
with contextlib.redirect_stdout(io.StringIO()):
    for arguments in (["inspect", "self"], ["plan", "self"], ["collapse", "self", "--dry-run"]):
        main(arguments)
become_nobody()
sys.exit(main(sys.argv[1:]))
"""
MTHP_AS_NOBODY = [sys.executable, "-c", _AS_NOBODY]
"""The command line without rights; it has to be started by root."""


def ancestors() -> list[int]:
    """Return the PIDs of this process's parent, its parent, and so on, as far as they can be seen."""
    found, pid = [], os.getpid()
    while pid := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]):
        found.append(pid)
    return found


def unused_pid() -> int:
    """Return a PID that no process has or gets soon, because the kernel assigns PIDs in order."""
    highest = int(Path("/proc/sys/kernel/pid_max").read_text())
    return next(pid for pid in range(highest - 1, 1, -1) if not os.path.lexists(f"/proc/{pid}"))
