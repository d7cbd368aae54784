"""The kernel lab's matrix: results of a guest count, also if it dies, and a fresh one runs the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vm.apt import LabError
from vm.guest import Job, Outcome, boots_in_kvm
from vm.kernels import PLATFORMS, Kernel
from vm.matrix import LOST, Row, examine, saved, table
from vm.smoke import COMMANDS
from vm.tools import need

KERNEL = Kernel("7.3", "7.3.4+made-up", PLATFORMS["x86-64"], Path("/nonexistent"))
FILES = ["test_a.py", "test_b.py"]
TESTS = [f"tests/live/{file}::test_{name}" for file in FILES for name in ("one", "two")]


class Guests:
    """Guests that are ended after a number of lines; they run the tests that are not done, in order.

    Args:
        lines: the number of lines that each prints.
    """

    def __init__(self, *lines: int) -> None:
        self._lines = list(lines)
        self.done: list[list[str]] = []

    def __call__(self, _kernel: Kernel, job: Job, *, echo: bool, listen: Callable[[str], None]) -> Outcome:
        assert not echo
        done = job.files["done"].decode().split()
        self.done.append(done)
        says: list[dict[str, Any]] = []
        if "vm.smoke" in job.script:
            says += [{"command": name, "said": "ok"} for name in COMMANDS]
        for name in TESTS:
            if name not in done:
                says += [{"test": name}, {"test": name, "outcome": "passed", "seconds": 1.0, "why": ""}]
        told = self._lines.pop(0)
        for what in says[:told]:
            listen(json.dumps(what))
        return Outcome(0 if told >= len(says) else None, "the last words", {}, 10.0, told < len(says))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def outcomes(row: Row) -> list[str]:
    return [row.tests[name].outcome for name in TESTS if name in row.tests]


def test_all_in_one_guest() -> None:
    guests = Guests(99)
    row = examine(KERNEL, FILES, boot=guests)
    assert outcomes(row) == ["passed"] * 4
    assert row.smoke == dict.fromkeys(COMMANDS, "ok")
    assert row.failures == []
    assert guests.done == [[]]
    assert saved("7.3") is None


def test_a_lost_guest_costs_the_test_it_was_at() -> None:
    # All commands, the first test, and the beginning of the second.
    guests = Guests(len(COMMANDS) + 3, 99)
    row = examine(KERNEL, FILES, keep=True, boot=guests)
    assert outcomes(row) == ["passed", "failed", "passed", "passed"]
    assert row.tests[TESTS[1]].why.startswith(LOST)
    assert "the last words" in row.tests[TESTS[1]].why
    assert guests.done == [[], TESTS[:2]]
    assert row.seconds == 20
    assert saved("7.3") == row
    text = table([row])
    assert "1 ok, 1 FAILED" in text
    assert "3 ok, 1 FAILED" in text


def test_a_guest_that_is_lost_between_tests_costs_none() -> None:
    guests = Guests(len(COMMANDS) + 4, 99)
    assert outcomes(examine(KERNEL, FILES, boot=guests)) == ["passed"] * 4
    assert guests.done == [[], TESTS[:2]]


def test_commands_that_were_not_come_to_have_failed() -> None:
    guests = Guests(2, 99)
    row = examine(KERNEL, FILES, boot=guests)
    assert outcomes(row) == ["passed"] * 4
    first, second, *others = row.smoke.values()
    assert (first, second) == ("ok", "ok")
    assert all(LOST in said for said in others)
    assert len(row.failures) == len(others) > 0


def test_guests_that_get_nowhere_come_to_an_end() -> None:
    guests = Guests(0, 0, 0, 0)
    row = examine(KERNEL, FILES, smoke=False, boot=guests)
    assert len(guests.done) == 1
    assert row.failures == ["nothing came of it:\nthe last words"]


def test_what_is_known_is_not_run_again() -> None:
    guests = Guests(99, 99)
    row = examine(KERNEL, FILES, boot=guests)
    examine(KERNEL, FILES, row=row, smoke=False, boot=guests)
    assert guests.done[1] == TESTS


def test_a_probe_of_kvm_is_made_once_and_believed() -> None:
    boots: list[Job] = []

    def run(_kernel: Kernel, job: Job) -> Outcome:
        boots.append(job)
        return Outcome(None, "KVM internal error", {}, 20.0, True)

    assert [boots_in_kvm(KERNEL, run) for _ in range(2)] == [False, False]
    assert len(boots) == 1
    assert boots[0].accelerator == "kvm"
    assert boots[0].seconds <= 30


def test_a_program_that_lacks_is_asked_for_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    need("sh", ["dash"])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LabError, match="apt-get install -y --no-install-recommends qemu-system-x86"):
        need("no-such-program", ["qemu-system-x86"])
