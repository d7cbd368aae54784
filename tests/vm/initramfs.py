"""The first file system of a guest: busybox, the modules it needs, the recorder, and an init that runs one job.

The job, which changes from boot to boot, is an archive of its own after the rest: a shell script and its files. The
job's output goes to the console. Files in ``/out`` go to the host as a tar stream through a virtio port,
and so does its exit code; then the guest switches itself off.
"""

from __future__ import annotations

import lzma
import re
import subprocess
from pathlib import Path

from mover_targets import SOURCES, compilation
from vm.apt import Apt, LabError, cache_directory, unpack
from vm.cpio import Archive
from vm.kernels import Kernel, Platform
from vm.tools import need

MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "brd")
"""Modules to load if they are not built in."""

SWAP_KB = 256 << 10
"""Size of the swap space: a RAM disk, which swaps at once ("synchronous") as zram does."""

FILES_PORT, CHANNEL_PORT = "mthp.files", "mthp.channel"

_HERE = Path(__file__).parent

_INIT = """#!/busybox/busybox sh
/busybox/busybox --install -s /busybox
export PATH=/usr/bin:/busybox HOME=/root
[ -e /bin ] || ln -s busybox /bin
mkdir -p /proc /sys /dev /tmp /out /root /run /var/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs out /out
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd
mount -t tracefs trace /sys/kernel/tracing
mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
for module in $(cat /modules/order); do
  case $module in
    brd.ko) insmod /modules/$module rd_nr=1 rd_size=@SWAP_KB@ ;;
    *) insmod /modules/$module ;;
  esac
done
port() { for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = $1 ] && echo /dev/${p##*/}; done; }
i=0; while [ -z "$(port @FILES@)" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
[ -b /dev/ram0 ] && mkswap /dev/ram0 >/dev/null && swapon /dev/ram0
ip link set lo up 2>/dev/null
export CHANNEL=$(port @CHANNEL@)
cd /job && sh ./run
echo $? >/out/.exit-code
tar -c -C /out -f $(port @FILES@) .
poweroff -f
"""


def build(kernel: Kernel) -> bytes:
    """Return the archive for a kernel, without a job. It is kept, and made again when something it is made of changed.

    Raises:
        LabError: busybox cannot be had, or the recorder cannot be compiled.
    """
    recorder = compiled_recorder(kernel.platform)
    archive = Archive()
    archive.file("busybox/busybox", _busybox(kernel.platform).read_bytes(), 0o755)
    archive.file("busybox/recorder", recorder.read_bytes(), 0o755)
    words = {"SWAP_KB": str(SWAP_KB), "FILES": FILES_PORT, "CHANNEL": CHANNEL_PORT}
    archive.file("init", re.sub(r"@(\w+)@", lambda match: words[match[1]], _INIT).encode(), 0o755)
    for directory in ("dev", "proc", "sys", "job"):
        archive.directory(directory)
    modules = _modules(kernel)
    for name, data in modules:
        archive.file(f"modules/{name}", data)
    archive.file("modules/order", "\n".join(name for name, _ in modules).encode())
    return archive.packed()


def job_archive(script: str, files: dict[str, bytes] | None = None) -> bytes:
    """Return an archive with a job: the shell script ``/job/run``, and other files by their paths."""
    archive = Archive()
    for name, data in (files or {}).items():
        archive.file(name, data, 0o755)
    archive.file("job/run", script.encode(), 0o755)
    return archive.packed()


def compiled_recorder(platform: Platform) -> Path:
    """Return the recorder for a platform, compiled unless it is newer than its source.

    Raises:
        LabError: the compiler is missing, or it fails.
    """
    source = _HERE / "recorder.c"
    binary = cache_directory() / f"recorder-{platform.machine}"
    command = [platform.compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(binary), str(source)]
    if why := _compiled(platform, command, source, binary):
        raise LabError(f"the recorder does not compile: {why}")
    return binary


def compiled_targets(platform: Platform) -> dict[str, bytes]:
    """Return the programs of the live tests for a platform, by name, because guests have no compiler.

    Those that are written for another processor are left out.

    Raises:
        LabError: the compiler is missing.
    """
    found = {}
    for source in SOURCES.glob("*.c"):
        name = source.stem + ("" if "int main(" in source.read_text() else ".so")
        binary = cache_directory() / f"programs-{platform.machine}" / name
        if not _compiled(platform, compilation(platform.compiler, name, binary), source, binary):
            found[name] = binary.read_bytes()
    return found


def _compiled(platform: Platform, command: list[str], source: Path, binary: Path) -> str:
    """Compile a program unless it is here and newer than its source; why it cannot be, or nothing."""
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return ""
    need(platform.compiler, platform.compilers)
    binary.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr[-800:] or "no reason given") if done.returncode else ""


def _busybox(platform: Platform) -> Path:
    root = cache_directory() / f"busybox-{platform.debian}"
    if not (root / "usr/bin/busybox").exists():
        unpack(Apt(platform.debian).download(["busybox-static"]), root)
    return root / "usr/bin/busybox"


def _modules(kernel: Kernel) -> list[tuple[str, bytes]]:
    """Return name and contents of the modules to load, each after those that it depends on."""
    files = {_module_name(path): path for path in kernel.modules}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or f"{name}.ko" in ordered:
            return  # built in, or there
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        if match := re.search(rb"\0depends=([^\0]*)\0", data):
            for needed in match[1].decode().split(","):
                add(needed.replace("-", "_"))
        ordered[f"{name}.ko"] = data

    for name in MODULES:
        add(name)
    return list(ordered.items())


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")
