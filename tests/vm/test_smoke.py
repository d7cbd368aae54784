"""The newest available kernel boots, mthp's commands run there, new cases of it replay, and folios are split.

The guest that splits folios runs beside the others, because most machines that run tests have debugfs closed, and
emulated tests take minutes. It takes QEMU, a compiler, and packages of the distribution; where one is missing, it says
so and is skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from mthp.sim.golden.conformance import replay_case
from vm.apt import LabError, UnreachableError
from vm.cases import random_specs
from vm.initramfs import build
from vm.kernels import Kernel, fetch
from vm.matrix import Row, examine
from vm.recorder import RefusedError, recorder
from vm.smoke import COMMANDS
from vm.world import world

NEWEST = ("7.3", "7.2")
CASES = 12

SPLIT_TESTS = ["test_split.py", "test_split_faults.py"]
SHORT = {"MTHP_TEST_LAYOUTS": "20", "MTHP_TEST_CHURN_SECONDS": "1"}
"""Environment of the tests of splits, which are short here."""

SECONDS = 900
"""Each guest's limit. On a calm machine the first takes half a minute, the second a few seconds."""

pytestmark = [pytest.mark.vm, pytest.mark.slow]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Return the newest kernel, with everything for a guest of it fetched and built."""
    for tool in ("qemu-system-x86_64", "x86_64-linux-gnu-gcc", "apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    why = ""
    for name in NEWEST:
        try:
            kernel = fetch(name)
            build(kernel)
            world(kernel.platform)
            return kernel
        except LabError as error:
            why = str(error)
            if isinstance(error, UnreachableError):
                break
    pytest.skip(f"needs packages of the distribution's archive: {why}")


@pytest.fixture(scope="module")
def splitting(kernel: Kernel) -> Iterator[Future[Row]]:
    """Start the tests of splits beside the other guests, and return their future result."""
    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor(1) as thread:
        for name, value in SHORT.items():
            environment.setenv(name, value)
        yield thread.submit(examine, kernel, SPLIT_TESTS, smoke=False, seconds=SECONDS)


def test_every_command_does_its_work_there(kernel: Kernel) -> None:
    row = examine(kernel, [], seconds=SECONDS)
    assert row.smoke, row.console
    assert row.failures == []
    assert row.smoke.keys() == COMMANDS.keys()


def test_what_it_does_is_what_the_simulated_machine_does(kernel: Kernel) -> None:
    with recorder(kernel, SECONDS) as guest:
        specs = random_specs(guest.geometry, seed=73, mthp=True)
        recorded = 0
        while recorded < CASES:
            try:
                case = guest.record(next(specs), f"smoke-{recorded}")
            except RefusedError:
                continue
            recorded += 1
            assert case["data_intact"]
            assert replay_case(case).mismatches == (), case["before"]


def test_folios_are_split_there(splitting: Future[Row]) -> None:
    row = splitting.result()
    assert row.failures == []
    passed = {name.partition("::")[0] for name, test in row.tests.items() if test.outcome == "passed"}
    assert {f"tests/live/{name}" for name in SPLIT_TESTS} <= passed, row.console
