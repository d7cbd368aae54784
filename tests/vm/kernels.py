"""The kernels of the kernel lab: those of the distribution, and an unpacked one.

A kernel is named ``7.3``, ``6.1`` (x86-64), ``7.3-arm64-16k`` or ``7.2-ppc64-64k``, which means the newest available of
that series.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from vm.apt import Apt, LabError, cache_directory, unpack

SERIES = ("6.1", "6.12", "6.18", "7.0", "7.1", "7.2", "7.3")
"""The kernels that the x86-64 matrix runs on."""

OTHERS = ("7.3-arm64-16k", "7.2-ppc64-64k")
"""Kernels of other geometries."""


@dataclass(frozen=True)
class Platform:
    """A kind of machine.

    Attributes:
        name: how it is called in a kernel's name; the geometry's name, where it is not x86-64.
        machine: as ``uname -m`` says.
        debian: Debian's word for the architecture.
        flavour: of the kernel packages.
        qemu: the emulator and the machine it emulates.
        cpu: the processor it emulates.
        console: its serial console.
        emulator: the package of the emulator.
        cross: the packages that compile for it elsewhere.
    """

    name: str
    machine: str
    debian: str
    flavour: str
    qemu: tuple[str, ...]
    cpu: str
    console: str
    emulator: str
    cross: tuple[str, ...]

    @property
    def compiler(self) -> str:
        """Builds the recorder."""
        return f"{self.machine.replace('ppc64le', 'powerpc64le')}-linux-gnu-gcc"

    @property
    def compilers(self) -> tuple[str, ...]:
        """Return the packages with the compiler and the C library, on this machine."""
        return ("gcc", "libc6-dev") if self.machine == os.uname().machine else self.cross


PLATFORMS = {
    platform.name: platform
    for platform in (
        # With AVX emulated by QEMU 7.2, NumPy's sorting crashes.
        Platform(
            "x86-64", "x86_64", "amd64", "cloud-amd64", ("qemu-system-x86_64", "-M", "q35"), "max,avx=off", "ttyS0",
            "qemu-system-x86", ("gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"),
        ),
        # Signing pointers as the architecture says takes an emulator most of its time; this is a way of its own.
        Platform(
            "arm64-16k", "aarch64", "arm64", "arm64-16k", ("qemu-system-aarch64", "-M", "virt"),
            "max,lpa2=off,pauth-impdef=on", "ttyAMA0", "qemu-system-arm",
            ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"),
        ),
        Platform(
            "ppc64-64k", "ppc64le", "ppc64el", "powerpc64le-64k", ("qemu-system-ppc64", "-M", "pseries"), "power9",
            "hvc0", "qemu-system-ppc", ("gcc-powerpc64le-linux-gnu", "libc6-dev-ppc64el-cross"),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel that is unpacked.

    Attributes:
        name: as requested.
        release: of the package, such as ``7.3.4+deb13-cloud-amd64``.
        platform: the machine that it runs on.
        root: where it is unpacked.
    """

    name: str
    release: str
    platform: Platform
    root: Path

    @property
    def version(self) -> str:
        """Return the version alone: ``7.3.4``."""
        match = re.match(r"[\d.]*\d", self.release)
        assert match
        return match[0]

    @property
    def image(self) -> Path:
        """Return the file to boot."""
        places = [*self.root.glob("boot/vmlinu[xz]-*"), *self.root.glob("usr/lib/modules/*/vmlinu[xz]")]
        if not places:
            raise LabError(f"the packages of {self.release} hold no kernel")
        return places[0]

    @property
    def modules(self) -> list[Path]:
        """Return the files of its modules."""
        return [*self.root.glob("usr/lib/modules/**/*.ko*"), *self.root.glob("lib/modules/**/*.ko*")]


def split_name(name: str) -> tuple[str, Platform]:
    """Return the series and the platform in a kernel's name.

    Raises:
        LabError: no such platform.
    """
    series, _, platform = name.partition("-")
    if (platform or "x86-64") not in PLATFORMS or not re.fullmatch(r"\d+\.\d+(\.\d+)?", series):
        raise LabError(f"no kernel is called {name!r}: say {', '.join((*SERIES, *OTHERS))}")
    return series, PLATFORMS[platform or "x86-64"]


def releases(name: str) -> list[str]:
    """Return the releases of a series that the distribution names, newest first.

    Raises:
        LabError: package lists cannot be had.
    """
    series, platform = split_name(name)
    pattern = re.compile(rf"linux-image-({re.escape(series)}([.+-].*)?)-{platform.flavour}")
    names = Apt(platform.debian).names("linux-")
    found = [match[1] + "-" + platform.flavour for name in names if (match := pattern.fullmatch(name))]
    return sorted(found, key=_version_key, reverse=True)


def fetch(name: str) -> Kernel:
    """Return the newest kernel of a series, fetched and unpacked unless it is here.

    Raises:
        LabError: there is none.
    """
    _, platform = split_name(name)
    apt = Apt(platform.debian)
    without_modules: list[tuple[str, list[str]]] = []
    for release in releases(name):
        packages, complete = _packages(apt, release)
        if packages and complete:
            return _unpacked(name, release, apt, packages)
        if packages:
            without_modules.append((release, packages))
    if without_modules:
        release, packages = without_modules[0]
        return _unpacked(name, release, apt, packages)
    raise LabError(f"no kernel {name} is in {', '.join(apt.suites)}")


def _unpacked(name: str, release: str, apt: Apt, packages: list[str]) -> Kernel:
    root = cache_directory() / "kernels" / release
    if not (root / "unpacked").exists():
        unpack(apt.download(packages), root)
        (root / "unpacked").touch()
    return Kernel(name, release, split_name(name)[1], root)


def _packages(apt: Apt, release: str) -> tuple[list[str], bool]:
    """Return the packages that make up a kernel, and whether its modules are among them; none if it cannot be had.

    Until 6.19 it is one package; later ``linux-image`` only asks for ``linux-binary`` and ``linux-modules``, and the
    modules of some are gone from the archive. Such a kernel boots, and has no swap.
    """
    image = f"linux-image-{release}"
    fields = apt.fields(image)
    if fields is None:
        return [], False  # known only because another package refers to it
    wanted = re.findall(rf"linux-(?:binary|modules)-{re.escape(release)}(?![\w.-])", fields.get("Depends", ""))
    named = set(apt.names("linux-"))
    parts = [part for part in wanted if part in named]
    if wanted and f"linux-binary-{release}" not in parts:
        return [], False
    return [image, *parts], parts == wanted


@functools.cache
def _version_key(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("-")[0]))
