"""Words from many places of another process's memory in one system call: process_vm_readv(2)."""

from __future__ import annotations

import ctypes
import os

import numpy as np
from numpy.typing import NDArray

from mthp.linux.abi import IoVec

_MOST = os.sysconf("SC_IOV_MAX")
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)


def read_words(pid: int, addresses: NDArray[np.uint64]) -> NDArray[np.uint64] | None:
    """The 64-bit words at `addresses` in the memory of `pid`: uint64, shape (addresses,).

    Returns:
        None if one of them is not there, or if the call is not to be had.
    """
    words = np.empty(len(addresses), np.uint64)
    here = IoVec()
    # struct iovec for each address.
    there = np.empty((len(addresses), 2), np.uint64)
    there[:, 0], there[:, 1] = addresses, words.itemsize
    for at in range(0, len(addresses), _MOST):
        part, theirs = words[at : at + _MOST], there[at : at + _MOST]
        here.iov_base, here.iov_len = part.__array_interface__["data"][0], part.nbytes
        done = _libc.process_vm_readv(
            pid, ctypes.addressof(here), 1, theirs.__array_interface__["data"][0], len(theirs), 0
        )
        if done != part.nbytes:
            return None
    return words
