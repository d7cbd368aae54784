"""The attempts of a walk, as a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.ptes import ColumnTable
from mthp.results import ScanResult


@dataclass(frozen=True)
class Attempts(ColumnTable):
    """Runs that a collapse tries, one row each, in the order in which the kernel tries them.

    Attributes:
        range: int64, index of the PMD range.
        offset: int32, first PTE of the run within its range.
        order: int8.
        filled: int32, PTEs of the run without contents, which its collapse fills.
        result: int8, :class:`~mthp.results.ScanResult`.
    """

    DTYPES = (np.int64, np.int32, np.int8, np.int32, np.int8)

    range: NDArray[np.int64]
    offset: NDArray[np.int32]
    order: NDArray[np.int8]
    filled: NDArray[np.int32]
    result: NDArray[np.int8]

    @property
    def succeeded(self) -> Attempts:
        """The attempts that end in a collapse."""
        return self[self.result == ScanResult.SUCCEED]
