"""Run Linux's own test of khugepaged with mTHP in a guest with `mthp daemon` in khugepaged's place.

``python3 -m vm.selftest MECHANISM ORDER ...`` runs in the guest; the host builds the test's program and sends it.
The test sets khugepaged's rests, which would wake it. So the guest has its own files for them, in place of the
kernel's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from daemons import RunningDaemon
from live import khugepaged_selftest as selftest
from mthp.linux.sysfs import ThpSysfs
from vm.guest import Job, run
from vm.kernels import Kernel
from vm.smoke import silence

SECONDS = 900

_SCRIPT = """mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null
cd /mthp; export PYTHONPATH=/mthp/tests PYTHONUNBUFFERED=1 MTHP_TEST_PATIENCE=20
exec python3 -m vm.selftest {mechanism} {orders}
"""


def in_guest(kernel: Kernel, orders: tuple[int, ...], mechanism: str) -> int | None:
    """Run it on a kernel, print its output, and return its exit code; None if it did not finish.

    Args:
        kernel: which.
        orders: which the test is run for.
        mechanism: of the daemon.

    Raises:
        LabError: the guest does not come up.
        UnobtainableError: the test cannot be had.
    """
    script = _SCRIPT.format(mechanism=mechanism, orders=" ".join(map(str, orders)))
    files = {"khugepaged": selftest.build().read_bytes()}
    job = Job(script, files=files, with_python=True, seconds=SECONDS, memory_mb=2048)
    return run(kernel, job, echo=True).exit_code


def main(mechanism: str, orders: list[str]) -> int:
    """Run the test of each order, without the daemon and with it; 1 unless it passes with it, and only with it."""
    selftest.DIRECTORY.mkdir(parents=True)
    shutil.copy("/job/khugepaged", selftest.BINARY)
    selftest.BINARY.chmod(0o755)
    kept = silence()
    for name in ("scan_sleep_millisecs", "alloc_sleep_millisecs"):
        place = ThpSysfs().root / "khugepaged" / name
        print(f"the kernel's khugepaged: {name} is {place.read_text().strip()}", flush=True)
        other = Path("/run") / name
        other.write_text("10\n")
        subprocess.run(["mount", "--bind", other, place], check=True)
    bad = 0
    for order in orders:
        alone = selftest.run("-c", order, "mthp_khugepaged:anon")
        print(f"order {order} without the daemon:", selftest.told(alone), flush=True)
        bad += "collapse_full" in alone.passed
    with (
        tempfile.TemporaryDirectory() as directory,
        RunningDaemon(Path(directory) / "run", *selftest.daemon_options(mechanism)),
    ):
        for order in orders:
            bad += not selftest.passes(order)
    kept.close()
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
