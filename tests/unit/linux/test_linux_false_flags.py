"""Kernels that show every anonymous page as merged (KPF_KSM): the flag is not believed there."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from mthp.linux import abi, pagecolumns
from mthp.linux.kpageflags import FolioReader

ANON = abi.KPF_ANON | abi.KPF_SWAPBACKED


class Folios:
    """kpageflags of a machine on which this process's own page has some flags."""

    def __init__(self, flags: int) -> None:
        self._flags = flags

    def words_at(self, pfns: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
        assert pfns.tolist() == [77]
        return np.array([self._flags], np.uint64)


@pytest.mark.parametrize(("flags", "believed"), [(ANON, True), (ANON | abi.KPF_KSM, False)])
def test_a_page_that_nobody_merged_tells(flags: int, believed: bool) -> None:
    mask = int(pagecolumns._believed(cast("FolioReader", Folios(flags)), lambda: 77))
    assert bool(mask & abi.KPF_KSM) == believed
    assert mask | abi.KPF_KSM == 2**64 - 1


def test_without_frames_nothing_is_known_against_it() -> None:
    assert int(pagecolumns._believed(cast("FolioReader", Folios(abi.KPF_KSM)), lambda: 0)) == 2**64 - 1
    assert int(pagecolumns._believed(None)) == 2**64 - 1
