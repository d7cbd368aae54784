"""The memory behind an object of this process, by any of the protocols that expose it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mthp.errors import UsageError
from mthp.tabular import imported


def memory_of(buffer: Any) -> tuple[int, int]:
    """Return address and size in bytes of the memory behind `buffer`.

    It may be a NumPy array, have the buffer protocol or ``__array_interface__``, be a tensor of DLPack on the CPU, or
    an Arrow array. Of an Arrow array's buffers the largest is used, because the others are validity bits and offsets.

    Raises:
        UsageError: `buffer` is none of these, or not contiguous.
        UnsupportedError: `buffer` is an Arrow array of another library, and pyarrow is missing.
    """
    try:
        array = _array(buffer)
    # TypeError: it has none of the protocols. ValueError: it is closed, or describes itself wrongly. DLPack refuses
    # memory of a GPU and a tensor with gradients with a BufferError, older libraries with a RuntimeError.
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise UsageError(
            f"{type(buffer).__name__} is not a buffer that can be collapsed: {error}",
            help="use a NumPy array, an mmap, a tensor on the CPU, or one chunk of an Arrow column",
        ) from error
    if not array.flags.forc:
        raise UsageError("the array is not contiguous", help="collapse its base array")
    return array.__array_interface__["data"][0], array.nbytes


def _array(buffer: Any) -> Any:
    """Return `buffer` as an array that shares its memory."""
    if isinstance(buffer, np.ndarray):
        return buffer
    ways: list[tuple[str, Callable[[Any], Any]]] = [
        ("__array_interface__", np.asarray),
        ("__dlpack__", np.from_dlpack),
        ("buffers", _of_arrow),
        ("__arrow_c_array__", _of_foreign_arrow),
    ]
    for name, read in ways:
        # pyarrow.Array has __dlpack__, which refuses arrays that may have nulls. Its buffers always work.
        if hasattr(buffer, name) and not (name == "__dlpack__" and hasattr(buffer, "buffers")):
            return read(buffer)
    return np.frombuffer(buffer, np.uint8)


def _of_arrow(array: Any) -> Any:
    buffers = [np.frombuffer(each, np.uint8) for each in array.buffers() if each is not None and each.size]
    if not buffers:
        raise ValueError("it has no memory")
    return max(buffers, key=lambda each: each.nbytes)


def _of_foreign_arrow(array: Any) -> Any:
    return _of_arrow(imported("pyarrow").array(array))
