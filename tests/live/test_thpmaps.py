"""Compare `mthp inspect` and `mthp verify` with the kernel's tools/mm/thpmaps, figure by figure.

MTHP_THPMAPS names the script: tools/mm/thpmaps of a kernel's source, such as Debian's package linux-source.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from e2e.helpers import mthp_json
from mover_targets import READY, program
from targets import PAGE_SIZE, PMD_SIZE
from thp_switches import ThpSwitches

THPMAPS = os.environ.get("MTHP_THPMAPS", "")

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "thp", "4k-pages", "pfns"),
    pytest.mark.skipif(not THPMAPS, reason="MTHP_THPMAPS does not name the script"),
]

SIZES = {4: "64kB", 9: "2048kB"}

TARGET = f"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PMD, PAGE = {PMD_SIZE}, {PAGE_SIZE}
room = libc.mmap(None, 32 * PMD, 0, 0x22, -1, 0)
start = -(-room // PMD) * PMD
assert libc.mmap(start, 4 * PMD, 3, 0x32, -1, 0) == start
libc.madvise(start, 4 * PMD, 14)
ctypes.memset(start, 1, 4 * PMD)
"""

CASES = {
    "as it is": "",
    "moved by 64K": "to = start + 16 * PMD + 16 * PAGE\nassert libc.mremap(start, 4 * PMD, 4 * PMD, 3, to) == to",
    "moved by a page": "to = start + 16 * PMD + PAGE\nassert libc.mremap(start, 4 * PMD, 4 * PMD, 3, to) == to",
    "partly unmapped": "libc.munmap(start + PMD + 7 * PAGE, 100 * PAGE)\nlibc.munmap(start + 3 * PMD, 256 * PAGE)",
    "partly discarded": "libc.madvise(start + PMD + 8 * PAGE, 16 * PAGE, 4)",
    "forked": "if not os.fork(): sys.stdin.read(); os._exit(0)",
    "forked, then written to": (
        "if not os.fork(): sys.stdin.read(); os._exit(0)\nctypes.memset(start + PMD + 5 * PAGE, 2, 40 * PAGE)"
    ),
}


@pytest.fixture
def target(request: pytest.FixtureRequest, thp_switches: ThpSwitches) -> Iterator[int]:
    thp_switches.default()
    with program(f"{TARGET}\n{request.param}\n{READY}") as (pid, _):
        # khugepaged would collapse moved memory between the two counts.
        thp_switches.set("enabled", "never")
        yield pid


def thpmaps(pid: int) -> dict[str, int]:
    """What thpmaps says, in bytes."""
    command = [sys.executable, THPMAPS, "--pid", str(pid), "--rollup", "--inc-empty", "--cont", "64K", "--cont", "2M"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(size) << 10 for key, size in re.findall(r"^(\S+):\s+([0-9]+) kB", said, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES.values(), ids=CASES.keys(), indirect=True)
def test_every_figure_is_that_of_thpmaps(target: int) -> None:
    theirs, census = thpmaps(target), mthp_json("inspect", target)
    ours = census["anonymous"]["pages_by_alignment"]
    for order, kinds in ours.items():
        size = f"{PAGE_SIZE << int(order) >> 10}kB"
        pages = {
            f"anon-thp-pte-aligned-{size}": kinds["aligned"],
            f"anon-thp-pte-unaligned-{size}": kinds["unaligned"],
        }
        pages |= {f"anon-thp-pmd-aligned-{size}": kinds["pmd_mapped"]} if size == "2048kB" else {}
        assert {key: count * PAGE_SIZE for key, count in pages.items()} == {key: theirs[key] for key in pages}
    assert sum(kinds["partial"] for kinds in ours.values()) * PAGE_SIZE == theirs["anon-thp-pte-partial"]
    expectations = [word for order in SIZES for word in ("--expect", f"order={order}>=0%")]
    for size, check in zip(SIZES.values(), mthp_json("verify", target, *expectations)["checks"], strict=True):
        mapped = theirs[f"anon-cont-pmd-aligned-{size}"]
        # A 2M folio that PTEs map has no PMD entry, so it does not count as 2M.
        mapped += theirs[f"anon-cont-pte-aligned-{size}"] if size != "2048kB" else 0
        assert check["share"] * check["resident_bytes"] == pytest.approx(mapped)
