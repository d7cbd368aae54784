"""Memory cgroups for live tests, of the version that this machine has the memory controller in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """One cgroup.

    Attributes:
        directory: where it is.
    """

    directory: Path

    @property
    def _is_v1(self) -> bool:
        return self.directory.is_relative_to(V1)

    def limit(self, size: int) -> None:
        """Let its processes have this many bytes."""
        (self.directory / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).write_text(str(size))

    def forbid_swap(self) -> None:
        """Forbid swapping out memory of its processes, where the file for that exists."""
        file = self.directory / "memory.swap.max"
        if file.exists():
            file.write_text("0")

    @property
    def used(self) -> int:
        """Bytes charged to it."""
        return int((self.directory / ("memory.usage_in_bytes" if self._is_v1 else "memory.current")).read_text())

    def enter(self, pid: int) -> None:
        """Put a process into it."""
        (self.directory / "cgroup.procs").write_text(str(pid))

    def below(self, name: str) -> MemoryCgroup:
        """Return a new cgroup in it; it goes with this one."""
        if not self._is_v1:
            (self.directory / "cgroup.subtree_control").write_text("+memory")
        (self.directory / name).mkdir()
        return MemoryCgroup(self.directory / name)


@contextlib.contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """Return a new cgroup; its processes must have ended when it is taken away. Skip the test where there is none."""
    v1 = (V1 / "memory.limit_in_bytes").exists()
    group = MemoryCgroup((V1 if v1 else V2) / f"mthp-test-{os.getpid()}")
    try:
        group.directory.mkdir()
    except OSError as error:
        pytest.skip(f"needs a memory cgroup: {error}")
    try:
        if not any((group.directory / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            pytest.skip("needs a memory cgroup")
        yield group
    finally:
        for child in group.directory.glob("*/"):
            child.rmdir()
        group.directory.rmdir()
