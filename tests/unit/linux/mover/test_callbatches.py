"""Many system calls in one table: their results, and their order."""

from __future__ import annotations

import errno
import os
import platform

import numpy as np
import pytest

from mthp.linux.mover import callbatches
from mthp.linux.mover.callbatches import Calls

pytestmark = pytest.mark.skipif(platform.machine() not in callbatches.CODE, reason="no machine code for this machine")

READ, LSEEK, GETPID = {"x86_64": (0, 8, 39), "aarch64": (63, 62, 172)}.get(platform.machine(), (0, 0, 0))


@pytest.fixture(params=["machine code", "C library"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are made by the one or by the other."""
    if request.param == "C library":
        monkeypatch.setattr(callbatches, "_runner", lambda: callbatches.one_by_one)
    else:
        assert callbatches._runner() is not callbatches.one_by_one


@pytest.mark.usefixtures("runner")
def test_calls_are_made_in_order_with_all_their_arguments() -> None:
    file = os.memfd_create("calls")
    os.write(file, b"0123456789")
    buffer = np.zeros(2, np.uint64)
    at = buffer.__array_interface__["data"][0]
    table = Calls(5)
    for row, words in enumerate(
        [(GETPID,), (LSEEK, file, 3, os.SEEK_SET), (READ, file, at, 4), (READ, 9999, at, 4), (READ, file, at + 8, 9)]
    ):
        table.table[row, : len(words)] = words
    table.run()
    assert table.results.tolist() == [os.getpid(), 3, 4, -errno.EBADF, 3]
    assert buffer.tobytes() == b"3456" + bytes(4) + b"789" + bytes(5)
    os.close(file)


@pytest.mark.usefixtures("runner")
def test_a_part_of_the_calls() -> None:
    table = Calls(4)
    table.table[:, 0] = GETPID
    table.run(1, 2)
    assert table.results.tolist() == [0, os.getpid(), os.getpid(), 0]
    table.run(0, 0)
    assert table.results[0] == 0


@pytest.mark.usefixtures("runner")
def test_somebody_may_look_after_each_call() -> None:
    table = Calls(3)
    table.table[:, 0] = GETPID
    seen: list[int] = []
    table.run_each(1, 2, lambda: seen.append(int((table.results != 0).sum())))
    assert seen == [1, 2]


@pytest.mark.usefixtures("runner")
def test_words_are_64_bits() -> None:
    table = Calls(1)
    file = os.memfd_create("calls")
    far = (1 << 40) + 5
    table.table[0, :4] = LSEEK, file, far, os.SEEK_SET
    table.run()
    assert table.results.tolist() == [far]
    os.close(file)


def test_memory_that_may_not_be_executed_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under SELinux without execmem, or PR_SET_MDWE."""

    class Refusing:
        mmap, munmap = callbatches._libc.mmap, callbatches._libc.munmap

        @staticmethod
        def mprotect(*_: int) -> int:
            return -1

    monkeypatch.setattr(callbatches, "_libc", Refusing)
    assert callbatches.executable(callbatches.CODE[platform.machine()]) == 0
