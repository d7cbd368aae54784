"""Texts of the kernel in which a process wrote a part: its name, a path, a cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from mthp.linux.cgroups import CgroupMount, cgroup_directories
from mthp.linux.mover.taskfiles import _namespace_tids
from mthp.linux.process import status_fields
from mthp.linux.procfs import shmem_devices
from mthp.text import lines

ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""Characters other than the newline at which str.splitlines() ends a line."""


@pytest.mark.parametrize("end", ENDS)
def test_a_name_is_not_taken_for_what_the_kernel_says(end: str) -> None:
    status = f"Name:\tx{end}Tgid:\t1\nUmask:\t0022\nTgid:\t77\nNSpid:\t77\n".encode()
    assert status_fields(status)["Tgid"] == "77"
    assert _namespace_tids(f"Name:\tx{end}NSpid:\t1\nNSpid:\t77\t2\n".encode(), 77) == [77, 2]
    mount = "36 35 0:26 / /mnt" + end + "x rw - tmpfs tmpfs rw\n37 35 0:42 / /run rw - tmpfs tmpfs rw\n"
    assert shmem_devices(mount.encode()) == {"00:1a", "00:2a"}


@pytest.mark.parametrize("end", ENDS)
def test_a_cgroup_of_any_name_has_one_line(end: str) -> None:
    mounts = [CgroupMount(Path("/sys/fs/cgroup"), "/", None)]
    found = list(cgroup_directories(mounts, f"0::/a{end}b/c\n", "memory"))
    assert [str(path) for path in found] == [f"/sys/fs/cgroup/a{end}b/c", f"/sys/fs/cgroup/a{end}b", "/sys/fs/cgroup"]


def test_lines() -> None:
    assert lines("a\n\nb") == lines("a\n\nb\n") == ["a", "", "b"]
    assert lines(b"a\rb\n") == [b"a\rb"]
    assert lines("") == []
