"""Programs: emulators and compilers, installed where that can be done without asking, and those taken to a guest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vm.apt import LabError


def need(program: str, packages: Sequence[str]) -> None:
    """Require a program: install its `packages` if it is missing, as root on Debian.

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


def programs_with_libraries(names: Sequence[str]) -> dict[str, bytes]:
    """Return programs of this machine for a guest with other libraries: files by path, to run as bin/NAME.

    Raises:
        LabError: a program is missing.
    """
    files: dict[str, bytes] = {}
    for name in names:
        found = shutil.which(name)
        if found is None:
            raise LabError(f"there is no {name} on this machine: install its package")
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
        loader = ""
        for path in re.findall(r"(/\S+) \(0x", listed):
            files[f"lib/{Path(path).name}"] = Path(path).read_bytes()
            loader = Path(path).name if "/ld" in path else loader
        files[f"lib/{name}"] = Path(found).read_bytes()
        start = f'exec "$here/{loader}" --library-path "$here" "$here/{name}" "$@"'
        files[f"bin/{name}"] = f'#!/bin/sh\nhere=$(dirname "$0")/../lib\n{start}\n'.encode()
    return files
