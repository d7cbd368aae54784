"""Refuse processes with open files of drivers that may hold pages, or use memory while the process is stopped.

A driver can pin pages, which the kernel shows when they are to be moved. But it can also keep a second page table that
points to them (a virtual machine), let a kernel thread write to the process's memory (vhost), let another process map
it (XPMEM), or let a device use the process's own page table (shared virtual addressing). None of that is visible page
by page: only the open file shows it.

As with flags of mappings, a list names the allowed devices: a character device outside the list is refused. Block
devices and files of file systems pin the pages that they transfer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from mthp.errors import MthpError, NotPermittedError
from mthp.linux.process import Process
from mthp.movechecks import Refusal

_HOLDERS = {
    "kvm": (("/dev/kvm", "anon_inode:kvm-"), "a virtual machine's second page table points to its pages"),
    "hypervisor": (("/dev/mshv", "/dev/acrn", "/dev/gunyah", "/dev/xen/"), "a virtual machine uses its pages"),
    "vhost": (("/dev/vhost-",), "a thread of the kernel's writes to its memory (vhost)"),
    "vfio": (("/dev/vfio/", "/dev/iommu", "anon_inode:[vfio"), "a device writes to its pages (VFIO)"),
    "infiniband": (("/dev/infiniband/", "anon_inode:[infiniband"), "a network adapter writes to its pages (RDMA)"),
    "nvidia": (("/dev/nvidia",), "a GPU may write to its pages"),
    "dri": (("/dev/dri/", "/dev/kfd", "/dev/accel/"), "a GPU may write to its pages"),
    "video": (("/dev/video", "/dev/media", "/dev/dma_heap/"), "a video device may write to its pages"),
    "sva": (("/dev/dsa/", "/dev/iax/", "/dev/hisi_"), "a device uses its page table (shared virtual addressing)"),
    "xpmem": (("/dev/xpmem",), "other processes may have mapped its memory (XPMEM)"),
}
"""By key: prefixes of links in ``/proc/PID/fd``, and the effect of holding such a file."""

_KMEM = ((1, 1), (1, 2), (1, 4))
"""``mem``, ``kmem`` and ``port``: the devices of major number 1 that are not as harmless as ``null`` and ``random``."""

_HARMLESS_MAJORS = frozenset({1, 4, 5, 13, *range(136, 144)})
"""Memory devices (null, zero, random), terminals, input (Documentation/admin-guide/devices.txt)."""

_HARMLESS_NAMES = (
    *("autofs", "btrfs-control", "bus/usb/", "cpu_dma_latency", "cuse", "fb", "fuse", "gpiochip", "hidraw", "hpet"),
    *("hvc", "hwrng", "i2c-", "ipmi", "loop-control", "mapper/control", "mei", "net/", "nvme", "ppp", "pps", "ptp"),
    *("rfkill", "rtc", "snd/", "tpm", "ttyA", "ttyS", "ttyU", "uhid", "uinput", "userfaultfd", "vcs", "vga_arbiter"),
    *("vport", "vsock", "watchdog"),
)
"""Prefixes of names below ``/dev`` of further harmless devices, many of which have dynamic numbers. All of these copy
the memory that they read and write, or pin it while they transfer it."""


def open_files(process: Process, directory: str) -> list[tuple[str, int]]:
    """Return link and number of the character device, or 0, of each descriptor in ``/proc/PID/<directory>``."""
    files = []
    try:
        handle = process.open(directory)
    except NotPermittedError:
        raise
    except MthpError:
        # The thread has exited.
        process.check_alive()
        return []
    try:
        with os.scandir(handle) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            try:
                link = os.readlink(name, dir_fd=handle)
                # Only paths can be devices: `socket:[1]` and `anon_inode:...` have no number worth a system call.
                files.append((link, _device(name, handle) if link.startswith("/") else 0))
            except FileNotFoundError:
                continue
    except OSError as error:
        process.fail(error, f"/proc/{process.pid}/{directory}")
    finally:
        os.close(handle)
    return files


def _device(name: str, directory: int) -> int:
    """Return the number of the character device that a descriptor refers to, 0 for other files."""
    status = os.stat(name, dir_fd=directory)
    return status.st_rdev if stat.S_ISCHR(status.st_mode) else 0


def refuse_files(files: Iterable[tuple[str, int]]) -> list[Refusal]:
    """Return the refusals of a process that has `files`, as :func:`open_files` returns them, open."""
    refused: dict[str, Refusal] = {}
    for link, device in dict.fromkeys(files):
        key = device_of(link)
        if key is not None:
            prefixes, meaning = _HOLDERS[key]
            refused.setdefault(key, Refusal(f"device_{key}", f"it has a file of {prefixes[0]} open: {meaning}"))
        # A list of what is allowed, as for flags of mappings: an unknown driver may keep references that nothing shows.
        elif device and not is_harmless(link, device):
            refused.setdefault(
                "unknown",
                Refusal(
                    "device_unknown",
                    f"it has {link} open, a device that may hold memory: the mover does not know it"
                    f" ({os.major(device)}:{os.minor(device)})",
                    "close it",
                ),
            )
    return list(refused.values())


def device_of(link: str) -> str | None:
    """Return the key of the memory-holding device that a link of ``/proc/PID/fd`` leads to; None for others."""
    return next((key for key, (prefixes, _) in _HOLDERS.items() if link.startswith(prefixes)), None)


def is_harmless(link: str, device: int) -> bool:
    """Return whether a character device is known not to hold memory.

    Args:
        link: its path, as ``/proc/PID/fd`` has it.
    """
    major, minor = os.major(device), os.minor(device)
    if major in _HARMLESS_MAJORS:
        return (major, minor) not in _KMEM
    return link.rpartition("/dev/")[2].startswith(_HARMLESS_NAMES)
