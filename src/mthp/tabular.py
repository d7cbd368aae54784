"""Results as tables of other libraries: Arrow and pandas, which are imported at their first use.

A row has the keys of its JSON object; nested objects become columns of their own, such as ``khugepaged_reason``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from mthp.errors import UnsupportedError
from mthp.objects import to_json


class Tabular:
    """Base of results that have rows.

    Attributes:
        ROWS: name of the attribute with the rows.
    """

    __slots__ = ()

    ROWS: ClassVar[str]

    def table_columns(self) -> Mapping[str, Any]:
        """Return the columns of the table by name, each a list or an array, all of the same length."""
        rows: Iterable[Any] = getattr(self, self.ROWS)
        flat = [dict(_flat("", to_json(row, getattr(self, "geometry", None)))) for row in rows]
        names = dict.fromkeys(name for row in flat for name in row)
        return {name: [row.get(name) for row in flat] for name in names}

    def to_arrow(self) -> Any:
        """Return the rows as a pyarrow.Table.

        Raises:
            UnsupportedError: pyarrow is missing.
        """
        return imported("pyarrow").table(dict(self.table_columns()))

    def to_pandas(self) -> Any:
        """Return the rows as a pandas.DataFrame.

        Raises:
            UnsupportedError: pandas is missing.
        """
        return imported("pandas").DataFrame(dict(self.table_columns()))


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{name}_{key}" if name else str(key), each)
    else:
        yield name, ",".join(map(str, value)) if isinstance(value, list) else value


def imported(name: Literal["pyarrow", "pandas"]) -> Any:
    """Return an optional library.

    Raises:
        UnsupportedError: the library is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} cannot be imported: {error}", help=_INSTALLED_BY[name]) from error


_INSTALLED_BY = {"pyarrow": "pip install 'mthp[snapshot]'", "pandas": "pip install pandas"}
