"""Tables as columns: NumPy arrays of one length, side by side in a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mthp.tabular import Tabular


@dataclass(frozen=True)
class Table(Tabular):
    """Base of such dataclasses. All fields are arrays of the shape (rows,)."""

    DTYPES: ClassVar[tuple[type[np.generic], ...]]
    """The dtype of each column, in the order of the fields."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        """The chosen rows, by a mask or by indices."""
        return type(self)(*(column[chosen] for column in self._columns()))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All rows of `parts`, one part after another."""
        if not parts:
            return cls(*(np.empty(0, dtype) for dtype in cls.DTYPES))
        return cls(*(np.concatenate(columns) for columns in zip(*(part._columns() for part in parts), strict=True)))

    def table_columns(self) -> dict[str, NDArray[np.generic]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _columns(self) -> list[NDArray[np.generic]]:
        return [getattr(self, f.name) for f in fields(self)]
