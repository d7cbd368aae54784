"""State of a thread that runs the boot code, before its first instruction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mthp.linux.mover import ptrace
from mthp.linux.mover.arch import MACHINES, by_name
from mthp.linux.mover.boot import CALLS, BootedThread

SLOT = 0x7F00_0000_0000


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("made", [0, 1, CALLS - 1, CALLS, None])
def test_a_thread_that_has_not_begun_has_made_no_calls(
    name: str, made: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = by_name(name)
    booted: Any = object.__new__(BootedThread)
    booted.tracee, booted._machine, booted._slot = SimpleNamespace(tid=1), machine, SLOT
    registers = np.zeros((1, machine.words), np.uint64)
    registers[0, machine.pc] = SLOT + machine.boot_begin
    own = SLOT + (1 << 30)
    registers[0, machine.boot_row] = own if made is None else SLOT + machine.boot_rows + 56 * made
    monkeypatch.setattr(ptrace, "get_registers", lambda _tid, _words: registers)
    assert booted.has_made_calls is (made in (CALLS - 1, CALLS))
