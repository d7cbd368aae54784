"""The programs that the lab runs: emulators and compilers, installed where that can be done without asking."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from vm.apt import LabError


def need(program: str, packages: Sequence[str]) -> None:
    """Have a program: it is there, or its `packages` are installed, where that is Debian and we are root.

    Raises:
        LabError: it is not there and cannot be installed; the text says what would do it.
    """
    if shutil.which(program):
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(f"no {program}: {' '.join(command)}  (done for you when you are root)")
    print(f"no {program}: {' '.join(command)}", file=sys.stderr, flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # Lists that cannot be had again may still do.
    subprocess.run(["apt-get", "update", "-qq"], env=environment, capture_output=True, check=False)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not shutil.which(program):
        raise LabError(f"no {program}, and `{' '.join(command)}` fails: {done.stderr.strip()[-400:]}")
