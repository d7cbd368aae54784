"""How long tests wait for what must happen: long enough for a machine that is busy, and longer where it is emulated."""

from __future__ import annotations

import os

FACTOR = float(os.environ.get("MTHP_TEST_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """So many seconds, times what the environment says (MTHP_TEST_PATIENCE); for limits, never for rests."""
    return seconds * FACTOR
