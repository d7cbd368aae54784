"""Python for a guest: the distribution's packages, unpacked into the first file system beside busybox.

The packages are those of the current stable release, if available, for the guest's architecture, without documentation.
Every module is compiled beforehand, because an emulated guest takes minutes for that. The interpreter of the host's
architecture makes the byte code, which is the same for all. The kept archive does not contain mthp and its tests; the
job does.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from vm.apt import Apt, LabError, cache_directory, unpack
from vm.cpio import Archive
from vm.kernels import PLATFORMS, Platform

PACKAGES = (
    "python3", "python3-numpy", "python3-click", "python3-rich", "python3-pytest", "python3-hypothesis",
    "python3-prometheus-client", "python3-textual", "bash", "util-linux",
)  # fmt: skip
SUITES = ("trixie", "unstable")
"""Suites to fetch from: the first with lists for the architecture is used."""

_LEFT_OUT = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "usr/include",
    "usr/share/perl", "usr/lib/*/perl", "usr/lib/*/perl-base", "usr/share/perl5",
    "usr/lib/python3/dist-packages/numpy/*/tests",
    "usr/lib/python3*/test", "usr/lib/python3*/idlelib", "usr/lib/python3*/ensurepip", "usr/share/zoneinfo",
    "usr/share/i18n", "usr/lib/locale", "usr/lib/*/gconv", "usr/share/sphinx*", "usr/share/javascript",
    "usr/lib/python3/dist-packages/pygments/lexers", "usr/lib/*/security", "usr/lib/systemd", "var", "etc/systemd",
    "usr/share/bash-completion", "usr/share/tabset", "usr/share/common-licenses", "usr/share/nodejs", "usr/sbin",
    "usr/lib/apt", "usr/share/keyrings", "usr/bin/perl*", "usr/bin/dpkg*", "usr/bin/apt*",
)  # fmt: skip
"""What no test reads."""

_TOP = Path(__file__).resolve().parents[2]


def world(platform: Platform) -> bytes:
    """Return the archive for a platform, made unless it is here.

    Raises:
        LabError: the packages cannot be had.
    """
    for suite in SUITES:
        file = _directory(platform, suite).with_suffix(".cpio")
        try:
            if not file.exists():
                root = _unpacked(platform, suite)
                _compile(platform, root, suite)
                part = file.with_suffix(".part")
                part.write_bytes(_archived(root))
                part.rename(file)
            return file.read_bytes()
        except LabError as error:
            why = str(error)
    raise LabError(why)


def project() -> dict[str, bytes]:
    """Return the files of mthp and its tests, by their place in the tree."""
    found = {"pyproject.toml": (_TOP / "pyproject.toml").read_bytes()}
    for directory in ("src", "tests"):
        for path in sorted((_TOP / directory).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".gz":
                found[str(path.relative_to(_TOP))] = path.read_bytes()
    return found


def _directory(platform: Platform, suite: str) -> Path:
    key = hashlib.sha256(repr((PACKAGES, _LEFT_OUT)).encode()).hexdigest()[:12]
    return cache_directory() / f"world-{platform.debian}-{suite}-{key}"


def _unpacked(platform: Platform, suite: str) -> Path:
    root = _directory(platform, suite)
    if not (root / ".unpacked").exists():
        unpack(Apt(platform.debian, [suite]).with_dependencies(PACKAGES), root)
        (root / ".unpacked").touch()
    return root


def _compile(platform: Platform, root: Path, suite: str) -> None:
    """Write the byte code beside the modules, with the native world's interpreter."""
    native = next((each for each in PLATFORMS.values() if each.machine == os.uname().machine), platform)
    home = _unpacked(native, suite)
    loader = next(home.glob("usr/lib*/ld-linux*"), None) or next(home.glob("usr/lib/*/ld-linux*"))
    libraries = ":".join(str(path) for path in (home / "usr/lib").glob("*-linux-gnu"))
    interpreter = sorted(home.glob("usr/bin/python3.*[0-9]"))[-1]
    places = [str(path) for path in (root / "usr/lib").glob("python3*")]
    command = [str(loader), "--library-path", libraries, str(interpreter), "-S", "-m", "compileall"]
    # Hashes that Python does not check, because the archive has no modification times.
    command += ["-q", "--invalidation-mode", "unchecked-hash", "-s", str(root), *places]
    environment = {"PYTHONHOME": str(home / "usr"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not list(root.glob("usr/lib/python3*/__pycache__")):
        raise LabError(f"the guest's modules cannot be compiled: {(done.stderr or done.stdout)[-400:]}")


def _archived(root: Path) -> bytes:
    left_out = {path for pattern in _LEFT_OUT for path in root.glob(pattern)}
    archive = Archive()
    # As the distribution has it: these are links into /usr.
    for link in ("bin", "lib", "lib64"):
        archive.link(link, f"usr/{link}")
    # And these are alternatives, which the packages' scripts would have linked.
    for library in (*root.glob("usr/lib/*/blas/*.so.3"), *root.glob("usr/lib/*/lapack/*.so.3")):
        archive.link(str(library.relative_to(root).parents[1] / library.name), f"{library.parent.name}/{library.name}")
    stack = [root / "usr", root / "etc"]
    while stack:
        path = stack.pop()
        if path in left_out:
            continue
        name = str(path.relative_to(root))
        if path.is_symlink():
            archive.link(name, str(path.readlink()))
        elif path.is_dir():
            archive.directory(name)
            stack += sorted(path.iterdir(), reverse=True)
        elif path.is_file() and not path.name.endswith(".a"):
            archive.file(name, path.read_bytes(), path.stat().st_mode & 0o777)
    return archive.packed()
