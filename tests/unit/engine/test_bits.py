"""Counts of set bits, by NumPy 2 and without it."""

from __future__ import annotations

import numpy as np
import pytest

from mthp.engine.bits import nibble_counts, set_bits


@pytest.mark.parametrize("older_numpy", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint64])
def test_set_bits_are_counted_by_every_numpy(
    monkeypatch: pytest.MonkeyPatch, kind: type[np.unsignedinteger], older_numpy: bool
) -> None:
    if older_numpy:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    words = np.random.default_rng(1).integers(0, np.iinfo(kind).max, (3, 40), kind, endpoint=True)
    for part in (words, words[:, ::2]):
        counts = set_bits(part)
        assert counts.dtype == np.uint8
        assert counts.tolist() == [[int(word).bit_count() for word in row] for row in part]


def test_a_byte_has_its_lower_half_first() -> None:
    assert nibble_counts(np.array([[0x7F, 0x10]], np.uint8)).tolist() == [[4, 3, 0, 1]]
