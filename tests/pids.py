"""A process with a number of the test's choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from targets import Puppet


def successor_of(pid: int) -> Puppet:
    """A new process with a PID that was just freed."""
    for _ in range(200):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        puppet = Puppet()
        if puppet.pid == pid:
            return puppet
        puppet.__exit__(None, None, None)
    pytest.skip("the PID went to another process each time")
