"""kcmp(2): whether two threads share an address space or a table of file descriptors."""

from __future__ import annotations

import ctypes
import errno
import os

KCMP_FILES = 2
KCMP_VM = 1
"""include/uapi/linux/kcmp.h."""

NR_KCMP = {"x86_64": 312, "aarch64": 272}
"""``kcmp`` in each architecture's ``asm/unistd.h``."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 6

_UNEQUAL = 3
"""What is answered for two of which one is gone: the kernel's word for "not equal, in no order"."""


def kcmp(one: int, other: int, kind: int) -> int | None:
    """Compare what `kind` names of two threads.

    Args:
        one, other: TIDs.
        kind: ``KCMP_*``.

    Returns:
        0 if they share it, 1 to 3 if not or if one of them is gone, None if these rights or this kernel do not tell.
    """
    number = NR_KCMP.get(os.uname().machine)
    if number is None:
        return None
    answer: int = _libc.syscall(number, one, other, kind, 0, 0)
    if answer >= 0:
        return answer
    return _UNEQUAL if ctypes.get_errno() == errno.ESRCH else None
